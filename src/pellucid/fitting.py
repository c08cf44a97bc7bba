"""One analytic estimator on a set of images: fitted, measured, saved, and shown on a page of its own.

Where data, estimators and the page meet. A method is one line of :data:`METHODS`.
"""

from __future__ import annotations

import datetime
import inspect
import json
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pellucid import __version__, analytic
from pellucid.analytic.saved import DESCRIPTION, save_estimator
from pellucid.data import ImageData, ImageSet, View, eval_loader, load_data
from pellucid.errors import ConfigError, DataError, suggest, unwritten
from pellucid.glass.report import render_fit
from pellucid.glass.sheets import MAX_WIDTH, sheet
from pellucid.measure.scores import wilson_interval
from pellucid.objectives import class_coding_rate, coding_rate
from pellucid.steps import SoftISTA, unroll
from pellucid.training.checkpoint import new_folder, write_flushed

COORDINATES = "coordinates"

Say = Callable[[str], None]
Figure = dict[str, Any]

PATCHES = 10_000
"""Patches that are cut out to fit on; a quarter as many to measure on."""

DRAWN = 256
"""Samples that are drawn from what can draw them."""

FLAT = 0.2
"""A patch whose contrast is below this share of the average tells nothing of structure and is not taken."""


@dataclass(frozen=True)
class Rows:
    """What an estimator is fitted to and measured on.

    Attributes:
        kind: ``images``, pixels from 0 to 1, or ``patches``, pieces less their mean, with variance one.
        train, test: a picture in each row.
        labels: class of each training row, or None for patches.
        test_labels: the same for the others.
        size: channels, height and width of a picture.
        coordinates: the components that the rows are coordinates on; None where they are pixels.
    """

    kind: Literal["images", "patches"]
    train: Float[Tensor, "n d"]
    test: Float[Tensor, "m d"]
    labels: Int[Tensor, " n"] | None
    test_labels: Int[Tensor, " m"] | None
    size: tuple[int, int, int]
    coordinates: Any = None

    def pictures(self, rows: Float[Tensor, "k d"]) -> Float[Tensor, "k c h w"]:
        """Rows as pictures again."""
        pixels = rows if self.coordinates is None else self.coordinates.inverse_transform(rows)
        return pixels.detach().float().reshape(-1, *self.size)


@dataclass(frozen=True)
class Fitted:
    """A fitted estimator, and what it makes of the rows it has not seen."""

    method: Method
    estimator: Any
    rows: Rows
    names: list[str]
    seconds: float

    @cached_property
    def codes(self) -> Tensor:
        """What it turns the test rows into."""
        return self.estimator.transform(self.rows.test)

    @cached_property
    def rebuilt(self) -> Tensor:
        """The test rows as they come back from their codes."""
        if hasattr(self.estimator, "inverse_transform"):
            return self.estimator.inverse_transform(self.codes)
        return self.codes @ self.estimator.dictionary_.mT

    @cached_property
    def drawn(self) -> Tensor:
        """New rows that it makes."""
        return self.estimator.sample(DRAWN)

    @cached_property
    def guesses(self) -> Tensor:
        """The class that it sees in each test row."""
        return torch.as_tensor(self.estimator.predict(self.rows.test))


@dataclass(frozen=True)
class Measure:
    """A number with its name, the unit it is shown in, and what it is in words."""

    key: str
    value: float
    unit: Literal["number", "share", "count", "seconds"]
    meaning: str


# --- what is measured: each by what the estimator can do ---------------------------------------------------


def _explained(fit: Fitted) -> list[Measure]:
    mean = fit.rows.train.mean(0)
    missed = (fit.rows.test - fit.rebuilt).square().sum() / (fit.rows.test - mean).square().sum()
    meaning = "share of the variance of unseen rows that comes back from their codes"
    return [Measure("explained variance", 1 - float(missed), "share", meaning)]


def _sparsity(fit: Fitted) -> list[Measure]:
    taken = float((fit.codes != 0).float().sum(1).mean())
    return [
        Measure("atoms in a code", taken, "number", f"of {fit.codes.shape[1]}, mean over unseen rows"),
        Measure("non-zero", taken / fit.codes.shape[1], "share", "share of a code that is not exactly zero"),
    ]


