/** One token: its way through the layers, its code, and what the atoms in it stand for. */

import type { JSX } from "preact";
import { useMemo } from "preact/hooks";
import type { AtomsOfText, AuditAnswer, LayerSeen, Look } from "../answers";
import { Bars, Chart, codeOf, cosines, Figure, MiniMap, Patch, row, Scatter, Waiting } from "../parts";
import { useAnswer } from "../source";
import { number, percent, plural, shown, tokenName, visible } from "../words";
import { called, place, placeName, STEPS, type Scene } from "./shared";

const SHOWN = 6;

export function TokenView(scene: Scene): JSX.Element {
  const { model, selection, look, token } = scene;
  const layer = Math.min(selection.layer, model.depth);
  const answer = useAnswer<LayerSeen>(selection.input === null ? null : `looks/${selection.model}/${selection.input}/layers/${layer}`);
  const name = look.value ? tokenName(token, look.value.prefix, look.value.grid, look.value.words) : "a token";
  const ready = look.value && answer.value && look.value.norms.shape[1] === answer.value.after.shape[0] && answer.value.layer === layer;
  return (
    <>
      <h2>{name[0].toUpperCase() + name.slice(1)}</h2>
      <p class="lead">Its way through {plural(model.depth, "layer")}, and what layer {layer} writes into it. Choose another token on the {called(model).one}.</p>
      {look.value?.lens ? <Settled scene={scene} look={look.value} /> : null}
      {look.value ? <Way scene={scene} look={look.value} /> : <Waiting error={look.error} what="Looking" />}
      {ready ? <Here scene={scene} look={look.value as Look} seen={answer.value as LayerSeen} layer={layer} /> : <Waiting error={answer.error} what="Looking into the layer" />}
    </>
  );
}

/** What a language model would say at this place if it ended after each layer. */
function Settled({ scene, look }: { scene: Scene; look: Look }): JSX.Element {
  const { token, model, selection, go } = scene;
  const lens = look.lens as NonNullable<Look["lens"]>;
  const layers = Array.from({ length: lens.likeliest.shape[0] }, (_, l) => l);
  const own = layers.map((l) => row(lens.own, l)[token]);
  const words = look.words as string[];
  const next = model.causal && token + 1 < words.length ? `“${shown(words[token + 1])}”` : null;
  const known = own.every((v) => Number.isFinite(v));
  return (
    <>
      <h3 class="group">{model.causal ? "What follows it" : "What stands here"}, as each layer would have it</h3>
      <p class="note">The tokens behind each layer, read as the model reads its last ones. What an early layer would say was never asked of it.</p>
      <div class="beside">
        <div class="scroll" role="region" tabIndex={0} aria-label="The likeliest words after each layer">
          <table class="lens">
            <tbody>
              {layers.map((l) => (
                <tr key={l} class={l === Math.min(selection.layer, model.depth) ? "chosen" : undefined}>
                  <th scope="row">{l ? <button type="button" class="link" onClick={() => go({ layer: l })}>layer {l}</button> : "embedding"}</th>
                  {Array.from(row(lens.likeliest, l, token)).map((word, k) => (
                    <td key={k}><span class="word">{shown(lens.words[word])}</span> <span class="value">{percent(row(lens.chances, l, token)[k])}</span></td>
                  ))}
                </tr>
              ))}
            </tbody>
          </table>
        </div>
        {known ? (
          <Figure title={next ? `The chance of ${next}, which follows` : model.causal ? "The chance of the word that follows" : "The chance of the word that was hidden"} text={`From ${percent(own[0])} in front of the layers to ${percent(own[own.length - 1])} behind them.`}>
            <Chart lines={[{ label: "", tone: 0, points: true, x: layers, y: own }]} xLabel="layer" whole zero format={percent} height={150} mark={Math.min(selection.layer, model.depth)}
              title={`Chance of the word after each layer, ${percent(own[0])} to ${percent(own[own.length - 1])}`} onPick={(x) => go({ layer: Math.max(1, x) })} />
          </Figure>
        ) : null}
      </div>
    </>
  );
}

