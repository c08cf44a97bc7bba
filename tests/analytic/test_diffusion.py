"""Diffusion models beside the posterior means that they should learn; whether they remember."""

import pickle  # noqa: TID251 - an estimator must survive it
from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.utils.estimator_checks import parametrize_with_checks

from pellucid.analytic import (
    Diffusion,
    Empirical,
    GaussianMixture,
    memorisation_ratio,
    memorised_share,
)
from pellucid.errors import ConfigError, DataError
from pellucid.models.denoiser import MLPDenoiser
from pellucid.objectives import VE, add_noise
from pellucid.steps import Denoise, unroll

SMALL = {"width": 16, "depth": 1, "train_steps": 5, "batch_size": 16, "sampling_steps": 5, "random_state": 0}


@parametrize_with_checks([Diffusion(**SMALL), Diffusion("ve", **SMALL)])
def test_scikit_learns_checks(estimator, check):
    check(estimator)


def two_clusters(n=2000, unit=1.0):
    """A mixture whose best denoiser is known, in a unit of choice."""
    means = torch.tensor([[-2.0, 0.0], [2.0, 1.0]]) * unit
    covariances = torch.stack([torch.eye(2) * 0.05, torch.tensor([[0.3, 0.2], [0.2, 0.3]])]) * unit**2
    mixture = GaussianMixture(means, covariances)
    return mixture, mixture.sample(n, torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=["vp", "ve", "flow"])
def learned(request):
    mixture, X = two_clusters(unit=30.0)
    torch.set_num_threads(1)
    return mixture, X, Diffusion(request.param, width=64, train_steps=500, random_state=0).fit(X)


def test_learns_the_posterior_mean(learned):
    """Closer to the closed form than the best linear denoiser by far, at every level that matters."""
    mixture, X, model = learned
    schedule = model.schedule_
    known = GaussianMixture(mixture.means, mixture.covariances, schedule=schedule)
    linear = GaussianMixture(X.mean(0)[None], X.T.cov()[None], schedule=schedule)
    clean = mixture.sample(1000, torch.Generator().manual_seed(1))
    for ratio in (0.1, 0.3, 1.0):
        t = float(schedule.level(ratio * model.scale_))
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(2))
        x_t = add_noise(clean, t, noise, schedule)
        best = known(x_t, t)
        miss, linear_miss = ((f - best).square().mean() for f in (model.denoise(x_t, t), linear(x_t, t)))
        assert miss < 0.2 * linear_miss
        torch.testing.assert_close(
            model.score_field(x_t, t),
            (schedule.alpha(t) * model.denoise(x_t, t) - x_t) / schedule.sigma(t) ** 2,
        )


@pytest.mark.parametrize("churn", [0.0, 0.3])
def test_samples_are_distributed_as_the_data(learned, churn):
    _, X, model = learned
    samples = model.sample(2000, churn=churn)
    left, true_left = samples[:, 0] < 0, X[:, 0] < 0
    assert float(left.float().mean()) == pytest.approx(float(true_left.float().mean()), abs=0.08)
    for side, true_side in ((left, true_left), (~left, ~true_left)):
        torch.testing.assert_close(samples[side].mean(0), X[true_side].mean(0), rtol=0, atol=0.15 * 30)
        torch.testing.assert_close(samples[side].T.cov(), X[true_side].T.cov(), rtol=0, atol=0.1 * 30**2)


def test_denoises_unseen_samples_better_than_it_began(learned):
    mixture, _, model = learned
    unseen = mixture.sample(500, torch.Generator().manual_seed(5))
    assert model.losses_.shape == (500,)
    assert float(model.losses_[:5].mean()) == pytest.approx(1, abs=0.15)
    assert -1 < model.score(unseen) < 0
    assert model.score(unseen) > model.score(unseen.flip(-1)) + 0.5  # of another distribution


def test_two_seeds_of_noise_differ_and_one_repeats():
    _, X = two_clusters(200)
    model = Diffusion(**SMALL).fit(X)
    again = Diffusion(**SMALL).fit(X)
    assert torch.equal(model.sample(7), again.sample(7))
    assert torch.equal(model.sample(7), model.sample(7))
    other = Diffusion(**{**SMALL, "random_state": 1}).fit(X)
    assert not torch.equal(model.sample(7), other.sample(7))
    assert not torch.equal(model.sample(7), model.sample(7, churn=0.5))
    assert torch.equal(model.sample(7, churn=0.5), again.sample(7, churn=0.5))


def test_leaves_torchs_random_numbers_alone():
    _, X = two_clusters(50)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    Diffusion(**SMALL).fit(X).sample(3)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("network", ["mlp", "crate"])
@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_pictures_and_rows_keep_kind_shape_and_precision(network, kind, dtype):
    pictures = np.random.default_rng(0).normal(size=(20, 3, 4, 8)).astype(dtype)
    model = Diffusion(network=network, **SMALL).fit(kind(pictures))
    for answer, shape in (
        (model.sample(3), (3, 3, 4, 8)),
        (model.denoise(kind(pictures), 0.5), pictures.shape),
        (model.score_field(kind(pictures), np.full(20, 0.5)), pictures.shape),
    ):
        assert type(answer) is type(kind(pictures))
        assert tuple(answer.shape) == shape
        assert answer.dtype == kind(pictures).dtype
        assert np.isfinite(np.asarray(answer)).all()
    rows = pictures[:, 0, :, :4].reshape(20, 16)
    flat = Diffusion(network=network, **SMALL).fit(kind(rows))
    assert tuple(flat.sample(3).shape) == (3, 16)


