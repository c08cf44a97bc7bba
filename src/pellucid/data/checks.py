"""The work behind ``pellucid check``: everything that is wrong with a data set, listed and not raised."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pellucid.data.builtin import NAMES as BUILTIN_NAMES
from pellucid.data.dataset import EncodedImages, FileImages, ImageData, ImageSet, Reject
from pellucid.data.found import Asked, Found, Labels, Looks
from pellucid.data.images import KINDS, MAX_PIXELS, show_name
from pellucid.data.load import MAX_BAD, Spec, ask, find, is_in_memory, load_in_memory, title
from pellucid.data.text_checks import TextReport, check_text, is_text_data
from pellucid.data.verify import listed, look, refuse_dead_classes, rejected, too_many_rejects
from pellucid.errors import DataError, PellucidError

Size = tuple[int, int]


@dataclass(frozen=True)
class CheckReport:
    """What a data set holds and what is wrong with it.

    ``count``: images to train on, to test on (for a folder that cannot be split: all of them, 0).
    ``class_counts``: the same for each class; empty without labels. ``sizes``: smallest, median and largest
    (height, width) by area. ``kinds``: how many pictures are gray, colour, alpha, ... ``duplicates``: pairs
    (in train, in test) with the same bytes. ``problems``: what load_data would refuse. ``notes``: what it
    passes over. ``without_labels``: whether it would accept the data with ``labels="optional"``.
    """

    name: str
    count: tuple[int, int]
    class_counts: dict[str, tuple[int, int]]
    sizes: tuple[Size, Size, Size] | None
    kinds: dict[str, int]
    rejects: tuple[Reject, ...]
    duplicates: tuple[tuple[str, str], ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    without_labels: bool = False

    @property
    def ok(self) -> bool:
        """Whether load_data accepts it and no test picture is also trained on."""
        return not self.problems and not self.duplicates

    def lines(self) -> list[str]:
        """The report as text, safe to print."""
        return [line for part in self._sections() for text in part for line in text.splitlines()]

    def _sections(self) -> Iterator[list[str]]:
        train, test = self.count
        kinds = f"in {len(self.class_counts)} classes" if self.class_counts else "without labels"
        yield [f"{self.name}: {train + test:,} images {kinds}, {train:,} + {test:,}"]
        yield listed(
            f"  {show_name(name)}: {of_train:,} to train on, {of_test:,} to test on"
            for name, (of_train, of_test) in self.class_counts.items()
        )
        if self.sizes:
            smallest, median, largest = (f"{height}x{width}" for height, width in self.sizes)
            yield [f"height x width: {smallest} smallest, {median} median, {largest} largest"]
        if self.kinds:
            yield ["kinds: " + ", ".join(f"{count:,} {kind}" for kind, count in self.kinds.items())]
        if self.rejects:
            yield [f"{len(self.rejects):,} rejected"]
            yield listed(f"  {show_name(reject.path)}: {reject.reason}" for reject in self.rejects)
        if self.duplicates:
            yield [f"{len(self.duplicates):,} test images are also in train, so scores will be too good"]
            yield listed(f"  {show_name(train)} = {show_name(test)}" for train, test in self.duplicates)
        yield listed(f"note: {note}" for note in self.notes)
        yield listed(f"problem: {problem}" for problem in self.problems)
        yield ["ok" if self.ok else "not ok" + "; ok without labels" * self.without_labels]


def check(
    spec: Spec,
    *,
    labels: Labels = "required",
    download: bool = False,
    root: str | os.PathLike[str] | None = None,
    split_seed: int = 0,
    test_fraction: float | None = None,
    max_pixels: int = MAX_PIXELS,
    max_bad: float = MAX_BAD,
) -> CheckReport | TextReport:
    """Look at a whole data set, with load_data's arguments. What load_data would refuse is listed.

    Data that only lack labels are looked at all the same, and a note says what they are good for. Texts are
    held to what ``load_text`` accepts, with labels or without.
    """
    if isinstance(spec, ImageData):
        return _check_loaded(spec)
    path = os.fspath(spec)
    asked = ask(labels, test_fraction, split_seed, False, max_pixels)
    if is_text_data(path):
        return check_text(path, title(path), asked, max_bad)
    try:
        if is_in_memory(path):
            return _check_in_memory(path, root, download, asked)
        found = find(path, root, asked)
    except PellucidError as error:
        return CheckReport(title(path), (0, 0), {}, None, {}, (), (), (str(error),), ())
    return _check_found(found, max_bad)


USE = "images without labels, usable with --objective simdino, dino or mae"


def _check_in_memory(
    path: str, root: str | os.PathLike[str] | None, download: bool, asked: Asked
) -> CheckReport:
    """As it can be loaded, and what stands against it."""
    try:
        return _check_loaded(load_in_memory(path, root, download, asked))
    except PellucidError as error:
        if asked.labels == "optional" or path in BUILTIN_NAMES:
            raise
        try:
            without = load_in_memory(path, root, download, replace(asked, labels="optional"))
        except PellucidError:
            raise error from None
        report = _check_loaded(without)
        note = f"{sum(report.count):,} {USE}"
        return replace(report, problems=(str(error),), notes=(note,), without_labels=True)


def _check_loaded(data: ImageData) -> CheckReport:
    sizes = Counter((image.shape[1], image.shape[2]) for image in _images(data.train, data.test))
    channels = Counter(image.shape[0] for image in _images(data.train, data.test))
    digests: dict[str, str] = {}
    for i in range(len(data.train)):
        digests.setdefault(_pixel_digest(data.train, i), data.train.name(i))
    pairs = [
        (digests[digest], data.test.name(i))
        for i in range(len(data.test))
        if (digest := _pixel_digest(data.test, i)) in digests
    ]
    return CheckReport(
        name=data.name,
        count=(len(data.train), len(data.test)),
        class_counts=_label_counts(data.class_names, data.train, data.test),
        sizes=_size_range(np.array(list(sizes.elements())).reshape(-1, 2)),
        kinds={
            {1: "gray", 3: "colour"}.get(c, f"of {c} channels"): count
            for c, count in sorted(channels.items())
        },
        rejects=data.rejects,
        duplicates=tuple(pairs),
        problems=(),
        notes=(),
    )


def _check_found(found: Found, max_bad: float) -> CheckReport:
    problems = [str(problem) for problem in found.problems]
    looks = look(found)
    too_many = too_many_rejects(found, looks, max_bad)
    if too_many:
        problems.append(too_many)
    if not found.problems:
        problems += _dead_classes(found, looks)
    damage = found.inspect()
    notes = list(found.notes)
    without = bool(found.without_labels and not too_many and not damage)
    if without:
        no_folders = isinstance(found.train, FileImages) and not found.class_names
        lack = "no class folders: " if no_folders else ""
        notes.insert(0, f"{lack}{found.without_labels:,} {USE}")
    seen = [np.stack([part.height, part.width], axis=1)[part.good] for part in looks]
    kinds = Counter(KINDS[kind] for part in looks for kind in part.kind[part.good])
    return CheckReport(
        name=found.name,
        count=(len(found.train), len(found.test)),
        class_counts=_label_counts(found.class_names, found.train, found.test),
        sizes=_size_range(np.concatenate(seen)),
        kinds=dict(sorted(kinds.items())),
        rejects=rejected(found, looks),
        duplicates=tuple(_duplicates(found, looks)),
        problems=tuple(problems + damage),
        notes=tuple(notes),
        without_labels=without,
    )


def _dead_classes(found: Found, looks: tuple[Looks, Looks]) -> list[str]:
    try:
        refuse_dead_classes(found, looks)
    except PellucidError as error:
        return [str(error)]
    return []


def _duplicates(found: Found, looks: tuple[Looks, Looks]) -> Iterator[tuple[str, str]]:
    """Pairs of paths with the same SHA-256. Only pictures whose size occurs on both sides are read."""
    parts = (found.train, found.test)
    sizes = [images.byte_sizes() for images in parts]
    common = np.intersect1d(sizes[0][looks[0].good], sizes[1][looks[1].good])
    train, test = (
        np.flatnonzero(np.isin(size, common) & part.good) for size, part in zip(sizes, looks, strict=True)
    )
    digests: dict[str, int] = {}
    for i in train.tolist():
        if digest := _digest(found.train, i):
            digests.setdefault(digest, i)
    for i in test.tolist():
        if (digest := _digest(found.test, i)) in digests:
            yield found.train.path(digests[digest]), found.test.path(i)


def _digest(images: EncodedImages, i: int) -> str:
    try:
        return hashlib.sha256(images.encoded(i)).hexdigest()
    except DataError:  # gone since it was looked at, or in a damaged archive
        return ""


def _pixel_digest(images: ImageSet, i: int) -> str:
    image = images.image(i).contiguous()
    return hashlib.sha256(str(tuple(image.shape)).encode() + image.numpy().tobytes()).hexdigest()


def _images(*sets: ImageSet) -> Iterator:
    for images in sets:
        for i in range(len(images)):
            yield images.image(i)


def _label_counts(names: Sequence[str], train: ImageSet, test: ImageSet) -> dict[str, tuple[int, int]]:
    of_train, of_test = Counter(train.labels.tolist()), Counter(test.labels.tolist())
    return {name: (of_train[label], of_test[label]) for label, name in enumerate(names)}


def _size_range(sizes: np.ndarray) -> tuple[Size, Size, Size] | None:
    """Smallest, median and largest of (n, 2) heights and widths."""
    if not len(sizes):
        return None
    ordered = sizes[np.lexsort((sizes[:, 1], sizes[:, 0], sizes[:, 0] * sizes[:, 1]))].tolist()
    smallest, median, largest = (tuple(ordered[k]) for k in (0, len(ordered) // 2, -1))
    return smallest, median, largest
