"""Sparse codes beside scikit-learn's coordinate descent, and held to their own certificate."""

import pickle  # noqa: TID251 - an estimator must survive it
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.decomposition import SparseCoder as ReferenceCoder
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import Lasso
from sklearn.utils.estimator_checks import parametrize_with_checks

from pellucid.analytic import sparse_coding
from pellucid.analytic.sparse_coding import SparseCoder, cosine_basis, sparse_code
from pellucid.objectives import lasso, lasso_gap
from pellucid.steps import Momentum, SoftISTA, unroll

signs = pytest.mark.parametrize("nonnegative", [False, True])
solvers = pytest.mark.parametrize(
    "options",
    [{"method": method, "exact": exact} for method in ("blocks", "fista", "ista") for exact in (True, False)],
    ids=str,
)


def problem(n=40, d=12, m=20, seed=0, dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)
    D = torch.nn.functional.normalize(torch.randn(d, m, generator=rng, dtype=torch.float64), dim=0)
    Z = (torch.rand(n, m, generator=rng) < 0.15) * torch.randn(n, m, generator=rng, dtype=torch.float64)
    return (Z @ D.mT + 0.05 * torch.randn(n, d, generator=rng, dtype=torch.float64)).to(dtype), D.to(dtype)


@parametrize_with_checks([SparseCoder(), SparseCoder(nonnegative=True, method="ista")])
def test_scikit_learns_checks(estimator, check):
    check(estimator)


@signs
@solvers
@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (8, 40)])
def test_equal_to_scikit_learn(nonnegative, options, shape):
    X, D = problem(15, *shape)
    z, gap, iterations = sparse_code(
        X, D, 0.1, nonnegative=nonnegative, tol=1e-10, max_iter=100_000, **options
    )
    reference = Lasso(
        alpha=0.1 / len(D), positive=nonnegative, fit_intercept=False, tol=1e-13, max_iter=100_000
    )
    theirs = torch.from_numpy(reference.fit(D.numpy(), X.mT.numpy()).coef_)
    torch.testing.assert_close(z, theirs, rtol=0, atol=2e-4)
    value = lasso(z[:, None], X[:, None], D, 0.1)
    best = lasso(theirs[:, None], X[:, None], D, 0.1)
    assert (value - best <= gap + 1e-12).all()  # the certificate holds
    assert (gap <= 1e-10 * 0.5 * X.square().sum(1)).all()
    assert 0.02 < (z != 0).double().mean() < 0.9
    assert not nonnegative or (z >= 0).all()
    assert (iterations > 0).all()


def test_equal_to_scikit_learns_sparse_coder():
    X, D = problem()
    theirs = ReferenceCoder(D.mT.numpy(), transform_algorithm="lasso_cd", transform_alpha=0.2).transform(
        X.numpy()
    )
    ours = SparseCoder(D, sparsity=0.2, tol=1e-9).fit_transform(X.numpy())
    np.testing.assert_allclose(ours, theirs, atol=1e-3)


@signs
@given(seed=st.integers(0, 10_000), share=st.floats(0.05, 2.0))
def test_the_gap_bounds_the_distance_from_the_minimum_of_any_code(nonnegative, seed, share):
    X, D = problem(4, 6, 9, seed)
    best = sparse_code(X, D, 0.1, nonnegative=nonnegative, tol=1e-12).codes
    z = share * best + 0.1 * torch.randn(best.shape, generator=torch.Generator().manual_seed(seed)).double()
    z = z.clamp_min(0) if nonnegative else z
    gap = lasso_gap(z, X, D, 0.1, nonnegative=nonnegative)
    excess = lasso(z[:, None], X[:, None], D, 0.1) - lasso(best[:, None], X[:, None], D, 0.1)
    assert (gap >= excess - 1e-12).all()
    assert (lasso_gap(best, X, D, 0.1, nonnegative=nonnegative) < 1e-11).all()


