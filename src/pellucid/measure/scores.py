"""How well a classifier classifies, with the uncertainty that the number of images leaves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pellucid.errors import DataError
from pellucid.measure.watch import Text, arguments, inputs_of
from pellucid.models.modes import in_eval_mode


@dataclass(frozen=True)
class Scores:
    """Accuracy with its interval, class by class, and what was taken for what.

    Attributes:
        accuracy: share of images classified rightly.
        interval: Wilson's interval for it.
        confidence: of the interval.
        count: images.
        classes: for each class ``name``, ``count``, ``precision``, ``recall``, ``f1``; None where undefined.
        confusion: counts, rows are true classes and columns predicted ones.
    """

    accuracy: float
    interval: tuple[float, float]
    confidence: float
    count: int
    classes: list[dict[str, Any]]
    confusion: list[list[int]]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> str:
        """Class by class as text for a terminal."""
        width = max([5, *(len(row["name"]) for row in self.classes)])
        lines = [f"{'class':<{width}}  images  precision  recall      f1"]
        for row in self.classes:
            cells = ["      -" if row[k] is None else f"{row[k]:7.1%}" for k in ("precision", "recall", "f1")]
            lines.append(f"{row['name']:<{width}}  {row['count']:>6}    {cells[0]} {cells[1]} {cells[2]}")
        return "\n".join(lines)


def evaluate(
    model: nn.Module,
    batches: Iterable[Any],
    class_names: Sequence[str] | None = None,
    *,
    confidence: float = 0.95,
    progress: Callable[[int], None] | None = None,
) -> Scores:
    """Score a classifier on labelled batches ``(images, labels, ...)``, or of text in place of images.

    Raises:
        DataError: no images or texts, a label that the model has no class for, or names for other classes.
    """
    device = next(model.parameters()).device
    true: list[Tensor] = []
    guessed: list[Tensor] = []
    with in_eval_mode(model), torch.no_grad():
        for batch in batches:
            logits = model(*arguments(inputs_of(batch, device)))
            guessed.append(logits.argmax(-1).cpu())
            true.append(batch[1].cpu())
            if progress is not None:
                progress(len(batch[1]))
    if not any(map(len, true)):
        raise DataError("nothing to evaluate - give at least one batch")
    known = logits.shape[-1]
    names = list(class_names or map(str, range(known)))
    if len(names) != known:
        raise DataError(f"{len(names)} class names, the model has {known} classes - name each of them")
    return scores_of(torch.cat(true).numpy(), torch.cat(guessed).numpy(), names, confidence=confidence)


def scores_of(
    labels: np.ndarray, predictions: np.ndarray, names: Sequence[str], *, confidence: float = 0.95
) -> Scores:
    """Scores of what any classifier said: true and predicted classes as numbers, ``(n,)`` each.

    Raises:
        DataError: a label without a name.
    """
    for label in (labels.min(), labels.max()):
        if not 0 <= label < len(names):
            raise DataError(f"a label is {label}, the model has {len(names)} classes")
    confusion = np.zeros((len(names), len(names)), dtype=np.int64)
    np.add.at(confusion, (labels, predictions), 1)
    right = int(np.trace(confusion))
    return Scores(
        accuracy=right / len(labels),
        interval=wilson_interval(right, len(labels), confidence),
        confidence=confidence,
        count=len(labels),
        classes=[_class_row(confusion, i, name) for i, name in enumerate(names)],
        confusion=confusion.tolist(),
    )


@torch.no_grad()
def predict(model: nn.Module, inputs: Tensor | Text) -> Tensor:
    """Class probabilities ``(b, K)`` of images, or of a batch of text."""
    with in_eval_mode(model):
        given = arguments(inputs_of(inputs, next(model.parameters()).device))
        return model(*given).float().softmax(-1).cpu()


def wilson_interval(successes: int, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a share: honest for few images and near 0 and 1 (Wilson 1927)."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / count
    centre = share + z**2 / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    scale = 1 + z**2 / count
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def t_quantile(share: float, freedom: int) -> float:
    """Where a share of Student's t distribution lies below, by bisection.

    Args:
        share: 0.5..1, not 1 itself.
        freedom: degrees of freedom, 1 or more.
    """
    low, high = 0.0, 1.0
    while _t_within(high, freedom) < 2 * share - 1:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_within(middle, freedom) < 2 * share - 1 else (low, middle)
    return high


def _t_within(t: float, freedom: int) -> float:
    """P(|T| < t): the finite sums of Abramowitz and Stegun (1964), 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    term = total = math.cos(angle) if odd else 1.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= math.cos(angle) ** 2 * (k - 1) / k
        total += term
    if freedom == 1:
        return 2 / math.pi * angle
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total


def _class_row(confusion: np.ndarray, i: int, name: str) -> dict[str, Any]:
    right, true, guessed = (int(v) for v in (confusion[i, i], confusion[i].sum(), confusion[:, i].sum()))
    return {
        "name": name,
        "count": true,
        "precision": right / guessed if guessed else None,
        "recall": right / true if true else None,
        "f1": 2 * right / (true + guessed) if true + guessed else None,
    }
