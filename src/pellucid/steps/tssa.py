r"""Compression in linear time: steps on the variational bound of :math:`R^c` (Wu et al. 2024, ToST).

A log-determinant is below the sum of the logarithms of the diagonal, in whatever basis, so

.. math::
    R^c_{\mathrm{var}}(Z \mid U, \Pi) = \tfrac12 \sum_k \tfrac{n_k}{n} \sum_i
    \log\bigl(1 + \tfrac{d}{\epsilon^2} m_{ki}\bigr),
    \qquad m_{ki} = \tfrac{1}{n_k} \sum_j \pi_{jk} (z_j U_k)_i^2

bounds the rate of tokens that belong to K groups with weights :math:`\Pi`, and its gradient needs second
moments only: no token is compared with another. Where tokens come in an order, the moments are those of the
tokens so far (:class:`CausalTSSA`), a running sum.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from pellucid.objectives.coding_rate import prefix_variational_coding_rate, variational_coding_rate
from pellucid.steps.memory import Memory
from pellucid.steps.mssa import SubspaceStep, output_map
from pellucid.steps.step import full_precision

SMALLEST_ENERGY = 1e-18
"""Of a coordinate over all tokens, in front of a division: its inverse squared is a number in float32."""

SMALLEST_PREFIX_ENERGY = 1e-12
"""The same of the tokens so far, as published: few tokens may well be near zero in some coordinate."""


class TSSA(SubspaceStep):
    r"""Token statistics self-attention as derived: gradient descent on :math:`R^c_{\mathrm{var}}`.

    .. math::
        Z - \kappa \sum_k \operatorname{diag}(\pi_k)\, Z U_k\, D_k U_k^\top,
        \qquad D_k = \operatorname{diag}_i \frac{d/\epsilon^2}{1 + (d/\epsilon^2)\, m_{ki}}

    The groups :math:`\Pi` are where the energy of a token lies: a softmax over heads of
    :math:`\tau_k \|z_j U_k\|^2`, each coordinate scaled to unit energy over the tokens. They are computed
    from the step's start and stay fixed while the objective is compared. :math:`\kappa` stands for the
    gradient's step size over n. Costs :math:`O(n d^2)`, with no term in :math:`n^2`.

    Args:
        dim, num_heads, head_dim, step_size, norm, enter, bias: as in
            :class:`~pellucid.steps.mssa.SubspaceStep`.
        eps: distortion; ``dim ** 0.5`` unless given, where :math:`d/\epsilon^2 = 1`, as published.
    """

    objective_name = "R^c_var(Z | U)"
    rate = staticmethod(variational_coding_rate)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int | None = None,
        *,
        step_size: float = 1.0,
        eps: float | None = None,
        norm: nn.Module | None = None,
        enter: nn.Module | None = None,
        bias: bool = False,
    ) -> None:
        eps = dim**0.5 if eps is None else eps
        super().__init__(
            dim, num_heads, head_dim, step_size=step_size, eps=eps, norm=norm, enter=enter, bias=bias
        )
        self.temperature = nn.Parameter(torch.ones(num_heads))

    @property
    def scale(self) -> float:
        r""":math:`d / \epsilon^2`."""
        return self.subspaces.in_features / self.eps**2

    def membership(self, w: Float[Tensor, "b K n p"]) -> Float[Tensor, "b K n"]:
        r""":math:`\Pi^\top`: how much each token belongs to each subspace; over heads it sums to one."""
        energy = F.normalize(w, dim=-2).square().sum(-1)
        return (energy * self.temperature[:, None]).softmax(-2)

    def moments(
        self, w: Float[Tensor, "b K n p"], membership: Float[Tensor, "b K n"]
    ) -> Float[Tensor, "b K p"]:
        """Second moments of each coordinate of each subspace, over the tokens that belong to it."""
        # Published: + 1e-8. This is exact for every group larger than that.
        weights = membership / membership.sum(-1, keepdim=True).clamp_min(1e-8)
        return (weights.unsqueeze(-2) @ w.square()).squeeze(-2)

    def directions(self, w: Float[Tensor, "b K n p"]) -> Float[Tensor, "b n Kp"]:
        r""":math:`-\operatorname{diag}(\pi_k)\, Z U_k D_k` of all subspaces side by side.

        What follows is, with ``membership`` and ``slope`` of the class's formula,
        ``-(w * membership.unsqueeze(-1) * slope.unsqueeze(-2))`` with the heads last. Sums over a head become
        products with a matrix of blocks, so that tokens are read in the order in which they lie, and of the
        intermediate results only the squares and the factors are as large as the tokens.
        """
        tokens = w.transpose(-3, -2).flatten(-2)  # b n Kp, no copy: w is a view of it
        squares = tokens * tokens
        heads = torch.eye(self.num_heads, dtype=w.dtype, device=w.device)
        blocks = heads.unsqueeze(-1).expand(-1, -1, self.head_dim).flatten(-2)  # K Kp: whose coordinate it is

        energy = squares.sum(-2, keepdim=True).clamp_min(SMALLEST_ENERGY)
        membership = (self.temperature[:, None] * blocks / energy @ squares.mT).softmax(-2)  # b K n
        weights = membership / membership.sum(-1, keepdim=True).clamp_min(1e-8)
        moments = (weights @ squares * blocks).sum(-2, keepdim=True)
        slope = self.scale / (1 + self.scale * moments)
        return tokens * (membership.mT @ (blocks * -slope))

    def direction(self, w: Float[Tensor, "b K n p"]) -> Float[Tensor, "b n d"]:
        return self.speak(self.directions(w))

    def speak(self, moved: Float[Tensor, "b n Kp"]) -> Float[Tensor, "b n d"]:
        """Coordinates in all subspaces, in the width of a token."""
        return moved @ self.subspaces.weight

    def objective(
        self, z: Float[Tensor, "b n d"], start: Float[Tensor, "b n d"], x: Tensor | None = None
    ) -> Float[Tensor, " b"]:
        membership = self.membership(_at_least_float32(self.project(start)))
        return self.rate(self.norm(z), self.U, membership.mT, self.eps, shift=self.shift)

    @property
    def shift(self) -> Float[Tensor, "K p"] | None:
        """What is added to the projections."""
        bias: Tensor | None = self.subspaces.bias
        return None if bias is None else bias.unflatten(0, (self.num_heads, self.head_dim))

    def max_step_size(self, num_tokens: int | None = None) -> float | None:
        r""":math:`2 / (\tfrac{d}{\epsilon^2} \|\sum_k U_k U_k^\top\|_2)`; None behind a norm.

        The slope of :math:`\log(1 + s m)` is at most s, and no token's weight exceeds one.
        """
        if not isinstance(self.norm, nn.Identity):
            return None
        spectral = torch.linalg.matrix_norm(self.subspaces.weight.detach().float(), 2).item()
        return 2 / (self.scale * spectral**2) if spectral > 0 else float("inf")


class UntiedTSSA(TSSA):
    r"""TSSA as the published ToST runs it.

    **Departs:** a free output matrix with a bias where the derivation has :math:`U^\top`, a bias on the
    projection, and a learned step size for each coordinate of a token (layer scale). Descent is measured.

    Args:
        layer_scale: where the learned step sizes begin; None for none.
        output_bias: of the output matrix.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int | None = None,
        *,
        step_size: float = 1.0,
        eps: float | None = None,
        norm: nn.Module | None = None,
        enter: nn.Module | None = None,
        bias: bool = True,
        layer_scale: float | None = None,
        output_bias: bool = True,
    ) -> None:
        super().__init__(
            dim, num_heads, head_dim, step_size=step_size, eps=eps, norm=norm, enter=enter, bias=bias
        )
        self.output = output_map(self.subspaces, output_bias)
        self.layer_scale = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale))

    def speak(self, moved: Float[Tensor, "b n Kp"]) -> Float[Tensor, "b n d"]:
        output, scale = self.output, self.layer_scale
        if scale is None:
            return output(moved)
        if not torch.compiler.is_compiling() and moved.numel() < output.weight.numel():
            return scale * output(moved)  # fewer tokens than rows of the matrix
        bias: Tensor | None = output.bias
        bias = None if bias is None else scale * bias
        return F.linear(moved, scale[:, None] * output.weight, bias)

    def max_step_size(self, num_tokens: int | None = None) -> float | None:
        """None: nothing ties the output to the subspaces."""
        return None