def test_the_gap_is_primal_minus_dual():
    X, D = problem(5)
    z = 0.1 * torch.randn(5, 20, dtype=torch.float64)
    residual = X - z @ D.mT
    point = residual * (0.3 / (residual @ D).abs().amax(1, keepdim=True)).clamp_max(1)
    assert ((point @ D).abs() <= 0.3 + 1e-12).all()
    dual = 0.5 * X.square().sum(1) - 0.5 * (X - point).square().sum(1)
    torch.testing.assert_close(lasso_gap(z, X, D, 0.3), lasso(z[:, None], X[:, None], D, 0.3) - dual)


def test_above_the_largest_correlation_the_code_is_zero():
    X, D = problem()
    largest = float((X @ D).abs().max())
    assert not sparse_code(X, D, 1.001 * largest).codes.any()
    assert sparse_code(X, D, 0.999 * largest).codes.any()


def test_momentum_at_the_door_is_fista_and_faster():
    X, D = problem(30, 20, 40)
    step = SoftISTA(20, 40, sparsity=0.05).double()
    step.dictionary = torch.nn.Parameter(D, requires_grad=False)
    step.step_size = eta = 0.5 * step.max_step_size()
    z = y = torch.zeros(30, 40, dtype=torch.float64)
    t = 1.0
    step.enter = Momentum()
    ours = unroll([step] * 8, z[None], X[None])[0]
    for _ in range(8):  # as in the paper
        v = y - eta * (y @ D.mT - X) @ D
        z_next = v.sign() * (v.abs() - eta * 0.05).clamp_min(0)
        t_next = (1 + (1 + 4 * t * t) ** 0.5) / 2
        y, z, t = z_next + (t - 1) / t_next * (z_next - z), z_next, t_next
    same = ((ours - z).abs() < 1e-12).all(1)  # those that did not begin anew
    assert same.double().mean() > 0.5
    ista, fista = (
        sparse_code(X, D, 0.05, method=method, exact=False, max_iter=50_000).iterations.double().mean()
        for method in ("ista", "fista")
    )
    assert fista < 0.5 * ista


def test_a_face_finishes_what_momentum_began():
    X, D = problem(200, 30, 60)
    finished, alone = (
        sparse_code(X, D, 0.1, tol=1e-12, exact=exact, max_iter=20_000) for exact in (True, False)
    )
    torch.testing.assert_close(finished.codes, alone.codes, rtol=0, atol=1e-5)
    assert finished.iterations.double().mean() < 0.4 * alone.iterations.double().mean()


@signs
def test_sweeps_never_raise_the_lasso_where_momentum_would(nonnegative, monkeypatch):
    monkeypatch.setattr(sparse_coding, "REACH", 1.9)
    monkeypatch.setattr(sparse_coding, "MOMENTUM", 0.95)  # without the guard it grows beyond all bounds
    X, D = problem(60)
    values = []
    for max_iter in (20, 21, 22, 40, 41, 42, 90, 200):
        codes = sparse_code(X, D, 0.05, nonnegative=nonnegative, exact=False, max_iter=max_iter).codes
        values.append(lasso(codes[:, None], X[:, None], D, 0.05))
    for before, after in pairwise(values):
        assert (after <= before * (1 + 1e-12)).all()


def test_sweeps_find_the_face_before_fista():
    X, D = problem(60, 30, 60)
    swept, stepped = (
        sparse_code(X, D, 0.05, method=method).iterations.double().mean() for method in ("blocks", "fista")
    )
    assert swept < 0.6 * stepped


def test_equal_atoms_make_no_face_singular_for_long():
    """Two atoms that are one: many minima, no unique system, and still a certificate."""
    X, D = problem()
    D = torch.cat([D, D], 1)
    codes, gap, _ = sparse_code(X, D, 0.1, max_iter=20_000)
    assert (gap <= 1e-6 * 0.5 * X.square().sum(1)).all()
    single = sparse_code(X, D[:, :20], 0.1)
    torch.testing.assert_close(codes[:, :20] + codes[:, 20:], single.codes, rtol=0, atol=1e-2)


