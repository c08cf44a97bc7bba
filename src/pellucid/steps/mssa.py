r"""Compression: steps that lower :math:`R^c(Z \mid U_{[K]})`, the cost of the tokens around K subspaces.

Gradient descent on :math:`R^c` moves the tokens by

.. math::
    -\nabla R^c = -b \sum_k Z U_k \,(I_p + b\, U_k^\top Z^\top Z U_k)^{-1} U_k^\top,
    \qquad b = \tfrac{p}{n\epsilon^2}.

:class:`ExactCompression` does just that. :class:`MSSA` replaces the inverse by its first-order expansion and
the raw similarities by their softmax, which turns the step into attention whose query, key and value are one
projection. :class:`UntiedMSSA` is what the published models run: the same, with a free output matrix.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from pellucid.objectives.coding_rate import (
    coding_rate,
    local_coding_rate,
    prefix_coding_rate,
    subspace_coding_rate,
)
from pellucid.steps.distance import Distance, attend_around, attend_before, attend_kept
from pellucid.steps.kept import Kept, is_inference
from pellucid.steps.memory import Memory
from pellucid.steps.step import Step, full_precision


class SubspaceStep(Step):
    r"""A step along a direction that is computed from the tokens' projections onto K subspaces.

    ``z + step_size * direction(norm(z) U)``. Tokens are compared on one normalised scale before and after, so
    that a growing residual cannot fake a change of the objective.

    Args:
        dim: width d of a token.
        num_heads: number K of subspaces.
        head_dim: their dimension p; ``dim // num_heads`` unless given.
        step_size: the step's length.
        eps: distortion at which the objective is measured.
        norm: applied to the tokens before projection; none unless given.
        enter: see :class:`~pellucid.steps.step.Step`.
        bias: projections may be shifted, as published ToST's are.
        orthonormal: keep all bases orthonormal and without overlap, whatever is learnt, through
            :class:`Orthonormal`.
    """

    objective_name = "R^c(Z | U)"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int | None = None,
        *,
        step_size: float = 1.0,
        eps: float = 0.1,
        norm: nn.Module | None = None,
        enter: nn.Module | None = None,
        bias: bool = False,
        orthonormal: bool = False,
    ) -> None:
        super().__init__(enter)
        if head_dim is None:
            if dim % num_heads:
                raise ValueError(
                    f"dim {dim} is not divisible by num_heads {num_heads} - "
                    f"give head_dim, or take one of {_divisors(dim)} heads"
                )
            head_dim = dim // num_heads
        self.num_heads, self.head_dim = num_heads, head_dim
        self.step_size, self.eps = step_size, eps
        self.norm = nn.Identity() if norm is None else norm
        self.subspaces = nn.Linear(dim, num_heads * head_dim, bias=bias)
        nn.init.orthogonal_(self.subspaces.weight)
        if bias:
            nn.init.zeros_(self.subspaces.bias)
        if orthonormal:
            if num_heads * head_dim > dim:
                raise ValueError(
                    f"{num_heads} subspaces of dimension {head_dim} overlap in {dim} dimensions - take fewer "
                    f"or smaller ones, or orthonormal=False"
                )
            parametrize.register_parametrization(self.subspaces, "weight", Orthonormal())

    @property
    def U(self) -> Float[Tensor, "K d p"]:  # noqa: N802
        """The subspaces' bases, in columns."""
        return self.subspaces.weight.unflatten(0, (self.num_heads, self.head_dim)).mT

    def project(self, z: Float[Tensor, "b n d"]) -> Float[Tensor, "b K n p"]:
        """Coordinates of the normalised tokens in each subspace, ``norm(z) U_k``."""
        return self.subspaces(self.norm(z)).unflatten(-1, (self.num_heads, self.head_dim)).transpose(-3, -2)

    @abstractmethod
    def direction(self, w: Float[Tensor, "b K n p"]) -> Float[Tensor, "b n d"]:
        """Where to move the tokens, given their projections."""

    def forward(self, z: Float[Tensor, "b n d"], x: Tensor | None = None) -> Float[Tensor, "b n d"]:
        return torch.add(z, self.direction(self.project(z)), alpha=self.step_size)


