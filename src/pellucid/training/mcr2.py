"""Learning by rate reduction: features expensive together and cheap class by class (Yu et al. 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from pellucid.data import Crops
from pellucid.errors import ConfigError
from pellucid.objectives import class_coding_rate, coding_rate
from pellucid.training.objective import Objective, all_finite
from pellucid.training.ranks import gathered
from pellucid.training.representation import Representation

MEMORY = 0.95
"""What the running second moments keep of themselves in a step; they look back over some twenty batches."""


class MCR2(Objective):
    r"""Maximal coding rate reduction: the loss is :math:`R^c(Z \mid \Pi) - R(Z)` of a batch, in nats.

    Z are the model's pooled features, before its classifier, on the unit sphere. No gradient reaches the
    classifier, as there is nothing that it could lower. It is given by running second moments of the training
    features instead: the linear map to the one-hot labels with least squared error,

    .. math:: W = \bigl(\textstyle\sum_k S_k + \tfrac{\epsilon^2}{d} I\bigr)^{-1} [\mu_1 \cdots \mu_K],
        \qquad S_k = \mathbb E[z z^\top 1_k], \quad \mu_k = \mathbb E[z 1_k],

    so that what a run hands over classifies like any other model. In evaluation, ``subspace accuracy`` is
    that of the nearest of K subspaces of dimension d // K, leading eigenvectors of the :math:`S_k`: the
    classifier that the objective suggests.

    Labels -1 say that the class is not known; such images take part in R only. On several devices the rates
    are those of the whole batch, whose features are gathered; micro-batches are coded one by one.

    Args:
        model: images to logits, with timm's ``forward_features``, ``forward_head`` and ``get_classifier``.
        eps: distortion. What matters is :math:`d/(n\epsilon^2)` with n images in a batch: published
            128 / (1000 * 0.5), about 1/4; with 64 features and batches of 128, 1/8 at the default.

    Raises:
        ConfigError: a model without these, or whose classifier is not one linear map.
    """

    moments: Tensor
    sums: Tensor

    def __init__(self, model: nn.Module, eps: float = 2.0) -> None:
        super().__init__(model)
        if not eps > 0:
            raise ConfigError(f"eps is {eps}; the distortion must be larger than 0")
        self.eps = eps
        head = _classifier(model)
        if not isinstance(head, nn.Linear):
            raise ConfigError(
                f"mcr2 needs a model whose classifier is one linear map, and {type(model).__name__} has a "
                f"{type(head).__name__} - take another model, or give it classes"
            )
        self.classifier = [head.requires_grad_(False)]  # in a list: it is the model's, and not ours to save
        classes, dim = head.weight.shape
        self.register_buffer("moments", torch.zeros(classes, dim, dim))
        self.register_buffer("sums", torch.zeros(classes, dim))

    def forward(self, images: Float[Tensor, "b c h w"], labels: Int[Tensor, b]) -> dict[str, Tensor]:
        z = unit_features(self.model, images)
        if self.training:  # evaluation is the first process's alone
            z, labels = gathered(z), gathered(labels)
        if not all_finite(z):
            return {"loss": z.sum()}
        expansion, compression = coding_rate(z, self.eps), class_coding_rate(z, labels, self.eps)
        known = labels >= 0
        z, labels = z.detach()[known], labels[known]
        # Without an offset, the length of a feature has no say in which score is the largest.
        guesses = {"accuracy": z @ self.classifier[0].weight.detach().float().mT}
        if self.training:
            self._follow(z, labels)
        else:
            bases = self._bases()
            guesses["subspace accuracy"] = torch.stack([(z @ U).square().sum(-1) for U in bases], -1)
        count = known.sum().clamp_min(1)
        return {
            "loss": compression - expansion,
            "rate": expansion.detach(),
            "class rate": compression.detach(),
            **{name: (score.argmax(-1) == labels).sum() / count for name, score in guesses.items()},
        }

    @torch.no_grad()
    def _follow(self, z: Float[Tensor, "b d"], labels: Int[Tensor, b]) -> None:
        """The moments of this batch into the running ones, and the classifier after them."""
        self.moments *= MEMORY
        self.sums *= MEMORY
        self.sums.index_add_(0, labels, z)
        for k in labels.unique().tolist():
            part = z[labels == k]
            self.moments[k] += part.mT @ part
        whole = self.moments.sum(0)
        seen = whole.diagonal().sum()  # how many features, as each has length 1
        if seen > 0:
            ridge = seen * self.eps**2 / len(whole) * torch.eye(len(whole), device=whole.device)
            weight = torch.linalg.solve(whole + ridge, self.sums.mT).mT
            self.classifier[0].weight.copy_(weight)
            if self.classifier[0].bias is not None:
                self.classifier[0].bias.zero_()

    def _bases(self) -> Float[Tensor, "K d r"]:
        classes, dim = self.sums.shape
        return torch.linalg.eigh(self.moments).eigenvectors[..., -max(1, dim // classes) :]


class SelfSupervisedMCR2(Representation):
    r"""The same without labels: every image is a class, and what augmentation makes of it are its members.

    .. math:: R^c(Z \mid \Pi; \epsilon) - \gamma_2\, R(Z; \epsilon / \sqrt{\gamma_1})

    The published weights make the expansion gentler where it is steep, since classes of a few views are cheap
    from the beginning. On several devices the rates are those of the whole batch.

    Args:
        model: images to features.
        eps: distortion.
        gain: :math:`\gamma_1`.
        weight: :math:`\gamma_2`.
    """

    many_views: ClassVar[bool] = True
    recipe: ClassVar[Mapping[str, Any]] = {"lr": 1e-3, "large_crops": 4, "small_crops": 0}

    def __init__(
        self, model: nn.Module, *, eps: float = 0.5**0.5, gain: float = 20.0, weight: float = 0.05
    ) -> None:
        super().__init__(model)
        if not min(eps, gain, weight) > 0:
            raise ConfigError(f"eps {eps}, gain {gain} and weight {weight} must be larger than 0")
        self.eps, self.gain, self.weight = eps, gain, weight

    def forward(self, crops: Crops, labels: Int[Tensor, b] | None = None) -> dict[str, Tensor]:
        count = crops.large.shape[1]
        z = gathered(unit_features(self.model, crops.large.flatten(0, 1)))
        if not all_finite(z):
            return {"loss": z.sum()}
        owner = torch.arange(len(z) // count, device=z.device).repeat_interleave(count)
        expansion = coding_rate(z, self.eps / self.gain**0.5)
        compression = class_coding_rate(z, owner, self.eps)
        return {
            "loss": compression - self.weight * expansion,
            "rate": expansion.detach(),
            "class rate": compression.detach(),
        }


def unit_features(model: Any, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
    """Pooled features of any of timm's or our models, in front of the classifier, on the unit sphere."""
    pooled = model.forward_head(model.forward_features(images), pre_logits=True)
    return F.normalize(pooled.float(), dim=-1)


def _classifier(model: Any) -> nn.Module:
    for name in ("forward_features", "forward_head", "get_classifier"):
        if not hasattr(model, name):
            raise ConfigError(f"mcr2 needs a model with timm's {name}, and {type(model).__name__} has none")
    return model.get_classifier()