class CausalTSSA(TSSA):
    r"""TSSA on tokens in their order: each moves by the statistics of the tokens so far, itself included.

    .. math::
        z_t^+ = z_t - \kappa \sum_k \pi_{tk}\, z_t U_k\, D_k^{(t)} U_k^\top, \qquad
        m_{ki}^{(t)} = \frac{\sum_{j \le t} \pi_{jk} (z_j U_k)_i^2}{\sum_{j \le t} \pi_{jk}}

    The groups of a token are chosen when it arrives, from coordinates scaled to unit energy over the tokens
    so far, and stay. So :math:`z_t` moves by t times the gradient, in itself, of its own prefix's
    :math:`R^c_{\mathrm{var}}` at fixed groups, and the objective is the mean of this bound over prefixes.
    The other tokens of the prefix move at the same time, each down its own. Where the bases are orthonormal
    and do not overlap, every step shrinks every coordinate for ``step_size < 2 / scale``, so the bound of
    every prefix falls; else it is measured.

    Args:
        dim, num_heads, head_dim, step_size, eps, norm, enter, bias: as in :class:`TSSA`.
        block_size: give every place of every head a learned number that is added to the energy of each
            coordinate (``offset``), as the published language model has. The step then takes no more tokens
            than this; None for any number.
    """

    objective_name = "R^c_var(Z_<=t | U)"
    rate = staticmethod(prefix_variational_coding_rate)
    sees = "past"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int | None = None,
        *,
        step_size: float = 1.0,
        eps: float | None = None,
        norm: nn.Module | None = None,
        enter: nn.Module | None = None,
        bias: bool = False,
        block_size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            dim,
            num_heads,
            head_dim,
            step_size=step_size,
            eps=eps,
            norm=norm,
            enter=enter,
            bias=bias,
            **options,
        )
        self.offset = None if block_size is None else nn.Parameter(torch.zeros(num_heads, block_size))

    def membership(self, w: Float[Tensor, "b K n p"]) -> Float[Tensor, "b K n"]:
        """As in :class:`TSSA`, each token's from the energy of those so far."""
        return self._memberships(w.square(), w.square().cumsum(-2), None)

    def moments(
        self, w: Float[Tensor, "b K n p"], membership: Float[Tensor, "b K n"]
    ) -> Float[Tensor, "b K n p"]:
        """Second moments of each coordinate of each subspace over the tokens so far, for every token."""
        energy = (membership.unsqueeze(-1) * w.square()).cumsum(-2)
        return energy / membership.cumsum(-1).clamp_min(1e-8).unsqueeze(-1)

    def directions(self, w: Float[Tensor, "b K n p"]) -> Float[Tensor, "b n Kp"]:
        return self._continue(w, None, None)[0]

    def resume(self, z: Float[Tensor, "b n d"], state: Any, memory: Memory) -> tuple[Tensor, Any]:
        """As every causal step's; three running sums are kept, ``2 K p + K`` numbers whatever the length."""
        moved, sums = self._continue(self.project(z), state, memory)
        if memory.padded or z.shape[1] > 1:
            row = torch.arange(len(z), device=z.device)
            kept = tuple(part[row, :, memory.last] for part in sums)
        else:
            kept = tuple(part.squeeze(2) for part in sums)
        if memory.padded:  # rows to which nothing came keep what they had, or nothing
            waits = memory.last < 0
            before = state or [torch.zeros_like(part) for part in kept]
            pairs = zip(kept, before, strict=True)
            kept = tuple(old.where(waits.view(-1, *[1] * (new.dim() - 1)), new) for new, old in pairs)
        return torch.add(z, self.speak(moved), alpha=self.step_size), kept

    def max_step_size(self, num_tokens: int | None = None) -> float | None:
        """None: the step is no gradient, and only bases without overlap promise descent."""
        return None

    def _continue(
        self, w: Tensor, state: tuple[Tensor, Tensor, Tensor] | None, memory: Memory | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Where to move the tokens that follow those in ``state``, and the running sums after each.

        The sums are of squares ``(b, K, n, p)``, of squares by membership, and of membership ``(b, K, n)``.
        """
        with full_precision(w):  # a running sum of many
            v = _at_least_float32(w)
            before = (None, None, None) if state is None else state
            squares = v.square()
            energy = _running_sum(squares, before[0])
            membership = self._memberships(squares, energy, memory)
            weighted = _running_sum(membership.unsqueeze(-1) * squares, before[1])
            size = _running_sum(membership, before[2])
            moments = weighted / size.clamp_min(1e-8).unsqueeze(-1)
            slope = self.scale / (1 + self.scale * moments)
            moved = -(v * membership.unsqueeze(-1) * slope)
        return moved.to(w.dtype).transpose(-3, -2).flatten(-2), (energy, weighted, size)

    def _memberships(self, squares: Tensor, energy: Tensor, memory: Memory | None) -> Tensor:
        shares = (squares / energy.clamp_min(SMALLEST_PREFIX_ENERGY)).sum(-1)
        if self.offset is not None:
            shares = shares + self.head_dim * self._offset_at(shares.shape[-1], memory)
        return (shares * self.temperature[:, None]).softmax(-2)

    def _offset_at(self, n: int, memory: Memory | None) -> Tensor:
        """Of the first n places, or of those where n tokens arrive, ``(b, K, n)``."""
        assert self.offset is not None
        limit = self.offset.shape[-1]
        reached = n if memory is None else memory.reached
        if reached > limit:
            raise ValueError(
                f"{reached} tokens for a step with an offset for each of {limit} places - give fewer, or "
                f"build it with block_size=None"
            )
        if memory is None or memory.even:
            return self.offset[:, reached - n : reached]
        return self.offset[:, memory.places].transpose(0, 1)


class UntiedCausalTSSA(CausalTSSA, UntiedTSSA):
    """Causal TSSA as the published ToST for language runs it: :class:`CausalTSSA` with the free output,
    biases and layer scale of :class:`UntiedTSSA`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int | None = None,
        *,
        step_size: float = 1.0,
        eps: float | None = None,
        norm: nn.Module | None = None,
        enter: nn.Module | None = None,
        bias: bool = True,
        block_size: int | None = None,
        layer_scale: float | None = None,
        output_bias: bool = True,
    ) -> None:
        super().__init__(
            dim,
            num_heads,
            head_dim,
            step_size=step_size,
            eps=eps,
            norm=norm,
            enter=enter,
            bias=bias,
            block_size=block_size,
            layer_scale=layer_scale,
            output_bias=output_bias,
        )


def _running_sum(part: Tensor, before: Tensor | None) -> Tensor:
    """Over the tokens, dimension 2, on top of the sum of those before."""
    sums = part if part.shape[2] == 1 else part.cumsum(2)
    return sums if before is None else sums + before.unsqueeze(2)


def _at_least_float32(w: Tensor) -> Tensor:
    """Rounded to half precision, a token's memberships would not sum to one."""
    return w.float() if w.dtype in (torch.float16, torch.bfloat16) else w
