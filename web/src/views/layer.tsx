/** One layer: what its two steps did to this picture, and what they are made of. */

import type { JSX } from "preact";
import { useMemo } from "preact/hooks";
import type { AuditRow, StepFacts, StepSeen } from "../answers";
import { Chart, Figure, Matrix, MiniMap, row, Waiting } from "../parts";
import type { Tensor } from "../packed";
import { number, percent, plain, plural, tokenName } from "../words";
import { Formula } from "./overview";
import { called, STEPS, type Scene } from "./shared";

export function Layer(scene: Scene): JSX.Element {
  const { model, selection, look, audits, token } = scene;
  const one = called(model).one;
  const layer = Math.min(selection.layer, model.depth);
  const steps = model.steps.filter((step) => step.layer === layer);
  const audit = audits[selection.model]?.value?.audit ?? null;
  const seen = look.value;
  const points = seen ? seen.points.map(([l, s], i) => ({ l, s, i })).filter((p) => p.l === layer) : [];
  return (
    <>
      <h2>Layer {layer} of {model.depth}</h2>
      <p class="lead">
        {model.white
          ? `Two steps, each derived from an objective. Below: its value before and after, for this ${one} and for all that were audited.`
          : "Two steps that were derived from nothing: no objective says which way they should go."}
      </p>
      <div class="cards">
        {steps.map((step) => (
          <StepCard key={step.step} step={step} white={model.white} one={one}
            seen={seen?.steps.find((s) => s.layer === layer && s.step === step.step) ?? null}
            audited={audit?.rows.find((r) => r.layer === layer && r.step === step.step) ?? null} samples={audit?.samples ?? 0} />
        ))}
      </div>
      {seen ? (
        <>
          <h3 class="group">What it did to each token of this {one}</h3>
          <p class="note">How far a token moved, in its own lengths; {tokenName(token, seen.prefix, seen.grid, seen.words)} is outlined.</p>
          <div class="minis">
            {points.map(({ s, i }) => {
              const moved = row(seen.moved, i);
              const turned = row(seen.turned, i);
              return (
                <MiniMap key={s} look={seen} values={moved} selected={token} side={160} format={(v) => number(v, 2)} title={`${STEPS[s] ?? s}: moved ${number(moved[token], 2)}, cosine ${number(turned[token], 2)}`}
                  said={`How far each token moved in ${s}; the chosen one by ${number(moved[token], 2)} of its length`} />
              );
            })}
            {points.length ? (
              <MiniMap look={seen} values={row(seen.norms, points[points.length - 1].i)} selected={token} side={160} format={(v) => number(v, 2)}
                title={`length after it: ${number(row(seen.norms, points[points.length - 1].i)[token], 3)}`} said="Length of each token after the layer" />
            ) : null}
          </div>
        </>
      ) : <Waiting error={look.error} what="Looking" />}
      <div class="panels">
        {seen ? <Spectrum scene={scene} layer={layer} /> : null}
        {audit ? <Norms scene={scene} layer={layer} /> : null}
        {steps.map((step) => <Made key={step.step} step={step} scene={scene} />)}
      </div>
    </>
  );
}

function StepCard(props: { step: StepFacts; white: boolean; one: string; seen: StepSeen | null; audited: AuditRow | null; samples: number }): JSX.Element {
  const { step, seen, audited, one } = props;
  const fell = seen && seen.before !== null && seen.after !== null ? seen.after < seen.before : null;
  return (
    <section class="card">
      <h3>{STEPS[step.step] ?? step.step} <span class="kind">{step.kind}</span></h3>
      {step.objective ? (
        <>
          <p>must lower <Formula text={step.objective} /></p>
          <Fall name={`this ${one}`} before={seen?.before ?? null} after={seen?.after ?? null} />
          <Fall name={`mean of ${props.samples || "the audited"}`} before={audited?.before ?? null} after={audited?.after ?? null} />
          <p class={fell === false ? "warn" : "good"}>
            {fell === null ? "" : fell ? `It fell on this ${one}` : `▲ It did not fall on this ${one}`}
            {audited?.descended !== null && audited?.descended !== undefined ? `${fell === null ? "It fell" : ", and"} on ${percent(audited.descended)} of the audited.` : fell === null ? "" : "."}
          </p>
          <p class="note">
            Step size {plain(step.step_size)}
            {audited?.max_step_size ? `; descent is guaranteed below ${number(audited.max_step_size)} from a feasible start` : "; whether it descends is measured, not guaranteed"}.
            {step.heads ? ` ${plural(step.heads, "subspace")} of dimension ${step.head_dim ?? "?"}.` : ""}
            {step.atoms ? ` ${plural(step.atoms, "atom")}${step.sparsity !== undefined ? `, sparsity ${plain(step.sparsity)}` : ""}.` : ""}
          </p>
        </>
      ) : (
        <p class="note">{step.heads ? `${plural(step.heads, "head")}. ` : ""}{step.atoms ? `${plural(step.atoms, "unit")}. ` : ""}It states no objective.</p>
      )}
      {seen ? <p class="note">Behind it on this {one}: rate {number(seen.coding_rate)} nats, rank {seen.rank}, {percent(seen.nonzero)} not zero.</p> : null}
    </section>
  );
}

