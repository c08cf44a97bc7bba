"""Which items each step sees, and that workers make no difference."""

import itertools
import os
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pellucid.data import ArrayImages, FileImages, StepSampler, View, eval_loader, order, train_loader
from pellucid.data.dataset import ImageSet
from pellucid.errors import ConfigError, DataError

VIEW = View((8, 8), 1, (0.3,), (0.4,), augment="small", flip=True, seed=5)

GOLDEN_STEPS = [
    [(2, 0), (1, 0), (3, 0), (0, 0)],
    [(4, 0), (2, 1), (1, 1), (3, 1)],
    [(0, 1), (4, 1), (0, 2), (2, 2)],
]


@pytest.fixture(autouse=True)
def _few_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def arrays(n=23):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (n, 1, 8, 8), dtype=torch.uint8, generator=generator)
    return ArrayImages(x, torch.arange(n) % 3, "noise")


def files(tmp_path, n=12):
    rng = np.random.default_rng(0)
    paths = [str(tmp_path / f"{i}.png") for i in range(n)]
    for i, path in enumerate(paths):
        Image.fromarray(rng.integers(0, 256, (9 + i, 20 - i), dtype=np.uint8)).save(path)
    (tmp_path / "5.png").write_bytes(b"")  # a substitute stands in, with workers too
    return FileImages(paths, torch.arange(n) % 2)


def flat(batches):
    return list(itertools.chain.from_iterable(batches))


# --- the sampler --------------------------------------------------------------------------------------


def test_golden_steps():
    batches = list(StepSampler(n=5, batch_size=4, seed=0, steps=3))
    assert batches == GOLDEN_STEPS


