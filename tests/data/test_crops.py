"""Several views of a picture: functions of what, which parts of it, in which colours, and what is hidden."""

import math
import random

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv

from pellucid.data import (
    ArrayImages,
    Colour,
    Crops,
    Masking,
    MultiView,
    StepSampler,
    View,
    draws,
    train_loader,
)
from pellucid.data.crops import NO_COLOUR, SMALL_COLOUR, recoloured
from pellucid.errors import ConfigError

MASKING = Masking((4, 4))
NAMES = ("large", "small", "mask")


def pictures(n, size=(8, 8), channels=1, seed=0):
    return torch.from_numpy(
        np.random.default_rng(seed).integers(0, 256, (n, channels, *size), dtype=np.uint8)
    )


def plain(size, channels=1, augment="small", flip=False, seed=0):
    """A view whose output is the gray levels 0..1."""
    return View(size, channels, (0.0,) * channels, (1.0,) * channels, augment=augment, flip=flip, seed=seed)


def views(augment="small", channels=3, seed=0, **options):
    """Two large crops of 24 x 24 and three small ones of 16 x 16."""
    sizes = {"small": 3, "small_size": (16, 16), "masking": MASKING}
    return MultiView(plain((24, 24), channels, augment, flip=True, seed=seed), **(sizes | options))


def equal(one: Crops, other: Crops) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in NAMES)


def ramp(height, width):
    """Red says the row, green the column, each from 0 to 255 over the picture."""
    rows = torch.linspace(0, 255, height)[:, None].expand(height, width)
    columns = torch.linspace(0, 255, width).expand(height, width)
    return torch.stack([rows, columns, torch.zeros(height, width)]).to(torch.uint8)


# --- views are functions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("augment", ["none", "small", "photo"])
@pytest.mark.parametrize(("channels", "size"), [(1, (24, 24)), (3, (40, 31)), (4, (30, 24)), (7, (24, 24))])
def test_views_depend_on_seed_epoch_and_index_alone(augment, channels, size):
    view = views(augment, channels)
    x, index = pictures(9, size, channels), np.arange(100, 109)
    whole = view.batch(x, index, 4)
    assert whole.large.shape == (9, 2, channels, 24, 24)
    assert whole.small.shape == (9, 3, channels, 16, 16)
    assert whole.mask.shape == (9, 2, 16)
    assert all(part.isfinite().all() for part in whole[:2])
    for part in ([0], [8], [7, 3, 5, 0]):
        torch.manual_seed(len(part))
        np.random.seed(len(part))  # noqa: NPY002 - poison: nothing may read the global state
        random.seed(len(part))
        expected = Crops(*(views[part] for views in whole))
        assert equal(view.batch(x[part], torch.from_numpy(index)[part], 4), expected)
        assert equal(view.batch([x[i] for i in part], index[part], [4] * len(part)), expected)
    state = torch.get_rng_state()
    view.batch(x, index, 4)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("augment", ["small", "photo"])
def test_every_seed_epoch_item_and_crop_is_another_one(augment):
    x = pictures(1, (24, 24), 3).expand(6, -1, -1, -1)
    whole = views(augment).batch(x, range(6), 4)
    for other in (
        views(augment).batch(x, range(6), 5),
        views(augment).batch(x, range(1, 7), 4),
        views(augment, seed=1).batch(x, range(6), 4),
    ):
        for name in NAMES[:2]:
            assert (getattr(other, name) != getattr(whole, name)).flatten(2).any(-1).all()
        assert not torch.equal(other.mask, whole.mask)
    assert (whole.large[:, 0] != whole.large[:, 1]).flatten(1).any(1).all()
    assert (whole.small[:, 0] != whole.small[:, 1]).flatten(1).any(1).all()


