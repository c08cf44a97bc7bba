/** One head: where any token looks, and what of it lies in the head's subspace. */

import type { JSX } from "preact";
import { useMemo } from "preact/hooks";
import type { LayerSeen, Look } from "../answers";
import { Bars, Figure, Matrix, MiniMap, row, Scatter, Tokens, Waiting, useWidth } from "../parts";
import type { Tensor } from "../packed";
import { useAnswer } from "../source";
import { number, percent, plural, tokenName } from "../words";
import { called, type Scene } from "./shared";

export function Head(scene: Scene): JSX.Element {
  const { model, selection, look } = scene;
  const layer = Math.min(selection.layer, model.depth);
  const answer = useAnswer<LayerSeen>(selection.input === null ? null : `looks/${selection.model}/${selection.input}/layers/${layer}`);
  const heads = model.steps.find((step) => step.layer === layer && step.heads)?.heads ?? 0;
  const head = Math.max(1, Math.min(selection.head, heads));
  const ready = look.value && answer.value && look.value.norms.shape[1] === answer.value.after.shape[0];
  return (
    <>
      <h2>{model.white ? "Subspace" : "Head"} {head} of {heads}, layer {layer}</h2>
      {ready
        ? <Inside scene={scene} look={look.value as Look} seen={answer.value as LayerSeen} head={head} layer={layer} />
        : <Waiting error={answer.error ?? look.error} what="Looking" />}
    </>
  );
}

function Inside(props: { scene: Scene; look: Look; seen: LayerSeen; head: number; layer: number }): JSX.Element {
  const { scene, look, seen, head, layer } = props;
  const { go, choose, token, model } = scene;
  const kind = called(model);
  const [holder, width] = useWidth<HTMLDivElement>();
  const weights = seen.attention ?? null;
  const heads = (weights ?? seen.membership ?? seen.energy)?.shape[0] ?? 0;
  const values = weights && head <= heads ? row(weights, head - 1, token) : seen.membership ? row(seen.membership, head - 1) : null;
  const name = (t: number): string => tokenName(t, look.prefix, look.grid, look.words);
  const among = model.causal ? token + 1 : look.norms.shape[1];
  const said = weights && values ? reading(values, token, name, among) : "";
  const lead = weights
    ? `Choose a ${kind.token}: the colours show how much of every ${kind.token === "word" ? "word before it" : "token"} it takes in, in this head. A row sums to one.`
    : seen.membership
      ? "This model compares no tokens. The colours show how much each token belongs to this head; over all heads it sums to one."
      : seen.projection
        ? "This step computes its gradient exactly and forms no attention. What it works on is below: the part of each token in this subspace."
        : "This layer's attention is of a kind that is not read.";
  const sample = (t: number): ArrayLike<number> | null => (weights ? row(weights, t, token) : seen.membership ? row(seen.membership, t) : null);
  return (
    <>
      <p class="lead">{lead}</p>
      <div class="beside" ref={holder}>
        {values ? (
          <div class="main">
            <Tokens look={look} token={token} onToken={choose} side={Math.min(360, width)} values={values} format={percent}
              name={`What ${name(token)} reads in head ${head} of layer ${layer}`} said={said} />
            <p class="said" aria-live="polite">{said || `Head ${head} holds ${percent(values[token])} of ${name(token)}.`}</p>
          </div>
        ) : null}
        {weights && weights.shape[1] <= 400 ? (
          <Figure title="All rows at once" text="One row for each token, the darkest cell the largest weight of the head. Click a row to choose that token.">
            <Matrix rows={weights.shape[1]} columns={weights.shape[2]} value={(i, j) => row(weights, head - 1, i)[j]} most={300}
              top={maximum(weights, head - 1)} row={token} on={[weights, head].join()} onRow={(i) => go({ token: i })} label={`Attention matrix of head ${head}, ${plural(weights.shape[1], "token")}`} />
          </Figure>
        ) : null}
      </div>
      {heads > 1 && sample(0) && look.words ? (
        <Figure wide title="The same in every head" text="One row for each head, one column for each word. Click a row to choose that head.">
          <Matrix rows={heads} columns={look.words.length} value={(h, i) => (sample(h) as ArrayLike<number>)[i]} top={maximumOf(heads, sample)} row={head - 1} most={900} least={14}
            on={[weights, token].join()} onRow={(h, i) => go({ head: h + 1, ...(weights ? {} : { token: i }) })} label={`What ${name(token)} reads in each of ${heads} heads`} />
        </Figure>
      ) : heads > 1 && sample(0) ? (
        <>
          <h3 class="group">The same in every head</h3>
          <div class="minis" role="group" aria-label="Heads">
            {Array.from({ length: heads }, (_, h) => (
              <MiniMap key={h} look={look} values={sample(h) as ArrayLike<number>} title={`head ${h + 1}`} chosen={h + 1 === head} selected={token} side={82}
                onChoose={() => go({ head: h + 1 })} said={weights ? `Head ${h + 1}: ${reading(row(weights, h, token), token, name, among)}` : `Head ${h + 1}`} />
            ))}
          </div>
        </>
      ) : null}
      {seen.projection && seen.energy ? <Projection {...props} projection={seen.projection} energy={seen.energy} />
        : model.white ? null : <p class="note">Query, key and value are three projections here, so there is no one subspace to look into.</p>}
    </>
  );
}

