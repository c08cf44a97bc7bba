r"""Denoising as a step: move a sample towards the denoiser's guess, from one noise level to the next.

The guess is a gradient step on the log density of the noisy samples (Tweedie). A sampler of diffusion models
is ``unroll`` over such steps at falling levels, a solver that climbs to a mode is ``unroll`` at one level.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pellucid.errors import ConfigError
from pellucid.objectives.denoising import Denoiser, Level, Schedule
from pellucid.steps.step import Step


class Denoise(Step):
    r"""From level t to level s by the denoiser's guess: one step of DDIM (Song, Meng, Ermon 2021).

    .. math:: z_s = \frac{\sigma_s}{\sigma_t} z
        + \Bigl(\alpha_s - \frac{\sigma_s}{\sigma_t}\alpha_t\Bigr)\, \bar x(z, t)

    With :math:`q = \sigma/\alpha` that is :math:`\tfrac{\alpha_t}{\alpha_s} z_s = z
    + \eta\,\sigma_t^2\,\nabla\log p_t(z)` with :math:`\eta = 1 - q_s/q_t`, a gradient step on the objective
    :math:`-\log p_t(\mathrm{Z})`, summed over tokens and measured at :math:`\tfrac{\alpha_t}{\alpha_s} z_s`.

    Descends: for :math:`\eta < 2`, whatever the distribution of clean samples, if the denoiser is its
    posterior mean: the Hessian of :math:`-\log p_t` is the identity over :math:`\sigma_t^2` less a
    covariance. So every step from more noise to less, where :math:`0 < \eta \le 1`, makes its sample
    more likely at its level. ``unroll`` at one level climbs to a mode; with a mixture of points that is mean
    shift.

    A level is the step's own, not ``x``: layers differ in it, and ``unroll`` hands one ``x`` to all of them.

    Args:
        denoiser: ``(z, t)`` to the guess of the clean samples; a learned one is a module. To measure the
            objective it needs ``log_density(z, t)``, as those of ``pellucid.analytic.denoisers`` have.
        schedule: what a level means.
        t: the level of what comes in.
        t_next: the level of what goes out; 0 for the guess itself.
        enter: see :class:`~pellucid.steps.step.Step`; :class:`Renoise` makes a sampler random.

    Raises:
        ConfigError: ``t`` is not above 0 and in the schedule, or ``t_next`` not below it.
    """

    objective_name = "-log p_t(Z)"

    def __init__(
        self,
        denoiser: Denoiser,
        schedule: Schedule,
        t: float,
        t_next: float = 0.0,
        *,
        enter: nn.Module | None = None,
    ) -> None:
        super().__init__(enter)
        if not 0 <= t_next < t <= schedule.t_max:
            raise ConfigError(
                f"a step goes from a level to a lower one in 0..{schedule.t_max:g}; got {t:g} to {t_next:g}"
            )
        self.denoiser, self.schedule = denoiser, schedule
        self.t, self.t_next = t, t_next

    @property
    def step_size(self) -> float:
        r""":math:`\eta`: the share of the noise-to-signal ratio that goes."""
        alpha, sigma, alpha_next, sigma_next = self._factors()
        return 1 - sigma_next * alpha / (sigma * alpha_next)

    @step_size.setter
    def step_size(self, eta: float) -> None:
        """Another level to go to; beyond 1 it is one of negative noise, which only
        :class:`~pellucid.objectives.denoising.VE` has."""
        alpha, sigma, *_ = self._factors()
        self.t_next = float(self.schedule.level((1 - eta) * sigma / alpha))

    def forward(self, z: Float[Tensor, "b n d"], x: Tensor | None = None) -> Float[Tensor, "b n d"]:
        alpha, sigma, alpha_next, sigma_next = self._factors()
        kept = sigma_next / sigma
        return kept * z + (alpha_next - kept * alpha) * self.denoiser(z, self.t)

    def objective(
        self, z: Float[Tensor, "b n d"], start: Float[Tensor, "b n d"], x: Tensor | None = None
    ) -> Float[Tensor, " b"]:
        if not hasattr(self.denoiser, "log_density"):
            raise TypeError(
                f"{type(self.denoiser).__name__} has no log_density(z, t), only its gradient - measure "
                f"with a distribution in closed form"
            )
        return -self.denoiser.log_density(z, self.t).sum(-1)

    def before_and_after(
        self, z: Float[Tensor, "b n d"], z_next: Float[Tensor, "b n d"], x: Tensor | None = None
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        alpha, _, alpha_next, _ = self._factors()
        return self.objective(z, z), self.objective(alpha / alpha_next * z_next, z)

    def max_step_size(self, num_tokens: int | None = None) -> float:
        return 2.0

    def _factors(self) -> tuple[float, float, float, float]:
        """Signal and noise before, signal and noise after."""
        levels: tuple[Level, Level] = (self.t, self.t_next)
        alpha, alpha_next = (float(self.schedule.alpha(t)) for t in levels)
        sigma, sigma_next = (float(self.schedule.sigma(t)) for t in levels)
        return alpha, sigma, alpha_next, sigma_next


class Renoise(nn.Module):
    r"""Fresh noise at a step's door, from level t up to a higher one ("churn", Karras et al. 2022).

    .. math:: \frac{\alpha_s}{\alpha_t} z + \sqrt{\sigma_s^2 - (\alpha_s\sigma_t/\alpha_t)^2}\; g

    What comes out is distributed as samples at level s are, if what came in was at level t. The step behind
    it sees, records and replays only the result.

    Args:
        schedule: what a level means.
        t, t_higher: from where, to where.
        generator: random numbers, drawn on its own device.
    """

    def __init__(
        self, schedule: Schedule, t: float, t_higher: float, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.generator = generator
        self.kept = float(schedule.alpha(t_higher)) / float(schedule.alpha(t))
        fresh = float(schedule.sigma(t_higher)) ** 2 - (self.kept * float(schedule.sigma(t))) ** 2
        if fresh < 0:
            raise ConfigError(f"noise can be added only towards a higher level; got {t:g} to {t_higher:g}")
        self.fresh = fresh**0.5

    def forward(self, z: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        device = z.device if self.generator is None else self.generator.device
        noise = torch.randn(z.shape, generator=self.generator, dtype=z.dtype, device=device)
        return self.kept * z + self.fresh * noise.to(z.device)
