/** What can be asked, and what is answered: docs/bundle.md in types. */

import type { Tensor } from "./packed";

export interface StepFacts {
  layer: number;
  step: string;
  kind: string;
  objective: string | null;
  step_size?: number | null;
  sparsity?: number;
  heads: number | null;
  head_dim: number | null;
  atoms: number | null;
  overlap?: Tensor;
  basis?: Tensor;
  singular_values?: Tensor;
  cosines?: number[];
}

export interface Model {
  name: string;
  label: string;
  reads: "image" | "text";
  /** Of a language model: it tells the word that follows, and sees none behind it. */
  causal: boolean;
  white: boolean;
  parameters: number;
  depth: number;
  facts: [string, string][];
  classes: string[];
  grid: [number, number] | null;
  prefix: string[];
  steps: StepFacts[];
  audited: boolean;
  data: string | null;
  accuracy: number | null;
  bits_per_byte: number | null;
  seconds: number | null;
  /** Nothing is learnt yet. */
  fresh: boolean;
}

export interface Input {
  id: number;
  name: string;
  label: string | null;
  kind: "image" | "text";
  thumb: Tensor | null;
  /** Of a text. */
  begins: string | null;
  dropped: boolean;
}

export interface Overview {
  title: string;
  created: string;
  version: string;
  models: Model[];
  inputs: Input[];
  takes_inputs: boolean;
  opens_runs: boolean;
  has_runs: boolean;
}

export interface AuditRow {
  layer: number;
  step: string;
  objective: string | null;
  before: number | null;
  after: number | null;
  descended: number | null;
  coding_rate: number;
  nonzero: number;
  rank: number;
  coherence: number | null;
  outliers: number;
  step_size: number | null;
  max_step_size: number | null;
}

export interface Atoms {
  fires: Tensor;
  values: Tensor;
  images: Tensor;
  patches: Tensor;
}

/** What atoms respond to in text: contexts are one more than places in the answer's words, 0 where there is none. */
export interface AtomsOfText {
  kind: "atoms" | "units";
  fires: Tensor;
  score: Tensor;
  values: Tensor;
  contexts: Tensor;
}

export interface GalleryItem {
  name: string;
  label: string | null;
  pixels: Tensor;
}

export interface AuditAnswer {
  audit: {
    samples: number;
    data: string;
    verdict: { descends: boolean | null; text: string; details: string[] };
    rows: AuditRow[];
    spectra: { layer: number; step: string; singular_values: number[] }[];
    norms: { layer: number; step: string; edges: number[]; counts: number[]; mean?: number }[];
  } | null;
  atoms: Record<string, Atoms | AtomsOfText>;
  gallery: GalleryItem[];
  words?: string[];
  /** Which word of a context it responds at. */
  at?: number;
  looked_at?: number;
}

export interface StepSeen {
  layer: number;
  step: string;
  objective: string | null;
  before: number | null;
  after: number | null;
  coding_rate: number;
  nonzero: number;
  rank: number;
  singular_values: Tensor;
}

/** What a language model would say at each place if it ended after each layer. */
export interface Lens {
  words: string[];
  likeliest: Tensor;
  chances: Tensor;
  /** The chance of the word that there is to tell; NaN where it is not known. */
  own: Tensor;
}

export interface Look {
  model: number;
  input: number;
  pixels: Tensor | null;
  words: string[] | null;
  prefix: string[];
  grid: [number, number] | null;
  guesses: { name: string; share: number }[];
  lens: Lens | null;
  points: [number, string][];
  norms: Tensor;
  turned: Tensor;
  moved: Tensor;
  places: Tensor;
  shares: [number, number];
  steps: StepSeen[];
}

export interface LayerSeen {
  layer: number;
  before: Tensor;
  between: Tensor | null;
  after: Tensor;
  attention: Tensor | null;
  membership: Tensor | null;
  projection: Tensor | null;
  energy: Tensor | null;
  code: Tensor | "after" | null;
}

export type RunState = "finished" | "running" | "stopped";

export interface RunRow {
  id: string;
  name: string;
  state: RunState;
  model: string;
  objective: string;
  data: string;
  epochs: number | null;
  epoch: number | null;
  step: number | null;
  accuracy: number | null;
  loss: number | null;
  seconds: number | null;
  verdict: string | null;
  config: Record<string, string>;
}

export interface RunCurves extends RunRow {
  train: Record<string, Tensor>;
  test: Record<string, Tensor>;
}
