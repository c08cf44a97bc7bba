r"""Rate reduction as a step: a layer of ReduNet (Chan et al. 2022), whose weights are computed from data.

Gradient ascent on :math:`\Delta R = R(Z) - R^c(Z \mid \Pi)` of n tokens on the unit sphere moves each by

.. math::
    z \leftarrow P_{\mathbb S}\Bigl[z + \eta\Bigl(E z - \sum_j \gamma_j \hat\pi_j(z)\, C_j z\Bigr)\Bigr],
    \qquad E = a\,(I + a Z^\top Z)^{-1}, \quad
    C_j = a_j\,(I + a_j Z^\top \mathrm{diag}(\pi_j) Z)^{-1},

with :math:`a = d/(n\epsilon^2)`, :math:`a_j = d/(n_j\epsilon^2)` and :math:`\gamma_j = n_j/n`. E expands: it
is largest on directions that no token uses. :math:`C_j` compresses: it is small on the subspace of class j
and takes away what sticks out of it. A token of unknown class is given
:math:`\hat\pi_j(z) = \mathrm{softmax}_j(-\lambda \|C_j z\|)`, by how little sticks out.

**When it must rise.** Take the memberships that :math:`C_j` was made from in place of :math:`\hat\pi`. Then
the direction is the gradient of :math:`\Delta R`. The Hessian of :math:`-\Delta R` is at most
:math:`\tfrac98 a` (a from :math:`R^c`, :math:`\tfrac18 a` from the concave tail of
:math:`\tfrac12\log(1 + a\sigma^2)`), and projecting onto the sphere is the nearest point of a set that the
tokens lie on already; so every :math:`\eta \le \tfrac{8}{9a} = \tfrac{8 n \epsilon^2}{9 d}` raises
:math:`\Delta R`. With estimated memberships the rise is measured, not proved.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from pellucid.objectives.coding_rate import rate_reduction
from pellucid.steps.step import Step

EPS = math.sqrt(0.1)
"""The published distortion: their program's 0.1 is its square."""

Labels = Int[Tensor, " n"] | Float[Tensor, "n K"]


