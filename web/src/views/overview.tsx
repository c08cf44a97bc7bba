/** What the model is, whether its steps do what they claim, and how its tokens change on the way. */

import type { JSX } from "preact";
import type { AuditAnswer, AuditRow } from "../answers";
import { Chart, Figure, Waiting, type Line } from "../parts";
import { count, duration, number, percent, plural } from "../words";
import { called, place, placeName, STEPS, type Scene } from "./shared";

type Audit = NonNullable<AuditAnswer["audit"]>;

export function Overview(scene: Scene): JSX.Element {
  const { overview, model, audits, selection, go } = scene;
  const own = audits[selection.model];
  const audit = own.value?.audit ?? null;
  return (
    <>
      <h2>{model.label}: {model.white ? "each layer steps down a stated objective" : "its layers state no objective"}</h2>
      <p class="lead">
        {model.name}, {plural(model.depth, "layer")}, {count(model.parameters)} parameters
        {model.accuracy !== null ? `, ${percent(model.accuracy)} of the test ${called(model).test}s recognised` : ""}
        {model.bits_per_byte !== null ? `, ${number(model.bits_per_byte)} bits for each byte of unseen text` : ""}
        {model.seconds ? `, trained in ${duration(model.seconds)}` : ""}{model.fresh ? ", with fresh weights: it has learnt nothing yet" : ""}.
      </p>
      {audit ? (
        <div class={audit.verdict.descends === null ? "verdict none" : audit.verdict.descends ? "verdict" : "verdict warn"}>
          <p>{audit.verdict.descends === false ? "▲ " : ""}{audit.verdict.text}</p>
          {audit.verdict.details.length ? <ul>{audit.verdict.details.map((line) => <li key={line}>{line}</li>)}</ul> : null}
          <p class="note">Measured on {plural(audit.samples, called(model).test)} of {audit.data}, before and after each step, with that step's own parameters.</p>
        </div>
      ) : !model.audited ? (
        <p class="note">No {called(model).test}s were given to audit it on; name them with --data.</p>
      ) : (
        <Waiting error={own.error} what="Auditing" />
      )}
      <dl class="facts">
        {model.facts.map(([key, value]) => <div key={key}><dt>{key}</dt><dd>{value}</dd></div>)}
      </dl>
      {audits.some((each) => each.value?.audit) ? <Curves {...scene} /> : null}
      {audit ? (
        <div class="scroll" role="region" tabIndex={0} aria-label="The audit, step by step">
          <table>
            <caption>The audit, step by step</caption>
            <thead><tr><th>layer</th><th>step</th><th>objective</th><th class="n">before</th><th class="n">after</th>
              <th class="n">fell on</th><th class="n">R</th><th class="n">non-zero</th><th class="n">rank</th></tr></thead>
            <tbody>
              {audit.rows.map((row) => (
                <tr key={`${row.layer} ${row.step}`}>
                  <td><button type="button" class="link" onClick={() => go({ view: "layer", layer: row.layer })}>layer {row.layer}</button></td>
                  <td>{STEPS[row.step] ?? row.step}</td>
                  <td>{row.objective ? <Formula text={row.objective} /> : "–"}</td>
                  <td class="n">{number(row.before)}</td>
                  <td class="n">{number(row.after)}</td>
                  <td class={row.descended !== null && row.descended < 0.99 ? "n warn" : "n"}>{row.descended === null ? "–" : `${row.descended < 0.99 ? "▲ " : ""}${percent(row.descended)}`}</td>
                  <td class="n">{number(row.coding_rate)}</td>
                  <td class="n">{percent(row.nonzero)}</td>
                  <td class="n">{number(row.rank)}</td>
                </tr>
              ))}
            </tbody>
          </table>
        </div>
      ) : null}
      <p class="note">Written by pellucid {overview.version}, {overview.created}.</p>
    </>
  );
}

