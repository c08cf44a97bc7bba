"""What a causal network keeps of the tokens so far, so that those that follow can be moved alone."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Memory:
    """The tokens so far of one batch, as each step remembers them.

    :func:`~pellucid.steps.unroll` hands a step what it kept after the last tokens and the tokens that arrive
    (``step.resume``), and keeps what it gives back. Rows may have different lengths: a token stands behind
    the last real one of its own row, so that no row meets another's padding.

    Attributes:
        states: by layer (from 1) and step, whatever the step keeps.
        lengths: real tokens of each row, without those that arrive.
        longest: no row has more.
        even: all rows have as many.
        padded: of the tokens that arrive, some may be padding.
    """

    def __init__(self, batch: int, device: torch.device | str | None = None) -> None:
        self.states: dict[tuple[int, str], Any] = {}
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)
        self.longest = 0
        self.even = True
        self.padded = False
        self._arriving, self._real = 0, self.lengths

    def expect(self, arriving: int, real: Int[Tensor, " b"] | None = None) -> Int[Tensor, "b n"]:
        """Announce so many tokens for every row, of which the first ``real`` count; says where they stand.

        A row may wait: none of what arrives is then its own.

        Ends with :meth:`arrive`, after the last layer.
        """
        self._arriving = arriving
        self.padded = real is not None
        self._real = torch.full_like(self.lengths, arriving) if real is None else real
        return self.places

    def arrive(self) -> None:
        """The tokens that were expected are there."""
        self.lengths = self.lengths + self._real
        self.even = self.even and not self.padded
        # The longest row may be one to which less came.
        self.longest = int(self.lengths.max()) if self.padded else self.longest + self._arriving

    def take(self, rows: Int[Tensor, " m"]) -> None:
        """Go on with these rows, in this order; one may be taken more than once, as a beam search does."""
        self.states = {key: _taken(state, rows) for key, state in self.states.items()}
        self.lengths = self.lengths[rows]

    def forget(self, last: Int[Tensor, " b"]) -> None:
        """Take back so many of the last tokens of each row; of steps that keep every token, not a sum."""
        self.lengths = self.lengths - last
        self.longest = int(self.lengths.max())
        self.even = self.even and bool((last == last[0]).all())

    @property
    def places(self) -> Int[Tensor, "b n"]:
        """Where the arriving tokens stand in their rows, from 0."""
        return self.lengths[:, None] + torch.arange(self._arriving, device=self.lengths.device)

    @property
    def last(self) -> Int[Tensor, " b"]:
        """Index of the last real one among the arriving tokens of each row; -1 where none is."""
        return self._real - 1

    def keep(
        self, kept: Float[Tensor, "b K c p"] | None, arriving: Float[Tensor, "b K n p"]
    ) -> tuple[Float[Tensor, "b K _ p"], Float[Tensor, "b K m p"]]:
        """A cache with the arriving tokens in their places, and the part of it that is in use.

        Room grows by doubling. What stood in for a missing token is overwritten by the next one.
        """
        needed = self.longest + self._arriving
        if kept is None:
            return arriving, arriving
        if kept.shape[-2] < needed:
            room = kept.new_zeros(*kept.shape[:-2], max(needed, 2 * kept.shape[-2]), kept.shape[-1])
            room[..., : kept.shape[-2], :] = kept
            kept = room
        if self.even:
            kept[..., self.longest : needed, :] = arriving
        else:
            kept.scatter_(-2, self.places[:, None, :, None].expand(arriving.shape), arriving)
        return kept, kept[..., :needed, :]

    @property
    def visible(self) -> Bool[Tensor, "b 1 n m"] | None:
        """Which of the kept tokens each arriving one sees; None where it is all of them."""
        if self.even and self._arriving == 1:
            return None
        kept = torch.arange(self.longest + self._arriving, device=self.lengths.device)
        return (kept <= self.places.unsqueeze(-1)).unsqueeze(1)

    def numel(self) -> int:
        """Numbers kept of all tokens so far, room for more included."""
        return sum(_numel(state) for state in self.states.values())


def _numel(state: Any) -> int:
    if isinstance(state, Tensor):
        return state.numel()
    return sum(_numel(part) for part in state)


def _taken(state: Any, rows: Tensor) -> Any:
    return state[rows] if isinstance(state, Tensor) else tuple(_taken(part, rows) for part in state)
