"""Posterior means against conditioning, autograd, Monte Carlo, SciPy's Bessel functions, and MSSA."""

import math

import numpy as np
import pytest
import scipy.special
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.nn import functional as F

from pellucid.analytic.denoisers import Empirical, GaussianMixture, Sphere, SubspaceMixture, scaled_bessel
from pellucid.errors import ConfigError
from pellucid.objectives import VE, VP, Flow, add_noise, tweedie
from pellucid.steps import MSSA


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bases(K=3, d=5, p=2, seed=0):
    return torch.linalg.qr(normal(K, d, p, seed=seed)).Q


def lines_and_plane():
    """Two lines and a plane through 0 in space: three singular covariances of different rank."""
    factors = [normal(3, rank, seed=rank + i) for i, rank in enumerate((1, 1, 2))]
    covariances = torch.stack([f @ f.T for f in factors])
    return GaussianMixture(torch.zeros(3, 3).double(), covariances, torch.tensor([0.2, 0.3, 0.5]).double())


def on(schedule):
    """Each distribution, seen by this schedule."""
    mixed = lines_and_plane()
    return [
        GaussianMixture(normal(4, 3), torch.stack([f @ f.T for f in normal(4, 3, 3)]), schedule=schedule),
        GaussianMixture(mixed.means, mixed.covariances, mixed.weights, schedule=schedule),
        SubspaceMixture(bases(), schedule=schedule),
        Empirical(normal(7, 3), schedule=schedule),
        *(Sphere(n, 1.5, schedule=schedule) for n in (1, 2, 3, 6)),
    ]


def width(denoiser):
    return denoiser.sample(1).shape[-1]


everyone = pytest.mark.parametrize(
    "denoiser",
    [d for schedule in (VE(), VP(2.0), Flow()) for d in on(schedule)],
    ids=lambda d: f"{type(d).__name__}{width(d)}-{type(d.schedule).__name__}",
)


# --- one contract over all --------------------------------------------------------------------------------


