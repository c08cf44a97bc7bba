/** Pictures, maps and matrices on a canvas. Colours are the style sheet's, so that they follow light and dark. */

import type { Tensor } from "./packed";

type Rgb = [number, number, number];

export interface Palette {
  page: Rgb;
  ink: Rgb;
  quiet: Rgb;
  rule: Rgb;
  accent: Rgb;
  heat: Rgb;
}

const NAMES: (keyof Palette)[] = ["page", "ink", "quiet", "rule", "accent", "heat"];

export function palette(element: Element): Palette {
  const style = getComputedStyle(element);
  const read = (name: string): Rgb => {
    const hex = style.getPropertyValue(`--${name}`).trim().replace("#", "");
    const value = parseInt(hex, 16);
    return [(value >> 16) & 255, (value >> 8) & 255, value & 255];
  };
  return Object.fromEntries(NAMES.map((name) => [name, read(name)])) as unknown as Palette;
}

export const css = (color: Rgb, alpha = 1): string => `rgb(${color[0]} ${color[1]} ${color[2]} / ${alpha})`;

export function mix(from: Rgb, to: Rgb, share: number): Rgb {
  const t = Math.min(1, Math.max(0, share));
  return [0, 1, 2].map((i) => Math.round(from[i] + (to[i] - from[i]) * t)) as Rgb;
}

/** Zero is the page; above it towards heat, below it towards accent. */
export function signed(colors: Palette, value: number): Rgb {
  return value >= 0 ? mix(colors.page, colors.heat, value) : mix(colors.page, colors.accent, -value);
}

/** A canvas of so many CSS pixels, sharp on any screen. */
export function sized(canvas: HTMLCanvasElement, width: number, height: number): CanvasRenderingContext2D {
  const ratio = Math.max(1, Math.min(3, devicePixelRatio || 1));
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d") as CanvasRenderingContext2D;
  context.setTransform(canvas.width / width, 0, 0, canvas.height / height, 0, 0);
  return context;
}

/** uint8 (h, w, 1 or 3) as a canvas of its own size; gray, and towards the page by ``faint``, if asked. */
export function bitmap(pixels: Tensor, gray = false, faint = 0, page: Rgb = [255, 255, 255]): HTMLCanvasElement {
  const [height, width, channels] = pixels.shape;
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d") as CanvasRenderingContext2D;
  const image = context.createImageData(width, height);
  for (let i = 0; i < width * height; i++) {
    const at = i * channels;
    let color: Rgb =
      channels === 3
        ? [pixels.data[at], pixels.data[at + 1], pixels.data[at + 2]]
        : [pixels.data[at], pixels.data[at], pixels.data[at]];
    if (gray) {
      const luma = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2];
      color = [luma, luma, luma];
    }
    if (faint) color = mix(color, page, faint);
    image.data.set([color[0], color[1], color[2], 255], 4 * i);
  }
  context.putImageData(image, 0, 0);
  return canvas;
}

export interface Overlay {
  /** One value for each patch, in reading order. */
  values: ArrayLike<number>;
  /** What gets the full colour. */
  top: number;
  /** Written into patches that are large enough. */
  format?: (value: number) => string;
}

/** How far a picture steps back towards the page where values are laid over it. */
const FAINT = 0.72;

export interface PictureOptions {
  width: number;
  height: number;
  grid: [number, number] | null;
  overlay?: Overlay | null;
  selected?: number | null;
  marked?: number | null;
  lines?: boolean;
}

