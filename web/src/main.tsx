/** The page: what is selected, what was answered about it, and the view of it. */

import { render, type JSX } from "preact";
import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import "uplot/dist/uPlot.min.css";
import "./glass.css";
import { useSelection, VIEWS, type Change, type Go, type Selection, type View } from "./address";
import type { AuditAnswer, Look, Model, Overview as OverviewAnswer } from "./answers";
import { ask, embedded, useAnswer, type Asked } from "./source";
import { row, Tokens, useMedia, Waiting } from "./parts";
import { clip, percent, shown, tokenName } from "./words";
import { Data, Face } from "./views/data";
import { Head } from "./views/head";
import { Layer } from "./views/layer";
import { Overview } from "./views/overview";
import { Runs } from "./views/runs";
import { TokenView } from "./views/token";
import { called, type Scene } from "./views/shared";

const NAMES: Record<View, string> = { overview: "Overview", layer: "Layer", head: "Head", token: "Token", data: "Data", runs: "Runs" };

function App(): JSX.Element {
  const [selection, go] = useSelection();
  const [round, setRound] = useState(0);
  const [overview, setOverview] = useState<Asked<OverviewAnswer>>({ value: null, error: null });
  useEffect(() => {
    ask<OverviewAnswer>("overview", round > 0).then(
      (value) => setOverview({ value, error: null }),
      (error: Error) => setOverview({ value: null, error: error.message }),
    );
  }, [round]);
  if (!overview.value) {
    return <div class="page"><main><Waiting error={overview.error} what="Opening" /></main></div>;
  }
  const onDropped = (input: number): void => {
    setRound((n) => n + 1);
    go({ input, token: null });
  };
  const onOpened = (model: number): void => {
    setRound((n) => n + 1);
    go({ view: "overview", model, atom: null });
  };
  return <Opened overview={overview.value} selection={selection} go={go} onDropped={onDropped} onOpened={onOpened} />;
}

function Opened(props: { overview: OverviewAnswer; selection: Selection; go: Go; onDropped: (input: number) => void; onOpened: (model: number) => void }): JSX.Element {
  const { overview, go } = props;
  const views = VIEWS.filter((view) => (view === "runs" ? overview.has_runs : overview.models.length > 0));
  const selection = settled(props.selection, overview, views);
  const model = overview.models[selection.model] as Model | undefined;
  const look = useAnswer<Look>(model && selection.input !== null ? `looks/${selection.model}/${selection.input}` : null);
  const audits = useAudits(overview);
  const root = useRef<HTMLDivElement>(null);
  const current = look.value && look.value.model === selection.model && look.value.input === selection.input ? look.value : null;
  const total = current?.norms.shape[1] ?? 0;
  const start = current ? middle(current) : 0;
  const held = (chosen: Selection): number => (chosen.token !== null && chosen.token < total ? chosen.token : start);
  const token = held(selection);
  const choose: Scene["choose"] = (next) => go((now) => ({ token: typeof next === "function" ? next(held(now)) : next }));
  useKeys(root, overview, go, views);
  useEffect(() => {
    if (!embedded()) document.title = `${overview.title} – ${NAMES[selection.view]} – pellucid`;
  }, [overview.title, selection.view]);
  const scene: Scene | null = model ? { overview, model, selection, go, choose, look: { value: current, error: look.error }, audits, token } : null;
  return (
    <div class="page" ref={root}>
      <header>
        <p class="brand"><b>pellucid</b> <span>{overview.title}</span></p>
        <nav aria-label="Views">
          {views.map((view) => (
            <button type="button" key={view} aria-current={view === selection.view ? "page" : undefined} onClick={() => go({ view })}>{NAMES[view]}</button>
          ))}
        </nav>
      </header>
      <div class={scene && selection.view !== "runs" ? "columns" : "columns alone"}>
        {scene && selection.view !== "runs" ? <Rail scene={scene} /> : null}
        <main aria-label={NAMES[selection.view]}>
          {selection.view === "runs" ? <Runs selection={selection} go={go} onOpened={overview.opens_runs ? props.onOpened : null} /> : scene ? <Shown scene={scene} onDropped={props.onDropped} /> : <p>Nothing is open.</p>}
        </main>
      </div>
      <details class="keys">
        <summary>Keys</summary>
        <p><kbd>1</kbd> to <kbd>{views.length}</kbd> views · <kbd>[</kbd> <kbd>]</kbd> layer · <kbd>,</kbd> <kbd>.</kbd> head · <kbd>p</kbd> <kbd>n</kbd> {called(model).one} · <kbd>m</kbd> model · on the {called(model).one}, arrows choose a {called(model).token}, <kbd>Home</kbd> and <kbd>End</kbd> the first and last token. What is chosen stands in the address.</p>
      </details>
    </div>
  );
}

