"""Steps derived from nothing: attention and MLP as every transformer has them.

They let black and white boxes share one ``unroll``: ToST keeps an MLP, and the published ablation swaps each
half of CRATE for its black-box counterpart.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from pellucid.steps.distance import Distance, attend_around, attend_before, attend_kept
from pellucid.steps.memory import Memory
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
        return self.add(z, self.branch(self.norm(z)))

    def add(self, z: Float[Tensor, "b n d"], moved: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """The tokens with what the branch says added, scaled."""
        return z + (moved if self.layer_scale is None else moved * self.layer_scale)

    def objective(
        self, z: Float[Tensor, "b n d"], start: Float[Tensor, "b n d"], x: Tensor | None = None
    ) -> Float[Tensor, " b"]:
        raise TypeError(f"{type(self).__name__} was derived from no objective - there is nothing to measure")


class MHSA(BlackBox):
    """Multi-head self-attention, with query, key and value of their own (Vaswani et al. 2017).

    Args:
        dim, norm, layer_scale, enter: see :class:`BlackBox`.
        num_heads: how many attend side by side, each in ``dim // num_heads`` dimensions.
        causal: a token sees itself and those before it.
        recency: heads forget, see :class:`~pellucid.steps.distance.Distance`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        norm: nn.Module | None = None,
        layer_scale: float | None = None,
        enter: nn.Module | None = None,
        causal: bool = False,
        recency: bool = False,
    ) -> None:
        super().__init__(dim, norm=norm, layer_scale=layer_scale, enter=enter)
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not divisible by num_heads {num_heads}")
        self.num_heads = num_heads
        self.sees = "past" if causal else "all"
        self.distance = Distance(num_heads, recency)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.output = nn.Linear(dim, dim)
        for linear in (self.qkv, self.output):
            _init(linear)

    @property
    def scale(self) -> float:
        """What similarities are multiplied by before the softmax."""
        return float((self.qkv.in_features // self.num_heads) ** -0.5)

    def heads(self, u: Float[Tensor, "b n d"]) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of the normalised tokens, each ``(b, K, n, p)``."""
        return self.qkv(u).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def attention(self, z: Float[Tensor, "b n d"]) -> Float[Tensor, "b K n n"]:
        """The attention weights, rows summing to one. :meth:`forward` has no need to form them."""
        q, k, _ = self.heads(self.norm(z))
        logits = q @ k.mT * self.scale
        if self.distance:
            logits = logits + self.distance.bias(q.shape[-2], q.device).to(q.dtype)
        if self.sees == "past":
            future = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
            logits = logits.masked_fill(future, -torch.inf)
        return logits.softmax(-1)

    def branch(self, u: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return self._out(self._attend(*self.heads(u), None))

    def forward(
        self, z: Float[Tensor, "b n d"], x: Tensor | None = None, real: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b n d"]:
        return self.add(z, self._out(self._attend(*self.heads(self.norm(z)), real)))

    def resume(self, z: Float[Tensor, "b n d"], state: Any, memory: Memory) -> tuple[Tensor, Any]:
        """As every causal step's; keys and values are kept."""
        if self.sees != "past":
            return super().resume(z, state, memory)
        query, key, value = self.heads(self.norm(z))
        keys, values = state or (None, None)
        far = self.distance
        keys, seen_keys = memory.keep(keys, far.key(key, memory.places) if far else key)
        values, seen_values = memory.keep(values, far.value(value) if far else value)
        if state is None:
            mixed = self._attend(query, key, value, None)
        elif far:
            mixed = attend_kept(far, query, seen_keys, seen_values, memory, self.scale)
        else:
            mixed = F.scaled_dot_product_attention(query, seen_keys, seen_values, attn_mask=memory.visible)
        return self.add(z, self._out(mixed)), (keys, values)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None) -> Tensor:
        causal = self.sees == "past"
        if self.distance and causal:
            return attend_before(self.distance, query, key, value, self.scale)
        if self.distance:
            return attend_around(self.distance, query, key, value, self.scale, real)
        mask = None if real is None else real[:, None, None, :]
        causal = causal and mask is None
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)

    def _out(self, mixed: Tensor) -> Tensor:
        return self.output(mixed.transpose(-3, -2).flatten(-2))


class MLP(BlackBox):
    """Two linear maps with a GELU between them.

    Args:
        dim, norm, layer_scale, enter: see :class:`BlackBox`.
        ratio: the inner width is ``ratio * dim``.
        bias: of both maps.
    """

    sees = "itself"

    def __init__(
        self,
        dim: int,
        ratio: float = 4.0,
        *,
        norm: nn.Module | None = None,
        layer_scale: float | None = None,
        enter: nn.Module | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__(dim, norm=norm, layer_scale=layer_scale, enter=enter)
        self.fc1 = nn.Linear(dim, int(dim * ratio), bias=bias)
        self.fc2 = nn.Linear(int(dim * ratio), dim, bias=bias)
        for linear in (self.fc1, self.fc2):
            _init(linear)

    def branch(self, u: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return self.fc2(F.gelu(self.fc1(u)))


def _init(linear: nn.Linear) -> None:
    """As ViT begins."""
    nn.init.trunc_normal_(linear.weight, std=0.02)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
