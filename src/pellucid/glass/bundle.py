"""From runs to the bundle of measurements that a report draws."""

from __future__ import annotations

import base64
import datetime
import io
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from pellucid import __version__
from pellucid.data import ImageData, View, eval_loader
from pellucid.errors import ConfigError
from pellucid.glass.feed import eval_view
from pellucid.measure import attention_maps, audit, evaluate, predict
from pellucid.measure.compare import Comparison
from pellucid.models.crate import CRATE
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
        if list(run.model.pretrained_cfg["label_names"]) != images.class_names:
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
        "config": _config(subject),
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
        "config": {k: v for k, v in _config(first).items() if k not in own},
    }


def _config(run: Run) -> dict[str, Any]:
    return {k: v for k, v in vars(run.config).items() if v not in (None, "", {})}


def _model(run: Run, images: ImageData, progress: Progress) -> dict[str, Any]:
    model = run.model
    view = eval_view(model)
    name = run.config.model
    progress(f"scoring {name}")
    scores = evaluate(model, eval_loader(images.test, view), images.class_names)
    progress(f"auditing {name}")
    return {
        "name": name,
        "label": label(model),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": run.seconds,
        "facts": facts(model),
        "curves": _curves(run),
        "scores": scores.to_dict(),
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
    return (
        "CRATE"
        if isinstance(model, CRATE)
        else "ViT"
        if "Vision" in type(model).__name__
        else type(model).__name__
    )


def facts(model: Any) -> list[list[str]]:
    """The architecture in words and numbers."""
    embed = _embedding(model)
    if embed is None:
        return [["width", str(model.num_features)]]
    rows, columns = embed.grid_size
    pooling = {"token": "class token", "avg": "mean of patches"}.get(model.global_pool, "none")
    common = [
        ["patches", f"{rows} x {columns} of {embed.patch_size[0]} x {embed.patch_size[1]} px"],
        ["tokens", str(rows * columns + model.num_prefix_tokens)],
        ["pooling", pooling],
    ]
    if not isinstance(model, CRATE):
        heads = getattr(getattr(model.blocks[0], "attn", None), "num_heads", "?")
        return [
            ["depth", str(len(model.blocks))],
            ["width", str(model.num_features)],
            ["heads", str(heads)],
            *common,
        ]
    first: Any = model.layers[0]
    compress, sparsify = first["compress"], first["sparsify"]
    return [
        ["depth", str(len(model.layers))],
        ["width", str(model.embed_dim)],
        ["heads", f"{compress.num_heads}, subspaces of dimension {compress.head_dim}"],
        ["compression", type(compress).__name__],
        ["atoms", str(sparsify.dictionary.shape[1])],
        ["ISTA step size, sparsity", f"{sparsify.step_size:g}, {sparsify.sparsity:g}"],
        *common,
    ]


def _curves(run: Run) -> dict[str, Any]:
    def column(split: str) -> dict[str, list]:
        lines = [line for line in run.metrics if line["split"] == split]
        return {key: [line.get(key) for line in lines] for key in ("epoch", "loss", "accuracy")}

    return {"train": column("train"), "test": column("test")}


def _attention(model: nn.Module, images: ImageData, view: View) -> list[dict[str, Any]]:
    """Sample test images, one of each of the first classes, with the attention of every layer and head."""
    labels = images.test.labels
    first = [int((labels == k).nonzero()[0, 0]) for k in labels.unique()[:SHOWN_IMAGES]]
    indices = torch.tensor(first)
    batch = view.batch([images.test.image(i) for i in first], indices)
    maps = attention_maps(model, batch)
    guesses = predict(model, batch).argmax(-1).tolist()
    return [
        {
            "png": png(batch[row], view),
            "name": images.test.name(i),
            "label": images.class_names[int(labels[i])],
            "predicted": images.class_names[guesses[row]],
            "grid": _grid(model, batch) if maps else None,
            "layers": [
                {"layer": layer, "heads": [[round(v, 5) for v in head] for head in weights[row].tolist()]}
                for layer, weights in maps.items()
            ],
        }
        for row, i in enumerate(first)
    ]


def _embedding(model: Any) -> Any:
    """What cuts pictures into patches; None in a model of another kind."""
    return getattr(model, "embed", None) or getattr(model, "patch_embed", None)


def _grid(model: Any, batch: Tensor) -> list[int]:
    embed: Any = _embedding(model)
    return [side // patch for side, patch in zip(batch.shape[-2:], embed.patch_size, strict=True)]


def png(image: Tensor, view: View) -> str:
    """A normalised image (c, h, w) as the model sees it, as a data URI."""
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (view.mean, view.std))
    pixels = ((image * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    array = pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


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
