"""Which patches make each atom of a dictionary fire most; of text ``atoms.py`` tells it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pellucid.errors import DataError
from pellucid.measure.cache import run_with_cache
from pellucid.measure.watch import input_batches
from pellucid.steps import SoftISTA


@dataclass(frozen=True)
class Firing:
    """Of one layer's m atoms (or of an MLP's m units) over all patches of some images.

    Attributes:
        fires: share of the patches on which each is above zero (of signed codes: not zero).
        values: its largest values, in size, in descending order; NaN where fewer patches made it fire.
        images: on which image each was.
        patches: on which patch of it.
    """

    fires: Float[Tensor, " m"]
    values: Float[Tensor, "m k"]
    images: Int[Tensor, "m k"]
    patches: Int[Tensor, "m k"]


class _Strongest:
    """The k largest of each column so far."""

    def __init__(self, keep: int, signed: bool) -> None:
        self.keep, self.signed = keep, signed
        self.values: Tensor | None = None
        self.where: Tensor | None = None
        self.fired: Tensor | float = 0.0
        self.tokens = 0

    def add(self, codes: Float[Tensor, "b n m"], first: int) -> None:
        b, n = codes.shape[:2]
        rows = codes.flatten(0, 1).float()
        size = self._size(rows)
        self.fired = self.fired + (size > 0).sum(0).cpu()
        self.tokens += b * n
        best = size.topk(min(self.keep, len(size)), dim=0).indices
        values, where = rows.gather(0, best).cpu(), best.cpu() + first * n
        if self.values is not None and self.where is not None:
            values, where = torch.cat([self.values, values]), torch.cat([self.where, where])
            order = self._size(values).topk(min(self.keep, len(values)), dim=0).indices
            values, where = values.gather(0, order), where.gather(0, order)
        self.values, self.where = values, where

    def atoms(self, patches: int) -> Firing:
        assert self.values is not None
        assert self.where is not None
        values, where = self.values.mT.contiguous(), self.where.mT.contiguous()
        return Firing(
            fires=torch.as_tensor(self.fired).float() / self.tokens,
            values=values.masked_fill(self._size(values) <= 0, torch.nan),
            images=where // patches,
            patches=where % patches,
        )

    def _size(self, values: Tensor) -> Tensor:
        return values.abs() if self.signed else values


@torch.no_grad()
def strongest(
    model: Any,
    batches: Iterable[Any],
    *,
    prefix: int,
    keep: int = 6,
    limit: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[int, Firing]:
    """For each layer (from 1) that has a code, which patches make each of its atoms fire most.

    Args:
        model: CRATE or any model made of steps, or a timm ViT; layers without a code are left out.
        batches: images as the model takes them, or tuples that begin with them.
        prefix: tokens in front of the patches, which are passed over.
        keep: patches of each atom.
        limit: look at no more than so many images.
        progress: called with the number of images after each batch.

    Raises:
        DataError: no images.
    """
    device = next(model.parameters()).device
    signed = any(isinstance(step, SoftISTA) for step in model.modules())
    found: dict[int, _Strongest] = {}
    seen = patches = 0
    images: Any
    for images in input_batches(batches, device, limit):
        cache = run_with_cache(model, images, lambda name: name.endswith("mlp.hook_post"))[1]
        for name, codes in cache.items():
            layer = int(name.split(".")[1]) + 1
            codes = codes[:, prefix:]
            patches = codes.shape[1]
            found.setdefault(layer, _Strongest(keep, signed)).add(codes, seen)
        seen += len(images)
        if progress is not None:
            progress(len(images))
    if not seen:
        raise DataError("no images to look at - give at least one batch")
    return {layer: kept.atoms(patches) for layer, kept in sorted(found.items())}


__all__ = ["Firing", "strongest"]