@everyone
@pytest.mark.parametrize("t", [0.05, 0.4, 0.9])
def test_the_score_is_the_gradient_of_the_density(denoiser, t):
    x_t = normal(6, width(denoiser), seed=5).requires_grad_()
    (gradient,) = torch.autograd.grad(denoiser.log_density(x_t, t).sum(), x_t)
    torch.testing.assert_close(denoiser.score(x_t, t), gradient, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(
        denoiser(x_t, t), tweedie(x_t, gradient, t, denoiser.schedule), rtol=1e-7, atol=1e-7
    )


@everyone
def test_is_the_mean_of_the_samples_that_may_have_been(denoiser):
    """Monte Carlo: clean samples weighted by how likely each makes the noisy one. 5 standard errors."""
    t, n = 0.6, 100_000
    generator = torch.Generator().manual_seed(1)
    clean = denoiser.sample(n, generator).double()
    alpha, sigma = denoiser.schedule.alpha(t), denoiser.schedule.sigma(t)
    for x_t in add_noise(clean[:5], t, normal(*clean[:5].shape, seed=3), denoiser.schedule):
        logits = -(x_t - alpha * clean).square().sum(-1) / (2 * sigma**2)
        weights = logits.softmax(0)[:, None]
        estimate = (weights * clean).sum(0)
        error = (weights * (clean - estimate)).square().sum(0).sqrt()
        assert ((denoiser(x_t[None], t)[0] - estimate).abs() < 5 * error + 1e-12).all()
        density = logits.logsumexp(0) - math.log(n) - 0.5 * len(x_t) * math.log(2 * math.pi * sigma**2)
        assert float(denoiser.log_density(x_t[None], t)[0]) == pytest.approx(float(density), abs=0.05)


@everyone
def test_each_sample_has_its_level_and_its_batch_does_not_matter(denoiser):
    x_t, t = normal(3, width(denoiser), seed=2), torch.tensor([0.1, 0.5, 0.9]).double()
    for function in (denoiser, denoiser.log_density, denoiser.score):
        together = function(x_t, t)
        alone = torch.stack([function(x_t[i : i + 1], level)[0] for i, level in enumerate(t.tolist())])
        torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(function(x_t.unsqueeze(1), 0.5).squeeze(1), function(x_t, 0.5))


@everyone
def test_keeps_the_precision_of_the_samples(denoiser):
    x_t = normal(4, width(denoiser), seed=2)
    for function in (denoiser, denoiser.log_density, denoiser.score):
        low = function(x_t.float(), 0.3)
        assert low.dtype == torch.float32
        torch.testing.assert_close(low.double(), function(x_t, 0.3), rtol=1e-3, atol=1e-4)


@everyone
def test_finite_whatever_the_level(denoiser):
    for dtype in (torch.float32, torch.float64):
        x = denoiser.sample(4, torch.Generator().manual_seed(0)).to(dtype)
        for t in (1e-6, 1e-3, denoiser.schedule.t_max):
            for x_t in (x, torch.zeros_like(x), 100 * x):
                out = denoiser(x_t, t)
                assert out.isfinite().all()
                assert out.norm(dim=-1).max() <= 1e3 * (1 + x_t.norm(dim=-1).max())


@pytest.mark.parametrize("denoiser", on(VE()), ids=lambda d: type(d).__name__)
def test_without_noise_it_leaves_and_in_noise_it_averages(denoiser):
    x = denoiser.sample(6, torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(denoiser(x, 1e-4), x, rtol=0, atol=1e-3)
    mean = denoiser.sample(200_000, torch.Generator().manual_seed(0)).double().mean(0)
    torch.testing.assert_close(denoiser(x, 1e4), mean.expand_as(x), rtol=0, atol=0.03)


@everyone
def test_differentiable(denoiser):
    x_t = normal(2, width(denoiser), seed=2).requires_grad_()
    assert gradcheck(lambda x: denoiser(x, 0.5), x_t)


# --- mixtures ---------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 1000), t=st.floats(0.05, 0.95))
def test_one_gaussian_is_conditioning(seed, t):
    mean, factor, x_t = normal(3, seed=seed), normal(3, 3, seed=seed + 1), normal(4, 3, seed=seed + 2)
    covariance = factor @ factor.T
    for schedule in (VE(), VP(), Flow()):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        gain = alpha * covariance @ torch.linalg.inv(alpha**2 * covariance + sigma**2 * torch.eye(3).double())
        expected = mean + (x_t - alpha * mean) @ gain.T
        actual = GaussianMixture(mean[None], covariance[None], schedule=schedule)(x_t, t)
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("schedule", [VE(), VP(2.0), Flow()], ids=str)
def test_a_mixture_on_subspaces_is_a_mixture_of_gaussians(schedule):
    U, x_t = bases(), normal(6, 5, seed=4)
    short = SubspaceMixture(U, schedule=schedule)
    long = GaussianMixture(torch.zeros(3, 5).double(), U @ U.mT, schedule=schedule)
    for t in (0.05, 0.3, 0.9):
        torch.testing.assert_close(short(x_t, t), long(x_t, t))
        torch.testing.assert_close(short.memberships(x_t, t), long.memberships(x_t, t))
        torch.testing.assert_close(short.log_density(x_t, t), long.log_density(x_t, t))


def test_two_gaussians_of_no_width_are_two_points():
    points, t = normal(5, 3), 0.4
    mixture = GaussianMixture(points, torch.zeros(5, 3, 3).double())
    x_t = normal(6, 3, seed=1)
    torch.testing.assert_close(mixture(x_t, t), Empirical(points)(x_t, t))
    torch.testing.assert_close(mixture.log_density(x_t, t), Empirical(points).log_density(x_t, t))


# --- the bridge to attention ------------------------------------------------------------------------------


def test_subspace_mixture_in_its_published_form():
    """With noise of variance t^2 on the signal itself."""
    U, x, t = bases(), normal(5, seed=3), 0.7
    energies = torch.stack([(u.T @ x).square().sum() for u in U])
    weights = torch.softmax(energies / (2 * t**2 * (1 + t**2)), 0)
    expected = sum(w * u @ u.T @ x for w, u in zip(weights, U, strict=True)) / (1 + t**2)
    torch.testing.assert_close(SubspaceMixture(U)(x[None], t)[0], expected)


def mssa_of(U):
    K, d, p = U.shape
    step = MSSA(d, K, p).double()
    with torch.no_grad():
        step.subspaces.weight.copy_(U.mT.reshape(K * p, d))
    return step


def test_a_token_alone_is_denoised_by_mssa_but_for_the_choice_of_head():
    """Of one token the softmax over tokens is 1, and in deep noise all heads weigh the same: MSSA's step is
    then K (1 + t^2) times the denoiser."""
    U, x, t = bases(), normal(1, 1, 5, seed=3), 1e4
    direction = mssa_of(U)(x) - x
    torch.testing.assert_close(direction, 3 * (1 + t**2) * SubspaceMixture(U)(x, t), rtol=1e-6, atol=1e-9)


def test_each_head_of_mssa_is_the_memorising_denoiser_of_its_projections():
    """On tokens whose projections have one length in each subspace: sum_k U_k E[u | U_k^T z], where u is one
    of the projected tokens and the noise has variance 1 / scale."""
    U = torch.linalg.qr(normal(6, 6)).Q.reshape(6, 3, 2).permute(1, 0, 2)
    w = F.normalize(normal(3, 7, 2), dim=-1)
    z = torch.einsum("knp,kdp->nd", w, U)
    step = mssa_of(U)
    t = step.scale**-0.5
    expected = sum(Empirical(heads)(heads, t) @ u.T for heads, u in zip(w, U, strict=True))
    torch.testing.assert_close(step(z[None])[0] - z, expected)
    attention = torch.stack([Empirical(heads).attention(heads, t) for heads in w])
    torch.testing.assert_close(step.attention(z[None])[0], attention)


def test_points_of_different_length_differ_from_mssa_by_the_length_of_the_keys():
    """Their prior: what attention leaves out is -|x_i|^2 / 2 t^2."""
    points, t = normal(7, 6), 1.3
    logits = points @ points.T / t**2
    plain = logits.softmax(-1)
    corrected = (logits - points.square().sum(-1) / (2 * t**2)).softmax(-1)
    attention = Empirical(points).attention(points, t)
    torch.testing.assert_close(attention, corrected)
    assert (attention - plain).abs().max() > 0.1


# --- circles and spheres ----------------------------------------------------------------------------------


def test_two_points_are_tanh():
    x = torch.linspace(-3, 3, 13).double()[:, None]
    for t in (0.2, 1.0, 3.0):
        torch.testing.assert_close(Sphere(1)(x, t), torch.tanh(x / t**2))


@pytest.mark.parametrize("n", [1, 2, 3, 10])
def test_the_slope_at_the_centre_and_the_critical_level(n):
    sphere, h = Sphere(n, 2.0), 1e-5
    x = torch.zeros(1, n).double()
    x[0, 0] = h
    for t in (0.3, 1.0, 5.0):
        assert float(sphere(x, t)[0, 0]) / h == pytest.approx(4 / (n * t**2), rel=1e-6)
    assert sphere.critical_level == pytest.approx(2 / math.sqrt(n))
    for schedule in (VP(), Flow()):
        t = Sphere(n, 2.0, schedule=schedule).critical_level
        assert schedule.sigma(t) / schedule.alpha(t) == pytest.approx(2 / math.sqrt(n))


@pytest.mark.parametrize("n", [1, 2, 3, 10])
def test_denoising_again_and_again_finds_the_fixed_sphere_or_the_centre(n):
    sphere = Sphere(n, 2.0)
    levels = sphere.critical_level * torch.tensor([0.2, 0.5, 0.8, 0.9, 1.1, 2.0]).double()
    radii = sphere.fixed_radius(levels)
    x = F.normalize(normal(len(levels), n), dim=-1)
    for _ in range(200):
        x = sphere(x, levels)
    torch.testing.assert_close(x.norm(dim=-1), radii, rtol=0, atol=1e-6)
    assert (radii[:4] > 0.5).all()
    assert not radii[4:].any()
    assert (radii[:3] > radii[1:4]).all()


@pytest.mark.parametrize("order", [-0.5, 0.0, 0.5, 1.5, 4.0, 20.0])
def test_bessel_functions_are_scipys(order):
    x = np.array([1e-3, 0.1, 1.0, 10.0, 300.0, 1e4, 1e6])
    value, ratio = scaled_bessel(order, torch.tensor(x))
    known = scipy.special.ive(order, x)
    there = known > 1e-250
    assert there.sum() >= 5
    np.testing.assert_allclose(value.exp()[there], known[there], rtol=1e-10)
    quotient = scipy.special.ive(order + 1, x)[there] / known[there]
    np.testing.assert_allclose(ratio[there], quotient, rtol=1e-10)


def test_bessel_functions_of_a_high_order_neither_under_nor_overflow():
    """In 784 dimensions I itself is below the smallest number; the ratio keeps Amos's bounds."""
    order = 391.0
    for x in (1e-6, 1.0, 100.0, 1e4, 1e8):
        value, ratio = scaled_bessel(order, torch.tensor(x, dtype=torch.float64))
        low = x / (order + 0.5 + math.hypot(x, order + 1.5))
        high = x / (order + 0.5 + math.hypot(x, order + 0.5))
        assert value.isfinite()
        assert low * (1 - 1e-12) <= float(ratio) <= high * (1 + 1e-12)


# --- wrong input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: GaussianMixture(normal(2, 3), normal(2, 3, 2)), r"need covariances \(2, 3, 3\)"),
        (lambda: GaussianMixture(normal(2, 1), normal(2, 1, 1), torch.tensor([0.5, 0.6])), "sum to one"),
        (lambda: GaussianMixture(normal(2, 1), normal(2, 1, 1), torch.tensor([1.0, 0.0])), "positive"),
        (lambda: SubspaceMixture(normal(2, 4, 2)), "orthonormal"),
        (lambda: Sphere(0), "dim >= 1"),
        (lambda: Sphere(2, -1.0), "radius > 0"),
        (lambda: Sphere(3)(normal(4, 2), 0.5), "width 2 around a sphere in 3"),
    ],
)
def test_wrong_input_is_named(wrong, message):
    with pytest.raises(ConfigError, match=message):
        wrong()
