"""What a model sees as one thing, though no mask was ever shown to it: heads, cuts, and directions of
features.

All of it reads one layer, and one feature of each patch there: the projections ``U_k^T z`` of all subspaces
side by side in a white box (query, key and value at once), the keys in a ViT. Class token and registers are
left out. Nothing is trained and nothing is smoothed afterwards: a mask is as fine as the patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pellucid.errors import ConfigError, NumericsError
from pellucid.measure.attention import Heads, has_class_token, watch_heads
from pellucid.measure.cuts import Weights, affinity, cut_value, relaxed_cut
from pellucid.measure.features import patch_grid
from pellucid.measure.watch import has_steps
from pellucid.steps import SubspaceStep

By = Literal["count", "mass"]

MASKCUT_TAU, TOKENCUT_TAU = 0.15, 0.2
"""Cosine from which on patches count as alike, as published."""

SHARE = 0.6
"""Of the patches, or of the attention, that a head's mask keeps, as published."""

CHANCE = 1.0 - 1e-6
"""NCut of a part taken at random among patches that are all alike; a cut that costs as much finds nothing."""

FEWEST = 4
"""Patches that are worth cutting."""


@dataclass(frozen=True)
class Look:
    """One layer's view of images.

    Attributes:
        layer: from 1.
        grid: rows and columns of patches.
        features: of each patch, ``(b, n, d)``, float32 on the CPU.
        heads: how much each head reads each patch, ``(b, K, n)``, rows summing to one; for ToST how much of
            the patch belongs to the head.
    """

    layer: int
    grid: tuple[int, int]
    features: Float[Tensor, "b n d"]
    heads: Float[Tensor, "b K n"]


@dataclass(frozen=True)
class Segment:
    """One thing.

    Attributes:
        mask: which patches, ``(rows, columns)``.
        score: 1 - NCut of the cut that found it, in (0, 1].
    """

    mask: Bool[Tensor, "r c"]
    score: float


def default_layer(model: Any) -> int:
    """The last but one of a white box, the last of a black box, as published. From 1.

    Raises:
        ConfigError: a model without layers to look into.
    """
    depth = len(_layers(model))
    white = any(isinstance(module, SubspaceStep) for module in model.modules())
    return max(1, depth - 1) if white else depth


@torch.no_grad()
def look(model: Any, images: Float[Tensor, "b c h w"], layer: int | None = None) -> Look:
    r"""What segmentation reads of ``images``, in one pass.

    A head is the softmax over the patches of :math:`\langle U_k^\top z_i, U_k^\top z_{\mathrm{CLS}}\rangle`,
    with the scale of the step's own attention; without a class token the mean over all readers. Exact
    compression forms no attention; the same formula on its projections stands in for it.

    Args:
        model: CRATE or ToST of any kind, or a timm ViT, for images of this size (``models.embed.resized``).
        images: as the model takes them, on its device.
        layer: from 1; see :func:`default_layer`.

    Raises:
        ConfigError: a layer that the model does not have, or that has no heads that can be looked at.
        NumericsError: features that are not finite.
    """
    depth = len(_layers(model))
    layer = default_layer(model) if layer is None else layer
    if not 1 <= layer <= depth:
        raise ConfigError(f"layer is {layer}; {_name(model)} has 1 to {depth}")
    found: list[tuple[Tensor, Tensor]] = []

    def see(heads: Heads) -> None:
        if heads.layer == layer:
            features = heads.features()
            reading = (
                heads.reading() if heads.reading is not None else _reading(features, heads.prefix, model)
            )
            found.append((features[:, heads.prefix :].flatten(-2).float().cpu(), reading.float().cpu()))

    watch_heads(model, images, see)
    if not found:
        raise ConfigError(
            f"layer {layer} of {_name(model)} has no heads that can be looked at - take CRATE, ToST or a "
            f"timm ViT with plain attention"
        )
    features, heads = found[-1]
    if not bool(features.isfinite().all() and heads.isfinite().all()):
        raise NumericsError(
            f"layer {layer} of {_name(model)} gives NaN or infinity - look at the model's weights"
        )
    height, width = images.shape[-2:]
    grid = patch_grid(model, (int(height), int(width)), features.shape[1])
    return Look(layer, grid, features, heads / heads.sum(-1, keepdim=True).clamp_min(1e-12))


