"""Training on digits with wrong labels: rate reduction beside cross-entropy.

    python benchmarks/label_noise.py [--noise 0 0.1 0.2 0.3 0.4 0.5] [--seeds 0] [--out runs/label-noise]

Of the 1,347 training images the given share gets another class than its own, drawn evenly from the nine
others; test labels stay right. Every run is ``crate_digits`` by one recipe, without augmentation and label
smoothing, so that nothing but the objective stands against memorising. Prints a line for each run and the
table at the end, and writes ``label_noise.json``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean

import numpy as np
import torch

from pellucid.data.builtin import load_digits
from pellucid.data.dataset import ArrayImages, ImageData, from_arrays
from pellucid.training import train

RECIPE = {"model": "crate_digits", "augment": "none", "label_smoothing": 0.0, "engine": "plain", "threads": 1}


def with_wrong_labels(images: ImageData, share: float, seed: int) -> ImageData:
    """The same pictures; of the training labels a share is replaced by another class."""
    random = np.random.default_rng(seed)
    pictures, labels = tensors(images.train)
    classes = len(images.class_names)
    wrong = torch.from_numpy(random.permutation(len(labels))[: round(share * len(labels))])
    labels = labels.clone()
    labels[wrong] = (labels[wrong] + torch.from_numpy(random.integers(1, classes, len(wrong)))) % classes
    train_set = ArrayImages(pictures, labels, f"digits, {share:.0%} wrong")
    return from_arrays(
        f"digits-{share}", train_set, ArrayImages(*tensors(images.test), "digits/test"), images.class_names
    )


def tensors(part: ArrayImages) -> tuple[torch.Tensor, torch.Tensor]:
    return part.images, part.labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--noise", type=float, nargs="+", default=[0, 0.1, 0.2, 0.3, 0.4, 0.5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=float, default=40)
    parser.add_argument("--eps", type=float, default=2.0)
    parser.add_argument("--out", type=Path, default=Path("runs/label-noise"))
    asked = parser.parse_args()
    digits, found = load_digits(), []
    for share in asked.noise:
        for objective in ("supervised", "mcr2"):
            scores = []
            for seed in asked.seeds:
                run = train(
                    with_wrong_labels(digits, share, seed),
                    out=str(asked.out / f"{objective}-{share}-{seed}"),
                    overwrite=True,
                    progress=False,
                    objective=objective,
                    objective_args={"eps": asked.eps} if objective == "mcr2" else {},
                    epochs=asked.epochs,
                    seed=seed,
                    **RECIPE,
                )
                scores.append({k: v for k, v in run.metrics[-1].items() if k.endswith("accuracy")})
                fitted = [line["accuracy"] for line in run.metrics if line["split"] == "train"][-1]
                name = f"{share:.0%} wrong, {objective}, seed {seed}"
                print(f"{name}: {scores[-1]}, of the labels it was given {fitted:.3f}", flush=True)
            found.append({"noise": share, "objective": objective, "scores": scores})
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / "label_noise.json").write_text(json.dumps(found, indent=1))
    print("\n| wrong labels | " + " | ".join(f"{share:.0%}" for share in asked.noise) + " |")
    print("|---|" + "---|" * len(asked.noise))
    for objective, key in (("supervised", "accuracy"), ("mcr2", "accuracy"), ("mcr2", "subspace accuracy")):
        rows = [row for row in found if row["objective"] == objective]
        cells = [f"{mean(score[key] for score in row['scores']):.1%}" for row in rows]
        print(f"| {objective}, {key} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
