"""From runs to the bundle of measurements that a report draws."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from pellucid import __version__
from pellucid.data import ImageData, View, eval_loader
from pellucid.errors import ConfigError
from pellucid.glass.feed import eval_view
from pellucid.glass.pictures import thumbnail
from pellucid.glass.unlabelled import health, learnt, some_of, views, worth
from pellucid.measure import attention_maps, audit, evaluate, predict
from pellucid.measure.compare import Comparison
from pellucid.models.backbone import Backbone
from pellucid.models.crate import CRATE
from pellucid.models.embed import embedding
from pellucid.models.mae import CRATEMAE
from pellucid.steps import ISTA, MHSA, OvercompleteISTA
from pellucid.training import Run

AUDIT_IMAGES = 256
SHOWN_IMAGES = 8

Progress = Callable[[str], None]


def collect(
    runs: Sequence[Run], images: ImageData, *, command: str = "", progress: Progress = lambda line: None
) -> dict[str, Any]:
    """Everything a report shows, measured now.

    Args:
        runs: the subject first, then those that stand beside it; all trained on ``images``.
        images: what to measure on.
        command: the line that made the subject.
        progress: gets a line before each measurement.

    Returns:
        A JSON-able dict; see ``docs/bundle.md`` for its fields.

    Raises:
        ConfigError: a run that learnt other classes than ``images`` has.
    """
    subject = runs[0]
    for run in runs:
        if run.model.num_classes and list(run.model.pretrained_cfg["label_names"]) != images.class_names:
            raise ConfigError(
                f"{run.out} learnt other classes than those of {images.name} - give runs on the same data"
            )
    return {
        "title": subject.out.name,
        "created": datetime.date.today().isoformat(),
        "version": __version__,
        "command": command,
        "models": [_model(run, images, progress) for run in runs],
        "data": _data(images, eval_view(subject.model)),
        "config": settings(subject),
    }


def collect_comparison(
    comparison: Comparison, first: Run, images: ImageData, *, title: str, command: str = ""
) -> dict[str, Any]:
    """Everything that the report of a comparison shows; see ``docs/bundle.md``.

    Args:
        comparison: as measured.
        first: a run of its first model, whose recipe is the recipe of all.
        images: what all were trained and measured on.
        title: what the comparison is called.
        command: the line that asked for it.
    """
    own = ("model", "model_args", "seed", "out")
    return {
        "title": title,
        "created": datetime.date.today().isoformat(),
        "version": __version__,
        "command": command,
        "comparison": comparison.to_dict(),
        "data": _data(images, eval_view(first.model)),
        "config": {k: v for k, v in settings(first).items() if k not in own},
    }


def settings(run: Run) -> dict[str, Any]:
    """The options of a run that say something."""
    return {k: v for k, v in vars(run.config).items() if v not in (None, "", {})}


def _model(run: Run, images: ImageData, progress: Progress) -> dict[str, Any]:
    model = run.model
    view = eval_view(model)
    name = run.config.model
    progress(f"scoring {name}")
    seen: dict[str, Any] | None = None
    if model.num_classes:
        found = evaluate(model, eval_loader(images.test, view), images.class_names)
        scores: dict[str, Any] | None = {**found.to_dict(), "by": "classifier"}
    else:
        scores, seen = worth(run, images)
    progress(f"auditing {name}")
    return {
        "name": name,
        "label": label(model),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": run.seconds,
        "facts": facts(model),
        "learnt": learnt(run),
        "health": health(run),
        "curves": curves(run),
        "scores": scores,
        "features": seen,
        "views": views(run, images),
        "audit": audit_or_none(model, images, view),
        "attention": {"images": _attention(model, images, view)},
    }


def audit_or_none(model: nn.Module, images: ImageData, view: View) -> dict[str, Any] | None:
    """The audit on test images, as a dict; None for a model without tokens, such as a ResNet."""
    batches = eval_loader(images.test, view, batch_size=32, limit=AUDIT_IMAGES)
    try:
        return audit(model, batches, data=images.name).to_dict()
    except ConfigError:
        return None


def label(model: nn.Module) -> str:
    """What the family is called in print."""
    if isinstance(model, CRATEMAE):
        return "ViT-MAE" if isinstance(_first_layer(model)["compress"], MHSA) else "CRATE-MAE"
    if isinstance(model, CRATE):
        return "CRATE"
    return "ViT" if "Vision" in type(model).__name__ else type(model).__name__


def facts(model: Any) -> list[list[str]]:
    """The architecture in words and numbers."""
    embed = embedding(model)
    if embed is None:
        return [["width", str(model.num_features)]]
    rows, columns = embed.grid_size
    pooling = {"token": "class token", "avg": "mean of patches"}.get(model.global_pool, "none")
    return [
        ["depth", str(len(model.layers if isinstance(model, Backbone) else model.blocks))],
        ["width", str(model.num_features)],
        *_layer_facts(model),
        ["patches", f"{rows} x {columns} of {embed.patch_size[0]} x {embed.patch_size[1]} px"],
        ["tokens", str(rows * columns + model.num_prefix_tokens)],
        ["pooling", pooling],
    ]


def _layer_facts(model: Any) -> list[list[str]]:
    """What the steps of a layer are."""
    if not isinstance(model, Backbone):
        return [["heads", str(getattr(getattr(model.blocks[0], "attn", None), "num_heads", "?"))]]
    compress, sparsify = (_first_layer(model)[name] for name in ("compress", "sparsify"))
    heads = str(compress.num_heads)
    if hasattr(compress, "head_dim"):
        heads += f", subspaces of dimension {compress.head_dim}"
    found = [["heads", heads], ["compression", type(compress).__name__]]
    if isinstance(sparsify, ISTA | OvercompleteISTA):
        found += [
            ["atoms", str(sparsify.dictionary.shape[1])],
            ["ISTA step size, sparsity", f"{sparsify.step_size:g}, {sparsify.sparsity:g}"],
        ]
    if isinstance(model, CRATEMAE):
        found.append(["decoder", f"{len(model.decoder_layers)} layers"])
    return found


def _first_layer(model: Any) -> Any:
    return model.layers[0]


def curves(run: Run) -> dict[str, Any]:
    """Of training and test lines every number as a column, with the verdict's state where there is one."""

    def columns(split: str) -> dict[str, list]:
        lines = [line for line in run.metrics if line["split"] == split]
        keys = dict.fromkeys(["epoch", "loss", "accuracy", *(key for line in lines for key in line)])
        left_out = ("step", "split", "lr_factor", "verdict")
        return {key: [line.get(key) for line in lines] for key in keys if key not in left_out}

    return {"train": columns("train"), "test": columns("test")}


