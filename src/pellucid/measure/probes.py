"""How much of what matters is in the features: simple classifiers on top of them, the model left as it is.

The nearest neighbours train nothing. The linear probe trains one linear map, on cached features, and chooses
its one option without a look at the test images.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning

from pellucid.analytic import NearestNeighbours
from pellucid.analytic.nearest_neighbours import weighted_votes
from pellucid.errors import ConfigError, DataError
from pellucid.measure.features import Features
from pellucid.measure.scores import Scores, scores_of

NEIGHBOURS = 20
"""As published for DINO and SimDINO, and what is reported unless another number is asked for."""

TEMPERATURE = 0.07

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
"""Values of scikit-learn's C that the linear probe chooses from; small ones keep the weights small."""

HELD_OUT = 0.2
"""Share of each class of the training images on which the linear probe chooses."""

ITERATIONS = 1000


@dataclass(frozen=True)
class Probe:
    """What a probe found.

    Attributes:
        kind: ``"knn"`` or ``"linear"``.
        scores: on the test images.
        settings: of the classifier, those that were chosen included.
        train_images: how many it learnt from.
        width: of a feature.
        tried: settings with their accuracy: of the k-NN on the test images, of the linear probe on those
            training images that were held out to choose.
        largest: name of the largest training class, and the accuracy of whoever always says so.
        notes: what the reader should know besides.
    """

    kind: str
    scores: Scores
    settings: dict[str, Any]
    train_images: int
    width: int
    tried: list[dict[str, float]]
    largest: tuple[str, float]
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """Accuracy with its interval, how it came about, and what knowing nothing gives."""
        scores, (low, high) = self.scores, self.scores.interval
        how = ", ".join(f"{name} {value:g}" for name, value in self.settings.items())
        name, chance = self.largest
        lines = [
            f"{self.kind} accuracy {scores.accuracy:.2%} ({scores.confidence:.0%} interval {low:.2%} to "
            f"{high:.2%}, {scores.count} images)",
            f"by {how}, from {self.train_images} training images, {self.width} numbers each; always "
            f"'{name}': {chance:.2%}",
        ]
        if len(self.tried) > 1:
            where = "held out of training" if self.kind == "linear" else "on the test images"
            key = next(iter(self.settings))
            tried = ", ".join(f"{key} {row[key]:g}: {row['accuracy']:.2%}" for row in self.tried)
            lines.append(f"{where}: {tried}")
        return lines + self.notes


def knn_probe(
    train: Features,
    test: Features,
    class_names: Sequence[str],
    *,
    k: Sequence[int] = (NEIGHBOURS,),
    temperature: float = TEMPERATURE,
    confidence: float = 0.95,
) -> Probe:
    """Accuracy of the weighted nearest neighbours of :class:`~pellucid.analytic.NearestNeighbours`.

    Args:
        train: features and labels that vote.
        test: those that are voted on.
        class_names: of the labels.
        k: numbers of neighbours; the first is the one reported, the others stand beside it.
        temperature: of the weights.
        confidence: of the interval.

    Raises:
        ConfigError: no k, or one that is not between 1 and the number of training images.
        DataError: features without labels.
    """
    train, test, notes = _labelled(train, test)
    for number in k or [0]:
        if not 1 <= number <= len(train):
            raise ConfigError(f"k is {number}; expected 1 to {len(train)}, the number of training images")
    if not temperature > 0:
        raise ConfigError(f"temperature is {temperature}; it must be larger than 0")
    neighbours = NearestNeighbours(max(k), temperature).fit(train.values, train.labels)
    cosines, index = neighbours.kneighbors(test.values)
    classes = torch.from_numpy(neighbours.classes_)

    def guessed(number: int) -> np.ndarray:
        nearest, voters = cosines[:, :number], neighbours.codes_[index[:, :number]]
        return classes[weighted_votes(nearest, voters, len(classes), temperature).argmax(-1)].numpy()

    labels = test.labels.numpy()
    tried = [{"k": number, "accuracy": float((guessed(number) == labels).mean())} for number in k]
    return Probe(
        kind="knn",
        scores=scores_of(labels, guessed(k[0]), class_names, confidence=confidence),
        settings={"k": k[0], "temperature": temperature},
        train_images=len(train),
        width=train.values.shape[1],
        tried=tried,
        largest=_largest_class(train, test, class_names),
        notes=notes,
    )


