"""How well models that were never shown a mask find objects: heads, MaskCut, TokenCut and PCA, against true
masks.

    python benchmarks/emoji.py emoji32
    python benchmarks/segmentation.py emoji32 [--seeds 0 1 2] [--epochs 40] [--out runs/segmentation]

trains CRATE, strict CRATE, ToST, a ViT and the published ablation by one recipe and at one width, with class
labels; CRATE and the ViT also with four registers, and without labels by SimDINO. Then it compares what each
finds on pictures of ``val``, whose emoji and photographs stand in no other, with the emoji's alpha channel.
Beside them stand the same networks untrained, all of the picture, and a square in its middle.

Masks are compared patch by patch: a patch is the object's where the emoji covers more than half of it.
Pictures in which it covers half of no patch are left out, and counted. IoU is the mean over pictures.

A run that has ended is taken as it is, and so is a measurement: the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pellucid.data import ImageData, load_data, read_image
from pellucid.errors import Stopped
from pellucid.glass.feed import eval_view
from pellucid.measure.audit import OUTLIER_NORM
from pellucid.measure.features import prefix_length
from pellucid.measure.segmentation import (
    Look,
    head_masks,
    intersection_over_union,
    look,
    mask_cut,
    pca_colours,
    token_cut,
)
from pellucid.measure.watch import Sighting, watch
from pellucid.models import load
from pellucid.models.embed import patch_grid
from pellucid.models.modes import in_eval_mode
from pellucid.probing import untrained
from pellucid.training import train

SIZE = {"embed_dim": 96, "depth": 4, "num_heads": 6}
"""Of all: as many heads to choose from, and a minute or two of training on a CPU."""

REGISTERS = {"reg_tokens": 4}

ROWS: dict[str, tuple[str, str, dict[str, int]]] = {
    "CRATE": ("supervised", "crate_micro_patch4_32", {}),
    "ViT": ("supervised", "vit_micro_patch4_32", {}),
    "strict CRATE": ("supervised", "crate_strict_micro_patch4_32", {}),
    "MSSA + MLP": ("supervised", "mssa_mlp_micro_patch4_32", {}),
    "MHSA + ISTA": ("supervised", "mhsa_ista_micro_patch4_32", {}),
    "MHSA + MLP": ("supervised", "mhsa_mlp_micro_patch4_32", {}),
    "CRATE, 4 registers": ("supervised", "crate_micro_patch4_32", REGISTERS),
    "ViT, 4 registers": ("supervised", "vit_micro_patch4_32", REGISTERS),
    "ToST": ("supervised", "tost_micro_patch4_32", {}),
    "CRATE, SimDINO": ("simdino", "crate_micro_patch4_32", {}),
    "ViT, SimDINO": ("simdino", "vit_micro_patch4_32", {}),
}
"""Name -> objective, model, and what it has besides :data:`SIZE`."""

UNTRAINED = ("CRATE", "ViT")
"""Also measured with fresh weights."""

COLUMNS = {
    "heads count": "best head, count",
    "fixed head count": "one head, count",
    "heads mass": "best head, mass",
    "fixed head mass": "one head, mass",
    "maskcut": "MaskCut",
    "maskcut best": "best of 3",
    "tokencut": "TokenCut",
    "pca": "PCA",
}


@dataclass(frozen=True)
class Pictures:
    """Pictures of a folder with their true masks.

    Attributes:
        images: uint8 ``(n, 3, h, w)``.
        masks: share of each pixel that the object covers, ``(n, h, w)``.
        kinds: whose class is the same, PCA sees together.
    """

    images: Tensor
    masks: Tensor
    kinds: list[str]

    @classmethod
    def read(cls, data: Path, split: str, limit: int) -> Pictures:
        """At most ``limit`` of them, evenly spaced."""
        paths = sorted((data / split).glob("*/*.png"))
        if not paths:
            raise SystemExit(f"error: {data / split} holds no pictures - make them with benchmarks/emoji.py")
        chosen = [paths[i * len(paths) // min(limit, len(paths))] for i in range(min(limit, len(paths)))]
        masks = [np.asarray(Image.open(data / "masks" / path.relative_to(data))) for path in chosen]
        return cls(
            torch.stack([read_image(path) for path in chosen]),
            torch.from_numpy(np.stack(masks)).float() / 255,
            [path.parent.name for path in chosen],
        )

    def truth(self, grid: tuple[int, int]) -> Tensor:
        """Which patches are the object's, ``(n, rows, columns)``."""
        return torch.nn.functional.adaptive_avg_pool2d(self.masks[:, None], grid)[:, 0] > 0.5


