import type { AuditAnswer, Look, Model, Overview } from "../answers";
import type { Go, Selection } from "../address";
import type { Asked } from "../source";

/** What every view is given. */
export interface Scene {
  overview: Overview;
  model: Model;
  selection: Selection;
  go: Go;
  /** Chooses a token, or moves from the one that is chosen. */
  choose: (token: number | ((now: number) => number)) => void;
  look: Asked<Look>;
  /** Of each model. */
  audits: Asked<AuditAnswer>[];
  /** The chosen token; patches come behind class token and registers. */
  token: number;
}

/** What a model's inputs and their tokens are called. */
export const called = (model: Model | undefined): { one: string; many: string; token: string; test: string } =>
  model?.reads === "text"
    ? { one: "passage", many: "passages", token: "word", test: "text" }
    : { one: "picture", many: "pictures", token: "patch", test: "image" };

export const STEPS: Record<string, string> = {
  compress: "compress", sparsify: "sparsify", attention: "attention", mlp: "MLP",
};

/** Where a step stands on an axis of layers: the first of two in the middle, the last at the whole number. */
export function place(model: Model, layer: number, step: string): number {
  const steps = model.steps.filter((s) => s.layer === layer).map((s) => s.step);
  const at = steps.indexOf(step);
  return at < 0 ? layer : layer - 1 + (at + 1) / steps.length;
}

/** What stands at such a place, in words. */
export function placeName(models: Model[], x: number): string {
  if (x === 0) return "embedding";
  const layer = Math.ceil(x - 1e-9);
  const names = models.map((model) => {
    const steps = model.steps.filter((s) => s.layer === layer);
    return steps[Math.round((x - layer + 1) * steps.length) - 1]?.step;
  });
  const known = [...new Set(names.filter(Boolean))].map((name) => STEPS[name as string] ?? name);
  return `after layer ${layer} ${known.join(" / ")}`;
}
