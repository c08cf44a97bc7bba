"""ISTA as a solver, and its three ways to compute one number."""

import copy
import warnings

import pytest
import torch
from sklearn.linear_model import Lasso

from pellucid.steps import ISTA, SoftISTA, Synthesis, unroll

LAM = 0.3
both = pytest.mark.parametrize("cls", [ISTA, SoftISTA])


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def solver(cls, d, m, seed=0):
    step = cls(d, m, sparsity=LAM).double()
    with torch.no_grad():
        step.dictionary.copy_(normal(d, m, seed=seed) / d**0.5)
    step.step_size = 0.5 * step.max_step_size()
    return step


# --- as a solver ------------------------------------------------------------------------------------------


@both
def test_fixed_point_satisfies_the_optimality_conditions(cls):
    step, x = solver(cls, 8, 12), 2 * normal(2, 3, 8)
    with torch.no_grad():
        z = unroll([step] * 20000, torch.zeros(2, 3, 12, dtype=torch.float64), x)
        assert (step(z, x) - z).abs().max() < 1e-12
        slope = (
            x - z @ step.dictionary.mT
        ) @ step.dictionary  # must be lam where active, at most lam elsewhere
    active = z != 0
    assert 0.1 < active.double().mean() < 0.9
    torch.testing.assert_close(slope[active], LAM * z[active].sign(), rtol=1e-8, atol=0)
    if cls is ISTA:
        assert (z >= 0).all()
        assert (slope[~active] <= LAM + 1e-9).all()
    else:
        assert (z < 0).any()
        assert (slope[~active].abs() <= LAM + 1e-9).all()


