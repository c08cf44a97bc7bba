/** Pictures: what the models make of each, and others to be dropped in. */

import type { JSX } from "preact";
import { useRef, useState } from "preact/hooks";
import type { Input, Look } from "../answers";
import { Thumb, Waiting } from "../parts";
import { drop, type as send, useAnswer } from "../source";
import { clip, percent, shown } from "../words";
import { row } from "../parts";
import { called, type Scene } from "./shared";

export function Data(props: Scene & { onDropped: (input: number) => void }): JSX.Element {
  const { overview, selection, go, model } = props;
  const text = model.reads === "text";
  const name = called(model);
  const chosen = overview.inputs.find((input) => input.id === selection.input) ?? null;
  return (
    <>
      <h2>What it {text ? "reads" : "sees"}</h2>
      <p class="lead">Choose a {name.one}{overview.takes_inputs ? `, or ${text ? "type" : "drop in"} one of your own` : ""}; every other view then shows what becomes of it.</p>
      {overview.takes_inputs ? text ? <Desk masked={!model.causal} onDropped={props.onDropped} /> : <Door onDropped={props.onDropped} /> : <p class="note">Others can be {text ? "typed" : "dropped in"} where the model itself is open: pellucid view, with the run.</p>}
      {chosen ? (
        <div class="cards">
          {overview.models.map((model, m) => (
            <section class="card" key={m}>
              <h3>{model.label} <span class="kind">{model.name}</span></h3>
              <Guesses question={`looks/${m}/${chosen.id}`} label={chosen.label} />
            </section>
          ))}
        </div>
      ) : null}
      {overview.inputs.length ? (
        <div class={text ? "gallery texts" : "gallery"} role="group" aria-label={text ? "Passages" : "Pictures"}>
          {overview.inputs.map((input) => (
            <button type="button" key={input.id} aria-pressed={input.id === selection.input} onClick={() => go({ input: input.id, token: null })}>
              <Face input={input} side={72} long />
              <span class="name">{text ? input.label : clip(input.label ?? input.name, 22)}</span>
              <span class="quiet">{input.dropped ? text ? "typed" : "dropped in" : text ? clip(input.name, 44) : input.label ? clip(input.name, 22) : ""}</span>
            </button>
          ))}
        </div>
      ) : <p>There is no {name.one} yet.</p>}
    </>
  );
}

export function Face(props: { input: Input; side: number; long?: boolean }): JSX.Element {
  const { input } = props;
  return input.thumb ? <Thumb pixels={input.thumb} label={input.name} side={props.side} /> : <span class="text">{shown(input.begins ?? input.name).slice(0, props.long ? 60 : 22)}…</span>;
}

function Guesses(props: { question: string; label: string | null }): JSX.Element {
  const { value, error } = useAnswer<Look>(props.question);
  if (!value) return <Waiting error={error} what="Looking" />;
  if (value.lens) return <Says look={value} place={value.norms.shape[1] - 1} />;
  if (!value.guesses.length) return <p class="note">It has no classifier, it gives features.</p>;
  const right = props.label === null ? null : value.guesses[0].name === props.label;
  return (
    <>
      <p class={right === false ? "warn" : undefined}>
        {right === null ? "taken for" : right ? "recognised as" : "▲ taken for"} {value.guesses[0].name}{right === false ? `, and is ${props.label}` : ""}
      </p>
      <ol class="guesses">
        {value.guesses.map((guess) => (
          <li key={guess.name}><span class="what">{clip(guess.name, 24)}</span><meter min={0} max={1} value={guess.share} aria-label={`${guess.name}, ${percent(guess.share)}`} /><span class="n">{percent(guess.share)}</span></li>
        ))}
      </ol>
    </>
  );
}

/** What a model holds for likeliest at a place, behind its last layer. */
export function Says(props: { look: Look; place: number }): JSX.Element {
  const lens = props.look.lens as NonNullable<Look["lens"]>;
  const last = lens.likeliest.shape[0] - 1;
  const chances = row(lens.chances, last, props.place);
  return (
    <>
      <p>goes on with</p>
      <ol class="guesses">
        {Array.from(row(lens.likeliest, last, props.place)).map((word, k) => {
          const name = shown(lens.words[word]);
          return <li key={k}><span class="what">{clip(name, 24)}</span><meter min={0} max={1} value={chances[k]} aria-label={`${name}, ${percent(chances[k])}`} /><span class="n">{percent(chances[k])}</span></li>;
        })}
      </ol>
    </>
  );
}

/** Where a text is typed. */
function Desk(props: { masked: boolean; onDropped: (input: number) => void }): JSX.Element {
  const [state, setState] = useState<{ busy: boolean; said: string }>({ busy: false, said: "" });
  const field = useRef<HTMLTextAreaElement>(null);
  const take = async (): Promise<void> => {
    const text = field.current?.value ?? "";
    setState({ busy: true, said: "Reading it" });
    try {
      const input = await send(text);
      setState({ busy: false, said: "It is open" });
      props.onDropped(input);
    } catch (error) {
      setState({ busy: false, said: (error as Error).message });
    }
  };
  return (
    <form class="door" onSubmit={(event) => { event.preventDefault(); void take(); }}>
      <label>
        <span>Type a passage{props.masked ? "; <|mask|> stands for a word that it is to tell" : ""}</span>
        <textarea ref={field} rows={3} maxLength={16384} spellcheck={false}
          onKeyDown={(event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); void take(); } }} />
      </label>
      <p><button type="submit" disabled={state.busy}>look into it</button></p>
      <p role="status">{state.said}</p>
    </form>
  );
}

function Door(props: { onDropped: (input: number) => void }): JSX.Element {
  const [state, setState] = useState<{ busy: boolean; said: string }>({ busy: false, said: "" });
  const [over, setOver] = useState(false);
  const field = useRef<HTMLInputElement>(null);
  const take = async (files: FileList | null | undefined): Promise<void> => {
    const file = files?.[0];
    if (!file) return;
    setState({ busy: true, said: `Reading ${file.name}` });
    try {
      const input = await drop(file);
      setState({ busy: false, said: `${file.name} is open` });
      props.onDropped(input);
    } catch (error) {
      setState({ busy: false, said: `${file.name}: ${(error as Error).message}` });
    }
    if (field.current) field.current.value = "";
  };
  return (
    <div
      class={over ? "door over" : "door"}
      onDragOver={(event) => { event.preventDefault(); setOver(true); }}
      onDragLeave={() => setOver(false)}
      onDrop={(event) => { event.preventDefault(); setOver(false); void take(event.dataTransfer?.files); }}
    >
      <label>
        <span>Drop a picture here, or choose a file</span>
        <input ref={field} type="file" accept="image/*" disabled={state.busy} onChange={(event) => void take((event.currentTarget as HTMLInputElement).files)} />
      </label>
      <p role="status">{state.said}</p>
    </div>
  );
}
