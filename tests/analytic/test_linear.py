"""PCA beside scikit-learn's, and what must hold of any: the optimum, the autoencoder, the Gaussian."""

import pickle  # noqa: TID251 - an estimator must survive it
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.decomposition import PCA as ReferencePCA  # noqa: N811
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.estimator_checks import parametrize_with_checks

from pellucid.analytic.linear import PCA
from pellucid.objectives import captured_energy

methods = pytest.mark.parametrize("method", ["svd", "power"])


def samples(n=80, d=6, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.standard_normal((d, d)))[0]
    return (rng.standard_normal((n, d)) * np.geomspace(3, 0.3, d) @ turn + rng.standard_normal(d)).astype(
        dtype
    )


@parametrize_with_checks([PCA(), PCA(method="power", random_state=0), PCA(center=False)])
def test_scikit_learns_checks(estimator, check):
    check(estimator)


@methods
@pytest.mark.parametrize("shape", [(80, 6), (5, 9)])
@pytest.mark.parametrize("k", [1, 3])
def test_equal_to_scikit_learn(method, shape, k):
    X = samples(*shape)
    ours = PCA(k, method=method, random_state=0, tol=1e-12).fit(X)
    theirs = ReferencePCA(k, svd_solver="full").fit(X)
    signs = np.sign((ours.components_.numpy() * theirs.components_).sum(1))
    np.testing.assert_allclose(signs[:, None] * theirs.components_, ours.components_, atol=1e-8)
    np.testing.assert_allclose(ours.transform(X), theirs.transform(X) * signs, atol=1e-7)
    np.testing.assert_allclose(
        ours.inverse_transform(ours.transform(X)), theirs.inverse_transform(theirs.transform(X)), atol=1e-7
    )
    for name in ("mean_", "explained_variance_", "explained_variance_ratio_", "noise_variance_"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-9, atol=1e-12)
    if shape[0] > shape[1]:
        np.testing.assert_allclose(ours.score_samples(X), theirs.score_samples(X), rtol=1e-8)
        assert ours.score(X) == pytest.approx(theirs.score(X), rel=1e-9)


@methods
def test_without_centring_the_directions_are_eigenvectors_of_the_second_moment(method):
    X = samples()
    pca = PCA(2, center=False, method=method, random_state=0, tol=1e-12).fit(X)
    moment = X.T @ X / len(X)
    U = pca.components_.numpy()
    np.testing.assert_allclose(U @ moment, pca.explained_variance_.numpy()[:, None] * U, atol=1e-8)
    assert not pca.mean_.any()
    assert abs(U[0] @ PCA(2).fit(X).components_.numpy()[0]) < 0.999  # and the mean does matter here


@given(st.integers(1, 4), st.integers(0, 1000))
def test_no_other_directions_reconstruct_better(k, seed):
    X = torch.from_numpy(samples(30, 5, seed))
    pca = PCA(k).fit(X)
    centred = X - pca.mean_
    best = (X - pca.inverse_transform(pca.transform(X))).square().sum() / 2
    torch.testing.assert_close(best, centred.square().sum() / 2 - captured_energy(pca.components_, centred))
    other = torch.linalg.qr(torch.randn(5, k, generator=torch.Generator().manual_seed(seed)).double())[0].mT
    near = torch.linalg.qr((pca.components_ + 0.01 * other).mT)[0].mT
    for U in (other, near):
        assert (centred - centred @ U.mT @ U).square().sum() / 2 >= best - 1e-10


def test_signs_are_fixed():
    X = samples()
    for pca in (PCA().fit(X), PCA().fit(-X), PCA(method="power", random_state=3).fit(X)):
        U = pca.components_
        assert (U.gather(1, U.abs().argmax(1, keepdim=True)) > 0).all()
    np.testing.assert_allclose(PCA().fit(X).components_, PCA().fit(-X).components_, atol=1e-12)


