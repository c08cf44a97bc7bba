"""Sets of labelled pictures, in memory or in files, and what a training run must know about them."""

from __future__ import annotations

import hashlib
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Self, final

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from pellucid.data.images import MAX_PIXELS, ImageRejected, file_bytes, read_image, show_name, to_channels
from pellucid.errors import DataError

NATURAL_SIZE_LIMIT = 64  # pixels; up to here a common size is kept, above it pictures are resized
STATISTICS_SAMPLE = 2000  # files at most that are decoded for the mean and standard deviation
STD_FLOOR = 1 / 255  # one gray level: a constant channel is centred, and not divided by zero

_log = logging.getLogger(__name__)


class Reject(NamedTuple):
    """A file that cannot be used. ``path`` is as the file system has it: print it with show_name."""

    path: str
    reason: str


class ImageSet(Dataset[torch.Tensor], ABC):
    """n pictures. ``labels``: int64 (n,), indices into the class names, -1 where none is known."""

    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.image(i)

    @abstractmethod
    def image(self, i: int) -> torch.Tensor:
        """Picture i, uint8 (c, h, w): c = 1 is gray, 3 is RGB, and arrays may have other channels."""

    @abstractmethod
    def batch(self, indices: Sequence[int]) -> torch.Tensor | list[torch.Tensor]:
        """Pictures as one uint8 (b, c, h, w) where they share a size by construction, else as a list."""

    @abstractmethod
    def name(self, i: int) -> str:
        """What to call picture i in a message; safe to print."""

    def path(self, i: int) -> str:
        """Where picture i is: the path of a file as it is, or ``digits[12]`` for what is none."""
        return self.name(i)

    def relative(self, i: int) -> str:
        """What picture i is called within its data set, as it is: print it with show_name."""
        return self.name(i)

    @property
    def bad(self) -> frozenset[int]:
        """Pictures for which another one stands in, as far as is known by now."""
        return frozenset()

    @property
    def paths(self) -> list[str]:
        """``path`` of every item."""
        return [self.path(i) for i in range(len(self))]

    @abstractmethod
    def for_statistics(self) -> Iterator[torch.Tensor]:
        """The pictures that stand for all: uint8 (b, c, h, w) pieces, the same ones every time."""


