r"""Compression in linear time: steps on the variational bound of :math:`R^c` (Wu et al. 2024, ToST).

A log-determinant is below the sum of the logarithms of the diagonal, in whatever basis, so

.. math::
    R^c_{\mathrm{var}}(Z \mid U, \Pi) = \tfrac12 \sum_k \tfrac{n_k}{n} \sum_i
    \log\bigl(1 + \tfrac{d}{\epsilon^2} m_{ki}\bigr),
    \qquad m_{ki} = \tfrac{1}{n_k} \sum_j \pi_{jk} (z_j U_k)_i^2

bounds the rate of tokens that belong to K groups with weights :math:`\Pi`, and its gradient needs second
moments only: no token is compared with another.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from pellucid.objectives.coding_rate import variational_coding_rate
from pellucid.steps.mssa import SubspaceStep, output_map

SMALLEST_ENERGY = 1e-18
"""Of a coordinate over all tokens, in front of a division: its inverse squared is a number in float32."""


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
        return self.directions(w) @ self.subspaces.weight

    def objective(
        self, z: Float[Tensor, "b n d"], start: Float[Tensor, "b n d"], x: Tensor | None = None
    ) -> Float[Tensor, " b"]:
        # Rounded to half precision, a token's memberships would not sum to one.
        w = self.project(start)
        membership = self.membership(w.float() if w.dtype in (torch.float16, torch.bfloat16) else w)
        bias: Tensor | None = self.subspaces.bias
        shift = None if bias is None else bias.unflatten(0, (self.num_heads, self.head_dim))
        return variational_coding_rate(self.norm(z), self.U, membership.mT, self.eps, shift=shift)

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
    ) -> None:
        super().__init__(
            dim, num_heads, head_dim, step_size=step_size, eps=eps, norm=norm, enter=enter, bias=bias
        )
        self.output = output_map(self.subspaces, True)
        self.layer_scale = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale))

    def direction(self, w: Float[Tensor, "b K n p"]) -> Float[Tensor, "b n d"]:
        moved, output, scale = self.directions(w), self.output, self.layer_scale
        if scale is None:
            return output(moved)
        return F.linear(moved, scale[:, None] * output.weight, scale * output.bias)  # few rows, many tokens

    def max_step_size(self, num_tokens: int | None = None) -> float | None:
        """None: nothing ties the output to the subspaces."""
        return None
