"""What a report shows of a run without labels: the views it learnt from, and what its features are worth."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from pellucid.analytic import PCA
from pellucid.data import ImageData, ImageSet, Masking, MultiView, View, draws, eval_loader
from pellucid.errors import DataError
from pellucid.glass.feed import eval_view
from pellucid.glass.pictures import thumbnail
from pellucid.measure.features import Features, features
from pellucid.measure.probes import NEIGHBOURS, knn_probe
from pellucid.measure.reconstruction import reconstructions
from pellucid.models.embed import patch_grid
from pellucid.objectives import effective_rank
from pellucid.training import Run
from pellucid.training.masked import MAE
from pellucid.training.pictures import REFERENCE, several_views, training_view
from pellucid.training.run import OBJECTIVES

QUERIES, NEAR = 6, 6
"""Images whose neighbours are shown, and how many of them."""

VIEWED = 3
"""Images whose views are shown."""

FILLED = 6
"""Images whose hidden patches are shown filled in."""

POINTS = 500
"""Images at most on the map."""

CELLS = (15, 9)
"""Columns and rows of the map of pictures."""


def learnt(run: Run) -> dict[str, Any]:
    """From what a run has learnt, with the numbers that define it."""
    return {
        "objective": run.config.objective,
        "labels": OBJECTIVES[run.config.objective].needs_labels,
        "settings": dict(run.config.objective_args),
    }


def health(run: Run) -> dict[str, str] | None:
    """The verdict of the last evaluation; None where the objective gives none."""
    judged = [line for line in run.metrics if line["split"] == "test" and "verdict" in line]
    return {"state": judged[-1]["health"], "text": judged[-1]["verdict"]} if judged else None


def worth(run: Run, images: ImageData) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Scores of the nearest neighbours, None without labels; and what there is to see of the features.

    Of more than 5,000 training images so many, evenly spaced, stand for all, as in training.
    """
    view = eval_view(run.model)
    known = features(run.model, eval_loader(images.train, view, limit=REFERENCE))
    test = features(run.model, eval_loader(images.test, view))
    unit = F.normalize(test.values, dim=-1)
    shown = {
        "width": unit.shape[1],
        "images": len(test),
        "effective_rank": float(effective_rank(unit)),
        "map": _map(unit, test, images, view),
        "neighbours": _neighbours(unit, F.normalize(known.values, dim=-1), test, known, images, view),
    }
    return _scores(known, test, images), shown


def _scores(known: Features, test: Features, images: ImageData) -> dict[str, Any] | None:
    if not images.class_names:
        return None
    probe = knn_probe(known, test, images.class_names, k=(min(NEIGHBOURS, len(known)),))
    return {
        **probe.scores.to_dict(),
        "by": "neighbours",
        "neighbours": probe.settings["k"],
        "train": probe.train_images,
    }


def _map(unit: Float[Tensor, "n d"], test: Features, images: ImageData, view: View) -> dict[str, Any] | None:
    """The first two principal coordinates; None where the features are one point, or hardly more images."""
    try:
        fit = PCA(n_components=2).fit(unit)
    except (DataError, ValueError):
        return None
    at = fit.transform(unit)
    count = min(POINTS, len(at))
    spaced = torch.arange(count) * len(at) // count
    return {
        "shares": fit.explained_variance_ratio_.tolist(),
        "points": [
            [round(x, 4), round(y, 4), _label(test.labels[i], images)]
            for i, (x, y) in zip(spaced.tolist(), at[spaced].tolist(), strict=True)
        ],
        "grid": list(CELLS),
        "pictures": [
            {**place, **_item(images.test, int(test.index[i]), images, view, 64)} for i, place in _cells(at)
        ],
    }


def _cells(at: Float[Tensor, "n 2"]) -> list[tuple[int, dict[str, int]]]:
    """For each cell of the map that has images, the one nearest to its middle."""
    low, high = at.amin(0), at.amax(0)
    size = torch.tensor(CELLS)
    place = (at - low) / (high - low).clamp_min(1e-12) * size
    cell = place.floor().long().clamp_min(0).minimum(size - 1)
    off = (place - cell - 0.5).square().sum(-1)
    nearest: dict[tuple[int, int], int] = {}
    for i in off.argsort().tolist():
        nearest.setdefault((int(cell[i, 0]), int(cell[i, 1])), i)
    rows = CELLS[1]
    return [(i, {"column": x, "row": rows - 1 - y}) for (x, y), i in sorted(nearest.items())]


