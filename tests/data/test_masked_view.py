"""Which patches a batch says to hide."""

import numpy as np
import pytest
import torch

from pellucid.data import ArrayImages, MaskedView, Masking, StepSampler, View, draws, train_loader

MASKING = Masking((4, 4), share=(0.75, 0.75), chance=1.0, blobs=False)
PICTURES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (40, 1, 8, 8), dtype=np.uint8))


def masked(augment="small", seed=0):
    return MaskedView(View((8, 8), 1, (0.5,), (0.5,), augment=augment, seed=seed), MASKING)


@pytest.mark.parametrize("augment", ["none", "small", "photo"])
def test_a_picture_is_what_its_view_shows(augment):
    crops = masked(augment).batch(PICTURES, range(40), 3)
    assert torch.equal(crops.large[:, 0], masked(augment).view.batch(PICTURES, range(40), 3))
    assert crops.large.shape == (40, 1, 1, 8, 8)
    assert crops.small.shape == (40, 0, 1, 8, 8)
    assert crops.mask.shape == (40, 1, 16)


def test_every_picture_hides_as_many_and_none_the_same_ones():
    mask = masked().batch(PICTURES, range(40)).mask[:, 0]
    assert mask.sum(-1).tolist() == [12] * 40
    assert len(mask.unique(dim=0)) > 35
    counts = masked().masking.mask(draws(1, 0, range(4000), MASKING.draws)).float().mean(0)
    assert (counts - 0.75).abs().max() < 0.03, "no place is hidden more often than others"


@pytest.mark.parametrize("share", [1 / 16, 0.5, 15 / 16])
def test_any_share(share):
    masking = Masking((4, 4), share=(share, share), chance=1.0, blobs=False)
    mask = masking.mask(draws(0, 0, range(100), masking.draws))
    assert mask.sum(-1).tolist() == [round(16 * share)] * 100


def test_a_mask_belongs_to_seed_epoch_and_item():
    whole = masked().batch(PICTURES, range(40), 2)
    for index in ([7], [39, 7, 0]):
        part = masked().batch(PICTURES[index], index, 2)
        assert torch.equal(part.mask, whole.mask[index])
        assert torch.equal(part.large, whole.large[index])
    assert not torch.equal(masked().batch(PICTURES, range(40), 1).mask, whole.mask)
    assert not torch.equal(masked(seed=1).batch(PICTURES, range(40), 2).mask, whole.mask)


def test_the_mask_shares_no_number_with_the_augmentation():
    """Or pictures turned to the left would hide other patches than those turned to the right."""
    uniform = draws(0, 0, range(2000), 5)
    mask = masked("none").batch(PICTURES[:1].expand(2000, -1, -1, -1), range(2000)).mask[:, 0]
    together = torch.cat([torch.from_numpy(uniform), mask.double()], 1).T.corrcoef()[:5, 5:]
    assert together.abs().max() < 0.1


@pytest.mark.parametrize(("accumulate", "world"), [(4, 1), (1, 2), (2, 2)])
def test_no_cut_of_a_batch_changes_a_mask(accumulate, world):
    images = ArrayImages(PICTURES, torch.arange(40), "noise")
    whole = next(iter(train_loader(images, masked(), StepSampler(40, 16, 0, 1))))
    parts = [
        list(
            train_loader(
                images, masked(), StepSampler(40, 16, 0, 1, accumulate=accumulate, rank=r, world=world)
            )
        )
        for r in range(world)
    ]
    dealt = [parts[r][turn] for turn in range(accumulate) for r in range(world)]
    assert torch.equal(torch.cat([batch[2] for batch in dealt]), whole[2])
    for name in ("large", "mask"):
        assert torch.equal(torch.cat([getattr(b[0], name) for b in dealt]), getattr(whole[0], name))


def test_workers_make_the_same_masks():
    images = ArrayImages(PICTURES, torch.arange(40), "noise")
    here, there = (
        [
            batch[0].mask
            for batch in train_loader(images, masked(), StepSampler(40, 10, 0, 3), workers=workers)
        ]
        for workers in (0, 2)
    )
    assert len(here) == 3
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))
