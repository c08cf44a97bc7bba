r"""Denoising: noise schedules, the loss of a denoiser, and what a denoiser knows about the density.

A sample x is seen through noise at level t,

.. math:: x_t = \alpha(t)\,x + \sigma(t)\,g, \qquad g \sim \mathcal{N}(0, I),

and the best guess of x in mean square is the posterior mean :math:`\bar x = E[x \mid x_t]`. Tweedie's formula
says that it is one gradient step on the noisy density,
:math:`\alpha\bar x = x_t + \sigma^2 \nabla\log p_t(x_t)`, so whoever denoises at every level knows the score
of every :math:`p_t`, and through it the entropy.

Samples are rows: ``x (n, d)``, or any shape whose first dimensions are those of the level ``t``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pellucid.errors import ConfigError, suggest

Level = float | Tensor
"""A noise level: one for all samples, or a tensor of one each."""

Denoiser = Callable[[Tensor, Level], Tensor]
"""Noisy samples and their level to the guess of the clean ones."""


@dataclass(frozen=True)
class Schedule(ABC):
    """How much signal and how much noise there is at level ``t``, from none at 0 to most at ``t_max``.

    Args:
        scale: standard deviation of the noise where ``sigma`` is 1: the unit in which noise is counted. The
            standard deviation of the data makes the same levels mean the same on any data.
        t_max: the noisiest level.
        curvature: c, how the levels of :meth:`at` crowd towards 0; 0 for evenly spaced.

    Raises:
        ConfigError: a scale or level that is not positive, or a ``t_max`` beyond the schedule's end.
    """

    scale: float = 1.0
    t_max: float = 1.0
    curvature: float = 0.0

    def __post_init__(self) -> None:
        if not (self.scale > 0 and self.t_max > 0):
            raise ConfigError(f"scale {self.scale} and t_max {self.t_max} must be positive")
        if isinstance(self, VP | Flow) and self.t_max > 1:
            raise ConfigError(
                f"{type(self).__name__} ends at t = 1, where no signal is left; t_max is {self.t_max}"
            )

    @abstractmethod
    def alpha(self, t: Level) -> Level:
        """Factor on the signal."""

    def sigma(self, t: Level) -> Level:
        """Standard deviation of the noise."""
        return self.scale * t

    @abstractmethod
    def level(self, ratio: Level) -> Level:
        r"""The level at which noise stands to signal as ``ratio`` :math:`= \sigma/\alpha`."""

    def at(self, share: Level) -> Level:
        r"""The level at ``share`` in 0..1 of the way from 0 to ``t_max``:
        :math:`t_{max}\,(e^{c\,share} - 1)/(e^c - 1)`."""
        if self.curvature == 0:
            return self.t_max * share
        base = math.exp(self.curvature)
        return self.t_max * (base**share - 1) / (base - 1)

    def grid(self, num_steps: int) -> list[float]:
        """Levels from ``t_max`` down to 0 in ``num_steps`` steps: ``num_steps + 1`` numbers."""
        if num_steps < 1:
            raise ConfigError(f"a grid has at least one step; got {num_steps}")
        return [float(self.at(i / num_steps)) for i in reversed(range(num_steps + 1))]


@dataclass(frozen=True)
class VE(Schedule):
    r"""Variance exploding: :math:`\alpha = 1,\ \sigma = t`. The noise drowns the signal, which stays."""

    t_max: float = 40.0
    curvature: float = 8.0

    def alpha(self, t: Level) -> Level:
        return 0 * t + 1

    def level(self, ratio: Level) -> Level:
        return ratio / self.scale


@dataclass(frozen=True)
class VP(Schedule):
    r"""Variance preserving: :math:`\alpha = \sqrt{1 - t^2},\ \sigma = t`."""

    def alpha(self, t: Level) -> Level:
        return (1 - t * t) ** 0.5

    def level(self, ratio: Level) -> Level:
        q = ratio / self.scale
        return q / (1 + q * q) ** 0.5


@dataclass(frozen=True)
class Flow(Schedule):
    r"""The path of flow matching: :math:`\alpha = 1 - t,\ \sigma = t`, a straight line to the noise."""

    def alpha(self, t: Level) -> Level:
        return 1 - t

    def level(self, ratio: Level) -> Level:
        q = ratio / self.scale
        return q / (1 + q)


SCHEDULES: dict[str, type[Schedule]] = {"ve": VE, "vp": VP, "flow": Flow}


def make_schedule(name: str, scale: float = 1.0) -> Schedule:
    """A schedule by its name: ``"ve"``, ``"vp"`` or ``"flow"``.

    Raises:
        ConfigError: an unknown name.
    """
    if name not in SCHEDULES:
        raise ConfigError(f"unknown schedule {name!r}{suggest(str(name), SCHEDULES)}")
    return SCHEDULES[name](scale=scale)


def for_rows(t: Level, x: Tensor) -> Level:
    """A level for each sample, shaped so that it multiplies all numbers of that sample."""
    if isinstance(t, Tensor) and t.dim():
        return t.reshape(*t.shape, *(1,) * (x.dim() - t.dim()))
    return t


def add_noise(
    x: Float[Tensor, "n ..."], t: Level, noise: Float[Tensor, "n ..."], schedule: Schedule
) -> Float[Tensor, "n ..."]:
    r"""The samples at level ``t``, :math:`\alpha x + \sigma g`; ``noise`` is g, of unit variance."""
    t = for_rows(t, x)
    return schedule.alpha(t) * x + schedule.sigma(t) * noise


def score_from_denoised(
    x_t: Float[Tensor, "*n d"], denoised: Float[Tensor, "*n d"], t: Level, schedule: Schedule
) -> Float[Tensor, "*n d"]:
    r"""Gradient of the log density of noisy samples, :math:`(\alpha\bar x - x_t)/\sigma^2`, for t > 0."""
    t = for_rows(t, x_t)
    return (schedule.alpha(t) * denoised - x_t) / schedule.sigma(t) ** 2


def tweedie(
    x_t: Float[Tensor, "*n d"], score: Float[Tensor, "*n d"], t: Level, schedule: Schedule
) -> Float[Tensor, "*n d"]:
    r"""Posterior mean by Tweedie's formula, :math:`(x_t + \sigma^2 \nabla\log p_t)/\alpha`.

    :func:`score_from_denoised` turned round. Where no signal is left (alpha = 0) the score cannot tell it.
    """
    t = for_rows(t, x_t)
    return (x_t + schedule.sigma(t) ** 2 * score) / schedule.alpha(t)


def denoising_loss(
    denoiser: Denoiser,
    x: Float[Tensor, "n ..."],
    t: Level,
    noise: Float[Tensor, "n ..."],
    schedule: Schedule,
    weight: Level = 1.0,
) -> Float[Tensor, " n"]:
    r"""Squared error of a denoiser, :math:`w\,\|f(x_t, t) - x\|^2`, one number for each sample.

    Its minimiser over all functions is the posterior mean whatever the weight: under the distribution that
    samples come from if x is drawn anew, under the memorising one if x is drawn from a fixed few.

    Args:
        denoiser: noisy samples and their level to clean samples.
        x: clean samples.
        t: level, one or one for each sample.
        noise: of unit variance, shaped as ``x``.
        schedule: what a level means.
        weight: w, one or one for each sample; the book's is :math:`\alpha/\sigma`.
    """
    error = denoiser(add_noise(x, t, noise, schedule), t) - x
    return weight * error.square().flatten(1).sum(1)


def gaussian_entropy(covariance: Float[Tensor, "d d"], sigma: float) -> Float[Tensor, ""]:
    r"""Entropy in nats of a Gaussian seen through noise,
    :math:`\tfrac12\sum_i \log 2\pi e(\lambda_i + \sigma^2)`.

    Args:
        covariance: of the clean samples; it may be singular.
        sigma: standard deviation of the noise.

    Raises:
        ConfigError: no noise, without which a singular Gaussian has no entropy.
    """
    return 0.5 * (2 * math.pi * math.e * _noisy_variances(covariance, sigma)).log().sum()


def gaussian_entropy_slope(covariance: Float[Tensor, "d d"], sigma: float) -> Float[Tensor, ""]:
    r"""How fast that entropy grows, :math:`dh/d\sigma = \sum_i \sigma/(\lambda_i + \sigma^2)`."""
    return (sigma / _noisy_variances(covariance, sigma)).sum()


def entropy_slope(error: Level, dim: int, sigma: Level) -> Level:
    r"""How fast the entropy of *any* distribution grows under noise, told by its best denoiser:

    .. math:: \frac{dh}{d\sigma} = \sigma\,E\|\nabla\log p_\sigma\|^2
        = \frac{d}{\sigma} - \frac{E\|x - \bar x\|^2}{\sigma^3}

    (de Bruijn's identity; Guo, Shamai, Verdu 2005). Noise that can be taken off again has raised no entropy.

    Args:
        error: mean squared error of the posterior mean, summed over coordinates.
        dim: number d of coordinates.
        sigma: standard deviation of the noise, with alpha = 1.
    """
    return dim / sigma - error / sigma**3


def _noisy_variances(covariance: Tensor, sigma: float) -> Tensor:
    if not sigma > 0:
        raise ConfigError(f"the standard deviation of the noise must be positive; got {sigma}")
    return torch.linalg.eigvalsh(covariance).clamp(min=0) + sigma**2
