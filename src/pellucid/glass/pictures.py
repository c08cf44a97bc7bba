"""Pictures as a model sees them, as data URIs small enough for a report."""

from __future__ import annotations

import base64
import io

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from pellucid.data import View

NATURAL = 64
"""Pixels up to which a picture is kept as it is, without loss."""


def png(image: Float[Tensor, "c h w"], view: View) -> str:
    """A normalised image as the model sees it, without loss; of other channels than 1 or 3 the first."""
    return _uri(_picture(image, view), "PNG", optimize=True)


def thumbnail(image: Float[Tensor, "c h w"], view: View, side: int = 96) -> str:
    """The same with a longer side of at most ``side`` pixels, as a JPEG of a few kB where it was larger."""
    picture = _picture(image, view)
    if max(picture.size) <= NATURAL:
        return _uri(picture, "PNG", optimize=True)
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return _uri(picture, "JPEG", quality=82)


def _picture(image: Tensor, view: View) -> Image.Image:
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (view.mean, view.std))
    pixels = ((image * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    if len(pixels) == 3:
        return Image.fromarray(pixels.permute(1, 2, 0).numpy())
    return Image.fromarray(pixels[0].numpy())


def _uri(picture: Image.Image, kind: str, **options: int) -> str:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


__all__ = ["png", "thumbnail"]
