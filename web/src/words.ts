/** Numbers as a reader wants them, as the report writes them. */

const THIN = "\u202f";
const MINUS = "\u2212";

export function number(value: number | null | undefined, digits: number = 3): string {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e7)) {
    return value.toExponential(digits - 1).replace("e+", "e").replaceAll("-", MINUS);
  }
  const places = size === 0 ? 0 : Math.max(0, digits - 1 - Math.floor(Math.log10(size)));
  const [whole, fraction] = size.toFixed(Math.min(places, 6)).split(".");
  const grouped = whole.length > 4 ? whole.replace(/\B(?=(\d{3})+$)/g, THIN) : whole;
  const shown = fraction && !/^0+$/.test(fraction) ? `${grouped}.${fraction}` : grouped;
  return value < 0 && Number(size.toFixed(Math.min(places, 6))) !== 0 ? MINUS + shown : shown;
}

/** A number that was set, or marks an axis: no digits that say nothing. */
export function plain(value: number | null | undefined): string {
  const shown = number(value);
  return shown.includes(".") && !shown.includes("e") ? shown.replace(/\.?0+$/, "") : shown;
}

export function percent(share: number | null | undefined): string {
  if (share === null || share === undefined || !Number.isFinite(share)) return "–";
  const value = 100 * share;
  const places = value === 0 || value === 100 || value >= 99.95 ? 0 : Math.abs(value) < 10 ? 1 : 0;
  return `${value.toFixed(places)}${THIN}%`;
}

export function count(value: number): string {
  return String(Math.round(value)).replace(/\B(?=(\d{3})+$)/g, THIN);
}

export function plural(n: number, one: string, many = `${one}s`): string {
  return `${count(n)} ${n === 1 ? one : many}`;
}

export function duration(seconds: number | null): string {
  if (seconds === null) return "–";
  if (seconds < 90) return `${number(seconds, 2)} s`;
  if (seconds < 5400) return `${number(seconds / 60, 2)} min`;
  return `${number(seconds / 3600, 2)} h`;
}

/** A name cut in its middle, because names often differ only at their ends. */
export function clip(text: string, most: number): string {
  if (text.length <= most) return text;
  const tail = Math.floor((most - 1) / 3);
  return `${text.slice(0, most - 1 - tail)}…${text.slice(text.length - tail)}`;
}

/** A word as it can be seen: spaces, ends of lines and whatever does not print have signs. */
export function visible(word: string): string {
  return word.replace(/[\s\p{Cc}\p{Cf}]/gu, (sign) => {
    if (sign === " ") return "·\u200b"; // a line may end here
    if (sign === "\n") return "↵\n";
    if (sign === "\t") return "⇥\u200b";
    return `\\u{${(sign.codePointAt(0) as number).toString(16)}}`;
  });
}

/** The same in one line. */
export const shown = (word: string): string => visible(word).replace(/[\n\u200b]/g, "");

/** What a token is called. */
export function tokenName(token: number, prefix: string[], grid: [number, number] | null, words: string[] | null): string {
  if (words) return `“${shown(words[token] ?? "?")}” (word ${token + 1})`;
  if (token < prefix.length) return prefix[token] === "class" ? "the class token" : prefix[token];
  const patch = token - prefix.length;
  return grid ? `patch in row ${Math.floor(patch / grid[1]) + 1}, column ${(patch % grid[1]) + 1}` : `token ${token + 1}`;
}
