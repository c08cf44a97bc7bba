"""CRATE: each layer compresses the tokens around its subspaces, then sparsifies them in its dictionary.

``z <- MSSA(z)`` lowers R^c(Z | U), ``z <- ISTA(LayerNorm(z))`` lowers the LASSO; :func:`build_layer` says all
of it (Yu et al. 2023, "White-Box Transformers via Sparse Rate Reduction"). CRATE-alpha is CRATE with three
switches (Yang et al. 2024, "Scaling White-Box Transformers for Vision"), the published ablation is CRATE with
one half of the layer or both replaced by a black box.

**Departs** from the derivation, as the published models do: a pre-norm in front of both steps, a softmax
scale, no factor on the residual, and with ``compression="untied"`` a free output matrix.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from timm.models import generate_default_cfgs
from torch import nn

from pellucid.models.backbone import Backbone, Pool, cfg_of, register
from pellucid.models.embed import Size, StemName, TokenEmbedding
from pellucid.models.layer import Compression, Sparsification, build_layer, check_options
from pellucid.steps import ISTA, OvercompleteISTA


class CRATE(Backbone):
    """Coding RAte reduction TransformEr.

    Takes timm's words for what timm has, and answers to its interfaces.

    Args:
        img_size, patch_size, in_chans, num_classes: as in timm; ``num_classes=0`` leaves no head.
        global_pool: ``"token"`` (class token, as published), ``"avg"`` (mean of patches), ``""`` (all).
        embed_dim, depth: width of a token and number of layers.
        num_heads: subspaces of each layer, each of dimension ``embed_dim // num_heads``.
        compression: ``"tied"`` (MSSA as derived), ``"untied"`` (as published), ``"exact"`` (gradient of R^c),
            ``"strict"`` (the same, orthonormal, with a learned step that is never too long), ``"mhsa"`` (a
            black box: ordinary attention).
        compress_step_size: length of the compression step; 1 as published.
        output_bias: with ``"untied"``, of its output; CRATE-alpha has none.
        orthonormal: hold the bases of all subspaces of a layer orthonormal and without overlap.
        sparsification: ``"ista"`` (non-negative, as published), ``"soft"`` (codes of either sign),
            ``"strict"`` (the same, with step size and sparsity learned inside the bound), ``"mlp"`` (a black
            box).
        step_size, sparsity: of ISTA; 0.1 and 0.1 as published.
        overcomplete: atoms for each dimension of a token; 4 in CRATE-alpha.
        decoupled: another dictionary speaks the code back, as in CRATE-alpha.
        residual: the code is added to the token, as in CRATE-alpha, in place of taking its place.
        eps: distortion at which the audit measures R^c; 0.1 as in the authors' plots (eps^2 = 0.01).
        norm_eps: of the layers' norms; 1e-6 in CRATE-alpha.
        stem, class_token, reg_tokens, dynamic_img_size, pos_std: see
            :class:`~pellucid.models.embed.TokenEmbedding`.
        init: ``"orthogonal"``, or ``"published"`` for the distributions of the authors' program.
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
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        compression: Compression = "tied",
        compress_step_size: float = 1.0,
        output_bias: bool = True,
        orthonormal: bool = False,
        sparsification: Sparsification = "ista",
        step_size: float = 0.1,
        sparsity: float = 0.1,
        overcomplete: int = 1,
        decoupled: bool = False,
        residual: bool = False,
        eps: float = 0.1,
        norm_eps: float = 1e-5,
        stem: StemName = "linear",
        class_token: bool = True,
        reg_tokens: int = 0,
        dynamic_img_size: bool = False,
        pos_std: float = 0.5,
        init: Literal["orthogonal", "published"] = "orthogonal",
        drop_rate: float = 0.0,
    ) -> None:
        check_options(compression, sparsification, overcomplete, decoupled, residual)
        embed = TokenEmbedding(
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
        layers = [
            build_layer(
                embed_dim,
                num_heads,
                compression=compression,
                compress_step_size=compress_step_size,
                eps=eps,
                output_bias=output_bias,
                sparsification=sparsification,
                step_size=step_size,
                sparsity=sparsity,
                overcomplete=overcomplete,
                decoupled=decoupled,
                residual=residual,
                norm_eps=norm_eps,
                orthonormal=orthonormal,
            )
            for _ in range(depth)
        ]
        super().__init__(embed, layers, nn.LayerNorm(embed_dim), num_classes, global_pool, drop_rate)
        self.init_weights(init)

    @torch.no_grad()
    def init_weights(self, scheme: str = "orthogonal") -> None:
        """Weights as the steps and the embedding make them, orthogonal; or the published distributions."""
        if scheme not in ("orthogonal", "published"):
            raise ValueError(f"init is {scheme!r}; known: 'orthogonal', 'published'")
        if scheme == "orthogonal":
            return
        for parameter in (self.embed.pos_embed, self.embed.class_token, self.embed.reg_tokens):
            if parameter is not None:
                nn.init.normal_(parameter)
        for module in self.layers.modules():
            if isinstance(module, ISTA):
                nn.init.kaiming_uniform_(module.dictionary)
            elif isinstance(module, OvercompleteISTA) and module.output is not None:
                nn.init.kaiming_uniform_(module.output)
            elif isinstance(module, nn.Linear):
                module.reset_parameters()


PUBLISHED: dict[str, Any] = {"compression": "untied"}
"""What the published CRATE departs by; the sizes in which it was published."""

CRATE_SIZES: dict[str, dict[str, int]] = {
    "tiny": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "small": {"embed_dim": 576, "depth": 12, "num_heads": 12},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
}

ALPHA: dict[str, Any] = {
    "compression": "untied",
    "output_bias": False,
    "overcomplete": 4,
    "decoupled": True,
    "residual": True,
    "norm_eps": 1e-6,
    "stem": "conv",
}
"""The three switches that make CRATE-alpha, and its smaller departures."""

ALPHA_SIZES: dict[str, dict[str, int]] = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 576, "depth": 12, "num_heads": 12},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "huge": {"embed_dim": 1280, "depth": 32, "num_heads": 16},
}