@given(st.integers(1, 40), st.integers(1, 60), st.integers(0, 2**32), st.integers(1, 8))
@settings(deadline=None, max_examples=60)
def test_every_item_once_an_epoch(n, batch_size, seed, steps):
    keys = flat(StepSampler(n, batch_size, seed, steps))
    assert len(keys) == steps * batch_size  # every batch is full, also when n < batch_size
    for epoch in range(len(keys) // n):
        of_epoch = keys[epoch * n : (epoch + 1) * n]
        assert of_epoch == [(item, epoch) for item in order(seed, epoch, n).tolist()]
        assert sorted(item for item, _ in of_epoch) == list(range(n))


@given(st.integers(1, 40), st.integers(0, 9), st.integers(1, 3))
@settings(deadline=None, max_examples=40)
def test_resuming_at_a_step_gives_the_tail(n, start, accumulate):
    whole = StepSampler(n, 6, seed=3, steps=9, accumulate=accumulate)
    tail = StepSampler(n, 6, seed=3, steps=9, start=start, accumulate=accumulate)
    assert list(tail) == list(whole)[start * accumulate :]
    assert len(tail) == len(list(tail)) == (9 - start) * accumulate
    assert list(tail) == list(tail)


@pytest.mark.parametrize("parts", [(1, 2), (2, 1), (2, 2), (4, 1), (1, 4)])
def test_ranks_and_accumulation_share_out_the_same_batch_in_order(parts):
    accumulate, world = parts
    whole = list(StepSampler(10, 8, seed=1, steps=5))
    ranks = [list(StepSampler(10, 8, 1, 5, accumulate=accumulate, rank=r, world=world)) for r in range(world)]
    for step, batch in enumerate(whole):
        micro = [ranks[r][step * accumulate + turn] for turn in range(accumulate) for r in range(world)]
        assert flat(micro) == batch
        assert {len(part) for part in micro} == {8 // (accumulate * world)}


def test_the_same_micro_batches_for_two_ranks_as_for_two_turns():
    turns = list(StepSampler(10, 8, seed=1, steps=5, accumulate=2))
    first, second = (list(StepSampler(10, 8, 1, 5, rank=r, world=2)) for r in (0, 1))
    assert turns == flat(zip(first, second, strict=True))


def test_what_cannot_be():
    with pytest.raises(ConfigError, match=r"10 .* 4 equal parts \(accumulate 2 x world 2\) - use 8 or 12$"):
        StepSampler(5, 10, 0, 1, accumulate=2, world=2)
    with pytest.raises(ConfigError, match=r"use 4$"):
        StepSampler(5, 3, 0, 1, world=4)
    with pytest.raises(ConfigError, match="batch size 0"):
        StepSampler(5, 0, 0, 1)
    with pytest.raises(ConfigError, match="rank 2 of 2"):
        StepSampler(5, 2, 0, 1, rank=2, world=2)
    with pytest.raises(DataError, match="0 images"):
        StepSampler(0, 2, 0, 1)


# --- loaders ------------------------------------------------------------------------------------------


def test_a_batch_is_pictures_labels_and_their_indices():
    images = arrays()
    (first, *_), keys = (
        train_loader(images, VIEW, StepSampler(23, 6, 0, 2)),
        next(iter(StepSampler(23, 6, 0, 2))),
    )
    x, y, index = first
    assert index.tolist() == [item for item, _ in keys]
    assert torch.equal(y, images.labels[index])
    assert torch.equal(x, VIEW.batch(images.images[index], index, 0))
    assert (x.dtype, y.dtype, index.dtype) == (torch.float32, torch.int64, torch.int64)


def test_an_item_is_seen_with_its_own_epoch_in_a_batch_across_epochs():
    images = arrays(n=5)
    x, _, index = next(iter(train_loader(images, VIEW, StepSampler(5, 8, 0, 1))))
    for row, (item, epoch) in enumerate(next(iter(StepSampler(5, 8, 0, 1)))):
        assert index[row] == item
        assert torch.equal(x[row], VIEW.batch(images.images[item][None], [item], epoch)[0])


@pytest.mark.parametrize("in_files", [False, True])
def test_workers_make_no_difference(tmp_path, in_files):
    images = files(tmp_path) if in_files else arrays()
    view = View((8, 8), 1, (0.3,), (0.4,), augment="photo" if in_files else "small", flip=True)
    sampler = StepSampler(len(images), 6, seed=2, steps=5)
    alone, helped = (list(train_loader(images, view, sampler, workers=workers)) for workers in (0, 2))
    assert len(alone) == len(helped) == 5
    for one, other in zip(alone, helped, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_global_randomness_is_neither_read_nor_moved():
    loader = train_loader(arrays(), VIEW, StepSampler(23, 6, 0, 2))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = [x for x, _, _ in loader]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, (b, _, _) in zip(first, loader, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_sees_every_item_once_in_order(workers):
    images = arrays()
    plain = View((8, 8), 1, (0.3,), (0.4,))
    batches = list(eval_loader(images, plain, batch_size=10, workers=workers))
    assert [len(y) for _, y, _ in batches] == [10, 10, 3]
    assert torch.cat([index for _, _, index in batches]).tolist() == list(range(23))
    assert torch.equal(torch.cat([y for _, y, _ in batches]), images.labels)
    assert torch.equal(torch.cat([x for x, _, _ in batches]), plain.batch(images.images, range(23)))


def test_a_limited_evaluation_is_spread_over_all():
    loader = eval_loader(arrays(), VIEW, batch_size=3, limit=4)
    assert torch.cat([index for _, _, index in loader]).tolist() == [0, 5, 11, 17]
    assert len(next(iter(eval_loader(arrays(), VIEW, limit=100)))[1]) == 23
    with pytest.raises(ConfigError, match="limit 0"):
        eval_loader(arrays(), VIEW, limit=0)


class Spy(ImageSet):
    """Pictures that tell about the process that fetches them."""

    def __init__(self, slow=0.0):
        self.labels = torch.zeros(4, dtype=torch.int64)
        self.slow = slow

    def image(self, i):
        time.sleep(self.slow)
        return torch.tensor([[[torch.get_num_threads(), os.getpid() % 251]]], dtype=torch.uint8)

    def batch(self, indices):
        return [self.image(i) for i in indices]

    def name(self, i):
        return f"spy[{i}]"

    paths = ()

    def for_statistics(self):
        return iter(())


def test_a_worker_has_one_thread():
    torch.set_num_threads(2)
    view = View((1, 2), 1, (0.0,), (1 / 255,))
    x, _, _ = next(iter(eval_loader(Spy(), view, workers=1)))
    threads, process = x[0].flatten().round().int().tolist()
    assert threads == 1
    assert process != os.getpid() % 251


def test_a_worker_that_hangs_is_noticed():
    loader = eval_loader(Spy(slow=30.0), View((1, 2), 1, (0.0,), (1.0,)), batch_size=1, workers=1, timeout=1)
    with pytest.raises(
        DataError, match=r"worker 0 of 1 has not answered for 1 s near spy\[0\], at File .*\bimage"
    ):
        next(iter(loader))
