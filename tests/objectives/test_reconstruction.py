"""LASSO and its parts: identities, planted minima, derivatives, messages."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from pellucid.objectives import lasso, masked_error, nonnegative_lasso, nonzero_fraction, squared_error

LAM = 0.3


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@st.composite
def problems(draw):
    b, n, d, m = (draw(st.integers(1, 5)) for _ in range(4))
    seed = draw(st.integers(0, 10**6))
    return normal(b, n, m, seed=seed), normal(b, n, d, seed=seed + 1), normal(d, m, seed=seed + 2)


OBJECTIVES = {
    "squared error": squared_error,
    "lasso": lambda z, x, D: lasso(z, x, D, LAM),
    "nonnegative lasso": lambda z, x, D: nonnegative_lasso(z.abs(), x, D, LAM),
}
objectives = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())


@given(problem=problems())
def test_written_as_in_the_papers(problem):
    z, x, D = problem
    for zi, xi, error, value in zip(z, x, squared_error(z, x, D), lasso(z, x, D, LAM), strict=True):
        Z, X = zi.T, xi.T  # tokens in columns
        expected = 0.5 * torch.linalg.matrix_norm(X - D @ Z) ** 2
        torch.testing.assert_close(error, expected)
        torch.testing.assert_close(value, expected + LAM * Z.abs().sum())


@objectives
@given(problem=problems())
def test_a_batch_is_its_samples(objective, problem):
    z, x, D = problem
    together = objective(z, x, D)
    assert together.shape == z.shape[:1]
    torch.testing.assert_close(
        together, torch.stack([objective(*pair, D) for pair in zip(z, x, strict=True)])
    )


@given(problem=problems())
def test_zero_code_costs_half_the_energy_and_a_perfect_code_its_price(problem):
    z, x, D = problem
    energy = 0.5 * x.square().sum((-2, -1))
    torch.testing.assert_close(lasso(torch.zeros_like(z), x, D, LAM), energy)
    torch.testing.assert_close(lasso(z, z @ D.mT, D, LAM), LAM * z.abs().sum((-2, -1)))
    torch.testing.assert_close(lasso(z, x, D, 0.0), squared_error(z, x, D))


@given(problem=problems(), c=st.floats(0.1, 10))
def test_scale_law(problem, c):
    z, x, D = problem
    torch.testing.assert_close(lasso(z, c * x, c * D, c**2 * LAM), c**2 * lasso(z, x, D, LAM))


def test_sparsity_may_be_a_tensor_and_is_differentiated():
    z, x, D = normal(2, 3, 4), normal(2, 3, 5), normal(5, 4)
    lam = torch.tensor(LAM, dtype=torch.float64, requires_grad=True)
    lasso(z, x, D, lam).sum().backward()
    torch.testing.assert_close(lam.grad, z.abs().sum())


def test_orthonormal_dictionary_has_its_minimum_at_the_soft_threshold():
    D = torch.linalg.qr(normal(6, 6)).Q
    x = normal(1, 4, 6)
    best = torch.nn.functional.softshrink(x @ D, LAM)
    for seed in range(50):
        other = best + 0.1 * normal(1, 4, 6, seed=seed)
        assert lasso(other, x, D, LAM) > lasso(best, x, D, LAM)


def test_infeasible_codes_cost_infinity_and_only_they_do():
    z, x, D = normal(3, 4, 5).abs(), normal(3, 4, 6), normal(6, 5)
    z[0, 0, 0] = 0.0
    z[1, 2, 3] = -1e-12
    value = nonnegative_lasso(z, x, D, LAM)
    assert value[1] == float("inf")
    torch.testing.assert_close(value[[0, 2]], lasso(z, x, D, LAM)[[0, 2]], rtol=0, atol=0)


def test_nonzero_fraction_counts():
    z = torch.ones(2, 4, 5)
    z[0, :, 0] = 0
    z[1] = 0
    z[1, 0, 0] = 1e-30
    assert nonzero_fraction(z).tolist() == pytest.approx([0.8, 0.05])


@objectives
def test_derivatives(objective):
    z, x, D = normal(2, 3, 4), normal(2, 3, 5), normal(5, 4)
    inputs = tuple(t.requires_grad_() for t in (z, x, D))
    assert z.abs().min() > 1e-3  # away from the kink
    assert gradcheck(objective, inputs)
    assert gradgradcheck(objective, inputs)


@pytest.mark.usefixtures("unchecked_shapes")  # users run without the checks: the message must come from us
@objectives
@pytest.mark.parametrize(
    ("z", "x", "D"),
    [
        ((2, 4), (2, 3), (4, 3)),
        ((2, 4), (2, 4), (3, 4)),
        ((2, 4), (2, 3), (12,)),
        ((2, 4), (2, 3), (1, 3, 4)),
    ],
)
def test_shapes_that_do_not_fit_are_all_named(objective, z, x, D):
    with pytest.raises(ValueError, match="do not fit") as error:
        objective(torch.ones(z), torch.ones(x), torch.ones(D))
    for shape in (z, x, D):
        assert str(tuple(shape)) in str(error.value)


# --- masked error -----------------------------------------------------------------------------------------


@st.composite
def masked(draw):
    """A prediction, its target and a mask under which every sample hides at least one token."""
    b, n, d = (draw(st.integers(1, 5)) for _ in range(3))
    seed = draw(st.integers(0, 10**6))
    mask = torch.rand(b, n, generator=torch.Generator().manual_seed(seed)) < draw(st.floats(0, 1))
    mask[:, draw(st.integers(0, n - 1))] = True
    return normal(b, n, d, seed=seed), normal(b, n, d, seed=seed + 1), mask


@given(problem=masked())
def test_masked_error_is_the_mean_over_hidden_numbers(problem):
    prediction, target, mask = problem
    expected = [((p - t)[m] ** 2).mean() for p, t, m in zip(prediction, target, mask, strict=True)]
    torch.testing.assert_close(masked_error(prediction, target, mask), torch.stack(expected))
    everything = (prediction - target).square().mean((-2, -1))
    torch.testing.assert_close(masked_error(prediction, target, torch.ones_like(mask)), everything)


@pytest.mark.parametrize("other", [100.0, float("nan"), float("inf")])
def test_what_is_visible_does_not_matter(other):
    prediction, target = normal(2, 4, 3), normal(2, 4, 3, seed=1)
    mask = torch.tensor([[True, False, True, False], [False, False, False, True]])
    value = masked_error(prediction, target, mask)
    assert (value > 0).all()
    changed = prediction.masked_fill(~mask[..., None], other)
    assert torch.equal(masked_error(changed, target, mask), value)


def test_only_hidden_tokens_get_a_gradient():
    prediction, target = normal(2, 4, 3).requires_grad_(), normal(2, 4, 3, seed=1)
    mask = torch.tensor([[True, False, True, False], [False, False, False, True]])
    masked_error(prediction, target, mask).sum().backward()
    expected = 2 * (prediction - target) / 3 / mask.sum(-1)[:, None, None]
    torch.testing.assert_close(prediction.grad, torch.where(mask[..., None], expected, 0.0).detach())
    assert gradcheck(lambda p: masked_error(p, target, mask), (prediction,))


def test_nothing_masked_is_nan_for_that_sample_alone():
    mask = torch.tensor([[False, False], [True, False]])
    value = masked_error(torch.zeros(2, 2, 3), torch.ones(2, 2, 3), mask)
    assert value[0].isnan()
    assert value[1] == 1


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("prediction", "target", "mask"),
    [((2, 4, 3), (2, 4, 1), (2, 4)), ((2, 4, 3), (1, 4, 3), (2, 4)), ((2, 4, 3), (2, 4, 3), (2, 1))],
)
def test_masked_error_does_not_broadcast(prediction, target, mask):
    with pytest.raises(ValueError, match="do not fit") as error:
        masked_error(torch.ones(prediction), torch.ones(target), torch.ones(mask, dtype=torch.bool))
    for shape in (prediction, target, mask):
        assert str(shape) in str(error.value)
