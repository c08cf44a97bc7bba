"""Rows of words that a language model reads, and what it is to tell at each place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from pellucid.data.documents import TextSet
from pellucid.data.loaders import Fetching, Key, StepSampler, evenly_spaced
from pellucid.data.randomness import draws
from pellucid.data.tokenizers import Tokenizer
from pellucid.errors import ConfigError, DataError

IGNORED = -100
"""The target where none counts: what ``torch.nn.functional.cross_entropy`` passes over."""

Task = Literal["next", "masked", "whole"]

DRAWS_PER_WORD = 3  # whether it is hidden, what stands for it, which random word
MASKED_SHARE, RANDOM_SHARE = 0.8, 0.1  # of the hidden words; the others stay as they are

Integers = npt.NDArray[np.int64]


class Tokens(NamedTuple):
    """Rows of words, padded behind to the longest of them.

    The loss of a batch is the mean over its rows of ``scale`` times a row's sum of nats. Since ``scale`` is
    one number for the whole set, no cut of a batch into micro-batches changes it.

    ``ids`` int64 (b, n): what the model reads, padded with the word ``end``. ``targets`` int64 (b, n): the
    word to tell at each place, ``IGNORED`` where none counts. ``real`` bool (b, n): no padding. ``scale``
    float32 (b,): 1 / (targets of a window, in the mean over all windows of the set).
    """

    ids: torch.Tensor
    targets: torch.Tensor
    real: torch.Tensor
    scale: torch.Tensor


TokenBatch = tuple[Tokens, torch.Tensor, torch.Tensor]
"""Tokens, labels int64 (b,) and index int64 (b,): which windows these are."""


class Windows(Dataset[TokenBatch]):
    """Documents cut into rows of at most ``context`` words c, fetched a batch at a time by (index, epoch).

    A document is s = [end] t_1 ... t_n [end]. Windows begin at its places p = 0, c, 2c, ...; the last one is
    moved back, as far as the document goes, so that it is full.

    - ``task="next"``: a model reads s[p : p + c] and tells s[p + 1 : p + c + 1]. What an earlier window has
      told already counts no more, so that every word after the first ``end`` counts once an epoch.
    - ``"masked"``: it reads s[p : p + c] and tells those of its ordinary words that are hidden. They are a
      share ``mask_share``, rounded and at least one, a function of (seed, epoch, index) alone; in place of
      80 % stands ``mask``, of 10 % a random ordinary word, and 10 % stay. Windows without ordinary words are
      left out.
    - ``"whole"``: it reads the first c words of each document, and there is nothing to tell.

    With ``cross_documents`` all documents are one, in their order, with one ``end`` between two.

    Args:
        texts: the documents.
        tokenizer: what made words of them.
        context: c, most words of a row.
        task, cross_documents, mask_share: as above.
        seed: of what is hidden.

    Raises:
        ConfigError: options that cannot be.
        DataError: no documents, or nothing to hide in any.
    """

    def __init__(
        self,
        texts: TextSet,
        tokenizer: Tokenizer,
        context: int,
        *,
        task: Task = "next",
        cross_documents: bool = False,
        mask_share: float = 0.15,
        seed: int = 0,
    ) -> None:
        _check(context, task, cross_documents, mask_share)
        if not len(texts):
            raise DataError("there is nothing to read: 0 documents")
        self.texts, self.tokenizer, self.context = texts, tokenizer, context
        self.task, self.cross_documents, self.mask_share, self.seed = task, cross_documents, mask_share, seed
        self._ordinary = np.setdiff1d(np.arange(tokenizer.vocab_size), list(tokenizer.special))
        # All documents as one line of words, an end before each and one behind the last: where the ends are.
        self._ends = texts.starts + np.arange(len(texts) + 1)
        self._cut()
        if not len(self):
            raise DataError(f"no window of {context} words holds a word to hide - take a longer context")
        self._scale = len(self) / self.words if self.words else 1.0
        self.labels = torch.full((len(self),), -1) if cross_documents else texts.labels[self.document]

    def __len__(self) -> int:
        return len(self._first)

    def __getitem__(self, key: Key) -> TokenBatch:
        return self.__getitems__([key])

    def __getitems__(self, keys: Sequence[Key]) -> TokenBatch:
        index, epochs = (np.array(column, dtype=np.int64) for column in zip(*keys, strict=True))
        tokens = self._masked(index, epochs) if self.task == "masked" else self._plain(index)
        rows = torch.from_numpy(index)
        return tokens, self.labels[rows], rows

    @property
    def words(self) -> int:
        """Counted targets of all windows."""
        return int(self._counted.sum())

    @property
    def text_bytes(self) -> int:
        """Bytes of text that the counted targets of all windows stand for; ``end`` stands for none.

        Of a masked document each hidden word stands for as many as its words do in the mean.
        """
        if self.task != "masked":
            return int(self.texts.sizes.sum()) if self.task == "next" else 0
        words = np.diff(self.texts.starts)
        each = self.texts.sizes / np.maximum(words, 1)
        if self.cross_documents:
            each = np.full(len(words), self.texts.sizes.sum() / words.sum())
        return round(float((each[self.document] * self._counted).sum()))

    def name(self, i: int) -> str:
        """Which words of which document these are, counted from its first ``end``; safe to print."""
        document = int(self.document[i])
        name = self.texts.name(document)
        if self.task == "whole":
            return name
        first = int(self._first[i] - self._ends[document])
        if self._first[i] + self._length[i] > self._ends[document + 1] + 1:
            return f"{name}, from word {first} on"
        return f"{name}, words {first} to {first + int(self._length[i])}"

    def _cut(self) -> None:
        """Where windows begin, how long they are, and from which of their places on targets count."""
        c = self.context
        first, last = self._ends[:-1], self._ends[1:]  # of each document, where its two ends are
        if self.cross_documents:
            first, last = first[:1], last[-1:]
        told = last - first  # words to tell, all after the first
        count = np.ones_like(told) if self.task == "whole" else -(-told // c)
        document = np.repeat(np.arange(len(told)), count)
        number = np.arange(len(document)) - np.repeat(np.cumsum(count) - count, count)
        moved = np.minimum(number * c, np.maximum(told[document] - c, 0))
        self._first: Integers = first[document] + moved
        self._length: Integers = np.minimum(c, told[document] + (self.task != "next"))
        self._skipped: Integers = number * c - moved
        self._counted: Integers = np.zeros_like(self._length)
        if self.task == "next":
            self._counted = self._length - self._skipped
        elif self.task == "masked":
            ends = np.searchsorted(self._ends, [self._first, self._first + self._length])
            ordinary = self._length - (ends[1] - ends[0])
            self._counted = np.maximum(np.rint(self.mask_share * ordinary), 1).astype(np.int64)
            kept = ordinary > 0
            self._first, self._length, self._counted = (
                part[kept] for part in (self._first, self._length, self._counted)
            )
        self.document: Integers = np.searchsorted(self._ends[:-1], self._first, side="right") - 1
        """int64 (windows,): the document that each begins in."""

    def _words(self, places: Integers) -> tuple[Integers, npt.NDArray[np.bool_]]:
        """The words at these places of the line of all documents, and whether they are no ``end``."""
        before = np.searchsorted(self._ends, places, side="right")  # ends up to here, at least one
        ordinary = self._ends[before - 1] != places
        words = np.full(places.shape, self.tokenizer.end, dtype=np.int64)
        words[ordinary] = self.texts.ids[(places - before)[ordinary]]
        return words, ordinary

    def _places(self, index: Integers, more: int = 0) -> tuple[Integers, npt.NDArray[np.bool_]]:
        """Of each row the places of its words, and ``more`` behind; and which of the words are no padding."""
        length = self._length[index][:, None]
        offset = np.arange(length.max() + more)
        places = self._first[index][:, None] + offset
        return np.minimum(places, self._ends[-1]), (offset < length)[:, : length.max()]

    def _plain(self, index: Integers) -> Tokens:
        places, real = self._places(index, more=1)
        words, _ = self._words(places)
        counts = real & (np.arange(real.shape[1]) >= self._skipped[index][:, None])
        if self.task == "whole":
            counts[:] = False
        return self._tokens(words[:, :-1], words[:, 1:], real, counts)

    def _masked(self, index: Integers, epochs: Integers) -> Tokens:
        places, real = self._places(index)
        words, ordinary = self._words(places)
        uniform = draws(self.seed, epochs, index, DRAWS_PER_WORD * real.shape[1])
        lot, fate, which = np.moveaxis(uniform.reshape(*real.shape, DRAWS_PER_WORD), -1, 0)
        lot = np.where(real & ordinary, lot, np.inf)
        rank = np.argsort(np.argsort(lot, axis=1, kind="stable"), axis=1)
        hidden = rank < self._counted[index][:, None]
        shown = words.copy()
        shown[hidden & (fate < MASKED_SHARE)] = self.tokenizer.mask
        random = hidden & (fate >= MASKED_SHARE) & (fate < MASKED_SHARE + RANDOM_SHARE)
        shown[random] = self._ordinary[(which[random] * len(self._ordinary)).astype(np.int64)]
        return self._tokens(shown, words, real, hidden)

    def _tokens(
        self, ids: Integers, targets: Integers, real: npt.NDArray[np.bool_], counts: npt.NDArray[np.bool_]
    ) -> Tokens:
        return Tokens(
            torch.from_numpy(np.where(real, ids, self.tokenizer.end)),
            torch.from_numpy(np.where(counts, targets, IGNORED)),
            torch.from_numpy(real),
            torch.full((len(ids),), self._scale),
        )


def token_loader(
    windows: Windows, sampler: StepSampler, workers: int = 0, timeout: float = 60.0
) -> Fetching[TokenBatch]:
    """One TokenBatch per micro-batch of ``sampler``. ``timeout`` seconds for a worker to answer."""
    return Fetching(windows, sampler, workers, timeout)


def eval_token_loader(
    windows: Windows,
    batch_size: int = 64,
    workers: int = 0,
    limit: int | None = None,
    timeout: float = 60.0,
) -> Fetching[TokenBatch]:
    """Every window once, in order, as in epoch 0; with ``limit``, that many, evenly spaced."""
    return Fetching(windows, evenly_spaced(len(windows), batch_size, limit), workers, timeout)


def _check(context: int, task: str, cross_documents: bool, mask_share: float) -> None:
    if context < 1:
        raise ConfigError(f"context {context} - give at least 1 word, such as 256")
    if task not in get_args(Task):
        raise ConfigError(f"task is '{task}' - give {', '.join(get_args(Task))}")
    if task == "whole" and cross_documents:
        raise ConfigError("task 'whole' reads one document a row - leave out cross_documents")
    if not 0 < mask_share <= 1:
        raise ConfigError(f"mask share {mask_share} - give a number between 0 and 1, such as 0.15")
