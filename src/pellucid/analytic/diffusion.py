"""Multi-scale denoising: learn the denoiser at every noise level, then draw samples, denoising by steps."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from typing import Any, Literal

import torch
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from pellucid.analytic.base import Estimator
from pellucid.errors import ConfigError
from pellucid.objectives.denoising import (
    Level,
    Schedule,
    denoising_loss,
    make_schedule,
    score_from_denoised,
)
from pellucid.steps import Denoise, Renoise, unroll


class Diffusion(Estimator):
    r"""A diffusion model: a network learns :math:`E[x \mid x_t]` at every level, and a sampler follows it.

    Samples are rows ``(n, d)``, or pictures ``(n, c, h, w)``, and come back as they were given. Noise is
    counted in standard deviations of the data, so that levels mean the same whatever the data's unit:
    :math:`x_t = \alpha(t)\,x + s\,t\,g` with s ``scale_``.

    Args:
        schedule: ``"vp"``, ``"ve"`` or ``"flow"``, or one of :mod:`pellucid.objectives.denoising`, taken as
            it is.
        network: ``"mlp"``; ``"crate"`` for pictures; or a module from ``(n, d)`` samples and ``(n,)`` levels
            to ``(n, d)``, which is copied.
        width, depth: of the network.
        train_steps: optimiser steps; each takes ``batch_size`` samples at levels drawn from the schedule.
        batch_size: samples in a step.
        learning_rate: of AdamW, at its peak; it rises over a twentieth of the steps and falls to zero.
        sampling_steps: denoising steps for a sample.
        random_state: seed of weights, batches, noise and samples.

    Attributes:
        mean_: ``(d,)``, of the data.
        scale_: standard deviation of the data about it, over all coordinates.
        weights_: of the network, by name.
        losses_: ``(train_steps,)``, squared error of each step's batch by the weights of
            :class:`~pellucid.models.denoiser.Preconditioned`, about 1 where nothing is learnt.
        shape_: of one sample as it was given.

    The gradient of the log density is :meth:`score_field`, because ``score(X, y=None)`` is scikit-learn's
    word for how well a model does.
    """

    def __init__(
        self,
        schedule: str | Schedule = "vp",
        network: Literal["mlp", "crate"] | nn.Module = "mlp",
        *,
        width: int = 128,
        depth: int = 3,
        train_steps: int = 1000,
        batch_size: int = 128,
        learning_rate: float = 2e-3,
        sampling_steps: int = 40,
        random_state: Any = None,
    ) -> None:
        self.schedule, self.network = schedule, network
        self.width, self.depth = width, depth
        self.train_steps, self.batch_size, self.learning_rate = train_steps, batch_size, learning_rate
        self.sampling_steps = sampling_steps
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> Diffusion:
        """Learn the denoiser.

        Raises:
            ValueError: fewer than two samples, NaN, or data of no spread.
            ConfigError: an option that cannot be, or a network that does not fit the data.
        """
        self._check_options()
        rows = self._rows(self._flat(X), reset=True, min_samples=2)
        self.shape_ = tuple(X.shape[1:]) if getattr(X, "ndim", 2) == 4 else (rows.shape[1],)
        self.mean_ = rows.mean(0)
        self.scale_ = float((rows - self.mean_).square().mean().sqrt())
        if not self.scale_ > 1e-12 * float(rows.abs().max()):
            raise ValueError("all samples are the same, there is nothing to learn - give different ones")
        self.tensors_in_ = isinstance(X, Tensor)
        generator = self._generator()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
            denoiser = self._build().to(rows.device)
        self.losses_ = self._train(denoiser, rows.float(), generator)
        self.weights_ = {name: value.detach() for name, value in denoiser.network.state_dict().items()}
        return self

    @property
    def schedule_(self) -> Schedule:
        """What a level means for this data."""
        if isinstance(self.schedule, Schedule):
            return self.schedule
        return make_schedule(self.schedule, self.scale_)

    @property
    def denoiser_(self) -> nn.Module:
        """The learned denoiser, ``(x_t, t)`` to the guess, on float32 rows: see
        :class:`~pellucid.models.denoiser.Preconditioned`."""
        check_is_fitted(self, "weights_")
        with torch.device("meta"):
            denoiser = self._build()
        denoiser.network.load_state_dict(self.weights_, assign=True)
        return denoiser.requires_grad_(False).eval()

    def denoise(self, X: Any, t: Level) -> Any:
        """The guess of the clean samples from noisy ones at level ``t``, one or one for each.

        Raises:
            ValueError: another width than in fit, NaN, or a level outside the schedule.
        """
        check_is_fitted(self, "weights_")
        rows = self._rows(self._flat(X))
        return self._answer(self._denoised(rows, self._level(t, rows)), X)

    def score_field(self, X: Any, t: Level) -> Any:
        r"""Gradient of the log density of samples at level ``t``, :math:`(\alpha\bar x - x_t)/\sigma^2`."""
        check_is_fitted(self, "weights_")
        rows = self._rows(self._flat(X))
        level = self._level(t, rows)
        return self._answer(score_from_denoised(rows, self._denoised(rows, level), level, self.schedule_), X)

    def score(self, X: Any, y: Any = None) -> float:
        """How well unseen samples are denoised: minus the loss of training, higher is better.

        Over 32 levels evenly spread, with the noise of ``random_state``.
        """
        check_is_fitted(self, "weights_")
        rows = self._rows(self._flat(X)).float()
        denoiser, generator = self.denoiser_, self._generator()
        shares = (torch.arange(32) + 0.5) / 32
        losses = [self._loss(denoiser, rows, share.expand(len(rows)), generator) for share in shares]
        return -float(torch.stack(losses).mean())

    def sample(self, n: int, *, steps: int | None = None, churn: float = 0.0) -> Any:
        """New samples, shaped as those of fit; the same at each call if ``random_state`` is a seed.

        Args:
            n: how many.
            steps: denoising steps; ``sampling_steps`` unless given.
            churn: by which share noise is raised afresh before each step; 0 for the deterministic sampler.

        Raises:
            ConfigError: no samples or steps asked for, or a negative churn.
        """
        check_is_fitted(self, "weights_")
        if n < 1 or churn < 0:
            raise ConfigError(f"sample takes n >= 1 and churn >= 0; got {n} and {churn}")
        schedule, generator = self.schedule_, self._generator()
        top = schedule.t_max
        alpha, sigma = float(schedule.alpha(top)), float(schedule.sigma(top))
        noise = torch.randn(n, 1, len(self.mean_), generator=generator).to(self.mean_.device)
        # At the top level the data are as good as Gaussian.
        start = alpha * self.mean_.float() + math.hypot(alpha * self.scale_, sigma) * noise
        with torch.no_grad():
            layers = self._sampler(self.denoiser_, steps or self.sampling_steps, churn, generator)
            samples = unroll(layers, start).squeeze(1).to(self.mean_.dtype).reshape(n, *self.shape_)
        return samples if self.tensors_in_ else samples.cpu().numpy()

    def _sampler(
        self, denoiser: nn.Module, steps: int, churn: float, generator: torch.Generator
    ) -> list[Denoise]:
        schedule = self.schedule_
        layers = []
        for t, t_next in pairwise(schedule.grid(steps)):
            ratio = schedule.sigma(t) / schedule.alpha(t) if schedule.alpha(t) > 0 else math.inf
            higher = (
                min(float(schedule.level((1 + churn) * ratio)), schedule.t_max) if ratio < math.inf else t
            )
            enter = Renoise(schedule, t, higher, generator) if higher > t else None
            layers.append(Denoise(denoiser, schedule, higher if enter else t, t_next, enter=enter))
        return layers

    def _train(self, denoiser: nn.Module, rows: Tensor, generator: torch.Generator) -> Tensor:
        optimizer = torch.optim.AdamW(denoiser.parameters(), lr=self.learning_rate)
        warmup, losses = max(1, self.train_steps // 20), []
        for step in range(self.train_steps):
            for group in optimizer.param_groups:
                falling = 0.5 * (1 + math.cos(math.pi * step / self.train_steps))
                group["lr"] = self.learning_rate * min(1, (step + 1) / warmup) * falling
            batch = torch.randint(len(rows), (self.batch_size,), generator=generator)
            shares = torch.rand(self.batch_size, generator=generator)
            loss = self._loss(denoiser, rows[batch.to(rows.device)], shares, generator)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses)

    def _loss(self, denoiser: nn.Module, x: Tensor, shares: Tensor, generator: torch.Generator) -> Tensor:
        schedule = self.schedule_
        t = torch.as_tensor(schedule.at(0.002 + 0.998 * shares)).to(x)
        noise = torch.randn(x.shape, generator=generator).to(x)
        weight = denoiser.weight(t) / x.shape[1]  # type: ignore[operator]
        return denoising_loss(denoiser, x, t, noise, schedule, weight).mean()

    def _build(self) -> Any:
        from pellucid.models.denoiser import CRATEDenoiser, MLPDenoiser, Preconditioned, picture_shape

        network: nn.Module
        if isinstance(self.network, nn.Module):
            network = copy.deepcopy(self.network)
        elif self.network == "mlp":
            network = MLPDenoiser(len(self.mean_), self.width, self.depth)
        else:
            shape = self.shape_ if len(self.shape_) == 3 else picture_shape(len(self.mean_))
            patch = next(p for p in (4 if shape[-1] >= 16 else 2, 2, 1) if not (shape[1] % p or shape[2] % p))
            network = CRATEDenoiser(shape, patch, self.width, self.depth)
        return Preconditioned(network, self.schedule_, self.mean_.float(), self.scale_)

    @torch.no_grad()
    def _denoised(self, rows: Tensor, t: Tensor) -> Tensor:
        return self.denoiser_(rows.float(), t.float()).to(rows.dtype)

    def _level(self, t: Level, rows: Tensor) -> Tensor:
        level = torch.as_tensor(t, dtype=rows.dtype, device=rows.device)
        if level.dim() > 1 or (level.dim() == 1 and len(level) != len(rows)):
            raise ConfigError(
                f"t is one level or {len(rows)}, one for each sample; got shape {tuple(level.shape)}"
            )
        if not bool(((level > 0) & (level <= self.schedule_.t_max)).all()):
            raise ConfigError(f"a level is above 0 and at most {self.schedule_.t_max:g}; got {t}")
        return level

    @staticmethod
    def _flat(X: Any) -> Any:
        """Pictures as rows; anything else as it is, for the checks of rows."""
        return X.reshape(len(X), -1) if getattr(X, "ndim", 2) == 4 and len(X) else X

    def _answer(self, rows: Tensor, X: Any) -> Any:
        return self._like(rows.reshape(X.shape), X) if getattr(X, "ndim", 2) == 4 else self._like(rows, X)

    def _check_options(self) -> None:
        if not isinstance(self.network, nn.Module) and self.network not in ("mlp", "crate"):
            raise ConfigError(f"network is {self.network!r}; known: 'mlp', 'crate', or a module")
        if not isinstance(self.schedule, Schedule):
            make_schedule(self.schedule)
        for name in ("width", "depth", "train_steps", "batch_size", "sampling_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not self.learning_rate > 0:
            raise ConfigError(f"learning_rate is {self.learning_rate}; it must be positive")