function Shown(props: { scene: Scene; onDropped: (input: number) => void }): JSX.Element {
  const { scene } = props;
  switch (scene.selection.view) {
    case "layer": return <Layer {...scene} />;
    case "head": return <Head {...scene} />;
    case "token": return <TokenView {...scene} />;
    case "data": return <Data {...scene} onDropped={props.onDropped} />;
    default: return <Overview {...scene} />;
  }
}

/** A selection that exists: what the address names may not be there. */
function settled(selection: Selection, overview: OverviewAnswer, views: View[]): Selection {
  const view = views.includes(selection.view) ? selection.view : views[0] ?? "overview";
  const model = selection.model < overview.models.length ? selection.model : 0;
  const input = overview.inputs.some((each) => each.id === selection.input) ? selection.input : overview.inputs[0]?.id ?? null;
  const depth = overview.models[model]?.depth ?? 1;
  return { ...selection, view, model, input, layer: Math.min(Math.max(1, selection.layer), depth), head: Math.max(1, selection.head) };
}

/** The token in the middle of the picture, to begin with. */
function middle(look: Look): number {
  if (!look.grid) return look.norms.shape[1] - 1;
  const [rows, columns] = look.grid;
  return look.prefix.length + Math.floor(rows / 2) * columns + Math.floor(columns / 2);
}

/** The audits of all models, one after the other: the first is asked for first. */
function useAudits(overview: OverviewAnswer): Asked<AuditAnswer>[] {
  const empty = useMemo(() => overview.models.map(() => ({ value: null, error: null })), [overview.models.length]);
  const [audits, setAudits] = useState<Asked<AuditAnswer>[]>(empty);
  useEffect(() => {
    let wanted = true;
    void (async () => {
      for (let m = 0; m < overview.models.length; m++) {
        if (!overview.models[m].audited) continue;
        let found: Asked<AuditAnswer>;
        try {
          found = { value: await ask<AuditAnswer>(`models/${m}/audit`), error: null };
        } catch (error) {
          found = { value: null, error: (error as Error).message };
        }
        if (!wanted) return;
        setAudits((before) => Object.assign([...before], { [m]: found }));
      }
    })();
    return () => { wanted = false; };
  }, [overview.models.length]);
  return overview.models.map((_, m) => audits[m] ?? { value: null, error: null });
}

/** Keys are read by what is chosen when they are pressed: what is drawn, and with it any effect, comes later. */
function useKeys(root: { current: HTMLElement | null }, overview: OverviewAnswer, go: Go, views: View[]): void {
  useEffect(() => {
    const press = (event: KeyboardEvent): void => {
      const target = event.target as HTMLElement;
      if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented || /^(INPUT|SELECT|TEXTAREA)$/.test(target.tagName)) return;
      if (embedded() && !root.current?.contains(target)) return; // in a report, only where the reader is in this part of it
      const inputs = overview.inputs.map((input) => input.id);
      const turn = (now: Selection, by: number): Change => ({ input: inputs[(inputs.indexOf(now.input ?? -1) + by + inputs.length) % inputs.length] ?? null });
      const depth = (now: Selection): number => overview.models[now.model]?.depth ?? 1;
      const heads = (now: Selection): number => overview.models[now.model]?.steps.find((step) => step.layer === now.layer && step.heads)?.heads ?? 1;
      const changes: Record<string, (now: Selection) => Change> = {
        "[": (now) => ({ layer: Math.max(1, now.layer - 1) }),
        "]": (now) => ({ layer: Math.min(depth(now), now.layer + 1) }),
        ",": (now) => ({ head: Math.max(1, Math.min(now.head, heads(now)) - 1) }),
        ".": (now) => ({ head: Math.min(heads(now), now.head + 1) }),
        p: (now) => turn(now, -1),
        n: (now) => turn(now, 1),
        m: (now) => ({ model: (now.model + 1) % Math.max(1, overview.models.length), token: null, atom: null }),
        ...Object.fromEntries(views.map((view, i) => [String(i + 1), () => ({ view })])),
      };
      if (!(event.key in changes)) return;
      event.preventDefault();
      go((now) => changes[event.key](settled(now, overview, views)));
    };
    addEventListener("keydown", press);
    return () => removeEventListener("keydown", press);
  });
}

