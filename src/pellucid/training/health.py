"""Is a run that learns without labels well? A verdict in words, from what was measured so far.

Without labels a low loss proves nothing: features that are the same for every image agree perfectly. What
tells is whether the features of *different* images stay different (effective rank, their mean cosine), and
whether views of one image come closer than that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Measures = Mapping[str, float]

FEW_DIRECTIONS = 0.05
"""Share of the width below which an effective rank is a collapse. That of a line is 1, whatever the width."""

SAME = 0.99
"""Mean cosine between different images above which their features are all but one."""

LOST = 0.5
"""Share of the untrained model's effective rank below which training has taken more than it gave."""

TOGETHER = 0.1
"""How much closer, in cosines, views of one image must be than different images."""


@dataclass(frozen=True)
class Verdict:
    """What to think of a run.

    Attributes:
        state: ``untrained`` before the first step; ``collapsed`` when its features tell images apart no
            more; ``collapsing`` on the way there; ``idle`` when views of an image are no closer than
            different images; else ``healthy``.
        text: the state with the numbers that made it.
    """

    state: Literal["untrained", "healthy", "idle", "collapsing", "collapsed"]
    text: str


def verdict(history: Sequence[Measures], width: int) -> Verdict:
    """Judge the last of ``history``, whose first is that of the untrained model.

    Args:
        history: measures of :class:`~pellucid.training.representation.Representation`, oldest first, each
            with the means of the loss's parts since the one before.
        width: of the features.
    """
    now, start, fresh = history[-1], history[0], len(history) == 1
    rank, cosine = now["effective rank"], now["cosine"]
    directions = f"effective rank {rank:.1f} of {width}"
    alike = f"different images have cosine {cosine:.2f}"
    least = 1 + FEW_DIRECTIONS * (width - 1)
    if fresh:
        return Verdict("untrained", f"untrained: {directions}, {alike}")
    if rank < least and cosine > SAME:
        return Verdict("collapsed", f"collapsed: {directions}, {alike}")
    if rank < least or cosine > SAME or rank < LOST * start["effective rank"]:
        return Verdict("collapsing", f"collapsing: {directions}, {alike}")
    if "view cosine" in now:
        alike = f"views of an image have cosine {now['view cosine']:.2f}, different images {cosine:.2f}"
        if now["view cosine"] - cosine < TOGETHER * (1 - cosine):
            return Verdict("idle", f"nothing learnt: {alike}")
    first = directions
    if "rate share" in now:
        first = f"rate {now['rate share']:.0%} of its ceiling{_trend(history, 'rate share')}, {directions}"
    else:
        first += _trend(history, "effective rank")
    return Verdict("healthy", f"healthy: {first}, {alike}")


def _trend(history: Sequence[Measures], name: str) -> str:
    if len(history) < 2 or name not in history[-2]:
        return ""
    before, now = history[-2][name], history[-1][name]
    if abs(now - before) <= 0.01 * abs(before):
        return " and steady"
    return " and rising" if now > before else " and falling"
