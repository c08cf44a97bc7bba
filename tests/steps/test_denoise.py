"""Denoising steps: a sampler on unroll, descent on every schedule, climbing to modes, fresh noise."""

from itertools import pairwise

import pytest
import torch

from pellucid.analytic.denoisers import Empirical, GaussianMixture, Sphere, SubspaceMixture
from pellucid.errors import ConfigError
from pellucid.objectives import VE, VP, Flow, add_noise
from pellucid.steps import Denoise, Renoise, unroll

SCHEDULES = [VE(), VP(), Flow(), VP(2.0), Flow(0.5)]
schedules = pytest.mark.parametrize("schedule", SCHEDULES, ids=str)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sampler(denoiser, num_steps):
    grid = denoiser.schedule.grid(num_steps)
    return [Denoise(denoiser, denoiser.schedule, t, t_next) for t, t_next in pairwise(grid)]


def gaussian(schedule):
    factor = normal(2, 2, seed=3)
    return GaussianMixture(normal(1, 2, seed=4), (factor @ factor.T)[None], schedule=schedule)


@schedules
def test_a_sampler_turns_noise_into_the_distribution(schedule):
    """The last step answers the guess, so moments are a little too small; finer grids close the gap."""
    target = gaussian(schedule)
    start = float(schedule.sigma(schedule.t_max)) * normal(20_000, 1, 2)
    gaps = []
    for num_steps in (25, 400):
        samples = unroll(sampler(target, num_steps), start).squeeze(1)
        gaps.append(float((samples.T.cov() - target.covariances[0]).norm() / target.covariances[0].norm()))
        torch.testing.assert_close(samples.mean(0), target.means[0], rtol=0, atol=0.1)
    assert gaps[1] < 0.03
    assert gaps[1] < gaps[0]


@schedules
@pytest.mark.parametrize(
    "make",
    [
        gaussian,
        lambda schedule: Sphere(2, schedule=schedule),
        lambda schedule: Empirical(normal(5, 2), schedule=schedule),
        lambda schedule: SubspaceMixture(torch.linalg.qr(normal(3, 2, 1)).Q, schedule=schedule),
    ],
    ids=["gaussian", "circle", "points", "lines"],
)
def test_every_step_of_a_sampler_makes_its_sample_more_likely(schedule, make):
    """Each sample, at its level, whatever the distribution: 0 < eta <= 1 is inside the bound."""
    records = []
    denoiser = make(schedule)
    z = float(schedule.sigma(schedule.t_max)) * normal(50, 1, 2)
    unroll(sampler(denoiser, 20), z, on_step=records.append)
    assert len(records) == 20
    fell = 0
    for record in records:
        assert 0 < record.step.step_size <= 1
        before, after = record.step.before_and_after(record.z, record.z_next)
        assert (after <= before + 1e-9 * (1 + before.abs())).all()
        fell += int((after < before - 1e-6).sum())
    assert fell > 500


@schedules
def test_without_noise_left_the_step_is_the_guess(schedule):
    denoiser, z = Sphere(2, schedule=schedule), normal(3, 4, 2)
    step = Denoise(denoiser, schedule, 0.5)
    assert step.step_size == 1
    torch.testing.assert_close(step(z), denoiser(z, 0.5), rtol=1e-12, atol=1e-12)


@schedules
def test_the_step_size_is_the_noise_that_goes(schedule):
    step = Denoise(Sphere(2, schedule=schedule), schedule, 0.5)
    step.step_size = 0.25
    assert step.step_size == pytest.approx(0.25)
    ratios = [schedule.sigma(t) / schedule.alpha(t) for t in (step.t, step.t_next)]
    assert ratios[1] / ratios[0] == pytest.approx(0.75)


def test_at_one_level_it_climbs_to_a_mode():
    """Mean shift: from anywhere to a point of the mixture, where the density of its noisy samples is flat."""
    points = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
    denoiser, t = Empirical(points), 0.5
    z = unroll([Denoise(denoiser, VE(), t)] * 200, 2 * normal(30, 1, 2)).squeeze(1)
    assert denoiser.score(z, t).abs().max() < 1e-6
    nearest = torch.cdist(z, points).min(1)
    assert nearest.values.max() < 0.01
    assert set(nearest.indices.tolist()) == {0, 1, 2}


@schedules
def test_fresh_noise_raises_the_level_and_keeps_the_distribution(schedule):
    x = 2 + normal(100_000, 1, 1)
    noisy = add_noise(x, 0.2, normal(*x.shape, seed=1), schedule)
    raised = Renoise(schedule, 0.2, 0.6, torch.Generator().manual_seed(7))(noisy)
    alpha, sigma = schedule.alpha(0.6), schedule.sigma(0.6)
    assert float(raised.mean()) == pytest.approx(2 * alpha, abs=0.02)
    assert float(raised.var()) == pytest.approx(alpha**2 + sigma**2, rel=0.02)


def test_fresh_noise_comes_through_the_door_and_the_record_replays():
    def churned(seed):
        generator = torch.Generator().manual_seed(seed)
        return [
            Denoise(Sphere(2), VE(), 1.2 * t, t_next, enter=Renoise(VE(), t, 1.2 * t, generator))
            for t, t_next in pairwise([1.0, 0.5, 0.2])
        ]

    records, z = [], normal(3, 4, 2)
    out = unroll(churned(0), z, on_step=records.append)
    for record in records:
        assert torch.equal(record.step(record.z, record.x), record.z_next)
    assert torch.equal(out, unroll(churned(0), z))
    assert not torch.equal(out, unroll(churned(1), z))


def test_a_learned_denoiser_cannot_say_how_likely():
    step = Denoise(lambda z, t: 0.5 * z, VE(), 1.0)
    with pytest.raises(TypeError, match=r"no log_density\(z, t\)"):
        step.before_and_after(normal(1, 2, 3), normal(1, 2, 3))


@pytest.mark.parametrize(("t", "t_next"), [(0.5, 0.5), (0.2, 0.4), (0.0, 0.0), (1.5, 0.2), (0.5, -0.1)])
def test_levels_fall_inside_the_schedule(t, t_next):
    with pytest.raises(ConfigError, match=r"from a level to a lower one in 0\.\.1; got"):
        Denoise(lambda z, t: z, VP(), t, t_next)


def test_noise_is_not_taken_off_at_the_door():
    with pytest.raises(ConfigError, match="only towards a higher level"):
        Renoise(VE(), 0.5, 0.4)