@both
@pytest.mark.parametrize("shape", [(12, 8), (8, 16), (10, 10)])
def test_reaches_the_objective_that_scikit_learn_reaches(cls, shape):
    d, m = shape
    step, x = solver(cls, d, m), 2 * normal(1, 4, d)
    with torch.no_grad():
        z = unroll([step] * 5000, torch.zeros(1, 4, m, dtype=torch.float64), x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reference = Lasso(
            alpha=LAM / d, positive=cls is ISTA, fit_intercept=False, tol=1e-12, max_iter=100_000
        ).fit(step.dictionary.detach().numpy(), x[0].T.numpy())
    theirs = torch.from_numpy(reference.coef_)[None]
    ours, expected = step.objective(z, z, x).item(), step.objective(theirs, theirs, x).item()
    assert expected < 0.9 * step.objective(torch.zeros_like(z), z, x).item()  # there was something to find
    assert ours == pytest.approx(expected, rel=1e-6)


def test_planted_code_is_recovered():
    step = solver(ISTA, 40, 60)
    step.sparsity = 0.01
    planted = torch.zeros(1, 5, 60, dtype=torch.float64)
    for token in range(5):
        planted[0, token, torch.randperm(60, generator=torch.Generator().manual_seed(token))[:4]] = 1.0
    with torch.no_grad():
        z = unroll([step] * 3000, torch.zeros_like(planted), planted @ step.dictionary.mT)
    assert torch.equal(z > 0.5, planted > 0.5)
    assert (z - planted).abs().max() < 0.1


@both
def test_scale_law(cls):
    """Signal, code and threshold in other units, the same step: ista(cD, cx, c^2 lam) with step / c^2."""
    step, x, c = solver(cls, 6, 9), normal(2, 3, 6), 3.0
    scaled = copy.deepcopy(step)
    with torch.no_grad():
        scaled.dictionary.mul_(c)
    scaled.sparsity, scaled.step_size = c**2 * step.sparsity, step.step_size / c**2
    z = torch.zeros(2, 3, 9, dtype=torch.float64)
    torch.testing.assert_close(scaled(z, c * x), step(z, x))
    assert step(z, x).any()


@both
def test_zero_stays_zero(cls):
    step, z = solver(cls, 6, 6), torch.zeros(1, 2, 6, dtype=torch.float64)
    assert not step(z).any()
    assert not step(z, z).any()


def test_max_step_size_is_the_exact_spectral_bound():
    step = ISTA(6)
    assert step.max_step_size() == pytest.approx(2.0, rel=1e-5)  # made orthogonal
    with torch.no_grad():
        step.dictionary.copy_(torch.diag(torch.tensor([4.0, 1, 1, 1, 1, 1])))
    assert step.max_step_size() == pytest.approx(2 / 16)
    with torch.no_grad():
        step.dictionary.zero_()
    assert step.max_step_size() == float("inf")


def test_a_wide_dictionary_needs_a_signal():
    with pytest.raises(ValueError, match=r"12 atoms for tokens of width 6 needs a start and a signal"):
        ISTA(6, 12)(torch.ones(1, 2, 12))


def test_synthesis_speaks_what_a_free_code_in_an_orthogonal_dictionary_says():
    """At step size 1 and no price the code of x is x D from any start, and Z D^T gives x back."""
    step, x = SoftISTA(6, step_size=1.0, sparsity=0.0).double(), normal(2, 3, 6)
    synthesis = Synthesis(6).double()
    synthesis.load_state_dict(step.state_dict())
    code = step(normal(2, 3, 6, seed=1), x)
    torch.testing.assert_close(code, x @ step.dictionary, rtol=0, atol=1e-5)  # orthogonal in float32
    torch.testing.assert_close(synthesis(code), x, rtol=0, atol=1e-5)
    assert not torch.allclose(code, x)


def test_synthesis_begins_as_a_rotation_and_is_linear():
    step, z, other = Synthesis(6).double(), normal(2, 3, 6), normal(2, 3, 6, seed=1)
    torch.testing.assert_close(step(z).norm(dim=-1), z.norm(dim=-1), rtol=1e-6, atol=0)  # made in float32
    torch.testing.assert_close(step(2 * z - other), 2 * step(z) - step(other))
    assert torch.equal(step(z, other), step(z))  # no signal has a say


# --- three forms of one step ------------------------------------------------------------------------------


def two_products(step, z):
    return step(z, z)


def kept(step, z):
    with torch.no_grad():
        return step.eval()(z)


def fresh(step, z):
    """With a gradient asked for and more tokens than dimensions."""
    assert z.shape[0] * z.shape[1] > z.shape[2]
    return step.train()(z)


@both
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_two_products_fresh_fold_and_kept_fold_are_one_number(cls, dtype, tolerance):
    step = solver(cls, 16, 16).to(dtype)
    z = normal(3, 10, 16, dtype=dtype)
    expected = two_products(step, z)
    assert 0 < (expected != 0).double().mean() < 1
    torch.testing.assert_close(fresh(step, z), expected, rtol=tolerance, atol=tolerance)
    assert step._fold.made is None
    for _ in range(2):
        torch.testing.assert_close(kept(step, z), expected, rtol=tolerance, atol=tolerance)
    assert step._fold.made is not None


@both
def test_fresh_fold_and_two_products_have_one_gradient(cls):
    step, weight = solver(cls, 8, 8), normal(2, 10, 8, seed=2)
    gradients = []
    for form in (two_products, fresh):
        z = normal(2, 10, 8).requires_grad_()
        gradients.append(torch.autograd.grad((form(step, z) * weight).sum(), (z, step.dictionary)))
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_few_tokens_take_two_products_and_many_a_fold(monkeypatch):
    step, made = solver(ISTA, 8, 8), []
    inner = step._make_fold
    monkeypatch.setattr(step, "_make_fold", lambda: made.append(1) or inner())
    step(normal(1, 8, 8))
    assert not made
    step(normal(1, 9, 8))
    assert made == [1]


@both
@torch.no_grad()
def test_one_token_takes_two_products_even_where_a_fold_could_be_kept(cls):
    step = solver(cls, 16, 16).eval()
    z = normal(1, 3, 16)
    one = step(z[:, :1])
    assert step._fold.made is None
    torch.testing.assert_close(one, step(z)[:, :1], rtol=1e-12, atol=1e-12)
    assert step._fold.made is not None


def optimiser_step(step):
    optimiser = torch.optim.SGD(step.parameters(), lr=0.1)
    with torch.enable_grad():
        step(normal(1, 20, 8, dtype=step.dictionary.dtype)).sum().backward()
    optimiser.step()


CHANGES = {
    "optimiser step": optimiser_step,
    "load_state_dict": lambda step: step.load_state_dict({"dictionary": normal(8, 8, seed=5)}),
    "write through .data": lambda step: step.dictionary.data.mul_(0.5),
    "new .data": lambda step: setattr(step.dictionary, "data", normal(8, 8, seed=5)),
    "new parameter": lambda step: setattr(step, "dictionary", torch.nn.Parameter(normal(8, 8, seed=5))),
    "one number": lambda step: step.dictionary.data[3, 4].add_(1e-3),
    "to(dtype)": lambda step: step.float(),
    "step size": lambda step: setattr(step, "step_size", 0.7 * step.step_size),
    "sparsity": lambda step: setattr(step, "sparsity", 2 * step.sparsity),
}


@both
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_kept_fold_does_not_outlive_a_change(cls, change):
    step = solver(cls, 8, 8).eval()
    z = normal(2, 5, 8)
    before = kept(step, z)
    assert step._fold.made is not None
    change(step)
    z = z.to(step.dictionary.dtype)
    with torch.no_grad():
        expected = two_products(step, z)
    after = kept(step, z)
    assert after.dtype == step.dictionary.dtype
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-6)
    if after.dtype == before.dtype:
        assert (after - before).abs().max() > 1e-5


