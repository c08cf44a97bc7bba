"""Pictures as a saved model wants to see them: where data and models meet after training."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader

from pellucid.data import Batch, ImageSet, View, eval_loader


def eval_view(model: Any) -> View:
    """The size, channels, mean and std that travel with a model, without augmentation."""
    cfg = model.pretrained_cfg
    channels, height, width = cfg["input_size"]
    return View(img_size=(height, width), in_chans=channels, mean=tuple(cfg["mean"]), std=tuple(cfg["std"]))


def batches(
    model: Any, images: ImageSet, batch_size: int = 64, limit: int | None = None
) -> DataLoader[Batch]:
    """``(pictures, labels, index)`` as the model takes them, every picture once in order.

    Args:
        model: from ``pellucid.load`` or ``create_model``.
        images: such as ``load_data("digits").test``.
        batch_size: pictures of a batch.
        limit: at most so many, evenly spaced.
    """
    return eval_loader(images, eval_view(model), batch_size=batch_size, limit=limit)