@pytest.mark.parametrize("augment", ["small", "photo"])
def test_workers_and_cuts_of_the_batch_change_nothing(augment):
    images = ArrayImages(pictures(40, (24, 24), 3), torch.arange(40), "noise")

    def loaded(workers=0, **options):
        sampler = StepSampler(40, 16, seed=0, steps=3, **options)
        return list(train_loader(images, views(augment), sampler, workers=workers))

    whole = loaded()
    assert len(whole) == 3
    for other in (loaded(workers=2), loaded()):
        assert all(equal(a[0], b[0]) for a, b in zip(other, whole, strict=True))
    cut = loaded(accumulate=4)
    for step, (crops, labels, index) in enumerate(whole):
        parts = cut[4 * step : 4 * step + 4]
        joined = Crops(*(torch.cat([getattr(p[0], name) for p in parts]) for name in NAMES))
        assert equal(joined, crops)
        assert torch.equal(torch.cat([p[2] for p in parts]), index)
        assert torch.equal(labels, index)


def test_hidden_patches_change_no_pixel_and_more_crops_change_none_of_the_others():
    x = pictures(5, (24, 24), 3)
    whole = views().batch(x, range(5))
    unmasked = views(masking=None).batch(x, range(5))
    assert torch.equal(unmasked.large, whole.large)
    assert torch.equal(unmasked.small, whole.small)
    assert unmasked.mask.shape == (5, 2, 0)
    fewer = views(small=1).batch(x, range(5))
    assert torch.equal(fewer.large, whole.large)
    assert torch.equal(fewer.small, whole.small[:, :1])


@pytest.mark.parametrize(("large", "small"), [(1, 0), (1, 4), (3, 0), (2, 10)])
def test_any_number_of_crops(large, small):
    view = MultiView(plain((8, 8)), large=large, small=small, small_size=(4, 4), masking=MASKING)
    crops = view.batch(pictures(3), range(3))
    assert crops.large.shape == (3, large, 1, 8, 8)
    assert crops.small.shape == (3, small, 1, 4, 4)
    assert crops.mask.shape == (3, large, 16)


@pytest.mark.parametrize("augment", ["small", "photo"])
def test_crops_of_sixteen_pixels_from_large_photos(augment):
    view = MultiView(plain((64, 48), 3, augment, flip=True), small=2, small_size=(16, 16), colour=NO_COLOUR)
    photos = [ramp(600, 800), ramp(801, 333), ramp(50, 1200)]
    crops = view.batch(photos, range(3))
    assert crops.large.shape == (3, 2, 3, 64, 48)
    assert crops.small.shape == (3, 2, 3, 16, 16)
    for part in (crops.large, crops.small):
        assert part.min() >= 0
        assert part.max() <= 1
        # Rows still say the row: cut and resized, not torn or turned about.
        assert (part[:, :, 0, -1].mean(-1) > part[:, :, 0, 0].mean(-1)).all()


# --- what a crop shows ------------------------------------------------------------------------------------


@pytest.mark.parametrize("augment", ["small", "photo"])
@pytest.mark.parametrize(("height", "width"), [(96, 96), (120, 80)])
def test_areas_lie_within_the_split(augment, height, width):
    """The ramp says from which rows and columns a crop's middle cross comes, and so how much it shows."""
    size = (height, width) if augment == "small" else (96, 96)
    view = MultiView(
        plain(size, 3, augment), small=2, small_size=(48, 48), split=0.4, least=0.05, colour=NO_COLOUR
    )
    crops = view.batch(ramp(height, width)[None].expand(60, -1, -1, -1), range(60))
    for part, low, high in ((crops.large, 0.4, 1.0), (crops.small, 0.05, 0.4)):
        parts = part.flatten(0, 1)
        down = parts[:, 0].diff(dim=1).mean((-2, -1)) * parts.shape[-2]
        right = parts[:, 1].diff(dim=2).mean((-2, -1)) * parts.shape[-1]
        area = down * right
        # A turned crop reaches over the edge, which is continued: there the ramp is flat.
        slack = 0.03 if augment == "photo" else 0.12
        assert area.max() < high + slack
        assert area.min() > low - slack * high
        assert abs(area.mean() - (low + high) / 2) < 0.15 * high


