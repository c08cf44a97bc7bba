"""The command line: one thin function for each command. Slow imports stay inside them."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

from cyclopts import App, CycloptsError, Parameter, UnknownOptionError

from pellucid import __version__
from pellucid.errors import (
    EXIT_CODES,
    CheckpointError,
    ConfigError,
    DataError,
    PellucidError,
    ResourceError,
    exit_code,
    suggest,
    unwritten,
)
from pellucid.training.config import OPTION_HELP, TrainConfig, read_config

if TYPE_CHECKING:
    from pellucid.data import ImageData, TextData, Windows
    from pellucid.training import Run

app = App(
    name="pellucid",
    version=f"pellucid {__version__}",
    help="White-box transformers: train on images or text, audit every layer, read the report.",
    help_epilogue="Exit codes:\n\n" + "\n".join(f"{code:>5}  {said}" for code, said in EXIT_CODES.items()),
    help_format="plaintext",
    suppress_keyboard_interrupt=False,
    default_parameter=Parameter(negative=()),
)

_DERIVED = {"data", "model_args", "objective_args"}
"""Options of TrainConfig that the command line spells in another way."""


def _train_options(name: str, without: Sequence[str] = ()) -> type:
    """TrainConfig's options, each optional: what is left out comes from ``--config`` or its default."""
    hints: Any = get_type_hints(TrainConfig)
    fields: list[Any] = []
    for field in dataclasses.fields(TrainConfig):
        if field.name in _DERIVED or field.name in without:
            continue
        default = "" if field.default in ("", None, False) else f" [default: {field.default}]"
        help_text = OPTION_HELP[field.name].replace("``", "").rstrip(".") + default
        negative = "--no-flip" if field.name == "flip" else ()
        shown: Any = Annotated[hints[field.name] | None, Parameter(help=help_text, negative=negative)]
        fields.append((field.name, shown, dataclasses.field(default=None)))
    made = dataclasses.make_dataclass(name, fields, kw_only=True)
    made.__module__ = __name__
    return made


TrainOptions = _train_options("TrainOptions")
RecipeOptions = _train_options(
    "RecipeOptions", without=("model", "seed", "out", "objective", "init_from", "new_head")
)
"""What all models of a comparison have in common."""
_FINETUNED = {"epochs", "batch_size", "lr", "matrix_lr", "seed"}
FinetuneOptions = _train_options(
    "FinetuneOptions", without=[f.name for f in dataclasses.fields(TrainConfig) if f.name not in _FINETUNED]
)
"""Of a finetuning run what the command line of ``evaluate`` offers; its seed is the linear probe's too."""


@dataclasses.dataclass(kw_only=True)
class Sizes:
    """Sizes of the model, for those who would change them.

    Attributes:
        img_size: side of the images that the model sees, in pixels.
        patch_size: side of a patch, in pixels.
        embed_dim: width of a token.
        depth: number of layers.
        num_heads: subspaces of a layer.
    """

    img_size: int | None = None
    patch_size: int | None = None
    embed_dim: int | None = None
    depth: int | None = None
    num_heads: int | None = None


@dataclasses.dataclass(kw_only=True)
class Source:
    """Where images come from, and how many may be bad.

    Attributes:
        download: fetch a named data set.
        data_root: where named data sets are kept.
        max_bad: share of unreadable images above which the data are refused; the run's own, or 0.01.
    """

    download: bool = False
    data_root: str | None = None
    max_bad: float | None = None


@dataclasses.dataclass(kw_only=True)
class ProbeOptions:
    """How features are probed.

    Attributes:
        k: with knn: so many neighbours vote; further numbers are reported beside the first [default: 20].
        temperature: with knn: of the weights exp(cosine / temperature) [default: 0.07].
        tokens: with knn and linear: pooled, cls, or avg (the mean of the patches) [default: pooled].
        untrained: with knn and linear: also of the same architecture with fresh weights.
        run_out: with finetune: the new run's folder; RUN-finetune-DATA beside RUN when left out.
        resume: with finetune: go on with the run in that folder.
        overwrite: with finetune: replace it.
    """

    k: Annotated[list[int] | None, Parameter(consume_multiple=True)] = None
    temperature: float | None = None
    tokens: Literal["pooled", "cls", "avg"] | None = None
    untrained: bool = False
    run_out: Path | None = None
    resume: bool = False
    overwrite: bool = False


_PROBED_BY = {
    "knn": {"k", "temperature", "tokens", "untrained"},
    "linear": {"tokens", "untrained", "seed"},
    "finetune": {"run_out", "resume", "overwrite", *_FINETUNED},
}
"""Probe -> the options that it takes."""


_Flat = Parameter(name="*")

BUNDLE_BYTES = 64_000_000
"""Of a bundle, roughly: inputs beyond it are left out."""

REPORT_BYTES, REPORT_TEXT_BYTES = 1_500_000, 2_500_000
"""The same of the part of a report that can be clicked through, on pictures and on text."""


@app.command
def demo(
    *,
    out: str = "runs/demo",
    seed: int = 0,
    epochs: float = 60,
    overwrite: bool = False,
    resume: bool = False,
) -> None:
    """Train CRATE and a ViT on handwritten digits, audit them, and write a report. A minute or two.

    Parameters
    ----------
    out
        The run's folder.
    seed
        Of everything random.
    epochs
        Passes over the training images.
    overwrite
        Replace an earlier demo.
    resume
        Go on with a demo that was stopped.
    """
    options = {"data": "digits", "model": "crate_digits", "out": out, "seed": seed, "epochs": epochs}
    command = f"pellucid demo --seed {seed} --epochs {epochs:g}"
    run = _train_and_report(options, "vit_digits", command, resume, overwrite)
    say("")
    say(f"test accuracy of CRATE: {run.accuracy:.2%}; the report: {run.out / 'report.html'}")
    say("")
    say("What to try next:")
    say(f"  open {run.out / 'report.html'} in a browser")
    say(f"  pellucid audit {run.out} digits")
    say("  pellucid train FOLDER       with one sub-folder of images for each class")
    say("  pellucid bench              speed beside the published arithmetic and a ViT")


@app.command
def train(
    data: str | None = None,
    *,
    options: Annotated[TrainOptions, _Flat] | None = None,  # type: ignore[valid-type]
    sizes: Annotated[Sizes, _Flat] | None = None,
    model_arg: Annotated[list[str] | None, Parameter(consume_multiple=False)] = None,
    objective_arg: Annotated[list[str] | None, Parameter(consume_multiple=False)] = None,
    config: Path | None = None,
    beside: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    report: Annotated[bool, Parameter(negative="--no-report")] = True,
) -> None:
    """Train a model on a folder of images, or of text, and write a report on it.

    Parameters
    ----------
    data
        A folder with one sub-folder for each class (without labels: any folder of images), a folder with
        train/ and val/ inside, a .npz with x and y, what pack wrote, WebDataset .tar files, hf:OWNER/NAME, or
        a known name: digits, cifar10, ... For --objective causal-lm or masked-lm a folder of text files or a
        .jsonl.
    model_arg
        Another option of the architecture, as NAME=VALUE; may be given several times.
    objective_arg
        A number of the objective, as NAME=VALUE, such as gamma=0.01 or preset=published; may be given several
        times.
    config
        Options from a YAML file, such as the config.yaml of a run; the command line goes before it.
    beside
        A second model to train by the same recipe, to stand beside the first in the report.
    resume
        Go on with the run in --out.
    overwrite
        Replace the run in --out.
    report
        Write report.html at the end.
    """
    chosen = read_config(config) if config else {}
    chosen |= {k: v for k, v in vars(options or TrainOptions()).items() if v is not None}
    if data is not None:
        chosen["data"] = data
    given = {k: v for k, v in vars(sizes or Sizes()).items() if v is not None} | _model_args(model_arg or [])
    if given:
        chosen["model_args"] = _with("model_args", chosen.get("model_args"), given)
    if objective_arg:
        numbers = _pairs(objective_arg, "--objective-arg", "gamma=0.01")
        chosen["objective_args"] = _with("objective_args", chosen.get("objective_args"), numbers)
    command = shlex.join(["pellucid", *sys.argv[1:]])
    if report:
        _train_and_report(chosen, beside, command, resume, overwrite)
    elif beside:
        raise ConfigError("--beside stands in the report - leave out --no-report")
    else:
        _train(chosen, resume, overwrite)


