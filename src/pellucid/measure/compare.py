"""Models beside each other: what each reaches over several seeds, what it costs, and whether they differ.

A seed moves a small model's accuracy by more than most ideas do. So models are trained from the same seeds,
differences are taken seed by seed, and a difference counts only when its interval leaves zero out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from statistics import mean, median, stdev
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pellucid.errors import ConfigError
from pellucid.measure.audit import SHARE
from pellucid.measure.bench import _interleaved, _ratios
from pellucid.measure.scores import t_quantile
from pellucid.models.modes import in_eval_mode

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Outcome:
    """One model trained from one seed.

    Attributes:
        seed: of everything random in its training.
        accuracy: share of the test images classified rightly.
        interval: of the accuracy, from the number of test images.
        count: test images.
        seconds: of training, evaluations and saving included.
        images_per_second: training images in that time.
        steps: one dict for each step with an objective: ``layer``, ``step``, ``descended`` (share of images).
        nonzero: mean share of non-zeros after the sparsify steps; None without such steps.
    """

    seed: int
    accuracy: float
    interval: tuple[float, float]
    count: int
    seconds: float
    images_per_second: float
    steps: list[dict[str, Any]] = field(default_factory=list)
    nonzero: float | None = None

    @property
    def descending(self) -> int:
        """Steps whose objective fell on at least 99 % of the images."""
        return sum(step["descended"] >= SHARE for step in self.steps)


@dataclass(frozen=True)
class Difference:
    """Accuracy less that of the first model, seed by seed.

    Attributes:
        mean: over the seeds, as a share.
        interval: 95 %, Student's t over the seeds; None for a single seed. It holds for these test images.
        better: True or False where the interval leaves zero out, None where they cannot be told apart.
        text: the same in words.
    """

    mean: float
    interval: tuple[float, float] | None
    better: bool | None
    text: str


@dataclass
class Contender:
    """One model of a comparison.

    Attributes:
        label: what it is called in print.
        name, model_args: what makes it.
        parameters: their number.
        flop: floating point operations of one image's forward pass; see :func:`forward_flop`.
        outcomes: one for each seed.
        images_per_second, speed: inference; ``speed`` is times the first model's, ``[median, least, most]``.
        difference: to the first model; None for that one.
    """

    label: str
    name: str
    model_args: dict[str, Any]
    parameters: int
    flop: int
    outcomes: list[Outcome]
    images_per_second: float | None = None
    speed: list[float] | None = None
    difference: Difference | None = None

    @property
    def accuracy(self) -> float:
        return mean(outcome.accuracy for outcome in self.outcomes)

    @property
    def deviation(self) -> float | None:
        """Standard deviation of the accuracy over the seeds."""
        return stdev(o.accuracy for o in self.outcomes) if len(self.outcomes) > 1 else None

    @property
    def descended(self) -> float | None:
        """Share of images on which a step lowered its objective, mean over steps and seeds."""
        shares = [step["descended"] for outcome in self.outcomes for step in outcome.steps]
        return mean(shares) if shares else None

    @property
    def nonzero(self) -> float | None:
        shares = [outcome.nonzero for outcome in self.outcomes if outcome.nonzero is not None]
        return mean(shares) if shares else None

    def to_dict(self) -> dict[str, Any]:
        """Fields and what follows from them."""
        outcomes = [{**asdict(outcome), "descending": outcome.descending} for outcome in self.outcomes]
        derived = ("accuracy", "deviation", "descended", "nonzero")
        return {**asdict(self), **{key: getattr(self, key) for key in derived}, "outcomes": outcomes}


@dataclass
class Comparison:
    """Several models trained by one recipe on the same images.

    Attributes:
        data: name of the images.
        match: ``"width"`` or ``"params"``.
        epochs: of every run.
        contenders: the first is what the others are held against.
        machine: what the times were taken on.
    """

    data: str
    match: str
    epochs: float
    contenders: list[Contender]
    machine: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        first = self.contenders[0]
        for other in self.contenders[1:]:
            other.difference = difference(other, first)

    @property
    def seeds(self) -> list[int]:
        return [outcome.seed for outcome in self.contenders[0].outcomes]

    def to_dict(self) -> dict[str, Any]:
        return {
            "data": self.data,
            "match": self.match,
            "epochs": self.epochs,
            "seeds": self.seeds,
            "models": [contender.to_dict() for contender in self.contenders],
            "machine": self.machine,
        }

    def table(self) -> str:
        """One line for each model, then every difference in words."""
        head = [
            "model", "accuracy", "parameters", "MFLOP/image", "training", "images/s",
            "inference images/s", "x first", "steps that descend", "fell on", "non-zero",
        ]  # fmt: skip
        rows = [head, *(_row(contender) for contender in self.contenders)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        said = [c.difference.text for c in self.contenders if c.difference is not None]
        return "\n".join([*lines, "", *said])


def difference(model: Contender, first: Contender) -> Difference:
    """How much better ``model`` is than ``first``, from the seeds that both were trained from.

    The interval is Student's t over the differences of pairs. They come in steps of one test image, and a few
    may agree by chance: a spread below one image is taken as one image.

    Raises:
        ConfigError: other seeds, or other numbers of test images.
    """
    pairs = list(zip(model.outcomes, first.outcomes, strict=False))
    same = len(model.outcomes) == len(first.outcomes) and all(
        (a.seed, a.count) == (b.seed, b.count) for a, b in pairs
    )
    if not pairs or not same:
        raise ConfigError(
            f"{model.label} and {first.label} were not trained and tested alike - nothing to pair"
        )
    gaps = [a.accuracy - b.accuracy for a, b in pairs]
    middle = mean(gaps)
    if len(gaps) == 1:
        text = f"{model.label} against {first.label}: {_points(middle)} from a single seed: cannot tell."
        return Difference(middle, None, None, text)
    spread = max(stdev(gaps), 1 / pairs[0][0].count)
    half = t_quantile(0.5 + CONFIDENCE / 2, len(gaps) - 1) * spread / math.sqrt(len(gaps))
    low, high = middle - half, middle + half
    better = None if low <= 0 <= high else low > 0
    verdict = {True: "better", False: "worse", None: "cannot tell"}[better]
    text = (
        f"{model.label} against {first.label}: {_points(middle)} "
        f"({CONFIDENCE:.0%} interval {_points(low, unit=False)} to {_points(high)}): {verdict}."
    )
    return Difference(middle, (low, high), better, text)


def forward_flop(model: nn.Module, images: Float[Tensor, "b c h w"]) -> int:
    """Floating point operations of one image's forward pass, as executed: two for each multiply-add.

    Matrix products, attention and convolutions are counted, element-wise operations are not. Attention is
    counted in its plain form, since torch has no count of the fused one.
    """
    with in_eval_mode(model), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(images)  # what is folded once and kept is no cost of an image
        with FlopCounterMode(display=False) as counter:
            model(images)
    return counter.get_total_flops() // len(images)


def inference_speed(
    models: Sequence[nn.Module], images: Sequence[Tensor], *, rounds: int = 15, seconds: float = 0.2
) -> list[tuple[float, list[float]]]:
    """Images a second of each model, and how many times the first one's speed that is.

    All models take turns in every round, so that a busy machine slows all of them.

    Args:
        models: on one device, in eval mode.
        images: for each model a batch as it wants to see it.
        rounds, seconds: how often each is timed, and for how long.

    Returns:
        For each model the images a second (median) and ``[median, least, most]`` of the rounds' ratios.
    """
    named = enumerate(zip(models, images, strict=True))
    runs: dict[str, Callable[[], Any]] = {str(i): partial(model, batch) for i, (model, batch) in named}
    with torch.inference_mode():
        times = list(_interleaved(runs, rounds, seconds, images[0].device).values())
    each = [[t / len(batch) for t in taken] for taken, batch in zip(times, images, strict=True)]
    return [(1 / median(taken), _ratios(each[0], taken)) for taken in each]


def held_steps(audit: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Of an audit, as a dict, the steps with an objective and the share of images on which it fell."""
    rows = audit["rows"] if audit is not None else []
    keys = ("layer", "step", "descended")
    return [{key: row[key] for key in keys} for row in rows if row["descended"] is not None]


