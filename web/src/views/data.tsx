/** Pictures: what the models make of each, and others to be dropped in. */

import type { JSX } from "preact";
import { useRef, useState } from "preact/hooks";
import type { Input, Look } from "../answers";
import { Thumb, Waiting } from "../parts";
import { drop, useAnswer } from "../source";
import { clip, percent } from "../words";
import type { Scene } from "./shared";

export function Data(props: Scene & { onDropped: (input: number) => void }): JSX.Element {
  const { overview, selection, go } = props;
  const chosen = overview.inputs.find((input) => input.id === selection.input) ?? null;
  return (
    <>
      <h2>What it sees</h2>
      <p class="lead">Choose a picture{overview.takes_inputs ? ", or drop in one of your own" : ""}; every other view then shows what becomes of it.</p>
      {overview.takes_inputs ? <Door onDropped={props.onDropped} /> : <p class="note">Others can be dropped in where the model itself is open: pellucid view, with the run.</p>}
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
        <div class="gallery" role="group" aria-label="Pictures">
          {overview.inputs.map((input) => (
            <button type="button" key={input.id} aria-pressed={input.id === selection.input} onClick={() => go({ input: input.id, token: null })}>
              <Face input={input} side={72} />
              <span class="name">{clip(input.label ?? input.name, 22)}</span>
              <span class="quiet">{input.label ? clip(input.name, 22) : input.dropped ? "dropped in" : ""}</span>
            </button>
          ))}
        </div>
      ) : <p>There is no picture yet.</p>}
    </>
  );
}

export function Face(props: { input: Input; side: number }): JSX.Element {
  const { input } = props;
  return input.thumb ? <Thumb pixels={input.thumb} label={input.name} side={props.side} /> : <span class="text">{clip(input.name, 16)}</span>;
}

function Guesses(props: { question: string; label: string | null }): JSX.Element {
  const { value, error } = useAnswer<Look>(props.question);
  if (!value) return <Waiting error={error} what="Looking" />;
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