@app.command
def replay(listed: Path) -> None:
    """Run a batch once more that gave a loss or gradient that is not finite, and say where it begins.

    Parameters
    ----------
    listed
        The file that the run has listed it in: bad/step-N.json.
    """
    from pellucid.training.replay import replay as again

    again(listed, say=say)


@app.command
def evaluate(
    run: Path,
    data: str | None = None,
    *,
    probe: Literal["knn", "linear", "finetune"] | None = None,
    json_out: Annotated[Path | None, Parameter(("-o", "--out"))] = None,
    probe_options: Annotated[ProbeOptions, _Flat] | None = None,
    finetune_options: Annotated[FinetuneOptions, _Flat] | None = None,  # type: ignore[valid-type]
    source: Annotated[Source, _Flat] | None = None,
) -> None:
    """Accuracy of a trained model, or of its features, with its confidence interval, class by class.

    Of a language model, how well it tells held-out text, in bits for each byte.

    Parameters
    ----------
    run
        A run's folder or a model/ folder.
    data
        What to evaluate on; the run's own test images or texts when left out. A probe learns from its
        training images and is scored on its test images.
    probe
        In place of the model's classifier, on its features: knn (weighted nearest neighbours) or linear
        (logistic regression); or finetune, supervised training from its weights.
    json_out
        Write the scores as JSON.
    """
    given = {k: v for options in (probe_options, finetune_options) for k, v in _given(options).items()}
    for key in given:
        if probe is None or key not in _PROBED_BY[probe]:
            flag, fitting = f"--{key.replace('_', '-')}", [n for n, keys in _PROBED_BY.items() if key in keys]
            raise ConfigError(f"{flag} goes with --probe {' or '.join(fitting)} - leave it out, or add that")
    if probe is not None:
        _evaluate_probe(run, data, probe, given, json_out, source or Source())
        return
    from pellucid.data import eval_loader
    from pellucid.glass.feed import eval_view
    from pellucid.measure import evaluate as score
    from pellucid.models import load

    _refuse_output(json_out)
    model: Any = load(run)
    if _reads_text(model):
        _evaluate_text(model, run, data, json_out, source or Source())
        return
    names = _class_names(model)
    images = _evaluation_data(run, data, source or Source())
    labelled = _labels_for(images, names)
    view = eval_view(model)
    with _bar(len(images.test), "image") as step:
        scores = score(model, labelled(eval_loader(images.test, view)), names, progress=step)
    say(scores.table())
    say(_accuracy_line(scores, "accuracy"))
    if json_out is not None:
        _write(json_out, json.dumps(scores.to_dict(), indent=1) + "\n")


def _evaluate_text(model: Any, run: Path, data: str | None, json_out: Path | None, source: Source) -> None:
    """How well a language model tells held-out words, or which class a text is of."""
    from pellucid.glass.language import score_held_out
    from pellucid.measure import evaluate as score

    windows, texts = _text_windows(model, run, data, source)
    with _bar(len(windows), "row") as step:
        if model.classifier is None:
            scores: Any = score_held_out(model, windows, progress=step)
            say(scores.table())
        else:
            if texts.class_names != model.label_names:
                raise CheckpointError(
                    f"the model knows {', '.join(model.label_names[:5])}, the data have "
                    f"{', '.join(texts.class_names[:5]) or 'no classes'} - give texts of the same classes"
                )
            scores = score(model, _text_batches(windows), texts.class_names, progress=step)
            say(scores.table())
            say(_accuracy_line(scores, "accuracy").replace("images", "texts"))
    if json_out is not None:
        _write(json_out, json.dumps(scores.to_dict(), indent=1) + "\n")


def _given(options: Any) -> dict[str, Any]:
    """Those of a command's options that were given."""
    found = vars(options) if options is not None else {}
    return {k: v for k, v in found.items() if v is not None and v is not False}


def _evaluate_probe(
    run: Path, data: str | None, kind: str, given: dict[str, Any], json_out: Path | None, source: Source
) -> None:
    from pellucid.models import load
    from pellucid.probing import finetune, finetuned_folder, frozen, untrained

    _refuse_output(json_out)
    model: Any = load(run)
    if _reads_text(model):
        raise ConfigError(
            f"--probe is about images - to finetune on text: pellucid train TEXTS --objective "
            f"text-classification --init-from {run} --new-head"
        )
    name, images = _whole_data(run, data, source)
    if kind == "finetune":
        out = given.pop("run_out", None) or finetuned_folder(run, images)
        given |= {"data_root": source.data_root, "download": source.download}
        tuned, scores = finetune(run, name, images, out=out, say=say, **given)
        say(scores.table())
        say(_accuracy_line(scores, "finetune accuracy"))
        say(f"the run: {tuned.out}")
        result = {"probe": {"kind": kind, "run": str(tuned.out), "scores": scores.to_dict()}}
    else:
        networks = {"probe": model}
        if given.pop("untrained", False):
            networks["untrained"] = untrained(model, given.get("seed", 0))
        tokens, result = given.pop("tokens", "pooled"), {}
        for title, network in networks.items():
            with _bar(len(images.train) + len(images.test), "image") as step:
                features = frozen(network, images, tokens, progress=step)
            found = features.knn(**given) if kind == "knn" else features.linear(**given)
            result[title] = {**found.to_dict(), "tokens": tokens}
            if title == "probe":
                say(found.scores.table())
                say("\n".join(found.lines()))
            else:
                say(_accuracy_line(found.scores, "the same architecture with fresh weights:"))
    if json_out is not None:
        _write(json_out, json.dumps({"data": images.name, **result}, indent=1) + "\n")


@app.command
def embed(
    run: Path,
    data: str | None = None,
    *,
    out: Annotated[Path, Parameter(("-o", "--out"))],
    tokens: Literal["pooled", "cls", "avg", "patch", "all"] = "pooled",
    overwrite: bool = False,
    source: Annotated[Source, _Flat] | None = None,
) -> None:
    """Write the features of images to a file, with their labels and names.

    Parameters
    ----------
    run
        A run's folder or a model/ folder.
    data
        Images, with labels or without, as for train; the run's own when left out.
    out
        The file: .npz, .safetensors, or .parquet, which needs pyarrow.
    tokens
        One feature of an image: pooled, cls (class token) or avg (mean of the patches); or several: patch, or
        all, with class token and registers.
    overwrite
        Replace the file.
    """
    from pellucid.embedding import embed as write
    from pellucid.models import load

    _refuse_output(out)
    model: Any = load(run)
    images = _whole_data(run, data, source or Source(), labels="optional")[1]
    with _bar(len(images.train) + len(images.test), "image") as step:
        written = write(model, images, out, tokens, overwrite=overwrite, progress=step)
    if written.left_out:
        say(f"left out: {written.left_out} files that cannot be read; pellucid check names them")
    shape = " x ".join(map(str, (written.images, *written.shape)))
    say(f"{out}: {tokens} features of {written.images} images, {shape}, {out.stat().st_size / 1e6:.1f} MB")


