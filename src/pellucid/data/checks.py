"""The work behind ``pellucid check``: everything that is wrong with a data set, listed and not raised."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pellucid.data.dataset import ImageData, ImageSet, Reject
from pellucid.data.folders import ImageFile, Layout, Split, find_layout, labelled, problems, split
from pellucid.data.images import MAX_PIXELS, show_name
from pellucid.data.load import (
    MAX_BAD,
    Spec,
    distinct,
    file_images,
    folder_of,
    is_in_memory,
    load_in_memory,
    title,
)
from pellucid.data.verify import Look, look_at, rejected, too_many_rejects
from pellucid.errors import PellucidError

SHOWN = 20  # lines of one kind at most

Size = tuple[int, int]


@dataclass(frozen=True)
class CheckReport:
    """What a data set holds and what is wrong with it.

    ``class_counts``: class -> images to train on, to test on (for a folder that cannot be split: all of
    them, 0). ``sizes``: smallest, median and largest (height, width) by area. ``kinds``: how many
    pictures are gray, colour, alpha, ... ``duplicates``: pairs (in train, in test) with the same bytes.
    ``problems``: what load_data would refuse. ``notes``: what it passes over.
    """

    name: str
    class_counts: dict[str, tuple[int, int]]
    sizes: tuple[Size, Size, Size] | None
    kinds: dict[str, int]
    rejects: tuple[Reject, ...]
    duplicates: tuple[tuple[str, str], ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether load_data accepts it and no test picture is also trained on."""
        return not self.problems and not self.duplicates

    def lines(self) -> list[str]:
        """The report as text, safe to print."""
        return [line for part in self._sections() for text in part for line in text.splitlines()]

    def _sections(self) -> Iterator[list[str]]:
        train, test = (sum(count[k] for count in self.class_counts.values()) for k in (0, 1))
        yield [
            f"{self.name}: {train + test:,} images in {len(self.class_counts)} classes, {train:,} + {test:,}"
        ]
        yield _listed(
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
            yield _listed(f"  {show_name(reject.path)}: {reject.reason}" for reject in self.rejects)
        if self.duplicates:
            yield [f"{len(self.duplicates):,} test images are also in train, so scores will be too good"]
            yield _listed(f"  {show_name(train)} = {show_name(test)}" for train, test in self.duplicates)
        yield _listed(f"note: {note}" for note in self.notes)
        yield _listed(f"problem: {problem}" for problem in self.problems)
        yield ["ok" if self.ok else "not ok"]


def check(
    spec: Spec,
    *,
    download: bool = False,
    root: str | os.PathLike[str] | None = None,
    split_seed: int = 0,
    test_fraction: float | None = None,
    max_pixels: int = MAX_PIXELS,
    max_bad: float = MAX_BAD,
) -> CheckReport:
    """Look at a whole data set, with load_data's arguments. What load_data would refuse is listed."""
    if isinstance(spec, ImageData):
        return _check_loaded(spec)
    path = os.fspath(spec)
    try:
        if is_in_memory(path):
            loaded = load_in_memory(path, root, download, test_fraction, split_seed, test_only=False)
            return _check_loaded(loaded)
        layout = find_layout(folder_of(path, root))
    except PellucidError as error:
        return CheckReport(title(path), {}, None, {}, (), (), (str(error),), ())
    return _check_folder(title(path), layout, split_seed, test_fraction, max_pixels, max_bad)


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
        class_counts=_label_counts(data.class_names, data.train.labels.tolist(), data.test.labels.tolist()),
        sizes=_size_range(list(sizes.elements())),
        kinds={"gray" if c == 1 else "colour": count for c, count in sorted(channels.items())},
        rejects=data.rejects,
        duplicates=tuple(pairs),
        problems=(),
        notes=(),
    )


def _check_folder(
    name: str, layout: Layout, seed: int, test_fraction: float | None, max_pixels: int, max_bad: float
) -> CheckReport:
    found = problems(layout)
    files = Split(labelled(layout, layout.train), [])
    if layout.test is not None:
        files = files._replace(test=labelled(layout, layout.test))
    if splits := not found:
        try:
            files = split(layout, test_fraction=test_fraction, seed=seed)
        except PellucidError as error:
            found.append(str(error))
            splits = False
    looks = look_at(distinct(files), max_pixels=max_pixels)
    if message := too_many_rejects(looks, max_bad=max_bad, where=layout.root):
        found.append(message)
    if splits:
        found += _dead_classes(layout, files, looks, max_pixels)
    headers = [look.header for look in looks if look.header is not None]
    return CheckReport(
        name=name,
        class_counts=_label_counts(layout.class_names, *([label for _, label in part] for part in files)),
        sizes=_size_range([(header.height, header.width) for header in headers]),
        kinds=dict(sorted(Counter(header.kind for header in headers).items())),
        rejects=rejected(looks) + layout.unlisted,
        duplicates=tuple(_duplicates(files, looks)),
        problems=tuple(found),
        notes=tuple(_notes(layout)),
    )


def _dead_classes(layout: Layout, files: Split, looks: Sequence[Look], max_pixels: int) -> list[str]:
    try:
        file_images(files, looks, layout, max_pixels)
    except PellucidError as error:
        return [str(error)]
    return []


def _notes(layout: Layout) -> Iterator[str]:
    for tree in layout.trees:
        if tree.loose:
            yield f"{tree.loose:,} images directly in {show_name(tree.root)} are in no class and ignored"
        for link in tree.links:
            yield f"{show_name(link)} is a link to a folder, not followed"


def _duplicates(files: Split, looks: Sequence[Look]) -> Iterator[tuple[str, str]]:
    """Pairs of paths with the same SHA-256. Only files whose size occurs on both sides are read."""
    readable = {look.file.path for look in looks if look.reason is None}
    train, test = ([file for file, _ in part if file.path in readable] for part in files)
    sizes = {file.size for file in train} & {file.size for file in test}
    digests: dict[str, str] = {}
    for file in train:
        if file.size in sizes and (digest := _file_digest(file)):
            digests.setdefault(digest, file.path)
    for file in test:
        if file.size in sizes and (digest := _file_digest(file)) and digest in digests:
            yield digests[digest], file.path


def _file_digest(file: ImageFile) -> str | None:
    try:
        with open(file.path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError:  # gone since it was looked at
        return None


def _pixel_digest(images: ImageSet, i: int) -> str:
    image = images.image(i).contiguous()
    return hashlib.sha256(str(tuple(image.shape)).encode() + image.numpy().tobytes()).hexdigest()


def _images(*sets: ImageSet) -> Iterator:
    for images in sets:
        for i in range(len(images)):
            yield images.image(i)


def _label_counts(names: Sequence[str], train: list[int], test: list[int]) -> dict[str, tuple[int, int]]:
    of_train, of_test = Counter(train), Counter(test)
    return {name: (of_train[label], of_test[label]) for label, name in enumerate(names)}


def _size_range(sizes: list[Size]) -> tuple[Size, Size, Size] | None:
    if not sizes:
        return None
    ordered = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    return ordered[0], ordered[len(ordered) // 2], ordered[-1]


def _listed(lines: Iterator[str] | list[str]) -> list[str]:
    """The first ``SHOWN`` lines, and how many more there are."""
    every = list(lines)
    rest = len(every) - SHOWN
    return every if rest <= 1 else [*every[:SHOWN], f"  ... and {rest:,} more"]
