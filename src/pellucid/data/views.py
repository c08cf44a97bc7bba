"""What the model sees of a picture: resized, perhaps augmented, normalised.

The view of an item is a function of (seed, epoch, index) and of its pixels. The other items of the batch,
the number of workers and the global random state have no part in it, to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
import torchvision.transforms.v2.functional as F
from torch.nn.functional import grid_sample
from torchvision.transforms.v2 import InterpolationMode

from pellucid.data.images import to_channels
from pellucid.data.randomness import draws, order
from pellucid.errors import ConfigError, suggest

__all__ = ["Augment", "Magnitudes", "View", "draws", "order"]

Augment = Literal["none", "small", "photo"]
Pictures = Sequence[torch.Tensor] | torch.Tensor
Uniform = npt.NDArray[np.float64]

DRAWS_PER_ITEM = 5
"""Uniform numbers that a view takes for each picture: the first ones."""


@dataclass(frozen=True)
class Magnitudes:
    """How far augmentation goes. Each range is drawn from uniformly."""

    rotation: float = 10.0  # small: degrees, either way
    shift: float = 0.1  # small: share of the height and width, either way
    scale: tuple[float, float] = (0.9, 1.1)  # small: 1.1 shows the picture ten per cent larger
    crop_scale: tuple[float, float] = (0.35, 1.0)  # photo: share of the area
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # photo: width over height, uniform in its logarithm


@dataclass(frozen=True)
class View:
    """From uint8 pictures of any size to one float32 batch of ``img_size`` (height, width).

    ``mean`` and ``std`` are per channel on the scale 0..1. ``augment`` is

    - ``"none"``: resize so that the middle crop of ``img_size`` shows 0.875 of the short side (all of it
      below 96 pixels). A picture that already has ``img_size`` is left as it is.
    - ``"small"``: as none, then turned, shifted and scaled a little; the border is continued.
    - ``"photo"``: a random part of random shape, resized.

    ``flip`` mirrors every other picture in both augmentations. Raises ConfigError for what cannot be.
    """

    img_size: tuple[int, int]
    in_chans: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: Augment = "none"
    flip: bool = False
    seed: int = 0
    magnitudes: Magnitudes = field(default_factory=Magnitudes)

    def __post_init__(self) -> None:
        if self.augment not in get_args(Augment):
            hint = suggest(str(self.augment), get_args(Augment))
            raise ConfigError(f"no augmentation is called '{self.augment}'{hint}")
        if self.in_chans < 1:
            raise ConfigError(f"in_chans is {self.in_chans} - pictures have at least 1 channel")
        if not len(self.mean) == len(self.std) == self.in_chans:
            raise ConfigError(
                f"{len(self.mean)} means and {len(self.std)} standard deviations for {self.in_chans} channels"
                " - give one of each per channel"
            )
        if min(self.img_size) < 1 or min(self.std) <= 0:
            raise ConfigError(f"img_size {self.img_size} and std {self.std} must be positive")

    def batch(
        self, images: Pictures, index: npt.ArrayLike | torch.Tensor, epoch: int | npt.ArrayLike = 0
    ) -> torch.Tensor:
        """float32 ``(b, in_chans, *img_size)``. ``images``: b tensors uint8 (c, h, w), or one (b, c, h, w).

        ``index`` (b,) says which items they are; ``epoch`` is one number or one per item.
        """
        if self.augment == "none":
            return self.normalised(self.fitted(images))
        uniform = draws(self.seed, epoch, np.asarray(index), DRAWS_PER_ITEM)
        if self.augment == "photo":
            return self.normalised(self.cropped(images, uniform))
        return self.normalised(self._moved(self.fitted(images), uniform))

    def normalised(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels 0..255 as float32 around 0."""
        mean = torch.tensor(self.mean).view(-1, 1, 1)
        std = torch.tensor(self.std).view(-1, 1, 1)
        return (pixels.to(torch.float32) / 255 - mean) / std

    def channels(self, images: torch.Tensor) -> torch.Tensor:
        """Pictures of one size, uint8 (b, in_chans, h, w)."""
        return to_channels(images, self.in_chans)

    def fitted(self, images: Pictures) -> torch.Tensor:
        """uint8 ``(b, in_chans, *img_size)``, without augmentation."""
        if isinstance(images, torch.Tensor) and images.shape[-2:] == self.img_size:
            return self.channels(images)
        return torch.stack([_fit(to_channels(image, self.in_chans), self.img_size) for image in images])

    def at(self, img_size: tuple[int, int]) -> View:
        """The same view at another height and width."""
        return replace(self, img_size=img_size)

    def whole(self, image: torch.Tensor) -> torch.Tensor:
        """float32 ``(1, in_chans, *img_size)``: all of one picture, stretched where its shape is another."""
        return self.normalised(_resize(to_channels(image, self.in_chans), self.img_size)[None])

    def cropped(self, images: Pictures, uniform: Uniform) -> torch.Tensor:
        """uint8 ``(b, in_chans, *img_size)``: of each picture a random part."""
        parts = []
        for image, u in zip(images, uniform, strict=True):
            top, left, height, width = crop_box((image.shape[-2], image.shape[-1]), u, self.magnitudes)
            part = to_channels(image[..., top : top + height, left : left + width], self.in_chans)
            part = _resize(part, self.img_size)
            parts.append(part.flip(-1) if self.flip and u[4] < 0.5 else part)
        return torch.stack(parts)

    def _moved(self, pixels: torch.Tensor, uniform: Uniform) -> torch.Tensor:
        """float32 (b, c, h, w), 0..255: every picture turned, shifted and scaled, all at once."""
        motion = inverse_motion(uniform, self.img_size, self.magnitudes, self.flip)
        return sample(pixels.float(), motion, self.img_size)