@app.command
def neighbours(
    run: Path,
    data: str,
    *images: Path,
    k: int = 8,
    tokens: Literal["pooled", "cls", "avg"] = "pooled",
    out: Annotated[Path | None, Parameter(("-o", "--out"))] = None,
    source: Annotated[Source, _Flat] | None = None,
) -> None:
    """The pictures of a data set that are most like the given ones, by the cosine of their features.

    Parameters
    ----------
    run
        A run's folder or a model/ folder.
    data
        Where to look, with labels or without, as for train.
    images
        Picture files to look for.
    k
        How many to find for each.
    tokens
        pooled, cls (class token) or avg (mean of the patches).
    out
        Draw them on a sheet, .png or .html; what stands there is replaced.
    """
    from pellucid.embedding import neighbours as find
    from pellucid.models import load

    if not images:
        raise ConfigError("no images given - name at least one picture file behind the data")
    _refuse_output(out)
    if out is not None and out.suffix not in (".png", ".html"):
        raise ConfigError(f"cannot tell the format of {out} - name a file that ends in .png or .html")
    model: Any = load(run)
    searched = _whole_data(run, data, source or Source(), labels="optional")[1]
    with _bar(len(searched.train) + len(searched.test), "image") as step:
        queries = find(model, searched, images, k=k, tokens=tokens, progress=step)
    for query in queries:
        say(f"{query.path}")
        for hit in query.hits:
            name = "" if hit.class_name is None else f"{hit.class_name}  "
            say(f"  {hit.cosine:6.3f}  {name}{hit.path}")
    if out is not None:
        from pellucid.glass.neighbours import neighbour_page, neighbour_sheet

        title = f"Nearest in {searched.name}"
        _write(out, neighbour_sheet(queries) if out.suffix == ".png" else neighbour_page(queries, title))
        say(f"sheet: {out}")


@dataclasses.dataclass(kw_only=True)
class Cutting:
    """How pictures are cut into things.

    Attributes:
        methods: heads, maskcut, tokencut, pca; all of them when left out.
        layer: which one is read, from 1 [default: the last but one of a white box, the last of a ViT].
        size: shorter side at which the model sees a picture, in pixels; more is finer [default: as trained].
        threshold: a head's mask holds a share of the patches (count) or of its attention (mass).
        share: that share.
        tau: cosine from which on patches are alike [default: 0.15 in maskcut, 0.2 in tokencut].
        masks: of maskcut, at most.
    """

    methods: Annotated[
        list[Literal["heads", "maskcut", "tokencut", "pca"]] | None, Parameter(consume_multiple=True)
    ] = None
    layer: int | None = None
    size: int | None = None
    threshold: Literal["count", "mass"] = "count"
    share: float = 0.6
    tau: float | None = None
    masks: int = 3


@app.command
def segment(
    model: str,
    *images: Path,
    out: Annotated[Path, Parameter(("-o", "--out"))],
    pretrained: bool = False,
    overwrite: bool = False,
    cutting: Annotated[Cutting, _Flat] | None = None,
) -> None:
    """Cut pictures into things, with a model that was never shown a mask.

    Parameters
    ----------
    model
        A run's folder, a model/ folder, or an architecture's name.
    images
        Picture files of any size.
    out
        A new folder for masks (PNG and COCO JSON), overlays and index.html, which shows all of it.
    pretrained
        With a name of timm's: fetch its published weights.
    overwrite
        Replace the folder, if segment wrote it and nothing else lies in it.
    """
    from pellucid.segmenting import METHODS, Options, refuse_folder
    from pellucid.segmenting import segment as cut

    asked = cutting or Cutting()
    given: dict[str, Any] = dict(vars(asked))
    options = Options(by=given.pop("threshold"), methods=given.pop("methods") or METHODS, **given)
    refuse_folder(out, overwrite)
    if not images:
        raise ConfigError("no images given - name at least one file")
    network: Any = _network(model, pretrained)
    with _bar(len(images), "image") as step:
        done = cut(network.eval(), images, out, options, overwrite=overwrite, progress=step)
    masks = ", ".join(f"{method} {count}" for method, count in done.masks.items())
    say(f"{done.images} pictures, masks: {masks}")
    say(f"the sheet: {done.out / 'index.html'}")
    if done.unread:
        _refuse_unread([f"{name}: {reason}" for name, reason in done.unread], len(images))


@app.command
def predict(run: Path, *images: Path, top: int = 3) -> None:
    """What a trained model sees in images.

    Parameters
    ----------
    run
        A run's folder or a model/ folder.
    images
        Image files.
    top
        Classes to name for each.
    """
    from pellucid.data import ImageRejected, read_image, show_name
    from pellucid.glass.feed import eval_view
    from pellucid.measure import predict as guess
    from pellucid.models import load

    if not images:
        raise ConfigError("no images given - name at least one file")
    if top < 1:
        raise ConfigError(f"--top is {top}; it must be larger than 0")
    model: Any = load(run)
    names, view = _class_names(model), eval_view(model)
    unread = []
    for path in images:
        try:
            batch = view.batch([read_image(path)], [0])
        except ImageRejected as error:
            unread.append(f"{show_name(path)}: {error.reason}")
            continue
        chances = guess(model, batch)[0]
        best = chances.argsort(descending=True)[:top].tolist()
        say(f"{show_name(path)}: " + ", ".join(f"{names[i]} {chances[i]:.1%}" for i in best))
    if unread:
        _refuse_unread(unread, len(images))


@app.command
def generate(
    run: Path,
    prompt: str = "",
    *,
    max_new_tokens: int = 500,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    samples: int = 1,
    beyond_end: bool = False,
) -> None:
    """Text that a causal language model writes, as it comes.

    Parameters
    ----------
    run
        A run's folder or a model/ folder.
    prompt
        What the text begins with; a new text when left out.
    max_new_tokens
        Words of the model's vocabulary (bytes, for a model of bytes) to write at most.
    temperature
        Scores are divided by it: 0 takes the likeliest word, 1 the model's own chances.
    top_k
        Leave only so many of the likeliest words.
    top_p
        Leave only the likeliest words that together reach this probability.
    repetition_penalty
        Above 1, words that stand in the text already become less likely.
    seed
        The same seed writes the same text; of several samples each has the next.
    samples
        How many texts to write.
    beyond_end
        Go on with a new text where the model ends one.
    """
    from pellucid.models import Sampling
    from pellucid.writing import continuation, open_writer

    if samples < 1:
        raise ConfigError(f"--samples is {samples}; it must be larger than 0")
    model, tokenizer = open_writer(run)
    for sample in range(samples):
        sampling = Sampling(temperature, top_k, top_p, repetition_penalty, seed + sample)
        if sample:
            say("\n---")
        print(_printable(prompt), end="", flush=True)
        for text in continuation(model, tokenizer, prompt, max_new_tokens, sampling, beyond_end=beyond_end):
            print(_printable(text), end="", flush=True)
        say("")


@app.command
def audit(
    model: str,
    data: str | None = None,
    *,
    out: Annotated[Path | None, Parameter(("-o", "--out"))] = None,
    bundle: Path | None = None,
    limit: int = 256,
    pretrained: bool = False,
    source: Annotated[Source, _Flat] | None = None,
) -> None:
    """Hold every layer to its objective: did its step lower it, and on how many images or rows of text?

    Parameters
    ----------
    model
        A run's folder, a model/ folder, or the name of a model (timm's too).
    data
        Images or texts to look at; the run's own held-out ones when left out.
    out
        Write the audit as JSON.
    bundle
        Write it with everything that the page shows on some of them; pellucid view opens the file.
    limit
        Look at no more than so many images, or rows of text.
    pretrained
        With a timm name: its published weights.
    """
    from pellucid.measure import audit as hold

    _refuse_output(out)
    _refuse_output(bundle)
    network, batches, count, looked_at = _audited(model, pretrained, data, limit, source or Source())
    with _bar(count, "row" if _reads_text(network) else "image") as step:
        result = hold(network, batches, data=looked_at.name, progress=step)
    say(result.table())
    say("")
    say(result.verdict["text"])
    for line in result.verdict["details"]:
        say(f"  {line}")
    if out is not None:
        _write(out, json.dumps(result.to_dict(), indent=1) + "\n")
    if bundle is not None:
        from pellucid.glass.answers import Answers, Subject, samples_of
        from pellucid.glass.answers import bundle as packed

        of_text = {}
        if _reads_text(network):
            of_text = {"tokenizer": looked_at.tokenizer, "windows": batches.items}
        subject = Subject(network, result.model, looked_at, **of_text)
        known = {0: result.to_dict()}
        answers = Answers(model, [subject], samples_of([subject]), audit_limit=limit, audits=known)
        _write(bundle, packed(answers, budget=BUNDLE_BYTES))
        say(f"bundle: {bundle}, {bundle.stat().st_size / 1e6:.1f} MB; open it with pellucid view {bundle}")