class RateReduction(Step):
    r"""A layer of ReduNet. The objective is :math:`-\Delta R` with the memberships estimated at the start.

    E, :math:`C_j` and :math:`\gamma_j` are parameters, so that a network built from data can be trained on;
    :meth:`from_tokens` computes them.

    Args:
        dim: width d of a token.
        num_classes: K.
        step_size: :math:`\eta`.
        eps: distortion, of which only the objective needs to know here.
        sharpness: :math:`\lambda`; published: 500, which is all but a maximum.
        enter: see :class:`~pellucid.steps.step.Step`.
    """

    objective_name = "-Delta R"

    def __init__(
        self,
        dim: int,
        num_classes: int,
        *,
        step_size: float = 0.5,
        eps: float = EPS,
        sharpness: float = 500.0,
        enter: nn.Module | None = None,
    ) -> None:
        super().__init__(enter)
        self.step_size, self.eps, self.sharpness = step_size, eps, sharpness
        self.expand = nn.Parameter(torch.eye(dim))
        self.compress = nn.Parameter(torch.eye(dim).repeat(num_classes, 1, 1))
        self.share = nn.Parameter(torch.full((num_classes,), 1 / num_classes))

    @classmethod
    def from_tokens(cls, z: Float[Tensor, "n d"], membership: Labels, **options: Any) -> RateReduction:
        """The layer that these tokens and their classes determine. Nothing is trained.

        Args:
            z: tokens on the unit sphere.
            membership: labels ``0 .. K-1``, each of which occurs, -1 where not known; or soft ``(n, K)``.
            options: of the constructor.

        Raises:
            ValueError: a class without tokens; tokens whose matrix has no Cholesky factor in their precision.
        """
        weights = one_hot(membership, z)
        step = cls(z.shape[-1], weights.shape[-1], **options).to(z)
        with torch.no_grad():
            expand, compress = operators(z, weights, step.eps)
            step.expand.copy_(expand)
            step.compress.copy_(compress)
            step.share.copy_(weights.sum(0) / weights.sum())
        return step

    def forward(self, z: Float[Tensor, "b n d"], x: Tensor | None = None) -> Float[Tensor, "b n d"]:
        v = self.analyse(z)
        compressed = self.compressed(v)
        return self._move(v, compressed, self._estimate(compressed))

    def move(self, z: Float[Tensor, "b n d"], membership: Float[Tensor, "b n K"]) -> Float[Tensor, "b n d"]:
        """The step for tokens whose classes are known."""
        v = self.analyse(z)
        return self._move(v, self.compressed(v), membership)

    def membership(self, z: Float[Tensor, "b n d"]) -> Float[Tensor, "b n K"]:
        r""":math:`\hat\pi`: how much each token is taken to belong to each class; sums to one."""
        return self._estimate(self.compressed(self.analyse(z)))

    def residuals(self, z: Float[Tensor, "b n d"]) -> Float[Tensor, "b n K"]:
        r""":math:`\|C_j z\|`: how much of a token sticks out of each class."""
        return self.lengths(self.compressed(self.analyse(z)))

    def objective(
        self, z: Float[Tensor, "b n d"], start: Float[Tensor, "b n d"], x: Tensor | None = None
    ) -> Float[Tensor, " b"]:
        return -rate_reduction(z, self.membership(start), self.eps)

    # Where the operators act: on the tokens themselves here, on their spectra in the subclass.

    def analyse(self, z: Tensor) -> Tensor:
        return z

    def synthesise(self, v: Tensor) -> Tensor:
        return v

    def expanded(self, v: Tensor) -> Tensor:
        return v @ self.expand.mT

    def compressed(self, v: Tensor) -> Tensor:
        """``C_j z`` for every class, ``(..., K, d)``: one product."""
        return (v @ self.compress.flatten(0, 1).mT).unflatten(-1, self.compress.shape[:2])

    def lengths(self, compressed: Tensor) -> Tensor:
        return torch.linalg.vector_norm(compressed, dim=-1)

    def combined(self, compressed: Tensor, weights: Tensor) -> Tensor:
        """The sum over classes of ``weights (b, n, K)`` times what they compress."""
        return (weights.unsqueeze(-2) @ compressed).squeeze(-2)

    def _estimate(self, compressed: Tensor) -> Tensor:
        # A softmax of distances times 500 has no use for rounded distances.
        return (-self.sharpness * self.lengths(_at_least_float32(compressed))).softmax(-1)

    def _move(self, v: Tensor, compressed: Tensor, membership: Tensor) -> Tensor:
        weights = (membership * self.share).to(compressed.dtype)
        direction = self.expanded(v) - self.combined(compressed, weights)
        return F.normalize(self.synthesise(v + self.step_size * direction), dim=-1)