def crop_box(size: tuple[int, int], u: Uniform, magnitudes: Magnitudes) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random part of a picture (height, width), from four uniform numbers.

    The share of the area is drawn, then the ratio r = w/h. The part has w = sqrt(A r) and h = sqrt(A / r),
    and fits when A / H^2 <= r <= W^2 / A: never an empty range, as A <= W H. Drawing r and clipping it to
    that range needs no second try, so every item uses the same number of draws.
    """
    height, width = size
    share = np.interp(u[0], (0, 1), magnitudes.crop_scale)
    area = share * height * width
    log_ratio = np.interp(u[1], (0, 1), np.log(magnitudes.crop_ratio))
    ratio = np.clip(math.exp(log_ratio), area / height**2, width**2 / area)
    h = min(max(round(math.sqrt(area / ratio)), 1), height)
    w = min(max(round(math.sqrt(area * ratio)), 1), width)
    return int(u[2] * (height - h + 1)), int(u[3] * (width - w + 1)), h, w


def inverse_motion(
    uniform: Uniform, size: tuple[int, int], magnitudes: Magnitudes, flip: bool
) -> npt.NDArray[np.float64]:
    """(b, 2, 3): where each output point (x, y, 1), in -1..1, comes from. ``uniform``: (b, 5).

    In pixels the picture is turned by the angle a and scaled by s, so a point comes from R(-a) / s. The
    axes run -1..1 over the width w and the height h, which puts h/w and w/h on the off-diagonal.
    """
    height, width = size
    angle = np.deg2rad(magnitudes.rotation) * (2 * uniform[:, 0] - 1)
    shift = 2 * magnitudes.shift * (2 * uniform[:, 1:3] - 1)  # the axes are two units long
    scale = np.interp(uniform[:, 3], (0, 1), magnitudes.scale)
    mirror = np.where(flip & (uniform[:, 4] < 0.5), -1.0, 1.0)
    cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
    from_x = [mirror * cos, sin * height / width, shift[:, 0]]
    from_y = [-mirror * sin * width / height, cos, shift[:, 1]]
    return np.stack([np.stack(from_x, axis=1), np.stack(from_y, axis=1)], axis=1)


def sample(pixels: torch.Tensor, motion: npt.NDArray[np.float64], size: tuple[int, int]) -> torch.Tensor:
    """float32 ``(b, c, *size)``: pixels where ``motion`` (b, 2, 3) says; the border is continued."""
    grid = _sampling_grid(torch.from_numpy(motion).float(), size)
    return grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _sampling_grid(motion: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(b, 2, 3) -> (b, h, w, 2), as ``affine_grid`` with align_corners=False.

    Written out, because affine_grid is a batched matrix product, which no backend promises to round
    alike for every batch size; sums and products of single numbers are.
    """
    height, width = size
    x = (2 * torch.arange(width) + 1) / width - 1
    y = ((2 * torch.arange(height) + 1) / height - 1)[:, None]
    from_x, from_y = (
        row[0] * x + row[1] * y + row[2] for row in motion.permute(1, 2, 0)[..., None, None].unbind(0)
    )
    return torch.stack([from_x, from_y], dim=-1)


def _fit(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """uint8 (c, *size): the middle of the picture, resized. The picture itself if it has that size."""
    if image.shape[-2:] == size:
        return image
    crop_pct = 0.875 if min(size) >= 96 else 1.0
    factor = max(size[0] / image.shape[-2], size[1] / image.shape[-1]) / crop_pct
    # A strip of 1 x 50,000,000 pixels must not be enlarged whole: keep twice what the crop can show.
    keep = [
        min(have, math.ceil(2 * want / factor)) for have, want in zip(image.shape[-2:], size, strict=True)
    ]
    image = F.center_crop(image, keep)
    resized = [max(round(have * factor), want) for have, want in zip(keep, size, strict=True)]
    return F.center_crop(_resize(image, (resized[0], resized[1])), list(size))


def _resize(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    # torch's uint8 kernel believes the stride of a side of length one, which a transposed picture carries
    # with any value while it counts as contiguous: it then reads outside of the picture, and crashes.
    image = image.clone(memory_format=torch.contiguous_format)
    return F.resize(image, list(size), interpolation=InterpolationMode.BICUBIC, antialias=True)