def _attention(model: Any, images: ImageData, view: View) -> list[dict[str, Any]]:
    """Sample test images, one of each of the first classes, with the attention of every layer and head."""
    chosen = some_of(images.test, SHOWN_IMAGES)
    batch = view.batch([images.test.image(i) for i in chosen], chosen)
    maps = attention_maps(model, batch)
    names, labels = images.class_names, images.test.labels
    guesses = predict(model, batch).argmax(-1).tolist() if model.num_classes else []
    return [
        {
            "png": thumbnail(batch[row], view, 112),
            "name": images.test.name(i),
            "label": names[int(labels[i])] if labels[i] >= 0 else None,
            "predicted": names[guesses[row]] if guesses else None,
            "grid": _grid(model, batch) if maps else None,
            "layers": [
                {"layer": layer, "heads": [[round(v, 5) for v in head] for head in weights[row].tolist()]}
                for layer, weights in maps.items()
            ],
        }
        for row, i in enumerate(chosen)
    ]


def _grid(model: Any, batch: Tensor) -> list[int]:
    patches = embedding(model).patch_size
    return [side // patch for side, patch in zip(batch.shape[-2:], patches, strict=True)]


def _data(images: ImageData, view: View) -> dict[str, Any]:
    return {
        "name": images.name,
        "train": len(images.train),
        "test": len(images.test),
        "classes": images.class_names,
        "in_chans": images.in_chans,
        "img_size": list(view.img_size),
        "mean": list(view.mean),
        "std": list(view.std),
        "rejects": [reject._asdict() for reject in images.rejects],
    }
