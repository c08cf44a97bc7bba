"""Several models by one recipe on the same images: trained, audited, timed, and shown beside each other.

Where training, measuring and showing meet; what is measured is in ``measure/compare.py``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from pellucid.data import ImageData, eval_loader, load_data
from pellucid.errors import ConfigError, DataError, Stopped
from pellucid.glass.bundle import audit_or_none, collect_comparison
from pellucid.glass.feed import batches, eval_view
from pellucid.glass.report import render_comparison
from pellucid.measure import evaluate
from pellucid.measure.bench import machine_facts
from pellucid.measure.compare import (
    Comparison,
    Contender,
    Outcome,
    forward_flop,
    held_steps,
    inference_speed,
    sparsity,
)
from pellucid.models import create_model
from pellucid.training import Run, TrainConfig, open_run, train
from pellucid.training.checkpoint import load_checkpoint, write_file
from pellucid.training.config import refuse_changes
from pellucid.training.recorder import StopFlag

Match = Literal["width", "params"]
Say = Callable[[str], None]

OWN = {"data", "out", "model", "model_args", "seed", "init_from"}
"""Of a run's options those that are not common to all."""

TIMED_IMAGES = 64


@dataclass(frozen=True)
class Spec:
    """A model to compare: its name and options, from ``NAME[:OPTION=VALUE,...]``."""

    text: str
    name: str
    model_args: dict[str, Any]

    @classmethod
    def parse(cls, text: str) -> Spec:
        """Read ``crate_digits:compression=untied,step_size=0.1``; a list is written ``img_size=[8,8]``.

        Raises:
            ConfigError: options that are not NAME=VALUE.
        """
        name, _, options = text.partition(":")
        model_args = {}
        for pair in re.split(r",(?![^\[]*\])", options) if options else []:
            key, equals, value = pair.partition("=")
            try:
                model_args[key.strip()] = yaml.safe_load(value)
            except yaml.YAMLError:
                equals = ""
            if not equals or not key.strip():
                raise ConfigError(f"'{text}': '{pair}' is not OPTION=VALUE, such as depth=6")
        return cls(text, name, model_args)

    @property
    def folder(self) -> str:
        """Its runs' name, without the seed."""
        return re.sub(r"[^\w.]+", "-", self.text).strip("-")

    def build(self, images: ImageData, device: str = "cpu") -> Any:
        """A fresh model for these images; on ``"meta"`` its shapes alone."""
        with torch.device(device):
            return create_model(
                self.name, **self.model_args, num_classes=len(images.class_names), in_chans=images.in_chans
            )


