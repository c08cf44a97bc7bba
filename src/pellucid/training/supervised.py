"""Learning from labels: cross-entropy with label smoothing."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F


class Supervised(nn.Module):
    """Cross-entropy of a classifier, in nats.

    An objective is a module that owns what it trains and turns a batch into ``{"loss": ..., parts}``; loops
    and lightning only drive it.

    Args:
        model: images to logits.
        label_smoothing: share of the target spread over all classes, 0..1.
    """

    def __init__(self, model: nn.Module, label_smoothing: float = 0.1) -> None:
        super().__init__()
        self.model = model
        self.label_smoothing = label_smoothing

    def forward(self, images: Float[Tensor, "b c h w"], labels: Int[Tensor, b]) -> dict[str, Tensor]:
        logits = self.model(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)
        return {"loss": loss, "accuracy": (logits.detach().argmax(-1) == labels).float().mean()}
