"""Learning without labels: what all of its objectives share, and how what they learn is measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from pellucid.analytic import NearestNeighbours
from pellucid.errors import ConfigError
from pellucid.models.embed import embedding
from pellucid.models.modes import in_eval_mode
from pellucid.objectives import effective_rank
from pellucid.training.health import Verdict, verdict
from pellucid.training.objective import Batches, Held, Objective


class Representation(Objective):
    """An objective whose model gives features and has no classifier.

    Its measures are those of the features that the run would hand over: ``effective rank`` of the test
    images' features (RankMe, 1 to their width), ``cosine`` between different images (1 when all are alike),
    ``view cosine`` between views of one image, ``norm`` and ``norm spread`` (standard deviation over mean),
    and where labels are known ``knn accuracy``.
    """

    needs_labels: ClassVar[bool] = False

    def __init__(self, model: nn.Module, heads: Mapping[str, nn.Module] | None = None) -> None:
        super().__init__(model, heads)
        feature_width(model)
        if getattr(model, "global_pool", None) == "":
            raise ConfigError("an image needs one feature - give the model global_pool='avg' or 'token'")

    @torch.no_grad()
    def evaluate(self, weights: Mapping[str, Tensor], held: Held) -> dict[str, float]:
        features, labels = self._features(weights, held.test)
        if not bool(features.isfinite().all()):
            return dict.fromkeys(("effective rank", "cosine", "norm", "norm spread"), math.nan)
        lengths = features.norm(dim=-1)
        unit = F.normalize(features, dim=-1)
        n = len(unit)
        measures = {
            "effective rank": float(effective_rank(unit)),
            "cosine": float((unit.sum(0).square().sum() - n) / max(1, n * (n - 1))),
            "norm": float(lengths.mean()),
            "norm spread": float(lengths.std(correction=0) / lengths.mean().clamp_min(1e-12)),
        }
        views, _ = self._features(weights, ((batch[0].large[:, :2], *batch[1:]) for batch in held.views))
        if views.ndim == 3 and views.shape[1] == 2:
            first, second = F.normalize(views, dim=-1).unbind(1)
            measures["view cosine"] = float((first * second).sum(-1).mean())
        if bool((labels >= 0).any()):
            known, names = self._features(weights, held.train)
            guess = NearestNeighbours().fit(known[names >= 0], names[names >= 0]).predict(features)
            right = torch.as_tensor(guess)[labels >= 0] == labels[labels >= 0]
            measures["knn accuracy"] = float(right.float().mean())
        return measures

    def verdict(self, history: Sequence[Mapping[str, float]]) -> Verdict:
        return verdict(history, feature_width(self.model))

    def _features(self, weights: Mapping[str, Tensor], batches: Batches) -> tuple[Tensor, Tensor]:
        """Pooled features ``(n, d)``, or ``(n, v, d)`` of several views, and labels ``(n,)``, on the CPU."""
        device = next(self.model.parameters()).device
        found: list[tuple[Tensor, Tensor]] = []
        with in_eval_mode(self.model):
            for batch in batches:
                images = batch[0].to(device)
                # Without a classifier, a model's output is its pooled feature.
                pooled = torch.func.functional_call(
                    self.model, dict(weights), (images.flatten(0, -4),)
                ).unflatten(0, images.shape[:-3])
                found.append((pooled.float().cpu(), batch[1].cpu()))
        if not found:
            return torch.empty(0, 0), torch.empty(0)
        features, labels = zip(*found, strict=True)
        return torch.cat(features), torch.cat(labels)


class hidden:  # noqa: N801
    """Inside the block, the stem of ``model`` puts ``token`` in the place of each patch that ``mask`` hides.

    Positions are added behind the stem, in our models as in timm's, so the token says where and not what.
    """

    def __init__(self, model: Any, mask: Bool[Tensor, "b p"], token: Float[Tensor, " d"]) -> None:
        embed = embedding(model)
        stem = getattr(embed, "stem", embed)
        if not isinstance(stem, nn.Module):
            raise ConfigError(f"{type(model).__name__} has no stem whose patches could be hidden")
        self.stem, self.mask, self.token = stem, mask, token

    def __enter__(self) -> None:
        def replace(module: nn.Module, args: Any, patches: Tensor) -> Tensor:
            at = self.mask.reshape(*patches.shape[:-1], 1)
            return torch.where(at, self.token.to(patches.dtype), patches)

        self.handle = self.stem.register_forward_hook(replace)

    def __exit__(self, *exception: object) -> None:
        self.handle.remove()


def feature_width(model: Any) -> int:
    """Width of the pooled feature.

    Raises:
        ConfigError: a model that gives none.
    """
    for name in ("forward_features", "forward_head", "num_features"):
        if not hasattr(model, name):
            raise ConfigError(
                f"learning without labels needs a model with timm's {name}, and {type(model).__name__} has "
                f"none"
            )
    return int(model.num_features)
