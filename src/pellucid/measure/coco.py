"""Masks as COCO's annotations have them: run lengths, packed into text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from pellucid.errors import DataError


def run_lengths(mask: Bool[Tensor, "h w"]) -> list[int]:
    """How long 0 and 1 last in turns, column by column, beginning with 0 (for which 0 may be the length)."""
    flat = mask.numpy().T.ravel()
    if not flat.size:
        return []
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    lengths = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    return [0, *lengths] if flat[0] else lengths


def pack(lengths: Sequence[int]) -> str:
    """Run lengths as COCO's text: from the fourth on the difference to the last but one; five bits a
    character, the lowest first, a sixth to say that more follow; shifted to printable characters."""
    text = []
    for i, length in enumerate(lengths):
        value = length - lengths[i - 2] if i > 2 else length
        while True:
            bits, value = value & 0x1F, value >> 5
            more = value != (-1 if bits & 0x10 else 0)
            text.append(chr(48 + (bits | 0x20 if more else bits)))
            if not more:
                break
    return "".join(text)


def unpack(text: str) -> list[int]:
    """The run lengths behind :func:`pack`.

    Raises:
        DataError: text that no run lengths are behind.
    """
    lengths: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise DataError(f"{character!r} stands in no run lengths of COCO")
        value |= (bits & 0x1F) << shift
        shift += 5
        if bits & 0x20:
            continue
        if bits & 0x10:
            value -= 1 << shift
        lengths.append(value + lengths[-2] if len(lengths) > 2 else value)
        value = shift = 0
    if shift or min(lengths, default=0) < 0:
        raise DataError("run lengths of COCO that end in the middle, or are negative")
    return lengths


def encode(mask: Bool[Tensor, "h w"]) -> dict[str, Any]:
    """``{"size": [h, w], "counts": text}``, as pycocotools reads it."""
    return {"size": list(mask.shape), "counts": pack(run_lengths(mask))}


def decode(segmentation: dict[str, Any]) -> Bool[Tensor, "h w"]:
    """The mask behind :func:`encode`.

    Raises:
        DataError: run lengths that do not fill the picture.
    """
    height, width = segmentation["size"]
    lengths = unpack(segmentation["counts"])
    if sum(lengths) != height * width:
        raise DataError(f"run lengths of {sum(lengths)} pixels for a mask of {height} x {width}")
    flat = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)
    return torch.from_numpy(flat.reshape(width, height).T.copy())


def annotation(
    number: int, image: int, category: int, mask: Bool[Tensor, "h w"], score: float | None = None
) -> dict[str, Any]:
    """One object: its mask, area in pixels and tight box ``[left, top, width, height]``."""
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    box = [0, 0, 0, 0]
    if len(rows):
        left, top = int(columns[0]), int(rows[0])
        box = [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1]
    made = {
        "id": number,
        "image_id": image,
        "category_id": category,
        "segmentation": encode(mask),
        "area": int(mask.sum()),
        "bbox": box,
        "iscrowd": 0,
    }
    return made if score is None else {**made, "score": score}


def dataset(
    images: Sequence[dict[str, Any]], annotations: Sequence[dict[str, Any]], categories: Sequence[str]
) -> dict[str, Any]:
    """The file: categories are numbered from 1. An image is ``{"id", "file_name", "height", "width"}``."""
    named = [{"id": i, "name": name, "supercategory": "object"} for i, name in enumerate(categories, start=1)]
    return {
        "info": {"description": "things found without masks, by pellucid segment", "version": "1.0"},
        "licenses": [],
        "images": list(images),
        "annotations": list(annotations),
        "categories": named,
    }