def test_a_small_pictures_box_is_where_the_numbers_say():
    view = MultiView(plain((8, 8), 3), colour=NO_COLOUR, split=0.25)
    (crops,) = [view.batch(ramp(64, 64)[None].expand(50, -1, -1, -1), range(50)).large[:, 0]]
    u = draws(0, 0, range(50), 6)
    share = 0.25 + 0.75 * u[:, 0]
    ratio = np.clip((3 / 4) ** (1 - 2 * u[:, 1]), share, 1 / share)
    w, h = np.sqrt(share * ratio), np.sqrt(share / ratio)
    top, left = u[:, 2] * (1 - h), u[:, 3] * (1 - w)
    middle = crops[:, :, 3:5, 3:5].mean((-2, -1)).numpy()
    assert middle[:, 0] == pytest.approx(top + h / 2, abs=0.02)
    assert middle[:, 1] == pytest.approx(left + w / 2, abs=0.02)


@pytest.mark.parametrize("augment", ["small", "photo"])
def test_flips_only_when_asked(augment):
    x = ramp(48, 48)[None].expand(200, -1, -1, -1)
    for flip in (False, True):
        view = MultiView(plain((24, 24), 3, augment, flip=flip), colour=NO_COLOUR)
        large = view.batch(x, range(200)).large
        mirrored = large[:, :, 1, :, -1].mean(-1) < large[:, :, 1, :, 0].mean(-1)
        assert mirrored.float().mean(0).tolist() == pytest.approx([0.5 * flip] * 2, abs=0.12 * flip)
        assert not flip or (mirrored[:, 0] != mirrored[:, 1]).any()


def test_whole_pictures_are_left_as_they_are():
    view = MultiView(plain((8, 8), 3, "none"), small=1, small_size=(8, 8), colour=NO_COLOUR)
    x = pictures(4, channels=3)
    crops = view.batch(x, range(4))
    for part in (*crops.large.unbind(1), *crops.small.unbind(1)):
        assert torch.equal(part * 255, x.float())


def test_no_colour_is_the_identity_and_colours_are_the_last_step():
    pixels = pictures(6, (9, 7), 3).float()
    for kind in range(3):
        assert recoloured(pixels, draws(0, 0, range(6), 9), NO_COLOUR, kind) is pixels
    mean, std = (0.5, 0.2, 0.1), (2.0, 1.0, 0.5)
    view = MultiView(View((8, 8), 3, mean, std, augment="photo"), colour=Colour(blur=(0, 0, 0)))
    bare = MultiView(plain((8, 8), 3, "photo"), colour=Colour(blur=(0, 0, 0)))
    x = pictures(4, (20, 20), 3)
    expected = bare.batch(x, range(4)).large.sub(torch.tensor(mean).view(3, 1, 1))
    torch.testing.assert_close(view.batch(x, range(4)).large, expected / torch.tensor(std).view(3, 1, 1))


# --- colours ----------------------------------------------------------------------------------------------

NUMBERS = ["jitter", "brightness", "contrast", "saturation", "hue", "gray", "blur", "width", "solarise"]
NOTHING = {**dict.fromkeys(NUMBERS[:6], 0.0), "blur": (0, 0, 0), "solarise": (0, 0, 0)}


def coloured(pixels, colour, kind=0, **numbers):
    """With the uniform numbers that are given; others say that nothing happens."""
    happens_not = {"jitter": 0.999, "gray": 0.999, "blur": 0.999, "solarise": 0.999}
    u = np.array([[{**happens_not, **numbers}.get(name, 0.5) for name in NUMBERS]] * len(pixels))
    return recoloured(pixels, u, colour, kind)


def only(**options):
    return Colour(**{**NOTHING, **options})


def luma(pixels):
    return (pixels * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)


TO_FACTOR = {0.0: 0.6, 0.25: 0.8, 0.5: 1.0, 1.0: 1.4}