/** What is looked at, beside every view: model, picture, layer, head, token. */
function Rail({ scene }: { scene: Scene }): JSX.Element {
  const { overview, model, selection, go, choose, look, token } = scene;
  const seen = look.value;
  const name = called(model);
  const layer = selection.layer;
  const heads = model.steps.find((step) => step.layer === layer && step.heads)?.heads ?? 0;
  const head = Math.max(1, Math.min(selection.head, heads));
  const input = overview.inputs.find((each) => each.id === selection.input) ?? null;
  const guess = seen?.guesses[0];
  const narrow = useMedia("(max-width: 760px)");
  return (
    <aside aria-label="What is looked at">
      {overview.models.length > 1 ? (
        <div class="switch" role="group" aria-label="Model">
          {overview.models.map((each, m) => (
            <button type="button" key={m} aria-pressed={m === selection.model} onClick={() => go({ model: m, token: null, atom: null })}>{clip(each.label, 14)}</button>
          ))}
        </div>
      ) : null}
      <div class="who">
        {seen && input ? (
          <Tokens look={seen} token={token} onToken={choose} side={narrow ? 150 : 220} name={`The ${name.one}`} />
        ) : look.error ? <p class="warn" role="alert">{look.error}</p> : selection.input === null ? <p class="note">No {name.one} yet{overview.takes_inputs ? `: ${model.reads === "text" ? "type" : "drop"} one in under Data` : ""}.</p> : <p class="quiet">Looking …</p>}
        <div class="controls">
          {seen && input ? <p class="caption" aria-live="polite">
            {tokenName(token, seen.prefix, seen.grid, seen.words)}
            <span class="quiet">{clip(input.name, 40)}{input.label ? ` · is ${clip(input.label, 30)}` : ""}{guess ? ` · seen as ${clip(guess.name, 30)}, ${percent(guess.share)}` : ""}</span>
            {seen.lens ? <span class="quiet">{model.causal ? "then" : "here"} {says(seen, token)}</span> : null}
          </p> : null}
          <Stepper name="Layer" value={layer} most={model.depth} onChange={(value) => go({ layer: value })} />
          {heads > 1 ? <Stepper name={model.white ? "Subspace" : "Head"} value={head} most={heads} onChange={(value) => go({ head: value })} /> : null}
        </div>
      </div>
      <div class="strip inputs" role="group" aria-label={model.reads === "text" ? "Passages" : "Pictures"}>
        {overview.inputs.map((each) => (
          <button type="button" key={each.id} aria-pressed={each.id === selection.input} title={each.name} onClick={() => go({ input: each.id })}><Face input={each} side={34} /></button>
        ))}
      </div>
    </aside>
  );
}

/** What the model holds for likeliest at a place. */
function says(look: Look, token: number): string {
  const lens = look.lens as NonNullable<Look["lens"]>;
  const last = lens.likeliest.shape[0] - 1;
  return `“${shown(lens.words[row(lens.likeliest, last, token)[0]])}”, ${percent(row(lens.chances, last, token)[0])}`;
}

function Stepper(props: { name: string; value: number; most: number; onChange: (value: number) => void }): JSX.Element {
  const { name, value, most, onChange } = props;
  return (
    <div class="stepper" role="group" aria-label={name}>
      <span>{name}</span>
      <button type="button" aria-label={`previous ${name.toLowerCase()}`} disabled={value <= 1} onClick={() => onChange(value - 1)}>‹</button>
      <output>{value} <span class="quiet">of {most}</span></output>
      <button type="button" aria-label={`next ${name.toLowerCase()}`} disabled={value >= most} onClick={() => onChange(value + 1)}>›</button>
    </div>
  );
}

if (/[?&]token=/.test(location.search)) history.replaceState(null, "", location.pathname + location.hash);
const root = document.getElementById("glass");
if (root) {
  root.replaceChildren();
  render(<App />, root);
  if (embedded() && location.hash.startsWith("#/")) root.closest("section")?.scrollIntoView();
}