/** A picture with what is laid over its patches, the chosen patch outlined. */
export function drawPicture(canvas: HTMLCanvasElement, pixels: Tensor, options: PictureOptions): void {
  const { width, height, grid, overlay, selected, marked } = options;
  const colors = palette(canvas);
  const context = sized(canvas, width, height);
  context.imageSmoothingEnabled = Math.max(pixels.shape[0], pixels.shape[1]) > 64;
  context.drawImage(bitmap(pixels, !!overlay, overlay ? FAINT : 0, colors.page), 0, 0, width, height);
  if (!grid) return;
  const [rows, columns] = grid;
  const cell = (patch: number): [number, number, number, number] => {
    const row = Math.floor(patch / columns);
    const column = patch % columns;
    const left = Math.round((column * width) / columns);
    const top = Math.round((row * height) / rows);
    return [left, top, Math.round(((column + 1) * width) / columns) - left, Math.round(((row + 1) * height) / rows) - top];
  };
  if (overlay) {
    for (let patch = 0; patch < rows * columns; patch++) {
      const share = overlay.top > 0 ? overlay.values[patch] / overlay.top : 0;
      if (!Number.isFinite(share)) continue;
      const color = share < 0 ? colors.accent : colors.heat;
      context.fillStyle = css(color, 0.9 * Math.min(1, Math.abs(share)));
      context.fillRect(...cell(patch));
    }
    if (overlay.format && Math.min(width / columns, height / rows) >= 34) {
      context.font = "12px system-ui, sans-serif";
      context.textAlign = "center";
      context.textBaseline = "middle";
      for (let patch = 0; patch < rows * columns; patch++) {
        const value = overlay.values[patch];
        if (!Number.isFinite(value)) continue;
        const [left, top, wide, high] = cell(patch);
        const strong = Math.abs(value) / overlay.top > 0.55;
        const text = overlay.format(value);
        context.lineWidth = 3;
        context.strokeStyle = css(strong ? mix(colors.page, value < 0 ? colors.accent : colors.heat, 0.85) : colors.page, 0.75);
        context.lineJoin = "round";
        context.strokeText(text, left + wide / 2, top + high / 2);
        context.fillStyle = css(strong ? colors.page : colors.ink);
        context.fillText(text, left + wide / 2, top + high / 2);
      }
    }
  }
  if (options.lines) {
    context.strokeStyle = css(colors.quiet, 0.35);
    context.lineWidth = 0.5;
    context.beginPath();
    for (let column = 1; column < columns; column++) {
      const x = Math.round((column * width) / columns);
      context.moveTo(x, 0);
      context.lineTo(x, height);
    }
    for (let row = 1; row < rows; row++) {
      const y = Math.round((row * height) / rows);
      context.moveTo(0, y);
      context.lineTo(width, y);
    }
    context.stroke();
  }
  const outline = (patch: number, thick: number, color: string): void => {
    const [left, top, wide, high] = cell(patch);
    context.strokeStyle = color;
    context.lineWidth = thick;
    context.strokeRect(left + thick / 2, top + thick / 2, wide - thick, high - thick);
  };
  for (const [patch, color] of [[marked, colors.heat], [selected, colors.accent]] as const) {
    if (patch === null || patch === undefined || patch < 0 || patch >= rows * columns) continue;
    outline(patch, 4, css(colors.page));
    outline(patch, 2.5, css(color));
  }
}

/** Part of a picture around one patch, the patch outlined: all of a small picture, of a large one its surroundings. */
export function drawPatch(
  canvas: HTMLCanvasElement, pixels: Tensor, grid: [number, number], patch: number, side: number,
): void {
  const [height, width] = pixels.shape;
  const [rows, columns] = grid;
  const colors = palette(canvas);
  const context = sized(canvas, side, side);
  const [row, column] = [Math.floor(patch / columns), patch % columns];
  const around = rows * columns <= 64 ? Math.max(rows, columns) : 5;
  const [high, wide] = [Math.min(rows, around), Math.min(columns, around)];
  const first = Math.min(Math.max(0, row - Math.floor(high / 2)), rows - high);
  const left = Math.min(Math.max(0, column - Math.floor(wide / 2)), columns - wide);
  const [ph, pw] = [height / rows, width / columns];
  context.imageSmoothingEnabled = Math.max(height, width) > 64;
  context.drawImage(bitmap(pixels), left * pw, first * ph, wide * pw, high * ph, 0, 0, side, side);
  const [x, y] = [((column - left) * side) / wide, ((row - first) * side) / high];
  context.lineWidth = 3;
  context.strokeStyle = css(colors.page);
  context.strokeRect(x + 1, y + 1, side / wide - 2, side / high - 2);
  context.lineWidth = 1.75;
  context.strokeStyle = css(colors.heat);
  context.strokeRect(x + 1, y + 1, side / wide - 2, side / high - 2);
}