@pytest.mark.parametrize("number", TO_FACTOR)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_jitter_is_torchvisions(name, channels, number):
    x = pictures(5, (9, 7), channels).float()
    found = coloured(x, only(jitter=1.0, **{name: 0.4}), **{name: number, "jitter": 0.0})
    expected = getattr(tv, f"adjust_{name}")(x / 255, TO_FACTOR[number]) * 255
    torch.testing.assert_close(found, expected, rtol=0, atol=0.03)  # whose red has 0.2989 for 0.299
    if number != 0.5 and (name, channels) != ("saturation", 1):
        assert (found - x).abs().max() > 10


def test_gray_solarising_and_blur_are_torchvisions():
    x = pictures(5, (40, 40), 3).float()
    gray = coloured(x, only(gray=1.0), gray=0.0)
    torch.testing.assert_close(gray, luma(x).expand_as(x), rtol=0, atol=1e-3)
    torch.testing.assert_close(gray, tv.rgb_to_grayscale(x, 3), rtol=0, atol=0.03)
    negative = coloured(x, only(solarise=(1.0, 0, 0)), solarise=0.0)
    assert torch.equal(negative, tv.solarize(x.to(torch.uint8), 128).float())
    sigma = (0.1 + 1.9 * 0.7) * 112 / 224  # as wide as it is in a picture of 224 pixels
    x = pictures(2, (112, 120), 3).float()
    found = coloured(x, only(blur=(1.0, 0, 0)), blur=0.0, width=0.7)
    expected = tv.gaussian_blur(x, 2 * math.ceil(3 * sigma) + 1, sigma)
    torch.testing.assert_close(found[..., 4:-4, 4:-4], expected[..., 4:-4, 4:-4], rtol=0, atol=0.01)
    assert (found - x).abs().max() > 10


def test_a_turn_of_the_hue_keeps_the_luma_and_a_full_one_everything():
    x = (pictures(5, (9, 7), 3).float() - 128) / 8 + 128  # inside the cube, where nothing is cut off

    def turned(share, **numbers):
        return coloured(x, only(jitter=1.0, hue=share), jitter=0.0, hue=1.0, **numbers)

    for whole in (turned(0.0), turned(1.0)):
        torch.testing.assert_close(whole, x, rtol=0, atol=1e-3)
    for share in (0.1, 0.25, 0.5):
        assert (turned(share) - x).abs().max() > 1
        torch.testing.assert_close(luma(turned(share)), luma(x), rtol=0, atol=1e-3)
    torch.testing.assert_close(turned(0.5) + x, 2 * luma(x).expand_as(x), rtol=0, atol=1e-3)


@pytest.mark.parametrize("channels", [1, 4, 7])
def test_channels_that_are_no_colours_have_no_hue(channels):
    x = pictures(6, (12, 12), channels).float()
    hues = only(jitter=1.0, saturation=0.9, hue=0.5, gray=1.0)
    assert torch.equal(coloured(x, hues, jitter=0.0, saturation=1.0, hue=1.0, gray=0.0), x)
    found = coloured(x, only(jitter=1.0, contrast=0.4), jitter=0.0, contrast=0.0)
    mean = x.mean((-2, -1), keepdim=True)  # of each channel
    torch.testing.assert_close(found, mean + 0.6 * (x - mean), rtol=0, atol=0.01)


def test_chances_are_those_that_are_stated():
    n = 4000
    x = torch.tensor([200.0, 30.0, 90.0]).view(3, 1, 1) * torch.tensor([[1.0, 0.5], [0.5, 1.0]]).repeat(2, 2)
    x = x.expand(n, 3, 4, 4)
    u = draws(0, 0, range(n), 9)

    def share(kind=0, **options):
        changed = (recoloured(x, u, only(**options), kind) - x).abs().flatten(1).amax(1) > 1e-2
        return changed.double().mean().item()

    assert share(jitter=0.8, brightness=0.4) == pytest.approx(0.8, abs=0.02)
    assert share(gray=0.2) == pytest.approx(0.2, abs=0.02)
    for kind in range(3):
        assert share(kind, solarise=Colour().solarise) == pytest.approx(Colour().solarise[kind], abs=0.02)
    x, u = x.repeat(1, 1, 8, 8)[:400], u[:400]
    u[:, 7] = 1.0
    for kind in range(3):
        assert share(kind, blur=Colour().blur) == pytest.approx(Colour().blur[kind], abs=0.06)