def _neighbours(
    unit: Float[Tensor, "n d"],
    others: Float[Tensor, "m d"],
    test: Features,
    known: Features,
    images: ImageData,
    view: View,
) -> list[dict[str, Any]]:
    """Test images, each with the training images nearest to it by cosine."""
    asked = some_of(images.test, QUERIES)
    cosines, found = (unit[asked] @ others.mT).topk(min(NEAR, len(others)))

    return [
        {
            **_item(images.test, i, images, view),
            "near": [
                {**_item(images.train, int(known.index[j]), images, view), "cosine": cosine}
                for j, cosine in zip(near.tolist(), values.tolist(), strict=True)
            ],
        }
        for i, near, values in zip(asked, found, cosines, strict=True)
    ]


def views(run: Run, images: ImageData) -> dict[str, Any] | None:
    """Pictures as the model saw them in training; None for an objective that sees each as it is."""
    kind = OBJECTIVES[run.config.objective]
    if issubclass(kind, MAE):
        return _filled(run, images)
    return _crops(run, images) if kind.many_views else None


def training_views(run: Run, images: ImageData) -> MultiView:
    """The views from which a run of many views has learnt."""
    view = training_view(run.config, images, eval_view(run.model).img_size)
    hides = run.config.objective_args.get("patches")
    return several_views(run.config, view, Masking(patch_grid(run.model)) if hides else None)


def _crops(run: Run, images: ImageData) -> dict[str, Any]:
    """Of a few training images all views of the first epoch, hidden patches in gray."""
    view = training_views(run, images)
    chosen = some_of(images.train, VIEWED)
    crops = view.batch([images.train.image(i) for i in chosen], chosen)
    grid = patch_grid(run.model) if crops.mask.shape[-1] else (0, 0)
    plain, small = eval_view(run.model), max(24, round(96 * view.small_size[0] / view.img_size[0]))
    return {
        "kind": "crops",
        "split": view.split,
        "size": list(view.img_size),
        "small_size": list(view.small_size),
        "images": [
            {
                **_item(images.train, i, images, plain),
                "large": [
                    thumbnail(_hidden(crop, mask, grid) if grid[0] else crop, plain)
                    for crop, mask in zip(crops.large[row], crops.mask[row], strict=True)
                ],
                "small": [thumbnail(crop, plain, small) for crop in crops.small[row]],
            }
            for row, i in enumerate(chosen)
        ],
    }


def _filled(run: Run, images: ImageData) -> dict[str, Any]:
    """Of a few test images the visible patches, and what the decoder makes of the others."""
    view, chosen = eval_view(run.model), some_of(images.test, FILLED)
    batch = view.batch([images.test.image(i) for i in chosen], chosen)
    masking = MAE(run.model, **run.config.objective_args).masking
    mask = masking.mask(draws(0, 0, chosen, masking.draws))
    _, masked, filled = reconstructions(run.model, batch, mask)
    return {
        "kind": "hidden",
        "share": float(mask[0].float().mean()),
        "images": [
            {
                **_item(images.test, i, images, view),
                "masked": thumbnail(masked[row], view),
                "filled": thumbnail(filled[row], view),
            }
            for row, i in enumerate(chosen)
        ],
    }


def _hidden(
    crop: Float[Tensor, "c h w"], mask: Bool[Tensor, " p"], grid: tuple[int, int]
) -> Float[Tensor, "c h w"]:
    """The crop with hidden patches at 0, the mean of the data."""
    height, width = crop.shape[-2] // grid[0], crop.shape[-1] // grid[1]
    at = mask.unflatten(0, grid).repeat_interleave(height, 0).repeat_interleave(width, 1)
    return crop.masked_fill(at, 0.0)


def some_of(images: ImageSet, count: int) -> list[int]:
    """So many images: the first of each of the first classes; without labels evenly spaced ones."""
    known = images.labels.unique()
    if bool((known >= 0).all()):
        return [int((images.labels == k).nonzero()[0, 0]) for k in known[:count]]
    count = min(count, len(images))
    return [i * len(images) // count for i in range(count)]


def _label(label: Tensor, images: ImageData) -> str | None:
    return images.class_names[int(label)] if label >= 0 else None


def _item(part: ImageSet, i: int, images: ImageData, view: View, side: int = 96) -> dict[str, Any]:
    """Name, class and picture of one image."""
    picture = thumbnail(view.batch([part.image(i)], [i])[0], view, side)
    return {"name": part.name(i), "label": _label(part.labels[i], images), "png": picture}
