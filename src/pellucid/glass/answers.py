"""What can be asked about open models: the answers that the page shows, whoever brings them.

``pellucid view`` gives each over HTTP when it is asked for; ``pellucid report`` and ``pellucid audit
--bundle`` write all of them into one file, under the same names. The page knows no other source.
"""

from __future__ import annotations

import datetime
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pellucid import __version__
from pellucid.data import ImageData, TextData, Tokenizer, View, Windows, show_name
from pellucid.errors import ConfigError
from pellucid.glass import worded
from pellucid.glass.bundle import AUDIT_IMAGES, facts, label
from pellucid.glass.feed import batches, eval_view
from pellucid.glass.language import text_facts, text_label, windows_of
from pellucid.glass.packed import pack
from pellucid.glass.shelf import Shelf
from pellucid.glass.unlabelled import some_of
from pellucid.measure import audit
from pellucid.measure.firing import strongest
from pellucid.measure.inside import follow, look_into, steps_of
from pellucid.measure.watch import is_white_box
from pellucid.models.embed import embedding
from pellucid.models.language import LanguageModel
from pellucid.models.modes import in_eval_mode

FORMAT = "pellucid-glass"
SAMPLES = 12
"""Test images that are there to begin with."""

GALLERY_IMAGES = 64
"""Images of more than :data:`SMALL` pixels a side among which the patches of an atom are looked for."""

GALLERY_SIDE = 96
SMALL = 64
GUESSES = 5
MAX_OPEN = 8
"""Models that may be open at the same time."""

MAX_DROPPED = 32
"""Inputs that were dropped in and are still there; the oldest goes first."""


class NotThere(LookupError):
    """Asked for what is not there."""


@dataclass(frozen=True)
class Input:
    """Something to look at: a picture, or a passage of text.

    Attributes:
        name: what to call it.
        label: its class, where one is known.
        picture: uint8 ``(c, h, w)``.
        passage: in place of a picture.
    """

    name: str
    label: str | None = None
    picture: Tensor | None = None
    passage: worded.Passage | None = None

    @property
    def kind(self) -> str:
        return "text" if self.picture is None else "image"


@dataclass(frozen=True)
class Subject:
    """An open model.

    Attributes:
        model: in eval mode.
        name: of its architecture.
        data: images or texts to audit it on; None leaves out audit and atoms.
        about: whatever else is known of it, such as ``accuracy`` and ``seconds``.
        tokenizer: of a language model, what makes words of text; always there.
        windows: of a language model, the rows of ``data`` that it is audited on.
        folder: of the run that it is the model of.
    """

    model: Any
    name: str
    data: ImageData | TextData | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Tokenizer | None = None
    windows: Windows | None = None
    folder: Path | None = None

    @property
    def view(self) -> View:
        return eval_view(self.model)

    @property
    def reads(self) -> str:
        return "text" if isinstance(self.model, LanguageModel) else "image"

    @property
    def classes(self) -> list[str]:
        """What it tells apart; none where it gives features, or words."""
        model = self.model
        if self.reads == "image":
            return list(model.pretrained_cfg.get("label_names") or map(str, range(model.num_classes)))
        known = 0 if model.classifier is None else model.classifier.out_features
        return list(model.label_names) or list(map(str, range(known)))

    @property
    def depth(self) -> int:
        return len(getattr(self.model, "layers", None) or self.model.blocks)

    def tensor(self, what: Input) -> Tensor:
        """The input as a batch of one, as the model takes it.

        Raises:
            ConfigError: a picture for a model that reads text, or the other way around.
        """
        if what.kind != self.reads:
            raise ConfigError(f"{self.name} reads {self.reads}s; {what.name} is of another kind")
        if what.picture is not None:
            return self.view.batch([what.picture], [0])
        return torch.tensor([list(what.passage.ids if what.passage is not None else ())])


