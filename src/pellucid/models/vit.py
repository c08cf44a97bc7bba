"""The ordinary ViT that stands beside: timm's own, at the widths and depths of our small models."""

from __future__ import annotations

from timm.models import generate_default_cfgs
from timm.models.vision_transformer import VisionTransformer

from pellucid.models.backbone import default_cfg, register

default_cfgs = generate_default_cfgs(
    {
        "vit_micro_patch4_32.untrained": {**default_cfg((3, 32, 32), 10), "first_conv": "patch_embed.proj"},
        "vit_digits.untrained": {**default_cfg((1, 8, 8), 10), "first_conv": "patch_embed.proj"},
    }
)

register(
    __name__,
    VisionTransformer,
    "vit_micro_patch4_32",
    "ViT with the width and depth of ``crate_micro_patch4_32``.",
    img_size=32,
    patch_size=4,
    embed_dim=192,
    depth=6,
    num_heads=6,
)
register(
    __name__,
    VisionTransformer,
    "vit_digits",
    "ViT with the width and depth of ``crate_digits``.",
    img_size=8,
    patch_size=2,
    in_chans=1,
    embed_dim=64,
    depth=4,
    num_heads=4,
)