SMALL_PICTURES: dict[str, Any] = {"compression": "tied", "stem": "conv", "step_size": 0.3}
"""For small pictures: a patch of few pixels loses its brightness in the published stem's LayerNorm, and with
few layers a longer ISTA step learns more."""

STRICT: dict[str, Any] = {"compression": "strict", "sparsification": "strict", "stem": "conv", "eps": 1.0}
"""Both steps held to their bounds, with a distortion of the size of a normalised token's coordinate."""

MICRO: dict[str, Any] = {"img_size": 32, "patch_size": 4, "embed_dim": 192, "depth": 6, "num_heads": 12}
DIGITS: dict[str, Any] = {
    "img_size": 8,
    "patch_size": 2,
    "in_chans": 1,
    "embed_dim": 64,
    "depth": 4,
    "num_heads": 8,
}

ABLATION: dict[str, dict[str, Any]] = {
    "mssa_mlp": {"compression": "untied", "sparsification": "mlp"},
    "mhsa_ista": {"compression": "mhsa", "sparsification": "ista"},
    "mhsa_mlp": {"compression": "mhsa", "sparsification": "mlp"},
}
"""The published ablation, beside CRATE, which is MSSA and ISTA: same stem, pooling and recipe."""


def _variants() -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> what it is, and its sizes and options."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for size, sizes in CRATE_SIZES.items():
        for patch in (8, 14, 16):
            found[f"crate_{size}_patch{patch}_224"] = (
                f"CRATE-{size[0].upper()} as published, patches of {patch}.",
                {"patch_size": patch, **sizes, **PUBLISHED},
            )
    for size, sizes in ALPHA_SIZES.items():
        for patch in (8, 14, 16, 32):
            found[f"crate_alpha_{size}_patch{patch}_224"] = (
                f"CRATE-alpha {size} as published, patches of {patch}.",
                {"patch_size": patch, **sizes, **ALPHA},
            )
    small = {"micro_patch4_32": MICRO, "digits": DIGITS}
    for size in ("tiny", "small", "base"):
        strict = {**CRATE_SIZES[size], **STRICT}
        found[f"crate_strict_{size}_patch16_224"] = ("Every step proved to descend.", strict)
    for place, sizes in small.items():
        found[f"crate_{place}"] = ("CRATE for small pictures, tied.", {**sizes, **SMALL_PICTURES})
        found[f"crate_strict_{place}"] = ("Every step proved to descend.", {**sizes, **STRICT})
        found[f"crate_alpha_{place}"] = ("CRATE-alpha for small pictures.", {**sizes, **ALPHA})
    for name, halves in ABLATION.items():
        what = "The published ablation of CRATE: " + " and ".join(name.split("_")).upper() + "."
        for place, sizes in small.items():
            found[f"{name}_{place}"] = (what, {**sizes, **SMALL_PICTURES, **halves})
        found[f"{name}_tiny_patch8_224"] = (what, {"patch_size": 8, **CRATE_SIZES["tiny"], **halves})
    return found


_VARIANTS = _variants()

default_cfgs = generate_default_cfgs(
    {f"{name}.untrained": cfg_of(sizes) for name, (_, sizes) in _VARIANTS.items()}
)

for _name, (_meaning, _sizes) in _VARIANTS.items():
    register(__name__, CRATE, _name, _meaning, **_sizes)
