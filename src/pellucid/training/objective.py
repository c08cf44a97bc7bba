"""What a run learns from: the one interface between objectives and the loops that drive them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Self, get_type_hints

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from pellucid.data import Masking
from pellucid.errors import ConfigError, suggest
from pellucid.models.modes import in_eval_mode
from pellucid.training.config import Augment, TrainConfig, checked
from pellucid.training.health import Verdict

Batches = Iterable[tuple[Any, ...]]
"""Of ``(images, labels, index)``, or of :class:`~pellucid.data.Tokens` in place of images."""


@dataclass(frozen=True)
class Held:
    """What to measure on: images, or text.

    Attributes:
        test: held back, without augmentation.
        train: of the training images, without augmentation, for measures that compare.
        views: held back, as in training, for objectives whose batches are several views.
        words_per_byte: of held back text; of no meaning for images.
    """

    test: Batches
    train: Batches = ()
    views: Batches = ()
    words_per_byte: float = 0.0


class Objective(nn.Module):
    """A module that owns what it trains and turns a batch into ``{"loss": ..., parts}``.

    Loops and lightning only drive it. Whatever it holds as parameters and buffers is in every checkpoint.

    Attributes:
        reads: ``"images"`` or ``"text"``.
        model: what the run hands over in the end.
        heads: trained beside the model and not handed over; empty unless an objective needs them.
        many_views: a batch holds several views of each image, :class:`~pellucid.data.crops.Crops`.
        family: of our models, the one to take where none is named.
        each_alone: the loss of an image or a text does not depend on what else is in its batch.
        needs_labels: cannot learn from images without labels, and gives the model a classifier.
        small_augment: how small pictures are augmented where that is left to the data.
        recipe: options of a run that suit it better than their defaults, where they are left out.
        settings: the numbers that define it, with all defaults of a run resolved.
    """

    reads: ClassVar[Literal["images", "text"]] = "images"
    many_views: ClassVar[bool] = False
    family: ClassVar[str] = "crate"
    each_alone: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = True
    small_augment: ClassVar[Augment] = "small"
    recipe: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    settings: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, model: nn.Module, heads: Mapping[str, nn.Module] | None = None) -> None:
        super().__init__()
        self.model = model
        self.heads = nn.ModuleDict(heads)

    @classmethod
    def build(cls, model: nn.Module, config: TrainConfig, steps: int) -> Self:
        """The objective of a run of ``steps`` steps: ``config.objective_args`` are the constructor's options.

        Raises:
            ConfigError: an unknown option, with the nearest known one, or a value that cannot be.
        """
        known, asked = cls.options(), {}
        for name, value in config.objective_args.items():
            if name not in known:
                raise ConfigError(f"unknown objective_args option '{name}'{suggest(name, known)}")
            asked[name] = checked(name, value, known[name])
        try:
            options = cls.resolved(model, replace(config, objective_args=asked), steps)
            objective = cls(model, **options)
        except TypeError as error:
            raise ConfigError(f"objective_args: {error}") from error
        objective.settings = options
        return objective

    @classmethod
    def resolved(cls, model: nn.Module, config: TrainConfig, steps: int) -> dict[str, Any]:
        """``config.objective_args`` with every default that depends on the model or the run filled in."""
        return dict(config.objective_args)

    @classmethod
    def options(cls) -> dict[str, Any]:
        """What ``objective_args`` may say: names and types."""
        hints = get_type_hints(cls.__init__)
        names = inspect.signature(cls.__init__).parameters.keys() - {"self", "model"}
        return {name: hints[name] for name in names}

    def verdict(self, history: Sequence[Mapping[str, float]]) -> Verdict | None:
        """What to think of a run whose measures, oldest first, are these; None where accuracy says it."""
        return None

    @property
    def masking(self) -> Masking | None:
        """Which patches a batch should say to hide; none unless an objective hides some.

        With one view of each image, a batch holds :class:`~pellucid.data.crops.Crops` where there are some.
        """
        return None

    @classmethod
    def reading(cls, config: TrainConfig) -> Mapping[str, Any]:
        """Of one that reads text: how it is cut into rows, as options of :class:`~pellucid.data.Windows`."""
        return {}

    def after_step(self, step: int, total: int) -> None:
        """Called when the optimiser has taken step ``step`` of ``total``, counted from 0."""

    def refused_step(self) -> None:
        """Called in its place when the step was not taken: what was seen in it is forgotten."""

    def handed_over(self) -> Mapping[str, Tensor]:
        """The weights of ``model`` that the run gives away."""
        return self.model.state_dict()

    @torch.no_grad()
    def evaluate(self, weights: Mapping[str, Tensor], held: Held) -> dict[str, float]:
        """Measures of ``weights``, which the model need not hold: means of the parts over ``held.test``."""
        named = {f"model.{name}": value for name, value in weights.items()}
        device = next(self.parameters()).device
        sums: dict[str, float] = {}
        count = 0
        with in_eval_mode(self):
            for batch in held.test:
                images, labels = tree_map(lambda part: part.to(device), tuple(batch[:2]))
                parts = torch.func.functional_call(self, named, (images, labels))
                for key, value in parts.items():
                    sums[key] = sums.get(key, 0.0) + value.item() * len(labels)
                count += len(labels)
        return {key: value / count for key, value in sums.items()} if count else {"loss": math.nan}


def all_finite(*features: Tensor) -> bool:
    """Whether a rate can be asked of them. If not, their sum is a loss for which the step will be refused."""
    return all(bool(part.isfinite().all()) for part in features)
