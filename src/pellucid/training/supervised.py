"""Learning from labels: cross-entropy with label smoothing."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from pellucid.errors import ConfigError
from pellucid.objectives import subspace_overlap
from pellucid.steps import SubspaceStep
from pellucid.training.config import TrainConfig
from pellucid.training.objective import Objective


class Supervised(Objective):
    """Cross-entropy of a classifier, in nats.

    Args:
        model: images to logits.
        label_smoothing: share of the target spread over all classes, 0..1.
        incoherence: weight of :func:`~pellucid.objectives.subspace_overlap`, mean over the layers that
            compress; 0 leaves it out.

    Raises:
        ConfigError: incoherence asked of a model without subspaces.
    """

    each_alone: ClassVar[bool] = True

    def __init__(self, model: nn.Module, label_smoothing: float = 0.1, incoherence: float = 0.0) -> None:
        super().__init__(model)
        self.label_smoothing, self.incoherence = label_smoothing, incoherence
        if incoherence and not self._compressions():
            raise ConfigError("incoherence is about subspaces, and this model has none - leave it out")

    @classmethod
    def resolved(cls, model: nn.Module, config: TrainConfig, steps: int) -> dict[str, Any]:
        own = {"label_smoothing": config.label_smoothing, "incoherence": config.incoherence}
        return {**own, **config.objective_args}

    def forward(self, images: Float[Tensor, "b c h w"], labels: Int[Tensor, b]) -> dict[str, Tensor]:
        logits = self.model(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)
        parts = {"loss": loss, "accuracy": (logits.detach().argmax(-1) == labels).float().mean()}
        if self.incoherence:
            overlap = torch.stack([subspace_overlap(step.U.float()) for step in self._compressions()]).mean()
            parts |= {"loss": loss + self.incoherence * overlap, "overlap": overlap.detach()}
        return parts

    def _compressions(self) -> list[SubspaceStep]:
        return [module for module in self.model.modules() if isinstance(module, SubspaceStep)]
