/** What views are made of: a canvas that redraws, a picture whose patches can be chosen, charts, matrices. */

import { Fragment, type ComponentChildren, type JSX } from "preact";
import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";
import uPlot from "uplot";
import type { LayerSeen, Look } from "./answers";
import { css, drawBars, drawMatrix, drawPatch, drawPicture, drawScatter, palette, type Overlay, type Point } from "./draw";
import type { Tensor } from "./packed";
import { clip, number, plain, shown, tokenName, visible } from "./words";

/** Counts how often light became dark or the other way around: what is drawn by hand must be drawn again. */
export function useScheme(): number {
  const [turns, setTurns] = useState(0);
  useEffect(() => {
    const query = matchMedia("(prefers-color-scheme: dark)");
    const turn = (): void => setTurns((n) => n + 1);
    query.addEventListener("change", turn);
    return () => query.removeEventListener("change", turn);
  }, []);
  return turns;
}

/** Whether a media query holds. */
export function useMedia(query: string): boolean {
  const [holds, setHolds] = useState(() => matchMedia(query).matches);
  useEffect(() => {
    const list = matchMedia(query);
    const follow = (): void => setHolds(list.matches);
    list.addEventListener("change", follow);
    return () => list.removeEventListener("change", follow);
  }, [query]);
  return holds;
}

/** Width in CSS pixels of the element behind the reference, at least 1. */
export function useWidth<T extends HTMLElement>(): [preactRef<T>, number] {
  const reference = useRef<T>(null);
  const [width, setWidth] = useState(1);
  useLayoutEffect(() => {
    const element = reference.current;
    if (!element) return;
    const measure = (): void => setWidth(Math.max(1, Math.floor(element.clientWidth)));
    measure();
    const observer = new ResizeObserver(measure);
    observer.observe(element);
    return () => observer.disconnect();
  }, []);
  return [reference, width];
}
type preactRef<T> = { current: T | null };

export function Figure(props: { title: string; children: ComponentChildren; text?: ComponentChildren; wide?: boolean }): JSX.Element {
  return (
    <figure class={props.wide ? "wide" : undefined}>
      <h3>{props.title}</h3>
      {props.children}
      {props.text ? <figcaption>{props.text}</figcaption> : null}
    </figure>
  );
}

export function Waiting(props: { error: string | null; what: string }): JSX.Element {
  return props.error ? <p class="warn" role="alert">{props.error}</p> : <p class="quiet" aria-live="polite">{props.what} …</p>;
}

