"""What a model makes of images, for whoever wants to use it: the tokens behind its last norm."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Int
from torch import Tensor

from pellucid.errors import ConfigError, DataError, suggest
from pellucid.models.embed import embedding
from pellucid.models.modes import in_eval_mode

Tokens = Literal["pooled", "cls", "avg", "patch", "all"]


@dataclass(frozen=True)
class Features:
    """Features of images, with what is known of each.

    Attributes:
        values: float32 on the CPU: ``(n, d)``, or ``(n, t, d)`` for several tokens of each image.
        labels: ``(n,)``, -1 where not known.
        index: which images they are, ``(n,)``.
    """

    values: Tensor
    labels: Int[Tensor, n]
    index: Int[Tensor, n]

    def __len__(self) -> int:
        return len(self.labels)


def features(
    model: Any,
    batches: Iterable[Any],
    tokens: Tokens = "pooled",
    *,
    progress: Callable[[int], None] | None = None,
) -> Features:
    """All features of ``batches``, with no more memory than they take; arguments as :func:`feature_batches`.

    Raises:
        ConfigError, DataError: as :func:`feature_batches`; no images.
    """
    parts = list(feature_batches(model, batches, tokens, progress=progress))
    if not parts:
        raise DataError("no images to take features of - give at least one batch")
    labels, index = torch.cat([part.labels for part in parts]), torch.cat([part.index for part in parts])
    first = parts[0].values
    values = first.new_empty(len(labels), *first.shape[1:])
    for part in values.split([len(part) for part in parts]):
        part.copy_(parts.pop(0).values)  # each is let go when it has been copied
    return Features(values, labels, index)


def feature_batches(
    model: Any,
    batches: Iterable[Any],
    tokens: Tokens = "pooled",
    *,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Features]:
    """Features of one batch after the other, of any of our models and timm's.

    Tokens are those of ``forward_features``: after the last layer and the final norm. Those of timm's ViTs
    that pool by average have that norm behind the pooling, and their tokens come as the last layer leaves
    them.

    Args:
        model: images to tokens.
        batches: ``(images, labels, index)``, ``(images, labels)`` or images; without labels these are -1,
            without index images are counted.
        tokens: one feature of each image, ``(b, d)``: ``"pooled"`` (what the classifier reads, or would),
            ``"cls"`` (the class token) or ``"avg"`` (the mean of the patches); several, ``(b, t, d)``:
            ``"patch"``, or ``"all"``, with class token and registers before the patches.
        progress: is told the number of images of each batch.

    Raises:
        ConfigError: tokens that this model does not have, naming one that it has.
    """
    if tokens not in get_args(Tokens):
        raise ConfigError(f"tokens is '{tokens}'{suggest(str(tokens), get_args(Tokens))}")
    if tokens == "cls" and not _has_class_token(model):
        raise ConfigError(f"{_name(model)} has no class token - take avg, the mean of its patches, or pooled")
    device = next(model.parameters()).device
    seen = 0
    with in_eval_mode(model), torch.no_grad():
        for batch in batches:
            images, labels, index = _parts(batch, seen)
            values = _chosen(model, images.to(device), tokens).float().cpu()
            seen += len(values)
            yield Features(values, labels, index)
            if progress is not None:
                progress(len(values))


def patch_grid(model: Any, img_size: tuple[int, int], count: int) -> tuple[int, int]:
    """Rows and columns of the ``count`` patches that the model cuts images of this size into.

    Raises:
        ConfigError: patches that are no grid.
    """
    patch = getattr(embedding(model), "patch_size", None)
    height, width = img_size
    grid = (height // patch[0], width // patch[1]) if patch is not None else (math.isqrt(count),) * 2
    if grid[0] * grid[1] != count:
        raise ConfigError(f"the {count} patches of {_name(model)} are no grid - take pooled features")
    return grid


def prefix_length(model: Any) -> int:
    """How many tokens, class token and registers, stand before the patches."""
    return int(getattr(model, "num_prefix_tokens", int(_has_class_token(model))))


def _chosen(model: Any, images: Tensor, tokens: Tokens) -> Tensor:
    z = model.forward_features(images)
    if tokens == "pooled":
        pooled = model.forward_head(z, pre_logits=True)
        if pooled.dim() != 2:
            raise ConfigError(f"{_name(model)} does not pool its tokens - take cls, avg or patch")
        return pooled
    if z.dim() != 3:
        raise ConfigError(f"{_name(model)} gives no row of tokens - take pooled features")
    if tokens == "cls":
        return z[:, 0]
    if tokens == "all":
        return z
    patches = z[:, prefix_length(model) :]
    return patches.mean(1) if tokens == "avg" else patches


def _parts(batch: Any, seen: int) -> tuple[Tensor, Tensor, Tensor]:
    images, *known = batch if isinstance(batch, tuple | list) else (batch,)
    labels = known[0] if known else torch.full((len(images),), -1)
    index = known[1] if len(known) > 1 else torch.arange(seen, seen + len(images))
    return images, labels.cpu(), index.cpu()


def _has_class_token(model: Any) -> bool:
    return bool(getattr(model, "has_class_token", getattr(model, "cls_token", None) is not None))


def _name(model: Any) -> str:
    return str(getattr(model, "architecture", type(model).__name__))
