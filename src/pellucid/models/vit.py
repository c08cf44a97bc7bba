"""The ordinary ViT that stands beside: timm's own, at the widths and depths of our small models."""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from pellucid.models.crate import _cfg

default_cfgs = generate_default_cfgs(
    {
        "vit_micro_patch4_32.untrained": {**_cfg((3, 32, 32), 10), "first_conv": "patch_embed.proj"},
        "vit_digits.untrained": {**_cfg((1, 8, 8), 10), "first_conv": "patch_embed.proj"},
    }
)


def _vit(variant: str, pretrained: bool, kwargs: dict[str, Any], **sizes: Any) -> nn.Module:
    out_indices = kwargs.pop("out_indices", 3)
    return build_model_with_cfg(
        VisionTransformer,
        variant,
        pretrained,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **{**sizes, **kwargs},
    )


@register_model
def vit_micro_patch4_32(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ViT with the width and depth of ``crate_micro_patch4_32``."""
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 192, "depth": 6, "num_heads": 6}
    return _vit("vit_micro_patch4_32", pretrained, kwargs, **sizes)


@register_model
def vit_digits(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ViT with the width and depth of ``crate_digits``."""
    sizes = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 64, "depth": 4, "num_heads": 4}
    return _vit("vit_digits", pretrained, kwargs, **sizes)