def head_masks(heads: Float[Tensor, "*b n"], share: float = SHARE, by: By = "count") -> Bool[Tensor, "*b n"]:
    """The patches that each head reads most.

    Args:
        heads: not negative, along the last axis one number for each patch.
        share: in (0, 1].
        by: ``"count"``: so large a share of the patches, rounded, at least one (the text of Pai et al. 2023);
            ``"mass"``: as few patches as hold so large a share of the attention (DINO's program). Of equal
            numbers the first patch goes first.

    Raises:
        ConfigError: a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ConfigError(f"share is {share:g}; it must be larger than 0 and at most 1")
    values, order = heads.double().sort(stable=True, dim=-1, descending=True)
    if by == "count":
        kept = torch.zeros_like(values, dtype=torch.bool)
        kept[..., : max(1, round(share * values.shape[-1]))] = True
    else:
        larger = values.cumsum(-1) - values  # what the patches in front of this one hold
        # A sum of n numbers is exact to n rounding errors: a patch is not kept for the sake of one.
        enough = share * values.sum(-1, keepdim=True) * (1 - 1e-12)
        kept = larger < enough
        kept[..., 0] = True
    return torch.zeros_like(kept).scatter(-1, order, kept)


def token_cut(
    features: Float[Tensor, "n d"], grid: tuple[int, int], tau: float = TOKENCUT_TAU
) -> list[Segment]:
    """The one salient thing (Wang et al. 2022, TokenCut): one cut of the binary graph.

    Of its two sides the one with the patch of the largest entry of the eigenvector, and there what hangs
    together with that patch. Empty where the patches are all alike.
    """
    segment = _cut(features, torch.ones(grid, dtype=torch.bool), tau, "binary", corners=False)
    return [] if segment is None else [segment]


def mask_cut(
    features: Float[Tensor, "n d"],
    grid: tuple[int, int],
    tau: float = MASKCUT_TAU,
    masks: int = 3,
    weights: Weights = "clipped",
) -> list[Segment]:
    """Up to ``masks`` things, one cut after the other (Wang et al. 2023, CutLER).

    Each cut is made among the patches that no earlier one has taken. Its thing is the side with the patch of
    the largest entry, unless that side holds two or more corners of the picture and more than the other; of
    it, what hangs together with its patch of the largest entry. It ends early where few patches are left, or
    where they are all alike.

    Raises:
        ConfigError: less than one mask.
    """
    if masks < 1:
        raise ConfigError(f"masks is {masks}; it must be larger than 0")
    left = torch.ones(grid, dtype=torch.bool)
    found: list[Segment] = []
    while len(found) < masks:
        segment = _cut(features, left, tau, weights, corners=True)
        if segment is None:
            break
        found.append(segment)
        left = left & ~segment.mask
    return found


def _cut(
    features: Tensor, left: Bool[Tensor, "r c"], tau: float, weights: Weights, *, corners: bool
) -> Segment | None:
    """One thing among the patches that are left; None where there is none."""
    if not -1 <= tau <= 1:
        raise ConfigError(f"tau is {tau:g}; it is a cosine, between -1 and 1")
    if int(left.sum()) < FEWEST:
        return None
    graph = affinity(features[left.flatten()], tau, weights)
    y, _ = relaxed_cut(graph)
    part = y > y.mean()
    value = cut_value(graph, part)
    if value >= CHANCE:
        return None
    entries = torch.zeros(left.shape, dtype=y.dtype)
    side = torch.zeros_like(left)
    entries[left], side[left] = y, part
    if not bool(side.flatten()[entries.abs().argmax()]):
        side = left & ~side
    other = left & ~side
    if corners and _corners(side) >= 2 and _corners(side) > _corners(other):
        side = other
    seed = entries.abs().where(side, -torch.inf).argmax()
    return Segment(_hanging_together(side, int(seed)), 1 - value)


def _corners(side: Bool[Tensor, "r c"]) -> int:
    return int(side[[0, 0, -1, -1], [0, -1, 0, -1]].sum())


def _hanging_together(side: Bool[Tensor, "r c"], seed: int) -> Bool[Tensor, "r c"]:
    """The patches of ``side`` that neighbours by an edge join to the seed."""
    from scipy.ndimage import label

    parts = torch.from_numpy(label(side.numpy())[0])
    return parts == parts.flatten()[seed]


@dataclass(frozen=True)
class Colours:
    """Features of one picture as colours.

    Attributes:
        foreground: which patches the first direction keeps, ``(rows, columns)``.
        colours: 0 to 1, ``(rows, columns, 3)``; black behind.
    """

    foreground: Bool[Tensor, "r c"]
    colours: Float[Tensor, "r c 3"]


def pca_colours(
    features: Sequence[Float[Tensor, "n d"]], grids: Sequence[tuple[int, int]], threshold: float = 0.5
) -> list[Colours]:
    """The first directions of the features of several pictures, as foreground and as colours (Pai et al.
    2023).

    Both stages are uncentred, eigenvectors of the sum of :math:`z z^\\top` over all patches of all pictures.
    First: patches whose coordinate along the first direction, scaled to 0..1 over all pictures, exceeds
    ``threshold`` are the foreground. The text leaves open which end of the direction that is; here it is the
    one that is less at the pictures' borders. Second: the first three directions of the foreground alone,
    each scaled to 0..1, are red, green and blue. Pictures of one kind together give the same part the same
    colour.

    Args:
        features: of each picture, all of one width.
        grids: rows and columns of each.
        threshold: in [0, 1).

    Raises:
        ConfigError: a threshold outside [0, 1).
    """
    if not 0 <= threshold < 1:
        raise ConfigError(f"threshold is {threshold:g}; it must be 0 or larger and below 1")
    tokens = torch.cat([part.double() for part in features])
    first = _scaled(tokens @ _directions(tokens, 1))[:, 0]
    border = torch.cat([_border(grid).flatten() for grid in grids])
    if not bool(border.all()) and first[border].mean() > first[~border].mean():
        first = 1 - first
    kept = first > threshold
    colours = torch.zeros(len(tokens), 3, dtype=tokens.dtype)
    if kept.any():
        seen = _scaled(tokens[kept] @ _directions(tokens[kept], 3))
        colours[kept, : seen.shape[1]] = seen
    ends = [rows * columns for rows, columns in grids]
    return [
        Colours(mask.view(grid), shown.view(*grid, 3).float())
        for mask, shown, grid in zip(kept.split(ends), colours.split(ends), grids, strict=True)
    ]


def _directions(tokens: Float[Tensor, "n d"], count: int) -> Float[Tensor, "d k"]:
    """Leading eigenvectors of the uncentred second moment, the largest first; largest entry positive."""
    vectors = torch.linalg.eigh(tokens.mT @ tokens).eigenvectors.flip(-1)[:, :count]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * largest.sign()


def _scaled(values: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
    """Every column to 0..1; one half where it is constant."""
    low, high = values.amin(0), values.amax(0)
    span = high - low
    flat = span <= 1e-12 * values.abs().amax(0).clamp_min(1e-300)
    return torch.where(flat, 0.5, (values - low) / span.where(~flat, 1.0))


def _border(grid: tuple[int, int]) -> Bool[Tensor, "r c"]:
    border = torch.ones(grid, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    return border


def intersection_over_union(
    mask: Bool[Tensor, "*b r c"], truth: Bool[Tensor, "*b r c"]
) -> Float[Tensor, "*b"]:
    """Share of the patches (or pixels) in either that are in both; 1 where both are empty."""
    both = (mask & truth).flatten(-2).sum(-1).double()
    either = (mask | truth).flatten(-2).sum(-1).double()
    return torch.where(either > 0, both / either.clamp_min(1), 1.0)


def enlarged(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """A number for each patch, ``(rows, columns, ...)``, as one for each pixel: that of the patch it lies
    in."""
    return mask[_places(size[0], mask.shape[0])][:, _places(size[1], mask.shape[1])]


def _places(pixels: int, patches: int) -> Int[Tensor, " p"]:
    """Which patch the middle of each pixel lies in."""
    return (2 * torch.arange(pixels) + 1) * patches // (2 * pixels)


def _reading(features: Float[Tensor, "b n K p"], prefix: int, model: Any) -> Float[Tensor, "b K n"]:
    w = features.transpose(1, 2)
    scale = w.shape[-1] ** -0.5
    readers = w[:, :, :1] if has_class_token(model) else w
    weights = (readers @ w[:, :, prefix:].mT * scale).softmax(-1)
    return weights.mean(-2)


def _layers(model: Any) -> Any:
    layers = getattr(model, "layers", None) if has_steps(model) else getattr(model, "blocks", None)
    if not isinstance(layers, torch.nn.ModuleList | torch.nn.Sequential):
        raise ConfigError(f"cannot look inside {_name(model)} - take CRATE, ToST or a timm ViT")
    return layers


def _name(model: Any) -> str:
    return str(getattr(model, "architecture", type(model).__name__))
