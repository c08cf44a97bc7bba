"""What a run is: every choice, with its default, checked before anything starts."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from pellucid.errors import ConfigError, suggest
from pellucid.regular import read_regular

Augment = Literal["auto", "none", "small", "photo"]
Precision = Literal["32", "bf16"]
Engine = Literal["lightning", "plain"]
Accelerator = Literal["auto", "cpu", "gpu", "cuda", "mps"]
Strategy = Literal["auto", "ddp", "fsdp"]
CheckpointFormat = Literal["whole", "sharded"]
IstaBound = Literal["warn", "stop"]

FREE = {"out", "workers", "threads", "save_every", "download", "data_root", "engine", "data_timeout"}
FREE |= {"accelerator", "devices", "nodes", "strategy", "checkpoint_format", "stop_on_collapse"}
FREE |= {"max_skipped", "ista_bound"}
"""What a resumed run may change: where and how it runs, not what it computes."""

FIXED = {"model", "model_args", "tokenizer", "vocab_size"}
"""What settles which weights there are: another value takes other weights."""

FORK = {"data", "objective", "objective_args", "seed", "epochs", "batch_size", "lr", "matrix_lr"}
FORK |= {"weight_decay", "weight_decay_end", "warmup", "label_smoothing", "incoherence", "clip", "average"}
FORK |= {"augment", "flip", "large_crops", "small_crops", "small_size", "crop_split", "cross_documents"}
FORK |= {"precision", "accumulate", "exact", "eval_every", "init_from", "new_head", "max_bad"}
"""What a new run that begins at this one's weights, by ``--init-from``, may change."""


