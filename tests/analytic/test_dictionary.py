"""Dictionaries planted and dug up again, up to order, sign and scale."""

import pickle  # noqa: TID251 - an estimator must survive it
from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.estimator_checks import parametrize_with_checks

from pellucid.analytic.dictionary import (
    CompleteDictionary,
    OvercompleteDictionary,
    matched_cosines,
    update_atoms,
)
from pellucid.analytic.sparse_coding import sparse_code
from pellucid.objectives import lasso

both = pytest.mark.parametrize("cls", [CompleteDictionary, OvercompleteDictionary])


def complete(seed, d=16, n=3000, share=0.2, mix=None, dtype=torch.float64):
    """``(samples, atoms)`` with Bernoulli-Gaussian codes; an orthogonal dictionary unless one is given."""
    rng = torch.Generator().manual_seed(seed)
    if mix is None:
        mix = torch.linalg.qr(torch.randn(d, d, generator=rng, dtype=torch.float64))[0]
    active = torch.rand(n, mix.shape[1], generator=rng) < share
    Z = active * torch.randn(n, mix.shape[1], generator=rng, dtype=torch.float64)
    return (Z @ mix.mT).to(dtype), mix.to(dtype)


def overcomplete(seed, d=16, m=24, n=1500, active=3):
    """``(samples, atoms)``: three atoms each, with weights of modulus 1 to 2, and a little noise."""
    rng = torch.Generator().manual_seed(seed)
    D = torch.nn.functional.normalize(torch.randn(d, m, generator=rng, dtype=torch.float64), dim=0)
    chosen = torch.rand(n, m, generator=rng).topk(active).indices
    weights = torch.randn(n, active, generator=rng).sign() * (1 + torch.rand(n, active, generator=rng))
    Z = torch.zeros(n, m, dtype=torch.float64).scatter_(1, chosen, weights.double())
    return Z @ D.mT + 0.01 * torch.randn(n, d, generator=rng, dtype=torch.float64), D


@parametrize_with_checks(
    [CompleteDictionary(random_state=0), OvercompleteDictionary(4, random_state=0, max_iter=8)]
)
def test_scikit_learns_checks(estimator, check):
    check(estimator)


@pytest.mark.parametrize("seed", range(5))
def test_a_complete_dictionary_comes_back(seed):
    X, D = complete(seed)
    learnt = CompleteDictionary(random_state=seed).fit(X)
    assert matched_cosines(learnt.dictionary_, D).min() > 0.99
    assert matched_cosines(torch.linalg.qr(torch.randn(16, 16).double())[0], D).min() < 0.9


@pytest.mark.slow
def test_complete_dictionaries_come_back_from_all_of_twenty_seeds():
    rates = []
    for seed in range(20):
        X, D = complete(seed, n=5000)
        rates.append(
            float(
                (matched_cosines(CompleteDictionary(random_state=seed).fit(X).dictionary_, D) > 0.99)
                .double()
                .mean()
            )
        )
    assert rates == [1.0] * 20


@pytest.mark.parametrize("seed", range(1))
def test_an_overcomplete_dictionary_comes_back(seed):
    X, D = overcomplete(seed)
    learnt = OvercompleteDictionary(24, sparsity=0.2, random_state=seed, max_iter=200).fit(X)
    cosines = matched_cosines(learnt.dictionary_, D)
    assert (cosines > 0.99).double().mean() >= 0.95
    assert (matched_cosines(X[:24].mT, D) > 0.99).double().mean() < 0.2  # where it began


@pytest.mark.slow
def test_overcomplete_dictionaries_come_back_from_twenty_seeds():
    rates = []
    for seed in range(20):
        X, D = overcomplete(seed)
        learnt = OvercompleteDictionary(24, sparsity=0.2, random_state=seed, max_iter=200).fit(X)
        rates.append(float((matched_cosines(learnt.dictionary_, D) > 0.99).double().mean()))
    assert np.mean(rates) > 0.96  # all atoms from 14 of the seeds, all but one to three from the others


def test_any_invertible_mixing_is_undone_by_whitening():
    mix = torch.tensor([[1.0, 0.9, 0], [0, 0.5, 0.4], [0.3, 0, 2]]).double()
    X, _ = complete(0, n=20_000, mix=mix)
    learnt = CompleteDictionary(random_state=0).fit(X)
    assert matched_cosines(learnt.dictionary_, mix).min() > 0.995
    z = learnt.transform(X)
    torch.testing.assert_close(learnt.inverse_transform(z), X)
    torch.testing.assert_close(z.square().mean(0), torch.ones(3).double())


def test_samples_in_fewer_dimensions_get_fewer_atoms():
    mix = torch.randn(7, 3, dtype=torch.float64)
    X, _ = complete(0, n=5000, mix=mix)
    learnt = CompleteDictionary(random_state=0).fit(X)
    assert learnt.dictionary_.shape == (7, 3)
    assert matched_cosines(learnt.dictionary_, mix).min() > 0.99
    torch.testing.assert_close(learnt.analysis_.mT @ learnt.dictionary_, torch.eye(3).double())
    torch.testing.assert_close(learnt.inverse_transform(learnt.transform(X)), X)


