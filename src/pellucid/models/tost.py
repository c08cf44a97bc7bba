"""ToST: compression from token statistics, in time linear in the number of tokens (Wu et al. 2024).

Each layer takes a step on the variational bound of R^c, then an MLP. The class token joins only after the
last layer, where two class-attention blocks read the patches (Touvron et al. 2021, CaiT).

**Departs** from the derivation, as published: a free output matrix, layer scale, and the MLP, which states no
objective; ``sparsification="ista"`` puts a step with one in its place.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from timm.models import generate_default_cfgs
from timm.models.xcit import ClassAttentionBlock
from torch import Tensor, nn

from pellucid.models.backbone import Backbone, Pool, cfg_of, register
from pellucid.models.embed import Positions, Size, StemName, TokenEmbedding
from pellucid.steps import MLP, TSSA, Layer, OvercompleteISTA, Step, UntiedTSSA


def build_layer(
    dim: int,
    num_heads: int,
    *,
    compression: Literal["tied", "untied"],
    sparsification: Literal["mlp", "ista"],
    layer_scale: float,
    mlp_ratio: float,
    step_size: float,
    sparsity: float,
    norm_eps: float,
) -> Layer:
    """One layer of ToST: compress, then an MLP or a sparse code."""
    norm = partial(nn.LayerNorm, dim, eps=norm_eps)
    compress: Step
    sparsify: Step
    if compression == "tied":
        compress = TSSA(dim, num_heads, norm=norm())
    else:
        compress = UntiedTSSA(dim, num_heads, norm=norm(), layer_scale=layer_scale)
    if sparsification == "mlp":
        sparsify = MLP(dim, mlp_ratio, norm=norm(), layer_scale=layer_scale)
    else:
        atoms = round(mlp_ratio * dim)
        sparsify = OvercompleteISTA(dim, atoms, step_size=step_size, sparsity=sparsity, norm=norm())
    return Layer({"compress": compress, "sparsify": sparsify})


class ToST(Backbone):
    """Token Statistics Transformer.

    Args:
        img_size, patch_size, in_chans, num_classes, embed_dim, depth, num_heads: as in timm.
        global_pool: ``"token"`` (class token, as published), ``"avg"`` (mean of patches), ``""`` (all).
        compression: ``"untied"`` (as published) or ``"tied"`` (TSSA as derived).
        sparsification: ``"mlp"`` (as published) or ``"ista"`` (CRATE-alpha's sparse code).
        class_depth: class-attention blocks behind the layers, 2 as published; 0 leaves out the class token.
        layer_scale: where the learned step sizes begin: 1 for 12 layers, 1e-5 for 24 as published.
        mlp_ratio: width of the MLP, or atoms of the dictionary, for each dimension of a token.
        step_size, sparsity: of ISTA.
        norm_eps: of all norms; 1e-6 as published.
        stem, positions, dynamic_img_size: see :class:`~pellucid.models.embed.TokenEmbedding`.
        drop_rate: dropout in front of the classifier.

    Raises:
        ValueError: sizes or options that do not fit together, naming both.
    """

    def __init__(
        self,
        img_size: Size = 224,
        patch_size: Size = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Pool = "token",
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 4,
        compression: Literal["tied", "untied"] = "untied",
        sparsification: Literal["mlp", "ista"] = "mlp",
        class_depth: int = 2,
        layer_scale: float = 1.0,
        mlp_ratio: float = 4.0,
        step_size: float = 0.1,
        sparsity: float = 0.1,
        norm_eps: float = 1e-6,
        stem: StemName = "conv_bn",
        positions: Positions = "fourier",
        dynamic_img_size: bool = False,
        drop_rate: float = 0.0,
    ) -> None:
        for name, value, known in (
            ("compression", compression, ("tied", "untied")),
            ("sparsification", sparsification, ("mlp", "ista")),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; known: {', '.join(map(repr, known))}")
        self._class_depth = class_depth
        embed = TokenEmbedding(
            img_size,
            patch_size,
            in_chans,
            embed_dim,
            stem=stem,
            class_token=False,
            positions=positions,
            dynamic_img_size=dynamic_img_size,
        )
        layers = [
            build_layer(
                embed_dim,
                num_heads,
                compression=compression,
                sparsification=sparsification,
                layer_scale=layer_scale,
                mlp_ratio=mlp_ratio,
                step_size=step_size,
                sparsity=sparsity,
                norm_eps=norm_eps,
            )
            for _ in range(depth)
        ]
        norm = partial(nn.LayerNorm, eps=norm_eps)
        super().__init__(embed, layers, norm(embed_dim), num_classes, global_pool, drop_rate)
        self.class_token = nn.Parameter(torch.empty(1, 1, embed_dim)) if class_depth else None
        if self.class_token is not None:
            nn.init.trunc_normal_(self.class_token, std=0.02)
        self.class_attention = nn.ModuleList(
            ClassAttentionBlock(
                embed_dim,
                num_heads,
                mlp_ratio,
                qkv_bias=True,
                norm_layer=norm,  # type: ignore[arg-type]
                eta=layer_scale,
                tokens_norm=True,
            )
            for _ in range(class_depth)
        )

    @property
    def has_class_token(self) -> bool:
        return self._class_depth > 0

    @property
    def num_prefix_tokens(self) -> int:
        """The class token, which the features begin with; inside the layers there is none."""
        return int(self.has_class_token)

    def read_out(self, z: Float[Tensor, "b n d"]) -> Float[Tensor, "b m d"]:
        """The class token reads the patches."""
        if self.class_token is not None:
            z = torch.cat([self.class_token.expand(z.shape[0], -1, -1), z], 1)
        for block in self.class_attention:
            z = block(z)
        return z

    def no_weight_decay(self) -> set[str]:
        """Positions, the class token, temperatures and layer scales."""
        scalars = ("temperature", "layer_scale", "gamma1", "gamma2")
        vectors = {name for name, _ in self.named_parameters() if name.endswith(scalars)}
        return super().no_weight_decay() | {"class_token"} | vectors

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """As every backbone's, with class attention behind the last layer."""
        matcher = super().group_matcher(coarse)
        behind = (r"^class_attention\.(\d+)", (99998,))
        if not coarse:
            matcher["blocks"] = [*matcher["blocks"], behind]
        return matcher


SIZES: dict[str, dict[str, Any]] = {
    "tiny_12": {"embed_dim": 192, "depth": 12, "num_heads": 4},
    "tiny_24": {"embed_dim": 192, "depth": 24, "num_heads": 4, "layer_scale": 1e-5},
    "small_12": {"embed_dim": 384, "depth": 12, "num_heads": 8},
    "small_24": {"embed_dim": 384, "depth": 24, "num_heads": 8, "layer_scale": 1e-5},
    "medium_24": {"embed_dim": 512, "depth": 24, "num_heads": 8, "layer_scale": 1e-5},
    "large_24": {"embed_dim": 768, "depth": 24, "num_heads": 16, "layer_scale": 1e-5},
}

SMALL_PICTURES: dict[str, Any] = {"stem": "conv", "positions": "learned"}
"""For small pictures: the stem and the positions of the models beside it."""


def _variants() -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> what it is, and its sizes and options."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for size, sizes in SIZES.items():
        for patch in (8, 16):
            meaning = f"ToST {size.replace('_', ', ')} layers as published, patches of {patch}."
            found[f"tost_{size}_patch{patch}_224"] = (meaning, {"patch_size": patch, **sizes})
    micro = {"img_size": 32, "patch_size": 4, "embed_dim": 192, "depth": 6, "num_heads": 12}
    digits = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 64, "depth": 4, "num_heads": 8}
    found["tost_micro_patch4_32"] = ("ToST for small pictures.", {**micro, **SMALL_PICTURES})
    found["tost_digits"] = ("ToST for small pictures.", {**digits, **SMALL_PICTURES})
    return found


_VARIANTS = _variants()

default_cfgs = generate_default_cfgs(
    {
        f"{name}.untrained": {
            **cfg_of(sizes),
            "first_conv": "embed.stem.proj" if "stem" in sizes else "embed.stem.proj.0.0",
        }
        for name, (_, sizes) in _VARIANTS.items()
    }
)

for _name, (_meaning, _sizes) in _VARIANTS.items():
    register(__name__, ToST, _name, _meaning, **_sizes)
