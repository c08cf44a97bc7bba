"""Learning from text: the word that comes next, the words that are hidden, or what a text is about."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from pellucid.data import IGNORED, Tokens
from pellucid.errors import ConfigError
from pellucid.models.language import LanguageModel
from pellucid.models.modes import in_eval_mode
from pellucid.training.config import TrainConfig
from pellucid.training.objective import Held, Objective

RECIPE: Mapping[str, Any] = MappingProxyType({"batch_size": 32, "epochs": 4.0})

MASK_SHARE = 0.15


class Words(Objective):
    r"""Cross-entropy of the words that a model has to tell, in nats for a word.

    .. math:: L = \frac1b \sum_i \frac1c \sum_t -\log p(y_{it} \mid x_i)

    with c the number of words that a row of the data has to tell, in the mean. So every word of an epoch
    weighs the same, and no cut of a batch into parts changes the loss.

    Its measures are ``loss``, and ``word accuracy``, of the likeliest word.

    Raises:
        ConfigError: a model for images, or of the other kind.
    """

    reads: ClassVar[Literal["images", "text"]] = "text"
    each_alone: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False
    recipe: ClassVar[Mapping[str, Any]] = RECIPE
    causal: ClassVar[bool]

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        if getattr(model, "causal", None) != self.causal or getattr(model, "classifier", None) is not None:
            wanted = "causal" if self.causal else "masked"
            raise ConfigError(
                f"{_name(model)} is no {wanted} language model - take {self.family}_bytes or another"
            )

    def forward(self, tokens: Tokens, labels: Int[Tensor, b] | None = None) -> dict[str, Tensor]:
        scores = self.scores(tokens).float()
        nats = F.cross_entropy(scores.mT, tokens.targets, ignore_index=IGNORED, reduction="none")
        right = scores.detach().argmax(-1) == tokens.targets
        accuracy = right.sum() / _counted(tokens).clamp_min(1)
        return {"loss": (nats.sum(1) * tokens.scale).mean(), "word accuracy": accuracy}

    def scores(self, tokens: Tokens) -> Float[Tensor, "b n v"]:
        """Of all words at each place."""
        return self.model(tokens.ids)

    @torch.no_grad()
    def evaluate(self, weights: Mapping[str, Tensor], held: Held) -> dict[str, float]:
        named = {f"model.{name}": value for name, value in weights.items()}
        device = next(self.parameters()).device
        nats, right, words = 0.0, 0.0, 0
        with in_eval_mode(self):
            for batch in held.test:
                tokens: Tokens = tree_map(lambda part: part.to(device), batch[0])
                parts = torch.func.functional_call(self, named, (tokens,))
                count = int(_counted(tokens))
                nats += parts["loss"].item() * len(tokens.ids) / tokens.scale[0].item()
                right += parts["word accuracy"].item() * count
                words += count
        return self.measures(nats / words, right / words, held) if words else {"loss": math.nan}

    def measures(self, nats: float, accuracy: float, held: Held) -> dict[str, float]:
        """What to tell of so many nats for a word."""
        return {"loss": nats, "word accuracy": accuracy}


class CausalLM(Words):
    """Cross-entropy of the word that comes next, in nats for a word.

    Its measures are also ``bits per byte`` of the text, which no choice of a tokenizer changes the meaning
    of, and ``perplexity`` of a word.

    Args:
        model: causal.
    """

    family: ClassVar[str] = "crate_alpha_gpt"
    causal: ClassVar[bool] = True

    def measures(self, nats: float, accuracy: float, held: Held) -> dict[str, float]:
        bits = nats / math.log(2) * held.words_per_byte
        perplexity = math.exp(nats) if nats < 700 else math.inf
        return {"loss": nats, "word accuracy": accuracy, "bits per byte": bits, "perplexity": perplexity}


class MaskedLM(Words):
    """Cross-entropy of the words that are hidden, in nats for a word.

    Args:
        model: sees all words at once.
        mask_share: of the words of a row, hidden: 80 % of them behind the mask, 10 % behind another word,
            10 % not at all (Devlin et al. 2019).
    """

    family: ClassVar[str] = "crate_alpha_bert"
    causal: ClassVar[bool] = False

    def __init__(self, model: nn.Module, *, mask_share: float = MASK_SHARE) -> None:
        super().__init__(model)
        self.mask_share = mask_share

    @classmethod
    def resolved(cls, model: nn.Module, config: TrainConfig, steps: int) -> dict[str, Any]:
        return {"mask_share": MASK_SHARE, **config.objective_args}

    @classmethod
    def reading(cls, config: TrainConfig) -> Mapping[str, Any]:
        return {"task": "masked", "mask_share": config.objective_args.get("mask_share", MASK_SHARE)}

    def scores(self, tokens: Tokens) -> Float[Tensor, "b n v"]:
        return self.model(tokens.ids, _padded(tokens))


class TextClassification(Objective):
    """Cross-entropy of the class of a text, in nats.

    Args:
        model: a language model built with ``num_labels``.
        label_smoothing: share of the target spread over all classes, 0..1.

    Raises:
        ConfigError: a model for images.
    """

    reads: ClassVar[Literal["images", "text"]] = "text"
    each_alone: ClassVar[bool] = True
    family: ClassVar[str] = "crate_alpha_bert"
    recipe: ClassVar[Mapping[str, Any]] = RECIPE

    def __init__(self, model: nn.Module, label_smoothing: float = 0.1) -> None:
        super().__init__(model)
        if not isinstance(model, LanguageModel) or model.classifier is None:
            raise ConfigError(f"{_name(model)} does not classify text - take {self.family}_bytes or another")
        self.label_smoothing = label_smoothing

    @classmethod
    def resolved(cls, model: nn.Module, config: TrainConfig, steps: int) -> dict[str, Any]:
        return {"label_smoothing": config.label_smoothing, **config.objective_args}

    @classmethod
    def reading(cls, config: TrainConfig) -> Mapping[str, Any]:
        return {"task": "whole"}

    def forward(self, tokens: Tokens, labels: Int[Tensor, b]) -> dict[str, Tensor]:
        scores = self.model(tokens.ids, _padded(tokens)).float()
        loss = F.cross_entropy(scores, labels, label_smoothing=self.label_smoothing)
        return {"loss": loss, "accuracy": (scores.detach().argmax(-1) == labels).float().mean()}


def _counted(tokens: Tokens) -> Int[Tensor, ""]:
    return (tokens.targets != IGNORED).sum()


def _padded(tokens: Tokens) -> Tensor | None:
    """Which words are no padding; None where all are, which attention is faster with."""
    return None if bool(tokens.real.all()) else tokens.real


def _name(model: nn.Module) -> str:
    return getattr(model, "architecture", type(model).__name__)
