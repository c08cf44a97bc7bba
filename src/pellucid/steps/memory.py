"""What a causal network keeps of the tokens so far, so that those that follow can be moved alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Memory:
    """The tokens so far of one batch, as each step remembers them.

    :func:`~pellucid.steps.unroll` hands a step what it kept after the last tokens and the tokens that arrive
    (``step.resume``), and keeps what it gives back. Rows may have different lengths: a token stands behind
    the last real one of its own row, so that no row meets another's padding.

    Args:
        batch: rows.
        device: where they are.
        room: tokens to make room for at once, where it is known how many there will be. A cache that is full
            doubles.

    Attributes:
        states: by layer (from 1) and step, whatever the step keeps.
        lengths: real tokens of each row, without those that arrive.
        longest: no row has more.
        even: all rows have as many.
        padded: of the tokens that arrive, some may be padding.
        places: where those that arrive stand in their rows, from 0, ``(b, n)``.
    """

    def __init__(self, batch: int, device: torch.device | str | None = None, room: int = 0) -> None:
        self.states: dict[tuple[int, str], Any] = {}
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)
        self.longest = 0
        self.even = True
        self.padded = False
        self._room = room
        self._arriving, self._real = 0, self.lengths
        self.places: Int[Tensor, "b n"] = self.lengths[:, None]
        self._visible: Bool[Tensor, "_ 1 n m"] | None = None

    def expect(self, arriving: int, real: Int[Tensor, " b"] | None = None) -> Int[Tensor, "b n"]:
        """Announce so many tokens for every row, of which the first ``real`` count; says where they stand.

        A row may wait: none of what arrives is then its own.

        Ends with :meth:`arrive`, after the last layer.
        """
        self._arriving = arriving
        self.padded = real is not None
        self._real = torch.full_like(self.lengths, arriving) if real is None else real
        self.places = self.lengths[:, None] + torch.arange(arriving, device=self.lengths.device)
        self._visible = None
        return self.places

    def arrive(self) -> None:
        """The tokens that were expected are there."""
        self.lengths, self._visible = self.lengths + self._real, None
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
    def reached(self) -> int:
        """With those that arrive, no row has more."""
        return self.longest + self._arriving

    @property
    def last(self) -> Int[Tensor, " b"]:
        """Index of the last real one among the arriving tokens of each row; -1 where none is."""
        return self._real - 1

    def keep(
        self, kept: Float[Tensor, "b K c p"] | None, arriving: Float[Tensor, "b K n p"]
    ) -> tuple[Float[Tensor, "b K _ p"], Float[Tensor, "b K m p"]]:
        """A cache with the arriving tokens in their places, and the part of it that is in use.

        What stands in for a missing token is overwritten by the next one of its row.
        """
        have = 0 if kept is None else kept.shape[-2]
        if kept is None or have < self.reached:
            places = max(self.reached, self._room, 2 * have)
            room = arriving.new_empty(*arriving.shape[:-2], places, arriving.shape[-1])
            if kept is not None:
                room[..., :have, :] = kept
            kept = room
        fresh = kept[..., self.longest : self.reached, :]
        if self.even:
            fresh.copy_(arriving)
        else:
            fresh.zero_()  # some of it belongs to no token, and what is masked must still be a number
            kept.scatter_(-2, self.places[:, None, :, None].expand(arriving.shape), arriving)
        return kept, kept[..., : self.reached, :]

    @property
    def visible(self) -> Bool[Tensor, "_ 1 n m"] | None:
        """Which of the kept tokens each arriving one sees; None where it is all of them."""
        if self.even and self._arriving == 1:
            return None
        if self._visible is None:  # made once for all layers
            places = self.places[:1] if self.even else self.places
            kept = torch.arange(self.reached, device=places.device)
            self._visible = (kept <= places.unsqueeze(-1)).unsqueeze(1)
        return self._visible

    def numel(self) -> int:
        """Numbers kept of all tokens so far, room for more included."""
        return sum(part.numel() for part in self._parts())

    def nbytes(self) -> int:
        """Bytes that are held for them: whole storages, however little of one is in use."""
        storages = {part.untyped_storage().data_ptr(): part.untyped_storage() for part in self._parts()}
        return sum(storage.nbytes() for storage in storages.values())

    def _parts(self) -> Iterator[Tensor]:
        for state in self.states.values():
            yield from (state,) if isinstance(state, Tensor) else state


def _taken(state: Any, rows: Tensor) -> Any:
    return state[rows] if isinstance(state, Tensor) else tuple(_taken(part, rows) for part in state)