@final
class ArrayImages(ImageSet):
    """Pictures in memory, all of one size: ``images`` uint8 (n, c, h, w)."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, name: str) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4 or len(images) != len(labels):
            raise DataError(
                f"{name}: images {images.dtype} {tuple(images.shape)} with {len(labels)} labels"
                " - give uint8 (n, c, h, w) and n labels"
            )
        self.images = images
        self.labels = labels.to(torch.int64)
        self._name = name

    def image(self, i: int) -> torch.Tensor:
        return self.images[i]

    def batch(self, indices: Sequence[int]) -> torch.Tensor:
        return self.images[torch.as_tensor(indices, dtype=torch.int64)]

    def name(self, i: int) -> str:
        return f"{self._name}[{i}]"

    def for_statistics(self) -> Iterator[torch.Tensor]:
        yield from self.images.split(1024)


class EncodedImages(ImageSet):
    """Pictures that are decoded when asked for.

    For one that cannot be read stands the next readable one of the same class (without labels: the next
    one), in index order and round the end: which picture item i shows depends on i alone, and one bad file
    never stops a run. Those named in ``bad`` are not tried. Raises DataError once a whole class cannot be
    read.
    """

    def __init__(self, labels: torch.Tensor, bad: Iterable[int], max_pixels: int) -> None:
        self.labels = labels.to(torch.int64)
        self.max_pixels = max_pixels
        self._bad = set(bad)

    @abstractmethod
    def source(self, i: int) -> str | bytes:
        """What the image door takes: the path of picture i, or the bytes of its file."""

    @abstractmethod
    def byte_sizes(self) -> npt.NDArray[np.int64]:
        """(n,): bytes of each file; 0 where it is not there."""

    @abstractmethod
    def _taken(self, indices: npt.NDArray[np.int64]) -> Self:
        """The same pictures, in this order, labels and all."""

    def taken(self, indices: npt.ArrayLike) -> Self:
        """The set of these pictures, in this order; which of them are bad is kept."""
        rows = np.asarray(indices, dtype=np.int64)
        part = self._taken(rows)
        part.reject(np.flatnonzero(np.isin(rows, sorted(self._bad))).tolist())
        return part

    @property
    def bad(self) -> frozenset[int]:
        return frozenset(self._bad)

    def reject(self, indices: Iterable[int]) -> None:
        """From now on another picture stands in for each of these."""
        self._bad.update(indices)

    def encoded(self, i: int) -> bytes:
        """The file of picture i, as it is. Raises ImageRejected."""
        source = self.source(i)
        return source if isinstance(source, bytes) else file_bytes(source)

    def image(self, i: int) -> torch.Tensor:
        for candidate in self._candidates(i):
            if candidate in self._bad:
                continue
            try:
                return read_image(self.source(candidate), max_pixels=self.max_pixels)
            except ImageRejected as error:
                _log.warning(
                    "rejected: %s - %s; the next picture of its class stands in",
                    error.reason,
                    self.name(candidate),
                )
                self._bad.add(candidate)
        of_class = "" if self.labels[i] < 0 else f" in the class of {self.name(i)}"
        raise DataError(
            f"no readable image is left{of_class} - run pellucid check, then replace what it names"
        )

    def batch(self, indices: Sequence[int]) -> list[torch.Tensor]:
        return [self.image(i) for i in indices]

    def for_statistics(self) -> Iterator[torch.Tensor]:
        count = min(len(self), STATISTICS_SAMPLE)
        for k in range(count):
            yield self.image(k * len(self) // count)[None]

    def _candidates(self, i: int) -> Iterator[int]:
        yield i
        members = self._members[int(self.labels[i])]
        here = int(np.searchsorted(members, i))
        for step in range(1, len(members)):
            yield int(members[(here + step) % len(members)])

    @cached_property
    def _members(self) -> dict[int, np.ndarray]:
        """Class -> its indices, ascending."""
        labels = self.labels.numpy()
        return {int(label): np.flatnonzero(labels == label) for label in np.unique(labels)}


@final
class FileImages(EncodedImages):
    """Pictures in files of their own; ``root`` is the folder of the data set."""

    def __init__(
        self,
        paths: Sequence[str],
        labels: torch.Tensor,
        *,
        root: str = "",
        bad: Iterable[int] = (),
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        super().__init__(labels, bad, max_pixels)
        self.root = root
        self._paths = list(paths)

    def source(self, i: int) -> str:
        return self._paths[i]

    def byte_sizes(self) -> npt.NDArray[np.int64]:
        return np.array([_file_size(path) for path in self._paths], dtype=np.int64)

    def name(self, i: int) -> str:
        return show_name(self._paths[i])

    def relative(self, i: int) -> str:
        return os.path.relpath(self._paths[i], self.root) if self.root else self._paths[i]

    def path(self, i: int) -> str:
        return self._paths[i]

    def _taken(self, indices: npt.NDArray[np.int64]) -> FileImages:
        paths = [self._paths[i] for i in indices]
        return FileImages(paths, self.labels[indices], root=self.root, max_pixels=self.max_pixels)


def _file_size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:  # the image door names the reason
        return 0


@dataclass(frozen=True)
class ImageData:
    """A data set ready to train on.

    ``class_names`` is empty when there are no labels, and every label is -1 then. ``mean`` and ``std`` are
    per channel, on the scale 0..1, of training images only. ``img_size`` is (height, width) when all training
    images share one of at most 64 pixels, else None. ``rejects`` are still in the index, with a substitute of
    their class, but for those that ``pack`` left out. ``fingerprint`` (SHA-256) changes when files are added,
    removed, renamed or change their size; for arrays and packed shards, when a byte changes.
    """

    name: str
    train: ImageSet
    test: ImageSet
    class_names: list[str]
    in_chans: int
    img_size: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    rejects: tuple[Reject, ...]
    fingerprint: str

    @property
    def small(self) -> bool:
        """Whether the pictures keep their own size."""
        return self.img_size is not None


def channel_statistics(images: ImageSet, in_chans: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, 0..1; every picture weighs the same, whatever its size.

    From the histogram of gray levels, so that it is exact. The standard deviation is at least one level.
    """
    histogram = torch.zeros(in_chans, 256, dtype=torch.float64)
    for piece in images.for_statistics():
        pixels = to_channels(piece, in_chans).transpose(0, 1).reshape(in_chans, -1)
        counts = torch.stack([torch.bincount(channel, minlength=256) for channel in pixels])
        histogram += counts.double() * (len(piece) / pixels.shape[1])
    histogram /= histogram.sum(dim=1, keepdim=True)
    level = torch.arange(256, dtype=torch.float64) / 255
    mean = histogram @ level
    variance = (histogram * (level - mean[:, None]) ** 2).sum(dim=1)
    return tuple(mean.tolist()), tuple(variance.sqrt().clamp_min(STD_FLOOR).tolist())


def natural_size(sizes: Iterable[tuple[int, int]]) -> tuple[int, int] | None:
    """The (height, width) that all pictures share, if it is small enough to train at; else None."""
    distinct = set(sizes)
    if len(distinct) != 1:
        return None
    size = distinct.pop()
    return size if max(size) <= NATURAL_SIZE_LIMIT else None


def describe(
    name: str,
    train: ImageSet,
    test: ImageSet,
    class_names: list[str],
    *,
    in_chans: int,
    img_size: tuple[int, int] | None,
    rejects: tuple[Reject, ...],
    fingerprint: str,
) -> ImageData:
    """ImageData with its statistics measured."""
    mean, std = channel_statistics(train, in_chans)
    return ImageData(
        name,
        train,
        test,
        class_names,
        in_chans,
        img_size,
        mean,
        std,
        rejects=rejects,
        fingerprint=fingerprint,
    )


def from_arrays(name: str, train: ArrayImages, test: ArrayImages, class_names: list[str]) -> ImageData:
    """ImageData of pictures in memory."""
    height, width = train.images.shape[-2:]
    return describe(
        name,
        train,
        test,
        class_names,
        in_chans=train.images.shape[1],
        img_size=natural_size([(height, width)]),
        rejects=(),
        fingerprint=_array_fingerprint([train, test], class_names),
    )


def _array_fingerprint(sets: Sequence[ArrayImages], class_names: Sequence[str]) -> str:
    digest = hashlib.sha256("\n".join(class_names).encode())
    for part in sets:
        digest.update(str(tuple(part.images.shape)).encode())
        digest.update(part.images.contiguous().numpy().data)
        digest.update(part.labels.contiguous().numpy().data)
    return digest.hexdigest()