class AttentionStep(SubspaceStep):
    r"""Compression by attention: a token moves towards a weighted mean of the tokens in each subspace.

    The objective is R^c of the projected tokens scaled to unit length, the authors' own layer-wise measure.
    Attention turns the tokens of a subspace towards each other; their length it does not control, because
    the residual is Z where the gradient step has (1 - step_size b) Z.

    Args:
        dim, num_heads, head_dim, step_size, eps, norm, enter, orthonormal: see :class:`SubspaceStep`.
        causal: a token sees itself and those before it. It then moves down the rate of its own prefix,

            .. math:: z_t^+ = z_t - \kappa\,\partial R^c(z_1, \dots, z_t \mid U) / \partial z_t ,

            and the objective is the mean of the rates of all prefixes. Each token descends another function,
            and a prefix's other tokens move at the same time, so the step is no gradient of anything:
            whether the mean falls is measured.
        recency: tokens that stand further away count less, :math:`\omega_k = e^{-m_k |t - s|}` of one in
            subspace k, see :class:`~pellucid.steps.distance.Distance`. The rate that a token moves down is of
            tokens weighted so, :func:`~pellucid.objectives.local_coding_rate`; its gradient has
            :math:`\omega_k` in front of each of them, and so has the softmax.
        own: a token is among those whose mean it moves towards. It is its own nearest neighbour, query and
            key being one projection, and so hardly meets what stands before it; and what the gradient has of
            it is a multiple of what the residual keeps. Without, one that has no other still meets itself.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int | None = None,
        *,
        step_size: float = 1.0,
        eps: float = 0.1,
        norm: nn.Module | None = None,
        enter: nn.Module | None = None,
        orthonormal: bool = False,
        causal: bool = False,
        recency: bool = False,
        own: bool = True,
    ) -> None:
        super().__init__(
            dim,
            num_heads,
            head_dim,
            step_size=step_size,
            eps=eps,
            norm=norm,
            enter=enter,
            orthonormal=orthonormal,
        )
        self.distance = Distance(num_heads, recency, own)
        if causal:
            self.sees = "past"
            self.objective_name = self.objective_name.replace("Z", "Z_<=t")
        elif recency:
            self.objective_name = self.objective_name.replace("Z", "Z_~t")

    @property
    def causal(self) -> bool:
        """Whether a token sees those before it only."""
        return self.sees == "past"

    @property
    def scale(self) -> float:
        """What similarities are multiplied by before the softmax: ``head_dim ** -0.5``, as published.

        **Departs:** the derivation has none; it is absorbed in the scale of U.
        """
        return float(self.head_dim**-0.5)

    def attention(self, z: Float[Tensor, "b n d"]) -> Float[Tensor, "b K n n"]:
        """The attention weights, rows summing to one. :meth:`forward` has no need to form them."""
        w = self.project(z)
        return self._weights(w @ w.mT * self.scale)

    def attend(
        self, w: Float[Tensor, "b K n p"], real: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b n Kp"]:
        """The mean that each token moves towards, of all subspaces side by side."""
        if self.distance and self.causal:
            mixed = attend_before(self.distance, w, w, w, self.scale)
        elif self.distance:
            mixed = attend_around(self.distance, w, w, w, self.scale, real)
        elif real is not None:
            mixed = F.scaled_dot_product_attention(
                w, w, w, attn_mask=real[:, None, None, :], scale=self.scale
            )
        elif _forms_weights(w):
            w = w.contiguous()
            mixed = self._weights(w @ w.mT * self.scale) @ w
        else:
            mixed = F.scaled_dot_product_attention(w, w, w, is_causal=self.causal, scale=self.scale)
        return mixed.transpose(-3, -2).flatten(-2)

    @abstractmethod
    def speak(self, mixed: Float[Tensor, "b n Kp"]) -> Float[Tensor, "b n d"]:
        """Coordinates in all subspaces, in the width of a token."""

    def direction(self, w: Float[Tensor, "b K n p"]) -> Float[Tensor, "b n d"]:
        return self.speak(self.attend(w))

    def forward(
        self, z: Float[Tensor, "b n d"], x: Tensor | None = None, real: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b n d"]:
        return self._move(z, self.attend(self.project(z), real))

    def resume(self, z: Float[Tensor, "b n d"], state: Any, memory: Memory) -> tuple[Tensor, Any]:
        """As every causal step's; one tensor is kept, as query, key and value are one projection."""
        if not self.causal:
            return super().resume(z, state, memory)
        w = self.project(z)
        kept, seen = memory.keep(state, self.distance.key(w, memory.places) if self.distance else w)
        if state is None:
            return self._move(z, self.attend(w)), kept
        if self.distance:
            mixed = attend_kept(self.distance, w, seen, seen, memory, self.scale)
        else:
            mixed = F.scaled_dot_product_attention(w, seen, seen, attn_mask=memory.visible, scale=self.scale)
        return self._move(z, mixed.transpose(-3, -2).flatten(-2)), kept

    def objective(
        self, z: Float[Tensor, "b n d"], start: Float[Tensor, "b n d"], x: Tensor | None = None
    ) -> Float[Tensor, " b"]:
        w = F.normalize(self.project(z), dim=-1)
        if self.distance.recency:
            rates = self.distance.rates(w.device)
            return local_coding_rate(w, self.eps, rates, causal=self.causal).sum(-1)
        return (prefix_coding_rate if self.causal else coding_rate)(w, self.eps).sum(-1)

    def _move(self, z: Tensor, mixed: Tensor) -> Tensor:
        return torch.add(z, self.speak(mixed), alpha=self.step_size)

    def _weights(self, logits: Tensor) -> Tensor:
        if self.distance:
            logits = logits + self.distance.bias(logits.shape[-1], logits.device).to(logits.dtype)
        if self.causal:
            future = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
            logits = logits.masked_fill(future, -torch.inf)
        return logits.softmax(-1)