def looks(model: Any, pictures: Pictures, batch_size: int = 64) -> Look:
    """One layer's view of all of them."""
    view = eval_view(model)
    index = np.arange(len(pictures.images))
    parts = [
        look(model, view.batch(pictures.images[i], index[i]))
        for i in np.split(index, range(batch_size, len(index), batch_size))
    ]
    features, heads = (torch.cat([getattr(part, name) for part in parts]) for name in ("features", "heads"))
    return Look(parts[0].layer, parts[0].grid, features, heads)


def measure(model: Any, chosen_on: Pictures, pictures: Pictures) -> dict[str, Any]:
    """IoU of everything that ``model`` finds in ``pictures``; the one head is chosen on other pictures."""
    seen = looks(model, pictures)
    truth = pictures.truth(seen.grid)
    counted = truth.flatten(1).any(1)
    nothing = torch.zeros(seen.grid, dtype=torch.bool)

    def score(masks: Iterable[Tensor]) -> float:
        return intersection_over_union(torch.stack(list(masks)), truth)[counted].mean().item()

    found: dict[str, Any] = {
        "layer": seen.layer,
        "pictures": int(counted.sum()),
        "left out": int((~counted).sum()),
    }
    other = looks(model, chosen_on)
    others = chosen_on.truth(other.grid)
    for by in ("count", "mass"):
        of_heads = _of_heads(seen, truth, by)[counted]
        head = int(_of_heads(other, others, by)[others.flatten(1).any(1)].mean(0).argmax())
        found[f"heads {by}"] = of_heads.amax(1).mean().item()
        found[f"fixed head {by}"] = of_heads[:, head].mean().item()
    cuts = [mask_cut(each, seen.grid) for each in seen.features]
    found["maskcut"] = score(segments[0].mask if segments else nothing for segments in cuts)
    best = [
        max((intersection_over_union(s.mask, true).item() for s in segments), default=0.0)
        for segments, true in zip(cuts, truth, strict=True)
    ]
    found["maskcut best"] = torch.tensor(best)[counted].mean().item()
    single = [token_cut(each, seen.grid) for each in seen.features]
    found["tokencut"] = score(segments[0].mask if segments else nothing for segments in single)
    foreground = torch.zeros_like(truth)
    for kind in sorted(set(pictures.kinds)):
        own = [i for i, each in enumerate(pictures.kinds) if each == kind]
        colours = pca_colours([seen.features[i] for i in own], [seen.grid] * len(own))
        for i, each in zip(own, colours, strict=True):
            foreground[i] = each.foreground
    found["pca"] = score(foreground)
    found["outliers"] = outliers(model, pictures)
    return found


def _of_heads(seen: Look, truth: Tensor, by: Any) -> Tensor:
    """IoU of each head on each picture, ``(n, K)``."""
    masks = head_masks(seen.heads, by=by).unflatten(-1, seen.grid)
    return intersection_over_union(masks, truth[:, None])


def outliers(model: Any, pictures: Pictures) -> list[float]:
    """Layer by layer the share of patches whose token is more than three times as long as the picture's
    median."""
    view, shares = eval_view(model), dict[int, list[Tensor]]()
    before = getattr(getattr(model, "embed", None), "num_prefix_tokens", prefix_length(model))

    def see(sighting: Sighting) -> None:
        norms = sighting.tokens[:, before:].norm(dim=-1)
        share = (norms > OUTLIER_NORM * norms.median(-1, keepdim=True).values).float().mean(-1)
        shares.setdefault(sighting.layer, [])[:] = [share]  # of a layer's steps the last

    sums: dict[int, list[Tensor]] = {}
    with in_eval_mode(model):
        for i in np.split(np.arange(len(pictures.images)), range(64, len(pictures.images), 64)):
            watch(model, view.batch(pictures.images[i], i), see)
            for layer, (share,) in shares.items():
                sums.setdefault(layer, []).append(share)
    return [torch.cat(parts).mean().item() for _, parts in sorted(sums.items())]


