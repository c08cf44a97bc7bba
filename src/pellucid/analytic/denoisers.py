r"""The best denoisers of distributions that can be written down: posterior means in closed form.

Each is called as a learned denoiser is, ``denoiser(x_t, t)``, and knows besides what a learned one does not:
its log density at every noise level, and clean samples. They are what a network is compared with, and they
show what it has to become:

- :class:`GaussianMixture`: a guess in each component, weighted by how well the component explains the sample.
- :class:`SubspaceMixture`: the same for low-dimensional components; project, weight, project back: attention
  over *heads*.
- :class:`Empirical`: the distribution of the training points themselves, whose best denoiser is attention
  over *points* and remembers them all.
- :class:`Sphere`: a circle, a sphere, or for one dimension two points.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from pellucid.errors import ConfigError
from pellucid.objectives.denoising import VE, Level, Schedule, for_rows, score_from_denoised


@dataclass(frozen=True, eq=False)
class PosteriorMean(ABC):
    r""":math:`E[x \mid x_t]` for a known distribution of x, where :math:`x_t = \alpha(t)\,x + \sigma(t)\,g`.

    Samples are rows ``(..., d)``; answers come in their precision, on their device. A level is above 0, one
    for all samples or one for each.

    Args:
        schedule: what a level means; :class:`~pellucid.objectives.denoising.VE` unless given, where
            ``t`` is the standard deviation of the noise.
    """

    _: KW_ONLY
    schedule: Schedule = field(default_factory=VE)

    @abstractmethod
    def __call__(self, x_t: Float[Tensor, "*n d"], t: Level) -> Float[Tensor, "*n d"]:
        """The best guess, in mean square, of the clean samples."""

    @abstractmethod
    def log_density(self, x_t: Float[Tensor, "*n d"], t: Level) -> Float[Tensor, "*n"]:
        """Log density of the noisy samples, in nats."""

    @abstractmethod
    def sample(self, n: int, generator: torch.Generator | None = None) -> Float[Tensor, "n d"]:
        """Clean samples."""

    def score(self, x_t: Float[Tensor, "*n d"], t: Level) -> Float[Tensor, "*n d"]:
        """Gradient of :meth:`log_density`, by Tweedie's formula."""
        return score_from_denoised(x_t, self(x_t, t), t, self.schedule)

    def _factors(self, t: Level, x_t: Tensor) -> tuple[Level, Level]:
        """Signal and noise at ``t``, to multiply what has the samples' dimensions."""
        t = for_rows(t, x_t)
        return self.schedule.alpha(t), self.schedule.sigma(t)


@dataclass(frozen=True, eq=False)
class GaussianMixture(PosteriorMean):
    r"""A mixture of Gaussians, singular ones included.

    .. math:: \bar x = \sum_k w_k(x_t)\,\bigl[\mu_k
        + \alpha\Sigma_k (\alpha^2\Sigma_k + \sigma^2 I)^{-1} (x_t - \alpha\mu_k)\bigr], \qquad
        w_k \propto \pi_k\,\mathcal{N}(x_t;\ \alpha\mu_k,\ \alpha^2\Sigma_k + \sigma^2 I)

    Computed in the eigenbases of the :math:`\Sigma_k`, where the inverse is a division by at least
    :math:`\sigma^2`.

    Args:
        means: ``(K, d)``.
        covariances: ``(K, d, d)``, symmetric, positive semi-definite.
        weights: ``(K,)``, positive, summing to one; equal unless given.

    Raises:
        ConfigError: shapes that do not fit, or weights that are no distribution.
    """

    means: Float[Tensor, "K d"]
    covariances: Float[Tensor, "K d d"]
    weights: Float[Tensor, " K"] | None = None

    def __post_init__(self) -> None:
        K, d = self.means.shape
        if self.covariances.shape != (K, d, d):
            raise ConfigError(
                f"means {tuple(self.means.shape)} need covariances {(K, d, d)}; got "
                f"{tuple(self.covariances.shape)}"
            )
        w = self.weights
        if w is not None and (w.shape != (K,) or not (w > 0).all() or abs(float(w.sum()) - 1) > 1e-5):
            raise ConfigError(f"weights must be {K} positive numbers that sum to one; got {w.tolist()}")

    @cached_property
    def _axes(self) -> tuple[Tensor, Tensor]:
        """Variances along the principal axes of each component, and the axes in columns."""
        variances, axes = torch.linalg.eigh(self.covariances)
        return variances.clamp(min=0), axes

    def memberships(self, x_t: Float[Tensor, "*n d"], t: Level) -> Float[Tensor, "*n K"]:
        """Posterior probability of each component."""
        return self._terms(x_t, t)[0].softmax(-1)

    def __call__(self, x_t: Float[Tensor, "*n d"], t: Level) -> Float[Tensor, "*n d"]:
        logits, shrunk = self._terms(x_t, t)
        _, axes = self._axes
        guesses = self.means.to(x_t) + torch.einsum("...ki,kji->...kj", shrunk, axes.to(x_t))
        return torch.einsum("...k,...kd->...d", logits.softmax(-1), guesses)

    def log_density(self, x_t: Float[Tensor, "*n d"], t: Level) -> Float[Tensor, "*n"]:
        return self._terms(x_t, t)[0].logsumexp(-1)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Float[Tensor, "n d"]:
        variances, axes = self._axes
        K = len(self.means)
        shares = torch.ones(K) if self.weights is None else self.weights.cpu()
        k = torch.multinomial(shares, n, replacement=True, generator=generator).to(self.means.device)
        g = _normal(n, self.means.shape[1], self.means, generator)
        return self.means[k] + torch.einsum("nji,ni->nj", axes[k], variances[k].sqrt() * g)

    def _terms(self, x_t: Tensor, t: Level) -> tuple[Tensor, Tensor]:
        """Log of each component's weighted density, and its guess about its mean in its own axes."""
        alpha, sigma = self._factors(t, x_t.unsqueeze(-2))
        variances, axes = (part.to(x_t) for part in self._axes)
        from_mean = x_t.unsqueeze(-2) - alpha * self.means.to(x_t)
        y = torch.einsum("...ki,kij->...kj", from_mean, axes)
        noisy = alpha**2 * variances + sigma**2
        logits = -0.5 * (y.square() / noisy + (2 * math.pi * noisy).log()).sum(-1)
        prior = -math.log(len(self.means)) if self.weights is None else self.weights.to(x_t).log()
        return logits + prior, alpha * variances / noisy * y