@dataclass(kw_only=True)
class TrainConfig:
    """All choices of a training run. ``runs/NAME/config.yaml`` holds them as resolved and is accepted back.

    Attributes:
        data: a known name, a folder of class folders, or a ``.npz``; for text a folder of files, or a
            ``.jsonl``.
        out: the run's folder.
        model: any name of ``pellucid models`` or timm; chosen by the size of the pictures when empty.
        model_args: options of the architecture: ``img_size``, ``patch_size``, ``embed_dim``, ...
        objective: what is learnt from: ``supervised`` (cross-entropy) or ``mcr2`` (rate reduction) with
            labels; ``simdino``, ``simdinov2``, ``dino``, ``mcr2-views`` or ``mae`` without; of text
            ``causal-lm``, ``masked-lm`` or ``text-classification``.
        objective_args: numbers of the objective, such as ``eps`` and ``gamma``; ``docs/learning.md`` lists
            them.
        seed: of everything random.
        epochs: passes over the training images; a fraction is allowed.
        batch_size: images of one optimiser step, over all devices and accumulated micro-batches.
        lr: peak rate of AdamW.
        matrix_lr: peak rate of Muon, which moves the layers' matrices.
        weight_decay: decoupled.
        weight_decay_end: what it becomes by the end of the run, along half a cosine; stays when left out.
        warmup: share of the run over which rates rise.
        label_smoothing: share of the target spread over all classes.
        incoherence: weight of a penalty on subspaces that overlap or are not orthonormal, mean over layers.
        clip: largest norm of the gradient; 0 leaves it alone.
        average: decay of averaged weights; 0 keeps none.
        augment: ``small`` (turn, shift, scale), ``photo`` (random crop), ``none``, or by the data.
        flip: mirror half of the images; by the data when left out (photos yes, digits no).
        large_crops: views of an image that show most of it, without labels.
        small_crops: views that show a part of it; by the size of the pictures when left out.
        small_size: side of the small views in pixels; about half of the images' when left out.
        crop_split: share of the area above which a view is large; by the size of the pictures when left out.
        tokenizer: of text: ``bytes``, ``bpe`` (learnt from the training texts), ``gpt2``, or a file; that of
            ``init_from``, or bytes, when left out.
        vocab_size: words of a tokenizer that is learnt.
        cross_documents: of text: let a row go on with the next document, so that no place is left empty.
        stop_on_collapse: end a run whose features collapse, with everything saved.
        precision: ``32``, or ``bf16`` for products in bfloat16.
        accumulate: micro-batches of one step.
        exact: parts that a batch is cut into whatever the number of processes, a power of two: 1, 2, 4, ...
            processes up to it, and any change between them, then give the same bits; 0 does without.
        workers: processes that read images.
        ista_bound: when a layer's step of ISTA reaches 2/||D||^2: ``warn``, or ``stop``, all saved.
        data_timeout: seconds for one of them to answer.
        max_skipped: steps of any 1,000 that may be left out because a number was not finite, before the run
            stops.
        eval_every: epochs between evaluations; 0 chooses at most 40 in a run.
        save_every: steps between checkpoints; 0 saves once an epoch.
        init_from: a run, model folder or safetensors file whose weights to start from.
        new_head: with ``init_from``: a fresh classifier.
        max_bad: share of unreadable images above which a run is refused.
        download: fetch a named data set.
        data_root: where named data sets are kept.
        threads: of the CPU; 0 takes one for steps so small that threads would only wait for each other.
        engine: ``lightning``, or ``plain`` for the loop in ``training/loops.py``.
        accelerator, devices, nodes: as lightning takes them.
        strategy: of several devices; ``fsdp`` cuts weights and the optimiser's state up over them, ``ddp``
            gives all to each, as ``auto`` does.
        checkpoint_format: with ``fsdp``: ``sharded`` has each process write its own rows, ``whole`` puts the
            state together in the first. Either goes on with any number of devices.
    """

    data: str
    out: str = ""
    model: str = ""
    model_args: dict[str, Any] = field(default_factory=dict)
    objective: str = "supervised"
    objective_args: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    epochs: float = 60
    batch_size: int = 128
    lr: float = 3e-3
    matrix_lr: float = 1e-2
    weight_decay: float = 0.05
    weight_decay_end: float | None = None
    warmup: float = 0.05
    label_smoothing: float = 0.1
    incoherence: float = 0.0
    clip: float = 0.0
    average: float = 0.0
    augment: Augment = "auto"
    flip: bool | None = None
    large_crops: int = 2
    small_crops: int | None = None
    small_size: int | None = None
    crop_split: float | None = None
    tokenizer: str = ""
    vocab_size: int = 8192
    cross_documents: bool = False
    stop_on_collapse: bool = False
    ista_bound: IstaBound = "warn"
    precision: Precision = "32"
    accumulate: int = 1
    exact: int = 0
    workers: int = 0
    data_timeout: float = 60
    max_skipped: int = 3
    eval_every: float = 0
    save_every: int = 0
    init_from: str | None = None
    new_head: bool = False
    max_bad: float = 0.01
    download: bool = False
    data_root: str | None = None
    threads: int = 0
    engine: Engine = "lightning"
    accelerator: Accelerator = "auto"
    devices: int | str = 1
    nodes: int = 1
    strategy: Strategy = "auto"
    checkpoint_format: CheckpointFormat = "whole"

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for key, hint in hints.items():
            setattr(self, key, checked(key, getattr(self, key), hint))
        # YAML knows lists only, and a run is compared with what was written of it.
        for name in ("model_args", "objective_args"):
            given = getattr(self, name)
            setattr(self, name, {k: list(v) if isinstance(v, tuple) else v for k, v in given.items()})
        for key in (
            "epochs",
            "batch_size",
            "accumulate",
            "lr",
            "matrix_lr",
            "large_crops",
            "vocab_size",
        ):
            if not getattr(self, key) > 0:
                raise ConfigError(f"{key} is {getattr(self, key)}; it must be larger than 0")
        if not self.data_timeout > 0:
            raise ConfigError(f"data_timeout is {self.data_timeout}; it must be larger than 0")
        for key in (
            "weight_decay",
            "incoherence",
            "clip",
            "workers",
            "threads",
            "eval_every",
            "save_every",
            "max_skipped",
            "seed",
            "weight_decay_end",
            "small_crops",
            "small_size",
        ):
            if (getattr(self, key) or 0) < 0:
                raise ConfigError(f"{key} is {getattr(self, key)}; it must not be negative")
        for key in ("warmup", "label_smoothing", "average", "max_bad"):
            if not 0 <= getattr(self, key) < 1:
                raise ConfigError(f"{key} is {getattr(self, key)}; it must lie in 0..1")

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> TrainConfig:
        """Checked options; an unknown key is an error that names the nearest known one."""
        known = {f.name for f in dataclasses.fields(cls)}
        for key in options:
            if key not in known:
                shown = _shown(key)
                raise ConfigError(f"unknown option '{shown}'{suggest(shown, known)}")
        if not options.get("data"):
            raise ConfigError("no data given - name a folder, a .npz file or a known data set such as digits")
        return cls(**options)

    def to_yaml(self) -> str:
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True)


MOST_BYTES, MOST_VALUES, MOST_DEPTH = 128 * 2**10, 10_000, 32
"""Of a YAML file with options: a run's own has about 2,000 bytes and 100 values."""