def _kurtosis(fit: Fitted) -> list[Measure]:
    meaning = "fourth moment of unseen codes over their squared variance, mean over atoms: 3 for a Gaussian"
    pixels = float(_spikiness(fit.rows.test).mean())
    return [
        Measure("spikiness of the codes", float(_spikiness(fit.codes).mean()), "number", meaning),
        Measure("spikiness of the pixels", pixels, "number", "the same, of the patches themselves"),
    ]


def _spikiness(values: Tensor) -> Tensor:
    centred = values - values.mean(0)
    return centred.pow(4).mean(0) / centred.square().mean(0).square()


def _accuracy(fit: Fitted) -> list[Measure]:
    truth = fit.rows.test_labels
    assert truth is not None
    right, count = int((fit.guesses == truth).sum()), len(truth)
    low, high = wilson_interval(right, count)
    chance = int(truth.bincount().max()) / count
    meaning = (
        f"share of {count} unseen images; 95 % interval {low:.1%} to {high:.1%}, "
        f"the largest class {chance:.1%}"
    )
    return [Measure("accuracy", right / count, "share", meaning)]


def _clusters(fit: Fitted) -> list[Measure]:
    from sklearn.metrics import adjusted_rand_score

    found = torch.as_tensor(fit.estimator.labels_)
    score = float(adjusted_rand_score(fit.rows.labels, found))
    meaning = "agreement of clusters and classes: 1 is the same partition, 0 what chance gives"
    return [
        Measure("adjusted Rand index", score, "number", meaning),
        Measure(
            "clusters", len(found.unique()), "count", f"for {len(fit.names)} classes, which it was not told"
        ),
    ]


def _noise(fit: Fitted) -> list[Measure]:
    deviation = float(fit.estimator.noise_variance_) ** 0.5
    meaning = "standard deviation of what the components leave out, in each direction"
    return [
        Measure(
            "components", len(fit.estimator.components_), "count", f"of {fit.rows.train.shape[1]} directions"
        ),
        Measure("noise", deviation, "number", meaning),
    ]


def _subspaces(fit: Fitted) -> list[Measure]:
    ranks = fit.estimator.ranks_.double()
    meaning = f"of a class's subspace in {fit.rows.train.shape[1]} dimensions, mean over classes"
    return [Measure("dimension", float(ranks.mean()), "number", meaning)]


def _rates(fit: Fitted) -> list[Measure]:
    layers = _layer_rates(fit)
    meaning = "nats by which classes fill more space together than apart, in front of the first layer"
    return [
        Measure("rate reduction before", layers[0][0] - layers[0][1], "number", meaning),
        Measure(
            "rate reduction after", layers[-1][0] - layers[-1][1], "number", "the same, behind the last layer"
        ),
    ]


@torch.no_grad()
def _layer_rates(fit: Fitted) -> list[tuple[float, float]]:
    """R and R^c of the training rows' features in front of the first layer and after each."""
    net, labels = fit.estimator, fit.rows.labels
    assert labels is not None
    start = net.start(fit.rows.train)
    seen = [start]
    unroll(net.layers_, start[None], on_step=lambda record: seen.append(record.z_next[0]))
    return [(float(coding_rate(z, net.eps)), float(class_coding_rate(z, labels, net.eps))) for z in seen]


def _code_error(fit: Fitted) -> list[Measure]:
    learnt, known = _errors_by_layer(fit)
    layers = len(learnt)
    within = next((i + 1 for i, error in enumerate(known) if error <= learnt[-1]), None)
    meaning = (
        f"ISTA takes {within} iterations for it"
        if within is not None
        else f"ISTA does not reach it in {len(known)} iterations"
    )
    return [
        Measure(
            "error of the codes",
            learnt[-1],
            "share",
            f"mean square, of unseen codes' own, after {layers} layers",
        ),
        Measure("the same by ISTA", known[layers - 1], "share", f"after as many iterations; {meaning}"),
    ]


