"""``pellucid check`` on text: what a corpus holds and what is wrong with it, listed and not raised."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from pellucid.data.corpora import find_corpus, holds_text
from pellucid.data.dataset import Reject
from pellucid.data.folders import is_picture
from pellucid.data.found import Asked
from pellucid.data.images import show_name
from pellucid.data.readings import TEST, TRAIN, Reading, divide_texts, read_corpus
from pellucid.data.tables import PREFIX
from pellucid.data.trees import holds
from pellucid.data.verify import listed, refusal
from pellucid.errors import PellucidError


@dataclass(frozen=True)
class TextReport:
    """What a corpus holds and what is wrong with it.

    ``count``: texts to train on, to test on (all of them, 0 where they cannot be split). ``class_counts``:
    the same for each class; empty where labels are missing or could not be learnt from, as ``notes`` say.
    ``sizes``: smallest, median and largest text, and all together, in bytes. ``equal``: texts that an earlier
    one equals. ``shared``: test texts that are also in train. ``problems``: what load_text would refuse.
    """

    name: str
    count: tuple[int, int] = (0, 0)
    class_counts: dict[str, tuple[int, int]] | None = None
    sizes: tuple[int, int, int, int] | None = None
    equal: int = 0
    shared: int = 0
    rejects: tuple[Reject, ...] = ()
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    without_labels: bool = False  # texts are held to what language models need, and these need none

    @property
    def ok(self) -> bool:
        """Whether load_text accepts it and no test text is also trained on."""
        return not self.problems and not self.shared

    def lines(self) -> list[str]:
        """The report as text, safe to print."""
        return [line for part in self._sections() for text in part for line in text.splitlines()]

    def _sections(self) -> Iterator[list[str]]:
        train, test = self.count
        kinds = f"in {len(self.class_counts)} classes" if self.class_counts else "without labels"
        yield [f"{self.name}: {train + test:,} texts {kinds}, {train:,} + {test:,}"]
        yield listed(
            f"  {show_name(name)}: {of_train:,} to train on, {of_test:,} to test on"
            for name, (of_train, of_test) in (self.class_counts or {}).items()
        )
        if self.sizes:
            smallest, median, largest, whole = self.sizes
            yield [
                f"bytes: {smallest:,} smallest, {median:,} median, {largest:,} largest, {whole:,} together"
            ]
        if self.equal:
            yield [f"{self.equal:,} texts equal an earlier one"]
        if self.rejects:
            yield [f"{len(self.rejects):,} rejected"]
            yield listed(f"  {show_name(reject.path)}: {reject.reason}" for reject in self.rejects)
        if self.shared:
            yield [f"{self.shared:,} test texts are also in train, so scores will be too good"]
        yield listed(f"note: {note}" for note in self.notes)
        yield listed(f"problem: {problem}" for problem in self.problems)
        yield ["ok" if self.ok else "not ok"]


def is_text_data(path: str) -> bool:
    """Whether ``path`` names texts: by its files' names, none of which is a picture's, or by its column."""
    if path.startswith(PREFIX):
        return "text=" in path.partition("?")[2]
    return holds_text(path) and not holds(path, is_picture)


def check_text(path: str, name: str, asked: Asked, max_bad: float) -> TextReport:
    """Look at every text. What load_text would refuse is listed."""
    asked = replace(asked, labels="optional")
    try:
        corpus = find_corpus(path, asked)
        reading = read_corpus(corpus, asked, max_bad=1.0)
    except PellucidError as error:
        return TextReport(name, problems=(str(error),))
    problems = []
    files = reading.rejects[: len(reading.rejects) - len(corpus.unread)]
    named = [(show_name(reject.path), reject.reason) for reject in files]
    if message := refusal(named, len(reading) + len(named), max_bad, corpus.where, "texts"):
        problems.append(message)
    shared = 0
    try:
        shared = divide_texts(reading, asked)
    except PellucidError as error:
        problems.append(str(error))
    size = np.sort(reading.size)
    return TextReport(
        name=name,
        count=(int((reading.side == TRAIN).sum()), int((reading.side == TEST).sum())),
        class_counts=_class_counts(reading),
        sizes=(int(size[0]), int(size[len(size) // 2]), int(size[-1]), int(size.sum())),
        equal=len(reading) - len(reading.distinct[0]),
        shared=shared,
        rejects=reading.rejects,
        problems=tuple(problems),
        notes=tuple(corpus.notes),
    )


def _class_counts(reading: Reading) -> dict[str, tuple[int, int]]:
    counts = [Counter(reading.label[reading.side == side].tolist()) for side in (TRAIN, TEST)]
    return {name: (counts[0][i], counts[1][i]) for i, name in enumerate(reading.class_names)}