class ShiftInvariantRateReduction(RateReduction):
    r"""A layer of ReduNet that treats a signal and its circular shifts alike.

    Coding the tokens together with all their shifts makes every operator a convolution, which acts on each
    frequency w of the spectrum :math:`V(w) \in \mathbb C^{n \times C}` (unitary FFT) for itself:

    .. math:: E(w) = a\,(I + a\, V(w)^\top \bar V(w))^{-1}, \qquad a = C / (n\epsilon^2),

    as :math:`C_j(w)` from the tokens of class j. Shifting a token shifts what the step makes of it and leaves
    its memberships as they are. Signals are real, so half of the frequencies say everything, and they alone
    are computed with. The parameters are the convolutions' kernels, ``expand (C, C, T)`` and
    ``compress (K, C, C, T)``. The objective is the mean over frequencies of :math:`-\Delta R` of the spectra:
    that of all shifts of all tokens at distortion :math:`\epsilon\sqrt T`, over the number T of shifts.

    Args:
        shape: of a signal, ``(C, T)`` or ``(C, H, W)``; a token is its numbers in a row.
        num_classes, step_size, eps, sharpness, enter: as in :class:`RateReduction`.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        num_classes: int,
        *,
        step_size: float = 0.5,
        eps: float = EPS,
        sharpness: float = 500.0,
        enter: nn.Module | None = None,
    ) -> None:
        super().__init__(
            shape[0], num_classes, step_size=step_size, eps=eps, sharpness=sharpness, enter=enter
        )
        self.shape = tuple(shape)
        kernel = torch.zeros(shape[0], *shape)  # of a convolution that changes nothing
        kernel.flatten(2)[..., 0] = torch.eye(shape[0])
        self.expand = nn.Parameter(kernel)
        self.compress = nn.Parameter(kernel.repeat(num_classes, *[1] * kernel.dim()))
        self.multiplicity: Tensor
        self.register_buffer("multiplicity", half_spectrum_multiplicity(shape[1:]), persistent=False)

    @classmethod
    def from_tokens(  # type: ignore[override]  # a signal's shape cannot be read from its numbers
        cls, z: Float[Tensor, "n d"], membership: Labels, *, shape: tuple[int, ...], **options: Any
    ) -> RateReduction:
        """As :meth:`RateReduction.from_tokens`, for signals of this shape."""
        weights = one_hot(membership, z)
        step = cls(shape, weights.shape[-1], **options).to(z)
        with torch.no_grad():
            expand, compress = operators(spectrum(z, step.shape), weights, step.eps)
            step.expand.copy_(step._kernels(expand))
            step.compress.copy_(step._kernels(compress))
            step.share.copy_(weights.sum(0) / weights.sum())
        return step

    def objective(
        self, z: Float[Tensor, "b n d"], start: Float[Tensor, "b n d"], x: Tensor | None = None
    ) -> Float[Tensor, " b"]:
        # A complex matrix A + iB acts on pairs of numbers as [[A, -B], [B, A]], whose log-determinant is
        # twice its own. A token of complex numbers is two of real ones: itself and i times itself.
        v = self.analyse(z)
        real, imaginary = v.chunk(2, -1)
        pairs = torch.cat([v, torch.cat([-imaginary, real], -1)], -2)
        membership = self.membership(start).unsqueeze(-3)
        reductions = rate_reduction(pairs, torch.cat([membership, membership], -2), self.eps) / 2
        return -(reductions * self.multiplicity).sum(-1) / self.multiplicity.sum()

    def analyse(self, z: Tensor) -> Tensor:
        """Real and imaginary parts of the spectrum side by side, ``(b, F, n, 2C)``."""
        v = spectrum(_at_least_float32(z), self.shape)
        return torch.cat([v.real, v.imag], -1).to(z.dtype)

    def synthesise(self, v: Tensor) -> Tensor:
        return signal(torch.complex(*_at_least_float32(v).chunk(2, -1)), self.shape).to(v.dtype)

    def expanded(self, v: Tensor) -> Tensor:
        return v @ self._on_pairs(self.expand).mT

    def compressed(self, v: Tensor) -> Tensor:
        """``(b, F, n, K, 2C)``."""
        stacked = self._on_pairs(self.compress).transpose(0, 1)  # F K 2C 2C
        return (v @ stacked.flatten(1, 2).mT).unflatten(-1, stacked.shape[1:3])

    def lengths(self, compressed: Tensor) -> Tensor:
        """Of the signals, by Parseval's identity."""
        energy = compressed.square().sum(-1) * self.multiplicity[:, None, None]
        # The square root of zero has no derivative; of energies this small it has no meaning either.
        return energy.sum(-3).clamp_min(torch.finfo(energy.dtype).tiny).sqrt()

    def combined(self, compressed: Tensor, weights: Tensor) -> Tensor:
        return super().combined(compressed, weights.unsqueeze(-3))

    def _kernels(self, operators: Tensor) -> Tensor:
        """Kernels ``(..., C, C, T)`` of the convolutions that act as ``(..., F, C, C)`` on the spectrum."""
        sizes = self.shape[1:]
        operators = operators.movedim(-3, -1).unflatten(-1, (*sizes[:-1], sizes[-1] // 2 + 1))
        return torch.fft.irfftn(operators, s=sizes, dim=tuple(range(-len(sizes), 0)))

    def _on_pairs(self, kernels: Tensor) -> Tensor:
        """What a convolution does to real and imaginary parts side by side, ``(..., F, 2C, 2C)``."""
        places = tuple(range(1 - len(self.shape), 0))
        operators = torch.fft.rfftn(_at_least_float32(kernels), dim=places).flatten(places[0]).movedim(-1, -3)
        real, imaginary = operators.real, operators.imag
        pairs = torch.cat([torch.cat([real, -imaginary], -1), torch.cat([imaginary, real], -1)], -2)
        return pairs.to(kernels.dtype)


def expansion(z: Float[Tensor, "*f n d"] | Complex[Tensor, "*f n d"], eps: float) -> Tensor:
    r""":math:`E = a\,(I + a Z^\top \bar Z)^{-1}` with :math:`a = d/(n\epsilon^2)`, ``(..., d, d)``.

    For real rows ``z @ E`` is the gradient of :func:`~pellucid.objectives.coding_rate`.
    """
    n, d = z.shape[-2:]
    return _shrinkage(z, torch.full((), d / (n * eps**2), dtype=z.real.dtype, device=z.device))


def compression(
    z: Float[Tensor, "*f n d"] | Complex[Tensor, "*f n d"], weights: Float[Tensor, "n K"], eps: float
) -> Tensor:
    r""":math:`C_j = a_j\,(I + a_j Z^\top \mathrm{diag}(\pi_j) \bar Z)^{-1}` of all j, ``(K, ..., d, d)``.

    All classes in one batched Cholesky factorisation: of d x d matrices, or, where every class has so few
    tokens that it is cheaper, of the tokens' Gram matrices (Woodbury's identity).

    Raises:
        ValueError: a class without tokens.
    """
    scale = _class_scale(z, weights, eps)
    if not _few(z, weights):
        return _inverse(_class_grams(z, weights), scale)
    # Each class's tokens first in its row; those that fill up the row have weight zero.
    width = int((weights > 0).sum(0).max())
    order = weights.mT.argsort(dim=-1, descending=True, stable=True)[:, :width]
    root = weights.mT.gather(-1, order).sqrt()
    rows = z.index_select(-2, order.flatten()).unflatten(-2, order.shape).movedim(-3, 0)
    return _shrinkage(rows * root.reshape(len(root), *[1] * (z.dim() - 2), width, 1), scale)


def operators(
    z: Float[Tensor, "*f n d"] | Complex[Tensor, "*f n d"], weights: Float[Tensor, "n K"], eps: float
) -> tuple[Tensor, Tensor]:
    """E and every C_j: what :func:`expansion` and :func:`compression` give, with products in common."""
    if _few(z, weights) or not bool((weights.sum(-1) == 1).all()):
        return expansion(z, eps), compression(z, weights, eps)
    grams = _class_grams(z, weights)
    grams = torch.cat(
        [grams.sum(0, keepdim=True), grams]
    )  # the classes' second moments add up to the whole's
    scale = _class_scale(z, weights, eps)
    whole = torch.full_like(scale[:1], z.shape[-1] / (z.shape[-2] * eps**2))
    found = _inverse(grams, torch.cat([whole, scale]))
    return found[0], found[1:]


def one_hot(membership: Labels, z: Tensor) -> Float[Tensor, "n K"]:
    """Memberships as weights in the tokens' dtype; the row of a label -1 is zero."""
    if membership.dtype.is_floating_point:
        return membership.to(z)
    weights = F.one_hot(membership.long().clamp_min(0), int(membership.max()) + 1)
    return (weights * (membership >= 0).unsqueeze(-1)).to(z)


def spectrum(z: Float[Tensor, "*b n d"], shape: tuple[int, ...]) -> Complex[Tensor, "*b F n C"]:
    """Unitary FFT of signals of ``shape`` (C, ...) over all but the channels, half of the frequencies."""
    places = tuple(range(1 - len(shape), 0))
    v = torch.fft.rfftn(z.unflatten(-1, shape), dim=places, norm="ortho")
    return v.flatten(1 - len(shape)).movedim(-1, -3)


def signal(v: Complex[Tensor, "*b F n C"], shape: tuple[int, ...]) -> Float[Tensor, "*b n d"]:
    """The inverse of :func:`spectrum`."""
    places = tuple(range(1 - len(shape), 0))
    v = v.movedim(-3, -1).unflatten(-1, (*shape[1:-1], shape[-1] // 2 + 1))
    return torch.fft.irfftn(v, s=shape[1:], dim=places, norm="ortho").flatten(-len(shape))


def half_spectrum_multiplicity(sizes: tuple[int, ...]) -> Float[Tensor, " F"]:
    """How many of all frequencies each kept one stands for: itself, or its mirror image as well."""
    last = torch.full((sizes[-1] // 2 + 1,), 2.0)
    last[0] = 1
    if sizes[-1] % 2 == 0:
        last[-1] = 1
    return last.repeat(math.prod(sizes[:-1]))


def _class_scale(z: Tensor, weights: Tensor, eps: float) -> Tensor:
    """Each :math:`a_j`, ``(K, 1, ..., 1)``: a number for each matrix of its class."""
    sizes = weights.sum(0)
    if not bool((sizes > 0).all()):
        empty = [j for j, size in enumerate(sizes.tolist()) if not size > 0]
        raise ValueError(f"no tokens in class {', '.join(map(str, empty))} - leave it out")
    return (z.shape[-1] / (sizes * eps**2)).reshape(-1, *[1] * (z.dim() - 2))


def _class_grams(z: Tensor, weights: Tensor) -> Tensor:
    """Second moments of each class, ``(K, ..., d, d)``, from its own tokens only."""
    grams, hard = [], bool(((weights == 0) | (weights == 1)).all())
    for pi in weights.unbind(-1):
        inside = pi.nonzero().squeeze(-1)
        part = z.index_select(-2, inside)
        grams.append(part.mT @ (part.conj() if hard else part.conj() * pi[inside, None]))
    return torch.stack(grams)


def _few(z: Tensor, weights: Tensor) -> bool:
    """Whether every class has so few tokens that their side of the matrices is the cheaper one."""
    return 2 * int((weights > 0).sum(0).max()) <= z.shape[-1]


def _shrinkage(y: Tensor, scale: Tensor) -> Tensor:
    r""":math:`a (I + a Y^\top \bar Y)^{-1}` of ``y (..., n, d)``, by the smaller side."""
    n, d = y.shape[-2:]
    if 2 * n > d:
        return _inverse(y.mT @ y.conj(), scale)
    a = scale[..., None, None]
    half = torch.linalg.solve_triangular(_cholesky(y.conj() @ y.mT, a), y.conj(), upper=False)
    return a * (torch.eye(d, dtype=y.dtype, device=y.device) - a * (half.mH @ half))


def _inverse(gram: Tensor, scale: Tensor) -> Tensor:
    a = scale[..., None, None]
    return a * torch.cholesky_inverse(_cholesky(gram, a))


def _cholesky(gram: Tensor, a: Tensor) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(
        a * gram + torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    )
    if bool((info != 0).any()) or not bool(factor.isfinite().all()):
        raise ValueError(
            f"tokens in {str(gram.real.dtype).removeprefix('torch.')} have no Cholesky factor at this eps - "
            f"raise eps, normalise the tokens, or pass them as float64"
        )
    return factor


def _at_least_float32(z: Tensor) -> Tensor:
    return z.float() if z.dtype in (torch.float16, torch.bfloat16) else z