export interface MatrixOptions {
  rows: number;
  columns: number;
  value: (row: number, column: number) => number;
  top: number;
  width: number;
  height: number;
  row?: number | null;
  column?: number | null;
  numbers?: boolean;
}

/** A matrix as cells: the page is nothing, the full colour is ``top``. */
export function drawMatrix(canvas: HTMLCanvasElement, options: MatrixOptions): void {
  const { rows, columns, value, top, width, height } = options;
  const colors = palette(canvas);
  const context = sized(canvas, width, height);
  const [high, wide] = [height / rows, width / columns];
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) {
      const share = top > 0 ? value(row, column) / top : 0;
      context.fillStyle = css(signed(colors, share));
      context.fillRect(column * wide, row * high, Math.ceil(wide), Math.ceil(high));
    }
  }
  if (options.numbers) {
    context.font = "11px system-ui, sans-serif";
    context.textAlign = "center";
    context.textBaseline = "middle";
    for (let row = 0; row < rows; row++) {
      for (let column = 0; column < columns; column++) {
        if (row === column) continue;
        const shown = value(row, column);
        context.fillStyle = css(shown / top > 0.55 ? colors.page : colors.ink);
        context.fillText(shown.toFixed(2).replace(/^0/, ""), (column + 0.5) * wide, (row + 0.5) * high);
      }
    }
  }
  context.strokeStyle = css(colors.rule);
  context.strokeRect(0.5, 0.5, width - 1, height - 1);
  context.strokeStyle = css(colors.accent);
  context.lineWidth = 2;
  if (options.row !== null && options.row !== undefined) {
    context.strokeRect(1, options.row * high + 0.5, width - 2, Math.max(2, high - 1));
  }
  if (options.column !== null && options.column !== undefined) {
    context.strokeRect(options.column * wide + 0.5, 1, Math.max(2, wide - 1), height - 2);
  }
}

/** Bars of either sign from a middle line, the chosen one in the other colour. */
export function drawBars(
  canvas: HTMLCanvasElement, values: ArrayLike<number>, width: number, height: number, chosen: number | null,
): void {
  const colors = palette(canvas);
  const context = sized(canvas, width, height);
  let [low, high] = [0, 1e-12];
  for (let i = 0; i < values.length; i++) {
    low = Math.min(low, values[i]);
    high = Math.max(high, values[i]);
  }
  const pad = 6;
  const y = (value: number): number => pad + ((high - value) / (high - low)) * (height - 2 * pad);
  const step = width / values.length;
  const bar = Math.max(1, step * (step > 4 ? 0.7 : 1));
  for (let i = 0; i < values.length; i++) {
    if (values[i] === 0) continue;
    context.fillStyle = css(i === chosen ? colors.accent : colors.heat);
    const [from, to] = [y(Math.max(0, values[i])), y(Math.min(0, values[i]))];
    context.fillRect(i * step + (step - bar) / 2, from, bar, Math.max(1, to - from));
  }
  context.strokeStyle = css(colors.quiet);
  context.lineWidth = 1;
  context.beginPath();
  context.moveTo(0, Math.round(y(0)) + 0.5);
  context.lineTo(width, Math.round(y(0)) + 0.5);
  context.stroke();
  if (chosen !== null && chosen < values.length) {
    context.fillStyle = css(colors.accent);
    const x = (chosen + 0.5) * step;
    context.beginPath();
    context.moveTo(x - 4, height);
    context.lineTo(x + 4, height);
    context.lineTo(x, height - 6);
    context.fill();
  }
}

