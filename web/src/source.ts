/** Where answers come from: the file that holds this page, or the server that gave it. Nowhere else. */

import { useEffect, useState } from "preact/hooks";
import { unpack } from "./packed";

let kept: Promise<Record<string, unknown>> | null = null;

/** Whether the answers are in this file. */
export const embedded = (): boolean => document.getElementById("glass-data") !== null;

async function fromFile(): Promise<Record<string, unknown>> {
  const text = document.getElementById("glass-data")?.textContent ?? "";
  const packed = Uint8Array.from(atob(text.trim()), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const bytes = new Uint8Array(await new Response(stream).arrayBuffer());
  return (unpack(bytes) as { answers: Record<string, unknown> }).answers;
}

async function request(question: string): Promise<unknown> {
  if (embedded()) {
    const answers = await (kept ??= fromFile());
    if (question in answers) return answers[question];
    throw new Error("left out of this file to keep it small; pellucid view shows it");
  }
  const response = await fetch(`api/${question}`, { headers: { accept: "application/vnd.pellucid" } });
  if (!response.ok) throw new Error(await reason(response));
  return unpack(new Uint8Array(await response.arrayBuffer()));
}

async function reason(response: Response): Promise<string> {
  const text = await response.text();
  try {
    return (JSON.parse(text) as { error: string }).error;
  } catch {
    return text.trim() || `the server answered ${response.status}`;
  }
}

const answered = new Map<string, Promise<unknown>>();

export function ask<T>(question: string, afresh = false): Promise<T> {
  let promise = afresh ? undefined : answered.get(question);
  if (!promise) {
    promise = request(question);
    answered.set(question, promise);
    promise.catch(() => answered.delete(question));
    if (answered.size > 60) answered.delete(answered.keys().next().value as string);
  }
  return promise as Promise<T>;
}

/** Sends a picture; the number under which it can be looked at. */
export async function drop(file: File): Promise<number> {
  const response = await fetch(`api/inputs?name=${encodeURIComponent(file.name.slice(0, 100))}`, {
    method: "POST",
    headers: { "content-type": "application/octet-stream" },
    body: file,
  });
  if (!response.ok) throw new Error(await reason(response));
  return ((await response.json()) as { input: number }).input;
}

/** Sends a text; the number under which it can be looked at. */
export async function type(text: string): Promise<number> {
  const response = await fetch("api/inputs", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ text }),
  });
  if (!response.ok) throw new Error(await reason(response));
  return ((await response.json()) as { input: number }).input;
}

/** Opens a run of the folder; the number of its model. */
export async function open(run: string): Promise<number> {
  const response = await fetch(`api/runs/${run}`, { method: "POST", headers: { "content-type": "application/json" }, body: "{}" });
  if (!response.ok) throw new Error(await reason(response));
  return ((await response.json()) as { model: number }).model;
}

export interface Asked<T> {
  value: T | null;
  error: string | null;
}

/** The answer when it is there. Until the next one is, the last one stays, so that nothing flickers. */
export function useAnswer<T>(question: string | null, every = 0): Asked<T> & { question: string | null } {
  const [state, setState] = useState<Asked<T> & { question: string | null }>({ value: null, error: null, question: null });
  useEffect(() => {
    if (question === null) {
      setState({ value: null, error: null, question: null });
      return;
    }
    let wanted = true;
    const load = (afresh: boolean): void => {
      ask<T>(question, afresh).then(
        (value) => wanted && setState({ value, error: null, question }),
        (error: Error) => wanted && setState({ value: null, error: error.message, question }),
      );
    };
    load(every > 0);
    const timer = every > 0 ? window.setInterval(() => load(true), every) : 0;
    return () => {
      wanted = false;
      window.clearInterval(timer);
    };
  }, [question, every]);
  return state;
}