def compare(
    data: str,
    models: Sequence[str],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    match: Match = "width",
    out: str | Path = "runs/compare",
    resume: bool = False,
    recipe: Mapping[str, Any] | None = None,
    command: str = "",
    say: Say = lambda line: None,
) -> Comparison:
    """Train every model from every seed, measure all, and write ``compare.json`` and ``report.html``.

    A model's run from a seed lies in ``out/MODEL-sSEED``. Stopped at any moment, ``resume`` goes on: finished
    runs are taken as they are, an unfinished one continues from its last checkpoint.

    Args:
        data: see :func:`pellucid.load_data`.
        models: as ``NAME[:OPTION=VALUE,...]``; the first is what the others are held against.
        seeds: each model is trained once from each.
        match: ``"width"`` takes the models as they are; see :func:`match_parameters` for ``"params"``.
        out: a new folder, or with ``resume`` an earlier comparison's.
        recipe: fields of :class:`~pellucid.training.TrainConfig`, the same for all.
        command: the line that asked for it, for the report.
        say: gets one line of news at a time.

    Raises:
        ConfigError, DataError: before anything is trained.
        ConfigError: ``out`` is in use, or holds no comparison to resume.
        Stopped: by a signal; everything done so far is kept.
    """
    out, recipe = Path(out), dict(recipe or {})
    specs = named = _checked(models, seeds)
    for key in OWN & recipe.keys():
        raise ConfigError(f"{key} is no part of a recipe - the comparison sets it for each run")
    # Every option is looked at before the first hour has passed, not after.
    config = TrainConfig.from_mapping({**recipe, "data": data})
    images = load_data(data, download=config.download, root=config.data_root, max_bad=config.max_bad)
    sizes = [_size(spec, images) for spec in specs]
    if match == "params":
        specs = match_parameters(specs, images)
        for spec, before in zip(specs, sizes, strict=True):
            width, size = _width(spec, images), _size(spec, images)
            say(f"{spec.text}: width {width}, {size:,} parameters (was {before:,})")
    _claim(out, resume)
    labels = short_labels(named)
    with StopFlag() as stop:
        trained: dict[str, list[Run]] = {spec.text: [] for spec in specs}
        # Seed by seed, so that a comparison that is stopped early has compared all models.
        for seed in seeds:
            for spec in specs:
                run = _trained(spec, seed, data, out, images, recipe, say)
                _pause(stop, out)
                trained[spec.text].append(run)
        contenders = []
        for spec, label in zip(specs, labels, strict=True):
            say(f"measuring {label}")
            contenders.append(_measured(spec, label, trained[spec.text], images))
            _pause(stop, out)
        say("timing all, in turns")
        _time(contenders, [trained[spec.text][0].model for spec in specs], images)
        _pause(stop, out)
    result = Comparison(images.name, match, config.epochs, contenders, machine_facts())
    first = trained[specs[0].text][0]
    bundle = collect_comparison(result, first, images, title=out.name, command=command)
    write_file(out / "compare.json", json.dumps(bundle, indent=1) + "\n")
    write_file(out / "report.html", render_comparison(bundle))
    return result


def match_parameters(specs: Sequence[Spec], images: ImageData) -> list[Spec]:
    """The models at widths that bring their numbers of parameters next to the first one's.

    The number of heads stays, so a width is a multiple of it and the dimension of a head changes; depth and
    all else stay too. A model whose width is given (``NAME:embed_dim=96``) keeps it.
    """
    target = _size(specs[0], images)
    return [specs[0], *(_matched(spec, target, images) for spec in specs[1:])]


def _matched(spec: Spec, target: int, images: ImageData) -> Spec:
    if "embed_dim" in spec.model_args:
        return spec
    parts = spec.build(images, "meta").modules()
    heads = next((int(part.num_heads) for part in parts if hasattr(part, "num_heads")), 1)

    def at(multiple: int) -> Spec:
        return replace(spec, model_args={**spec.model_args, "embed_dim": multiple * heads})

    def size(multiple: int) -> int:
        return _size(at(multiple), images)

    low, high = 1, 2
    while size(high) < target:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) < target else (low, middle)
    return at(min((low, high), key=lambda multiple: abs(size(multiple) - target)))


def short_labels(specs: Sequence[Spec]) -> list[str]:
    """What models are called in print: without the end that all names share, options that differ behind.

    ``crate_digits:compression=untied,depth=2`` becomes ``crate, untied`` beside ``vit_digits:depth=2``.
    """
    names = [spec.name.split("_") for spec in specs]
    backwards = zip(*(name[:0:-1] for name in names), strict=False)  # the first word always stays
    shared = sum(1 for _ in takewhile(lambda words: len(set(words)) == 1, backwards))

    def is_common(option: str, value: Any) -> bool:
        return len(specs) > 1 and all(other.model_args.get(option) == value for other in specs)

    def label(spec: Spec, words: list[str], plain: bool) -> str:
        told = [(k, v) for k, v in spec.model_args.items() if not is_common(k, v)]
        options = [v if plain and isinstance(v, str) else f"{k} {v}" for k, v in told]
        return ", ".join([" ".join(words[: len(words) - shared]), *options])

    for plain in (True, False):
        labels = [label(spec, words, plain) for spec, words in zip(specs, names, strict=True)]
        if len(set(labels)) == len(labels):
            break
    return labels