def _audited(
    model: str, pretrained: bool, data: str | None, limit: int, source: Source
) -> tuple[Any, Any, int, Any]:
    """A network, batches to look at, how many rows they hold, and the data that they are of."""
    from pellucid.data import eval_loader
    from pellucid.glass.feed import eval_view

    if Path(model).exists():
        network = _network(model, pretrained)
        if _reads_text(network):
            windows, texts = _text_windows(network, Path(model), data, source)
            return network, _text_batches(windows, 8, limit), min(limit, len(windows)), texts
    images = _evaluation_data(Path(model), data, source, labels="optional")
    network = _network(model, pretrained)
    batches = eval_loader(images.test, eval_view(network), batch_size=32, limit=limit)
    return network, batches, min(limit, len(images.test)), images


@app.command
def report(
    run: Path,
    *,
    out: Annotated[Path | None, Parameter(("-o", "--out"))] = None,
    beside: Annotated[list[Path] | None, Parameter(consume_multiple=False)] = None,
) -> None:
    """One HTML file that explains a run.

    Parameters
    ----------
    run
        The run's folder.
    out
        Where to write; report.html in the run's folder when left out.
    beside
        Other runs on the same data to stand beside it; those in the run's folder when left out.
    """
    from pellucid.training import open_run

    _refuse_output(out)
    subject = open_run(run)
    others = [open_run(path) for path in (beside if beside is not None else sorted(run.glob("beside-*")))]
    command = shlex.join(["pellucid", "report", str(run)])
    say(f"report: {_report([subject, *others], _data_of(subject), out or run / 'report.html', command)}")


@app.command
def view(
    target: str,
    *images: Path,
    data: str | None = None,
    runs: Path | None = None,
    beside: Annotated[list[Path] | None, Parameter(consume_multiple=False)] = None,
    port: int | None = None,
    open_browser: Annotated[bool, Parameter(("--open",), negative=())] = False,
    pretrained: bool = False,
    source: Annotated[Source, _Flat] | None = None,
) -> None:
    """Open a model in the browser, and look at what each of its steps does. On this machine only.

    Parameters
    ----------
    target
        A run's folder, a folder of runs, a model/ folder, the name of a model (timm's too), or a file that
        audit --bundle wrote.
    images
        Pictures to look at, before some of the test images; for a language model files of text.
    data
        Images or texts to audit the model on; the run's own held-out ones when left out.
    runs
        A folder of runs to list; the run's own folder, or the folder of runs that was given, when left out.
    beside
        Other runs to stand beside it; those in the run's folder when left out.
    port
        On 127.0.0.1; the first free one from 8517 on when left out.
    open_browser
        Open the browser too.
    pretrained
        With a timm name: its published weights.
    """
    from pellucid.glass.opening import open_target
    from pellucid.glass.server import serve

    answers = open_target(
        target,
        images,
        data=data,
        runs=runs,
        beside=beside,
        pretrained=pretrained,
        say=say,
        **vars(source or Source()),
    )
    serve(answers, port, say=say, open_browser=open_browser)


