"""Clustering by coding length: the greedy algorithm written out, planted subspaces, known rates."""

import functools
import math
import pickle  # noqa: TID251 - an estimator must survive it
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans, SpectralClustering
from sklearn.metrics import adjusted_rand_score
from sklearn.utils.estimator_checks import parametrize_with_checks

from pellucid.analytic.lossy import LossyCodingClustering, covering, gaussian_rate_distortion
from pellucid.objectives import coding_rate

BLOBS = "blobs differ by place; subspaces through the origin know directions only"


@parametrize_with_checks(
    [LossyCodingClustering(), LossyCodingClustering(center=False)],
    expected_failed_checks=lambda estimator: {} if estimator.center else {"check_clustering": BLOBS},
)
def test_scikit_learn(estimator, check):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(estimator)


def planted(ranks, d, n, noise, seed=0):
    """``n`` rows near each of some random subspaces, and whose they are."""
    random = np.random.default_rng(seed)
    parts = [random.normal(size=(n, r)) @ np.linalg.qr(random.normal(size=(d, r)))[0].T for r in ranks]
    X = np.concatenate(parts)
    order = random.permutation(len(X))
    return (X + noise * random.normal(size=X.shape))[order], np.repeat(np.arange(len(ranks)), n)[order]


# --- the algorithm, written out ---------------------------------------------------------------------------


def length(rows, n, eps, center):
    """Nats for one cluster of ``n`` rows in all, its label's among them."""
    rows, d = torch.from_numpy(rows), rows.shape[1]
    mean = rows.mean(0) if center else torch.zeros(d, dtype=rows.dtype)
    coordinates = (len(rows) + d) * coding_rate(rows - mean, eps).item()
    place = d / 2 * math.log(1 + (mean @ mean).item() / eps**2)
    return coordinates + place - len(rows) * math.log(len(rows) / n)


def greedy(X, eps, center):
    """Clusters as sets of rows, and the total lengths on the way."""
    clusters = [frozenset([i]) for i in range(len(X))]
    known = functools.cache(lambda rows: length(X[sorted(rows)], len(X), eps, center))

    def total(clusters):
        return sum(map(known, clusters))

    totals = [total(clusters)]
    while len(clusters) > 1:
        pairs = [(a, b) for a in range(len(clusters)) for b in range(a)]
        merged = [[c for i, c in enumerate(clusters) if i not in pair] for pair in pairs]
        merged = [[*m, clusters[a] | clusters[b]] for m, (a, b) in zip(merged, pairs, strict=True)]
        best = min(merged, key=total)
        if total(best) >= totals[-1]:
            break
        clusters, totals = best, [*totals, total(best)]
    return set(clusters), totals


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize(("ranks", "d", "n"), [((1, 2), 3, 8), ((1, 1, 1), 2, 5), ((2, 2), 30, 6)])
def test_is_the_greedy_algorithm(ranks, d, n, center):
    X, _ = planted(ranks, d, n, 0.05)
    X = X + 0.5 * center
    for eps in (0.1, 0.5, 3.0):
        fitted = LossyCodingClustering(eps, center=center).fit(X)
        clusters, totals = greedy(X, eps, center)
        assert {frozenset(np.flatnonzero(fitted.labels_ == k)) for k in range(fitted.n_clusters_)} == clusters
        np.testing.assert_allclose(fitted.coding_lengths_, totals, rtol=1e-9)
        assert fitted.coding_lengths_.diff().max() < 0


@pytest.mark.parametrize("center", [True, False])
def test_the_path_leads_to_the_labels_and_the_moments(center):
    X, _ = planted((1, 2, 2), 4, 20, 0.05)
    fitted = LossyCodingClustering(0.2, center=center).fit(X)
    clusters = {i: [i] for i in range(len(X))}
    for t, (a, b) in enumerate(fitted.merge_path_.tolist()):
        clusters[len(X) + t] = clusters.pop(a) + clusters.pop(b)
    assert len(clusters) == fitted.n_clusters_ == len(fitted.sizes_)
    assert len(fitted.coding_lengths_) == len(fitted.merge_path_) + 1
    for rows in clusters.values():
        (k,) = set(fitted.labels_[rows].tolist())
        mean = X[rows].mean(0) if center else np.zeros(4)
        assert fitted.sizes_[k] == len(rows) == (fitted.labels_ == k).sum()
        np.testing.assert_allclose(fitted.means_[k], mean, atol=1e-12)
        np.testing.assert_allclose(fitted.scatters_[k], (X[rows] - mean).T @ (X[rows] - mean), atol=1e-12)
    assert [fitted.labels_.tolist().index(k) for k in range(fitted.n_clusters_)] == sorted(
        fitted.labels_.tolist().index(k) for k in range(fitted.n_clusters_)
    )


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("d", [3, 40])
def test_predicts_what_a_row_adds_least_to(center, d):
    X, _ = planted((1, 1), d, 16, 0.002)
    eps = 0.02 * d**0.5
    fitted = LossyCodingClustering(eps, center=center).fit(X)
    assert fitted.n_clusters_ > 1
    new = 2 * np.random.default_rng(5).normal(size=(10, d))
    for row, found in zip(new, fitted.predict(new), strict=True):
        added = []
        for k in range(fitted.n_clusters_):
            rows, share = X[fitted.labels_ == k], (fitted.labels_ == k).mean()
            more = np.concatenate([rows, row[None]])
            bare = [length(part, len(part), eps, center) for part in (more, rows)]
            added.append(bare[0] - bare[1] - math.log(share))
        assert found == np.argmin(added)


