"""Several views of each picture: what learning without labels compares (multi-crop, Caron et al. 2020).

Large crops show most of a picture, small ones a part of it at lower resolution, each in its own colours.
As with :class:`~pellucid.data.views.View`, all is a function of (seed, epoch, index) and of the pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from pellucid.data.randomness import draws
from pellucid.data.views import DRAWS_PER_ITEM, Pictures, Uniform, View, sample
from pellucid.errors import ConfigError

_GEOMETRY, _COLOUR = 6, 9
_PER_CROP = _GEOMETRY + _COLOUR
_LUMA = (0.299, 0.587, 0.114)
_YIQ = np.array([_LUMA, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112)])


class Crops(NamedTuple):
    """Views of b pictures, and which patches of the large ones to hide.

    ``large`` float32 (b, g, c, h, w), ``small`` float32 (b, l, c, h', w') with l = 0 where there are none,
    ``mask`` bool (b, g, patches), with no patches where nothing is hidden.
    """

    large: torch.Tensor
    small: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True)
class Colour:
    """How far colours go, as in BYOL and DINO. A gray picture knows brightness, contrast, blur, solarising.

    ``blur`` and ``solarise`` are chances for the first large crop, the other large ones, and the small ones.
    """

    jitter: float = 0.8  # chance that the next four apply
    brightness: float = 0.4  # a factor in 1 -+ 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1  # share of a full turn, either way
    gray: float = 0.2  # chance
    blur: tuple[float, float, float] = (1.0, 0.1, 0.5)
    solarise: tuple[float, float, float] = (0.0, 0.2, 0.0)


NO_COLOUR = Colour(0, 0, 0, 0, 0, 0, (0, 0, 0), (0, 0, 0))
SMALL_COLOUR = Colour(gray=0.0, blur=(0.0, 0.0, 0.0), solarise=(0.0, 0.0, 0.0))
"""For pictures of few pixels, which a blur would empty."""


@dataclass(frozen=True)
class Masking:
    """Which patches of the large crops are hidden: a share drawn from ``share`` in ``chance`` of the crops.

    In ``blobs`` the hidden patches hang together, so that neighbours do not give them away: patches are
    ranked by noise summed over 3 x 3 neighbours. Beyond an edge the opposite one goes on, so that a patch is
    hidden as often wherever it stands.
    """

    grid: tuple[int, int]
    share: tuple[float, float] = (0.1, 0.5)
    chance: float = 0.5
    blobs: bool = True

    @property
    def draws(self) -> int:
        """How many uniform numbers a mask takes."""
        return 2 + math.prod(self.grid)

    def mask(self, uniform: Uniform) -> torch.Tensor:
        """bool (..., patches), true where hidden, from uniform numbers (..., draws)."""
        noise = torch.from_numpy(uniform[..., 2:].astype(np.float32))
        masked, share = uniform[..., 0] < self.chance, uniform[..., 1]
        share = np.interp(share, (0, 1), self.share) * masked
        count = torch.from_numpy(np.rint(share * noise.shape[-1]).astype(np.int64))
        if self.blobs:
            noise = _gathered(noise.unflatten(-1, self.grid)).flatten(-2)
        ranks = noise.argsort(dim=-1, stable=True).argsort(-1)
        return ranks < count[..., None]


@dataclass(frozen=True)
class MaskedView:
    """Each picture once, as ``view`` shows it, with patches to hide: :class:`Crops` of one large view."""

    view: View
    masking: Masking

    @property
    def img_size(self) -> tuple[int, int]:
        return self.view.img_size

    def batch(self, images: Pictures, index: npt.ArrayLike, epoch: int | npt.ArrayLike = 0) -> Crops:
        """b pictures, uint8 (c, h, w) each; ``index`` (b,) says which items they are."""
        large = self.view.batch(images, index, epoch)[:, None]
        uniform = draws(self.view.seed, epoch, index, DRAWS_PER_ITEM + self.masking.draws)
        return Crops(large, large[:, :0], self.masking.mask(uniform[:, None, DRAWS_PER_ITEM:]))


@dataclass(frozen=True)
class MultiView:
    """From pictures to :class:`Crops`.

    Args:
        view: size, channels, normalisation and seed of the large crops; its ``augment`` says how they are
            cut: ``"photo"`` resizes a box with antialiasing, ``"small"`` turns it a little as well and
            interpolates, ``"none"`` takes the whole picture.
        large: number of large crops.
        small: number of small ones.
        small_size: height and width of the small ones.
        split: share of a picture's area; large crops show more than it, small ones less.
        least: share of the area that the smallest small crop shows.
        colour: how far colours go.
        masking: which patches are hidden; none unless given.

    Raises:
        ConfigError: counts, sizes or shares that cannot be.
    """

    view: View
    large: int = 2
    small: int = 0
    small_size: tuple[int, int] = (96, 96)
    split: float = 0.4
    least: float = 0.05
    colour: Colour = Colour()
    masking: Masking | None = None

    def __post_init__(self) -> None:
        if self.large < 1 or self.small < 0:
            raise ConfigError(f"{self.large} large and {self.small} small crops - take at least one large")
        if min(self.small_size) < 1:
            raise ConfigError(f"small crops of {self.small_size} pixels must be larger")
        if not 0 < self.least < self.split <= 1:
            raise ConfigError(
                f"crop_split is {self.split}; it must lie between {self.least}, the smallest crop, and 1"
            )

    @property
    def img_size(self) -> tuple[int, int]:
        return self.view.img_size

    def batch(self, images: Pictures, index: npt.ArrayLike, epoch: int | npt.ArrayLike = 0) -> Crops:
        """Views of b pictures, uint8 (c, h, w) each; ``index`` (b,) says which items they are."""
        items = np.asarray(index)
        crops = self.large + self.small
        per_mask = self.masking.draws if self.masking else 0
        uniform = draws(self.view.seed, epoch, items, crops * _PER_CROP + self.large * per_mask)
        views = [self._crop(images, uniform[:, i * _PER_CROP :], i) for i in range(crops)]
        channels, (height, width) = self.view.in_chans, self.small_size
        none = torch.empty(len(items), 0, channels, height, width)
        masks = uniform[:, crops * _PER_CROP :].reshape(len(items), self.large, per_mask)
        return Crops(
            torch.stack(views[: self.large], 1),
            torch.stack(views[self.large :], 1) if self.small else none,
            self.masking.mask(masks) if self.masking else torch.from_numpy(masks.astype(bool)),
        )

    def _crop(self, images: Pictures, uniform: Uniform, number: int) -> torch.Tensor:
        large = number < self.large
        size = self.view.img_size if large else self.small_size
        scale = (self.split, 1.0) if large else (self.least, self.split)
        view = replace(self.view, img_size=size, magnitudes=replace(self.view.magnitudes, crop_scale=scale))
        geometry, colour = uniform[:, :_GEOMETRY], uniform[:, _GEOMETRY:_PER_CROP]
        if view.augment == "none":
            pixels = view.fitted(images).float()
        elif view.augment == "photo":
            pixels = view.cropped(images, geometry).float()
        else:
            pixels = _turned_crop(self.view.fitted(images), geometry, view)
        kind = 2 if not large else 1 if number else 0
        return view.normalised(recoloured(pixels, colour, self.colour, kind))


def _turned_crop(pictures: torch.Tensor, u: Uniform, view: View) -> torch.Tensor:
    """float32 (b, c, h, w), 0..255: of each picture (c, h', w') a box, turned, at the view's size.

    ``u`` (b, 6): share of the area, ratio, top, left, mirror, angle.
    """
    height, width = pictures.shape[-2:]
    limits = view.magnitudes
    share = np.interp(u[:, 0], (0, 1), limits.crop_scale)
    log_ratio = np.interp(u[:, 1], (0, 1), np.log(limits.crop_ratio)) + math.log(height / width)
    # As shares of the sides: w h = share, and the ratio is clipped to where both are at most 1.
    ratio = np.clip(np.exp(log_ratio), share, 1 / share)
    w, h = np.sqrt(share * ratio), np.sqrt(share / ratio)
    y, x = (2 * u[:, 2] - 1) * (1 - h), (2 * u[:, 3] - 1) * (1 - w)
    angle = np.deg2rad(limits.rotation) * (2 * u[:, 5] - 1)
    mirror = np.where(view.flip & (u[:, 4] < 0.5), -1.0, 1.0)
    cos, sin = np.cos(angle), np.sin(angle)
    from_x = np.stack([mirror * cos * w, sin * h * height / width, x], 1)
    from_y = np.stack([-mirror * sin * w * width / height, cos * h, y], 1)
    return sample(pictures.float(), np.stack([from_x, from_y], 1), view.img_size)


def recoloured(pixels: torch.Tensor, u: Uniform, colour: Colour, kind: int) -> torch.Tensor:
    """Pixels float32 (b, c, h, w), 0..255, with other colours.

    ``u`` (b, 9): whether to jitter, brightness, contrast, saturation, hue, gray, blur, its width, solarise.
    ``kind`` is 0 for the first large crop, 1 for other large ones, 2 for small ones.
    """
    jittered = u[:, 0] < colour.jitter

    def factor(column: int, reach: float) -> torch.Tensor:
        return _per_item(np.where(jittered, 1 + reach * (2 * u[:, column] - 1), 1.0))

    if colour.jitter:
        pixels = (pixels * factor(1, colour.brightness)).clamp(0, 255)
        contrast = factor(2, colour.contrast)
        pixels = (pixels * contrast + _mean_level(pixels) * (1 - contrast)).clamp(0, 255)
    if pixels.shape[1] == 3 and (colour.jitter or colour.gray):
        saturation = factor(3, colour.saturation)
        hue = np.where(jittered, 2 * math.pi * colour.hue * (2 * u[:, 4] - 1), 0.0)
        saturation = torch.where(_per_item(u[:, 5]) < colour.gray, torch.zeros(()), saturation)
        pixels = _turned_hue(pixels, saturation, hue)
    if colour.blur[kind]:
        side = min(pixels.shape[-2:])
        sigma = np.where(u[:, 6] < colour.blur[kind], np.interp(u[:, 7], (0, 1), (0.1, 2.0)), 0.0)
        pixels = _blurred(pixels, sigma * side / 224)
    if colour.solarise[kind]:
        chosen = _per_item(u[:, 8]) < colour.solarise[kind]
        pixels = torch.where(chosen & (pixels >= 128), 255 - pixels, pixels)
    return pixels


def _per_item(numbers: npt.NDArray[np.float64]) -> torch.Tensor:
    return torch.from_numpy(numbers.astype(np.float32)).view(-1, 1, 1, 1)


def _luma(pixels: torch.Tensor) -> torch.Tensor:
    if pixels.shape[1] != 3:
        return pixels
    red, green, blue = pixels.split(1, 1)
    return _LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue


def _mean_level(pixels: torch.Tensor) -> torch.Tensor:
    """(b, 1 or c, 1, 1). Summed as whole numbers, so that the order of the sum, which a backend may choose by
    the size of the batch, has no part in it."""
    levels = (_luma(pixels) * 256).round().to(torch.int64).sum((-2, -1), keepdim=True)
    return levels.float() / (256 * pixels.shape[-2] * pixels.shape[-1])


def _turned_hue(pixels: torch.Tensor, saturation: torch.Tensor, hue: npt.NDArray[np.float64]) -> torch.Tensor:
    """Colour differences to the luma scaled by ``saturation`` and turned by ``hue`` radians, in YIQ."""
    luma, i, q = _mixed(pixels.split(1, 1), _YIQ)
    cos, sin = saturation * _per_item(np.cos(hue)), saturation * _per_item(np.sin(hue))
    turned = [luma, cos * i - sin * q, sin * i + cos * q]
    return torch.cat(_mixed(turned, np.linalg.inv(_YIQ)), 1).clamp(0, 255)


def _mixed(channels: Sequence[torch.Tensor], rows: npt.NDArray[np.float64]) -> list[torch.Tensor]:
    """Three channels from three."""
    a, b, c = channels
    return [row[0] * a + row[1] * b + row[2] * c for row in rows.tolist()]


def _blurred(pixels: torch.Tensor, sigma: npt.NDArray[np.float64]) -> torch.Tensor:
    """Gaussian blur of each picture by its own width, in pixels; the border is continued.

    A sum of shifted pictures: no backend promises to round a convolution alike for every batch size.
    """
    radius = math.ceil(3 * float(sigma.max(initial=0.0)))
    if radius == 0:
        return pixels
    offsets = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * (offsets / np.maximum(sigma, 1e-3)[:, None]) ** 2)
    # Beyond three widths an item has no weight, so that a wider neighbour in the batch does not add to it.
    weights[np.abs(offsets) > np.ceil(3 * sigma)[:, None]] = 0.0
    weights /= weights.sum(1, keepdims=True)
    for axis in (-2, -1):
        pad = (0, 0, radius, radius) if axis == -2 else (radius, radius, 0, 0)
        padded = F.pad(pixels, pad, mode="replicate")
        length = pixels.shape[axis]
        shifted: Sequence[torch.Tensor] = [padded.narrow(axis, k, length) for k in range(len(offsets))]
        pixels = sum((_per_item(weights[:, k]) * part for k, part in enumerate(shifted)), torch.zeros(()))
    return pixels


def _gathered(noise: torch.Tensor) -> torch.Tensor:
    """Sum over 3 x 3 patches of (..., rows, columns), round both ways; written out for the same reason.

    A patch counts twice itself: in three rows of three, all patches have the same nine neighbours.
    """
    turns = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    return sum((noise.roll(turn, (-2, -1)) for turn in turns), noise)