class MSSA(AttentionStep):
    r"""Multi-head subspace self-attention as derived (Yu et al. 2023, eq. 11-12).

    .. math:: Z + \kappa \sum_k \mathrm{softmax}(Z U_k U_k^\top Z^\top)\, Z U_k U_k^\top

    One matrix per layer: query, key, value and output are the same U. The residual is Z itself in place of
    the gradient's :math:`(1 - \kappa b) Z`, the same up to a scale.
    """

    def speak(self, mixed: Float[Tensor, "b n Kp"]) -> Float[Tensor, "b n d"]:
        return mixed @ self.subspaces.weight


class UntiedMSSA(AttentionStep):
    r"""MSSA as the published CRATE runs it.

    **Departs:** the output matrix is free and has a bias where the derivation has :math:`U^\top`, so nothing
    makes the step point downhill; whether it does is for the audit to say. CRATE-alpha leaves out the bias:
    ``output_bias=False``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int | None = None,
        *,
        step_size: float = 1.0,
        eps: float = 0.1,
        norm: nn.Module | None = None,
        enter: nn.Module | None = None,
        orthonormal: bool = False,
        output_bias: bool = True,
        causal: bool = False,
        recency: bool = False,
        own: bool = True,
    ) -> None:
        super().__init__(
            dim,
            num_heads,
            head_dim,
            step_size=step_size,
            eps=eps,
            norm=norm,
            enter=enter,
            orthonormal=orthonormal,
            causal=causal,
            recency=recency,
            own=own,
        )
        self.output = output_map(self.subspaces, output_bias)

    def speak(self, mixed: Float[Tensor, "b n Kp"]) -> Float[Tensor, "b n d"]:
        return self.output(mixed)


class Decompression(UntiedMSSA):
    r"""A step away from the subspaces, which raises :math:`R^c`: half a layer of a decoder, an encoder run
    backwards (Pai et al. 2023, "Masked Completion via Structured Diffusion with White-Box Transformers").

    .. math:: Z - \kappa\,\mathrm{MSSA}(Z)
    """

    objective_name = "-R^c(Z | U)"

    def objective(
        self, z: Float[Tensor, "b n d"], start: Float[Tensor, "b n d"], x: Tensor | None = None
    ) -> Float[Tensor, " b"]:
        return -super().objective(z, start, x)

    def _move(self, z: Tensor, mixed: Tensor) -> Tensor:
        return torch.sub(z, self.speak(mixed), alpha=self.step_size)


class ExactCompression(SubspaceStep):
    r"""Gradient descent on :math:`R^c(Z \mid U_{[K]})` itself, no attention and no approximation.

    The smaller of the p x p and n x n systems is solved, so a step costs :math:`O(n p^2)` for each subspace
    in place of attention's :math:`O(n^2 p)`. The objective is :math:`R^c(\mathrm{norm}(Z) \mid U_{[K]})`.
    """

    def objective(
        self, z: Float[Tensor, "b n d"], start: Float[Tensor, "b n d"], x: Tensor | None = None
    ) -> Float[Tensor, " b"]:
        return subspace_coding_rate(self.norm(z), self.U, self.eps)

    def direction(self, w: Float[Tensor, "b K n p"]) -> Float[Tensor, "b n d"]:
        n, p = w.shape[-2:]
        b = p / (n * self.eps**2)
        with full_precision(w):
            v = w.float() if w.dtype in (torch.float16, torch.bfloat16) else w
            side = v @ v.mT if n < p else v.mT @ v
            matrix = torch.eye(side.shape[-1], dtype=v.dtype, device=v.device) + b * side
            factor = torch.linalg.cholesky(matrix)
            solved = torch.cholesky_solve(v, factor) if n < p else torch.cholesky_solve(v.mT, factor).mT
        gradient = b * solved.to(w.dtype)
        return -gradient.transpose(-3, -2).flatten(-2) @ self.subspaces.weight

    def max_step_size(self, num_tokens: int | None = None) -> float | None:
        r"""2/L with :math:`L = b\,\|\sum_k U_k U_k^\top\|_2`, for ``num_tokens`` tokens; None behind a norm.

        The slope of :math:`\tfrac12\log(1 + b\sigma^2)` never exceeds b in any singular value, so the
        gradient of each subspace's rate is b-Lipschitz in its projection.
        """
        if num_tokens is None or not isinstance(self.norm, nn.Identity):
            return None
        b = self.head_dim / (num_tokens * self.eps**2)
        spectral = torch.linalg.matrix_norm(self.subspaces.weight.detach().float(), 2).item()
        return 2 / (b * spectral**2)


class Orthonormal(nn.Module):
    r"""Orthonormal rows from any matrix: a parametrisation of all bases at once, so that none overlap.

    .. math:: \bar U^\top = \bigl[(I + S)^{-1} (I - S)\bigr]_{1 \ldots r}, \qquad S = A - A^\top,

    A being the matrix on top of zeros. This is Cayley's transform: S is skew, so I + S is never singular and
    nothing that a parameter may become has no basis. Orthogonalising the rows themselves breaks down where
    training makes them dependent, which it does.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kept = Kept()

    def forward(self, matrix: Float[Tensor, "r d"]) -> Float[Tensor, "r d"]:
        if is_inference(matrix):
            # A copy: whoever asks for ``module.weight`` may write into it.
            return self._kept(lambda: self.transform(matrix), (matrix,)).clone()
        return self.transform(matrix)

    @staticmethod
    def transform(matrix: Float[Tensor, "r d"]) -> Float[Tensor, "r d"]:
        rows, dim = matrix.shape
        with full_precision(matrix):
            wide = matrix.float() if matrix.dtype in (torch.float16, torch.bfloat16) else matrix
            square = F.pad(wide, (0, 0, 0, dim - rows))
            skew = square - square.mT
            identity = torch.eye(dim, dtype=wide.dtype, device=wide.device)
            return torch.linalg.solve(identity + skew, identity - skew)[:rows].to(matrix.dtype)


def output_map(subspaces: nn.Linear, bias: bool) -> nn.Linear:
    """A free matrix back from the subspaces, begun as :math:`U^\\top`."""
    output = nn.Linear(subspaces.out_features, subspaces.in_features, bias=bias)
    with torch.no_grad():
        output.weight.copy_(subspaces.weight.mT)
        if bias:
            output.bias.zero_()
    return output


def _forms_weights(w: Tensor) -> bool:
    """Whether to form the attention weights after all: in a bfloat16 backward pass on a CPU.

    Its fused kernel is slow there: forward and backward take 45 ms fused and 22 ms formed at 197 tokens of
    12 heads in a batch of 8 (one core), and as long as each other at 785 tokens, where memory decides.
    """
    if torch.compiler.is_compiling() or w.device.type != "cpu" or w.dtype != torch.bfloat16:
        return False
    return torch.is_grad_enabled() and w.requires_grad and w.shape[-2] <= 512


def _divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]
