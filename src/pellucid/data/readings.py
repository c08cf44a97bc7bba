"""All texts of a corpus looked at once, before the first is used: which are good, which class, which side."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from pellucid.data.corpora import Corpus
from pellucid.data.dataset import Reject
from pellucid.data.found import Asked, label_problems
from pellucid.data.images import show_name
from pellucid.data.sources import Entry, Label, Source, name_of, path_of
from pellucid.data.split import hold_out, refuse_fraction
from pellucid.data.verify import refusal, watched
from pellucid.errors import DataError

TEST_FRACTION = 0.1
UNLABELLED = "train without labels: --objective causal-lm"
"""The remedy for texts that have none."""

TRAIN, TEST, NEITHER = 0, 1, 2
_DIGEST = 16  # bytes

Integers = npt.NDArray[np.int64]


@dataclass
class Reading:
    """The n texts of a corpus that can be used, in the order in which they are read, in columns (n,).

    ``source``: which of ``sources``; ``place``: where in it; ``size``: bytes; ``digest`` (n, 16): equal for
    equal texts; ``label``: index into ``class_names``, -1 where none is known; ``side``: TRAIN, TEST or
    NEITHER.
    """

    corpus: Corpus
    sources: list[Source]
    source: Integers
    place: Integers
    size: Integers
    digest: npt.NDArray[np.uint8]
    label: Integers
    side: Integers
    class_names: list[str]
    rejects: tuple[Reject, ...]

    def __len__(self) -> int:
        return len(self.size)

    def name(self, i: int) -> str:
        """What to call text i; safe to print."""
        return name_of(self.sources[self.source[i]], int(self.place[i]))

    @cached_property
    def distinct(self) -> tuple[Integers, Integers]:
        """Where each distinct text appears first, in order, and (n,) which of these each text equals.

        Half of a digest is compared: should two texts ever share it, they are only kept on one side.
        """
        _, first, same = np.unique(self.digest.view(np.uint64)[:, 0], return_index=True, return_inverse=True)
        ranked = np.argsort(first, kind="stable")
        rank = np.empty_like(ranked)
        rank[ranked] = np.arange(len(ranked))
        return first[ranked], rank[same.reshape(-1)]

    def sample(self, limit: int) -> Iterator[bytes]:
        """Of those to train on every k-th, for the least k that makes them about ``limit`` bytes at most."""
        rows = np.flatnonzero(self.side == TRAIN)
        k = max(-(-int(self.size[rows].sum()) // limit), 1)
        wanted = np.zeros(len(self), dtype=bool)
        wanted[rows[::k]] = True
        yield from self._read(wanted)

    def texts(self, *sides: int) -> Iterator[bytes]:
        """Those on these sides, read anew. Raises DataError for one that has changed in the meantime."""
        yield from self._read(np.isin(self.side, sides))

    def _read(self, wanted: npt.NDArray[np.bool_]) -> Iterator[bytes]:
        for number in np.unique(self.source[wanted]).tolist():
            source = self.sources[number]
            i, last = np.searchsorted(self.source, [number, number + 1]).tolist()
            for entry in filter(_is_good, source.entries()):
                if i == last or _digest(entry.text) != self.digest[i].tobytes():
                    raise _changed(source)
                if wanted[i]:
                    yield entry.text
                i += 1
            if i < last:
                raise _changed(source)


def _changed(source: Source) -> DataError:
    where = show_name(source.path)
    return DataError(f"{where} has changed while it was read - wait until it is whole, then begin again")


def read_corpus(corpus: Corpus, asked: Asked, max_bad: float) -> Reading:
    """Look at every text. Raises DataError for a corpus that cannot be used, naming why."""
    sources = corpus.train + (corpus.test or [])
    columns = {name: array("q") for name in ("source", "place", "size", "label")}
    digests = bytearray()
    labels: dict[Label | None, int] = {}
    rejects: list[Reject] = []
    named: list[tuple[str, str]] = []
    blank = 0
    for number, entry in watched(_every(sources), "looking"):
        if entry.reason:
            rejects.append(Reject(path_of(sources[number], entry.place), entry.reason))
            named.append((name_of(sources[number], entry.place), entry.reason))
        elif not _is_good(entry):
            blank += 1
        else:
            row = number, entry.place, len(entry.text), labels.setdefault(entry.label, len(labels))
            for column, value in zip(columns.values(), row, strict=True):
                column.append(value)
            digests += _digest(entry.text)
    count = len(columns["size"])
    if message := refusal(named, count + len(named), max_bad, corpus.where, "texts"):
        raise DataError(message)
    if blank:
        corpus.notes.append(f"{blank:,} rows without text are passed over")
    source, place, size, label = (np.frombuffer(column, dtype=np.int64) for column in columns.values())
    side = np.where(source < len(corpus.train), TRAIN, TEST).astype(np.int64)
    for part, of_side in ((TRAIN, corpus.train), (TEST, corpus.test)):
        if of_side is not None and not (side == part).any():
            bad = "; ".join(f"{name}: {reason}" for name, reason in named[:5])
            raise DataError(f"no text found in {corpus.where} - {corpus.one}" + (f"\n  {bad}" if bad else ""))
    names, values = _classes(list(labels), corpus.class_names)
    reading = Reading(
        corpus,
        sources,
        source,
        place,
        size,
        np.frombuffer(digests, dtype=np.uint8).reshape(count, _DIGEST),
        values[label],
        side,
        names,
        (*rejects, *corpus.unread),
    )
    _settle(reading, asked)
    return reading


def divide_texts(reading: Reading, asked: Asked) -> int:
    """Which text is on which side: the split that the data bring, or else a hold-out of whole texts.

    Equal texts stay together. With ``test_only`` nothing is on the side to train on. Returns how many texts
    are on both sides, as those of a split that the data bring may be.
    """
    corpus, side = reading.corpus, reading.side
    first, same = reading.distinct
    if corpus.test is not None:
        refuse_fraction(asked.test_fraction, corpus.where)
        if asked.test_only:
            side[side == TRAIN] = NEITHER
        return int((np.isin(same, same[side == TRAIN]) & (side == TEST)).sum())
    if asked.test_only:
        side[:] = TEST
        return 0
    if len(first) == 1:
        also = "" if len(reading) == 1 else f" {len(reading):,} times"
        raise DataError(f"1 text{also} cannot be split into train and test - {corpus.where} - {corpus.one}")
    fraction = TEST_FRACTION if asked.test_fraction is None else asked.test_fraction
    _, held_out = hold_out(reading.label[first], fraction, asked.split_seed)
    side[:] = np.where(np.isin(same, held_out), TEST, TRAIN)
    return 0


def _every(sources: list[Source]) -> Iterator[tuple[int, Entry]]:
    for number, source in enumerate(sources):
        for entry in source.entries():
            yield number, entry


def _is_good(entry: Entry) -> bool:
    return not entry.reason and bool(entry.text.strip())


def _digest(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=_DIGEST).digest()


def _classes(values: list[Label | None], known: list[str] | None) -> tuple[list[str], npt.NDArray[np.int64]]:
    """Class names, and the index into them of each of these values, -1 for None."""
    if known is not None:
        return known, np.array([-1 if value is None else int(value) for value in values], dtype=np.int64)
    stated = {value for value in values if value is not None}
    numeric = all(isinstance(value, int) for value in stated)
    names = list(dict.fromkeys(map(str, sorted(stated, key=int if numeric else str))))
    rank = {name: k for k, name in enumerate(names)}
    return names, np.array([-1 if value is None else rank[str(value)] for value in values], dtype=np.int64)


def _settle(reading: Reading, asked: Asked) -> None:
    """Put labels aside that supervised training could not use, or raise DataError where they are required."""
    where, known = reading.corpus.where, (reading.label >= 0).any()
    if not known:
        problems = [
            ("no labels", f"give each class a folder of its own, or each text a 'label', or {UNLABELLED}")
        ]
    else:
        train, test = (torch.from_numpy(reading.label[reading.side == side]) for side in (TRAIN, TEST))
        test_or_none = None if reading.corpus.test is None else test
        problems = label_problems(train, test_or_none, reading.class_names, asked, "text", UNLABELLED)
    if problems and asked.labels == "required":
        raise DataError(f"{problems[0][0]} - {where} - {problems[0][1]}")
    if problems:
        if known:
            reading.corpus.notes.append(f"taken without labels: {problems[0][0]}")
        reading.class_names, reading.label = [], np.full(len(reading), -1, dtype=np.int64)