@dataclass(frozen=True, eq=False)
class SubspaceMixture(PosteriorMean):
    r"""Equal Gaussians on K subspaces, :math:`x \sim \mathcal{N}(0, U_k U_k^\top)`: the model behind CRATE.

    .. math:: \bar x = \frac{\alpha}{\alpha^2 + \sigma^2} \sum_k w_k\, U_k\, (U_k^\top x_t), \qquad
        w = \mathrm{softmax}_k\,\frac{\alpha^2\,\|U_k^\top x_t\|^2}{2\sigma^2(\alpha^2 + \sigma^2)}

    The *form* is that of MSSA (:class:`~pellucid.steps.mssa.MSSA`): project a token onto each subspace, let
    each head work there, project back with the same :math:`U_k`, add up. What a head does there differs. Here
    it weights its projection by how much of the token lies in its subspace, with a softmax over heads, as
    :class:`~pellucid.steps.tssa.TSSA`'s membership does. In MSSA it compares the projection with those of the
    other tokens, with a softmax over tokens: it is the :class:`Empirical` denoiser of the head's projections.

    Args:
        bases: ``(K, d, p)``, each with orthonormal columns.

    Raises:
        ConfigError: bases that are not orthonormal.
    """

    bases: Float[Tensor, "K d p"]

    def __post_init__(self) -> None:
        gram = self.bases.mT @ self.bases
        gap = float((gram - torch.eye(gram.shape[-1]).to(gram)).abs().max())
        if gap > 1e-4:
            raise ConfigError(
                f"the columns of each basis must be orthonormal; their Gram matrix is {gap:.2g} away - "
                f"orthonormalise them, for example by torch.linalg.qr(bases).Q"
            )

    def project(self, x_t: Float[Tensor, "*n d"]) -> Float[Tensor, "*n K p"]:
        """Coordinates in each subspace."""
        return torch.einsum("kdp,...d->...kp", self.bases.to(x_t), x_t)

    def memberships(self, x_t: Float[Tensor, "*n d"], t: Level) -> Float[Tensor, "*n K"]:
        """Posterior probability of each subspace: the attention over heads."""
        return self._logits(self.project(x_t), x_t, t).softmax(-1)

    def __call__(self, x_t: Float[Tensor, "*n d"], t: Level) -> Float[Tensor, "*n d"]:
        heads = self.project(x_t)
        weights = self._logits(heads, x_t, t).softmax(-1)
        alpha, sigma = self._factors(t, x_t)
        mixed = torch.einsum("kdp,...k,...kp->...d", self.bases.to(x_t), weights, heads)
        return alpha / (alpha**2 + sigma**2) * mixed

    def log_density(self, x_t: Float[Tensor, "*n d"], t: Level) -> Float[Tensor, "*n"]:
        alpha, sigma = (torch.as_tensor(f, dtype=x_t.dtype) for f in self._factors(t, x_t))
        K, d, p = self.bases.shape
        volume = (
            (d - p) * sigma.log() + 0.5 * p * (alpha**2 + sigma**2).log() + 0.5 * d * math.log(2 * math.pi)
        )
        common = -0.5 * (x_t / sigma).square().sum(-1, keepdim=True) - volume - math.log(K)
        return common.squeeze(-1) + self._logits(self.project(x_t), x_t, t).logsumexp(-1)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Float[Tensor, "n d"]:
        K, _, p = self.bases.shape
        k = torch.randint(K, (n,), generator=generator).to(self.bases.device)
        return torch.einsum("ndp,np->nd", self.bases[k], _normal(n, p, self.bases, generator))

    def _logits(self, heads: Tensor, x_t: Tensor, t: Level) -> Tensor:
        alpha, sigma = self._factors(t, x_t)
        return alpha**2 * heads.square().sum(-1) / (2 * sigma**2 * (alpha**2 + sigma**2))