class Answers:
    """Models that are open and inputs to look at, by number. One question at a time reaches a model.

    Args:
        title: of the page.
        subjects: the first is what it is about, the others stand beside it.
        inputs: what there is to look at.
        shelf: runs to list.
        takes_inputs: whether more can be dropped in, or typed.
        audit_limit: images of an audit; rows of text, where it is smaller than what those are held to.
        audits: of a model, where it is measured already.
        opener: opens another run of the shelf, to stand beside the first model.
    """

    def __init__(
        self,
        title: str,
        subjects: Sequence[Subject],
        inputs: Sequence[Input] = (),
        *,
        shelf: Shelf | None = None,
        takes_inputs: bool = False,
        audit_limit: int = AUDIT_IMAGES,
        audits: Mapping[int, Any] | None = None,
        opener: Callable[[Path], Subject] | None = None,
    ) -> None:
        self.title, self.subjects, self.shelf = title, list(subjects), shelf
        self.inputs: OrderedDict[int, Input] = OrderedDict(enumerate(inputs))
        self.takes_inputs, self.audit_limit = takes_inputs, audit_limit
        self._given = self._next = len(inputs)
        self._known, self._opener = dict(audits or {}), opener
        self._audits: dict[int, dict[str, Any]] = {}
        self._lock = threading.Lock()
        self._adding = threading.Lock()  # of its own: who drops something in does not wait for an audit
        self._opening = threading.Lock()

    @property
    def takes(self) -> str | None:
        """The kind of input that can be dropped in: what the first model reads."""
        return self.subjects[0].reads if self.takes_inputs and self.subjects else None

    @property
    def opens_runs(self) -> bool:
        """Whether runs of the shelf can be opened."""
        return self._opener is not None and self.shelf is not None and bool(self.subjects)

    def open(self, name: str) -> int:
        """Open a run of the shelf beside the others; the number of its model, which may be open already.

        Raises:
            NotThere: no such run.
            ConfigError, CheckpointError: one that cannot be opened, or as many as may be are.
        """
        path = None if self.shelf is None else self.shelf.path(name)
        if path is None:
            raise NotThere("there is no such run")
        if self._opener is None or not self.subjects:
            raise ConfigError(
                "no model is open that it could stand beside - start pellucid view with that run"
            )
        with self._opening:
            for number, subject in enumerate(self.subjects):
                if subject.folder is not None and subject.folder.resolve() == path.resolve():
                    return number
            if len(self.subjects) >= MAX_OPEN:
                raise ConfigError(f"{MAX_OPEN} models are open already - start pellucid view with that run")
            self.subjects.append(self._opener(path))
            return len(self.subjects) - 1

    def type(self, text: str) -> int:
        """A passage to look at, in a reader's own words; its number.

        Raises:
            ConfigError: nothing that can be looked at, and why.
        """
        if self.takes != "text":
            raise ConfigError("no model is open that reads text")
        subject = self.subjects[0]
        assert subject.tokenizer is not None
        passage = worded.typed(subject.model, subject.tokenizer, text)
        return self.add(Input(_first_words(text), passage=passage))

    def add(self, what: Input) -> int:
        """Another input to look at; its number."""
        with self._adding:
            number = self._next
            self._next += 1
            self.inputs[number] = what
            dropped = [key for key in self.inputs if key >= self._given]
            for key in dropped[:-MAX_DROPPED]:
                del self.inputs[key]
        return number

    def overview(self) -> dict[str, Any]:
        """What is open. Nothing is measured for it."""
        return {
            "format": FORMAT,
            "title": self.title,
            "created": datetime.date.today().isoformat(),
            "version": __version__,
            "models": [_about(subject) for subject in self.subjects],
            "inputs": [
                {
                    "id": number,
                    "name": what.name,
                    "label": what.label,
                    "kind": what.kind,
                    "thumb": None if what.picture is None else _small(what.picture, SMALL),
                    "begins": None if what.passage is None else what.passage.begins,
                    "dropped": number >= self._given,
                }
                for number, what in list(self.inputs.items())
            ],
            "takes_inputs": self.takes_inputs,
            "opens_runs": self.opens_runs,
            "has_runs": self.shelf is not None,
        }

    def audit(self, model: int) -> dict[str, Any]:
        """The audit, and which patches make each atom fire. Measured once.

        Raises:
            NotThere: no such model.
        """
        subject = self._subject(model)
        with self._lock:
            if model not in self._audits:
                self._audits[model] = _audited(subject, self.audit_limit, self._known.get(model))
            return self._audits[model]

    def look(self, model: int, number: int) -> dict[str, Any]:
        """One input's way through one model.

        Raises:
            NotThere: no such model or input.
            ConfigError: an input of another kind than the model reads.
        """
        subject, what = self._subject(model), self._input(number)
        with self._lock:
            batch = subject.tensor(what)
            path = follow(subject.model, batch)
            guesses = _guesses(subject, batch)
            lens = None
            if what.passage is not None:
                assert subject.tokenizer is not None
                lens = worded.said(subject.model, subject.tokenizer, what.passage)
        prefix = _prefix(subject.model)
        count = path.norms.shape[1]
        return {
            "model": model,
            "input": number,
            "pixels": None if what.picture is None else _pixels(batch[0], subject.view),
            "words": None if what.passage is None else list(what.passage.words),
            "prefix": prefix,
            "grid": _grid(subject.model, count - len(prefix)) if what.picture is not None else None,
            "guesses": guesses,
            "lens": lens,
            **vars(path),
        }

    def layer(self, model: int, number: int, layer: int) -> dict[str, Any]:
        """What one layer, from 1, does with one input.

        Raises:
            NotThere: no such model, input or layer.
        """
        subject, what = self._subject(model), self._input(number)
        if not 1 <= layer <= subject.depth:
            raise NotThere(f"model {model} has layers 1 to {subject.depth}, not {layer}")
        with self._lock:
            seen = vars(look_into(subject.model, subject.tensor(what), layer))
        same = seen["code"] is not None and torch.equal(seen["code"], seen["after"])
        return {"layer": layer, **seen, "code": "after" if same else seen["code"]}

    def runs(self) -> dict[str, Any]:
        """Runs on the shelf.

        Raises:
            NotThere: there is no shelf.
        """
        if self.shelf is None:
            raise NotThere("no folder of runs was given")
        return self.shelf.list()

    def curves(self, name: str) -> dict[str, Any]:
        """What a run has logged so far.

        Raises:
            NotThere: no such run.
        """
        found = None if self.shelf is None else self.shelf.curves(name)
        if found is None:
            raise NotThere("there is no such run")
        return found

    def all(self, *, budget: int | None = None, half: bool = False) -> dict[str, Any]:
        """Every answer by the path under which the page asks for it.

        Args:
            budget: bytes at most, roughly: inputs beyond it are left out, and where a single one does not
                fit, layers of it, evenly. The first input of the first model always has some.
            half: bytes are counted as :func:`~pellucid.glass.packed.pack` halves them.
        """
        return dict(self._all(budget, lambda answer: len(pack(answer, half=half))))

    def _all(self, budget: int | None, size: Callable[[Any], int]) -> Iterator[tuple[str, Any]]:
        overview = self.overview()
        audits = {f"models/{m}/audit": self.audit(m) for m in range(len(self.subjects))}
        left = math.inf if budget is None else budget - sum(map(size, audits.values()))
        kept: list[int] = []
        for number in list(self.inputs):
            looks, took = self._looks(number, math.inf if kept else left, size)
            if kept and took > left:
                break
            kept.append(number)
            left -= took
            yield from looks.items()
        overview["inputs"] = [shown for shown in overview["inputs"] if shown["id"] in kept]
        overview["takes_inputs"] = overview["opens_runs"] = False
        yield "overview", overview
        yield from audits.items()
        if self.shelf is not None:
            yield "runs", self.shelf.list()
            yield from ((f"runs/{name}", self.shelf.curves(name)) for name in self.shelf.names())

    def _looks(self, number: int, most: float, size: Callable[[Any], int]) -> tuple[dict[str, Any], int]:
        """All answers on one input, and how many bytes they are; layers evenly thinned to fit ``most``."""
        found: dict[str, Any] = {}
        took = 0
        fitting = [m for m, s in enumerate(self.subjects) if s.reads == self.inputs[number].kind]
        for m in fitting:
            found[f"looks/{m}/{number}"] = look = self.look(m, number)
            took += size(look)
            for layer in self._affordable(m, number, most / len(fitting), size):
                found[f"looks/{m}/{number}/layers/{layer}"] = answer = self.layer(m, number, layer)
                took += size(answer)
        return found, took

    def _affordable(self, model: int, number: int, most: float, size: Callable[[Any], int]) -> list[int]:
        """Layers of which the answers fit, evenly spaced; at least one."""
        depth = self.subjects[model].depth
        if math.isinf(most):
            return list(range(1, depth + 1))
        room = max(1, int(most // size(self.layer(model, number, 1))))
        return sorted({round(i) for i in np.linspace(depth if room == 1 else 1, depth, min(room, depth))})

    def _subject(self, model: int) -> Subject:
        if not 0 <= model < len(self.subjects):
            raise NotThere(f"there is no model {model}")
        return self.subjects[model]

    def _input(self, number: int) -> Input:
        try:
            return self.inputs[number]
        except KeyError:
            raise NotThere(f"there is no input {number}, or no more") from None


def bundle(answers: Answers, *, budget: int | None = None, half: bool = False) -> bytes:
    """All answers as one file; see ``docs/bundle.md``. Arguments as :meth:`Answers.all`."""
    return pack({"format": FORMAT, "answers": answers.all(budget=budget, half=half)}, half=half)


def samples_of(subjects: Sequence[Subject]) -> list[Input]:
    """What of the first one's held-out data there is to look at to begin with."""
    if not subjects:
        return []
    data = subjects[0].data
    return sample_inputs(data) if isinstance(data, ImageData) else sample_passages(subjects)


def sample_passages(subjects: Sequence[Subject]) -> list[Input]:
    """Beginnings of held-out rows to begin with, no longer than any of these models reads."""
    first = subjects[0]
    if first.windows is None or first.data is None:
        return []
    context = min(subject.model.context for subject in subjects)
    names = first.data.class_names
    found = worded.held_out(first.model, first.windows, context)
    return [Input(name, names[k] if 0 <= k < len(names) else None, passage=each) for name, k, each in found]


def sample_inputs(data: ImageData, count: int = SAMPLES) -> list[Input]:
    """Test images to begin with: one of each of the first classes, without labels evenly spaced ones."""
    names, images = data.class_names, data.test
    return [
        Input(
            images.name(i), names[int(images.labels[i])] if images.labels[i] >= 0 else None, images.image(i)
        )
        for i in some_of(images, count)
    ]


def _about(subject: Subject) -> dict[str, Any]:
    model = subject.model
    reads_images = subject.reads == "image"
    grid = getattr(embedding(model), "grid_size", None) if reads_images else None
    return {
        "name": subject.name,
        "label": label(model) if reads_images else text_label(model),
        "reads": subject.reads,
        "white": is_white_box(model),
        "parameters": sum(p.numel() for p in model.parameters()),
        "depth": subject.depth,
        "facts": facts(model) if reads_images else text_facts(model),
        "causal": not reads_images and model.causal,
        "classes": subject.classes,
        "grid": None if grid is None else list(grid),
        "prefix": _prefix(model),
        "steps": steps_of(model),
        "audited": subject.data is not None if reads_images else subject.windows is not None,
        "data": None if subject.data is None else subject.data.name,
        "accuracy": None,
        "bits_per_byte": None,
        "seconds": None,
        "fresh": False,
        **subject.about,
    }


def _audited(subject: Subject, limit: int, known: Any = None) -> dict[str, Any]:
    if isinstance(subject.data, TextData) and subject.windows is not None:
        rows = min(limit, worded.AUDITED_WORDS // subject.model.context)
        return worded.audited(subject.model, subject.windows, subject.data, max(2, rows), known)
    if not isinstance(subject.data, ImageData):
        return {"audit": None, "atoms": {}, "gallery": []}
    model, images = subject.model, subject.data.test
    small = max(subject.view.img_size) <= SMALL
    limit = min(limit, len(images))
    if known is None:
        loader = batches(model, images, batch_size=32, limit=limit)
        known = audit(model, loader, data=subject.data.name).to_dict()
    among = limit if small else min(limit, GALLERY_IMAGES)
    loader = batches(model, images, batch_size=16, limit=among)
    found = strongest(model, loader, prefix=len(_prefix(model)))
    used = sorted({i for layer in found.values() for i in layer.images.unique().tolist()})
    place = torch.zeros(among, dtype=torch.int32)
    place[used] = torch.arange(len(used), dtype=torch.int32)
    order = [int(i) for batch in loader for i in batch[2]]
    return {
        "audit": known,
        "atoms": {
            str(layer): {**vars(atoms), "images": place[atoms.images]} for layer, atoms in found.items()
        },
        "gallery": [_gallery_item(subject, order[i]) for i in used],
        "looked_at": among,
    }


def _gallery_item(subject: Subject, i: int) -> dict[str, Any]:
    assert isinstance(subject.data, ImageData)
    images, view = subject.data.test, subject.view
    picture = view.fitted([images.image(i)])[0]
    known = images.labels[i] >= 0
    return {
        "name": images.name(i),
        "label": subject.data.class_names[int(images.labels[i])] if known else None,
        "pixels": _small(picture, GALLERY_SIDE),
    }


def _guesses(subject: Subject, batch: Tensor) -> list[dict[str, Any]]:
    """The likeliest classes; what a model says of words, ``lens`` tells."""
    model, names = subject.model, subject.classes
    if not (model.num_classes if subject.reads == "image" else names):
        return []
    with torch.no_grad(), in_eval_mode(model):
        scores = model(batch.to(next(model.parameters()).device))[0]
    best = scores.float().softmax(-1).cpu().topk(min(GUESSES, len(scores)))
    return [
        {"name": names[i], "share": share}
        for share, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def _first_words(text: str) -> str:
    return show_name(" ".join(text.split())[:40]) or "spaces"


def _prefix(model: Any) -> list[str]:
    """What the layers' tokens in front of the patches are called; ToST's class token joins behind them."""
    home, name = (model.embed, "class_token") if hasattr(model, "embed") else (model, "cls_token")
    count = getattr(home, "num_prefix_tokens", 0)
    has_class = count > 0 and getattr(home, name, None) is not None
    registers = count - int(has_class)
    return ["class"] * has_class + [f"register {i}" for i in range(1, registers + 1)]


def _grid(model: Any, patches: int) -> list[int] | None:
    """Rows and columns of patches; None where tokens are no patches of a grid."""
    grid = getattr(embedding(model), "grid_size", None)
    return list(grid) if grid is not None and grid[0] * grid[1] == patches else None


def _pixels(image: Tensor, view: View) -> np.ndarray:
    """What the model sees, uint8 ``(h, w, c)`` with c = 1 or 3; of other channels the first."""
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (view.mean, view.std))
    pixels = ((image * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    return _channels_last(pixels)


def _small(picture: Tensor, side: int) -> np.ndarray:
    """A picture with a longer side of at most ``side``, uint8 ``(h, w, c)``."""
    longest = max(picture.shape[-2:])
    if longest > side:
        size = [max(1, round(length * side / longest)) for length in picture.shape[-2:]]
        shrunk = F.interpolate(picture[None].float(), size, mode="bilinear", antialias=True)
        picture = shrunk[0].round().clamp(0, 255).to(torch.uint8)
    return _channels_last(picture)


def _channels_last(picture: Tensor) -> np.ndarray:
    shown = picture if len(picture) == 3 else picture[:1]
    return shown.permute(1, 2, 0).contiguous().numpy()


def subject_of(run: Any, data: ImageData | TextData | None, tokenizer: Tokenizer | None = None) -> Subject:
    """A finished run, opened; of one on text with what makes words of text, where ``data`` does not say."""
    about = {"accuracy": run.accuracy, "seconds": run.seconds, "run": run.out.name}
    if not isinstance(data, TextData):
        return Subject(run.model, run.config.model, data, about, tokenizer, folder=run.out)
    about["bits_per_byte"] = run.measures.get("bits per byte")
    windows = windows_of(run, data)
    return Subject(run.model, run.config.model, data, about, data.tokenizer, windows, run.out)


__all__ = [
    "Answers",
    "Input",
    "NotThere",
    "Subject",
    "bundle",
    "sample_inputs",
    "sample_passages",
    "samples_of",
    "subject_of",
]
