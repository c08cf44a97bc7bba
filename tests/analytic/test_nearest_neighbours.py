"""Weighted nearest neighbours: against scikit-learn's with the same weights, and on planted directions."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import LeaveOneOut, cross_val_predict, train_test_split
from sklearn.neighbors import KNeighborsClassifier
from sklearn.utils.estimator_checks import parametrize_with_checks

from pellucid.analytic import NearestNeighbours, nearest_neighbours
from pellucid.analytic.saved import load_estimator, save_estimator


@parametrize_with_checks([NearestNeighbours(), NearestNeighbours(3, temperature=1.0)])
def test_scikit_learn(estimator, check):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(estimator)


def oracle(k=20, temperature=0.07):
    return KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / temperature)
    )


@pytest.fixture(scope="module")
def digits():
    X, y = load_digits(return_X_y=True)
    return train_test_split(X - X.mean(0), y, test_size=0.25, stratify=y, random_state=0)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (5, 1.0), (20, 0.01)])
def test_it_is_scikit_learns_with_these_weights(digits, k, temperature):
    X, X_test, y, _ = digits
    ours = NearestNeighbours(k, temperature).fit(X, y)
    theirs = oracle(k, temperature).fit(X, y)
    np.testing.assert_allclose(
        ours.predict_proba(X_test), theirs.predict_proba(X_test), rtol=1e-9, atol=1e-12
    )
    assert (ours.predict(X_test) == theirs.predict(X_test)).all()
    cosines, index = ours.kneighbors(X_test)
    distances, theirs_index = theirs.kneighbors(X_test)
    np.testing.assert_allclose(cosines, 1 - distances, atol=1e-12)
    assert (index == theirs_index).all()


def test_digits(digits):
    X, X_test, y, y_test = digits
    assert NearestNeighbours().fit(X, y).score(X_test, y_test) > 0.96


@pytest.mark.parametrize("chunk", [1, 7_000, 1 << 24])
def test_leaving_one_out_by_its_definition(digits, chunk, monkeypatch):
    monkeypatch.setattr(nearest_neighbours, "CHUNK", chunk)
    X, y = digits[0][:120], digits[2][:120]
    fitted = NearestNeighbours(5).fit(X, y)
    assert (fitted.predict(None) == cross_val_predict(NearestNeighbours(5), X, y, cv=LeaveOneOut())).all()
    assert fitted.score(None, y) == pytest.approx((fitted.predict(None) == y).mean())
    _, index = fitted.kneighbors()
    assert not (index == np.arange(120)[:, None]).any()
    every, _ = fitted.kneighbors(n_neighbors=500)
    assert every.shape == (120, 119)
    assert np.isfinite(every).all()


def test_chunks_change_nothing(digits, monkeypatch):
    X, X_test, y, _ = digits
    fitted = NearestNeighbours().fit(X, y)
    whole = fitted.kneighbors(X_test)
    monkeypatch.setattr(nearest_neighbours, "CHUNK", 10_000)
    for one, other in zip(fitted.kneighbors(X_test), whole, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-12)


def test_lengths_have_no_say_and_nothing_overflows():
    random = np.random.default_rng(0)
    X, y = random.normal(size=(60, 8)), np.arange(60) % 3
    scale = 10.0 ** random.uniform(-6, 6, size=(60, 1))
    plain, scaled = NearestNeighbours(4, 1e-4).fit(X, y), NearestNeighbours(4, 1e-4).fit(scale * X, y)
    rows = random.normal(size=(9, 8))
    np.testing.assert_allclose(scaled.predict_proba(1e5 * rows), plain.predict_proba(rows), atol=1e-9)
    assert np.isfinite(plain.predict_proba(rows)).all()


def test_collapsed_features_are_no_error():
    """What a failed training gives is what this is asked about."""
    y = np.arange(30) % 3
    for X in (np.ones((30, 4)), np.zeros((30, 4))):
        fitted = NearestNeighbours(30).fit(X, y)
        np.testing.assert_allclose(fitted.predict_proba(X[:2]), 1 / 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torch_in_torch_out(digits, dtype):
    X, X_test, y, _ = digits
    rows, test = torch.from_numpy(X).to(dtype), torch.from_numpy(X_test).to(dtype)
    fitted = NearestNeighbours().fit(rows, torch.from_numpy(y))
    assert fitted.rows_.dtype == dtype
    assert torch.equal(fitted.predict(test), torch.from_numpy(fitted.predict(test.numpy())))
    assert fitted.predict_proba(test).dtype == dtype
    assert isinstance(fitted.predict(None), torch.Tensor)
    assert all(isinstance(part, torch.Tensor) for part in fitted.kneighbors())
    named = NearestNeighbours().fit(rows, np.array([f"digit {k}" for k in y]))
    assert named.predict(test)[0] == f"digit {fitted.predict(test)[0]}"


def test_half_precision_rows_are_compared_in_float32(digits):
    X, X_test, y, _ = digits
    fitted = NearestNeighbours().fit(torch.from_numpy(X).half(), y)
    assert fitted.rows_.dtype == torch.float32
    assert (
        fitted.predict(torch.from_numpy(X_test).half()).numpy() == oracle().fit(X, y).predict(X_test)
    ).all()


def test_it_comes_back_from_its_files(digits, tmp_path):
    X, X_test, y, _ = digits
    fitted = NearestNeighbours(7, 0.1).fit(X, y)
    for name, content in save_estimator(fitted).items():
        (tmp_path / name).write_bytes(content)
    kept = load_estimator(tmp_path)
    assert kept.get_params() == {"n_neighbors": 7, "temperature": 0.1}
    assert np.array_equal(kept.predict_proba(X_test), fitted.predict_proba(X_test))


@pytest.mark.parametrize(
    ("options", "X", "y", "message"),
    [
        ({"n_neighbors": 0}, np.eye(4), [0, 0, 1, 1], "n_neighbors is 0; expected a whole number"),
        ({"n_neighbors": 1.5}, np.eye(4), [0, 0, 1, 1], "n_neighbors is 1.5"),
        ({"temperature": 0}, np.eye(4), [0, 0, 1, 1], "temperature is 0"),
        ({}, np.full((4, 3), np.nan), [0, 0, 1, 1], "NaN"),
        ({}, np.eye(4), None, "requires y"),
        ({}, np.eye(4), [0.5, 0.1, 0.2, 0.7], "Unknown label type"),
        ({}, np.eye(4), [0, 1], "inconsistent numbers of samples"),
    ],
)
def test_refuses(options, X, y, message):
    with pytest.raises(ValueError, match=message):
        NearestNeighbours(**options).fit(X, y)


def test_refuses_what_has_no_other():
    with pytest.raises(ValueError, match="one training row"):
        NearestNeighbours().fit(np.eye(3)[:1], [0]).predict(None)
    with pytest.raises(ValueError, match="expecting 3 features"):
        NearestNeighbours().fit(np.eye(3), [0, 1, 1]).predict(np.eye(4))