def test_the_autoencoder_is_the_estimator_and_its_optimum():
    X = torch.from_numpy(samples())
    pca = PCA(2).fit(X)
    network = pca.autoencoder()
    torch.testing.assert_close(network.encode(X), pca.transform(X))
    torch.testing.assert_close(network(X), pca.inverse_transform(pca.transform(X)))
    (X - network(X)).square().sum().backward()
    for parameter in network.parameters():  # gradient descent has nothing left to find
        assert parameter.grad.abs().max() < 1e-9
    with torch.no_grad():
        network.components.mul_(1.1)
    assert not torch.equal(network.components, pca.components_)


def test_probabilistic_pca_finds_the_planted_noise():
    rng = np.random.default_rng(0)
    X = 2 * rng.standard_normal((20000, 2)) @ rng.standard_normal((2, 10)) + 0.3 * rng.standard_normal(
        (20000, 10)
    )
    pca = PCA(2).fit(X)
    assert pca.noise_variance_ == pytest.approx(0.09, rel=0.02)
    scores = {k: PCA(k).fit(X[:10000]).score(X[10000:]) for k in (1, 2)}
    assert scores[2] > scores[1] + 1


def test_a_gaussian_without_noise_has_no_density():
    X = samples(30, 2) @ np.array([[1.0, 0, 1], [0, 1.0, 1]])
    pca = PCA(2).fit(X)
    pca.noise_variance_ = 0.0
    with pytest.raises(ValueError, match="no density in 3"):
        pca.score(X)


def test_power_iteration_is_seen_step_by_step_and_never_falls():
    seen = []
    PCA(2, method="power", random_state=0).fit(samples(), on_step=seen.append)
    values = [-record.step.objective(record.z, record.z).item() for record in seen]
    assert len(seen) >= 10
    assert values[-1] > 1.05 * values[0]
    assert all(b >= a - 1e-12 * abs(a) for a, b in pairwise(values))


def test_too_few_iterations_are_told():
    with pytest.warns(ConvergenceWarning, match="2 directions still turn by"):
        pca = PCA(2, method="power", max_iter=3, random_state=0).fit(samples())
    assert pca.n_iter_ == 3


@methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensors_stay_tensors_of_their_precision(method, dtype):
    X = torch.from_numpy(samples()).to(dtype)
    pca = PCA(2, method=method, random_state=0).fit(X)
    z = pca.transform(X)
    assert isinstance(z, torch.Tensor)
    assert z.dtype == pca.components_.dtype == pca.inverse_transform(z).dtype == dtype
    torch.testing.assert_close(
        z, torch.as_tensor(PCA(2).fit(X.double()).transform(X.double())).to(dtype), rtol=1e-3, atol=1e-3
    )
    assert PCA(2).fit(X.numpy()).transform(X.numpy()).dtype == X.numpy().dtype


@methods
def test_deterministic_and_pickles(method):
    X = samples()
    a, b = (PCA(2, method=method, random_state=7).fit(X) for _ in range(2))
    assert torch.equal(a.components_, b.components_)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(a)).transform(X), a.transform(X))  # noqa: S301


@pytest.mark.parametrize(
    ("X", "options", "message"),
    [
        (np.ones((5, 3)), {}, "constant - there is no direction"),
        (np.full((50, 3), 0.1), {}, "constant"),
        (samples()[:1], {}, "minimum of 2"),
        (np.zeros((0, 3)), {}, "0 sample"),
        (np.where(samples() > 2, np.nan, samples()), {}, "NaN"),
        (torch.full((5, 3), float("nan")), {}, "NaN"),
        (samples(), {"n_components": 7}, r"between 1 and min\(n, d\) = 6"),
        (samples(), {"n_components": 0}, "between 1"),
        (samples(), {"method": "sdv"}, "did you mean 'svd'"),
    ],
)
def test_bad_input_is_named(X, options, message):
    with pytest.raises(ValueError, match=message):
        PCA(**options).fit(X)


def test_another_width_is_refused():
    with pytest.raises(ValueError, match=r"5 features.*expecting 6"):
        PCA().fit(samples()).transform(samples(d=5))


def test_large_constant_offsets_do_not_look_like_variance():
    X = samples() + 1e6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pca = PCA(2).fit(X)
    np.testing.assert_allclose(pca.explained_variance_, PCA(2).fit(samples()).explained_variance_, rtol=1e-6)
