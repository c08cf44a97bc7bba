"""Batches: which items each optimiser step sees, and the loaders that fetch them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from pellucid.data.crops import Crops, MaskedView, MultiView
from pellucid.data.dataset import ImageSet
from pellucid.data.randomness import order
from pellucid.data.views import View
from pellucid.errors import ConfigError, DataError

Key = tuple[int, int]  # (index, epoch)
Batch = tuple[torch.Tensor | Crops, torch.Tensor, torch.Tensor]
"""x float32 (b, c, h, w) or several views, y int64 (b,), index int64 (b,): which items these are."""


class StepSampler(Sampler[list[Key]]):
    """The items of optimiser steps ``start`` to ``steps`` - 1, as a pure function of (seed, step).

    Step s takes the positions g = s * batch_size + j, j = 0..batch_size - 1, of one endless sequence that
    goes through all n items in ``order(seed, epoch, n)``, epoch after epoch: position g is item
    ``order(seed, g // n, n)[g % n]``. So every batch is full, also when n < batch_size, and every item
    comes once an epoch. A batch is cut into accumulate * world micro-batches, the same ones however they
    are dealt: rank r gets number r, world + r, 2 * world + r, ...

    Yields lists of (index, epoch). Iterating again begins at ``start`` again. Raises ConfigError when the
    batch cannot be cut evenly.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        seed: int,
        steps: int,
        start: int = 0,
        accumulate: int = 1,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if n < 1:
            raise DataError("there is nothing to train on: 0 images")
        if not 0 <= rank < world or accumulate < 1:
            raise ConfigError(f"rank {rank} of {world}, accumulate {accumulate} - ranks count from 0")
        _refuse_uneven(batch_size, accumulate, world)
        self.n = n
        self.batch_size = batch_size
        self.seed = seed
        self.steps = steps
        self.start = start
        self.accumulate = accumulate
        self.rank = rank
        self.world = world
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        """Micro-batches from ``start`` on, for this rank."""
        return max(self.steps - self.start, 0) * self.accumulate

    def __iter__(self) -> Iterator[list[Key]]:
        size = self.batch_size // (self.accumulate * self.world)
        for step in range(self.start, self.steps):
            for turn in range(self.accumulate):
                first = step * self.batch_size + (turn * self.world + self.rank) * size
                yield [self.key(position) for position in range(first, first + size)]

    def key(self, position: int) -> Key:
        """(index, epoch) at a position of the endless sequence."""
        epoch, offset = divmod(position, self.n)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, order(self.seed, epoch, self.n)
        return int(self._order[offset]), epoch


def _refuse_uneven(batch_size: int, accumulate: int, world: int) -> None:
    parts = accumulate * world
    if batch_size >= 1 and batch_size % parts == 0:
        return
    below = batch_size // parts * parts
    sizes = f"{below} or {below + parts}" if below > 0 else str(parts)
    raise ConfigError(
        f"batch size {batch_size} does not divide into {parts} equal parts"
        f" (accumulate {accumulate} x world {world}) - use {sizes}"
    )


class ViewedSet(Dataset[Batch]):
    """Pictures as the model sees them, fetched a batch at a time by (index, epoch)."""

    def __init__(self, images: ImageSet, view: View | MultiView | MaskedView) -> None:
        self.images = images
        self.view = view

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: Key) -> Batch:
        return self.__getitems__([key])

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        indices, epochs = [index for index, _ in keys], [epoch for _, epoch in keys]
        index = torch.tensor(indices, dtype=torch.int64)
        x = self.view.batch(self.images.batch(indices), index, epochs)
        return x, self.images.labels[index], index


def train_loader(
    images: ImageSet,
    view: View | MultiView | MaskedView,
    sampler: StepSampler,
    workers: int = 0,
    timeout: float = 60.0,
) -> DataLoader[Batch]:
    """One Batch per micro-batch of ``sampler``. ``timeout`` seconds for a worker to answer."""
    return fetching(ViewedSet(images, view), sampler, workers, timeout)


def eval_loader(
    images: ImageSet,
    view: View | MultiView,
    batch_size: int = 256,
    workers: int = 0,
    limit: int | None = None,
    timeout: float = 60.0,
) -> DataLoader[Batch]:
    """Every picture once, in index order; with ``limit``, that many, evenly spaced to meet all classes."""
    batches = evenly_spaced(len(images), batch_size, limit)
    return fetching(ViewedSet(images, view), batches, workers, timeout)


def evenly_spaced(n: int, batch_size: int, limit: int | None) -> list[list[Key]]:
    """Batches of n items in index order, or of ``limit`` evenly spaced ones, all of epoch 0."""
    if batch_size < 1 or (limit is not None and limit < 1):
        raise ConfigError(f"batch size {batch_size}, limit {limit} - give at least 1")
    count = n if limit is None else min(limit, n)
    keys = [(k * n // count, 0) for k in range(count)]
    return [keys[first : first + batch_size] for first in range(0, count, batch_size)]


def fetching(
    items: Dataset[Any], batches: StepSampler | list[list[Key]], workers: int, timeout: float
) -> DataLoader[Any]:
    """A loader of what ``items`` makes of each of these batches of keys.

    Each worker runs on one torch thread, as DataLoader sees to itself.
    """
    return DataLoader(
        items,
        batch_sampler=batches,
        collate_fn=_as_fetched,
        num_workers=workers,
        timeout=timeout if workers else 0,
        pin_memory=torch.cuda.is_available(),
        # Without a generator of its own, every iteration would draw from the global random state.
        generator=torch.Generator(),
    )


def _as_fetched(batch: Any) -> Any:
    return batch