def test_a_warm_start_saves_the_way():
    X, D = problem(60)
    first = sparse_code(X, D, 0.1, exact=False, max_iter=20_000)
    again = sparse_code(X, D, 0.1, exact=False, start=first.codes, max_iter=20_000)
    assert not again.iterations.any()
    assert torch.equal(again.codes, first.codes)
    near = sparse_code(X, D, 0.1, exact=False, start=first.codes + 1e-3, max_iter=20_000)
    assert 0 < near.iterations.double().mean() < 0.8 * first.iterations.double().mean()
    before = first.codes.clone()
    SparseCoder(D).fit(X).transform(X, start=first.codes)
    assert torch.equal(first.codes, before)


def test_a_signal_does_not_depend_on_its_batch():
    X, D = problem(600)
    coder = SparseCoder(D, sparsity=0.1, tol=1e-10).fit(X)
    together = coder.transform(X)
    torch.testing.assert_close(coder.transform(X[300:310]), together[300:310], rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensors_stay_tensors_of_their_precision(dtype):
    X, D = problem(dtype=dtype)
    coder = SparseCoder(D.numpy()).fit(X)
    z = coder.transform(X)
    assert isinstance(z, torch.Tensor)
    assert z.dtype == coder.inverse_transform(z).dtype == dtype
    assert coder.gap_.max() <= 1e-6 * 0.5 * X.square().sum(1).max()
    torch.testing.assert_close(coder.inverse_transform(z), z @ D.mT)
    wide = SparseCoder(D.double(), tol=1e-10).fit_transform(X.double())
    torch.testing.assert_close(z, wide.to(dtype), rtol=0, atol=5e-3)


def test_the_cosine_basis_is_orthonormal_and_a_soft_threshold_away():
    basis = cosine_basis(9)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(9, dtype=torch.float64))
    X = torch.randn(5, 9, dtype=torch.float64)
    expected = torch.nn.functional.softshrink(X @ basis, 0.3)
    torch.testing.assert_close(SparseCoder(sparsity=0.3).fit_transform(X), expected, rtol=0, atol=1e-6)


def test_pickles_and_is_deterministic():
    X, D = problem()
    coder = SparseCoder(D).fit(X)
    copy = pickle.loads(pickle.dumps(coder))  # noqa: S301
    assert torch.equal(copy.transform(X), coder.transform(X))


def test_too_few_steps_are_told():
    X, D = problem()
    with pytest.warns(ConvergenceWarning, match=r"of 40 signals have not reached"):
        coder = SparseCoder(D, sparsity=0.01, max_iter=3, tol=1e-9).fit(X)
    assert coder.n_iter_ == 3


@pytest.mark.parametrize(
    ("dictionary", "options", "message"),
    [
        (np.ones((5, 7)), {}, "does not fit signals of width 12"),
        (np.ones(12), {}, "does not fit"),
        (np.full((12, 3), np.nan), {}, "NaN"),
        (None, {"sparsity": 0.0}, "must be positive"),
        (None, {"method": "fitsa"}, "did you mean 'fista'"),
        (None, {"tol": 0.0}, "tol 0.0"),
        (None, {"max_iter": 0}, "max_iter 0"),
    ],
)
def test_bad_input_is_named(dictionary, options, message):
    with pytest.raises(ValueError, match=message):
        SparseCoder(dictionary, **options).fit(problem()[0])


def test_wrong_width_and_wrong_start_are_refused():
    X, D = problem()
    coder = SparseCoder(D).fit(X)
    with pytest.raises(ValueError, match="11 features"):
        coder.transform(X[:, :11])
    with pytest.raises(ValueError, match=r"start has shape \(3, 20\); expected \(40, 20\)"):
        coder.transform(X, start=torch.zeros(3, 20))


def test_nothing_to_code():
    X, D = problem()
    X[3] = 0
    codes, gap, _ = sparse_code(X, D, 0.1)
    assert not codes[3].any()
    assert gap[3] == 0
    assert not sparse_code(X, torch.zeros_like(D), 0.1).codes.any()