/** A canvas that is drawn again whenever what it depends on changes. */
export function Drawn(props: {
  draw: (canvas: HTMLCanvasElement) => void;
  label: string;
  on: unknown[];
  onPoint?: (x: number, y: number) => void;
  class?: string;
}): JSX.Element {
  const canvas = useRef<HTMLCanvasElement>(null);
  const scheme = useScheme();
  useLayoutEffect(() => {
    if (canvas.current) props.draw(canvas.current);
  }, [...props.on, scheme]);
  const point = (event: MouseEvent): void => {
    const box = (event.currentTarget as HTMLElement).getBoundingClientRect();
    props.onPoint?.((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
  };
  return (
    <canvas ref={canvas} class={`${props.class ?? ""} ${props.onPoint ? "pick" : ""}`} role="img" aria-label={props.label}
      onClick={props.onPoint ? point : undefined} />
  );
}

const ENDS = /[\n\u200b]+$/;

/** A passage word by word, shaded by one value for each; words can be chosen where it says so. */
export function Passage(props: {
  words: string[];
  values?: ArrayLike<number> | null;
  top?: number;
  chosen?: number | null;
  onChoose?: (index: number) => void;
  format?: (value: number) => string;
}): JSX.Element {
  const { words, values, chosen, onChoose, format } = props;
  const holder = useRef<HTMLDivElement>(null);
  const scheme = useScheme();
  const top = props.top ?? largest(values ?? []);
  useLayoutEffect(() => {
    const element = holder.current;
    if (!element) return;
    const colors = palette(element);
    for (let i = 0; i < element.children.length; i++) {
      const share = values && top > 0 && Number.isFinite(values[i]) ? Math.max(-1, Math.min(1, values[i] / top)) : 0;
      // Set on the element, as a policy without inline styles allows.
      (element.children[i] as HTMLElement).style.background = share ? css(share < 0 ? colors.accent : colors.heat, 0.6 * Math.abs(share)) : "";
    }
  }, [words, values, top, scheme]);
  const choose = (event: MouseEvent): void => {
    const index = (event.target as HTMLElement).dataset?.i;
    if (index !== undefined) onChoose?.(Number(index));
  };
  return (
    <div class={onChoose ? "passage pick" : "passage"} ref={holder} onClick={onChoose ? choose : undefined}>
      {words.map((word, i) => (
        // What ends a line stands behind the word, so that a frame around it stays in one line.
        <Fragment key={i}>
          <span data-i={i} class={i === chosen ? "word chosen" : "word"} title={values && format ? `${shown(word)}: ${format(values[i])}` : undefined}>{visible(word).replace(ENDS, "")}</span>
          {ENDS.exec(visible(word))?.[0] ?? ""}
        </Fragment>
      ))}
    </div>
  );
}

/** The tokens of an input, one of which is chosen: patches over the picture, or words. */
export function Tokens(props: {
  look: Look;
  token: number;
  /** A token, or how the chosen one moves: keys may come faster than what they choose is drawn. */
  onToken: (token: number | ((now: number) => number)) => void;
  side: number;
  /** One value for each token. */
  values?: ArrayLike<number> | null;
  top?: number;
  said?: string;
  name: string;
  format?: (value: number) => string;
}): JSX.Element {
  const { look, token, onToken, values } = props;
  const prefix = look.prefix.length;
  const total = look.norms.shape[1];
  const top = props.top ?? largest(values ?? [], prefix);
  const here = tokenName(token, look.prefix, look.grid, look.words);
  const keys = (event: KeyboardEvent): void => {
    const columns = look.grid ? look.grid[1] : 1;
    const moves: Record<string, number> = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns };
    const home: Record<string, number> = { Home: 0, End: total - 1 };
    if (!(event.key in home || event.key in moves)) return;
    event.preventDefault();
    onToken((now) => {
      let next = event.key in home ? home[event.key] : now + moves[event.key];
      if (event.key === "ArrowDown" && now < prefix) next = prefix;
      if (event.key === "ArrowUp" && now >= prefix && now - prefix < columns) next = Math.max(0, prefix - 1);
      return next >= 0 && next < total ? next : now;
    });
  };
  const group = { tabIndex: 0, role: "application", "aria-label": `${props.name}; ${here}. Arrow keys choose another`, onKeyDown: keys } as const;
  if (!look.pixels || !look.grid) {
    const words = look.words ?? Array.from({ length: total }, (_, i) => String(i + 1));
    return (
      <div class="words" {...group}>
        <Passage words={words} values={values} top={top} chosen={token} onChoose={onToken} format={props.format} />
      </div>
    );
  }
  const pixels = look.pixels;
  const [rows, columns] = look.grid;
  const ratio = (rows * pixels.shape[0] * columns) / (columns * pixels.shape[1] * rows);
  const [width, height] = ratio > 1 ? [Math.round(props.side / ratio), props.side] : [props.side, Math.round(props.side * ratio)];
  const overlay: Overlay | null = values
    ? { values: Array.from({ length: rows * columns }, (_, i) => values[i + prefix]), top, format: props.format }
    : null;
  return (
    <div class="tokens">
      <div class="patches" {...group}>
        <Drawn
          label={props.said || `${props.name}; ${here} is outlined`}
          on={[pixels, values, token, width, top]}
          draw={(canvas) => drawPicture(canvas, pixels, { width, height, grid: look.grid, overlay, selected: token - prefix, lines: true })}
          onPoint={(x, y) => onToken(prefix + Math.min(rows - 1, Math.floor(y * rows)) * columns + Math.min(columns - 1, Math.floor(x * columns)))}
        />
      </div>
      {prefix ? (
        <div class="prefix">
          {look.prefix.map((name, i) => (
            <button type="button" key={name} aria-pressed={token === i} onClick={() => onToken(i)}>
              <Shade share={values && top > 0 ? values[i] / top : 0} />
              {name === "class" ? "class token" : name}
              {values ? <span class="value">{(props.format ?? number)(values[i])}</span> : null}
            </button>
          ))}
        </div>
      ) : null}
    </div>
  );
}

/** A coloured ground behind a word or a button; set on the element, as a policy without inline styles allows. */
function Shade(props: { share: number }): JSX.Element {
  const element = useRef<HTMLSpanElement>(null);
  const scheme = useScheme();
  useLayoutEffect(() => {
    if (!element.current) return;
    const colors = palette(element.current);
    const share = Number.isFinite(props.share) ? Math.max(-1, Math.min(1, props.share)) : 0;
    element.current.style.background = css(share < 0 ? colors.accent : colors.heat, 0.55 * Math.abs(share));
  }, [props.share, scheme]);
  return <span class="shade" ref={element} aria-hidden="true" />;
}

/** The largest size among values from ``from`` on. */
export function largest(values: ArrayLike<number>, from = 0): number {
  let top = 0;
  for (let i = from; i < values.length; i++) if (Math.abs(values[i]) > top) top = Math.abs(values[i]);
  return top;
}

/** A small map of one value for each patch; a button where it can be chosen. */
export function MiniMap(props: {
  look: Look;
  values: ArrayLike<number>;
  top?: number;
  title: string;
  said?: string;
  chosen?: boolean;
  onChoose?: () => void;
  selected?: number | null;
  side?: number;
  format?: (value: number) => string;
}): JSX.Element {
  const { look, values } = props;
  const prefix = look.prefix.length;
  const side = props.side ?? 96;
  const top = props.top ?? largest(values, prefix);
  const body = look.pixels && look.grid ? (
    <Drawn
      label={props.said || props.title}
      on={[look, values, props.selected, top, side]}
      draw={(canvas) => {
        const [rows, columns] = look.grid as [number, number];
        const pixels = look.pixels as Tensor;
        const height = Math.round((side * pixels.shape[0]) / pixels.shape[1]);
        const overlay = { values: Array.from({ length: rows * columns }, (_, i) => values[i + prefix]), top, format: props.format };
        const selected = props.selected === null || props.selected === undefined ? null : props.selected - prefix;
        drawPicture(canvas, pixels, { width: side, height, grid: look.grid, overlay, selected });
      }}
    />
  ) : look.words ? (
    <div role="img" aria-label={props.said || props.title}>
      <Passage words={look.words} values={values} top={top} chosen={props.selected} format={props.format} />
    </div>
  ) : (
    <Drawn label={props.said || props.title} on={[values, top, side]}
      draw={(canvas) => drawMatrix(canvas, { rows: 1, columns: values.length, value: (_, i) => values[i], top, width: side, height: 20 })} />
  );
  const name = <span class="name">{props.title}</span>;
  return props.onChoose ? (
    <button type="button" class="mini" aria-pressed={props.chosen} onClick={props.onChoose} title={props.said}>{body}{name}</button>
  ) : (
    <div class={look.words ? "mini text" : "mini"} title={look.words ? undefined : props.said}>{body}{name}</div>
  );
}

export interface Line {
  label: string;
  x: ArrayLike<number>;
  y: ArrayLike<number | null>;
  tone: number;
  faint?: boolean;
  points?: boolean;
}

const DASHES = [[], [6, 3], [3, 3], [9, 3, 2, 3]];

/** Lines over a common axis, with what the pointer is at in words. */
export function Chart(props: {
  lines: Line[];
  xLabel: string;
  title: string;
  height?: number;
  mark?: number | null;
  log?: boolean;
  zero?: boolean;
  whole?: boolean;
  onPick?: (x: number) => void;
  xName?: (x: number) => string;
  format?: (value: number) => string;
}): JSX.Element {
  const [holder, width] = useWidth<HTMLDivElement>();
  const scheme = useScheme();
  const [at, setAt] = useState<number | null>(null);
  const format = props.format ?? number;
  const data = useJoined(props.lines);
  const height = props.height ?? 190;
  const pick = useRef(props.onPick);
  pick.current = props.onPick;
  useLayoutEffect(() => {
    const element = holder.current;
    if (!element || width < 20) return;
    const style = getComputedStyle(element);
    const color = (name: string): string => style.getPropertyValue(`--${name}`).trim();
    const tones = [color("accent"), color("heat"), color("other"), color("third")];
    const axis = {
      stroke: color("quiet"), font: "11px system-ui, sans-serif", ticks: { show: false },
      grid: { stroke: color("rule"), width: 1, ...(props.log ? { filter: decades } : {}) },
    };
    const chart = new uPlot(
      {
        width, height,
        legend: { show: false },
        cursor: { y: false, drag: { x: false, y: false }, points: { size: 7 } },
        padding: [8, 10, 0, 0],
        scales: {
          x: { time: false },
          y: props.log
            ? { distr: 3 }
            : { range: (_, low, high) => spread(props.zero ? Math.min(0, low) : low, props.zero ? Math.max(0, high) : high) },
        },
        axes: [
          { ...axis, size: 26, gap: 4, grid: { show: false }, ...(props.whole ? { incrs: [1, 2, 5, 10, 20, 50] } : {}),
            values: (_, ticks) => ticks.map((tick) => (props.whole && tick % 1 ? "" : plain(tick))) },
          { ...axis, size: 46, gap: 4, values: (_, ticks) => ticks.map((tick) => (tick === null ? "" : format === number ? plain(tick) : format(tick))) },
        ],
        series: [
          {},
          ...props.lines.map((line) => ({
            stroke: tones[line.tone % 4], width: line.faint ? 1 : 1.75, spanGaps: true, alpha: line.faint ? 0.6 : 1,
            dash: line.faint ? [1.5, 3] : DASHES[line.tone % 4],
            points: { show: !!line.points, size: 5.5, fill: tones[line.tone % 4], width: 0 },
          })),
        ],
        hooks: {
          setCursor: [(u) => setAt(u.cursor.idx ?? null)],
          draw: [
            (u) => {
              if (props.mark === null || props.mark === undefined) return;
              const x = Math.round(u.valToPos(props.mark, "x", true));
              u.ctx.save();
              u.ctx.strokeStyle = color("quiet");
              u.ctx.setLineDash([2, 3]);
              u.ctx.beginPath();
              u.ctx.moveTo(x, u.bbox.top);
              u.ctx.lineTo(x, u.bbox.top + u.bbox.height);
              u.ctx.stroke();
              u.ctx.restore();
            },
          ],
        },
      },
      data,
      element,
    );
    chart.over.addEventListener("click", () => {
      const index = chart.cursor.idx;
      if (index !== null && index !== undefined) pick.current?.(data[0][index]);
    });
    return () => chart.destroy();
  }, [width, scheme, data, props.mark, props.log, height]);
  const shown = props.lines.filter((line) => line.label);
  const xs = data[0];
  const name = props.xName ?? ((x: number) => `${props.xLabel} ${number(x)}`);
  return (
    <div class="chart">
      {shown.length > 1 ? (
        <div class="legend">
          {shown.map((line) => <span key={line.label}><i class={`swatch t${line.tone % 4}${line.faint ? " faint" : ""}`} />{line.label}</span>)}
        </div>
      ) : null}
      <div ref={holder} class={props.onPick ? "plot pick" : "plot"} role="img" aria-label={props.title} />
      <div class="readout" aria-hidden="true">
        {at !== null && xs[at] !== undefined
          ? `${name(xs[at])}: ${props.lines.map((line, i) => {
              const value = data[i + 1][at];
              return value === null || value === undefined ? "" : `${line.label ? `${clip(line.label, 24)} ` : ""}${format(value)}`;
            }).filter(Boolean).join(", ")}`
          : props.xLabel}
      </div>
    </div>
  );
}

/** Of a logarithmic axis, the powers of ten. */
const decades = (_: uPlot, splits: number[]): (number | null)[] => splits.map((value) => (Math.log10(value) % 1 === 0 ? value : null));

function spread(low: number, high: number): [number, number] {
  if (!Number.isFinite(low) || !Number.isFinite(high)) return [0, 1];
  const pad = high - low > 1e-9 * Math.max(Math.abs(low), Math.abs(high)) ? 0.06 * (high - low) : Math.abs(high) * 0.1 || 1;
  return [low < 0 || low - pad > 0 ? low - pad : Math.min(0, low), high + pad];
}

/** All lines over one axis, with gaps where one has no point; the same object as long as nothing changed. */
function useJoined(lines: Line[]): [number[], ...(number | null)[][]] {
  const kept = useRef<{ key: string; data: [number[], ...(number | null)[][]] } | null>(null);
  const key = JSON.stringify(lines.map((line) => [line.label, line.tone, Array.from(line.x), Array.from(line.y)]));
  if (kept.current?.key !== key) {
    const xs = [...new Set(lines.flatMap((line) => Array.from(line.x)))].filter(Number.isFinite).sort((a, b) => a - b);
    const at = new Map(xs.map((x, i) => [x, i]));
    const ys = lines.map((line) => {
      const column: (number | null)[] = new Array(xs.length).fill(null);
      for (let i = 0; i < line.x.length; i++) {
        const [place, value] = [at.get(line.x[i]), line.y[i]];
        if (place !== undefined && value !== null && Number.isFinite(value)) column[place] = value;
      }
      return column;
    });
    kept.current = { key, data: [xs, ...ys] };
  }
  return kept.current.data;
}

/** A square matrix whose rows can be chosen. */
export function Matrix(props: {
  rows: number;
  columns: number;
  value: (row: number, column: number) => number;
  top: number;
  row: number | null;
  onRow?: (row: number, column: number) => void;
  numbers?: boolean;
  label: string;
  most?: number;
  /** Pixels that a row is high at least, where cells need not be square. */
  least?: number;
  on: unknown;
}): JSX.Element {
  const [holder, width] = useWidth<HTMLDivElement>();
  const side = Math.min(width, props.most ?? 330);
  const height = Math.round(Math.max((side * props.rows) / props.columns, props.rows * (props.least ?? 0)));
  return (
    <div ref={holder}>
      <Drawn
        label={props.label}
        on={[props.on, props.row, side]}
        draw={(canvas) => drawMatrix(canvas, { ...props, width: side, height })}
        onPoint={props.onRow && ((x, y) => props.onRow?.(Math.min(props.rows - 1, Math.floor(y * props.rows)), Math.min(props.columns - 1, Math.floor(x * props.columns))))}
      />
    </div>
  );
}

export function Bars(props: {
  values: ArrayLike<number>;
  chosen: number | null;
  onChoose?: (index: number) => void;
  label: string;
  height?: number;
}): JSX.Element {
  const [holder, width] = useWidth<HTMLDivElement>();
  return (
    <div ref={holder}>
      <Drawn
        label={props.label}
        on={[props.values, props.chosen, width]}
        draw={(canvas) => drawBars(canvas, props.values, width, props.height ?? 110, props.chosen)}
        onPoint={props.onChoose && ((x) => props.onChoose?.(Math.min(props.values.length - 1, Math.floor(x * props.values.length))))}
      />
    </div>
  );
}

export function Scatter(props: {
  points: Point[];
  chosen: number | null;
  onChoose?: (index: number) => void;
  path?: Point[];
  names?: string[];
  special?: number;
  label: string;
  on: unknown[];
  height?: number;
}): JSX.Element {
  const [holder, width] = useWidth<HTMLDivElement>();
  const placed = useRef<Point[]>([]);
  const height = props.height ?? 260;
  const wide = Math.min(width, 420);
  return (
    <div ref={holder}>
      <Drawn
        label={props.label}
        on={[...props.on, props.chosen, wide]}
        draw={(canvas) => {
          placed.current = drawScatter(canvas, { ...props, width: wide, height });
        }}
        onPoint={props.onChoose && ((x, y) => {
          const distance = (p: Point): number => (p.x - x * wide) ** 2 + (p.y - y * height) ** 2;
          let best = 0;
          placed.current.forEach((p, i) => { if (distance(p) < distance(placed.current[best])) best = i; });
          props.onChoose?.(best);
        })}
      />
    </div>
  );
}

export function Patch(props: { pixels: Tensor; grid: [number, number]; patch: number; label: string; side?: number }): JSX.Element {
  return <Drawn label={props.label} on={[props.pixels, props.patch]}
    draw={(canvas) => drawPatch(canvas, props.pixels, props.grid, props.patch, props.side ?? 64)} />;
}

export function Thumb(props: { pixels: Tensor; label: string; side: number }): JSX.Element {
  return <Drawn label={props.label} on={[props.pixels, props.side]}
    draw={(canvas) => {
      const [h, w] = props.pixels.shape;
      const scale = props.side / Math.max(h, w);
      drawPicture(canvas, props.pixels, { width: Math.max(1, Math.round(w * scale)), height: Math.max(1, Math.round(h * scale)), grid: null });
    }} />;
}

/** Row ``index`` of an array's last two axes, at ``head`` of a first one. */
export function row(tensor: Tensor, ...index: number[]): Float32Array {
  const width = tensor.shape[tensor.shape.length - 1];
  const at = index.reduce((sum, i, axis) => sum * tensor.shape[axis] + i, 0);
  return (tensor.data as Float32Array).subarray(at * width, (at + 1) * width);
}

export function cosines(tokens: Tensor, token: number): Float32Array {
  const [n] = tokens.shape;
  const one = row(tokens, token);
  const size = (v: Float32Array): number => Math.sqrt(v.reduce((sum, x) => sum + x * x, 0));
  const length = size(one);
  return Float32Array.from({ length: n }, (_, i) => {
    const other = row(tokens, i);
    let dot = 0;
    for (let k = 0; k < one.length; k++) dot += one[k] * other[k];
    return dot / (length * size(other) || 1);
  });
}

export const codeOf = (seen: LayerSeen): Tensor | null => (seen.code === "after" ? seen.after : seen.code);