def _checked(models: Sequence[str], seeds: Sequence[int]) -> list[Spec]:
    specs = [Spec.parse(text) for text in models]
    if not specs:
        raise ConfigError("no models given - name two or more, such as --models crate_digits vit_digits")
    for what, given in (("model", [spec.folder for spec in specs]), ("seed", list(map(str, seeds)))):
        twice = next((item for item in given if given.count(item) > 1), None)
        if twice is not None:
            raise ConfigError(f"{what} {twice} is named twice - name each once")
    if not seeds or min(seeds) < 0:
        raise ConfigError(f"seeds are {list(seeds)}; at least one is needed, none below 0")
    return specs


def _size(spec: Spec, images: ImageData) -> int:
    return sum(p.numel() for p in spec.build(images, "meta").parameters())


def _width(spec: Spec, images: ImageData) -> int:
    return int(spec.build(images, "meta").num_features)


def _claim(out: Path, resume: bool) -> None:
    used = out.exists() and (not out.is_dir() or any(out.iterdir()))
    if used and not resume:
        raise ConfigError(
            f"{out} is not empty - give --resume to go on with the comparison in it, or another --out"
        )
    if resume and not used:
        raise ConfigError(
            f"nothing to resume: {out} holds no comparison - leave out --resume, or check --out"
        )


def _trained(
    spec: Spec, seed: int, data: str, out: Path, images: ImageData, recipe: dict[str, Any], say: Say
) -> Run:
    folder = out / f"{spec.folder}-s{seed}"
    options = {
        **recipe,
        "model": spec.name,
        "model_args": spec.model_args,
        "seed": seed,
        "out": str(folder),
    }
    run = _finished(folder, {**options, "data": data}, images)
    if run is None:
        run = train(data, **options, resume=(folder / "config.yaml").is_file(), say=say)
    accuracy = "" if run.accuracy is None else f", test accuracy {run.accuracy:.2%}"
    say(f"{folder.name}: trained in {run.seconds:.1f} s{accuracy}")
    return run


def _finished(folder: Path, options: dict[str, Any], images: ImageData) -> Run | None:
    """The run in ``folder`` if it has ended; refused if it was another recipe's, or on other images."""
    if not (folder / "result.json").is_file():
        return None
    run = open_run(folder)
    asked = TrainConfig.from_mapping(options)
    asked.augment = run.config.augment if asked.augment == "auto" else asked.augment
    asked.flip = run.config.flip if asked.flip is None else asked.flip
    refuse_changes(run.config, asked)
    saved = load_checkpoint(folder / "checkpoints")
    if saved is not None and saved.meta["data"] != images.fingerprint:
        raise DataError(
            f"{images.name} has changed since {folder} was trained - compare again in another --out"
        )
    return run


def _pause(stop: StopFlag, out: Path) -> None:
    if stop.name:
        raise Stopped(
            f"stopped by {stop.name}: all that was trained is kept in {out} - run the same command with "
            f"--resume to go on"
        )


def _measured(spec: Spec, label: str, runs: list[Run], images: ImageData) -> Contender:
    model = runs[0].model
    return Contender(
        label=label,
        name=spec.name,
        model_args=spec.model_args,
        parameters=sum(p.numel() for p in model.parameters()),
        flop=forward_flop(model, next(iter(batches(model, images.test, batch_size=8)))[0]),
        outcomes=[_outcome(run, images) for run in runs],
    )


def _outcome(run: Run, images: ImageData) -> Outcome:
    view = eval_view(run.model)
    scores = evaluate(run.model, eval_loader(images.test, view), images.class_names)
    audit = audit_or_none(run.model, images, view)
    return Outcome(
        seed=run.config.seed,
        accuracy=scores.accuracy,
        interval=scores.interval,
        count=scores.count,
        seconds=run.seconds,
        images_per_second=run.config.epochs * len(images.train) / run.seconds,
        steps=held_steps(audit),
        nonzero=sparsity(audit),
    )


def _time(contenders: list[Contender], models: list[Any], images: ImageData) -> None:
    firsts = [next(iter(batches(model, images.test, batch_size=TIMED_IMAGES)))[0] for model in models]
    for contender, (rate, speed) in zip(contenders, inference_speed(models, firsts), strict=True):
        contender.images_per_second, contender.speed = rate, speed
