"""Steps derived from nothing: attention and MLP as every transformer has them.

They let black and white boxes share one ``unroll``: ToST keeps an MLP, and the published ablation swaps each
half of CRATE for its black-box counterpart.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from pellucid.steps.step import Step


class BlackBox(Step):
    """A residual branch that states no objective: ``z + layer_scale * branch(norm(z))``.

    Args:
        dim: width d of a token.
        norm: in front of the branch; none unless given.
        layer_scale: where a learned factor for each coordinate begins; None for none.
        enter: see :class:`~pellucid.steps.step.Step`.
    """

    objective_name = None
    step_size = 1.0

    def __init__(
        self,
        dim: int,
        *,
        norm: nn.Module | None = None,
        layer_scale: float | None = None,
        enter: nn.Module | None = None,
    ) -> None:
        super().__init__(enter)
        self.norm = nn.Identity() if norm is None else norm
        self.layer_scale = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale))

    @abstractmethod
    def branch(self, u: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Where to move the tokens, given their normalised form."""

    def forward(self, z: Float[Tensor, "b n d"], x: Tensor | None = None) -> Float[Tensor, "b n d"]:
        moved = self.branch(self.norm(z))
        return z + (moved if self.layer_scale is None else moved * self.layer_scale)

    def objective(
        self, z: Float[Tensor, "b n d"], start: Float[Tensor, "b n d"], x: Tensor | None = None
    ) -> Float[Tensor, " b"]:
        raise TypeError(f"{type(self).__name__} was derived from no objective - there is nothing to measure")


class MHSA(BlackBox):
    """Multi-head self-attention, with query, key and value of their own (Vaswani et al. 2017)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        norm: nn.Module | None = None,
        layer_scale: float | None = None,
        enter: nn.Module | None = None,
    ) -> None:
        super().__init__(dim, norm=norm, layer_scale=layer_scale, enter=enter)
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not divisible by num_heads {num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.output = nn.Linear(dim, dim)
        for linear in (self.qkv, self.output):
            _init(linear)

    def heads(self, u: Float[Tensor, "b n d"]) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of the normalised tokens, each ``(b, K, n, p)``."""
        return self.qkv(u).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def attention(self, z: Float[Tensor, "b n d"]) -> Float[Tensor, "b K n n"]:
        """The attention weights, rows summing to one. :meth:`forward` has no need to form them."""
        q, k, _ = self.heads(self.norm(z))
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)

    def branch(self, u: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        mixed = F.scaled_dot_product_attention(*self.heads(u))
        return self.output(mixed.transpose(-3, -2).flatten(-2))


class MLP(BlackBox):
    """Two linear maps with a GELU between them; the inner width is ``ratio * dim``."""

    def __init__(
        self,
        dim: int,
        ratio: float = 4.0,
        *,
        norm: nn.Module | None = None,
        layer_scale: float | None = None,
        enter: nn.Module | None = None,
    ) -> None:
        super().__init__(dim, norm=norm, layer_scale=layer_scale, enter=enter)
        self.fc1 = nn.Linear(dim, int(dim * ratio))
        self.fc2 = nn.Linear(int(dim * ratio), dim)
        for linear in (self.fc1, self.fc2):
            _init(linear)

    def branch(self, u: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return self.fc2(F.gelu(self.fc1(u)))


def _init(linear: nn.Linear) -> None:
    """As ViT begins."""
    nn.init.trunc_normal_(linear.weight, std=0.02)
    nn.init.zeros_(linear.bias)