@torch.no_grad()
def _errors_by_layer(fit: Fitted) -> tuple[list[float], list[float]]:
    """Relative squared error of the codes after each layer, and after each iteration of ISTA."""
    from pellucid.analytic.sparse_coding import sparse_code

    network, rows = fit.estimator, fit.rows.test
    dictionary = network.dictionary_
    exact = sparse_code(rows, dictionary, network.sparsity).codes
    ista = SoftISTA(*dictionary.shape, sparsity=network.sparsity)
    ista.dictionary.copy_(dictionary)
    ista.step_size = 0.5 * float(ista.max_step_size() or 1.0)

    def errors(layers: Any) -> list[float]:
        seen: list[float] = []
        start = torch.zeros_like(exact)[None]

        def see(record: Any) -> None:
            seen.append(float((record.z_next[0] - exact).square().sum() / exact.square().sum()))

        unroll(layers, start, rows[None], on_step=see)
        return seen

    return errors(network.layers_), errors([ista] * 20 * len(network.layers_))


def _denoising(fit: Fitted) -> list[Measure]:
    meaning = "squared error on unseen images, mean over noise levels; about 1 where nothing is learnt"
    return [Measure("denoising error", -fit.estimator.score(fit.rows.test), "number", meaning)]


def _memorised(fit: Fitted) -> list[Measure]:
    copied = analytic.memorised_share(fit.drawn, fit.rows.train)
    usual = analytic.memorised_share(fit.rows.test, fit.rows.train)
    meaning = (
        "share of samples more than three times as near to one training image as to any other; "
        f"of unseen images {usual:.1%}"
    )
    return [Measure("memorised", copied, "share", meaning)]


# --- what is shown ------------------------------------------------------------------------------------------


def _sheet(
    heading: str, pictures: Tensor, columns: int, said: str, *, signed: bool, wide: bool = False
) -> Figure:
    png = sheet(pictures, columns, signed=signed, width=MAX_WIDTH if wide else 330)
    return {"kind": "sheet", "heading": heading, "png": png, "said": said, "wide": wide}


def _lines(
    heading: str, x_label: str, lines: Mapping[str, Any], said: str, *, first: int = 0, **axes: bool
) -> Figure:
    """Each line's values over whole numbers from ``first``."""
    drawn = []
    for label, values in lines.items():
        y = [float(value) for value in values]
        drawn.append({"label": label, "x": list(range(first, first + len(y))), "y": y})
    return {"kind": "lines", "heading": heading, "x_label": x_label, "lines": drawn, "said": said, **axes}


def _components(fit: Fitted) -> Figure:
    shown = fit.rows.pictures(fit.estimator.components_[:40])
    signs = "blue above zero, red below" if shown.shape[1] == 1 else "zero is middle gray"
    said = f"The first {len(shown)}, by falling variance: {signs}. They go from coarse to fine."
    return _sheet("Components", shown, 8, said, signed=True)


def _spectrum(fit: Fitted) -> Figure:
    held = fit.estimator.explained_variance_ratio_.cumsum(0)
    nine = int((held < 0.9).sum()) + 1
    said = (
        f"Share of the training rows' variance that so many components hold. 90 % take {nine}."
        if nine <= len(held)
        else f"Share of the training rows' variance that so many components hold; all: {float(held[-1]):.0%}."
    )
    return _lines("Variance held", "components", {"held": held}, said, first=1, share=True, zero=True)


def _before_and_after(fit: Fitted) -> Figure:
    count = min(8, len(fit.rows.test))
    chosen = torch.arange(count) * len(fit.rows.test) // count
    both = torch.cat([fit.rows.test[chosen], fit.rebuilt[chosen]])
    kind = fit.rows.kind
    said = f"Above: {kind} that it was not fitted on. Below: what comes back from their codes."
    return _sheet("Out and back", fit.rows.pictures(both), count, said, signed=kind == "patches")


def _atoms(fit: Fitted) -> Figure:
    """The dictionary; what carries most of the unseen rows comes first."""
    atoms = fit.estimator.dictionary_.mT
    weight = fit.codes.abs().mean(0) * atoms.norm(dim=1)
    shown = fit.rows.pictures(atoms[weight.argsort(descending=True)][:256])
    said = f"{len(shown)} of {len(atoms)}, those that carry most first; each scaled to its own largest value."
    return _sheet("Atoms", shown, 16, said, signed=True, wide=True)


def _spikes(fit: Fitted) -> Figure:
    lines = {
        "codes": _spikiness(fit.codes).sort(descending=True).values,
        "pixels": _spikiness(fit.rows.test).sort(descending=True).values,
    }
    said = "Fourth moment over squared variance of each atom's codes and of each pixel, the largest first."
    return _lines("Spikiness", "atom or pixel", lines, said, first=1)