def sparsity(audit: dict[str, Any] | None) -> float | None:
    """Mean share of non-zeros after the sparsify steps of an audit; None without such steps.

    What a black box does in place of sparsifying promises no zeros and is left out.
    """
    rows = audit["rows"] if audit is not None else []
    shares = [row["nonzero"] for row in rows if row["step"] == "sparsify" and row["objective"] is not None]
    return mean(shares) if shares else None


def _points(share: float, *, unit: bool = True) -> str:
    """A difference of shares in percentage points, with its sign."""
    return f"{100 * share:+.2f}{' points' if unit else ''}"


def _row(contender: Contender) -> list[str]:
    outcomes = contender.outcomes
    spread = "" if contender.deviation is None else f" +- {100 * contender.deviation:.2f}"
    held = len(outcomes[0].steps)
    descends = " ".join(str(outcome.descending) for outcome in outcomes) + f" of {held}"
    speed = contender.speed
    return [
        contender.label,
        f"{100 * contender.accuracy:.2f}{spread} %",
        f"{contender.parameters:,}",
        f"{contender.flop / 1e6:,.2f}",
        f"{mean(o.seconds for o in outcomes):,.0f} s",
        f"{mean(o.images_per_second for o in outcomes):,.0f}",
        "-" if contender.images_per_second is None else f"{contender.images_per_second:,.0f}",
        "-" if speed is None else f"{speed[0]:.2f} ({speed[1]:.2f}-{speed[2]:.2f})",
        descends if held else "no objective",
        "-" if contender.descended is None else f"{contender.descended:.1%}",
        "-" if contender.nonzero is None else f"{contender.nonzero:.1%}",
    ]
