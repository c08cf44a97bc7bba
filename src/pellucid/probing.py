"""What features are worth on labelled images: where training, measuring and data meet.

Frozen, by nearest neighbours or a linear map (``measure/probes.py``), or as where a supervised run begins.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pellucid.data import ImageData, eval_loader
from pellucid.errors import ConfigError, DataError
from pellucid.glass.feed import batches, eval_view
from pellucid.measure import Scores, evaluate
from pellucid.measure.features import Features, Tokens, features
from pellucid.measure.probes import NEIGHBOURS, TEMPERATURE, Probe, knn_probe, linear_probe
from pellucid.models import create_model, load
from pellucid.training import Run, train

Say = Callable[[str], None]


@dataclass(frozen=True)
class Frozen:
    """Features of a data set's two parts, to be probed in several ways."""

    train: Features
    test: Features
    class_names: list[str]

    def knn(self, k: Sequence[int] = (NEIGHBOURS,), temperature: float = TEMPERATURE) -> Probe:
        """:func:`~pellucid.measure.probes.knn_probe` of these features."""
        return knn_probe(self.train, self.test, self.class_names, k=k, temperature=temperature)

    def linear(self, seed: int = 0) -> Probe:
        """:func:`~pellucid.measure.probes.linear_probe` of these features."""
        return linear_probe(self.train, self.test, self.class_names, seed=seed)


def frozen(
    model: Any,
    images: ImageData,
    tokens: Tokens = "pooled",
    *,
    progress: Callable[[int], None] | None = None,
) -> Frozen:
    """A model's features of labelled images.

    Args:
        model: from ``pellucid.load`` or ``create_model``.
        images: such as ``load_data("digits")``.
        tokens: ``"pooled"``, ``"cls"`` or ``"avg"``.
        progress: is told the number of images of each batch.

    Raises:
        DataError: images without labels.
        ConfigError: tokens that the model does not have.
    """
    _refuse_unlabelled(images)
    view = eval_view(model)
    parts = [
        features(model, eval_loader(part, view), tokens, progress=progress)
        for part in (images.train, images.test)
    ]
    return Frozen(parts[0], parts[1], images.class_names)


def untrained(model: Any, seed: int = 0) -> Any:
    """The same architecture with fresh weights: what its features are worth before anything is learnt."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        fresh: Any = create_model(model.architecture, **model.model_args)
    fresh.pretrained_cfg = model.pretrained_cfg
    return fresh.eval()


def finetune(
    path: str | os.PathLike[str],
    data: str | ImageData,
    images: ImageData,
    *,
    out: str | os.PathLike[str],
    resume: bool = False,
    overwrite: bool = False,
    say: Say = lambda line: None,
    **options: Any,
) -> tuple[Run, Scores]:
    """Supervised training of all weights, begun at a saved model's with a fresh classifier.

    The run is one like any other, with ``init_from`` in its config.

    Args:
        path: a run, or a model folder.
        data: as :func:`pellucid.train` takes it.
        images: the same, loaded.
        out: the new run's folder.
        resume: go on with the run in ``out``.
        overwrite: replace it.
        say: gets one line of news at a time.
        options: fields of :class:`~pellucid.training.TrainConfig`.

    Returns:
        The run, and its scores on the test images.

    Raises:
        DataError: images without labels.
        ConfigError: images of other channels than the weights are for.
        CheckpointError: as :func:`pellucid.train`.
    """
    _refuse_unlabelled(images)
    model: Any = load(path)
    channels = model.pretrained_cfg["input_size"][0]
    if channels != images.in_chans:
        raise ConfigError(
            f"{path} sees {channels} channels, {images.name} has {images.in_chans} - finetune it on images "
            f"of its own kind; knn and linear convert them"
        )
    settled = ("num_classes", "in_chans")
    run = train(
        data,
        objective="supervised",
        model=model.architecture,
        model_args={k: v for k, v in model.model_args.items() if k not in settled},
        init_from=str(path),
        new_head=True,
        out=str(out),
        resume=resume,
        overwrite=overwrite,
        say=say,
        **options,
    )
    return run, evaluate(run.model, batches(run.model, images.test), images.class_names)


def finetuned_folder(path: Path, images: ImageData) -> Path:
    """Where a finetuned run goes unless it is told: beside the one that it began at."""
    return path.resolve().with_name(f"{path.resolve().name}-finetune-{Path(images.name).stem}")


def _refuse_unlabelled(images: ImageData) -> None:
    if not images.class_names:
        raise DataError(
            f"{images.name} has no labels, and a probe is about labels - give data with one sub-folder for "
            f"each class, or use pellucid embed or neighbours, which need none"
        )
