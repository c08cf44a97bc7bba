"""Is a run that learns without labels well? A verdict in words, from what was measured so far.

Without labels a low loss proves nothing: features that are the same for every image agree perfectly. What
tells is whether the features of *different* images stay different (effective rank, their mean cosine), beside
the untrained model's, and whether views of one image come closer than that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Measures = Mapping[str, float]

SAME = 0.99
"""Mean cosine between different images above which their features are all but one."""

LOST = 0.5
"""Share of the directions beside the first, as counted by the effective rank, that training may take from the
untrained model. What is few differs: at width 64, ViT begins at an effective rank of 3 and CRATE at 15. Good
runs on digits kept 0.6 and more, those without a rate or at absurd learning rates less than 0.15."""

FEW = 0.05
"""Share of the width that a run which has collapsed does not even have left."""

CLOSE, GAIN = 0.25, 0.15
"""Share of the way from the cosine of different images to 1 that views of an image have gone, where something
is learnt, and how much more than untrained. On digits untrained models stood below 0.1, good runs gained 0.15
in three epochs where least, and DINO where it learnt nothing 0.1."""


@dataclass(frozen=True)
class Verdict:
    """What to think of a run.

    Attributes:
        state: ``untrained`` before the first step; ``collapsed`` when its features tell images apart no
            more; ``collapsing`` on the way there; ``idle`` when views of an image are hardly closer
            than different images; else ``healthy``.
        text: the state with the numbers that made it.
    """

    state: Literal["untrained", "healthy", "idle", "collapsing", "collapsed"]
    text: str


def verdict(history: Sequence[Measures], width: int) -> Verdict:
    """Judge the last of ``history`` beside its first, the untrained model's where that was measured.

    Args:
        history: measures of :class:`~pellucid.training.representation.Representation`, oldest first, each
            with the ``step`` and the means of the loss's parts since the one before.
        width: of the features.
    """
    now, start = history[-1], history[0]
    rank, cosine = now["effective rank"], now["cosine"]
    if not math.isfinite(rank + cosine):
        return Verdict("collapsed", "collapsed: features are not finite numbers")
    directions = f"effective rank {rank:.1f} of {width}"
    alike = f"different images have cosine {cosine:.2f}"
    if now.get("step") == 0:
        return Verdict("untrained", f"untrained: {directions}, {alike}")
    fewer = rank - 1 < LOST * (start["effective rank"] - 1)
    same = cosine > max(SAME, start["cosine"])
    if fewer and same and rank - 1 < FEW * (width - 1):
        return Verdict("collapsed", f"collapsed: {directions}, {alike}")
    if fewer or same:
        return Verdict("collapsing", f"collapsing: {directions}, {alike}")
    if "view cosine" in now:
        alike = f"views of an image have cosine {now['view cosine']:.2f}, different images {cosine:.2f}"
        if _closeness(now) < min(CLOSE, max(0.0, _closeness(start)) + GAIN):
            return Verdict("idle", f"nothing learnt yet: {directions}, {alike}")
    first = directions
    if "rate share" in now:
        first = f"rate {now['rate share']:.0%} of its ceiling{_trend(history, 'rate share')}, {directions}"
    else:
        first += _trend(history, "effective rank")
    return Verdict("healthy", f"healthy: {first}, {alike}")


def _closeness(measures: Measures) -> float:
    cosine = measures["cosine"]
    return (measures.get("view cosine", cosine) - cosine) / max(1 - cosine, 1e-6)


def _trend(history: Sequence[Measures], name: str) -> str:
    if len(history) < 2 or name not in history[-2]:
        return ""
    before, now = history[-2][name], history[-1][name]
    if abs(now - before) <= 0.01 * abs(before):
        return " and steady"
    return " and rising" if now > before else " and falling"