@dataclass(frozen=True, eq=False)
class Empirical(PosteriorMean):
    r"""The distribution of N points themselves: the denoiser that memorises.

    .. math:: \bar x = \sum_i w_i\, x_i, \qquad
        w = \mathrm{softmax}_i\Bigl(\frac{\alpha\langle x_t, x_i\rangle}{\sigma^2}
        - \frac{\alpha^2\|x_i\|^2}{2\sigma^2}\Bigr)

    Softmax attention with the noisy sample as query and the points as keys and values; for points of one
    length the second term drops out. It is the global minimiser of the denoising loss over the points, and a
    sampler that uses it returns them.

    Args:
        points: ``(N, d)``.
    """

    points: Float[Tensor, "N d"]

    def attention(self, x_t: Float[Tensor, "*n d"], t: Level) -> Float[Tensor, "*n N"]:
        """Posterior probability of each point."""
        return self._logits(x_t, t).softmax(-1).to(x_t.dtype)

    def __call__(self, x_t: Float[Tensor, "*n d"], t: Level) -> Float[Tensor, "*n d"]:
        return self.attention(x_t, t) @ self.points.to(x_t)

    def log_density(self, x_t: Float[Tensor, "*n d"], t: Level) -> Float[Tensor, "*n"]:
        sigma = torch.as_tensor(self._factors(t, x_t)[1], dtype=torch.float64)
        common = -0.5 * (x_t / sigma).square() - sigma.log() - 0.5 * math.log(2 * math.pi)
        return (common.sum(-1) + self._logits(x_t, t).logsumexp(-1) - math.log(len(self.points))).to(
            x_t.dtype
        )

    def sample(self, n: int, generator: torch.Generator | None = None) -> Float[Tensor, "n d"]:
        return self.points[torch.randint(len(self.points), (n,), generator=generator).to(self.points.device)]

    def _logits(self, x_t: Tensor, t: Level) -> Tensor:
        """In float64: the two terms are large at little noise, and cancel."""
        alpha, sigma = self._factors(t, x_t)
        points = self.points.to(device=x_t.device, dtype=torch.float64)
        similar = x_t.double() @ points.mT - 0.5 * alpha * points.square().sum(-1)
        return alpha / sigma**2 * similar


