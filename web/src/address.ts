/** What is selected lives in the address, behind the #, so that a view can be shared and gone back to. */

import { useEffect, useRef, useState } from "preact/hooks";

export const VIEWS = ["overview", "layer", "head", "token", "data", "runs"] as const;
export type View = (typeof VIEWS)[number];

export interface Selection {
  view: View;
  model: number;
  input: number | null;
  layer: number;
  head: number;
  token: number | null;
  atom: number | null;
  run: string | null;
  beside: string | null;
}

const NUMBERS = { m: "model", i: "input", l: "layer", h: "head", t: "token", a: "atom" } as const;
const NAMES = { r: "run", b: "beside" } as const;
const FIRST: Selection = {
  view: "overview", model: 0, input: null, layer: 1, head: 1, token: null, atom: null, run: null, beside: null,
};

export function parse(hash: string): Selection | null {
  const found = /^#\/(\w+)(?:\?(.*))?$/.exec(hash);
  if (!found || !VIEWS.includes(found[1] as View)) return null;
  const selection: Selection = { ...FIRST, view: found[1] as View };
  const query = new URLSearchParams(found[2] ?? "");
  for (const [short, key] of Object.entries(NUMBERS)) {
    const value = query.get(short);
    if (value !== null && /^\d{1,9}$/.test(value)) selection[key] = Number(value);
  }
  for (const [short, key] of Object.entries(NAMES)) {
    const value = query.get(short);
    if (value !== null && /^[0-9a-f]{1,40}$/.test(value)) selection[key] = value;
  }
  return selection;
}

export function format(selection: Selection): string {
  const query = new URLSearchParams();
  for (const [short, key] of [...Object.entries(NUMBERS), ...Object.entries(NAMES)]) {
    const value = selection[key as keyof Selection];
    if (value !== null && value !== FIRST[key as keyof Selection]) query.set(short, String(value));
  }
  const text = query.toString();
  return `#/${selection.view}${text ? `?${text}` : ""}`;
}

export type Change = Partial<Selection>;
export type Go = (change: Change | ((now: Selection) => Change)) => void;

/**
 * The selection, and how to change it. Another view is another entry of the history; the rest is not.
 *
 * What is drawn lags behind what was asked for: a change that depends on what is chosen is a function of it, and is
 * given what the change before it left, drawn or not.
 */
export function useSelection(): [Selection, Go] {
  const [selection, setSelection] = useState<Selection>(() => parse(location.hash) ?? FIRST);
  const latest = useRef(selection);
  const choose = (next: Selection): void => {
    latest.current = next;
    setSelection(next);
  };
  useEffect(() => {
    const follow = (): void => {
      const found = parse(location.hash);
      if (found) choose(found);
    };
    addEventListener("hashchange", follow);
    addEventListener("popstate", follow);
    return () => {
      removeEventListener("hashchange", follow);
      removeEventListener("popstate", follow);
    };
  }, []);
  const go: Go = (change) => {
    const now = latest.current;
    const next = { ...now, ...(typeof change === "function" ? change(now) : change) };
    const hash = format(next);
    if (hash === location.hash) return;
    if (next.view !== now.view) history.pushState(null, "", hash);
    else history.replaceState(null, "", hash);
    choose(next);
  };
  return [selection, go];
}