def controls(grid: tuple[int, int], chosen_on: Pictures, pictures: Pictures) -> dict[str, dict[str, float]]:
    """All of the picture, and the centred square of the best side on other pictures."""

    def square(side: int) -> Tensor:
        mask = torch.zeros(grid, dtype=torch.bool)
        top, left = ((whole - side) // 2 for whole in grid)
        mask[max(0, top) : top + side, max(0, left) : left + side] = True
        return mask

    def score(mask: Tensor, on: Pictures) -> float:
        truth = on.truth(grid)
        truth = truth[truth.flatten(1).any(1)]
        return intersection_over_union(mask.expand_as(truth), truth).mean().item()

    side = max(range(1, max(grid) + 1), key=lambda side: score(square(side), chosen_on))
    everything = torch.ones(grid, dtype=torch.bool)
    return {
        "all of the picture": {"iou": score(everything, pictures)},
        f"the middle {side} x {side} patches": {"iou": score(square(side), pictures)},
    }


def rows(asked: argparse.Namespace, images: ImageData) -> Iterator[dict[str, Any]]:
    """Seed by seed, so that a run that is stopped early has compared everything."""
    data = Path(asked.data)
    chosen_on, pictures = (Pictures.read(data, split, asked.limit) for split in ("train", "val"))
    for seed in asked.seeds:
        for name in asked.rows:
            objective, model_name, more = ROWS[name]
            label = name.lower().replace(" + ", "-").replace(", ", "-").replace(" ", "-")
            folder = asked.out / images.name / f"{label}-s{seed}"
            if not (folder / "result.json").is_file():
                train(
                    images,
                    model=model_name,
                    model_args={**SIZE, **more},
                    objective=objective,
                    seed=seed,
                    epochs=asked.epochs,
                    out=str(folder),
                    resume=(folder / "config.yaml").is_file(),
                    progress=False,
                )
            model = load(folder)
            accuracy = json.loads((folder / "result.json").read_text()).get("accuracy")
            row = {"model": name, "seed": seed, "accuracy": accuracy}
            yield kept(folder / "segmentation.json", row, partial(measure, model, chosen_on, pictures), asked)
            if name in UNTRAINED:
                fresh = untrained(model, seed)
                row = {"model": f"{name}, untrained", "seed": seed, "accuracy": None}
                file = folder / "segmentation-untrained.json"
                yield kept(file, row, partial(measure, fresh, chosen_on, pictures), asked)
    for name, found in controls(patch_grid(model), chosen_on, pictures).items():
        yield {"model": name, "seed": None, **found}


def kept(
    file: Path, row: dict[str, Any], make: Callable[[], dict[str, Any]], asked: argparse.Namespace
) -> dict[str, Any]:
    """The row as it stands in the file, where it was measured on as many pictures; else measured now."""
    if file.is_file():
        known = json.loads(file.read_text())
        if known.get("limit") == asked.limit:
            return known
    row = {**row, "limit": asked.limit, **make()}
    file.write_text(json.dumps(row, indent=1) + "\n")
    print(json.dumps(row), flush=True)
    return row


def table(found: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over seeds, in per cent."""
    lines = [
        f"| model | {' | '.join(COLUMNS.values())} | outliers | accuracy |",
        "|---" * (len(COLUMNS) + 3) + "|",
    ]
    for name in dict.fromkeys(row["model"] for row in found):
        group = [row for row in found if row["model"] == name]
        if "iou" in group[0]:
            lines.append(f"| {name} | {100 * group[0]['iou']:.1f} |" + " |" * (len(COLUMNS) + 1))
            continue
        cells = [_spread([row[key] for row in group]) for key in COLUMNS]
        cells.append(_spread([row["outliers"][-1] for row in group]))
        accuracy = [row["accuracy"] for row in group if row["accuracy"] is not None]
        cells.append(_spread(accuracy) if accuracy else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    values = [100 * value for value in values]
    return f"{mean(values):.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", help="a folder that benchmarks/emoji.py made")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="MODEL")
    parser.add_argument("--epochs", type=float, default=40)
    parser.add_argument("--limit", type=int, default=1280, help="pictures of each part [default: 1280]")
    parser.add_argument("--out", type=Path, default=Path("runs/segmentation"))
    asked = parser.parse_args()
    images = load_data(asked.data)
    try:
        found = list(rows(asked, images))
    except Stopped as stopped:
        print(f"{stopped}\nthe same command goes on from there", file=sys.stderr)
        raise SystemExit(stopped.exit_code) from None
    print(table(found))
    (asked.out / images.name / "segmentation.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
