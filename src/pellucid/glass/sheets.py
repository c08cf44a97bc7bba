"""Many small pictures as one: atoms, components, samples, side by side on a sheet."""

from __future__ import annotations

import base64
import io
import math

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

PAGE, RISE, FALL, RULE = (253, 252, 250), (31, 95, 153), (166, 60, 6), (226, 222, 214)
"""Nothing, more, less and between: colours of page, subject, warning and rules in ``report.css``."""

MAX_WIDTH = 680
"""Pixels across the widest sheet: two charts side by side."""


def sheet(pictures: Float[Tensor, "k c h w"], columns: int, *, signed: bool = False, width: int = 330) -> str:
    """A PNG as a data URI, pictures in reading order with a gap between them.

    Args:
        pictures: 0 to 1, gray or RGB; values beyond are cut. At most a few hundred.
        columns: in a row.
        signed: values around zero in place of 0 to 1, each picture scaled to its own largest. Gray ones are
            blue above zero and red below, RGB ones lie around middle gray.
        width: pixels to fill, by whole multiples of a pixel of the pictures.
    """
    shown = _coloured(pictures) if signed else pictures.expand(-1, 3, -1, -1)
    k, _, h, w = shown.shape
    columns = max(1, min(columns, k))
    rows = math.ceil(k / columns)
    width = min(width, MAX_WIDTH)
    gap = 3 if width // columns >= 3 * (w + 3) else 1
    zoom = max(1, ((width + gap) // columns - gap) // w)
    big = (shown.clamp(0, 1) * 255).round().to(torch.uint8)
    big = big.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    h, w = h * zoom + gap, w * zoom + gap
    canvas = (
        torch.tensor(RULE, dtype=torch.uint8)
        .view(3, 1, 1)
        .expand(3, rows * h - gap, columns * w - gap)
        .clone()
    )
    if k % columns:
        canvas[:, (rows - 1) * h :, k % columns * w - gap :] = torch.tensor(PAGE, dtype=torch.uint8).view(
            3, 1, 1
        )
    for i, picture in enumerate(big):
        top, left = i // columns * h, i % columns * w
        canvas[:, top : top + h - gap, left : left + w - gap] = picture
    file = io.BytesIO()
    Image.fromarray(canvas.permute(1, 2, 0).numpy()).quantize(256, dither=Image.Dither.NONE).save(
        file, "PNG", optimize=True
    )
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _coloured(pictures: Tensor) -> Tensor:
    """Signed values as colours; zero is the page, the largest of a picture the full colour."""
    top = pictures.abs().flatten(1).amax(1).clamp_min(1e-12).view(-1, 1, 1, 1)
    share = pictures / top
    if pictures.shape[1] == 3:
        return 0.5 + 0.5 * share
    page, rise, fall = (torch.tensor(colour).view(1, 3, 1, 1) / 255 for colour in (PAGE, RISE, FALL))
    return page + share.clamp_min(0) * (rise - page) - share.clamp_max(0) * (fall - page)


__all__ = ["sheet"]