# --- what it is for ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "d", "n", "noise"),
    [((1, 1, 2), 3, 60, 0.02), ((2, 2, 2), 8, 60, 0.05), ((1, 2, 3, 4), 10, 60, 0.05)],
)
def test_finds_planted_subspaces_and_their_number(ranks, d, n, noise):
    """Where scikit-learn's clusterings, told the number, do not."""
    for seed in range(3):
        X, y = planted(ranks, d, n, noise, seed)
        fitted = LossyCodingClustering(noise * d**0.5, center=False).fit(X)
        found = adjusted_rand_score(y, fitted.labels_)
        assert fitted.n_clusters_ == len(ranks)
        assert found > 0.88
        for other in (
            KMeans(len(ranks), n_init=10, random_state=0),
            SpectralClustering(len(ranks), affinity="nearest_neighbors", random_state=0),
        ):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert adjusted_rand_score(y, other.fit(X).labels_) < found - 0.05


def test_the_distortion_says_how_fine():
    X, _ = planted((1, 2), 3, 40, 0.02)
    numbers = [LossyCodingClustering(eps).fit(X).n_clusters_ for eps in (1e-4, 0.05, 30.0)]
    assert numbers[0] > numbers[1] > numbers[2] == 1


def test_clusters_off_the_origin_are_found_with_their_means():
    random = np.random.default_rng(0)
    X, y = random.normal(size=(120, 4)), np.arange(120) % 3
    X = 0.1 * X + 3 * random.normal(size=(3, 4))[y]
    assert adjusted_rand_score(y, LossyCodingClustering(0.2).fit(X).labels_) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torch_in_torch_out(dtype):
    X, _ = planted((1, 2), 3, 20, 0.02)
    rows = torch.from_numpy(X).to(dtype)
    fitted, same = LossyCodingClustering(0.1).fit(rows), LossyCodingClustering(0.1).fit(rows.numpy())
    assert isinstance(fitted.labels_, torch.Tensor)
    assert fitted.scatters_.dtype == dtype
    assert fitted.labels_.tolist() == same.labels_.tolist()
    assert fitted.predict(rows).tolist() == same.predict(rows.numpy()).tolist()


def test_a_pickle_predicts_the_same():
    X, _ = planted((1, 2), 3, 20, 0.02)
    fitted = LossyCodingClustering(0.1).fit(X)
    again = pickle.loads(pickle.dumps(fitted))  # noqa: S301 - ours
    assert np.array_equal(again.predict(X), fitted.predict(X))


@pytest.mark.parametrize(
    ("eps", "X", "message"),
    [
        (0.0, np.eye(3), "eps is 0.0; the distortion must be positive"),
        (float("nan"), np.eye(3), "eps is nan"),
        (1.0, np.ones((4, 2)), "all rows of X are equal"),
        (1.0, np.full((4, 2), np.nan), "NaN"),
        (1.0, np.ones((1, 2)), "minimum of 2"),
    ],
)
def test_refuses(eps, X, message):
    for rows in (X, torch.from_numpy(X)):
        with pytest.raises(ValueError, match=message):
            LossyCodingClustering(eps).fit(rows)


# --- rates ------------------------------------------------------------------------------------------------


def test_one_direction_is_the_textbook_s():
    for eps in (0.1, 0.5, 0.99):
        assert gaussian_rate_distortion(torch.tensor([1.0]).double(), eps) == pytest.approx(
            -math.log(eps), rel=1e-6
        )
    assert gaussian_rate_distortion(torch.tensor([1.0]), 1.0) == 0


@settings(deadline=None)
@given(
    variances=st.lists(st.floats(0, 100), min_size=1, max_size=8),
    share=st.floats(0.01, 1.5),
)
def test_water_is_filled_to_one_level(variances, share):
    variances = torch.tensor(variances, dtype=torch.float64)
    eps = max(share * variances.sum().item() ** 0.5, 1e-3)
    low, high = 0.0, 200.0
    for _ in range(200):  # the level, by bisection
        middle = (low + high) / 2
        low, high = (middle, high) if variances.clamp_max(middle).sum() < eps**2 else (low, middle)
    expected = 0.5 * torch.log(torch.clamp(variances / high, min=1)).sum()
    rate = gaussian_rate_distortion(variances, eps)
    assert rate == pytest.approx(expected.item(), rel=1e-6, abs=1e-9)
    # The coding rate of rows with these second moments is above it, and by little when eps is small.
    rows = torch.diag((len(variances) * variances).sqrt())
    assert rate <= coding_rate(rows, eps) + 1e-9


def test_the_coding_rate_approaches_it():
    variances = torch.tensor([4.0, 1.0, 0.25], dtype=torch.float64)
    rows = torch.diag((3 * variances).sqrt())
    gaps = [coding_rate(rows, eps) - gaussian_rate_distortion(variances, eps) for eps in (1.0, 0.1, 0.01)]
    assert gaps[0] > 0.1
    assert gaps[1] < 0.03
    assert gaps[2] < 3e-4


def test_a_covering_covers():
    X = torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
    for eps in (0.2, 1.0):
        words = X[covering(X, eps)]
        assert torch.cdist(X, words).amin(1).max() <= eps
        apart = torch.cdist(words, words) + 10 * torch.eye(len(words))
        assert apart.min() > eps
    assert len(covering(X, 100.0)) == 1
    assert len(covering(X[:5].repeat(3, 1), 1e-6)) == 5


def test_wrong_distortions_and_variances():
    for call in (
        lambda eps: covering(torch.ones(2, 2), eps),
        lambda eps: gaussian_rate_distortion(torch.ones(2), eps),
    ):
        with pytest.raises(ValueError, match=r"eps is 0\.0; the distortion must be positive"):
            call(0.0)
    with pytest.raises(ValueError, match="a variance is negative"):
        gaussian_rate_distortion(torch.tensor([1.0, -1.0]), 0.5)