/** Two bars from zero, or from below the smaller where both are large. */
function Fall(props: { name: string; before: number | null; after: number | null }): JSX.Element | null {
  const { name, before, after } = props;
  if (before === null || after === null) return null;
  const top = Math.max(Math.abs(before), Math.abs(after)) || 1;
  return (
    <div class="fall">
      <span class="what">{name}</span>
      <meter class="before" min={0} max={top} value={Math.abs(before)} aria-label={`before, ${number(before, 4)}`} />
      <span class="n">{number(before, 4)}</span>
      <span class="what">→</span>
      <meter class={after < before ? "after" : "after rose"} min={0} max={top} value={Math.abs(after)} aria-label={`after, ${number(after, 4)}`} />
      <span class="n">{number(after, 4)}</span>
    </div>
  );
}

function Spectrum({ scene, layer }: { scene: Scene; layer: number }): JSX.Element | null {
  const seen = scene.look.value;
  const lines = useMemo(() => {
    const all = (seen?.steps ?? []).filter((s) => s.layer === layer).map((s, tone) => ({ s, tone }));
    const previous = (seen?.steps ?? []).filter((s) => s.layer === layer - 1).pop();
    const line = (name: string, values: Tensor, tone: number, faint = false) => {
      const kept = Array.from(values.data).filter((v) => v > 1e-3 * values.data[0]);
      return { label: name, tone, faint, x: kept.map((_, i) => i + 1), y: kept };
    };
    return [
      ...(previous ? [line("in front of the layer", previous.singular_values, 3, true)] : []),
      ...all.map(({ s, tone }) => line(`after ${STEPS[s.step] ?? s.step}`, s.singular_values, tone)),
    ];
  }, [seen, layer]);
  if (!lines.length) return null;
  const said = (seen?.steps ?? []).filter((s) => s.layer === layer).map((s) => `rank ${s.rank} after ${STEPS[s.step] ?? s.step}`).join(", ");
  return (
    <Figure title={`Spectrum of this ${called(scene.model).one}'s tokens`} text={`Singular values, the largest first; the faster they fall, the fewer directions the tokens use: ${said}.`}>
      <Chart lines={lines} xLabel="singular value" whole title={`Spectrum of the tokens: ${said}`} log />
    </Figure>
  );
}

function Norms({ scene, layer }: { scene: Scene; layer: number }): JSX.Element | null {
  const audit = scene.audits[scene.selection.model]?.value?.audit;
  const shown = audit?.norms.filter((each) => each.layer === layer) ?? [];
  const rows = audit?.rows.filter((r) => r.layer === layer) ?? [];
  if (!shown.length) return null;
  const said = rows.map((r) => `${percent(r.outliers)} after ${STEPS[r.step] ?? r.step}`).join(", ");
  return (
    <Figure title="Lengths of tokens beside their median" text={`Of all audited ${called(scene.model).test}s. Outliers, tokens of more than three medians: ${said}.`}>
      <Chart
        lines={shown.map((each, tone) => ({
          label: `after ${STEPS[each.step] ?? each.step}`, tone,
          x: each.counts.map((_, i) => (each.edges[i] + each.edges[i + 1]) / 2), y: each.counts.map((c) => c / each.counts.reduce((a, b) => a + b, 0)),
        }))}
        xLabel={`length / median of its ${called(scene.model).test}`} title={`Histogram of token lengths; outliers: ${said}`} zero format={percent} />
    </Figure>
  );
}

function Made({ step, scene }: { step: StepFacts; scene: Scene }): JSX.Element | null {
  const { go, selection } = scene;
  if (step.overlap) {
    const overlap = step.overlap;
    const heads = overlap.shape[0];
    let best = { value: -1, j: 0, k: 1 };
    for (let j = 0; j < heads; j++) for (let k = j + 1; k < heads; k++) {
      const value = overlap.data[j * heads + k];
      if (value > best.value) best = { value, j, k };
    }
    const head = Math.min(selection.head, heads) - 1;
    return (
      <Figure title="How much the subspaces overlap"
        text={heads > 1 ? <>Largest cosine between any two directions of two subspaces: 0 is orthogonal, 1 shares a direction. The largest, {number(best.value, 2)}, is between {best.j + 1} and {best.k + 1}. Click a row to <button type="button" class="link" onClick={() => go({ view: "head", layer: step.layer })}>look into a subspace</button>.</> : "There is one subspace."}>
        <Matrix rows={heads} columns={heads} value={(j, k) => (j === k ? 0 : overlap.data[j * heads + k])} top={1} row={head} on={overlap} numbers={heads <= 8}
          label={`Overlap of ${heads} subspaces; the largest cosine is ${number(best.value, 2)}, between ${best.j + 1} and ${best.k + 1}`}
          onRow={(j) => go({ head: j + 1, layer: step.layer })} />
      </Figure>
    );
  }
  if (step.cosines) {
    const pairs = step.cosines.reduce((a, b) => a + b, 0);
    const last = step.cosines.reduce((top, c, i) => (c ? i : top), 0);
    const norm = step.singular_values ? step.singular_values.data[0] : null;
    return (
      <Figure title="How much the atoms overlap"
        text={`Cosines of all pairs of the ${plural(step.atoms ?? 0, "atom")}, without sign; none is above ${number((last + 1) / step.cosines.length, 2)}.${norm ? ` The dictionary's norm is ${number(norm)}, so a step may be as long as 2/‖D‖² = ${number(2 / norm ** 2)}.` : ""}`}>
        <Chart lines={[{ label: "", tone: 1, x: step.cosines.map((_, i) => (i + 0.5) / 40), y: step.cosines.map((c) => c / (pairs || 1)) }]}
          xLabel="|cosine| of two atoms" title="Histogram of cosines between atoms" zero format={percent} />
      </Figure>
    );
  }
  return null;
}