@app.command
def convert(
    file: Path,
    *,
    out: Annotated[Path, Parameter(("-o", "--out"))],
    key: str | None = None,
    model_arg: Annotated[list[str] | None, Parameter(consume_multiple=False)] = None,
    class_names: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Turn a published checkpoint into a model/ folder, without running anything in it.

    Parameters
    ----------
    file
        A .pth, .pt, .bin, .npz or .safetensors file of CRATE, CRATE-alpha, CRATE-MAE, ToST (for images or
        language), crate-lm, DINO, DINOv2, SimDINO or SimDINOv2.
    out
        The folder to write.
    key
        The part of the file to take, such as teacher, student, model, model_ema or state_dict.
    model_arg
        What the file does not tell, as NAME=VALUE, such as num_heads=6; may be given several times.
    class_names
        A text file with one class a line, in the model's order.
    overwrite
        Replace the model in --out.
    """
    from pellucid.models import LanguageModel
    from pellucid.models.foreign import read_foreign
    from pellucid.models.published import open_published

    _refuse_model_folder(out, overwrite)
    weights = read_foreign(file, key)
    part = "" if weights.part is None else f", part '{weights.part}'"
    left = f" (--key takes another: {', '.join(weights.others)})" if weights.others else ""
    say(f"read: {file}{part}{left}")
    found = open_published(weights.tensors, **_model_args(model_arg or []))
    sizes = ", ".join(f"{name}={value}" for name, value in found.model.model_args.items())
    say(f"recognised: {found.family}, as {found.model.architecture} with {sizes}")
    if found.ignored:
        say(f"left out, {len(found.ignored)} keys that the model has no use for: {', '.join(found.ignored)}")
    if isinstance(found.model, LanguageModel):
        if class_names is not None:
            raise ConfigError("--class-names goes with images, and this model reads text - leave it out")
        parameters = _save_text_model(found.model, out)
        say(f"written: {out}, {parameters / 1e6:.3f} M parameters, {found.model.vocab_size:,} words")
        say("")
        say(f'What to try next: pellucid.load("{out}") and pellucid.generate(...) in Python')
        return
    count = found.model.num_classes
    names = _read_names(class_names, count) if class_names else [f"class {i}" for i in range(count)]
    parameters = _save_model(found.model, out, names)
    gives = f"{count} classes" if count else "features only"
    say(f"written: {out}, {parameters / 1e6:.3f} M parameters, {gives}")
    say("")
    say("What to try next:")
    say(f"  pellucid audit {out} digits")
    if count:
        say(f"  pellucid predict {out} IMAGE")
    say(f'  pellucid.load("{out}") in Python; timm and transformers read the folder too')


@app.command
def export(
    model: str,
    *,
    out: Annotated[Path, Parameter(("-o", "--out"))],
    format: Literal["onnx", "pt2", "transformers"] | None = None,
    output: Literal["logits", "features", "tokens"] | None = None,
    pretrained: bool = False,
    overwrite: bool = False,
) -> None:
    """Write a model as ONNX, as a torch.export program or for transformers, checked to give the same outputs.

    Parameters
    ----------
    model
        A run's folder, a model/ folder, or the name of a model (timm's too).
    out
        The file, FILE.onnx or FILE.pt2; size, mean, std and class names go in it and in FILE.onnx.json. With
        --format transformers a folder.
    format
        transformers takes a language model and writes all that AutoModelForCausalLM or its like needs, code
        and tokenizer too; of a file the name's end tells.
    output
        What the file gives: logits, features (pooled) or tokens (of the patches); logits when left out, or
        features of a model without classes.
    pretrained
        With a timm name: its published weights.
    overwrite
        Replace the file, or a folder of this kind.
    """
    from pellucid.models import LanguageModel
    from pellucid.models.export import export as write

    if format == "transformers":
        _export_folder(model, _network(model, pretrained), out, output, overwrite)
        return
    if format is not None and out.suffix != f".{format}":
        raise ConfigError(f"--format {format} writes a file that ends in .{format} - {out} does not")
    _refuse_output(out)
    network = _network(model, pretrained)
    if isinstance(network, LanguageModel):
        raise ConfigError(f"{model} reads text - give --format transformers, and a folder for --out")
    written = write(network, out, output=output, images=_own_test_images(model, network), overwrite=overwrite)
    about = written.description
    opset = f", opset {about['opset']}" if "opset" in about else ""
    shapes = [", ".join(map(str, about[key])) for key in ("input_shape", "output_shape")]
    size = out.stat().st_size / 1e6
    say(f"{out}: {size:.1f} MB{opset}, images ({shapes[0]}) -> {about['output']} ({shapes[1]})")
    looked = f" and on {written.images} of the run's test images" if written.images else ""
    say(
        f"checked with {written.checked_with} on random images, 1 and 3 at once{looked}: "
        f"largest relative difference {written.difference:.1e}"
    )
    say(f"how to feed it: {out}.json")


@app.command
def compare(
    data: str,
    *,
    models: Annotated[list[str], Parameter(consume_multiple=True)],
    seeds: Annotated[list[int] | None, Parameter(consume_multiple=True)] = None,
    match: Literal["width", "params"] = "width",
    out: str = "runs/compare",
    resume: bool = False,
    options: Annotated[RecipeOptions, _Flat] | None = None,  # type: ignore[valid-type]
    config: Path | None = None,
) -> None:
    """Train several models by one recipe from several seeds, and say which differ.

    Parameters
    ----------
    data
        As for train.
    models
        NAME or NAME:OPTION=VALUE,... such as crate_digits:compression=untied; the others are held against
        the first.
    seeds
        Each model is trained once from each [default: 0 1 2].
    match
        width takes the models as they are, params gives them widths at which they have about as many
        parameters as the first.
    out
        Each run's folder lies in it, beside compare.json and report.html.
    resume
        Go on with the comparison in --out.
    config
        Options from a YAML file; the command line goes before it.
    """
    from pellucid.comparison import compare as run_all

    recipe = read_config(config) if config else {}
    recipe |= {k: v for k, v in vars(options or RecipeOptions()).items() if v is not None}
    result = run_all(
        data,
        models,
        seeds=seeds or (0, 1, 2),
        match=match,
        out=out,
        resume=resume,
        recipe=recipe,
        command=shlex.join(["pellucid", *sys.argv[1:]]),
        say=say,
    )
    say("")
    say(result.table())
    say("")
    say(f"report: {Path(out) / 'report.html'}")


@app.command
def fit(
    method: str,
    data: str,
    *,
    out: Annotated[Path, Parameter(("-o", "--out"))],
    option: Annotated[list[str] | None, Parameter(consume_multiple=False)] = None,
    seed: int = 0,
    side: int | None = None,
    patch_size: int | None = None,
    limit: int | None = None,
    dims: int | None = None,
    overwrite: bool = False,
    source: Annotated[Source, _Flat] | None = None,
) -> None:
    """Fit an analytic method to images: PCA, sparse coding, ReduNet, ... with its measures and pictures.

    Parameters
    ----------
    method
        pca, sparse-coding, complete-dictionary, dictionary, lista, diffusion, lossy-clustering,
        nearest-subspace or redunet.
    data
        As for train. Labels are used by methods that classify, and to judge those that cluster.
    out
        The folder to write: estimator.json, estimator.safetensors, result.json, report.html.
    option
        Of the method, as NAME=VALUE, such as n_components=20; may be given several times.
    seed
        Of everything random.
    side
        Pictures larger than so many pixels are made so small; the method's own when left out.
    patch_size
        Side of a patch, for methods that look at patches; 8, or half a small picture, when left out.
    limit
        Fit on no more than so many images; the method's own when left out.
    dims
        Rows are so many principal coordinates in place of pixels; the method's own when left out.
    overwrite
        Replace the fit in --out.
    """
    from pellucid.fitting import fit as run_fit

    source = source or Source()
    result = run_fit(
        method,
        data,
        out=out,
        options=_pairs(option or [], "--option", "n_components=20"),
        seed=seed,
        side=side,
        patch_size=patch_size,
        limit=limit,
        dims=dims,
        overwrite=overwrite,
        command=shlex.join(["pellucid", *sys.argv[1:]]),
        say=say,
        download=source.download,
        root=source.data_root,
        max_bad=0.01 if source.max_bad is None else source.max_bad,
    )
    for name, value in result["measures"].items():
        say(f"{name}: {value:.4g}")
    say(f"fitted in {result['seconds']:.1f} s, in {out}")
    say(f"report: {out / 'report.html'}")


@app.command
def check(
    data: str,
    *,
    labels: Literal["required", "optional"] = "required",
    max_bad: float = 0.01,
    download: bool = False,
    data_root: str | None = None,
) -> None:
    """Look at every image of a data set and list what is wrong with it.

    Parameters
    ----------
    data
        As for train.
    labels
        required holds the data to what supervised training needs; optional to what training without labels
        needs.
    max_bad
        Share of unreadable images above which training refuses the data.
    download
        Fetch a named data set.
    data_root
        Where named data sets are kept.
    """
    from pellucid.data import check as look

    result = look(data, labels=labels, max_bad=max_bad, download=download, root=data_root)
    say("\n".join(result.lines()))
    if result.without_labels:
        raise DataError(
            f"{result.name} has problems for supervised training, listed above, and none without labels: "
            "--labels optional"
        )
    if not result.ok:
        raise DataError(f"{result.name} has problems - they are listed above")


@app.command
def pack(
    data: str,
    shards: Path,
    *,
    labels: Literal["required", "optional"] = "optional",
    max_shard_mb: float = 500,
    overwrite: bool = False,
    source: Annotated[Source, _Flat] | None = None,
) -> None:
    """Pack a data set into a few .tar files that are read in any order, also when it outgrows the memory.

    Parameters
    ----------
    data
        As for train.
    shards
        The folder to write; every command takes it as DATA. Programs for WebDataset read it too.
    labels
        optional keeps the labels of class folders with no image outside of them; required insists on labels.
    max_shard_mb
        Size of a file at most, in million bytes.
    overwrite
        Replace the shards in the folder.
    """
    from pellucid.data import load_data, show_name
    from pellucid.data import pack as write

    source = source or Source()
    max_bad = 0.01 if source.max_bad is None else source.max_bad
    images = load_data(data, labels=labels, max_bad=max_bad, download=source.download, root=source.data_root)
    with _bar(len(images.train) + len(images.test), "image") as step:
        packed = write(
            images,
            shards,
            max_shard_mb=max_shard_mb,
            max_bad=max_bad,
            overwrite=overwrite,
            progress=step,
        )
    classes = f"in {len(images.class_names)} classes" if images.class_names else "without labels"
    say(
        f"{shards}: {packed.train:,} images to train on and {packed.test:,} to test on, {classes}, "
        f"in {packed.shards:,} files of {packed.bytes / 1e6:,.1f} MB in all"
    )
    if packed.rejects:
        say(f"{len(packed.rejects):,} rejected and left out:")
        for reject in packed.rejects[:20]:
            say(f"  {show_name(reject.path)}: {reject.reason}")
        if len(packed.rejects) > 20:
            say(f"  ... and {len(packed.rejects) - 20:,} more, in {shards / 'info.json'}")


@app.command
def models(pattern: str = "") -> None:
    """Names that --model takes, with their sizes. For images any timm name works as well.

    Parameters
    ----------
    pattern
        Show only names that contain this.
    """
    import torch

    from pellucid.models import LanguageModel, create_model, list_models
    from pellucid.models.create import some_models

    shown = [name for name in list_models() + list_models("text") if pattern in name]
    if not shown:
        raise ConfigError(f"no model of ours has '{pattern}' in its name - known: {', '.join(some_models())}")
    wide = max(map(len, shown))
    for name in shown:
        with torch.device("meta"):
            model: Any = create_model(name)
        count = sum(p.numel() for p in model.parameters())
        if isinstance(model, LanguageModel):
            takes = f"text, {model.context:,} tokens of {model.vocab_size:,} words"
        else:
            channels, height, width = model.pretrained_cfg["input_size"]
            takes = f"{height} x {width} x {channels}"
        say(f"{name:<{wide}} {count / 1e6:8.3f} M parameters   {takes}")


@app.command
def bench(
    *,
    models: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    batch_sizes: Annotated[list[int] | None, Parameter(consume_multiple=True)] = None,
    dtypes: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    modes: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    rounds: int = 3,
    compile: bool = False,
    out: Annotated[Path | None, Parameter(("-o", "--out"))] = None,
) -> None:
    """Speed as ratios, side by side in one run: ours, the published arithmetic, and a ViT of the same size.

    Parameters
    ----------
    models
        CRATE, CRATE-alpha, CRATE-MAE and ToST models; CRATE-B, CRATE-T, CRATE-alpha-Ti and ToST-T when left
        out.
    batch_sizes
        Images of a batch; 8 when left out.
    dtypes
        float32, bfloat16 or both; float32 when left out.
    modes
        inference, training or both; both when left out.
    rounds
        Repetitions; medians over them are shown.
    compile
        Time both forms through torch.compile besides. A minute or more for each case.
    out
        Write the rows as JSON.
    """
    from pellucid.measure.bench import bench as measure

    _refuse_output(out)
    given = {"models": models, "batch_sizes": batch_sizes, "dtypes": dtypes, "modes": modes}
    chosen: Any = {key: tuple(value) for key, value in given.items() if value}
    result = measure(**chosen, rounds=rounds, compile=compile, progress=_tell)
    say(result.table())
    if out is not None:
        _write(out, json.dumps(result.to_dict(), indent=1) + "\n")


@app.command
def bench_tokens(
    *,
    grids: Annotated[list[int] | None, Parameter(consume_multiple=True)] = None,
    embed_dim: int = 192,
    num_heads: int = 3,
    limit_gib: float = 4.0,
    rounds: int = 5,
    out: Annotated[Path | None, Parameter(("-o", "--out"))] = None,
    picture: Annotated[list[Path] | None, Parameter(consume_multiple=False)] = None,
) -> None:
    """Time and memory of one compression step against the number of tokens: TSSA, MSSA, explicit attention.

    Parameters
    ----------
    grids
        Patches along a side; 14 to 224 when left out, which is 196 to 50,176 tokens.
    embed_dim
        Width of a token.
    num_heads
        Subspaces.
    limit_gib
        Explicit attention stops where its weights outgrow this.
    rounds
        Repetitions; the shortest is shown.
    out
        Write the rows as JSON.
    picture
        Draw them as a .png or .svg; may be given several times.
    """
    from pellucid.measure.tokens import GRIDS, token_scaling

    for path in (out, *(picture or [])):
        _refuse_output(path)
    result = token_scaling(
        tuple(grids or GRIDS), embed_dim, num_heads, limit_gib=limit_gib, rounds=rounds, progress=_tell
    )
    say(result.table())
    if out is not None:
        _write(out, json.dumps(result.to_dict(), indent=1) + "\n")
    if picture:
        result.picture(*picture)


@app.command
def bench_generation(
    *,
    models: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    beside: str | None = None,
    lengths: Annotated[list[int] | None, Parameter(consume_multiple=True)] = None,
    prompt: int = 256,
    new_tokens: int = 16,
    batch_size: int = 1,
    depth: int | None = None,
    rounds: int = 3,
    threads: int | None = None,
    budget: float = 60.0,
    limit_gib: float = 12.0,
    out: Annotated[Path | None, Parameter(("-o", "--out"))] = None,
) -> None:
    """Speed and memory of writing text: CRATE, CRATE-alpha and ToST beside a GPT-2, as ratios.

    Parameters
    ----------
    models
        Causal language models; CRATE, CRATE-alpha and ToST in GPT-2's small size when left out.
    beside
        The model that they are compared with; the GPT-2 of the first one's size when left out.
    lengths
        Of texts in memory, in tokens; 256 to 65,536 when left out.
    prompt
        Words to read where writing is timed.
    new_tokens
        Words to write behind them.
    batch_size
        Texts at once.
    depth
        Layers of every model; as named when left out.
    rounds
        Repetitions, in turns; medians over them are shown.
    threads
        Of the processor.
    budget
        Seconds that a model may take to read a text; longer ones are left out, which is said.
    limit_gib
        A length at which the memories of all models are larger together is left out, in GiB.
    out
        Write the rows as JSON.
    """
    from pellucid.measure.bench_generation import bench_generation as measure

    _refuse_output(out)
    given = {"models": models, "lengths": lengths}
    chosen: Any = {key: tuple(value) for key, value in given.items() if value}
    result = measure(
        **chosen, beside=beside, prompt=prompt, new_tokens=new_tokens, batch_size=batch_size, depth=depth,
        rounds=rounds, threads=threads, budget=budget, limit_gib=limit_gib, progress=_tell,
    )  # fmt: skip
    say(result.table())
    if out is not None:
        _write(out, json.dumps(result.to_dict(), indent=1) + "\n")


@app.command
def bench_analytic(
    *,
    signals: int = 10_000,
    rounds: int = 3,
    out: Annotated[Path | None, Parameter(("-o", "--out"))] = None,
) -> None:
    """Speed of the analytic methods: sparse coding beside scikit-learn's, ReduNet beside a loop of inverses.

    Parameters
    ----------
    signals
        Signals to code, in 256 atoms.
    rounds
        Repetitions, in turns; medians over them are shown.
    out
        Write the rows as JSON.
    """
    from pellucid.measure.bench_redunet import bench_redunet
    from pellucid.measure.bench_sparse_coding import bench_sparse_coding

    _refuse_output(out)
    if min(signals, rounds) < 1:
        raise ConfigError(f"--signals {signals} and --rounds {rounds} must be 1 or larger")
    rows = {
        "sparse_coding": bench_sparse_coding(signals, rounds=rounds, progress=say),
        "redunet": bench_redunet(rounds=rounds, progress=say),
    }
    if out is not None:
        _write(out, json.dumps(rows, indent=1) + "\n")


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; errors become one message and an exit code."""
    tokens = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in tokens
    try:
        app(
            [token for token in tokens if token != "--debug"],
            exit_on_error=False,
            print_error=False,
            result_action="return_value",
        )
    except BrokenPipeError:
        # Whoever read our output has enough, as ``| head`` does. Python would complain at exit otherwise.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (PellucidError, CycloptsError, OSError) as error:
        if debug:
            raise
        print(f"error: {_printable(_message(error))}", file=sys.stderr)
        return exit_code(error)
    except KeyboardInterrupt:
        print("error: interrupted - nothing was left half written", file=sys.stderr)
        return 130
    return 0


