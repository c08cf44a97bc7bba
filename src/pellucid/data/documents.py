"""Documents as words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from pellucid.data.dataset import Reject
from pellucid.data.tokenizers import Tokenizer
from pellucid.errors import DataError


class TextSet:
    """n documents as words.

    ``ids`` (total,) uint16 or int32: the words of all documents, one after the other, no special ones among
    them. ``starts`` int64 (n + 1,): where each begins, and the end of the last. ``sizes`` int64 (n,): bytes of
    each document's text. ``labels`` int64 (n,): indices into the class names, -1 where none is known.
    """

    def __init__(
        self,
        ids: npt.NDArray[np.integer],
        starts: npt.NDArray[np.int64],
        sizes: npt.NDArray[np.int64],
        labels: torch.Tensor,
        names: Sequence[str],
    ) -> None:
        n = len(starts) - 1
        if not len(sizes) == len(labels) == len(names) == n or starts[0] or starts[-1] != len(ids):
            raise DataError(
                f"{n} documents of {len(ids)} words with {len(sizes)} sizes, {len(labels)} labels and"
                f" {len(names)} names - give one of each, and starts from 0 to the number of words"
            )
        self.ids, self.starts, self.sizes = ids, starts, sizes
        self.labels = labels.to(torch.int64)
        self._names = names

    def __len__(self) -> int:
        return len(self.sizes)

    def document(self, i: int) -> npt.NDArray[np.integer]:
        """The words of document i."""
        return self.ids[self.starts[i] : self.starts[i + 1]]

    def name(self, i: int) -> str:
        """What to call document i in a message; safe to print."""
        return self._names[i]


@dataclass(frozen=True)
class TextData:
    """Documents ready to train on, and the words that they are made of."""

    name: str
    train: TextSet
    test: TextSet
    tokenizer: Tokenizer
    class_names: list[str]
    rejects: tuple[Reject, ...]
    fingerprint: str
