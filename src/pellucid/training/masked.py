"""Masked autoencoding: most of a picture is hidden, and what was there is to be told from the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor, nn

from pellucid.data import Crops, Masking, draws
from pellucid.errors import ConfigError
from pellucid.models.embed import patch_grid
from pellucid.models.mae import num_hidden
from pellucid.training.config import Augment, TrainConfig
from pellucid.training.objective import Batches, Held, Objective
from pellucid.training.representation import Representation

LEAST_SHOWN = 8
"""Patches that a run leaves to see, unless told otherwise."""


class MAE(Representation):
    r"""Mean squared error of the hidden patches, as the model's ``masked_loss`` gives it for each image.

    .. math:: \frac{1}{b} \sum_i \frac{1}{|M_i|} \sum_{t \in M_i} \tfrac1q \|\hat x_{it} - x_{it}\|^2

    The loss has no part that runs over the batch, so that no cut of it changes the loss. Which patches are
    hidden comes with the batch, as a function of (seed, epoch, index); every image hides the same number.
    What is handed over is encoder and decoder; ``evaluate`` hides the same patches of an image every time,
    in every run.

    Args:
        model: an encoder with a decoder: ``masked_loss(images, mask)``.
        mask_ratio: share of the patches that is hidden; He et al. (2021) take 0.75 of 196. A run does too,
            unless fewer than 8 patches would be left to see: of 16 it hides half.

    Raises:
        ConfigError: a model without a decoder, or a share that hides nothing or everything.
    """

    each_alone: ClassVar[bool] = True
    family: ClassVar[str] = "crate_mae"
    small_augment: ClassVar[Augment] = "none"  # turned ones teach less about pictures as they stand
    recipe: ClassVar[Mapping[str, Any]] = {"batch_size": 64}

    def __init__(self, model: nn.Module, *, mask_ratio: float = 0.75) -> None:
        super().__init__(model)
        if not hasattr(model, "masked_loss"):
            raise ConfigError(
                f"mae needs a model with a decoder, and {type(model).__name__} has none - take one of "
                f"crate_mae_digits, crate_mae_micro_patch4_32, crate_mae_tiny_patch16_224, vit_mae_..."
            )
        if not isinstance(mask_ratio, int | float):
            raise ConfigError(f"mask_ratio is {mask_ratio!r}; expected a number between 0 and 1")
        grid = patch_grid(model)
        patches = grid[0] * grid[1]
        try:
            share = num_hidden(patches, mask_ratio) / patches
        except ValueError as error:
            raise ConfigError(f"mask_ratio: {error}") from error
        self.mask_ratio = mask_ratio
        self._masking = Masking(grid, share=(share, share), chance=1.0, blobs=False)

    @classmethod
    def resolved(cls, model: nn.Module, config: TrainConfig, steps: int) -> dict[str, Any]:
        rows, columns = patch_grid(model)
        usual = max(0.5, min(0.75, 1 - LEAST_SHOWN / (rows * columns)))
        return {"mask_ratio": usual, **config.objective_args}

    @property
    def masking(self) -> Masking:
        return self._masking

    def forward(self, crops: Crops, labels: Int[Tensor, b] | None = None) -> dict[str, Tensor]:
        model: Any = self.model
        return {"loss": model.masked_loss(crops.large[:, 0], crops.mask[:, 0]).mean()}

    @torch.no_grad()
    def evaluate(self, weights: Mapping[str, Tensor], held: Held) -> dict[str, float]:
        """The loss on ``held.test``, its masks set by the item alone, and the measures of features."""
        error = Objective.evaluate(self, weights, Held(self._masked(held.test)))
        return {**error, **super().evaluate(weights, held)}

    def _masked(self, batches: Batches) -> Iterator[tuple[Any, ...]]:
        for images, labels, index in batches:
            mask = self.masking.mask(draws(0, 0, index, self.masking.draws))
            yield Crops(images[:, None], images[:, None, :0], mask[:, None]), labels