def linear_probe(
    train: Features,
    test: Features,
    class_names: Sequence[str],
    *,
    strengths: Sequence[float] = STRENGTHS,
    seed: int = 0,
    confidence: float = 0.95,
) -> Probe:
    """Accuracy of multinomial logistic regression (scikit-learn's, L-BFGS, L2) on standardised features.

    Each of ``strengths``, values of C, is tried on a fifth of the training images, held out of every class.
    With the best, the smallest of several, it is fitted to all. Test images have no part in the choice.

    Args:
        train: features and labels that are learnt from.
        test: those that are classified.
        class_names: of the labels.
        strengths: values of C.
        seed: of which training images are held out.
        confidence: of the interval.

    Raises:
        ConfigError: no strength, or one that is not positive.
        DataError: features without labels, of one class only, or too few to hold some out.
    """
    if not strengths or min(strengths) <= 0:
        raise ConfigError(f"C is {list(strengths)}; expected one or more numbers larger than 0")
    train, test, notes = _labelled(train, test)
    rows, labels = train.values.double(), train.labels.numpy()
    mean, spread = rows.mean(0), rows.std(0, correction=0)
    spread[spread <= 1e-7 * rows.abs().amax(0)] = 1.0  # a constant says nothing and stays so
    x, x_test = ((part.double() - mean).div(spread).numpy() for part in (rows, test.values))
    strengths = sorted(strengths)
    tried: list[dict[str, float]] = []
    if len(strengths) > 1:
        held = _held_out(labels, seed)
        for c, classifier in zip(strengths, _regressions(x[~held], labels[~held], strengths), strict=True):
            tried.append({"C": c, "accuracy": float((classifier.predict(x[held]) == labels[held]).mean())})
    best = max(tried, key=lambda row: row["accuracy"])["C"] if tried else strengths[0]
    [classifier] = _regressions(x, labels, [best])
    if len(tried) > 1 and best in (strengths[0], strengths[-1]):
        notes.append(f"C {best:g} is at the end of those tried - another beyond it may do better")
    if classifier.n_iter_.max() >= ITERATIONS:
        notes.append(f"stopped after {ITERATIONS} iterations, before it had converged")
    return Probe(
        kind="linear",
        scores=scores_of(test.labels.numpy(), classifier.predict(x_test), class_names, confidence=confidence),
        settings={"C": best},
        train_images=len(train),
        width=train.values.shape[1],
        tried=tried,
        largest=_largest_class(train, test, class_names),
        notes=notes,
    )


def _regressions(x: np.ndarray, labels: np.ndarray, strengths: Sequence[float]) -> Any:
    """One fitted regression for each C, rising; each begins where the one before it ended."""
    from sklearn.linear_model import LogisticRegression

    if len(np.unique(labels)) < 2:
        raise DataError("the training images are of one class - a linear probe needs two or more")
    classifier = LogisticRegression(max_iter=ITERATIONS, warm_start=True)
    for c in strengths:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # told in words where it matters
            yield classifier.set_params(C=c).fit(x, labels)


def _held_out(labels: np.ndarray, seed: int) -> np.ndarray:
    """Which training images to choose on: of every class a share, rounded."""
    random = np.random.default_rng(seed)
    held = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        held[members[: round(HELD_OUT * len(members))]] = True
    if not held.any():
        raise DataError("no class has three training images - take more images, or the knn probe")
    return held


def _labelled(train: Features, test: Features) -> tuple[Features, Features, list[str]]:
    """Both without those whose class is not known, and a note where there were any.

    Raises:
        DataError: nothing is left of one of them.
    """
    parts, notes = [], []
    for name, part in (("training", train), ("test", test)):
        known = part.labels >= 0
        if not bool(known.any()):
            raise DataError(
                f"no {name} image has a label, and a probe is about labels - give data with one sub-folder "
                f"for each class"
            )
        if not bool(known.all()):
            notes.append(f"{int((~known).sum())} {name} images without a label were left out")
            part = Features(part.values[known], part.labels[known], part.index[known])
        parts.append(part)
        if parts[-1].values.dim() != 2:
            raise ConfigError("a probe reads one feature of each image - take pooled, cls or avg")
    return parts[0], parts[1], notes


def _largest_class(train: Features, test: Features, class_names: Sequence[str]) -> tuple[str, float]:
    largest = int(train.labels.bincount().argmax())
    return class_names[largest], float((test.labels == largest).double().mean())