def say(text: str) -> None:
    print(_printable(text), flush=True)


def _printable(text: str) -> str:
    """Lines that are safe on any terminal, whatever a file or a class is called."""
    return "".join(
        c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def _message(error: Exception) -> str:
    if isinstance(error, UnknownOptionError):
        given = (error.token.keyword or error.token.value).split("=")[0]
        known = [name for argument in error.argument_collection for name in argument.names]
        return f"unknown option {given}{suggest(given, known)}"
    if isinstance(error, OSError):
        return f"{error.strerror or error} - {error.filename or ''}".rstrip(" -")
    return str(error).strip() or type(error).__name__


def _train(options: dict[str, Any], resume: bool, overwrite: bool) -> Run:
    from pellucid.training import train as fit
    from pellucid.training.ranks import rank

    options = dict(options)
    run = fit(options.pop("data", ""), **options, resume=resume, overwrite=overwrite, say=say)
    if rank() == 0:
        found = {"test accuracy": run.accuracy, "test knn accuracy": run.measures.get("knn accuracy")}
        worth = "".join(f", {name} {value:.2%}" for name, value in found.items() if value is not None)
        if "bits per byte" in run.measures:
            worth += f", {run.measures['bits per byte']:.3f} bits per byte of held-out text"
        say(f"{run.config.model}: trained in {run.seconds:.1f} s{worth}, in {run.out}")
        if verdict := next((line["verdict"] for line in reversed(run.metrics) if "verdict" in line), ""):
            say(f"{run.config.model}: {verdict}")
    return run


def _train_and_report(
    options: dict[str, Any], beside: str | None, command: str, resume: bool, overwrite: bool
) -> Run:
    """Train, and a second model by the same recipe if there is to be one; then look at both."""
    from pellucid.training.ranks import rank

    if beside is not None:
        from pellucid.models import create_model

        other = create_model(beside)  # a name that is wrong is told before the first has trained, not after
        if options.get("objective") == "mae":
            from pellucid.training.masked import MAE

            MAE(other)  # and so is a model without a decoder
    run = _train(options, resume, overwrite)
    runs = [run]
    if beside is not None:
        out = run.out / f"beside-{beside}"
        recipe = {**vars(run.config), "model": beside, "model_args": _shared_sizes(run), "out": str(out)}
        runs.append(_train(recipe, resume=out.exists(), overwrite=False))
    if rank() > 0:  # of several processes that train together, one writes
        return run
    path = _report(runs, _data_of(run), run.out / "report.html", command)
    say(f"report: {path}")
    return run


def _shared_sizes(run: Run) -> dict[str, Any]:
    """Of the first model's options those that any transformer understands."""
    return {
        k: v
        for k, v in run.config.model_args.items()
        if k in ("img_size", "patch_size", "embed_dim", "depth", "global_pool", "context")
    }


def _report(runs: list[Run], data: ImageData | TextData, path: Path, command: str) -> Path:
    from pellucid.data import TextData
    from pellucid.glass.answers import bundle as packed
    from pellucid.glass.bundle import collect
    from pellucid.glass.language import collect_text
    from pellucid.glass.opening import answers_of
    from pellucid.glass.report import render

    if isinstance(data, TextData):
        bundle = collect_text(runs, data, command=command, progress=say)
    else:
        bundle = collect(runs, data, command=command, progress=say)
    answers = answers_of(runs, data, [model["audit"] for model in bundle["models"]])
    most = REPORT_TEXT_BYTES if isinstance(data, TextData) else REPORT_BYTES
    _write(path, render(bundle, None if answers is None else packed(answers, budget=most, half=True)))
    subject = bundle["models"][0]
    if subject["audit"] is not None:
        say(f"audit of {subject['name']}: {subject['audit']['verdict']['text']}")
        for line in subject["audit"]["verdict"]["details"]:
            say(f"  {line}")
    return path


def _data_of(run: Run) -> ImageData | TextData:
    """What a run has learnt from, read with its own tokenizer where it is text."""
    from pellucid.training import load_material

    return load_material(run.config, resume=True).data


def _reads_text(model: Any) -> bool:
    from pellucid.models import LanguageModel

    return isinstance(model, LanguageModel)


def _text_windows(model: Any, run: Path, data: str | None, source: Source) -> tuple[Windows, TextData]:
    """Rows of held-out text, of the run's own or of all of another, and the texts that they are of."""
    from pellucid.data import load_text
    from pellucid.glass.feed import text_windows
    from pellucid.writing import tokenizer_file

    own = _own_config(run)
    data = _named(data, own, run)
    mine = own is not None and Path(own.data).resolve() == Path(data).resolve()
    texts = load_text(
        data,
        tokenizer=str(tokenizer_file(run)),
        labels="optional" if model.classifier is None else "required",
        test_only=not mine,
        **_source_of(own, source),
    )
    if own is None:
        return text_windows(model, texts), texts
    share = own.objective_args.get("mask_share", 0.15)
    crossing = mine and own.cross_documents
    return text_windows(model, texts, cross_documents=crossing, mask_share=share, seed=own.seed), texts


def _text_batches(windows: Windows, batch_size: int = 64, limit: int | None = None) -> Any:
    from pellucid.data import eval_token_loader

    return eval_token_loader(windows, batch_size, limit=limit)


def _evaluation_data(
    run: Path, data: str | None, source: Source, labels: Literal["required", "optional"] = "required"
) -> ImageData:
    """The run's own held-out images, with labels if it learned from them, or all of another data set's."""
    from pellucid.data import BUILTIN_NAMES, load_data
    from pellucid.training.run import OBJECTIVES

    own = _own_config(run)
    data = _named(data, own, run)
    held_out = data in BUILTIN_NAMES
    if own is not None and Path(own.data).resolve() == Path(data).resolve():
        held_out, labels = True, "required" if OBJECTIVES[own.objective].needs_labels else "optional"
    return load_data(data, labels=labels, test_only=not held_out, **_source_of(own, source))


def _whole_data(
    run: Path, data: str | None, source: Source, labels: Literal["required", "optional"] = "required"
) -> tuple[str, ImageData]:
    """A data set's name and both its parts, training and test; the run's own when none is named."""
    from pellucid.data import load_data

    own = _own_config(run)
    data = _named(data, own, run)
    return data, load_data(data, labels=labels, **_source_of(own, source))


def _named(data: str | None, own: TrainConfig | None, run: Path) -> str:
    """The data set that was named, or the run's own."""
    if data is not None:
        return data
    if own is None:
        raise ConfigError(f"{run} does not say what it was trained on - name the data to look at")
    return own.data


def _source_of(own: TrainConfig | None, source: Source) -> dict[str, Any]:
    """Where images come from and how many may be bad: as asked, or as in the run."""
    root, max_bad = (own.data_root, own.max_bad) if own is not None else (None, 0.01)
    return {
        "root": source.data_root or root,
        "max_bad": max_bad if source.max_bad is None else source.max_bad,
        "download": source.download,
    }


def _own_config(run: Path) -> TrainConfig | None:
    from pellucid.training.run import options_of

    return options_of(run) if (run / "config.yaml").is_file() else None


def _accuracy_line(scores: Any, title: str) -> str:
    low, high = scores.interval
    return (
        f"{title} {scores.accuracy:.2%} "
        f"({scores.confidence:.0%} interval {low:.2%} to {high:.2%}, {scores.count} images)"
    )


def _own_test_images(run: str, model: Any, limit: int = 64) -> Iterable[Any]:
    """Batches of a run's held-out images; none for a model without a run, or where its data are gone."""
    from pellucid.data import eval_loader
    from pellucid.glass.feed import eval_view

    if not (Path(run) / "config.yaml").is_file():
        return
    try:
        images = _evaluation_data(Path(run), None, Source(), labels="optional")
    except DataError as error:
        say(f"not checked on the run's test images: {error}")
        return
    for batch in eval_loader(images.test, eval_view(model), batch_size=32, limit=limit):
        yield batch[0]


def _class_names(model: Any) -> list[str]:
    """What the model was taught; numbers for weights that came without names."""
    if model.num_classes == 0:
        raise CheckpointError(
            "the model has no classifier, it gives features - evaluate them with --probe knn, linear or "
            "finetune, or look for like pictures with pellucid neighbours"
        )
    return list(model.pretrained_cfg.get("label_names") or map(str, range(model.num_classes)))


def _labels_for(images: ImageData, names: list[str]) -> Any:
    """A filter that turns the data's labels into the model's, by class name."""
    import torch

    strange = [name for name in images.class_names if name not in names]
    if strange:
        raise CheckpointError(
            f"the data has classes that the model does not know: {', '.join(strange[:5])} - "
            f"the model knows {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        )
    table = torch.tensor([names.index(name) for name in images.class_names])

    def relabelled(batches: Iterable[Any]) -> Iterable[Any]:
        return ((batch[0], table[batch[1]]) for batch in batches)

    return relabelled


def _refuse_model_folder(out: Path, overwrite: bool) -> None:
    """Where something stands that is not to be replaced, told before the work is done."""
    from pellucid.models.saved import CONFIG, TOKENIZER, WEIGHTS

    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir() or {path.name for path in out.iterdir()} - {TOKENIZER} != {CONFIG, WEIGHTS}:
        raise ConfigError(
            f"{out} exists and is not a model/ folder - take another --out; it is left as it is"
        )
    if not overwrite:
        raise ConfigError(f"{out} holds a model already - give --overwrite to replace it, or another --out")


def _read_names(path: Path, count: int) -> list[str]:
    """One class a line."""
    try:
        names = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not text in UTF-8 - write one class a line") from error
    if len(names) != count or not all(names) or len(set(names)) < count:
        raise ConfigError(
            f"{path} has {len(names)} lines; expected {count} different class names, one a line"
        )
    return names


def _save_model(model: Any, out: Path, names: list[str]) -> int:
    """A model/ folder, whole or not at all; images are scaled as for ImageNet. Returns its parameters."""
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    from pellucid.models.saved import describe_model

    weights = {name: value.contiguous().clone() for name, value in model.state_dict().items()}
    channels = model.model_args["in_chans"]
    size = model.model_args["img_size"]
    config = describe_model(
        model,
        weights,
        class_names=names,
        mean=IMAGENET_DEFAULT_MEAN if channels == 3 else (0.5,) * channels,
        std=IMAGENET_DEFAULT_STD if channels == 3 else (0.5,) * channels,
        img_size=(size, size) if isinstance(size, int) else tuple(size),
        in_chans=channels,
    )
    config["pretrained_cfg"].pop("license", None)  # of the architecture's own weights, which these are not
    return _write_model(config, weights, out)


def _save_text_model(model: Any, out: Path) -> int:
    """A model/ folder of a language model, whole or not at all. Returns its parameters."""
    from pellucid.models.saved import describe_text_model

    weights = {name: value.contiguous().clone() for name, value in model.state_dict().items()}
    return _write_model(describe_text_model(model, weights), weights, out)


def _export_folder(name: str, network: Any, out: Path, output: str | None, overwrite: bool) -> None:
    """A language model as transformers loads it, whole or not at all."""
    from pellucid.data import read_tokenizer
    from pellucid.models import LanguageModel
    from pellucid.models.saved import tokenizer_of
    from pellucid.training.checkpoint import new_folder

    if not isinstance(network, LanguageModel):
        raise ConfigError(
            f"{name} sees images: transformers reads the model/ folder of its run as it is - give FILE.onnx "
            f"or FILE.pt2, or a language model"
        )
    if output is not None:
        raise ConfigError("--output goes with images - leave it out")
    try:
        from pellucid.hf import is_folder, save_folder
    except ImportError as error:
        raise ConfigError(str(error)) from error
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        if not is_folder(out):
            raise ConfigError(f"{out} exists and holds more or other things - take another --out; it is left")
        if not overwrite:
            raise ConfigError(f"{out} holds a model already - give --overwrite to replace it")
    file = tokenizer_of(name)
    with new_folder(out) as scratch:
        files = save_folder(network, scratch, None if file is None else read_tokenizer(file))
    size = sum(path.stat().st_size for path in out.iterdir()) / 1e6
    kind = json.loads((out / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    auto = f"AutoModel{kind.removeprefix('Crate').removeprefix('Tost')}"
    say(f"{out}: {kind}, {size:.1f} MB in {len(files)} files{', with its tokenizer' if file else ''}")
    say("checked with the code that lies there: the same scores to the last bit")
    say(f"to read it: transformers.{auto}.from_pretrained({str(out)!r}, trust_remote_code=True)")
    if file is None:
        say("it has no tokenizer: texts must come as the numbers of words")


def _write_model(config: dict[str, Any], weights: dict[str, Any], out: Path) -> int:
    """Both files or neither. Returns the number of parameters."""
    from safetensors.torch import save

    from pellucid.models.saved import CONFIG, WEIGHTS
    from pellucid.training.checkpoint import new_folder, write_flushed

    data = save(weights, metadata={"format": "pt"})
    try:
        with new_folder(out) as scratch:
            write_flushed(scratch / WEIGHTS, data)
            write_flushed(scratch / CONFIG, json.dumps(config, indent=1).encode())
    except OSError as error:
        raise unwritten(
            f"cannot write {out}: {error.strerror or error}, it needs {len(data) / 1e6:.1f} MB - make room "
            f"or take another --out",
            error,
        ) from error
    return int(config["num_parameters"])


def _network(name: str, pretrained: bool) -> Any:
    """A saved model, or a fresh or published one by its name."""
    from pellucid.models import create_model, load

    if Path(name).exists():
        return load(name)
    return create_model(name, pretrained=pretrained)


def _model_args(pairs: list[str]) -> dict[str, Any]:
    return _pairs(pairs, "--model-arg", "depth=6")


def _pairs(pairs: list[str], flag: str, example: str) -> dict[str, Any]:
    """Every NAME=VALUE, the value read as YAML."""
    import yaml

    arguments = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ConfigError(f"{flag} is '{pair}'; expected NAME=VALUE, such as {example}")
        try:
            arguments[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"{flag} {key}: '{value}' is not a value - quote it, as {key}='...'") from error
    return arguments


def _with(name: str, options: Any, given: dict[str, Any]) -> dict[str, Any]:
    """A config's ``model_args`` or ``objective_args`` with what the command line says in place of it."""
    if not isinstance(options, dict | None):
        raise ConfigError(f"{name} is {options!r}; expected options such as 'depth: 6'")
    return {**(options or {}), **given}


def _refuse_unread(unread: list[str], images: int) -> None:
    """At the end, when the others are done: the pictures that could not be read."""
    more = f"\n  and {len(unread) - 3} more" if len(unread) > 3 else ""
    raise DataError(
        f"{len(unread)} of {images} images could not be read - get them again, or leave them out\n  "
        + "\n  ".join(unread[:3])
        + more
    )


def _refuse_output(path: Path | None) -> None:
    """An output that cannot be, told before the work is done."""
    if path is None:
        return
    if not path.parent.is_dir():
        raise ConfigError(f"cannot write {path}: {path.parent} is not a folder - make it first")
    if path.is_dir():
        raise ConfigError(f"cannot write {path}: it is a folder - name a file in it")


def _write(path: Path, text: str | bytes) -> None:
    from pellucid.training.checkpoint import write_file

    _refuse_output(path)
    try:
        write_file(path, text)
    except ResourceError as error:
        reason = getattr(error.__cause__, "strerror", None) or "failed"
        raise ResourceError(f"cannot write {path}: {reason} - make room, or name another file") from error


class _bar:  # noqa: N801
    """A progress bar on a terminal, nothing elsewhere."""

    def __init__(self, total: int, unit: str) -> None:
        from tqdm import tqdm

        self.bar = tqdm(total=total, unit=unit, disable=not sys.stderr.isatty(), leave=False)

    def __enter__(self) -> Any:
        return self.bar.update

    def __exit__(self, *exception: object) -> None:
        self.bar.close()


if __name__ == "__main__":
    sys.exit(main())