def read_config(path: str | Path) -> dict[str, Any]:
    """Options from a YAML file.

    Raises:
        ConfigError: not there, not YAML, not a mapping, or more than options can be.
    """
    try:
        # A SafeLoader: what it makes are numbers, texts, dates, lists and dicts.
        options = yaml.load(read_regular(path, MOST_BYTES).decode("utf-8"), _Loader)  # noqa: S506
        if not isinstance(options, dict):
            raise ConfigError(f"{path} holds no options; expected lines such as 'epochs: 80'")
        _count(options, {})
    except OSError as error:
        raise ConfigError(f"cannot read config {path} ({error.strerror})") from error
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = "".join(c if c.isprintable() else "?" for c in " ".join(str(error).split()))
        raise ConfigError(f"{path} is not YAML: {reason[:300]}") from error
    return options


class _Loader(yaml.SafeLoader):
    """No deeper than options are: reading a thousand lists in each other takes PyYAML seconds."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > MOST_DEPTH:
            raise yaml.YAMLError(f"nested more than {MOST_DEPTH} deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _count(value: Any, known: dict[int, int]) -> int:
    """Values in ``value`` once every alias is written out; an alias of an alias of ... doubles with each."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = MOST_VALUES  # until it is counted: what holds itself never ends
        inside = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count(item, known) for item in inside)
    if known[id(value)] > MOST_VALUES:
        raise ValueError(f"more than {MOST_VALUES:,} values, counting each time that one is meant")
    return known[id(value)]


def refuse_changes(saved: TrainConfig, asked: TrainConfig) -> list[str]:
    """A resumed run computes what it began to compute. Returns the changes that are allowed, a line each.

    Raises:
        ConfigError: listing each changed option that is not in :data:`FREE`, and what would allow it.
    """
    before, after = dataclasses.asdict(saved), dataclasses.asdict(asked)
    changed = [k for k in before if before[k] != after[k]]
    said = {k: f"{k} {before[k]} -> {after[k]}" for k in changed}
    fixed, fork = [k for k in changed if k in FIXED], [k for k in changed if k not in FIXED | FREE]
    if not fixed and not fork:
        return [f"{said[k]} (allowed)" for k in changed if k != "out"]
    lines = [
        f"  {said[k]} ({'never, it settles what weights there are' if k in FIXED else 'in a new run only'})"
        for k in (*fixed, *fork)
    ]
    more = len(lines) - 3
    if more > 0:
        lines[3:] = []
        lines[-1] += f", and {more} more"
    remedy = "" if fixed else f", or start a new run with --init-from {saved.out or 'this one'}"
    raise ConfigError(
        "cannot resume with other options - leave them as they were" + remedy + "\n" + "\n".join(lines)
    )


def checked(key: str, value: Any, hint: Any) -> Any:
    """The value in the annotated type, or an error that names both; no number is infinite."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key} is {value}; it must be finite")
    if isinstance(value, str) and (len(value) > MOST_LETTERS or "\0" in value):
        raise ConfigError(f"{key} is {_shown(repr(value))}; no name and no path is so long, or holds a NUL")
    options = get_args(hint)
    if get_origin(hint) is Literal:
        if str(value) in options:
            return str(value)
        raise ConfigError(f"{key} is '{_shown(value)}'{suggest(_shown(value), options)}")
    plain = [
        t for t in (options if options and get_origin(hint) is not dict else [hint]) if t is not type(None)
    ]
    if value is None and type(None) in options:
        return None
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    for kind in (get_origin(t) or t for t in plain):
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
            return value
        if kind is float and isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
            try:
                number = float(value)
            except ValueError:
                continue
            return checked(key, number, hint)
    names = " or ".join(getattr(t, "__name__", str(t)) for t in plain)
    raise ConfigError(f"{key} is {_shown(repr(value))}; expected {names}")


MOST_LETTERS = 4096
"""Of a text: so many bytes a path may have."""


def _shown(value: Any) -> str:
    """As much of a value as a line can take."""
    text = str(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _help() -> dict[str, str]:
    """What each option means, from the ``Attributes`` of :class:`TrainConfig`."""
    lines = re.findall(r"^ {8}(\S.*?): (.+(?:\n {12}.+)*)", TrainConfig.__doc__ or "", re.MULTILINE)
    texts = {names: " ".join(text.split()) for names, text in lines}
    return {name: text for names, text in texts.items() for name in names.split(", ")}


OPTION_HELP = _help()
