"""What our vision models share: timm's interfaces around one ``unroll``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from timm.models import build_model_with_cfg, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from pellucid.models.embed import Size, TokenEmbedding
from pellucid.steps import OnStep, StepRecord, unroll

Pool = Literal["token", "avg", ""]

ARCHITECTURES: dict[str, type[nn.Module]] = {}
"""The class behind each registered name of ours."""


class Backbone(nn.Module):
    """Images to tokens, tokens through layers of steps, tokens to class scores.

    Answers to timm's interfaces: features, intermediates, head, pooling, image size, gradient checkpointing.

    Args:
        embed: images to tokens.
        layers: each named steps in order.
        norm: applied to the last layer's tokens.
        num_classes: ``0`` leaves no head.
        global_pool: ``"token"`` (class token), ``"avg"`` (mean of patches), ``""`` (all tokens).
        drop_rate: dropout in front of the classifier.
    """

    def __init__(
        self,
        embed: TokenEmbedding,
        layers: Iterable[nn.Module],
        norm: nn.Module,
        num_classes: int,
        global_pool: Pool,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.embed = embed
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.num_features = self.head_hidden_size = self.embed_dim = embed.dim
        self.num_classes, self.global_pool = num_classes, global_pool
        self._check_pool(global_pool)
        self.head_drop = nn.Dropout(drop_rate)
        self.head: nn.Module = nn.Linear(self.embed_dim, num_classes) if num_classes else nn.Identity()
        if isinstance(self.head, nn.Linear):
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)
        self.grad_checkpointing = False
        self.feature_info = [
            {"module": f"layers.{i}", "num_chs": self.embed_dim, "reduction": embed.patch_size[0]}
            for i in range(len(self.layers))
        ]

    @property
    def num_prefix_tokens(self) -> int:
        """Class token and registers, which come before the patches."""
        return self.embed.num_prefix_tokens

    def forward(self, images: Float[Tensor, "b c h w"], on_step: OnStep | None = None) -> Tensor:
        return self.forward_head(self.forward_features(images, on_step))

    def forward_features(
        self, images: Float[Tensor, "b c h w"], on_step: OnStep | None = None
    ) -> Float[Tensor, "b n d"]:
        """Normalised tokens after the last layer. ``on_step`` sees every step, as in ``unroll``."""
        z = unroll(self.layers, self.embed(images), on_step=on_step, checkpoint=self._recompute)
        return self.norm(self.read_out(z))

    def read_out(self, z: Float[Tensor, "b n d"]) -> Float[Tensor, "b m d"]:
        """What stands between the last layer and the final norm: nothing, unless a model says otherwise."""
        return z

    def forward_head(self, tokens: Float[Tensor, "b n d"], pre_logits: bool = False) -> Tensor:
        """Class scores from normalised tokens; with ``pre_logits`` the pooled feature."""
        if self.global_pool == "token":
            tokens = tokens[:, 0]
        elif self.global_pool == "avg":
            tokens = tokens[:, self.num_prefix_tokens :].mean(1)
        tokens = self.head_drop(tokens)
        return tokens if pre_logits else self.head(tokens)

    def forward_intermediates(
        self,
        x: Float[Tensor, "b c h w"],
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Tokens after the chosen layers, as timm's models give them.

        Args:
            x: images.
            indices: the last so many layers, a list of layers from 0, or None for all.
            return_prefix_tokens: give pairs (patches, prefix tokens).
            norm: apply the final LayerNorm to each.
            stop_early: leave out layers after the last chosen one.
            output_fmt: patches as ``(b, d, h, w)`` or ``(b, n, d)``.
            intermediates_only: leave out the final features.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt is {output_fmt!r}; known: 'NCHW', 'NLC'")
        chosen, last = feature_take_indices(len(self.layers), indices)  # type: ignore[arg-type]
        tokens: dict[int, Tensor] = {}

        def keep(record: StepRecord) -> None:
            tokens[record.layer - 1] = record.z_next

        layers = self.layers[: last + 1] if stop_early else self.layers
        z = unroll(layers, self.embed(x), on_step=keep)
        kept = [self.norm(tokens[i]) if norm else tokens[i] for i in chosen]
        first = self.embed.num_prefix_tokens
        prefix, patches = [t[:, :first] for t in kept], [t[:, first:] for t in kept]
        if output_fmt == "NCHW":
            grid = self.embed.grid(*x.shape[-2:])
            patches = [t.mT.unflatten(-1, grid).contiguous() for t in patches]
        out = list(zip(patches, prefix, strict=True)) if return_prefix_tokens else patches
        return out if intermediates_only else (self.norm(self.read_out(z)), out)

    def get_intermediate_layers(
        self,
        x: Float[Tensor, "b c h w"],
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> list:
        """DINO's interface to :meth:`forward_intermediates`."""
        return self.forward_intermediates(
            x,
            n,
            return_prefix_tokens=return_prefix_tokens,
            norm=norm,
            output_fmt="NCHW" if reshape else "NLC",
            intermediates_only=True,
        )

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the chosen layers do not need; returns the layers kept as outputs."""
        chosen, last = feature_take_indices(len(self.layers), indices)  # type: ignore[arg-type]
        self.layers = self.layers[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return chosen

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: Pool | None = None) -> None:
        """A new head, with other pooling if given."""
        if global_pool is not None:
            self._check_pool(global_pool)
            self.global_pool = global_pool
        self.num_classes = num_classes
        like = next(self.layers.parameters())
        self.head = nn.Linear(self.embed_dim, num_classes) if num_classes else nn.Identity()
        self.head.to(device=like.device, dtype=like.dtype)

    def set_input_size(self, img_size: Size) -> None:
        """Resample the positions to another image size, for good."""
        self.embed.set_input_size(img_size)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute layers in the backward pass: memory of one layer in place of all."""
        self.grad_checkpointing = enable

    @property
    def _recompute(self) -> bool:
        return self.grad_checkpointing and torch.is_grad_enabled()

    def no_weight_decay(self) -> set[str]:
        """Positions and learned tokens."""
        return {"embed.pos_embed", "embed.class_token", "embed.reg_tokens"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that sort parameters into layers, for layer-wise learning rates."""
        return {
            "stem": r"^embed",
            "blocks": r"^layers\.(\d+)" if coarse else [(r"^layers\.(\d+)", None), (r"^norm", (99999,))],
        }

    @property
    def has_class_token(self) -> bool:
        """Whether the features begin with a token that stands for the image."""
        return self.embed.class_token is not None

    def _check_pool(self, pool: str) -> None:
        if pool not in ("token", "avg", ""):
            raise ValueError(f"global_pool is {pool!r}; known: 'token', 'avg', ''")
        if pool == "token" and not self.has_class_token:
            raise ValueError("global_pool='token' needs class_token=True - or take global_pool='avg'")


def default_cfg(input_size: tuple[int, int, int] = (3, 224, 224), num_classes: int = 1000) -> dict[str, Any]:
    """timm's description of what a model expects: colour pictures as ImageNet's, others around one half."""
    imagenet = input_size[0] == 3
    return {
        "url": "",
        "num_classes": num_classes,
        "input_size": input_size,
        "crop_pct": 0.875 if input_size[1] >= 96 else 1.0,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406) if imagenet else (0.5,) * input_size[0],
        "std": (0.229, 0.224, 0.225) if imagenet else (0.5,) * input_size[0],
        "first_conv": "embed.stem.proj",
        "classifier": "head",
        "license": "apache-2.0",
    }


def cfg_of(sizes: Mapping[str, Any], num_classes: int | None = None) -> dict[str, Any]:
    """:func:`default_cfg` for these sizes; ImageNet's classes where no size is given, ten elsewhere."""
    if num_classes is None:
        num_classes = 10 if "img_size" in sizes else 1000
    side = sizes.get("img_size", 224)
    return default_cfg((sizes.get("in_chans", 3), side, side), num_classes)


def register(module: str, cls: type[nn.Module], name: str, meaning: str, **sizes: Any) -> None:
    """Make ``timm.create_model(name)`` build ``cls(**sizes)``; ``module`` holds its ``default_cfgs``."""

    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        features = {"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"}
        return build_model_with_cfg(cls, name, pretrained, feature_cfg=features, **{**sizes, **kwargs})

    build.__name__, build.__module__, build.__doc__ = name, module, meaning
    ARCHITECTURES[name] = cls
    register_model(build)
