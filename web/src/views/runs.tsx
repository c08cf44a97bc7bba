/** Runs in the folder: how they went or go, two beside each other. */

import type { JSX } from "preact";
import { useState } from "preact/hooks";
import type { RunCurves, RunRow } from "../answers";
import { Chart, Figure, Waiting, type Line } from "../parts";
import { embedded, open, useAnswer } from "../source";
import { duration, number, percent } from "../words";
import type { Go, Selection } from "../address";

const EVERY = 2000;
const LEFT_OUT = new Set(["step", "epoch", "lr_factor"]);

export function Runs(props: { selection: Selection; go: Go; onOpened: ((model: number) => void) | null }): JSX.Element {
  const { selection, go, onOpened } = props;
  const [said, setSaid] = useState("");
  const take = async (run: RunRow): Promise<void> => {
    setSaid(`Opening ${run.name}`);
    try {
      onOpened?.(await open(run.id));
    } catch (error) {
      setSaid(`${run.name}: ${(error as Error).message}`);
    }
  };
  const { value, error } = useAnswer<{ runs: RunRow[] }>("runs", embedded() ? 0 : EVERY);
  if (!value) return <><h2>Runs</h2><Waiting error={error} what="Reading the folder" /></>;
  const runs = value.runs;
  const first = runs.find((run) => run.id === selection.run) ?? runs.find((run) => run.state === "running") ?? runs.find((run) => !run.name.includes("beside-")) ?? runs[0] ?? null;
  const second = runs.find((run) => run.id === selection.beside && run.id !== first?.id) ?? null;
  const going = runs.filter((run) => run.state === "running").length;
  return (
    <>
      <h2>Runs</h2>
      <p class="lead">{runs.length ? `${runs.length} in the folder${going ? `, ${going} in progress` : ""}. Show one; set another beside it.` : "No run in the folder yet."}</p>
      {error ? <p class="warn" role="alert">{error}</p> : null}
      {onOpened ? <p class="note" role="status">{said}</p> : null}
      {runs.length ? (
        <div class="scroll" role="region" tabIndex={0} aria-label="Runs">
          <table>
            <thead><tr><th>run</th><th>state</th><th>model</th><th>objective</th><th class="n">epoch</th><th class="n">accuracy</th><th class="n">time</th><th>show</th></tr></thead>
            <tbody>
              {runs.map((run) => (
                <tr key={run.id} class={run.id === first?.id || run.id === second?.id ? "chosen" : undefined}>
                  <th scope="row">{run.name}</th>
                  <td><span class={`state ${run.state}`}>{run.state === "running" ? "● running" : run.state}</span></td>
                  <td>{run.model}</td>
                  <td>{run.objective}</td>
                  <td class="n">{number(run.epoch)}{run.epochs ? ` / ${number(run.epochs)}` : ""}</td>
                  <td class="n">{percent(run.accuracy)}</td>
                  <td class="n">{duration(run.seconds)}</td>
                  <td class="whole">
                    <button type="button" aria-pressed={run.id === first?.id} aria-label={`show ${run.name}`} onClick={() => go({ run: run.id, beside: run.id === second?.id ? null : selection.beside })}>show</button>{" "}
                    <button type="button" aria-pressed={run.id === second?.id} aria-label={`set ${run.name} beside it`} disabled={run.id === first?.id}
                      onClick={() => go({ run: first?.id ?? null, beside: run.id === second?.id ? null : run.id })}>beside</button>{" "}
                    {onOpened ? <button type="button" aria-label={`look into ${run.name}`} disabled={run.state !== "finished"} onClick={() => void take(run)}>look into</button> : null}
                  </td>
                </tr>
              ))}
            </tbody>
          </table>
        </div>
      ) : null}
      {first ? <Shown first={first} second={second} /> : null}
    </>
  );
}

function Shown({ first, second }: { first: RunRow; second: RunRow | null }): JSX.Element {
  const live = (run: RunRow | null): number => (run?.state === "running" && !embedded() ? EVERY : 0);
  const one = useAnswer<RunCurves>(`runs/${first.id}`, live(first));
  const two = useAnswer<RunCurves>(second ? `runs/${second.id}` : null, live(second));
  if (!one.value || one.value.id !== first.id) return <Waiting error={one.error} what="Reading its log" />;
  const runs = [one.value, ...(two.value && two.value.id === second?.id ? [two.value] : [])];
  const keys = [...new Set(runs.flatMap((run) => [...Object.keys(run.train), ...Object.keys(run.test)]))].filter((key) => !LEFT_OUT.has(key));
  const lines = (key: string): Line[] =>
    runs.flatMap((run, tone) =>
      (["train", "test"] as const).flatMap((split) => {
        const column = run[split][key];
        const epochs = run[split].epoch ?? run[split].step;
        if (!column || !epochs) return [];
        const label = runs.length > 1 ? `${run.name}, ${split}` : split;
        return [{ label, tone, faint: split === "train", x: epochs.data, y: Array.from(column.data as Float32Array) }];
      }),
    );
  const options = [...new Set(runs.flatMap((run) => Object.keys(run.config)))];
  const differing = options.filter((key) => key !== "out" && new Set(runs.map((run) => run.config[key] ?? "–")).size > 1);
  return (
    <>
      <h3 class="group">{runs.map((run) => run.name).join(" beside ")}</h3>
      {runs.map((run) => run.verdict ? <p key={run.id}>{runs.length > 1 ? `${run.name}: ` : ""}{run.verdict}</p> : null)}
      {keys.length ? (
        <div class="panels">
          {keys.map((key) => {
            const all = lines(key);
            const share = key.includes("accuracy");
            const last = all.filter((line) => !line.faint).map((line) => `${line.label} ${(share ? percent : number)(line.y[line.y.length - 1] as number)}`).join(", ");
            return (
              <Figure key={key} title={key} text={last ? `Last: ${last}.` : ""}>
                <Chart lines={all} xLabel="epoch" title={`${key} over epochs${last ? `; last: ${last}` : ""}`} format={share ? percent : number} />
              </Figure>
            );
          })}
        </div>
      ) : <p class="note">Nothing is logged yet.</p>}
      {runs.length > 1 ? (
        <div class="scroll" role="region" tabIndex={0} aria-label="Options that differ">
          {differing.length ? (
            <table>
              <caption>Options that differ</caption>
              <thead><tr><th>option</th>{runs.map((run) => <th key={run.id}>{run.name}</th>)}</tr></thead>
              <tbody>{differing.map((key) => <tr key={key}><th scope="row">{key}</th>{runs.map((run) => <td key={run.id}>{run.config[key] ?? "–"}</td>)}</tr>)}</tbody>
            </table>
          ) : <p class="note">They have the same options.</p>}
        </div>
      ) : (
        <details><summary>Its options</summary>
          <table><tbody>{options.map((key) => <tr key={key}><th scope="row">{key}</th><td>{runs[0].config[key]}</td></tr>)}</tbody></table>
        </details>
      )}
    </>
  );
}