export interface Point {
  x: number;
  y: number;
}

export interface ScatterOptions {
  width: number;
  height: number;
  points: Point[];
  chosen: number | null;
  /** Joined by a line, from open to full. */
  path?: Point[];
  names?: string[];
  /** Points that stand for the whole input, drawn as squares. */
  special?: number;
}

/** Points on a plane with one scale for both axes; where each is on the canvas. */
export function drawScatter(canvas: HTMLCanvasElement, options: ScatterOptions): Point[] {
  const { width, height, points, chosen, path = [] } = options;
  const colors = palette(canvas);
  const context = sized(canvas, width, height);
  const all = [...points, ...path];
  const [xs, ys] = [all.map((p) => p.x), all.map((p) => p.y)];
  const [left, right] = [Math.min(...xs), Math.max(...xs)];
  const [bottom, top] = [Math.min(...ys), Math.max(...ys)];
  const pad = 14;
  const scale = Math.min((width - 2 * pad) / (right - left || 1), (height - 2 * pad) / (top - bottom || 1));
  const place = (p: Point): Point => ({
    x: width / 2 + (p.x - (left + right) / 2) * scale,
    y: height / 2 - (p.y - (bottom + top) / 2) * scale,
  });
  const zero = place({ x: 0, y: 0 });
  context.strokeStyle = css(colors.rule);
  context.beginPath();
  if (zero.x > 0 && zero.x < width) {
    context.moveTo(Math.round(zero.x) + 0.5, 0);
    context.lineTo(Math.round(zero.x) + 0.5, height);
  }
  if (zero.y > 0 && zero.y < height) {
    context.moveTo(0, Math.round(zero.y) + 0.5);
    context.lineTo(width, Math.round(zero.y) + 0.5);
  }
  context.stroke();
  const placed = points.map(place);
  const dot = (p: Point, size: number, square: boolean): void => {
    context.beginPath();
    if (square) context.rect(p.x - size, p.y - size, 2 * size, 2 * size);
    else context.arc(p.x, p.y, size, 0, 7);
    context.fill();
    context.stroke();
  };
  context.lineWidth = 1;
  placed.forEach((p, i) => {
    if (i === chosen) return;
    context.fillStyle = css(colors.quiet, 0.55);
    context.strokeStyle = css(colors.page);
    dot(p, points.length > 100 ? 2.5 : 4, i < (options.special ?? 0));
  });
  const way = path.map(place);
  if (way.length > 1) {
    context.strokeStyle = css(colors.heat);
    context.lineWidth = 1.75;
    context.beginPath();
    way.forEach((p, i) => (i ? context.lineTo(p.x, p.y) : context.moveTo(p.x, p.y)));
    context.stroke();
    way.forEach((p, i) => {
      context.strokeStyle = css(colors.heat);
      context.fillStyle = i % 2 || i === way.length - 1 ? css(colors.heat) : css(colors.page);
      dot(p, 3.25, false);
    });
    context.fillStyle = css(colors.ink);
    context.font = "11px system-ui, sans-serif";
    context.textBaseline = "bottom";
    [0, way.length - 1].forEach((i) => {
      const name = options.names?.[i];
      if (!name) return;
      context.textAlign = way[i].x > width / 2 ? "right" : "left";
      context.fillText(name, way[i].x + (way[i].x > width / 2 ? -6 : 6), way[i].y - 4);
    });
  } else if (chosen !== null && placed[chosen]) {
    context.fillStyle = css(colors.accent);
    context.strokeStyle = css(colors.page);
    context.lineWidth = 1.5;
    dot(placed[chosen], 6, chosen < (options.special ?? 0));
  }
  return placed;
}
