r"""Coding rates: the nats it takes to store tokens up to a distortion, whole or by parts.

The lossy coding rate of ``n`` tokens of width ``d`` (Ma, Derksen, Hong and Wright 2007) is

.. math:: R(Z; \epsilon) = \tfrac12 \log\det\Bigl(I + \tfrac{d}{n\epsilon^2} Z^\top Z\Bigr).

Representations are good when the whole is expensive and the parts are cheap: rate reduction
(Yu et al. 2020) codes the parts by classes, sparse rate reduction (Yu et al. 2023) by subspaces and asks
for few non-zeros besides.

Every rate here goes through one determinant, :func:`_half_logdet`: on the smaller of the two Gram matrices
(equal by Sylvester's identity), by Cholesky of ``I + a Z Z^T``, in float32 whatever autocast says, and in
float64 where the condition number would cost more than 1e-4 of the rate.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


def coding_rate(z: Float[Tensor, "*b n d"], eps: float) -> Float[Tensor, "*b"]:
    r"""Nats that store the tokens of each sample together up to distortion ``eps``.

    .. math:: R(Z; \epsilon) = \tfrac12 \log\det\Bigl(I + \tfrac{d}{n\epsilon^2} Z^\top Z\Bigr)

    Unchanged by rotating the tokens or permuting them; zero only for zero tokens; grows without bound with
    their norm, so normalise before comparing.

    Args:
        z: tokens ``(..., n, d)``.
        eps: distortion, in the unit of the tokens. Positive.

    Returns:
        One rate for each sample, shape ``(...)``.

    Raises:
        ValueError: ``eps`` is not positive, ``z`` is not a matrix of tokens, or it holds NaN or infinity.
    """
    n, d = _check_tokens(z, eps)
    return _half_logdet(z, d / (n * eps**2))


def class_coding_rate(
    z: Float[Tensor, "*b n d"],
    membership: Int[Tensor, "*#b n"] | Float[Tensor, "*#b n K"],
    eps: float,
) -> Float[Tensor, "*b"]:
    r"""Nats that store each class of tokens on its own, averaged over the tokens.

    .. math::
        R^c(Z \mid \Pi; \epsilon) = \sum_k \frac{n_k}{2n}
        \log\det\Bigl(I + \frac{d}{n_k\epsilon^2} Z^\top \mathrm{diag}(\pi_k) Z\Bigr),
        \qquad n_k = \textstyle\sum_i \pi_{ik}

    Never above ``coding_rate(z, eps)`` where every token has a class. Empty classes cost nothing. Tokens
    whose class is not known, labelled -1, are not coded: n counts the others.

    Args:
        z: tokens ``(..., n, d)``.
        membership: integer labels ``(n,)`` or ``(..., n)``, -1 where not known, or soft memberships
            ``(n, K)`` or ``(..., n, K)`` whose rows sum to one. The dtype tells which.
        eps: distortion. Positive.

    Raises:
        ValueError: as :func:`coding_rate`; a membership of the wrong length, negative, or not summing to one.
    """
    n, d = _check_tokens(z, eps)
    if membership.dim() == 1 and not membership.dtype.is_floating_point:
        return _rate_by_labels(z, _checked_labels(membership, n).to(z.device), eps)
    weights = _membership_weights(membership, z)
    # One class at a time: the tensor of all weighted Gram matrices would hold K x d x d numbers.
    rates = []
    coded = _number_coded(membership, n)
    for pi in weights.unbind(-1):
        size = pi.sum(-1)
        # An empty class has n_k = 0 and a zero Gram matrix; any positive divisor gives its rate, which is 0.
        scale = d / (size.clamp_min(torch.finfo(pi.dtype).tiny ** 0.5) * eps**2)
        scale = torch.where(size > 0, scale, torch.zeros_like(scale))
        rates.append(size / coded.squeeze(-1) * _half_logdet(z, scale, pi))
    return torch.stack(rates, -1).sum(-1)


def _rate_by_labels(z: Tensor, labels: Tensor, eps: float) -> Tensor:
    """The class rate with every token in the matrix of its own class only.

    Classes whose sizes round up to the same power of two share a batch, padded with zero tokens, which cost
    nothing: at most log2(n) batched determinants on at most 2n tokens, however many classes there are.
    """
    order = labels.argsort(stable=True)[(labels < 0).sum() :]
    sizes = labels[order].unique_consecutive(return_counts=True)[1]
    starts = sizes.cumsum(0) - sizes
    rate = _at_least_float32(z).new_zeros(z.shape[:-2])
    widths = [1 << (size - 1).bit_length() for size in sizes.tolist()]
    for width in sorted(set(widths)):
        chosen = torch.tensor([w == width for w in widths], device=z.device)
        place = torch.arange(width, device=z.device)
        inside = place < sizes[chosen, None]
        slots = order[(starts[chosen, None] + place).where(inside, 0)]
        tokens = z.index_select(-2, slots.flatten()).unflatten(-2, slots.shape) * inside.unsqueeze(-1)
        weights = sizes[chosen].to(rate.dtype)
        half_logdets = _half_logdet(tokens, z.shape[-1] / (weights * eps**2))
        rate = rate + (weights / len(order) * half_logdets).sum(-1)
    return rate


def subspace_coding_rate(
    z: Float[Tensor, "*b n d"], U: Float[Tensor, "K d p"], eps: float
) -> Float[Tensor, "*b"]:
    r"""Nats that store the tokens after projection onto each of K subspaces.

    .. math::
        R^c(Z \mid U_{[K]}; \epsilon) = \tfrac12 \sum_k
        \log\det\Bigl(I + \frac{p}{n\epsilon^2} (Z U_k)^\top (Z U_k)\Bigr)

    The quantity that a ``compress`` step lowers (Yu et al. 2023, eq. 6).

    Args:
        z: tokens ``(..., n, d)``.
        U: bases ``(K, d, p)``: K subspaces of dimension p, basis vectors in columns.
        eps: distortion. Positive.
    """
    n, d = _check_tokens(z, eps)
    _check_bases(U, d)
    z = _at_least_float32(z)
    return _half_logdet(_project(z, U), U.shape[-1] / (n * eps**2)).sum(-1)


def prefix_coding_rate(z: Float[Tensor, "*b n d"], eps: float) -> Float[Tensor, "*b"]:
    r"""Mean rate of the tokens up to each: what causal compression lowers, where no token knows the next.

    .. math:: \tfrac1n \sum_{t=1}^n R(Z_{\le t}; \epsilon)
        = \tfrac1{2n} \sum_t \log\det\Bigl(I + \tfrac{d}{t\epsilon^2} Z_{\le t}^\top Z_{\le t}\Bigr)

    A determinant for each token, from a running sum of Gram matrices in float64, so it is a measure and not
    for training: :math:`O(n d^3)`.

    Args:
        z: tokens ``(..., n, d)`` in their order.
        eps: distortion. Positive.
    """
    n, d = _check_tokens(z, eps)
    _refuse_not_finite(z)
    wide = z.double()
    gram = wide.new_zeros(*z.shape[:-2], 1, d, d)
    identity = torch.eye(d, dtype=wide.dtype, device=z.device)
    total = wide.new_zeros(z.shape[:-2])
    chunk = max(1, PREFIX_ENTRIES // max(1, wide[..., :1, :].numel() * d))
    for start in range(0, n, chunk):
        part = wide[..., start : start + chunk, :]
        grams = gram + (part.unsqueeze(-1) * part.unsqueeze(-2)).cumsum(-3)
        lengths = torch.arange(start + 1, start + 1 + part.shape[-2], device=z.device, dtype=wide.dtype)
        factor = torch.linalg.cholesky(identity + (d / (lengths * eps**2))[:, None, None] * grams)
        total = total + factor.diagonal(dim1=-2, dim2=-1).log().sum((-2, -1))
        gram = grams[..., -1:, :, :]
    return (total / n).to(_at_least_float32(z).dtype)


PREFIX_ENTRIES = 2**22
"""Numbers in the Gram matrices that :func:`prefix_coding_rate` and :func:`local_coding_rate` hold at once."""


def local_coding_rate(
    z: Float[Tensor, "*b K n d"], eps: float, forgetting: Float[Tensor, " K"], *, causal: bool = False
) -> Float[Tensor, "*b K"]:
    r"""Mean over tokens of the rate of what stands around each, the further away the less.

    .. math:: \tfrac1{2n} \sum_{t=1}^n
        \log\det\Bigl(I + \tfrac{d}{\epsilon^2} \sum_s \bar\omega_{ts} z_s^\top z_s\Bigr),
        \qquad \bar\omega_{ts} = \frac{e^{-m_k |t - s|}}{\sum_r e^{-m_k |t - r|}}

    With ``forgetting`` zero it is :func:`coding_rate`, and :func:`prefix_coding_rate` where it is causal. A
    determinant for each token, in float64: a measure, not for training, :math:`O(n^2 d^2 + n d^3)`.

    Args:
        z: tokens ``(..., K, n, d)`` in their order.
        eps: distortion. Positive.
        forgetting: :math:`m_k` in nats for each place.
        causal: a token counts those up to itself.
    """
    n, d = _check_tokens(z, eps)
    _refuse_not_finite(z)
    wide, place = z.double(), torch.arange(n, device=z.device)
    distance = (place[:, None] - place).to(wide.dtype)
    exponents = -forgetting.to(wide.dtype)[:, None, None] * distance.abs()
    if causal:
        exponents = exponents.masked_fill(distance < 0, -torch.inf)
    weights = exponents.softmax(-1)
    identity = torch.eye(d, dtype=wide.dtype, device=z.device)
    chunk = max(1, PREFIX_ENTRIES // max(1, z.shape[-3] * d * d))
    rates = []
    for sample in wide.reshape(-1, *z.shape[-3:]):
        squares = (sample.unsqueeze(-1) * sample.unsqueeze(-2)).flatten(-2)
        total = sample.new_zeros(len(sample))
        for rows in weights.split(chunk, -2):
            grams = (rows @ squares).unflatten(-1, (d, d))
            factor = torch.linalg.cholesky(identity + d / eps**2 * grams)
            total = total + factor.diagonal(dim1=-2, dim2=-1).log().sum((-2, -1))
        rates.append(total / n)
    return torch.stack(rates).reshape(z.shape[:-2]).to(_at_least_float32(z).dtype)


def prefix_variational_coding_rate(
    z: Float[Tensor, "*b n d"],
    U: Float[Tensor, "K d p"],
    membership: Float[Tensor, "*#b n K"],
    eps: float,
    *,
    shift: Float[Tensor, "K p"] | None = None,
) -> Float[Tensor, "*b"]:
    r"""Mean of :func:`variational_coding_rate` over the tokens up to each: what causal TSSA lowers.

    .. math::
        \tfrac1n \sum_{t=1}^n R^c_{\mathrm{var}}(Z_{\le t} \mid U_{[K]}, \Pi_{\le t}; \epsilon)

    Args:
        z: tokens ``(..., n, d)`` in their order.
        U: bases ``(K, d, p)``, one subspace for each group.
        membership: soft rows that sum to one, ``(..., n, K)``.
        eps: distortion. Positive.
        shift: added to the projections, for subspaces that miss the origin.
    """
    n, d = _check_tokens(z, eps)
    _check_bases(U, d)
    weights = _membership_weights(membership, z).double().mT  # a running sum of many: float64
    w = _project(_at_least_float32(z), U).double()
    if shift is not None:
        w = w + shift.double().unsqueeze(-2)
    energy = (weights.unsqueeze(-1) * w.square()).cumsum(-2)
    size = weights.cumsum(-1)
    scale = d / (size.clamp_min(torch.finfo(size.dtype).tiny ** 0.5) * eps**2)
    costs = size * torch.log1p(scale.unsqueeze(-1) * energy).sum(-1)
    lengths = torch.arange(1, n + 1, device=z.device, dtype=size.dtype)
    return ((costs.sum(-2) / (2 * lengths)).mean(-1)).to(_at_least_float32(z).dtype)


def variational_coding_rate(
    z: Float[Tensor, "*b n d"],
    U: Float[Tensor, "K d p"],
    membership: Int[Tensor, "*#b n"] | Float[Tensor, "*#b n K"],
    eps: float,
    *,
    shift: Float[Tensor, "K p"] | None = None,
) -> Float[Tensor, "*b"]:
    r"""An upper bound on the nats that store each group of tokens in a subspace of its own.

    .. math::
        R^c_{\mathrm{var}}(Z \mid U_{[K]}, \Pi; \epsilon) = \sum_k \frac{n_k}{2n} \sum_i
        \log\Bigl(1 + \frac{d}{n_k\epsilon^2} \textstyle\sum_j \pi_{jk} (z_j U_k)_i^2\Bigr)

    The sum over i is Hadamard's bound on the log-determinant of
    :math:`I + \frac{d}{n_k\epsilon^2} U_k^\top Z^\top \mathrm{diag}(\pi_k) Z U_k`, and equal to it where that
    matrix is diagonal; with square orthogonal :math:`U_k` the bounded rate is :func:`class_coding_rate`. No
    two tokens are compared. The quantity that a TSSA step lowers (Wu et al. 2024).

    Args:
        z: tokens ``(..., n, d)``.
        U: bases ``(K, d, p)``, one subspace for each group.
        membership: as in :func:`class_coding_rate`; labels are indices of subspaces.
        eps: distortion. Positive.
        shift: added to the projections, for subspaces that miss the origin.

    Raises:
        ValueError: as :func:`class_coding_rate`; bases that do not fit the tokens or the groups.
    """
    n, d = _check_tokens(z, eps)
    _check_bases(U, d)
    weights = _membership_weights(membership, z, len(U))
    if weights.shape[-1] != len(U):
        raise ValueError(
            f"membership tells {weights.shape[-1]} groups apart; expected one for each of {len(U)} subspaces"
        )

    coded = _number_coded(membership, n)

    def rate(z: Tensor, weights: Tensor) -> Tensor:
        w = _project(z, U)
        if shift is not None:
            w = w + shift.to(z.dtype).unsqueeze(-2)
        with torch.autocast(z.device.type, enabled=False):
            energy = (weights.mT.unsqueeze(-2) @ w.square()).squeeze(-2)
        size = weights.sum(-2)
        # An empty group has no energy either; any positive divisor gives its rate, which is 0.
        scale = d / (size.clamp_min(torch.finfo(size.dtype).tiny ** 0.5) * eps**2)
        return (size / (2 * coded) * torch.log1p(scale.unsqueeze(-1) * energy).sum(-1)).sum(-1)

    z = _at_least_float32(z)
    value = rate(z, weights)
    if not bool(value.isfinite().all()):
        _refuse_not_finite(z)
        value = rate(z.double(), weights.double()).to(z.dtype)  # squares that float32 cannot hold
    return value


def rate_reduction(
    z: Float[Tensor, "*b n d"],
    membership: Int[Tensor, "*#b n"] | Float[Tensor, "*#b n K"],
    eps: float,
) -> Float[Tensor, "*b"]:
    r"""What coding by classes saves: :math:`\Delta R = R(Z) - R^c(Z \mid \Pi) \ge 0`. To be raised (MCR2).

    Tokens labelled -1 take part in :math:`R` only, and with them the difference can be negative.
    """
    return coding_rate(z, eps) - class_coding_rate(z, membership, eps)


def subspace_overlap(U: Float[Tensor, "K d p"]) -> Float[Tensor, ""]:
    r"""Distance from orthonormal bases without overlap, squared: :math:`\|\bar U^\top \bar U - I\|_F^2`.

    :math:`\bar U = [U_1 \cdots U_K]`. Diagonal blocks ask that each basis is orthonormal, the others that the
    subspaces are incoherent. Zero if and only if both hold.
    """
    stacked = U.transpose(0, 1).flatten(1)
    gram = stacked.mT @ stacked
    return (gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).square().sum()


def sparse_rate_reduction(
    z: Float[Tensor, "*b n d"], U: Float[Tensor, "K d p"], eps: float, sparsity: float
) -> Float[Tensor, "*b"]:
    r"""The objective of white-box transformers, with l1 in place of l0. To be raised.

    .. math:: R(Z) - R^c(Z \mid U_{[K]}) - \lambda \|Z\|_1

    Args:
        z: tokens ``(..., n, d)``.
        U: bases ``(K, d, p)``.
        eps: distortion. Positive.
        sparsity: :math:`\lambda \ge 0`, nats per unit of l1 norm.
    """
    penalty = sparsity * _at_least_float32(z).abs().sum((-2, -1))
    return coding_rate(z, eps) - subspace_coding_rate(z, U, eps) - penalty


def rate_ceiling(n: int, dim: int, eps: float) -> float:
    r"""The largest coding rate that n unit vectors in ``dim`` dimensions can have, in nats.

    .. math:: \frac r2 \log\Bigl(1 + \frac{d}{r\,\epsilon^2}\Bigr), \qquad r = \min(n, d)

    The Gram matrix has trace n and at most r eigenvalues, of which the rate is a concave sum: it is largest
    where they are equal. Orthonormal vectors reach it, and where n > d tight frames of unit vectors, which
    exist for every n and d.

    Raises:
        ValueError: no vectors, no dimensions, or ``eps`` that is not positive.
    """
    if n < 1 or dim < 1:
        raise ValueError(f"{n} vectors in {dim} dimensions: nothing to code")
    if not eps > 0:
        raise ValueError(f"eps is {eps}; the distortion must be positive")
    rank = min(n, dim)
    return rank / 2 * math.log1p(dim / (rank * eps**2))


RANKME_EPS = 1e-7
"""Added to each share of the singular values, as published."""


def effective_rank(features: Float[Tensor, "*b n d"], *, center: bool = False) -> Float[Tensor, "*b"]:
    r"""How many directions the features really use, RankMe: 1 where they lie on a line, min(n, d) at most.

    .. math:: \exp\Bigl(-\sum_k p_k \log p_k\Bigr), \quad p_k = \frac{\sigma_k}{\sum_j \sigma_j} + 10^{-7}

    with :math:`\sigma_k` the singular values of the features as they are (Garrido et al. 2023). Features that
    have collapsed to one point other than zero still use one direction, that of the point; ``center`` takes
    the mean away first and asks how they spread around it. Zero features use none: 0. From the eigenvalues of
    the smaller Gram matrix in float64, where a singular value below 1e-8 of the largest is noise; it is a
    measure, not meant for gradients.

    Args:
        features: ``(..., n, d)``.
        center: take away the mean of the n features.

    Raises:
        ValueError: no matrix of features, or NaN or infinity in it.
    """
    n, d = _check_tokens(features, 1.0)
    with torch.no_grad():
        z = features.double()
        _refuse_not_finite(z)
        # Scaled, as squares of large features would overflow; the shares stay as they are.
        z = z / z.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(z.dtype).tiny)
        spread = z - z.mean(-2, keepdim=True) if center else z
        gram = spread @ spread.mT if n < d else spread.mT @ spread
        values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
        # What is left of features that were all equal is the rounding of their mean.
        noise = (
            4 * torch.finfo(features.dtype).eps * torch.linalg.matrix_norm(z) if center else z.new_zeros(())
        )
        used = values.sum(-1) > noise
        p = values / values.sum(-1, keepdim=True).clamp_min(torch.finfo(z.dtype).tiny) + RANKME_EPS
        rank = (-(p * p.log()).sum(-1)).exp()
        return torch.where(used, rank, torch.zeros_like(rank)).to(_at_least_float32(features).dtype)


def nats_to_bits(rate: Tensor) -> Tensor:
    """The same rate in bits."""
    return rate / math.log(2)


def _project(z: Tensor, U: Tensor) -> Tensor:
    """``z U_k`` for every k, ``(..., K, n, p)``: one product, where a broadcast one would copy z K times."""
    with torch.autocast(z.device.type, enabled=False):
        w = z @ U.to(z.dtype).transpose(0, 1).flatten(1)
    return w.unflatten(-1, (U.shape[0], U.shape[2])).transpose(-3, -2)


def _half_logdet(z: Tensor, scale: float | Tensor, weight: Tensor | None = None) -> Tensor:
    """``1/2 logdet(I + scale * z^T diag(weight) z)``, shape ``(...)``; ``scale`` a number or ``(...)``.

    Where float32 cannot be trusted with it, done again from the tokens in float64: the rounding is already
    in the float32 matrix, whose identity drowns beside large entries.
    """
    z = _at_least_float32(z)
    logs = _log_diagonal(_shifted_gram(z, scale, weight))
    if logs is None:
        _refuse_not_finite(z)
        logs = _log_diagonal(
            _shifted_gram(
                z.double(),
                scale.double() if isinstance(scale, Tensor) else scale,
                None if weight is None else weight.double(),
            )
        )
    if logs is None:
        raise ValueError(
            "the coding rate's matrix is not positive definite even in float64: eps is too small for "
            "tokens of this norm - raise eps, or normalise the tokens, or pass them as float64"
        )
    return logs.sum(-1).to(z.dtype)


def _shifted_gram(z: Tensor, scale: float | Tensor, weight: Tensor | None) -> Tensor:
    """``I + scale * Gram``, on the smaller side.

    The n x n side needs the square root of the weights, whose derivative at zero is infinite: weights that
    need a gradient stay on the d x d side.
    """
    n, d = z.shape[-2:]
    with torch.autocast(z.device.type, enabled=False):
        if n < d and (weight is None or not weight.requires_grad):
            y = z if weight is None else z * weight.sqrt().unsqueeze(-1)
            gram = y @ y.mT
        else:
            gram = z.mT @ (z if weight is None else z * weight.unsqueeze(-1))
        if isinstance(scale, Tensor):
            scale = scale.to(z.dtype)[..., None, None]
        return scale * gram + torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)


def _log_diagonal(matrix: Tensor) -> Tensor | None:
    """Logarithms of the Cholesky diagonal of ``I + Gram``; None where they cannot be trusted.

    ``cholesky_ex`` reports failure in ``info``; on CUDA it may report success on NaN (pytorch#64818), hence
    the second check. The trace bounds the condition number, so the third finds float32 results that would be
    off by more than 1e-4 although nothing failed. All cost one synchronisation, which a wrong rate would
    cost sooner or later anyway.
    """
    factor, info = torch.linalg.cholesky_ex(matrix)
    logs = factor.diagonal(dim1=-2, dim2=-1).log()
    trusted = (info == 0).all() & logs.isfinite().all()
    if matrix.dtype == torch.float32:
        trace = matrix.detach().diagonal(dim1=-2, dim2=-1).sum(-1)
        trusted = trusted & (trace * torch.finfo(matrix.dtype).eps < 3e-4).all()
    return logs if bool(trusted) else None


def _at_least_float32(z: Tensor) -> Tensor:
    return z.float() if z.dtype in (torch.float16, torch.bfloat16) else z


def _check_tokens(z: Tensor, eps: float) -> tuple[int, int]:
    if z.dim() < 2:
        raise ValueError(f"tokens have shape {tuple(z.shape)}; expected (..., n, d): n tokens of width d")
    if not z.dtype.is_floating_point:
        raise ValueError(f"tokens have dtype {z.dtype}; expected floating point - call z.float()")
    if z.shape[-2] == 0 or z.shape[-1] == 0:
        raise ValueError(f"tokens have shape {tuple(z.shape)}: nothing to code")
    if not eps > 0:
        raise ValueError(f"eps is {eps}; the distortion must be positive")
    return z.shape[-2], z.shape[-1]


def _check_bases(U: Tensor, d: int) -> None:
    if U.dim() != 3 or U.shape[1] != d:
        raise ValueError(f"U has shape {tuple(U.shape)}; expected (K, {d}, p) for tokens of width {d}")


def _refuse_not_finite(z: Tensor) -> None:
    if not bool(z.isfinite().all()):
        raise ValueError("coding rate of tokens that hold NaN or infinity - look for the step that made them")


def _membership_weights(membership: Tensor, z: Tensor, classes: int | None = None) -> Tensor:
    """Soft memberships ``(..., n, K)`` in the working dtype, from soft rows or labels.

    Labels are names, and K is the number that occur, unless it is given as ``classes``; the row of a label
    -1 is zero.
    """
    n = z.shape[-2]
    dtype = torch.float32 if z.dtype in (torch.float16, torch.bfloat16) else z.dtype
    if membership.dtype.is_floating_point:
        if membership.dim() < 2 or membership.shape[-2] != n:
            raise ValueError(f"soft membership has shape {tuple(membership.shape)}; expected (..., {n}, K)")
        weights = membership.to(dtype)
        total = weights.sum(-1)
        if bool((weights < 0).any()) or not torch.allclose(total, torch.ones_like(total), atol=1e-3):
            raise ValueError("soft membership rows must be non-negative and sum to one")
        return weights
    labels = _checked_labels(membership, n)
    known = (labels >= 0).unsqueeze(-1)
    if classes is not None:
        if bool((labels >= classes).any()):
            raise ValueError(f"labels must be below {classes}, the number of subspaces")
        return torch.nn.functional.one_hot(labels.clamp_min(0), classes).to(dtype) * known
    present, dense = labels.clamp_min(0).unique(return_inverse=True)
    return torch.nn.functional.one_hot(dense, len(present)).to(dtype) * known


def _number_coded(membership: Tensor, n: int) -> Tensor:
    """Tokens whose class is known, ``(..., 1)``; 1 where there are none, whose rate is 0."""
    if membership.dtype.is_floating_point:
        return torch.full((1,), n, device=membership.device)
    return (membership >= 0).sum(-1, keepdim=True).clamp_min(1)


def _checked_labels(labels: Tensor, n: int) -> Tensor:
    if labels.dim() < 1 or labels.shape[-1] != n:
        raise ValueError(f"labels have shape {tuple(labels.shape)}; expected (..., {n}), one per token")
    if bool((labels < -1).any()):
        raise ValueError("labels must be 0 or larger, or -1 where the class is not known")
    return labels.long()