@dataclass(frozen=True, eq=False)
class Sphere(PosteriorMean):
    r"""Uniform on the sphere of radius R around 0 in n dimensions: a circle for n = 2, two points for n = 1.

    .. math:: \bar x = R\,A_n(\kappa)\,\frac{x_t}{\|x_t\|}, \qquad
        A_n = \frac{I_{n/2}}{I_{n/2-1}}, \qquad \kappa = \frac{\alpha R\,\|x_t\|}{\sigma^2}

    (:math:`A_1 = \tanh`). Where noise is weak, denoising goes back to the sphere; where it is strong, to the
    centre. Between them stands the **critical level** :math:`\sigma/\alpha = R/\sqrt n`: only below it does
    the map :math:`x \mapsto \bar x` have a fixed sphere, because its slope at the centre is
    :math:`R^2\alpha^2/(n\sigma^2)`.

    Args:
        dim: n.
        radius: R.

    Raises:
        ConfigError: no dimension, or a radius that is not positive.
    """

    dim: int = 2
    radius: float = 1.0

    def __post_init__(self) -> None:
        if self.dim < 1 or not self.radius > 0:
            raise ConfigError(f"a sphere has dim >= 1 and radius > 0; got {self.dim} and {self.radius}")

    @property
    def critical_level(self) -> float:
        r"""The level where :math:`\sigma/\alpha = R/\sqrt n`."""
        return float(self.schedule.level(self.radius / math.sqrt(self.dim)))

    def fixed_radius(self, t: Level) -> Float[Tensor, "*s"]:
        r"""Radius r of the sphere that denoising leaves where it is, 0 from the critical level on.

        It solves :math:`r = R\,A_n(rR\alpha^2/\sigma^2)`, by bisection, for signals without their factor
        alpha.
        """
        t = torch.as_tensor(t, dtype=torch.float64)
        pull = torch.as_tensor(self.radius * (self.schedule.alpha(t) / self.schedule.sigma(t)) ** 2)
        low, high = torch.zeros_like(t), torch.full_like(t, self.radius)
        for _ in range(60):
            middle = 0.5 * (low + high)
            outwards = self.radius * self._pull_ratio(pull * middle)[1] > middle
            low, high = torch.where(outwards, middle, low), torch.where(outwards, high, middle)
        return torch.where(pull * self.radius > self.dim, low, torch.zeros_like(low))

    def __call__(self, x_t: Float[Tensor, "*n d"], t: Level) -> Float[Tensor, "*n d"]:
        length, kappa = self._length(x_t, t)
        factor = self.radius * self._pull_ratio(kappa)[1] / length
        return (factor * x_t.double()).to(x_t.dtype)

    def log_density(self, x_t: Float[Tensor, "*n d"], t: Level) -> Float[Tensor, "*n"]:
        alpha, sigma = (torch.as_tensor(f, dtype=torch.float64) for f in self._factors(t, x_t))
        length, kappa = self._length(x_t, t)
        order = 0.5 * self.dim - 1
        away = (length - alpha * self.radius) / sigma
        spread = self._pull_ratio(kappa)[0] + order * (2 / kappa).log() + math.lgamma(0.5 * self.dim)
        volume = 0.5 * self.dim * (2 * math.pi * sigma**2).log()
        return (spread - 0.5 * away.square() - volume).squeeze(-1).to(x_t.dtype)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Float[Tensor, "n d"]:
        g = torch.randn(n, self.dim, generator=generator)
        return self.radius * g / torch.linalg.vector_norm(g, dim=-1, keepdim=True)

    def _length(self, x_t: Tensor, t: Level) -> tuple[Tensor, Tensor]:
        """Lengths of the samples, never 0, and kappa."""
        if x_t.shape[-1] != self.dim:
            raise ConfigError(f"samples of width {x_t.shape[-1]} around a sphere in {self.dim} dimensions")
        alpha, sigma = self._factors(t, x_t)
        length = torch.linalg.vector_norm(x_t.double(), dim=-1, keepdim=True).clamp(min=1e-200)
        return length, (alpha * self.radius / sigma**2 * length).clamp(min=1e-250)

    def _pull_ratio(self, kappa: Tensor) -> tuple[Tensor, Tensor]:
        return scaled_bessel(0.5 * self.dim - 1, kappa)


def scaled_bessel(
    order: float, x: Float[Tensor, "*s"], start: int = 64
) -> tuple[Float[Tensor, "*s"], Float[Tensor, "*s"]]:
    r""":math:`\log(e^{-x} I_\nu(x))` and :math:`I_{\nu+1}(x)/I_\nu(x)`, for any :math:`x > 0`, however large.

    The ratios r of neighbouring orders follow :math:`r_\nu = 1/(2(\nu+1)/x + r_{\nu+1})`, which is stable
    downwards. It starts ``start`` orders higher, where Debye's expansion for large orders holds to 1e-12
    (Abramowitz and Stegun 9.7.7). Differentiable; in float64.

    Args:
        order: :math:`\nu \ge -1/2`.
        x: positive.
        start: how many orders higher to begin.
    """
    x = x.double()
    log_value = _debye(order + start, x)
    ratio = (_debye(order + start + 1, x) - log_value).exp()
    for nu in reversed(range(start)):
        ratio = 1 / (2 * (order + nu + 1) / x + ratio)
        log_value = log_value - ratio.log()
    return log_value, ratio


def _debye(order: float, x: Tensor) -> Tensor:
    r""":math:`\log(e^{-x} I_\nu(x))` for large orders, uniformly in x."""
    z = x / order
    root = (1 + z * z).sqrt()
    p = 1 / root
    u = (
        (3 * p - 5 * p**3) / 24 / order
        + (81 * p**2 - 462 * p**4 + 385 * p**6) / 1152 / order**2
        + (30375 * p**3 - 369603 * p**5 + 765765 * p**7 - 425425 * p**9) / 414720 / order**3
        + (4465125 * p**4 - 94121676 * p**6 + 349922430 * p**8 - 446185740 * p**10 + 185910725 * p**12)
        / 39813120
        / order**4
    )
    exponent = order * (1 / (root + z) + (z / (1 + root)).log())  # root - z without cancellation
    return exponent - 0.5 * (2 * math.pi * order * root).log() + u.log1p()


def _normal(n: int, d: int, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Drawn on the CPU, so that a seed means the same on any device."""
    return torch.randn(n, d, generator=generator, dtype=like.dtype).to(like.device)
