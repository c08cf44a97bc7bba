"""CRATE: each layer compresses the tokens around its subspaces, then sparsifies them in its dictionary.

``z <- MSSA(z)`` lowers R^c(Z | U), ``z <- ISTA(LayerNorm(z))`` lowers the LASSO; two lines of
:func:`build_layer` say all of it (Yu et al. 2023, "White-Box Transformers via Sparse Rate Reduction").

**Departs** from the derivation, as the published models do: a pre-norm in front of both steps, a softmax
scale, no factor on the residual, and with ``compression="untied"`` a free output matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from pellucid.models.embed import Size, StemName, TokenEmbedding
from pellucid.steps import ISTA, MSSA, ExactCompression, OnStep, StepRecord, SubspaceStep, UntiedMSSA, unroll

Pool = Literal["token", "avg", ""]

COMPRESSION: dict[str, type[SubspaceStep]] = {
    "tied": MSSA,
    "untied": UntiedMSSA,
    "exact": ExactCompression,
}


def build_layer(
    dim: int,
    num_heads: int,
    compression: str,
    compress_step_size: float,
    step_size: float,
    sparsity: float,
    eps: float,
) -> nn.ModuleDict:
    """One layer of CRATE: compress, then sparsify."""
    compress = COMPRESSION[compression]
    return nn.ModuleDict(
        {
            "compress": compress(
                dim, num_heads, step_size=compress_step_size, eps=eps, norm=nn.LayerNorm(dim)
            ),
            "sparsify": ISTA(dim, step_size=step_size, sparsity=sparsity, enter=nn.LayerNorm(dim)),
        }
    )


class CRATE(nn.Module):
    """Coding RAte reduction TransformEr.

    Takes timm's words for what timm has, and answers to its interfaces.

    Args:
        img_size, patch_size, in_chans, num_classes: as in timm; ``num_classes=0`` leaves no head.
        global_pool: ``"token"`` (class token, as published), ``"avg"`` (mean of patches), ``""`` (all).
        embed_dim, depth: width of a token and number of layers.
        num_heads: subspaces of each layer, each of dimension ``embed_dim // num_heads``.
        compression: ``"tied"`` (MSSA as derived), ``"untied"`` (as published), ``"exact"`` (gradient of R^c).
        compress_step_size: length of the compression step; 1 as published.
        step_size, sparsity: of ISTA; 0.1 and 0.1 as published.
        eps: distortion at which the audit measures R^c; 0.1 as in the authors' plots (eps^2 = 0.01).
        stem, class_token, reg_tokens, dynamic_img_size, pos_std: see
            :class:`~pellucid.models.embed.TokenEmbedding`.
        init: ``"orthogonal"``, or ``"published"`` for the distributions of the authors' program.
        drop_rate: dropout in front of the classifier.

    Raises:
        ValueError: sizes that do not fit together, naming both.
    """

    def __init__(
        self,
        img_size: Size = 224,
        patch_size: Size = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Pool = "token",
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        compression: Literal["tied", "untied", "exact"] = "tied",
        compress_step_size: float = 1.0,
        step_size: float = 0.1,
        sparsity: float = 0.1,
        eps: float = 0.1,
        stem: StemName = "linear",
        class_token: bool = True,
        reg_tokens: int = 0,
        dynamic_img_size: bool = False,
        pos_std: float = 0.5,
        init: Literal["orthogonal", "published"] = "orthogonal",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if compression not in COMPRESSION:
            raise ValueError(f"compression is {compression!r}; known: {', '.join(map(repr, COMPRESSION))}")
        _check_pool(global_pool, class_token)
        self.num_classes, self.global_pool = num_classes, global_pool
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.embed = TokenEmbedding(
            img_size,
            patch_size,
            in_chans,
            embed_dim,
            stem=stem,
            class_token=class_token,
            reg_tokens=reg_tokens,
            dynamic_img_size=dynamic_img_size,
            pos_std=pos_std,
        )
        self.layers = nn.ModuleList(
            build_layer(embed_dim, num_heads, compression, compress_step_size, step_size, sparsity, eps)
            for _ in range(depth)
        )
        self.norm: nn.Module = nn.LayerNorm(embed_dim)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self.grad_checkpointing = False
        reduction = self.embed.patch_size[0]
        self.feature_info = [
            {"module": f"layers.{i}", "num_chs": embed_dim, "reduction": reduction} for i in range(depth)
        ]
        self.init_weights(init)

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
        z = self.embed(images)
        return self.norm(unroll(self.layers, z, on_step=on_step, checkpoint=self._recompute))

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
        prefix = [t[:, : self.num_prefix_tokens] for t in kept]
        patches = [t[:, self.num_prefix_tokens :] for t in kept]
        if output_fmt == "NCHW":
            grid = self.embed.grid(*x.shape[-2:])
            patches = [t.mT.unflatten(-1, grid).contiguous() for t in patches]
        out = list(zip(patches, prefix, strict=True)) if return_prefix_tokens else patches
        return out if intermediates_only else (self.norm(z), out)

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
            _check_pool(global_pool, self.embed.class_token is not None)
            self.global_pool = global_pool
        self.num_classes = num_classes
        like = self.embed.pos_embed
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
        return {"embed.pos_embed", "embed.class_token", "embed.reg_tokens"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that sort parameters into layers, for layer-wise learning rates."""
        return {
            "stem": r"^embed",
            "blocks": r"^layers\.(\d+)" if coarse else [(r"^layers\.(\d+)", None), (r"^norm", (99999,))],
        }

    @torch.no_grad()
    def init_weights(self, scheme: str = "orthogonal") -> None:
        """Fresh weights: orthogonal bases and dictionaries, or the published distributions."""
        if scheme not in ("orthogonal", "published"):
            raise ValueError(f"init is {scheme!r}; known: 'orthogonal', 'published'")
        if scheme == "orthogonal":
            if isinstance(self.head, nn.Linear):
                nn.init.trunc_normal_(self.head.weight, std=0.02)
                nn.init.zeros_(self.head.bias)
            return  # the steps and the embedding are made so
        for parameter in (self.embed.pos_embed, self.embed.class_token, self.embed.reg_tokens):
            if parameter is not None:
                nn.init.normal_(parameter)
        for module in self.layers.modules():
            if isinstance(module, ISTA):
                nn.init.kaiming_uniform_(module.dictionary)
            elif isinstance(module, nn.Linear):
                module.reset_parameters()


