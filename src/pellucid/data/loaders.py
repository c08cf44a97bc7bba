"""Batches: which items each optimiser step sees, and the loaders that fetch them."""

from __future__ import annotations

import faulthandler
import itertools
import logging
import os
import re
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from typing import IO, Any, Generic, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from pellucid.data.crops import Crops, MaskedView, MultiView
from pellucid.data.dataset import ImageSet
from pellucid.data.randomness import order
from pellucid.data.views import View
from pellucid.errors import ConfigError, DataError

Key = tuple[int, int]  # (index, epoch)
Fetched = TypeVar("Fetched")
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

    def name(self, i: int) -> str:
        """What to call an item in a message; safe to print."""
        return self.images.name(i)

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
) -> Fetching[Batch]:
    """One Batch per micro-batch of ``sampler``. ``timeout`` seconds for a worker to answer."""
    return Fetching(ViewedSet(images, view), sampler, workers, timeout)


def eval_loader(
    images: ImageSet,
    view: View | MultiView,
    batch_size: int = 256,
    workers: int = 0,
    limit: int | None = None,
    timeout: float = 60.0,
) -> Fetching[Batch]:
    """Every picture once, in index order; with ``limit``, that many, evenly spaced to meet all classes."""
    batches = evenly_spaced(len(images), batch_size, limit)
    return Fetching(ViewedSet(images, view), batches, workers, timeout)