/** R^c(Z_<=t | U) with its one-letter superscripts raised, and which tokens it is about lowered. */
export function Formula(props: { text: string }): JSX.Element {
  const parts = props.text.split(/(\^\w|_<=\w)/);
  return (
    <span class="formula">
      {parts.map((part, i) => (part.startsWith("^") ? <sup key={i}>{part.slice(1)}</sup> : part.startsWith("_<=") ? <sub key={i}>≤{part.slice(3)}</sub> : part))}
    </span>
  );
}

function Curves(scene: Scene): JSX.Element {
  const { overview, audits, selection, go } = scene;
  const shown = overview.models.map((model, i) => ({ model, audit: audits[i]?.value?.audit ?? null })).filter((each) => each.audit);
  const lines = (value: (row: AuditRow, audit: Audit) => number | null, only: (row: AuditRow) => boolean = () => true): Line[] =>
    shown.map(({ model, audit }, tone) => {
      const rows = (audit as Audit).rows.filter(only);
      return { label: model.label, tone, points: true, x: rows.map((row) => place(model, row.layer, row.step)), y: rows.map((row) => value(row, audit as Audit)) };
    }).filter((line) => line.y.some((y) => y !== null));
  const ends = (all: Line[], format: (v: number) => string): string =>
    all.map((line) => {
      const ys = Array.from(line.y).filter((y): y is number => y !== null);
      return `${line.label} ${format(ys[0])} → ${format(ys[ys.length - 1])}`;
    }).join("; ");
  const common = {
    xLabel: "layer", whole: true, mark: selection.layer,
    xName: (x: number) => placeName(shown.map((each) => each.model), x),
    onPick: (x: number) => go({ layer: Math.max(1, Math.ceil(x - 1e-9)) }),
  };
  const rate = lines((row) => row.coding_rate);
  const nonzero = lines((row) => row.nonzero, (row) => row.step === "sparsify" || row.step === "mlp");
  const rank = lines((row) => row.rank);
  const norm = lines((row, audit) => audit.norms.find((each) => each.layer === row.layer && each.step === row.step)?.mean ?? null);
  const compression: Line[] = shown.flatMap(({ model, audit }, tone) => {
    const rows = (audit as Audit).rows.filter((row) => row.before !== null && row.step === "compress");
    const x = rows.map((row) => row.layer);
    return rows.length
      ? [{ label: `${model.label}, before`, tone, faint: true, points: true, x, y: rows.map((row) => row.before) },
         { label: `${model.label}, after`, tone, points: true, x, y: rows.map((row) => row.after) }]
      : [];
  });
  const title = (name: string, all: Line[], format = (v: number) => number(v)): string => `${name} across layers: ${ends(all, format)}`;
  return (
    <div class="panels">
      <Figure title="Coding rate R of the tokens, nats" text={`How much room the tokens take, at unit length. First and last: ${ends(rate, number)}.`}>
        <Chart {...common} lines={rate} title={title("Coding rate", rate)} />
      </Figure>
      {compression.length ? (
        <Figure title="Rate around the subspaces, Rᶜ, before and after compressing" text={`Each compression must lower it, in its own subspaces: layer by layer the full line lies below the dotted one. ${ends(compression.filter((l) => !l.faint), number)}.`}>
          <Chart {...common} lines={compression} title={title("Rate around the subspaces", compression)} xName={(x) => `layer ${x}`} />
        </Figure>
      ) : null}
      <Figure title="Share of the code that is not zero" text={`After sparsifying; of an MLP, of the tokens behind it. ${ends(nonzero, percent)}.`}>
        <Chart {...common} lines={nonzero} title={title("Non-zero share", nonzero, percent)} zero format={percent} />
      </Figure>
      <Figure title="Rank of the tokens" text={`Singular values above a hundredth of the largest. ${ends(rank, number)}.`}>
        <Chart {...common} lines={rank} title={title("Rank", rank)} zero />
      </Figure>
      {norm.length ? (
        <Figure title="Length of the tokens" text={`Mean norm. ${ends(norm, number)}.`}>
          <Chart {...common} lines={norm} title={title("Token norm", norm)} zero />
        </Figure>
      ) : null}
    </div>
  );
}