def _descent(fit: Fitted) -> Figure:
    said = "The LASSO of a training patch after each turn. No turn can raise it."
    return _lines("Objective", "turns", {"LASSO": fit.estimator.objective_}, said, first=1)


def _usage(fit: Fitted) -> Figure:
    used = (fit.codes != 0).float().mean(0).sort(descending=True).values
    never = int((used == 0).sum())
    said = "Share of the unseen rows whose code an atom takes part in, the most used first."
    said += f" {never} of {len(used)} are never used." if never else ""
    return _lines("Use of the atoms", "atom", {"used": used}, said, first=1, share=True, zero=True)


def _confusion(fit: Fitted) -> Figure:
    counts = torch.zeros(len(fit.names), len(fit.names), dtype=torch.long)
    assert fit.rows.test_labels is not None
    counts.index_put_((fit.rows.test_labels, fit.guesses.long()), torch.tensor(1), accumulate=True)
    wrong = int(counts.sum() - counts.trace())
    return {
        "kind": "map",
        "heading": "True class against prediction",
        "names": fit.names,
        "counts": counts.tolist(),
        "x_label": "predicted",
        "y_label": "true",
        "said": f"{wrong} of {len(fit.guesses)} images off the diagonal; shaded by share of the class.",
    }


def _layer_errors(fit: Fitted) -> Figure:
    learnt, known = _errors_by_layer(fit)
    said = "Squared error of unseen codes, as a share of the codes' own, on a logarithmic axis."
    lines = {"layers, learnt": learnt, "ISTA": known[: 5 * len(learnt)]}
    return _lines("Error of the codes", "layer or iteration", lines, said, first=1, log=True)