function Projection(props: { scene: Scene; look: Look; head: number; layer: number; projection: Tensor; energy: Tensor }): JSX.Element {
  const { scene, look, head, projection, energy } = props;
  const { go, token } = scene;
  const [heads, n, p] = projection.shape;
  const shares = row(energy, head - 1);
  const coordinates = row(projection, head - 1, token);
  const points = useMemo(() => plane(projection, head - 1), [projection, head]);
  const all = Array.from({ length: heads }, (_, h) => row(energy, h)[token]);
  const most = all.indexOf(Math.max(...all));
  const name = tokenName(token, look.prefix, look.grid, look.words);
  return (
    <>
      <h3 class="group">Projected onto the subspace U<sub>{head}</sub></h3>
      <p>
        {percent(shares[token])} of the squared length of {name} lies in this subspace
        {heads > 1 ? <>; most of it, {percent(all[most])}, in <button type="button" class="link" onClick={() => go({ head: most + 1 })}>subspace {most + 1}</button></> : null}.
      </p>
      <div class="panels">
        <Figure title="Energy of every token in this subspace" text="Share of its squared length, from none to all of it; the same scale in every head.">
          <MiniMap look={look} values={shares} top={1} selected={token} side={220} format={percent} title="" said={`Share of each token in subspace ${head}; the chosen one ${percent(shares[token])}`} />
        </Figure>
        <Figure title="Energy of the chosen token in every subspace" text={heads > 1 ? "Click a bar to go there." : ""}>
          <Bars values={all} chosen={head - 1} onChoose={(h) => go({ head: h + 1 })} label={`Shares of ${name} in ${heads} subspaces: ${all.map((v) => percent(v)).join(", ")}`} />
        </Figure>
        <Figure title={`Its ${p} coordinates`} text={`U_kᵀ z; the largest is ${number(coordinates.reduce((a, b) => (Math.abs(b) > Math.abs(a) ? b : a), 0))}.`}>
          <Bars values={coordinates} chosen={null} label={`Coordinates: ${Array.from(coordinates).map((v) => number(v, 2)).join(", ")}`} />
        </Figure>
        {p > 1 ? (
          <Figure title="All tokens in this subspace" text={`On the two directions in which they differ most${look.prefix.length ? "; squares stand in front of the patches" : ""}. Click one to choose it.`}>
            <Scatter points={points} chosen={token} special={look.prefix.length} on={[points]} onChoose={(t) => go({ token: t })} label={`${n} tokens in subspace ${head}`} />
          </Figure>
        ) : null}
      </div>
    </>
  );
}

/** A row of attention in words. */
export function reading(values: ArrayLike<number>, token: number, name: (t: number) => string, among: number): string {
  let [best, entropy] = [0, 0];
  for (let i = 0; i < values.length; i++) {
    if (values[i] > values[best]) best = i;
    if (values[i] > 0) entropy -= values[i] * Math.log(values[i]);
  }
  const most = best === token ? "itself" : name(best);
  const self = best === token ? "" : `, ${percent(values[token])} from itself`;
  const first = name(token);
  return `${first[0].toUpperCase()}${first.slice(1)} reads ${percent(values[best])} from ${most}${self}; as much as evenly from ${number(Math.exp(entropy), 2)} of ${plural(among, "token")}.`;
}

function maximumOf(heads: number, sample: (head: number) => ArrayLike<number> | null): number {
  let top = 0;
  for (let h = 0; h < heads; h++) for (const value of Array.from(sample(h) ?? [])) if (value > top) top = value;
  return top;
}

function maximum(tensor: Tensor, head: number): number {
  let top = 0;
  for (let i = 0; i < tensor.shape[1]; i++) for (const value of row(tensor, head, i)) if (value > top) top = value;
  return top;
}

/** Tokens on the two principal directions of their projections, by power iteration from a fixed start. */
function plane(projection: Tensor, head: number): { x: number; y: number }[] {
  const [, n, p] = projection.shape;
  const rows = Array.from({ length: n }, (_, i) => Array.from(row(projection, head, i)));
  const mean = Array.from({ length: p }, (_, k) => rows.reduce((sum, r) => sum + r[k], 0) / n);
  const centred = rows.map((r) => r.map((v, k) => v - mean[k]));
  const gram = Array.from({ length: p }, (_, a) => Array.from({ length: p }, (_, b) => centred.reduce((sum, r) => sum + r[a] * r[b], 0)));
  const axes: number[][] = [];
  for (let axis = 0; axis < Math.min(2, p); axis++) {
    let v = Array.from({ length: p }, (_, k) => Math.cos(k * (axis + 1) + 1));
    for (let turn = 0; turn < 200; turn++) {
      let next = gram.map((line) => line.reduce((sum, g, k) => sum + g * v[k], 0));
      for (const known of axes) {
        const dot = next.reduce((sum, x, k) => sum + x * known[k], 0);
        next = next.map((x, k) => x - dot * known[k]);
      }
      const length = Math.hypot(...next);
      if (length < 1e-12) break;
      v = next.map((x) => x / length);
    }
    axes.push(v);
  }
  return centred.map((r) => {
    const on = (axis: number[] | undefined): number => (axis ? r.reduce((sum, x, k) => sum + x * axis[k], 0) : 0);
    return { x: on(axes[0]), y: on(axes[1]) };
  });
}