def test_a_neighbour_that_is_blurred_further_has_no_part_in_a_picture():
    x = pictures(6, (224, 60), 3).float().repeat(1, 1, 1, 4)[..., :224]
    u = draws(3, 0, range(6), 9)
    u[:, 6], u[:, 7] = 0.0, (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    together = recoloured(x, u, Colour(), 0)
    for i in range(6):
        assert torch.equal(recoloured(x[i : i + 1], u[i : i + 1], Colour(), 0)[0], together[i])


def test_few_pixels_are_not_blurred():
    assert SMALL_COLOUR.blur == SMALL_COLOUR.solarise == (0, 0, 0)
    assert SMALL_COLOUR.jitter > 0


# --- masks ------------------------------------------------------------------------------------------------


def masks(masking, n=4000, seed=0):
    return masking.mask(draws(seed, 0, range(n), masking.draws))


@pytest.mark.parametrize("blobs", [True, False])
@pytest.mark.parametrize("grid", [(4, 4), (14, 14), (3, 3), (2, 5), (1, 6)])
def test_as_many_patches_are_hidden_as_the_share_says_and_each_as_often(grid, blobs):
    masking = Masking(grid, share=(0.2, 0.6), chance=0.5, blobs=blobs)
    n, patches = 4000, grid[0] * grid[1]
    mask = masks(masking, n)
    u = draws(0, 0, range(n), 2)
    expected = np.rint((0.2 + 0.4 * u[:, 1]) * patches) * (u[:, 0] < 0.5)
    assert mask.sum(-1).tolist() == expected.tolist()
    often = mask.double().mean(0)
    assert (often - expected.mean() / patches).abs().max() < 4.5 * 0.5 / math.sqrt(n)


def test_chance_and_share_may_be_all_or_nothing():
    assert not masks(Masking((4, 4), chance=0.0)).any()
    assert masks(Masking((4, 4), share=(1.0, 1.0), chance=1.0)).all()
    assert not masks(Masking((4, 4), share=(0.0, 0.0), chance=1.0)).any()


def test_a_mask_is_the_same_alone():
    masking = Masking((5, 3), chance=1.0)
    u = draws(0, 0, range(8), masking.draws)
    together = masking.mask(u.reshape(4, 2, -1))
    for i in range(8):
        assert torch.equal(masking.mask(u[i : i + 1]), together.flatten(0, 1)[i : i + 1])


def test_hidden_patches_hang_together():
    def alike(blobs):
        """How often the neighbour of a hidden patch is hidden."""
        mask = masks(Masking((14, 14), share=(0.3, 0.3), chance=1.0, blobs=blobs), 500).view(-1, 14, 14)
        beside = (mask[:, 1:] & mask[:, :-1]).sum() + (mask[..., 1:] & mask[..., :-1]).sum()
        return beside / (mask[:, 1:].sum() + mask[..., 1:].sum())

    assert alike(blobs=False) == pytest.approx(0.3, abs=0.02)
    assert alike(blobs=True) > 0.5


@pytest.mark.parametrize(("options", "message"), [
    ({"large": 0}, "0 large and 3 small crops - take at least one large"),
    ({"small": -1}, "2 large and -1 small"),
    ({"small_size": (0, 4)}, "must be larger"),
    ({"split": 0.05}, "must lie between 0.05, the smallest crop, and 1"),
    ({"split": 1.5}, "crop_split is 1.5"),
])  # fmt: skip
def test_what_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        views(**options)