def _loss(fit: Fitted) -> Figure:
    values = torch.as_tensor(getattr(fit.estimator, "loss_", None) or fit.estimator.losses_).double()
    length = max(1, len(values) // 50)
    means = [float(part.mean()) for part in values.split(length)]
    said = f"Mean of every {length} steps." if length > 1 else "After every pass over the rows."
    x = [(i + 1) * length for i in range(len(means))]
    figure = _lines("Training loss", "steps" if length > 1 else "epochs", {"loss": means}, said, log=True)
    figure["lines"][0]["x"] = x
    return figure


def _samples(fit: Fitted) -> Figure:
    said = "New images, drawn from noise."
    return _sheet("Samples", fit.rows.pictures(fit.drawn[:64]), 16, said, signed=False, wide=True)


def _denoised(fit: Fitted) -> Figure:
    """Four unseen images in rising noise, and what the network makes of them."""
    model, generator = fit.estimator, torch.Generator().manual_seed(0)
    clean = fit.rows.test[:: max(1, len(fit.rows.test) // 4)][:4]
    shown = [clean]
    for share in (0.3, 0.5, 0.7):
        t = float(model.schedule_.at(share))
        level = torch.tensor(t)
        alpha, sigma = float(model.schedule_.alpha(level)), float(model.schedule_.sigma(level))
        noisy = alpha * clean + sigma * torch.randn(clean.shape, generator=generator)
        shown += [noisy / max(alpha, 1e-6), model.denoise(noisy, t)]
    columns = torch.stack(shown, 1).flatten(0, 1)
    said = (
        "Each row: an unseen image, then three times the same in more noise and the guess of the clean one."
    )
    return _sheet("Denoising", fit.rows.pictures(columns), len(shown), said, signed=False)


def _directions(fit: Fitted) -> Figure:
    bases = fit.estimator.components_[:20, :8]
    said = "A row for each class: the directions that hold most of its images, the first of all on the left."
    return _sheet(
        "Directions of each class", fit.rows.pictures(bases.flatten(0, 1)), bases.shape[1], said, signed=True
    )


def _rate_curves(fit: Fitted) -> Figure:
    rates = _layer_rates(fit)
    lines = {"all together": [r for r, _ in rates], "class by class": [c for _, c in rates]}
    said = (
        "What it costs to code the training rows, in nats. Layers raise the first and lower the second: "
        "every layer is a step on their difference."
    )
    return _lines("Coding rates through the layers", "layer", lines, said, whole=True)


def _code_length(fit: Fitted) -> Figure:
    length = fit.estimator.coding_lengths_
    said = (
        f"Nats to store all rows after so many merges. It ends where no merge saves: "
        f"{fit.estimator.n_clusters_} clusters."
    )
    return _lines("Code length", "merges", {"nats": length}, said)


def _cluster_means(fit: Fitted) -> Figure:
    largest = fit.estimator.sizes_.argsort(descending=True)[:24]
    labels = torch.as_tensor(fit.estimator.labels_)
    means = torch.stack([fit.rows.train[labels == k].mean(0) for k in largest])
    said = "Mean image of each cluster, the largest first."
    return _sheet("Clusters", fit.rows.pictures(means), 6, said, signed=False)


# --- the methods --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """An estimator, the rows it is for, and what of it is measured and shown.

    Attributes:
        estimator: its public name in :mod:`pellucid.analytic`.
        does: a sentence for the page.
        lead: what to look for in the pictures.
        measures, figures: made in this order.
        kind: what a row is.
        side: larger pictures are made so small.
        limit: at most so many pictures are fitted on.
        dims: rows are so many principal coordinates in place of pixels.
        options: from the rows, those of the constructor's whose defaults are not for pictures.
    """

    estimator: str
    does: str
    lead: str
    measures: tuple[Callable[[Fitted], list[Measure]], ...]
    figures: tuple[Callable[[Fitted], Figure], ...]
    kind: Literal["images", "patches"] = "images"
    side: int = 32
    limit: int = 10_000
    dims: int | None = None
    options: Callable[[Rows], dict[str, Any]] = lambda rows: {}

    @property
    def cls(self) -> Any:
        return getattr(analytic, self.estimator)

    @property
    def supervised(self) -> bool:
        """Whether it is fitted with labels."""
        from sklearn.base import is_classifier

        return is_classifier(self.cls())


def _waves(rows: Rows) -> dict[str, Any]:
    """Products of cosine waves along both sides of a patch, twice as many each way as there are pixels."""

    def along(size: int) -> Tensor:
        time, count = torch.arange(size)[:, None] + 0.5, torch.arange(2 * size)
        wave = torch.cos(torch.pi / (2 * size) * time * count)
        return wave - wave.mean(0) * (count > 0)

    channels, height, width = rows.size
    atoms = torch.kron(along(height), along(width))
    atoms = torch.nn.functional.normalize(atoms, dim=0)
    return {"dictionary": torch.block_diag(*[atoms] * channels)}


def _noise_length(rows: Rows) -> float:
    """Length of what the coordinates leave out, were there as much of it along them."""
    left = 0.0 if rows.coordinates is None else float(rows.coordinates.noise_variance_)
    variance = left or 0.1 * float(rows.train.var(0).mean())
    return (variance * rows.train.shape[1]) ** 0.5


METHODS: dict[str, Method] = {
    "pca": Method(
        "PCA",
        "Principal components: the few directions that images vary in most.",
        "Look at what the first components share out among them, and at what comes back without the rest.",
        (_explained, _noise),
        (_components, _spectrum, _before_and_after),
        options=lambda rows: {"n_components": min(20, *rows.train.shape)},
    ),
    "sparse-coding": Method(
        "SparseCoder",
        "Sparse coding: every patch as a sum of few cosine waves, as the LASSO asks.",
        "Look how few waves a patch takes, and what is lost by taking no more.",
        (_explained, _sparsity),
        (_before_and_after, _atoms, _usage),
        kind="patches",
        options=lambda rows: {**_waves(rows), "sparsity": 0.5},
    ),
    "complete-dictionary": Method(
        "CompleteDictionary",
        "A complete dictionary: as many atoms as pixels, the rotation in which patches are spikiest.",
        "Look for edges: nobody drew them, they are what makes codes of pictures spiky.",
        (_kurtosis,),
        (_atoms, _spikes),
        kind="patches",
    ),
    "dictionary": Method(
        "OvercompleteDictionary",
        "An overcomplete dictionary: twice as many atoms as pixels, so that every patch needs few of them.",
        "Look for strokes and edges among the atoms, and how few of them a patch takes.",
        (_explained, _sparsity),
        (_atoms, _before_and_after, _descent, _usage),
        kind="patches",
        options=lambda rows: {"sparsity": 0.5},
    ),
    "lista": Method(
        "LISTA",
        "LISTA: a few layers with weights of their own, trained to give the codes that ISTA ends at.",
        "Look how many iterations ISTA takes for what the layers reach.",
        (_code_error, _explained),
        (_layer_errors, _loss, _before_and_after),
        kind="patches",
        options=lambda rows: {**_waves(rows), "sparsity": 0.5, "epochs": 20},
    ),
    "diffusion": Method(
        "Diffusion",
        "Diffusion: a network learns to denoise at every level; samples are noise, denoised by steps.",
        "Look whether the samples are images of the kind, and new ones.",
        (_denoising, _memorised),
        (_samples, _denoised, _loss),
        side=16,
        options=lambda rows: {"width": 256, "train_steps": 2000},
    ),
    "lossy-clustering": Method(
        "LossyCodingClustering",
        "Lossy coding: images are merged into groups for as long as that makes them cheaper to store.",
        "Look whether a cluster's mean is an image of one kind.",
        (_clusters,),
        (_cluster_means, _code_length),
        limit=1500,
        dims=10,
        options=lambda rows: {"eps": _noise_length(rows)},
    ),
    "nearest-subspace": Method(
        "NearestSubspace",
        "Nearest subspace: one for each class, and an image belongs to the one that it sticks out of least.",
        "Look at what the classes are made of, and which are taken for which.",
        (_accuracy, _subspaces),
        (_directions, _confusion),
    ),
    "redunet": Method(
        "ReduNet",
        "ReduNet: a network built forward from the data, each layer a step that expands the whole and "
        "compresses each class.",
        "Look at the gap between the two curves: it is the objective, and no layer was trained.",
        (_accuracy, _rates),
        (_rate_curves, _confusion),
        side=16,
        limit=4000,
    ),
}
"""What ``pellucid fit`` knows, by its name on the command line."""


# --- the run ------------------------------------------------------------------------------------------------


def fit(
    method: str,
    data: str | Path | ImageData,
    *,
    out: str | Path,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    side: int | None = None,
    patch_size: int | None = None,
    limit: int | None = None,
    dims: int | None = None,
    overwrite: bool = False,
    command: str = "",
    say: Say = lambda line: None,
    **source: Any,
) -> dict[str, Any]:
    """Fit one of :data:`METHODS`, and leave a folder with the estimator, its measures and its page.

    ``out`` holds ``estimator.json`` and ``estimator.safetensors``
    (:func:`pellucid.analytic.saved.load_estimator` reads them), ``result.json`` and ``report.html``; where
    rows are principal coordinates, the PCA that made them lies in ``coordinates``.

    Args:
        method: a name in :data:`METHODS`.
        data: see :func:`pellucid.load_data`.
        out: a new folder, or with ``overwrite`` an earlier fit's.
        options: of the estimator's constructor.
        seed: of patches and of the estimator's ``random_state``.
        side: pictures larger than so many pixels are made so small; the method's own unless given.
        patch_size: side of a patch; 8 unless given, or half a small picture.
        limit: fit on at most so many pictures; the method's own unless given.
        dims: so many principal coordinates in place of pixels; the method's own unless given.
        command: the line that asked for it, for the page.
        say: gets one line of news at a time.
        source: of :func:`pellucid.load_data`.

    Returns:
        What stands in ``result.json``.

    Raises:
        ConfigError: an unknown method or option, with the nearest known, or a value that cannot be.
        DataError: data that the method cannot use.
        ConfigError: ``out`` holds something already.
        ResourceError: the disk is full.
    """
    out = Path(out)
    chosen = _method(method)
    given = dict(options or {})
    _check_options(method, chosen, given)
    _refuse_folder(out, overwrite)
    images = load_data(data, **source)
    rows = make_rows(
        images,
        chosen.kind,
        side=chosen.side if side is None else side,
        limit=chosen.limit if limit is None else limit,
        dims=chosen.dims if dims is None else dims,
        patch_size=patch_size,
        seed=seed,
    )
    resolved = {**chosen.options(rows), **given}
    if "random_state" in inspect.signature(chosen.cls).parameters:
        resolved.setdefault("random_state", seed)
    say(f"fitting {method} to {len(rows.train)} {rows.kind} of {' x '.join(map(str, rows.size[1:]))} pixels")
    fitted = _fitted(method, chosen, resolved, rows, images.class_names, say)
    measured = [measure for make in chosen.measures for measure in make(fitted)]
    figures = [make(fitted) for make in chosen.figures]
    result = {
        "method": method,
        "estimator": chosen.estimator,
        "data": images.name,
        "rows": {
            "kind": rows.kind,
            "size": list(rows.size[1:]),
            "channels": rows.size[0],
            "train": len(rows.train),
            "test": len(rows.test),
            "dims": rows.train.shape[1],
            "width": math.prod(rows.size),
        },
        "options": {
            k: v for k, v in fitted.estimator.get_params(deep=False).items() if not isinstance(v, Tensor)
        },
        "seed": seed,
        "measures": {measure.key: measure.value for measure in measured},
        "seconds": fitted.seconds,
        "version": __version__,
    }
    page = render_fit(_bundle(fitted, result, measured, figures, images, title=out.name, command=command))
    coordinates = {} if rows.coordinates is None else save_estimator(rows.coordinates)
    files = {
        **save_estimator(fitted.estimator),
        **{f"{COORDINATES}/{name}": content for name, content in coordinates.items()},
        "result.json": (json.dumps(result, indent=1) + "\n").encode(),
        "report.html": page.encode("utf-8", "backslashreplace"),
    }
    _write_folder(out, files)
    return result


def make_rows(
    images: ImageData,
    kind: Literal["images", "patches"],
    *,
    side: int = 32,
    limit: int = 10_000,
    dims: int | None = None,
    patch_size: int | None = None,
    seed: int = 0,
) -> Rows:
    """A data set as rows: whole pictures, or patches cut from them at random.

    Args:
        images: from :func:`pellucid.load_data`.
        kind: of rows.
        side: pictures larger than so many pixels are made so small.
        limit: at most so many pictures to fit on, evenly spaced.
        dims: so many principal coordinates of the training rows, in place of pixels.
        patch_size: side of a patch; 8 unless given, or half a small picture.
        seed: of the places that patches are cut from.

    Raises:
        ConfigError: sizes that cannot be.
        DataError: patches from pictures of one colour.
    """
    if side < 1 or limit < 2:
        raise ConfigError(f"side is {side} and limit {limit}; give at least 1 pixel and 2 pictures")
    height, width = images.img_size or (side, side)
    shrink = min(1.0, side / max(height, width))
    size = max(1, round(height * shrink)), max(1, round(width * shrink))
    channels = images.in_chans
    view = View(img_size=size, in_chans=channels, mean=(0.0,) * channels, std=(1.0,) * channels)
    train, labels = _pictures(images.train, view, limit)
    test, test_labels = _pictures(images.test, view, limit)
    if kind == "images":
        rows = Rows(kind, train.flatten(1), test.flatten(1), labels, test_labels, (channels, *size))
    else:
        patch = patch_size if patch_size is not None else min(8, max(1, min(size) // 2))
        if not 1 < patch <= min(size):
            raise ConfigError(
                f"patch size is {patch}; pictures of {size[0]} x {size[1]} take 2 to {min(size)}"
            )
        generator = torch.Generator().manual_seed(seed)
        pieces = [
            _patches(part, patch, count, generator, images.name)
            for part, count in ((train, PATCHES), (test, PATCHES // 4))
        ]
        scale = pieces[0].std()
        rows = Rows(kind, pieces[0] / scale, pieces[1] / scale, None, None, (channels, patch, patch))
    return rows if dims is None else _on_components(rows, dims)


def _on_components(rows: Rows, dims: int) -> Rows:
    most = min(rows.train.shape)
    if not 1 <= dims <= most:
        raise ConfigError(
            f"dims is {dims}; {len(rows.train)} rows of width {rows.train.shape[1]} have 1 to {most}"
        )
    pca = analytic.PCA(dims).fit(rows.train)
    return replace(rows, train=pca.transform(rows.train), test=pca.transform(rows.test), coordinates=pca)


def _pictures(images: ImageSet, view: View, limit: int) -> tuple[Tensor, Tensor]:
    batches = list(eval_loader(images, view, limit=limit))
    return torch.cat([batch[0] for batch in batches]), torch.cat([batch[1] for batch in batches])


def _patches(pictures: Tensor, side: int, count: int, generator: torch.Generator, name: str) -> Tensor:
    """``count`` squares from random places less their means, without flat ones; fewer where most are."""
    _, _, height, width = pictures.shape
    wanted = 3 * count

    def draw(below: int) -> Tensor:
        return torch.randint(below, (wanted,), generator=generator)

    which, top, left = draw(len(pictures)), draw(height - side + 1), draw(width - side + 1)
    along = torch.arange(side)
    cut = pictures[
        which[:, None, None], :, (top[:, None] + along)[:, :, None], (left[:, None] + along)[:, None, :]
    ]
    rows = cut.permute(0, 3, 1, 2).flatten(1)
    rows = rows - rows.mean(1, keepdim=True)
    contrast = rows.norm(dim=1)
    kept = rows[contrast > FLAT * contrast.mean()][:count]
    if len(kept) < 2:
        raise DataError(f"{name}: every patch of {side} x {side} pixels is of one colour - give --patch-size")
    return kept


def _method(name: str) -> Method:
    if name not in METHODS:
        raise ConfigError(f"unknown method '{name}'{suggest(name, METHODS)}")
    return METHODS[name]


def _check_options(name: str, method: Method, given: Mapping[str, Any]) -> None:
    known = list(inspect.signature(method.cls).parameters)
    for key in given:
        if key not in known:
            raise ConfigError(f"{name} has no option '{key}'{suggest(key, known)}")


def _fitted(
    name: str, method: Method, options: Mapping[str, Any], rows: Rows, names: list[str], say: Say
) -> Fitted:
    estimator = method.cls(**options)
    began = time.perf_counter()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            estimator.fit(rows.train, rows.labels) if method.supervised else estimator.fit(rows.train)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{name}: {error}") from error
    for line in dict.fromkeys(str(warning.message) for warning in caught):
        say(f"warning: {line}")
    return Fitted(method, estimator, rows, names, time.perf_counter() - began)


def _bundle(
    fitted: Fitted,
    result: Mapping[str, Any],
    measured: Sequence[Measure],
    figures: Sequence[Figure],
    images: ImageData,
    *,
    title: str,
    command: str,
) -> dict[str, Any]:
    """What the page draws; see ``docs/bundle.md``."""
    first = measured[0]
    shown = f"{first.value:.1%}".replace("%", "\u00a0%") if first.unit == "share" else f"{first.value:.3g}"
    seconds = Measure("fitted in", fitted.seconds, "seconds", "on this machine, once")
    return {
        "title": title,
        "created": datetime.date.today().isoformat(),
        "version": __version__,
        "command": command,
        "fit": {
            "method": result["method"],
            "answer": f"{result['method']} on {Path(images.name).name}: {first.key} {shown}.",
            "does": fitted.method.does,
            "lead": fitted.method.lead,
            "rows": result["rows"],
            "measures": [
                {"name": m.key, "value": m.value, "unit": m.unit, "meaning": m.meaning}
                for m in (*measured, seconds)
            ],
            "figures": list(figures),
        },
        "data": {
            "name": images.name,
            "train": len(images.train),
            "test": len(images.test),
            "classes": images.class_names,
            "in_chans": images.in_chans,
            "img_size": list(images.img_size or ()),
            "rejects": [reject._asdict() for reject in images.rejects],
        },
        "config": {"method": result["method"], **result["options"], "seed": result["seed"]},
    }


def _refuse_folder(out: Path, overwrite: bool) -> None:
    """Where something stands that is not to be replaced, told before the work is done."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / DESCRIPTION).is_file():
        raise ConfigError(f"{out} exists and is not a fit's folder - take another --out; it is left as it is")
    if not overwrite:
        raise ConfigError(f"{out} holds a fit already - give --overwrite to replace it, or another --out")


def _write_folder(out: Path, files: Mapping[str, bytes]) -> None:
    try:
        with new_folder(out) as scratch:
            for name, content in files.items():
                (scratch / name).parent.mkdir(exist_ok=True)
                write_flushed(scratch / name, content)
    except OSError as error:
        needed = sum(map(len, files.values())) / 1e6
        raise unwritten(
            f"cannot write {out}: {error.strerror or error}, it needs {needed:.1f} MB - make room or take "
            f"another --out",
            error,
        ) from error


__all__ = ["METHODS", "Method", "Rows", "fit", "make_rows"]
