"""Data as a saved model wants to see them: where data and models meet after training."""

from __future__ import annotations

from typing import Any, Literal

from pellucid.data import Batch, ImageSet, TextData, View, Windows, eval_loader, eval_token_loader
from pellucid.data.loaders import Fetching
from pellucid.errors import ConfigError
from pellucid.models.language import LanguageModel


def eval_view(model: Any) -> View:
    """The size, channels, mean and std that travel with a model, without augmentation."""
    cfg = model.pretrained_cfg
    channels, height, width = cfg["input_size"]
    return View(img_size=(height, width), in_chans=channels, mean=tuple(cfg["mean"]), std=tuple(cfg["std"]))


def text_windows(
    model: LanguageModel,
    texts: TextData,
    split: Literal["train", "test"] = "test",
    *,
    cross_documents: bool = False,
    mask_share: float = 0.15,
    seed: int = 0,
) -> Windows:
    """Documents cut into rows that ``model`` can read, with what it has to tell of them.

    Args:
        model: causal, masked, or one that classifies, which reads the beginning of each document.
        texts: with the tokenizer that the model was trained with.
        split: held back, or to train on.
        cross_documents, mask_share, seed: as in training.

    Raises:
        ConfigError: a model for images, or a tokenizer with other words than the model knows.
    """
    if not isinstance(model, LanguageModel):
        name = getattr(model, "architecture", type(model).__name__)
        raise ConfigError(f"{name} reads images, and {texts.name} is text - take a language model")
    if texts.tokenizer.vocab_size > model.vocab_size:
        raise ConfigError(
            f"{texts.tokenizer.name} has {texts.tokenizer.vocab_size} words, the model knows "
            f"{model.vocab_size} - load the texts with the model's own tokenizer, in its model/ folder"
        )
    return Windows(
        getattr(texts, split),
        texts.tokenizer,
        model.context,
        task="whole" if model.classifier is not None else "next" if model.causal else "masked",
        cross_documents=cross_documents and model.classifier is None,
        mask_share=mask_share,
        seed=seed,
    )


def batches(
    model: Any, data: ImageSet | TextData, batch_size: int = 64, limit: int | None = None
) -> Fetching[Batch] | Fetching[Any]:
    """``(pictures, labels, index)`` as the model takes them, every picture once in order; or held-out text.

    Args:
        model: from ``pellucid.load`` or ``create_model``.
        data: such as ``load_data("digits").test``; for a language model TextData, whose test documents are
            read, in rows of at most the model's context.
        batch_size: pictures or rows of a batch.
        limit: at most so many, evenly spaced.
    """
    if isinstance(data, TextData):
        return eval_token_loader(text_windows(model, data), batch_size=batch_size, limit=limit)
    return eval_loader(data, eval_view(model), batch_size=batch_size, limit=limit)
