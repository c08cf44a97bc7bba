"""One layer of CRATE from its options: what models of images and of text are made of."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, get_args

from torch import nn

from pellucid.steps import (
    ISTA,
    MHSA,
    MLP,
    MSSA,
    ExactCompression,
    Layer,
    OvercompleteISTA,
    SoftISTA,
    Step,
    StrictCompression,
    StrictISTA,
    UntiedMSSA,
)

Compression = Literal["tied", "untied", "exact", "strict", "mhsa"]
Sparsification = Literal["ista", "soft", "strict", "mlp"]


def build_layer(
    dim: int,
    num_heads: int,
    *,
    compression: Compression,
    compress_step_size: float,
    eps: float,
    output_bias: bool,
    sparsification: Sparsification,
    step_size: float,
    sparsity: float,
    overcomplete: int,
    decoupled: bool,
    residual: bool,
    norm_eps: float,
    orthonormal: bool,
    causal: bool = False,
    recency: bool = False,
    own: bool = True,
) -> Layer:
    """One layer of CRATE: compress, then sparsify; ``causal``, ``recency``, ``own``: by attention alone."""
    norm = partial(nn.LayerNorm, dim, eps=norm_eps)
    compress: Step
    sparsify: Step
    if compression == "mhsa":
        compress = MHSA(dim, num_heads, norm=norm(), causal=causal, recency=recency)
    elif compression == "strict":
        compress = StrictCompression(dim, num_heads, eps=eps, enter=norm())
    else:
        made: Any = {
            "tied": partial(MSSA, causal=causal, recency=recency, own=own),
            "untied": partial(UntiedMSSA, output_bias=output_bias, causal=causal, recency=recency, own=own),
            "exact": ExactCompression,
        }[compression]
        compress = made(
            dim, num_heads, step_size=compress_step_size, eps=eps, norm=norm(), orthonormal=orthonormal
        )
    if sparsification == "mlp":
        sparsify = MLP(dim, norm=norm())
    elif sparsification == "strict":
        sparsify = StrictISTA(dim, sparsity=sparsity, enter=norm())
    elif overcomplete > 1 or decoupled or residual:
        sparsify = OvercompleteISTA(
            dim,
            overcomplete * dim,
            step_size=step_size,
            sparsity=sparsity,
            decoupled=decoupled,
            residual=residual,
            norm=norm(),
        )
    else:
        ista = {"ista": ISTA, "soft": SoftISTA}[sparsification]
        sparsify = ista(dim, step_size=step_size, sparsity=sparsity, enter=norm())
    return Layer({"compress": compress, "sparsify": sparsify})


def check_options(
    compression: str, sparsification: str, overcomplete: int, decoupled: bool, residual: bool
) -> None:
    """Raise ValueError for halves that do not exist, and switches of one half that belong to another."""
    for name, value, known in (
        ("compression", compression, get_args(Compression)),
        ("sparsification", sparsification, get_args(Sparsification)),
    ):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; known: {', '.join(map(repr, known))}")
    if overcomplete < 1:
        raise ValueError(f"overcomplete is {overcomplete}; a dictionary has at least one atom per dimension")
    if sparsification != "ista" and (overcomplete > 1 or decoupled or residual):
        raise ValueError(
            f"overcomplete, decoupled and residual are switches of sparsification='ista', not of "
            f"{sparsification!r}"
        )