function Way({ scene, look }: { scene: Scene; look: Look }): JSX.Element {
  const { go, token, selection, model } = scene;
  const xs = look.points.map(([l, s]) => (l === 0 ? 0 : place(model, l, s)));
  const column = (tensor: Look["norms"]): number[] => look.points.map((_, p) => row(tensor, p)[token]);
  const norms = column(look.norms);
  const turned = column(look.turned);
  const common = {
    xLabel: "layer", whole: true, mark: Math.min(selection.layer, model.depth), xName: (x: number) => placeName([model], x),
    onPick: (x: number) => go({ layer: Math.max(1, Math.ceil(x - 1e-9)) }),
  };
  const path = look.points.map((_, p) => ({ x: row(look.places, p, token)[0], y: row(look.places, p, token)[1] }));
  const last = look.points.length - 1;
  const points = Array.from({ length: look.norms.shape[1] }, (_, t) => ({ x: row(look.places, last, t)[0], y: row(look.places, last, t)[1] }));
  const turns = turned.map((v, p) => ({ v, p })).slice(1).reduce((a, b) => (b.v < a.v ? b : a));
  const sharpest = `${STEPS[look.points[turns.p][1]] ?? look.points[turns.p][1]} of layer ${look.points[turns.p][0]}`;
  return (
    <div class="panels">
      <Figure title="Length" text={`From ${number(norms[0])} to ${number(norms[last])}.`}>
        <Chart {...common} lines={[{ label: "", tone: 0, points: true, x: xs, y: norms }]} title={`Length of the token, ${number(norms[0])} to ${number(norms[last])}`} zero />
      </Figure>
      <Figure title="Cosine with itself one step before" text={`1 keeps its direction. It turns most, to ${number(turns.v, 2)}, in ${sharpest}.`}>
        <Chart {...common} lines={[{ label: "", tone: 1, points: true, x: xs.slice(1), y: turned.slice(1) }]} title={`How the token turns; most in ${sharpest}`} />
      </Figure>
      <Figure title="Its way among the others" text={`Directions of all tokens on the two axes in which they differ most (${percent(look.shares[0] + look.shares[1])} of the variance). The line is this token from the embedding on, open after the first step of a layer, full after the last; dots are where all tokens end.`}>
        <Scatter points={points} chosen={token} path={path} names={look.points.map(([l]) => (l === 0 ? "embedding" : `layer ${l}`))} special={look.prefix.length}
          on={[look, token]} onChoose={(t) => go({ token: t })} label={`Way of the token over ${look.points.length} points`} />
      </Figure>
    </div>
  );
}

function Here(props: { scene: Scene; look: Look; seen: LayerSeen; layer: number }): JSX.Element {
  const { scene, look, seen, layer } = props;
  const { go, token, selection, model } = scene;
  const code = codeOf(seen);
  const near = useMemo(
    () => [["in front", seen.before], ["between", seen.between], ["after", seen.after]].filter(([, t]) => t).map(([name, t]) => ({ name: name as string, values: cosines(t as LayerSeen["before"], token) })),
    [seen, token],
  );
  const values = code ? row(code, token) : null;
  const firing = useMemo(() => (values ? Array.from(values).map((value, atom) => ({ value, atom })).filter((f) => (model.white ? f.value !== 0 : f.value > 0)).sort((a, b) => Math.abs(b.value) - Math.abs(a.value)) : []), [values, model]);
  const atom = selection.atom !== null && code && selection.atom < code.shape[1] ? selection.atom : firing[0]?.atom ?? null;
  const audit = scene.audits[selection.model]?.value ?? null;
  const atoms = model.white ? "atom" : "unit";
  return (
    <>
      <h3 class="group">Tokens like it, in layer {layer}</h3>
      <p class="note">Cosine of every token with this one; full colour is 1.</p>
      <div class="minis">
        {near.map(({ name, values: cos }) => (
          <MiniMap key={name} look={look} values={cos} top={1} selected={token} side={150} format={(v) => v.toFixed(2)} title={name === "in front" ? "in front of it" : name === "between" ? "between its steps" : "after it"}
            said={`Cosines with the token ${name}; nearest other ${number(Math.max(...Array.from(cos).filter((_, i) => i !== token)), 2)}`} />
        ))}
      </div>
      {values && code ? (
        <>
          <h3 class="group">{model.white ? "Its sparse code" : "What its MLP's units give"}, layer {layer}</h3>
          <p>{firing.length} of {code.shape[1]} {atoms}s fire{firing.length ? <>; the strongest is {atoms} {firing[0].atom}, at {number(firing[0].value)}</> : null}.</p>
          <Bars values={values} chosen={atom} onChoose={(a) => go({ atom: a })} label={`Code of the token over ${code.shape[1]} ${atoms}s: ${firing.slice(0, 5).map((f) => `${f.atom} at ${number(f.value)}`).join(", ")}`} height={120} />
          <p class="note">One bar for each {atoms}. Click one, or choose among the strongest:</p>
          <div class="chips" role="group" aria-label={`The strongest ${atoms}s`}>
            {firing.slice(0, 12).map((f) => (
              <button type="button" key={f.atom} aria-pressed={f.atom === atom} onClick={() => go({ atom: f.atom })}>{f.atom} <span class="value">{number(f.value, 2)}</span></button>
            ))}
          </div>
          {atom !== null ? <Atom {...props} atom={atom} audit={audit} error={scene.audits[selection.model]?.error ?? null} name={atoms} /> : null}
        </>
      ) : <p class="note">This layer writes no code that could be read.</p>}
    </>
  );
}