def test_counts_and_duplicates_of_rows_are_data_too():
    model = Diffusion(**SMALL).fit(np.array([[0, 1], [3, 4], [3, 4]]))
    assert model.sample(2).dtype == np.float64


def test_pickles_copies_and_takes_a_network_of_ones_own():
    _, X = two_clusters(50)
    network = MLPDenoiser(2, 16, 1)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    for model in (Diffusion(**SMALL).fit(X), Diffusion(VE(2.0), network, **SMALL).fit(X)):
        twin = pickle.loads(pickle.dumps(model))  # noqa: S301 - our own bytes
        assert torch.equal(twin.sample(5), model.sample(5))
        assert torch.equal(twin.denoise(X, 0.5), model.denoise(X, 0.5))
        assert torch.equal(clone(model).fit(X).sample(5), model.sample(5))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert model.schedule_ == VE(2.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "vq"}, "unknown schedule 'vq' - known: flow, ve, vp"),
        ({"network": "unet"}, "network is 'unet'; known: 'mlp', 'crate'"),
        ({"network": "crate"}, "2 numbers are no square gray picture"),
        ({"train_steps": 0}, "train_steps is 0"),
        ({"width": 0}, "width is 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        Diffusion(**{**SMALL, **options}).fit(two_clusters(20)[1])


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
@pytest.mark.parametrize(
    ("X", "message"),
    [
        (np.ones((5, 2)), "all samples are the same"),
        (np.array([[1.0, np.nan], [0, 1]]), "NaN"),
        (np.ones((1, 2)), "1 sample"),
        (np.ones((0, 2)), "0 sample"),
        (np.full((3, 1, 2, 2), np.inf), "infinity"),
        (np.ones((3, 2, 2)), "dim 3|3D"),
    ],
)
def test_data_that_cannot_be_learnt_is_named(kind, X, message):
    with pytest.raises(ValueError, match=message):
        Diffusion(**SMALL).fit(kind(X))


def test_questions_that_have_no_answer_are_named():
    _, X = two_clusters(20)
    with pytest.raises(NotFittedError):
        Diffusion().sample(3)
    model = Diffusion(**SMALL).fit(X)
    for question, message in (
        (lambda: model.sample(0), "n >= 1"),
        (lambda: model.sample(3, churn=-1), "churn >= 0"),
        (lambda: model.denoise(X, 0.0), "above 0 and at most 1; got 0"),
        (lambda: model.denoise(X, 1.5), "above 0 and at most 1; got 1.5"),
        (lambda: model.denoise(X, [0.1, 0.2]), "one level or 20"),
        (lambda: model.denoise(X[:, :1], 0.5), "1 features"),
    ):
        with pytest.raises(ValueError, match=message):
            question()


# --- memory -----------------------------------------------------------------------------------------------


def test_the_ratio_in_numbers():
    training = np.array([[0.0, 0.0], [4.0, 0.0], [0.0, 40.0]])
    ratio = memorisation_ratio(np.array([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [4.5, 0.0]]), training)
    assert ratio == pytest.approx([0, 1 / 3, 1, 0.5 / 4.5])
    assert memorised_share(np.array([[0.9, 0.0], [1.1, 0.0]]), training) == 0.5
    assert memorised_share(torch.tensor([[0.9, 0.0], [1.1, 0.0]]), torch.as_tensor(training), 0.1) == 0


def test_duplicates_and_pictures():
    training = torch.tensor([[1.0, 1.0], [1.0, 1.0], [5.0, 5.0]])
    assert memorisation_ratio(training, training).tolist() == [0, 0, 0]
    pictures = training.reshape(3, 1, 1, 2)
    assert memorisation_ratio(pictures, pictures).tolist() == [0, 0, 0]


def test_small_distances_between_large_numbers():
    training = np.array([[1e6, 0.0], [1e6, 1e-3]])
    assert memorisation_ratio(np.array([[1e6, 2.5e-4]]), training) == pytest.approx([1 / 3], rel=1e-6)


@pytest.mark.parametrize(
    ("samples", "training", "message"),
    [
        (np.ones((3, 2)), np.ones((3, 3)), "do not fit"),
        (np.ones(3), np.ones(3), "do not fit"),
        (np.ones((3, 2)), np.ones((3, 2)), "two different"),
        (np.full((3, 2), np.nan), np.eye(2), "NaN"),
    ],
)
def test_without_two_neighbours_there_is_no_ratio(samples, training, message):
    with pytest.raises(DataError, match=message):
        memorisation_ratio(samples, training)


def test_the_empirical_denoiser_remembers_and_the_distributions_own_does_not():
    """Samplers of the training points' best denoiser, and of that of the law that they came from."""
    torch.manual_seed(0)
    law = GaussianMixture(torch.zeros(1, 5), torch.eye(5)[None])
    training = law.sample(40)

    def drawn(denoiser):
        grid = VE().grid(60)
        layers = [Denoise(denoiser, VE(), t, t_next) for t, t_next in pairwise(grid)]
        return unroll(layers, 40 * torch.randn(300, 1, 5)).squeeze(1)

    assert memorised_share(drawn(Empirical(training)), training) > 0.99
    assert memorised_share(drawn(law), training) < 0.05
    assert memorised_share(law.sample(300), training) < 0.05
