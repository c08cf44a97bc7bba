r"""Reconstruction and sparsity: how well a code explains a signal, and how few numbers it takes.

A code ``z (..., n, m)`` explains a signal ``x (..., n, d)`` by a dictionary ``D (d, m)`` whose columns are
atoms: ``x ~ z D^T`` with tokens in rows (``x ~ D z`` with the papers' columns).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def squared_error(
    z: Float[Tensor, "*b n m"], x: Float[Tensor, "*b n d"], dictionary: Float[Tensor, "d m"]
) -> Float[Tensor, "*b"]:
    r"""Half the squared error of the reconstruction, :math:`\tfrac12\|X - Z D^\top\|_F^2`, over all tokens.

    Raises:
        ValueError: shapes that do not fit, naming all three.
    """
    _check_fit(z, x, dictionary)
    return 0.5 * (x - z @ dictionary.mT).square().sum((-2, -1))


def lasso(
    z: Float[Tensor, "*b n m"],
    x: Float[Tensor, "*b n d"],
    dictionary: Float[Tensor, "d m"],
    sparsity: float | Tensor,
) -> Float[Tensor, "*b"]:
    r"""Reconstruction error plus the price of the code, :math:`\tfrac12\|X - ZD^\top\|_F^2 + \lambda\|Z\|_1`.

    With Z = 0 it is half the energy of the signal. Summed over tokens.
    """
    return squared_error(z, x, dictionary) + sparsity * z.abs().sum((-2, -1))


def lasso_gap(
    z: Float[Tensor, "*b n m"],
    x: Float[Tensor, "*b n d"],
    dictionary: Float[Tensor, "d m"],
    sparsity: float,
    *,
    nonnegative: bool = False,
) -> Float[Tensor, "*b n"]:
    r"""How far the LASSO of each token can at most lie above its minimum: the duality gap.

    .. math::
        \tfrac12 (1 - s)^2 \|r\|^2 + \textstyle\sum_i (\lambda |z_i| - s\, c_i z_i), \qquad
        r = x - D z, \quad c = D^\top r, \quad s = \min(1, \lambda / \max_i |c_i|)

    The residual scaled by s is the dual point, feasible because no atom exceeds :math:`\lambda` on it. Primal
    minus dual value has been sorted into terms none of which is negative, so that small gaps are not lost in
    the difference of large values. With ``nonnegative`` codes only c, not its modulus, is bounded.

    Raises:
        ValueError: as :func:`squared_error`.
    """
    _check_fit(z, x, dictionary)
    residual = x - z @ dictionary.mT
    c = residual @ dictionary
    largest = (c if nonnegative else c.abs()).amax(-1)
    scale = sparsity / largest.clamp_min(sparsity)
    price = (sparsity * z.abs() - scale.unsqueeze(-1) * (c * z)).sum(-1)
    return 0.5 * (1 - scale).square() * residual.square().sum(-1) + price


def nonnegative_lasso(
    z: Float[Tensor, "*b n m"],
    x: Float[Tensor, "*b n d"],
    dictionary: Float[Tensor, "d m"],
    sparsity: float | Tensor,
) -> Float[Tensor, "*b"]:
    """:func:`lasso` restricted to non-negative codes: infinite where a code has a negative entry."""
    infeasible = (z < 0).any(-1).any(-1)
    value = lasso(z, x, dictionary, sparsity)
    return torch.where(infeasible, torch.full_like(value, float("inf")), value)


def nonzero_fraction(z: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b"]:
    """Share of entries that are not exactly zero, in 0..1: the l0 count divided by n d."""
    return (z != 0).float().mean((-2, -1))


def masked_error(
    prediction: Float[Tensor, "b n d"], target: Float[Tensor, "b n d"], mask: Bool[Tensor, "b n"]
) -> Float[Tensor, " b"]:
    """Mean squared error over the masked tokens of each sample; NaN where none is masked.

    What the other tokens hold does not matter.

    Args:
        prediction, target: tokens ``(b, n, d)``.
        mask: ``(b, n)``, true where a token was hidden.

    Raises:
        ValueError: shapes that do not fit, naming all three.
    """
    if prediction.shape != target.shape or mask.shape != prediction.shape[:-1]:
        raise ValueError(
            f"prediction {tuple(prediction.shape)}, target {tuple(target.shape)} and mask "
            f"{tuple(mask.shape)} do not fit: expected (b, n, d) twice and (b, n)"
        )
    error = (prediction - target).square().mean(-1).masked_fill(~mask, 0)
    return error.sum(-1) / mask.sum(-1)


def _check_fit(z: Tensor, x: Tensor, dictionary: Tensor) -> None:
    if dictionary.dim() != 2 or z.shape[-1] != dictionary.shape[1] or x.shape[-1] != dictionary.shape[0]:
        raise ValueError(
            f"code {tuple(z.shape)}, signal {tuple(x.shape)} and dictionary {tuple(dictionary.shape)} do not "
            f"fit: expected (..., n, m), (..., n, d) and (d, m)"
        )
