"""The nearest-subspace classifier: on planted subspaces, and against projections written out."""

import pickle  # noqa: TID251 - an estimator must survive it
import warnings

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.utils.estimator_checks import parametrize_with_checks

from pellucid.analytic.nearest_subspace import NearestSubspace

BLOBS = "blobs in the plane differ by place; lines through the origin know directions only"


@parametrize_with_checks(
    [NearestSubspace(), NearestSubspace(intercept=True)],
    expected_failed_checks=lambda estimator: (
        {} if estimator.intercept else {"check_classifiers_train": BLOBS}
    ),
)
def test_scikit_learn(estimator, check):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(estimator)


def planted(ranks=(1, 2, 3), d=10, n=40, noise=0.0, seed=0):
    """Rows on random subspaces, their labels, and the bases."""
    random = np.random.default_rng(seed)
    bases = [np.linalg.qr(random.normal(size=(d, r)))[0].T for r in ranks]
    X = np.concatenate([random.normal(size=(n, len(U))) @ U for U in bases])
    return X + noise * random.normal(size=X.shape), np.repeat(np.arange(len(ranks)), n), bases


def test_finds_planted_subspaces():
    X, y, bases = planted()
    fitted = NearestSubspace(1 - 1e-9).fit(X, y)
    assert fitted.ranks_.tolist() == [1, 2, 3]
    for U, found, rank in zip(bases, fitted.components_.numpy(), fitted.ranks_, strict=True):
        np.testing.assert_allclose(found.T @ found, U.T @ U, atol=1e-12)
        assert not found[rank:].any()
    assert (fitted.predict(X) == y).all()


def test_distances_are_those_to_the_projections():
    X, y, _ = planted(noise=0.3)
    fitted = NearestSubspace(2).fit(X, y)
    for k, scores in enumerate(fitted.decision_function(X).T):
        part = X[y == k]
        leading = np.linalg.eigh(part.T @ part)[1][:, -2:]
        np.testing.assert_allclose(-scores, np.linalg.norm(X @ (np.eye(10) - leading @ leading.T), axis=1))


def test_a_share_is_the_smallest_number_that_holds_it():
    X, y, _ = planted(ranks=(6, 6), noise=0.2)
    for share in (0.3, 0.8, 0.95):
        ranks = NearestSubspace(share).fit(X, y).ranks_
        for k, rank in enumerate(ranks):
            energy = np.linalg.svd(X[y == k])[1] ** 2
            held = energy.cumsum() / energy.sum()
            assert held[rank - 1] >= share
            assert rank == 1 or held[rank - 2] < share


def test_never_the_whole_space():
    X, y, _ = planted(ranks=(4, 4), d=4)
    assert NearestSubspace(100).fit(X, y).ranks_.tolist() == [3, 3]
    assert NearestSubspace(100).fit(X[[0, 1, 2, 50, 51]], y[[0, 1, 2, 50, 51]]).ranks_.tolist() == [3, 2]


def test_an_intercept_tells_parallel_lines_apart():
    random = np.random.default_rng(0)
    y = np.arange(200) % 2
    X = np.stack([random.normal(size=200), 2.0 * y - 1], 1) + 0.05 * random.normal(size=(200, 2))
    assert NearestSubspace(1).fit(X, y).score(X, y) < 0.7
    assert NearestSubspace(2, intercept=True).fit(X, y).score(X, y) == 1


def test_digits():
    X, y = load_digits(return_X_y=True)
    X, X_test, y, y_test = train_test_split(X, y, test_size=0.25, stratify=y, random_state=0)
    assert NearestSubspace(10).fit(X, y).score(X_test, y_test) == pytest.approx(0.98)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torch_in_torch_out(dtype):
    X, y, _ = planted(noise=0.1)
    rows = torch.from_numpy(X).to(dtype)
    fitted = NearestSubspace(2).fit(rows, torch.from_numpy(y))
    assert fitted.components_.dtype == dtype
    assert torch.equal(fitted.predict(rows), torch.from_numpy(fitted.predict(rows.numpy())))
    scores = fitted.decision_function(rows)
    assert scores.dtype == dtype
    assert fitted.decision_function(rows.numpy()).dtype == rows.numpy().dtype
    names = NearestSubspace(2).fit(rows, np.array(["a", "b", "c"])[y])
    assert names.predict(rows).tolist() == np.array(["a", "b", "c"])[fitted.predict(X)].tolist()


def test_a_pickle_predicts_the_same():
    X, y, _ = planted(noise=0.3)
    fitted = NearestSubspace().fit(X, y)
    again = pickle.loads(pickle.dumps(fitted))  # noqa: S301 - ours
    assert np.array_equal(again.decision_function(X), fitted.decision_function(X))


@pytest.mark.parametrize(
    ("options", "X", "y", "message"),
    [
        ({"n_components": 0}, np.eye(4), [0, 0, 1, 1], "n_components is 0; expected a whole number"),
        ({"n_components": 1.5}, np.eye(4), [0, 0, 1, 1], "n_components is 1.5"),
        ({}, np.ones((4, 3)), [0, 0, 1, 1], "all rows of X are equal"),
        ({}, np.full((4, 3), np.nan), [0, 0, 1, 1], "NaN"),
        ({}, np.eye(4), None, "requires y"),
        ({}, np.eye(4), [0.5, 0.1, 0.2, 0.7], "Unknown label type"),
        ({}, np.eye(4), [0, 1], "inconsistent numbers of samples"),
        ({}, np.eye(4)[:1], [0], "minimum of 2"),
    ],
)
def test_refuses(options, X, y, message):
    with pytest.raises(ValueError, match=message):
        NearestSubspace(**options).fit(X, y)
    if X.ndim == 2 and y is not None and len(X) == len(y):
        with pytest.raises(ValueError, match=message):
            NearestSubspace(**options).fit(torch.from_numpy(X), torch.tensor(y))


def test_refuses_another_width():
    X, y, _ = planted()
    with pytest.raises(ValueError, match="expecting 10 features"):
        NearestSubspace().fit(X, y).predict(X[:, :4])
