r"""What attention makes of the distance between tokens: each head forgets, and a token may leave itself out.

.. math:: \operatorname{softmax}_s\bigl(a_{ts} - m_k |t - s|\bigr)

with a rate :math:`m_k` for each head, fixed (Press et al. 2022, "Train Short, Test Long"). So a head counts a
token that stands further away less, by the factor :math:`e^{-m_k |t - s|}`, before a place is learnt.

Where a token sees those before it only, :math:`-m_k (t - s)` and :math:`m_k s` have the same softmax. The
latter is a product of a number of the query and one of the key: coordinates more, not a matrix of n x n, and
the fused kernels stay (at 256 tokens on a CPU forward and backward take 1.3 times those without, and 3 to 4
times with a matrix).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from pellucid.steps.memory import Memory

COORDINATES = 3
"""That a key has more, where distance counts."""

NEVER = 1e4
"""Nats that no similarity outweighs; a token meets what is so far only where there is nothing else."""

_FINE = 128  # Places are told in two parts, each exact in bfloat16.


def forgetting(num_heads: int, device: torch.device | None = None) -> Float[Tensor, " K"]:
    """Nats that each head takes off for each place: from 2, hardly more than a neighbour, to 1/32."""
    if num_heads == 1:
        return torch.full((1,), 0.25, device=device)
    return torch.exp2(torch.linspace(1, -5, num_heads, device=device))


class Distance:
    """How the heads of one step count distance.

    Args:
        num_heads: how many.
        recency: they forget, by :func:`forgetting`; else all tokens count alike.
        own: a token is among those it attends to; else it is so only where it has no other.
    """

    def __init__(self, num_heads: int, recency: bool = False, own: bool = True) -> None:
        self.num_heads, self.recency, self.own = num_heads, recency, own

    def __bool__(self) -> bool:
        """Whether it counts at all."""
        return self.recency or not self.own

    def rates(self, device: torch.device | None = None) -> Float[Tensor, " K"]:
        """:func:`forgetting` of each head, or zeros."""
        rates = forgetting(self.num_heads, device)
        return rates if self.recency else torch.zeros_like(rates)

    def bias(self, n: int, device: torch.device | None = None) -> Float[Tensor, "K n n"]:
        """What is added to the similarities of n tokens, ``[query, key]``."""
        place = torch.arange(n, device=device)
        distance = (place[:, None] - place).abs()
        bias = -self.rates(device)[:, None, None] * distance
        return bias if self.own else bias.masked_fill(distance == 0, -NEVER)

    def query(self, w: Float[Tensor, "b K n p"], scale: float) -> Float[Tensor, "b K n _"]:
        """With coordinates that meet those of :meth:`key` in a product that ``scale`` multiplies."""
        rates = self.rates(w.device) / scale
        own = torch.stack([rates, rates, torch.full_like(rates, 1 / scale)], -1).to(w.dtype)
        return torch.cat([w, own[:, None].expand(*w.shape[:-1], -1)], -1)

    def key(self, w: Float[Tensor, "b K n p"], places: Int[Tensor, "#b n"]) -> Float[Tensor, "b K n _"]:
        """With the place where each stands."""
        fine = places % _FINE
        own = torch.stack([places - fine, fine, torch.zeros_like(fine)], -1).to(w.dtype)
        return torch.cat([w, own[:, None].expand(*w.shape[:-1], -1)], -1)

    @staticmethod
    def value(w: Float[Tensor, "b K n p"]) -> Float[Tensor, "b K n _"]:
        """As wide as a key, for the fused kernels' sake."""
        return F.pad(w, (0, COORDINATES))

    def behind(self, keys: Float[Tensor, "b K n q"]) -> Float[Tensor, "b K n q"]:
        """Each key moved by one place, so that who sees keys up to its own meets those before it alone.

        The first stands twice. In front it is out of reach, but not of the first token, which has no other.
        """
        first = keys[..., :1, :].clone()
        first[..., -1] = -NEVER
        return torch.cat([first, keys[..., :-1, :]], -2)


def attend_before(
    distance: Distance,
    query: Float[Tensor, "b K n p"],
    key: Float[Tensor, "b K n p"],
    value: Float[Tensor, "b K n p"],
    scale: float,
) -> Float[Tensor, "b K n p"]:
    """The means of values that tokens see of those so far, from the first place on."""
    p, places = query.shape[-1], torch.arange(query.shape[-2], device=query.device)[None]
    keys, values = distance.key(key, places), distance.value(value)
    if not distance.own:
        keys, values = distance.behind(keys), distance.behind(values)
    queries = distance.query(query, scale)
    return F.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale)[..., :p]


def attend_around(
    distance: Distance,
    query: Float[Tensor, "b K n p"],
    key: Float[Tensor, "b K n p"],
    value: Float[Tensor, "b K n p"],
    scale: float,
    real: Bool[Tensor, "b n"] | None = None,
) -> Float[Tensor, "b K n p"]:
    """The means of values that tokens see on both sides of them; ``real`` are no padding."""
    bias = distance.bias(query.shape[-2], query.device)[None]
    if real is not None:
        bias = bias.masked_fill(~real[:, None, None, :], -torch.inf)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype), scale=scale)


def attend_kept(
    distance: Distance,
    query: Float[Tensor, "b K n p"],
    keys: Float[Tensor, "b K m q"],
    values: Float[Tensor, "b K m _"],
    memory: Memory,
    scale: float,
) -> Float[Tensor, "b K n p"]:
    """The same of tokens that arrive behind those in a memory; ``keys`` have their places."""
    p, visible = query.shape[-1], memory.visible
    if not distance.own:
        if visible is None and keys.shape[-2] > 1:
            keys, values = keys[..., :-1, :], values[..., :-1, :]
        else:
            kept = torch.arange(keys.shape[-2], device=keys.device)
            visible = (kept < memory.places.clamp_min(1).unsqueeze(-1)).unsqueeze(1)
    queries = distance.query(query, scale)
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=visible, scale=scale)[..., :p]