def _check_pool(pool: str, class_token: bool) -> None:
    if pool not in ("token", "avg", ""):
        raise ValueError(f"global_pool is {pool!r}; known: 'token', 'avg', ''")
    if pool == "token" and not class_token:
        raise ValueError("global_pool='token' needs class_token=True - or take global_pool='avg'")


def _cfg(input_size: tuple[int, int, int] = (3, 224, 224), num_classes: int = 1000) -> dict[str, Any]:
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


default_cfgs = generate_default_cfgs(
    {
        "crate_tiny_patch16_224.untrained": _cfg(),
        "crate_small_patch16_224.untrained": _cfg(),
        "crate_base_patch16_224.untrained": _cfg(),
        "crate_large_patch16_224.untrained": _cfg(),
        "crate_micro_patch4_32.untrained": _cfg((3, 32, 32), 10),
        "crate_digits.untrained": _cfg((1, 8, 8), 10),
    }
)


def _crate(variant: str, pretrained: bool, kwargs: dict[str, Any], **sizes: Any) -> nn.Module:
    out_indices = kwargs.pop("out_indices", 3)
    return build_model_with_cfg(
        CRATE,
        variant,
        pretrained,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **{**sizes, **kwargs},
    )


_SMALL = {"compression": "tied", "stem": "conv", "step_size": 0.3}
"""For small pictures: a patch of few pixels loses its brightness in the published stem's LayerNorm, and with
few layers a longer ISTA step learns more."""


@register_model
def crate_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CRATE-T as published: 6.09 M parameters."""
    sizes = {"embed_dim": 384, "depth": 12, "num_heads": 6, "compression": "untied"}
    return _crate("crate_tiny_patch16_224", pretrained, kwargs, **sizes)


@register_model
def crate_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CRATE-S as published: 13.12 M parameters."""
    sizes = {"embed_dim": 576, "depth": 12, "num_heads": 12, "compression": "untied"}
    return _crate("crate_small_patch16_224", pretrained, kwargs, **sizes)


@register_model
def crate_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CRATE-B as published: 22.80 M parameters."""
    sizes = {"embed_dim": 768, "depth": 12, "num_heads": 12, "compression": "untied"}
    return _crate("crate_base_patch16_224", pretrained, kwargs, **sizes)


@register_model
def crate_large_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CRATE-L as published: 77.64 M parameters."""
    sizes = {"embed_dim": 1024, "depth": 24, "num_heads": 16, "compression": "untied"}
    return _crate("crate_large_patch16_224", pretrained, kwargs, **sizes)


@register_model
def crate_micro_patch4_32(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """For 32 x 32 pictures such as CIFAR: 6 layers of width 192."""
    sizes = {**_SMALL, "img_size": 32, "patch_size": 4, "embed_dim": 192, "depth": 6, "num_heads": 12}
    return _crate("crate_micro_patch4_32", pretrained, kwargs, **sizes)


@register_model
def crate_digits(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """For 8 x 8 gray digits: 4 layers of width 64."""
    sizes = {
        **_SMALL,
        "img_size": 8,
        "patch_size": 2,
        "in_chans": 1,
        "embed_dim": 64,
        "depth": 4,
        "num_heads": 8,
    }
    return _crate("crate_digits", pretrained, kwargs, **sizes)