def evenly_spaced(n: int, batch_size: int, limit: int | None) -> list[list[Key]]:
    """Batches of n items in index order, or of ``limit`` evenly spaced ones, all of epoch 0."""
    if batch_size < 1 or (limit is not None and limit < 1):
        raise ConfigError(f"batch size {batch_size}, limit {limit} - give at least 1")
    count = n if limit is None else min(limit, n)
    keys = [(k * n // count, 0) for k in range(count)]
    return [keys[first : first + batch_size] for first in range(0, count, batch_size)]


class Fetching(Generic[Fetched]):
    """What a data set makes of each of these batches of keys, fetched by so many worker processes.

    What an item becomes is a function of its key, so a worker that dies is replaced and asked again, and no
    batch changes by it. Each worker runs on one torch thread, as DataLoader sees to itself.

    Args:
        items: ``items.__getitems__(keys)`` is a batch; ``items.name(i)``, if there, is what to call one item.
        batches: of (index, epoch). Iterating again begins at the first again.
        workers: 0 fetches in this process.
        timeout: seconds for a worker to answer.

    Raises:
        DataError: while iterating: a worker died twice at one batch, or did not answer in time.
    """

    def __init__(
        self, items: Dataset[Any], batches: StepSampler | list[list[Key]], workers: int, timeout: float
    ) -> None:
        self.items, self.batches, self.workers, self.timeout = items, batches, workers, timeout

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        if not self.workers:
            yield from self._loader(self.items, self.batches)
            return
        done, begun, died_at = 0, 0, -1
        while True:
            counted = _Counted(self.items, self.workers)
            # A file that every worker inherits: where one hangs, it writes down what it is at.
            with tempfile.TemporaryFile() as stacks:
                fetched = self._begun(counted, done, stacks)
                try:
                    while True:
                        batch = self._next(fetched, (done - begun) % self.workers, done, stacks)
                        if batch is None:
                            return
                        yield batch
                        done += 1
                except RuntimeError as error:
                    if not re.search("exited unexpectedly|is killed by signal", str(error)):
                        raise
                    number, how = _ending(fetched)
                    at = begun + counted.batch(number)
                    said = f"data worker {number} of {self.workers} {how} near {self._near(at)}"
                    if died_at == at:
                        raise DataError(
                            f"{said}: it died there twice\nlook at those files, take fewer --workers for "
                            f"more memory, or --workers 0 to see its own error"
                        ) from error
                    logging.getLogger("pellucid").warning("%s - trying once more with new ones", said)
                    begun, died_at = done, at
                    del fetched

    def _begun(self, counted: _Counted, done: int, stacks: IO[bytes]) -> Iterator[Any]:
        """Workers at work. PyTorch's handler for one that dies would raise in the middle of a step."""
        before = signal.getsignal(signal.SIGCHLD)
        if getattr(before, "__module__", "") == "torch.utils.data._utils.signal_handling":
            before = signal.SIG_DFL  # of another DataLoader in this process
        fetched = iter(self._loader(counted, _From(self.batches, done), stacks))
        if threading.current_thread() is threading.main_thread() and before is not None:
            signal.signal(signal.SIGCHLD, before)
        return fetched

    def _next(self, fetched: Iterator[Any], number: int, done: int, stacks: IO[bytes]) -> Any:
        """The next batch, or None behind the last one. RuntimeError where a worker is dead."""
        asked = time.monotonic()
        while True:
            try:
                return next(fetched, None)
            except RuntimeError as error:
                if "DataLoader timed out" not in str(error):
                    raise
                if time.monotonic() - asked >= self.timeout:
                    raise DataError(self._hung(fetched, number, done, stacks)) from error

    def _loader(
        self,
        items: Dataset[Any],
        batches: StepSampler | list[list[Key]] | _From,
        stacks: IO[bytes] | None = None,
    ) -> DataLoader[Any]:
        def begin(_: int) -> None:
            if stacks is not None:
                faulthandler.register(signal.SIGUSR2, file=stacks, all_threads=False)

        return DataLoader(
            items,
            batch_sampler=batches,
            collate_fn=_as_fetched,
            num_workers=self.workers,
            # So often it is seen whether a worker has died; after a time-out, one may go on waiting.
            timeout=min(1.0, self.timeout) if self.workers else 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=begin if self.workers else None,
            # Without a generator of its own, every iteration would draw from the global random state.
            generator=torch.Generator(),
        )

    def _near(self, done: int) -> str:
        """The items of a batch."""
        keys = next(itertools.islice(iter(self.batches), done, None), [])
        name = getattr(self.items, "name", lambda i: f"item {i}")
        names = [name(index) for index, _ in keys[:2]]
        return f"{', '.join(names)}{', ...' if len(keys) > 2 else ''}"

    def _hung(self, fetched: Any, number: int, done: int, stacks: IO[bytes]) -> str:
        at = ""
        workers = getattr(fetched, "_workers", [])
        if number < len(workers) and workers[number].is_alive():
            os.kill(workers[number].pid, signal.SIGUSR2)
            time.sleep(0.2)
            stacks.seek(0)
            frames = [line.strip() for line in stacks.read().decode(errors="replace").splitlines()]
            at = next((f", at {frame}" for frame in frames if frame.startswith("File ")), "")
        return (
            f"data worker {number} of {self.workers} has not answered for {self.timeout:g} s near "
            f"{self._near(done)}{at} - a slow disk? give a longer --data-timeout, or fewer --workers"
        )


class _Counted(Dataset[Any]):
    """A data set that keeps count, for the parent, of the batches that each worker has begun."""

    def __init__(self, items: Any, workers: int) -> None:
        self.items, self.workers = items, workers
        self.begun = torch.zeros(workers, dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.items)

    def __getitems__(self, keys: Sequence[Key]) -> Any:
        told = get_worker_info()
        if told is not None:
            self.begun[told.id] += 1
        return self.items.__getitems__(keys)

    def batch(self, number: int) -> int:
        """The batch, counted from the first that was dealt out, that worker ``number`` was last at."""
        return number + max(0, int(self.begun[number]) - 1) * self.workers


def _ending(fetched: Any) -> tuple[int, str]:
    """Which worker is gone, how, and why that may be."""
    ended = [(i, w.exitcode) for i, w in enumerate(fetched._workers) if w.exitcode is not None]
    number, code = ended[0] if ended else (0, 0)
    if code >= 0:
        return number, f"ended with exit code {code}"
    by = signal.Signals(-code)
    likely = "likely for want of memory" if by == signal.SIGKILL else "likely a crash in what reads files"
    return number, f"was killed by {by.name} ({likely})"


class _From:
    """The batches from a place on."""

    def __init__(self, batches: StepSampler | list[list[Key]], first: int) -> None:
        self.batches, self.first = batches, first

    def __len__(self) -> int:
        return max(0, len(self.batches) - self.first)

    def __iter__(self) -> Iterator[list[Key]]:
        return itertools.islice(iter(self.batches), self.first, None)


def _as_fetched(batch: Any) -> Any:
    return batch
