"""Steps along the slope of a convex function: no step size, and no way down from orthonormal directions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pellucid.steps import MSP, OrthogonalIteration, unroll
from pellucid.steps.power import polar_factor

both = pytest.mark.parametrize("cls", [OrthogonalIteration, MSP])


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def orthonormal(p, d, seed=0):
    return torch.linalg.qr(normal(d, p, seed=seed))[0].mT[None]


@both
@given(p=st.integers(1, 5), seed=st.integers(0, 10_000))
def test_rises_from_orthonormal_directions_by_at_least_what_convexity_owes(cls, p, seed):
    step = cls(normal(12, 5, seed=seed) * torch.tensor([3.0, 2, 1, 0.5, 0.1]))
    z = orthonormal(p, 5, seed=seed + 1)
    with torch.no_grad():
        for _ in range(6):
            z_next, slope = step(z), step.slope(z)
            owed = (slope * (z_next - z)).sum().item()
            before, after = step.before_and_after(z, z_next)
            assert owed >= -1e-12
            assert (before - after).item() >= owed - 1e-10 * (1 + before.abs().item())
            torch.testing.assert_close(z_next @ z_next.mT, torch.eye(p).double()[None], rtol=0, atol=1e-10)
            z = z_next


@both
def test_the_slope_is_the_gradient_of_what_is_raised(cls):
    step, z = cls(normal(12, 5)), orthonormal(3, 5)
    z.requires_grad_()
    value = {OrthogonalIteration: lambda c: c.square().sum() / 2, MSP: lambda c: c.pow(4).sum() / 4}[cls]
    (gradient,) = torch.autograd.grad(value(step.samples @ z.mT), z)
    torch.testing.assert_close(step.slope(z), gradient)
    torch.testing.assert_close(step.objective(z, z), -value(step.samples @ z.mT)[None])


def test_orthogonal_iteration_finds_the_leading_subspace_and_knows_it():
    samples = normal(40, 6) * torch.tensor([4.0, 3, 2, 0.5, 0.3, 0.1])
    step = OrthogonalIteration(samples)
    with torch.no_grad():
        z = unroll([step] * 100, orthonormal(3, 6))
        leading = torch.linalg.svd(samples, full_matrices=False)[2][:3]
        torch.testing.assert_close(z[0].mT @ z[0], leading.mT @ leading, rtol=0, atol=1e-10)
        best = 0.5 * torch.linalg.svdvals(samples)[:3].square().sum()
        torch.testing.assert_close(-step.objective(z, z)[0], best)


def test_one_direction_is_power_iteration():
    samples = normal(20, 4)
    step, u = OrthogonalIteration(samples), orthonormal(1, 4)
    expected = u[0, 0]
    with torch.no_grad():
        for _ in range(5):
            u = step(u)
            expected = samples.mT @ (samples @ expected)
            expected = expected / expected.norm()
    torch.testing.assert_close(u[0, 0], expected)


def test_near_a_dictionary_the_error_of_msp_shrinks_by_three_over_the_kurtosis():
    rng = torch.Generator().manual_seed(0)
    share = 0.1
    active = torch.rand(200_000, 4, generator=rng) < share
    signs = (torch.rand(200_000, 4, generator=rng) - 0.5).sign()
    step = MSP(active.double() * signs / share**0.5)  # of kurtosis 1 / share
    z = polar_factor(torch.eye(4).double()[None] + 0.02 * normal(1, 4, 4))
    errors = []
    with torch.no_grad():
        for _ in range(3):
            errors.append((z - torch.eye(4)).norm().item())
            z = step(z)
    assert errors[1] / errors[0] == pytest.approx(3 * share, abs=0.03)
    assert errors[2] / errors[1] == pytest.approx(3 * share, abs=0.1)


def test_a_polar_factor_is_the_nearest_orthonormal_matrix():
    matrix = normal(3, 5)
    factor = polar_factor(matrix)
    torch.testing.assert_close(factor @ factor.mT, torch.eye(3).double())
    for seed in range(20):
        assert (matrix - orthonormal(3, 5, seed=seed)[0]).norm() > (matrix - factor).norm()
    torch.testing.assert_close(polar_factor(matrix.mT), factor.mT)
    assert polar_factor(matrix.bfloat16()).dtype == torch.bfloat16