function Atom(props: { scene: Scene; look: Look; seen: LayerSeen; layer: number; atom: number; audit: AuditAnswer | null; error: string | null; name: string }): JSX.Element {
  const { look, seen, layer, atom, audit, scene } = props;
  const name = called(scene.model);
  const code = codeOf(seen) as NonNullable<LayerSeen["between"]>;
  const here = Float32Array.from({ length: code.shape[0] }, (_, t) => row(code, t)[atom]);
  const atoms = audit?.atoms[String(layer)];
  const grid = scene.model.grid;
  if (atoms && "contexts" in atoms) {
    return (
      <div class="beside atom">
        <Figure title={`${props.name[0].toUpperCase()}${props.name.slice(1)} ${atom} on this passage`} text="How strongly each word fires it.">
          <MiniMap look={look} values={here} selected={scene.token} format={(v) => (v ? number(v, 2) : "–")} title="" said={`${props.name} ${atom} fires on ${here.filter((v) => v !== 0).length} of ${here.length} words of this passage`} />
        </Figure>
        <Contexts atoms={atoms} atom={atom} audit={audit as AuditAnswer} />
      </div>
    );
  }
  return (
    <div class="beside atom">
      <Figure title={`${props.name[0].toUpperCase()}${props.name.slice(1)} ${atom} on this ${name.one}`} text="How strongly each token fires it.">
        <MiniMap look={look} values={here} selected={scene.token} side={220} format={(v) => (v ? number(v, 2) : "")} title="" said={`${props.name} ${atom} fires on ${here.filter((v) => v !== 0).length} of ${here.length} tokens of this ${name.one}`} />
      </Figure>
      {atoms && grid && "patches" in atoms ? (
        <figure>
          <h3>The patches that fire it most</h3>
          <div class="strip">
            {Array.from(row(atoms.values, atom)).slice(0, SHOWN).map((value, k) => {
              if (!Number.isFinite(value)) return null;
              const item = (audit as AuditAnswer).gallery[row(atoms.images, atom)[k]];
              const patch = row(atoms.patches, atom)[k];
              const where = tokenName(patch + look.prefix.length, look.prefix, grid, null);
              return (
                <figure class="shot" key={k}>
                  <Patch pixels={item.pixels} grid={grid} patch={patch} label={`${item.label ?? item.name}, ${where}: ${number(value)}`} side={72} />
                  <figcaption>{item.label ? <span>{item.label}</span> : null}<span class="quiet">{number(value)}</span></figcaption>
                </figure>
              );
            })}
          </div>
          <figcaption>Among {plural(audit?.looked_at ?? 0, "image")}. It fires on {percent(row(atoms.fires)[atom])} of all patches.</figcaption>
        </figure>
      ) : scene.model.audited ? <Waiting error={props.error} what="Looking for the patches that fire it" /> : <p class="note">Give {name.test}s with --data to see which {name.token === "word" ? "words" : "patches"} fire it.</p>}
    </div>
  );
}

/** The words that fire an atom most, with what stands around them. */
function Contexts(props: { atoms: AtomsOfText; atom: number; audit: AuditAnswer }): JSX.Element {
  const { atoms, atom, audit } = props;
  const words = audit.words ?? [];
  const at = audit.at ?? 0;
  const values = Array.from(row(atoms.values, atom));
  const score = atoms.score.data[atom];
  const said = (from: number[]): string => from.map((word) => (word ? visible(words[word - 1]).replace(/\n/g, "") : "")).join("");
  return (
    <figure class="contexts">
      <h3>The words that fire it most</h3>
      {Number.isFinite(values[0]) ? (
        <ul>
          {values.map((value, k) => {
            if (!Number.isFinite(value)) return null;
            const context = Array.from(row(atoms.contexts, atom, k));
            return (
              <li key={k}>
                <span class="n">{number(value, 2)}</span>
                <span class="text"><span class="quiet">{said(context.slice(0, at))}</span><mark>{shown(words[context[at] - 1] ?? "")}</mark><span class="quiet">{said(context.slice(at + 1))}</span></span>
              </li>
            );
          })}
        </ul>
      ) : <p class="note">It fires on none.</p>}
      <figcaption>
        Of {plural(audit.looked_at ?? 0, "row")} of held-out text, one context from each. It fires at {percent(atoms.fires.data[atom])} of all places
        {Number.isFinite(score) ? `; the word there, or the one that follows, tells how strongly with a correlation of ${number(score, 2)}` : ""}.
      </figcaption>
    </figure>
  );
}
