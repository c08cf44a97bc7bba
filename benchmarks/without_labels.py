"""What features learnt without labels are worth: SimDINO, DINO, MCR2 of views, MAE, beside supervised ones.

    python benchmarks/without_labels.py DATA [--seeds 0 1 2] [--epochs 60] [--out runs/without-labels]
    python benchmarks/without_labels.py DATA --collapse 20 [--epochs 10]

The first trains every objective with CRATE and with a ViT of about as many parameters, all for as many passes
over the training images, and probes the features that each run hands over: weighted nearest neighbours
(k = 20) and a linear map chosen on training images alone. For a supervised run they are those in front of its
classifier. Runs that have ended are taken as they are: the same command goes on where it stopped.

The second draws hyper-parameters for SimDINO and for DINO, as many for each, over ranges as wide as one would
search, and counts the runs whose last verdict is that their features have collapsed or are collapsing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import numpy as np

from pellucid.comparison import Spec, match_parameters
from pellucid.data import ImageData, load_data
from pellucid.models import load
from pellucid.probing import frozen
from pellucid.training import Run, open_run, train

OBJECTIVES = ("simdino", "dino", "mae", "supervised", "simdinov2", "mcr2-views")

DIGITS = {"crate": "crate_digits", "vit": "vit_digits", "size": {}}
SMALL = {
    "crate": "crate_micro_patch4_32",
    "vit": "vit_micro_patch4_32",
    "size": {"embed_dim": 96, "depth": 4, "patch_size": 8},
}
"""For pictures of 32 pixels, as large as a minute on a CPU allows."""


def models(images: ImageData) -> dict[str, Spec]:
    """CRATE and a ViT of about as many parameters; mean of the patches for a feature, in all."""
    names = DIGITS if images.img_size is not None and max(images.img_size) <= 12 else SMALL
    args = {**names["size"], "global_pool": "avg"}
    first = Spec("CRATE", names["crate"], args)
    vit = Spec("ViT", names["vit"], {k: v for k, v in args.items() if k != "embed_dim"})
    return dict(zip(("CRATE", "ViT"), match_parameters([first, vit], images), strict=True))


def options_of(objective: str, spec: Spec) -> dict[str, Any]:
    """The model and the recipe of one row."""
    name, args = spec.name, dict(spec.model_args)
    if objective == "mae":
        family, rest = name.split("_", 1)
        name = f"{family}_mae_{rest}"
    return {"objective": objective, "model": name, "model_args": args}


def trained(folder: Path, images: ImageData, **options: Any) -> Run:
    if (folder / "result.json").is_file():
        return open_run(folder)
    resume = (folder / "config.yaml").is_file()
    return train(images, out=str(folder), resume=resume, progress=False, **options)


def rows(asked: argparse.Namespace, images: ImageData) -> Iterator[dict[str, Any]]:
    """Seed by seed, so that a run that is stopped early has compared everything."""
    for seed in asked.seeds:
        for objective in asked.objectives:
            for family, spec in models(images).items():
                folder = asked.out / images.name / f"{objective}-{family}-s{seed}"
                run = trained(folder, images, seed=seed, epochs=asked.epochs, **options_of(objective, spec))
                model = load(folder)
                features = frozen(model, images)
                row = {
                    "objective": objective,
                    "model": family,
                    "seed": seed,
                    "parameters": encoder_size(model),
                    "knn": features.knn().scores.accuracy,
                    "linear": features.linear().scores.accuracy,
                    "effective rank": run.measures.get("effective rank"),
                    "seconds": run.seconds,
                }
                print(json.dumps(row), flush=True)
                yield row


def encoder_size(model: Any) -> int:
    """Parameters of what gives the features, without a classifier and without a decoder."""
    other = ("decoder", "mask_token", "head.")
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith(other))


def table(found: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over seeds, in per cent."""
    lines = ["| learnt by | model | parameters | k-NN | linear | seconds |", "|---|---|---|---|---|---|"]
    for key in dict.fromkeys((row["objective"], row["model"]) for row in found):
        group = [row for row in found if (row["objective"], row["model"]) == key]
        cells = [_spread([100 * row[name] for row in group]) for name in ("knn", "linear")]
        seconds = median(row["seconds"] for row in group)
        count = group[0]["parameters"]
        lines.append(f"| {key[0]} | {key[1]} | {count:,} | {cells[0]} | {cells[1]} | {seconds:.0f} |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{mean(values):.2f} ± {stdev(values):.2f}" if len(values) > 1 else f"{values[0]:.2f}"


def draw(objective: str, random: np.random.Generator) -> dict[str, Any]:
    """Hyper-parameters; ranges are uniform in the logarithm unless they are lists."""

    def log(low: float, high: float) -> float:
        return float(np.exp(random.uniform(np.log(low), np.log(high))))

    options: dict[str, Any] = {
        "lr": log(1e-4, 1e-2),
        "matrix_lr": log(1e-3, 3e-2),
        "batch_size": int(random.choice([32, 64, 128])),
        "crop_split": float(random.uniform(0.3, 0.9)),
    }
    own: dict[str, Any] = {
        "momentum": 1 - log(0.004, 0.2),
        "head_dim": int(random.choice([32, 64, 128, 256])),
    }
    if objective == "simdino":
        own["eps"] = log(0.1, 1.0)
        own["gamma"] = log(0.2, 5.0) * (1 / own["head_dim"] + 1 / options["batch_size"])
    else:
        own["teacher_temperature"] = [t := log(0.02, 0.1), t]
        own["student_temperature"] = log(0.05, 0.2)
        own["prototypes"] = int(random.choice([128, 512, 2048, 8192]))
        own["centre_momentum"] = 1 - log(0.01, 0.3)
    return {**options, "objective_args": own}


def collapse(asked: argparse.Namespace, images: ImageData) -> list[dict[str, Any]]:
    found = []
    spec = models(images)["CRATE"]
    for number in range(asked.collapse):
        for objective in ("simdino", "dino"):
            options = draw(objective, np.random.default_rng([number, objective == "dino"]))
            folder = asked.out / images.name / "draws" / f"{objective}-{number}"
            fixed = {"objective": objective, "model": spec.name, "model_args": spec.model_args}
            run = trained(folder, images, epochs=asked.epochs, **fixed, **options)
            last = [line for line in run.metrics if line["split"] == "test"][-1]
            row = {
                "objective": objective,
                "draw": number,
                "health": last["health"],
                "effective rank": last["effective rank"],
                "knn": last["knn accuracy"],
                **options,
            }
            print(json.dumps(row), flush=True)
            found.append(row)
    for objective in ("simdino", "dino"):
        own = [row for row in found if row["objective"] == objective]
        fell = sum(row["health"] in ("collapsed", "collapsing") for row in own)
        middle, best = median(row["knn"] for row in own), max(row["knn"] for row in own)
        print(
            f"{objective}: {fell} of {len(own)} collapse; k-NN accuracy {middle:.2%} median, {best:.2%} best"
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--objectives", nargs="+", default=OBJECTIVES, choices=OBJECTIVES)
    parser.add_argument("--epochs", type=float, default=60)
    parser.add_argument("--collapse", type=int, default=0, help="draws of each objective")
    parser.add_argument("--out", type=Path, default=Path("runs/without-labels"))
    asked = parser.parse_args()
    images = load_data(asked.data)
    if asked.collapse:
        found, name = collapse(asked, images), "collapse.json"
    else:
        found, name = list(rows(asked, images)), "without_labels.json"
        print(table(found))
    (asked.out / images.name / name).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
