"""Denoising: schedules, the loss and its minimiser, Tweedie's formula, entropy under noise."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.distributions import MultivariateNormal, Normal

from pellucid.errors import ConfigError
from pellucid.objectives import (
    VE,
    VP,
    Flow,
    Schedule,
    add_noise,
    denoising_loss,
    entropy_slope,
    gaussian_entropy,
    gaussian_entropy_slope,
    make_schedule,
    score_from_denoised,
    tweedie,
)
from pellucid.objectives.denoising import SCHEDULES

schedules = pytest.mark.parametrize("schedule", [VE(), VP(), Flow(), VE(3.0), VP(3.0), Flow(0.2)], ids=str)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- schedules --------------------------------------------------------------------------------------------


def test_the_three_paths_in_numbers():
    for t in (0.0, 0.6, torch.tensor(0.6)):
        assert [float(v) for v in (VE(2.0).alpha(t), VE(2.0).sigma(t))] == pytest.approx([1, 2 * float(t)])
        assert float(VP().alpha(t)) ** 2 + float(VP().sigma(t)) ** 2 == pytest.approx(1)
        assert float(Flow().alpha(t)) + float(Flow().sigma(t)) == pytest.approx(1)
    assert VP().alpha(0.6) == pytest.approx(0.8)
    assert VE().alpha(torch.linspace(0, 1, 5)).tolist() == [1] * 5
    assert VP().alpha(1.0) == Flow().alpha(1.0) == 0


@schedules
@given(t=st.floats(0.001, 0.999))
def test_a_level_is_told_by_its_noise_to_signal_ratio(schedule: Schedule, t):
    ratio = schedule.sigma(t) / schedule.alpha(t)
    assert schedule.level(ratio) == pytest.approx(t, rel=1e-9)
    assert float(schedule.level(torch.tensor(ratio, dtype=torch.float64))) == pytest.approx(t, rel=1e-9)


@schedules
def test_a_grid_falls_from_the_noisiest_level_to_none(schedule: Schedule):
    grid = schedule.grid(20)
    assert len(grid) == 21
    assert grid[0] == pytest.approx(schedule.t_max)
    assert grid[-1] == 0
    assert all(before > after for before, after in pairwise(grid))
    torch.testing.assert_close(
        schedule.at(torch.linspace(1, 0, 21, dtype=torch.float64)),
        torch.tensor(grid, dtype=torch.float64),
        rtol=1e-12,
        atol=1e-15,
    )


def test_curvature_crowds_the_levels_towards_no_noise():
    even, curved = VP().grid(10), VP(curvature=5.0).grid(10)
    assert even == pytest.approx([1 - i / 10 for i in range(11)])
    # t_l = C1 (e^{C2 l} - 1), so differences grow by one factor
    steps = [before - after for before, after in pairwise(curved)]
    assert [a / b for a, b in pairwise(steps)] == pytest.approx([math.exp(0.5)] * 9)


def test_by_name():
    assert {name: type(make_schedule(name, 2.0)) for name in SCHEDULES} == {"ve": VE, "vp": VP, "flow": Flow}
    assert make_schedule("vp", 2.0).sigma(0.5) == 1.0
    with pytest.raises(ConfigError, match="unknown schedule 'fow' - did you mean 'flow'"):
        make_schedule("fow")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: VP(t_max=1.1), "VP ends at t = 1"),
        (lambda: Flow(t_max=2.0), "Flow ends at t = 1"),
        (lambda: VE(scale=0.0), "must be positive"),
        (lambda: VE(scale=math.nan), "must be positive"),
        (lambda: VP().grid(0), "at least one step"),
        (lambda: gaussian_entropy(torch.eye(2), 0.0), "must be positive; got 0.0"),
        (lambda: gaussian_entropy_slope(torch.eye(2), -1.0), "must be positive"),
    ],
)
def test_wrong_values_are_named(wrong, message):
    with pytest.raises(ConfigError, match=message):
        wrong()


# --- noise, loss, Tweedie ---------------------------------------------------------------------------------


@schedules
def test_noise_has_the_moments_it_promises(schedule: Schedule):
    x, t = torch.tensor([[1.0, -2.0]], dtype=torch.float64).expand(200_000, 2), 0.4
    noisy = add_noise(x, t, normal(200_000, 2), schedule)
    sigma = schedule.sigma(t)
    torch.testing.assert_close(noisy.mean(0), schedule.alpha(t) * x[0], rtol=0, atol=0.01 * sigma)
    torch.testing.assert_close(noisy.std(0), sigma * torch.ones(2).double(), rtol=0.01, atol=0)


def test_each_sample_has_its_own_level_whatever_its_shape():
    x, g, t = normal(4, 3, 2, 2), normal(4, 3, 2, 2, seed=1), torch.tensor([0.0, 0.2, 0.5, 1.0]).double()
    together = add_noise(x, t, g, Flow())
    losses = denoising_loss(lambda y, level: 0.5 * y, x, t, g, Flow(), weight=1 + t)
    assert losses.shape == (4,)
    for i, level in enumerate(t.tolist()):
        torch.testing.assert_close(together[i], (1 - level) * x[i] + level * g[i])
        expected = (1 + level) * (0.5 * together[i] - x[i]).square().sum()
        torch.testing.assert_close(losses[i], expected)
    assert torch.equal(together[0], x[0])
    assert torch.equal(together[3], g[3])


@schedules
def test_tweedie_on_a_gaussian(schedule: Schedule):
    """Posterior mean by conditioning; score by autograd of the density: two ways to one answer."""
    factor, mean, t = normal(3, 3), normal(3, seed=1), 0.3
    covariance = factor @ factor.T
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    noisy_covariance = alpha**2 * covariance + sigma**2 * torch.eye(3).double()
    x_t = normal(5, 3, seed=2).requires_grad_()
    log_density = MultivariateNormal(alpha * mean, noisy_covariance).log_prob(x_t).sum()
    (gradient,) = torch.autograd.grad(log_density, x_t)
    posterior = mean + alpha * (x_t - alpha * mean) @ torch.linalg.inv(noisy_covariance) @ covariance
    torch.testing.assert_close(tweedie(x_t, gradient, t, schedule), posterior)
    torch.testing.assert_close(score_from_denoised(x_t, posterior, t, schedule), gradient)


@given(seed=st.integers(0, 1000), t=st.floats(0.05, 0.95))
def test_tweedie_and_score_undo_each_other(seed, t):
    x_t, denoised = normal(4, 3, seed=seed), normal(4, 3, seed=seed + 1)
    for schedule in (VE(), VP(2.0), Flow()):
        back = tweedie(x_t, score_from_denoised(x_t, denoised, t, schedule), t, schedule)
        torch.testing.assert_close(back, denoised)


@pytest.mark.parametrize("schedule", [VE(), VP(), Flow()], ids=str)
def test_the_posterior_mean_has_the_least_loss(schedule: Schedule):
    """Among linear denoisers of a Gaussian, whose errors are known in closed form."""
    n, variance, t = 400_000, 2.0, 0.5
    x, g = variance**0.5 * normal(n, 1), normal(n, 1, seed=1)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    best = alpha * variance / (alpha**2 * variance + sigma**2)
    losses = {c: denoising_loss(lambda y, level, c=c: c * y, x, t, g, schedule).mean() for c in
              (best - 0.1, best, best + 0.1)}  # fmt: skip
    expected = variance * sigma**2 / (alpha**2 * variance + sigma**2)
    assert float(losses[best]) == pytest.approx(expected, rel=0.01)  # 4 standard errors
    extra = 0.01 * (alpha**2 * variance + sigma**2)  # orthogonality: Pythagoras
    for c in (best - 0.1, best + 0.1):
        assert float(losses[c] - losses[best]) == pytest.approx(extra, rel=0.2)


def test_the_loss_is_differentiable():
    x, g, t = normal(3, 2), normal(3, 2, seed=1), torch.tensor([0.2, 0.4, 0.6]).double()
    weights = normal(2, 2, seed=2).requires_grad_()
    assert gradcheck(lambda w: denoising_loss(lambda y, level: y @ w, x, t, g, VP()), weights)


# --- entropy ----------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 1000), sigma=st.floats(0.01, 20))
def test_entropy_of_a_gaussian_is_torchs_and_its_slope_the_derivative(seed, sigma):
    factor = normal(4, 3, seed=seed)  # singular
    covariance = factor @ factor.T
    noisy = covariance + sigma**2 * torch.eye(4).double()
    entropy = gaussian_entropy(covariance, sigma)
    torch.testing.assert_close(entropy, MultivariateNormal(torch.zeros(4).double(), noisy).entropy())
    h = 1e-5 * sigma
    numeric = (gaussian_entropy(covariance, sigma + h) - gaussian_entropy(covariance, sigma - h)) / (2 * h)
    torch.testing.assert_close(gaussian_entropy_slope(covariance, sigma), numeric, rtol=1e-5, atol=1e-7)


@given(seed=st.integers(0, 1000), sigma=st.floats(0.1, 5))
def test_the_error_of_the_best_denoiser_of_a_gaussian_tells_its_slope(seed, sigma):
    factor = normal(4, 3, seed=seed)
    variances = torch.linalg.svdvals(factor) ** 2
    error = (variances * sigma**2 / (variances + sigma**2)).sum()
    torch.testing.assert_close(
        entropy_slope(error, 4, sigma), gaussian_entropy_slope(factor @ factor.T, sigma), rtol=1e-9, atol=0
    )


@pytest.mark.parametrize("sigma", [0.3, 0.5, 1.0, 2.0])
def test_entropy_slope_of_two_points(sigma):
    """By quadrature: +-1, whose posterior mean is tanh(x/sigma^2) (a book prints the other sign)."""
    grid = torch.linspace(-30, 30, 60_001, dtype=torch.float64)
    width = grid[1] - grid[0]

    def density(s):
        at = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
        return Normal(at, s).log_prob(grid).exp().mean(0)

    def entropy(s):
        p = density(s)
        return -torch.special.xlogy(p, p).sum() * width

    h = 1e-4
    numeric = (entropy(sigma + h) - entropy(sigma - h)) / (2 * h)
    posterior = torch.tanh(grid / sigma**2)
    error = (density(sigma) * (1 - posterior**2)).sum() * width  # E x^2 = 1
    torch.testing.assert_close(entropy_slope(error, 1, sigma), numeric, rtol=1e-5, atol=1e-7)