def test_it_stops_when_the_atoms_rest_and_not_before():
    X, _ = complete(0)
    seen = []
    learnt = CompleteDictionary(random_state=0, tol=1e-8).fit(X, on_step=seen.append)
    assert len(seen) == learnt.n_iter_
    moves = [(record.z_next - record.z).norm().item() for record in seen]
    assert moves[-1] <= 1e-8 < moves[0]
    values = [record.step.objective(record.z, record.z).item() for record in seen]
    assert all(b <= a + 1e-9 * abs(a) for a, b in pairwise(values))


def test_each_turn_lowers_the_objective_and_keeps_atoms_in_the_ball():
    X, _ = overcomplete(3, n=400)
    learnt = OvercompleteDictionary(24, sparsity=0.2, random_state=0, max_iter=200).fit(X)
    assert all(b <= a * (1 + 1e-6) for a, b in pairwise(learnt.objective_))
    assert learnt.objective_[-1] < 0.9 * learnt.objective_[0]
    assert learnt.n_iter_ == len(learnt.objective_)
    assert (learnt.dictionary_.norm(dim=0) <= 1 + 1e-9).all()


def test_updating_an_atom_is_exact():
    """No step of projected gradient lowers what the sweep has converged to."""
    X, D = overcomplete(0, n=200)
    codes = sparse_code(X, D + 0.1, 0.2).codes
    atoms = D + 0.1
    for _ in range(300):
        atoms = update_atoms(atoms, X, codes)
    gradient = (atoms @ codes.mT - X.mT) @ codes
    moved = atoms - 1e-3 * gradient
    projected = moved / moved.norm(dim=0).clamp_min(1)
    torch.testing.assert_close(projected, atoms, rtol=0, atol=1e-7)


def test_an_unused_atom_becomes_the_sample_explained_worst():
    X, D = overcomplete(0, n=50)
    codes = sparse_code(X, D, 0.2).codes
    codes[:, 4] = 0
    X[7] += 100
    before = lasso(codes, X, D, 0.2)
    atoms = update_atoms(D, X, codes)
    torch.testing.assert_close(atoms[:, 4], X[7] / X[7].norm())
    assert lasso(codes, X, atoms, 0.2) <= before


def test_nonnegative_codes_of_nonnegative_parts():
    rng = torch.Generator().manual_seed(0)
    D = torch.nn.functional.normalize(torch.rand(12, 6, generator=rng).double() ** 4, dim=0)
    X = (torch.rand(600, 6, generator=rng) < 0.3).double() * (1 + torch.rand(600, 6, generator=rng)) @ D.mT
    learnt = OvercompleteDictionary(6, sparsity=0.05, nonnegative=True, random_state=0, max_iter=300).fit(X)
    assert (learnt.transform(X) >= 0).all()
    assert matched_cosines(learnt.dictionary_, D).min() > 0.98


def test_matching_forgets_order_sign_and_scale_and_nothing_else():
    D = torch.randn(6, 4)
    other = -3 * D[:, [2, 0, 3, 1]]
    torch.testing.assert_close(matched_cosines(other, D), torch.ones(4))
    twice = D[:, [0, 0, 1, 2]]  # an atom stands for one only
    assert (matched_cosines(twice, D) > 0.999).sum() == 3
    assert matched_cosines(D[:, :2], D).count_nonzero() == 2


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensors_stay_tensors_of_their_precision(cls, dtype):
    X, _ = complete(0, d=6, n=500, dtype=dtype)
    learnt = cls(random_state=0, max_iter=20).fit(X)
    z = learnt.transform(X)
    assert isinstance(z, torch.Tensor)
    assert z.dtype == learnt.dictionary_.dtype == learnt.inverse_transform(z).dtype == dtype
    assert cls(random_state=0, max_iter=20).fit(X.numpy()).transform(X.numpy()).dtype == X.numpy().dtype


@both
def test_deterministic_and_pickles(cls):
    X, _ = complete(0, d=6, n=300)
    a, b, c = (cls(random_state=seed, max_iter=20).fit(X) for seed in (1, 1, 2))
    assert torch.equal(a.dictionary_, b.dictionary_)
    assert not torch.equal(a.dictionary_, c.dictionary_)
    assert torch.equal(pickle.loads(pickle.dumps(a)).transform(X), a.transform(X))  # noqa: S301


@both
@pytest.mark.parametrize(
    ("X", "message"),
    [
        (np.zeros((5, 3)), "all zero"),
        (np.ones((1, 3)), "minimum of 2"),
        (np.full((5, 3), np.inf), "infinity"),
    ],
)
def test_bad_input_is_named(cls, X, message):
    with pytest.raises(ValueError, match=message):
        cls().fit(X)


def test_options_that_cannot_be():
    with pytest.raises(ValueError, match="n_atoms 0"):
        OvercompleteDictionary(0).fit(np.random.default_rng(0).random((5, 3)))


def test_too_few_iterations_are_told():
    X, _ = complete(0, n=300)
    with pytest.warns(ConvergenceWarning, match="atoms still move"):
        CompleteDictionary(max_iter=2, random_state=0).fit(X)
    with pytest.warns(ConvergenceWarning, match="still falls"):
        OvercompleteDictionary(max_iter=2, random_state=0).fit(X)