def test_a_fold_is_made_anew_in_another_precision_even_where_the_numbers_are_the_same():
    step, z = ISTA(8).eval(), normal(2, 5, 8).float()
    with torch.no_grad():
        step.dictionary.copy_(torch.eye(8) * 0.75)  # the same number in bfloat16 and in float32
    step.bfloat16()
    kept(step, z.bfloat16())
    step.float()
    torch.testing.assert_close(kept(step, z), two_products(step, z), rtol=1e-6, atol=1e-6)
    assert step._fold.made.dtype == torch.float32


def test_a_fold_is_kept_as_long_as_nothing_changes():
    step, z = solver(ISTA, 8, 8), normal(2, 5, 8)
    kept(step, z)
    first = step._fold.made
    kept(step, 2 * z)
    assert first is not None
    assert step._fold.made is first
    with torch.autocast("cpu", torch.bfloat16):
        kept(step, z)
    assert step._fold.made is first  # whoever asks, in whatever precision
    assert copy.deepcopy(step)._fold.made is None


def test_a_fold_first_asked_for_under_autocast_is_not_rounded():
    step, z = solver(ISTA, 8, 8).float(), normal(2, 5, 8).float()
    with torch.autocast("cpu", torch.bfloat16):
        kept(step, z)
    torch.testing.assert_close(kept(step, z), two_products(step, z), rtol=1e-5, atol=1e-6)


def test_no_fold_is_kept_where_gradients_may_be_asked_for():
    step, z = solver(ISTA, 8, 8), normal(2, 5, 8)
    step.eval()(z).sum().backward()  # evaluation mode, but the dictionary wants a gradient
    assert step._fold.made is None
    assert step.dictionary.grad.any()
    with torch.no_grad():
        step.train()(z)  # about to be trained: a fold would serve once
    assert step._fold.made is None

    step.eval().requires_grad_(False)
    z.requires_grad_()
    step(z).sum().backward()  # frozen, but the tokens want one
    assert step._fold.made is None
    assert z.grad.any()
    step(z.detach())  # frozen, and nobody wants one
    assert step._fold.made is not None


def test_a_fold_made_in_inference_mode_serves_outside_it():
    step, z = solver(ISTA, 8, 8).eval(), normal(2, 5, 8)
    with torch.inference_mode():
        expected = step(z).clone()
    step.requires_grad_(False)
    assert torch.equal(step(z), expected)
    step.requires_grad_(True)
    step(z).sum().backward()
    assert step.dictionary.grad.any()


@both
def test_a_fold_loses_no_more_bits_under_autocast_than_two_products(cls):
    """The tokens pass by the product, not through it: only their change is rounded."""
    step, z = cls(64), normal(4, 50, 64).float()
    with torch.no_grad():
        exact = two_products(step, z)
        with torch.autocast("cpu", torch.bfloat16):
            errors = {form.__name__: (form(step, z) - exact).norm() for form in (two_products, fresh, kept)}
    assert 0 < errors["two_products"] < 1e-3 * exact.norm()
    assert errors["fresh"] < 1.5 * errors["two_products"]
    assert errors["kept"] < 1.5 * errors["two_products"]


def test_bfloat16_keeps_the_support():
    """A step of 0.1 and a sparsity of 0.1 survive bfloat16: the same entries are cut as in float32."""
    step = ISTA(64).eval()
    z = normal(4, 50, 64).float()
    expected = kept(step, z) > 0
    with torch.autocast("cpu", torch.bfloat16):
        for low in (kept(step, z), fresh(step, z)):
            assert ((low > 0) == expected).float().mean() > 0.99
    assert 0.2 < expected.float().mean() < 0.8
