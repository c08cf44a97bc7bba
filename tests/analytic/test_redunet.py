"""ReduNet: equal to what the published program built, its rise, its shifts, and what it reaches on digits."""

import math
import pickle  # noqa: TID251 - an estimator must survive it
import warnings

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch.nn import functional as F

from pellucid.analytic.redunet import ReduNet
from pellucid.objectives import rate_reduction
from pellucid.steps import unroll

BLOBS = "blobs in the plane differ by place; a network on the sphere knows directions only"


@parametrize_with_checks(
    [ReduNet(5), ReduNet(5, intercept=True)],
    expected_failed_checks=lambda estimator: (
        {} if estimator.intercept else {"check_classifiers_train": BLOBS}
    ),
)
def test_scikit_learn(estimator, check):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(estimator)


@pytest.fixture(scope="module")
def digits():
    X, y = load_digits(return_X_y=True)
    return train_test_split((X / 16).astype(np.float32), y, test_size=0.25, stratify=y, random_state=0)


def classes_on_planes(n=60, d=8, seed=0):
    random = np.random.default_rng(seed)
    y = np.arange(n) % 3
    bases = random.normal(size=(3, 2, d))
    X = np.einsum("nr,nrd->nd", random.normal(size=(n, 2)), bases[y])
    return X + 0.1 * random.normal(size=X.shape), y


def test_equals_the_published_program(recorded):
    data = recorded("redunet")
    meta = data["meta"]
    layers = 1 + max(int(key.split("/")[1]) for key in data if key.startswith("layers/"))
    net = ReduNet(layers, eps=math.sqrt(meta["eps"]), step_size=meta["eta"], sharpness=meta["lmbda"])
    features = net.fit_transform(data["X"], data["y"])

    def close(actual, expected):
        torch.testing.assert_close(actual.detach(), expected, rtol=1e-5, atol=1e-5)

    seen = []
    unroll(net.layers_, net.start(data["X"])[None], on_step=seen.append)
    for i, (step, record) in enumerate(zip(net.layers_, seen, strict=True)):
        expected = {key.split("/")[2]: v for key, v in data.items() if key.startswith(f"layers/{i}/")}
        close(step.expand, expected["E"])
        close(step.compress, expected["C"])
        close(step.share, expected["gam"])
        close(record.z[0], expected["in"])
        close(record.z_next[0], expected["out"])
        assert torch.equal(step.membership(record.z)[0].argmax(-1), expected["pred"].flatten())
    close(features, expected["out"])
    close(net.transform(data["X"]), expected["out"])


@pytest.mark.parametrize("shape", [None, (4,)])
def test_true_labels_make_every_layer_a_step_up(shape):
    """Up to the step size that the theorem gives; and estimated ones, where no class is clear, do worse."""
    X, y = classes_on_planes()
    dim = 8 if shape is None else 2
    eps = 0.3
    net = ReduNet(
        8, eps=eps, labels="true", shape=shape, step_size=8 * len(X) * eps**2 / (9 * dim), sharpness=1.0
    )
    features = torch.from_numpy(net.fit_transform(X, y))
    z, gains = net.start(torch.from_numpy(X)), []
    known = F.one_hot(torch.from_numpy(y)).double()
    for step in net.layers_:
        step.membership = lambda z: known[None]
        before, after = step.before_and_after(z[None], step.move(z[None], known[None]))
        gains.append((before - after).item())
        z = step.move(z[None], known[None])[0]
    torch.testing.assert_close(z.detach(), features)
    assert min(gains) > 0
    if shape is None:
        estimated = ReduNet(8, eps=eps, step_size=net.step_size, sharpness=1.0).fit_transform(X, y)
        reached = [
            rate_reduction(torch.from_numpy(np.asarray(f)), torch.from_numpy(y), eps)
            for f in (features, estimated)
        ]
        assert reached[0] > reached[1]


@pytest.mark.parametrize(("shape", "n_kernels"), [((12,), 0), ((12,), 4), ((3, 4), 0), ((3, 4), 5)])
def test_a_shifted_signal_has_shifted_features_and_the_same_class(shape, n_kernels):
    random = np.random.default_rng(0)
    X, y = random.normal(size=(40, 24)), np.arange(40) % 3  # two channels of twelve places
    net = ReduNet(4, shape=shape, n_kernels=n_kernels, kernel_size=2, sharpness=20.0, random_state=0).fit(
        X, y
    )
    other = random.normal(size=(9, 24))
    axes = tuple(range(2, 2 + len(shape)))
    for by in ([5], [11]) if len(shape) == 1 else ([1, 0], [2, 3]):

        def shift(rows, by=by):
            return np.roll(rows.reshape(len(rows), -1, *shape), by, axes).reshape(len(rows), -1)

        np.testing.assert_allclose(net.transform(shift(other)), shift(net.transform(other)), atol=1e-10)
        np.testing.assert_allclose(
            net.decision_function(shift(other)), net.decision_function(other), atol=1e-10
        )
        assert (net.predict(shift(other)) == net.predict(other)).all()
    assert len(set(net.predict(other))) > 1
    vector = ReduNet(4, sharpness=20.0).fit(X, y)
    assert not np.allclose(vector.decision_function(shift(other)), vector.decision_function(other), atol=1e-3)


def test_digits(digits):
    X, X_test, y, y_test = digits
    assert ReduNet(5).fit(X, y).score(X_test, y_test) == pytest.approx(0.984, abs=0.003)


def test_translated_digits(digits):
    X, X_test, y, y_test = digits
    random = np.random.default_rng(0)
    moved = np.stack([np.roll(x.reshape(8, 8), random.integers(0, 8, 2), (0, 1)).ravel() for x in X_test])
    net = ReduNet(2, eps=0.05, shape=(8, 8), n_kernels=32, random_state=0).fit(X, y)
    assert net.score(moved, y_test) == pytest.approx(net.score(X_test, y_test), abs=0.003)  # round-off
    assert net.score(moved, y_test) > 0.94
    assert ReduNet(2).fit(X, y).score(moved, y_test) < 0.3


def test_a_step_size_for_each_layer():
    X, y = classes_on_planes()
    net = ReduNet(3, step_size=[0.4, 0.2, 0.1]).fit(X, y)
    assert [step.step_size for step in net.layers_] == [0.4, 0.2, 0.1]
    with pytest.raises(ValueError, match="2 step sizes for 3 layers"):
        ReduNet(3, step_size=[0.4, 0.2]).fit(X, y)


def test_rows_of_unknown_class_expand_only():
    X, y = classes_on_planes()
    hidden = np.where(np.arange(60) < 40, y, -1)
    net = ReduNet(3, missing_label=-1).fit(X, hidden)
    assert net.classes_.tolist() == [0, 1, 2]
    some, all_rows = ReduNet(1).fit(X[:40], y[:40]).layers_[0], ReduNet(1).fit(X, y).layers_[0]
    torch.testing.assert_close(net.layers_[0].expand, all_rows.expand)
    torch.testing.assert_close(net.layers_[0].compress, some.compress)
    assert net.score(X[40:], y[40:]) > 0.8
    assert ReduNet(3, labels="true", missing_label=-1).fit(X, hidden).score(X[40:], y[40:]) > 0.8
    assert ReduNet(1).fit(X, hidden).classes_.tolist() == [-1, 0, 1, 2]  # a name like any other, unless told
    with pytest.raises(ValueError, match="every label is -1"):
        ReduNet(missing_label=-1).fit(X, np.full(60, -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torch_in_torch_out(dtype):
    X, y = classes_on_planes()
    rows = torch.from_numpy(X).to(dtype)
    net = ReduNet(3).fit(rows, torch.from_numpy(y))
    assert net.transform(rows).dtype == dtype
    assert np.array_equal(net.transform(rows).numpy(), net.transform(rows.numpy()))
    assert torch.equal(net.predict(rows), torch.from_numpy(net.predict(rows.numpy())))
    assert not net.transform(rows).requires_grad


def test_a_pickle_predicts_the_same_and_a_seed_builds_the_same():
    X, y = classes_on_planes()
    net = ReduNet(2, shape=(8,), n_kernels=3, random_state=3)
    features = net.fit_transform(X, y)
    again = pickle.loads(pickle.dumps(net))  # noqa: S301 - ours
    assert np.array_equal(again.transform(X), net.transform(X))
    assert np.array_equal(ReduNet(2, shape=(8,), n_kernels=3, random_state=3).fit_transform(X, y), features)
    assert not np.array_equal(
        ReduNet(2, shape=(8,), n_kernels=3, random_state=4).fit_transform(X, y), features
    )
    assert net.get_feature_names_out().shape == (24,)


def test_rows_pass_the_same_many_or_few_at_a_time(monkeypatch):
    X, y = classes_on_planes()
    together = ReduNet(3, labels="true").fit(X, y)
    monkeypatch.setattr("pellucid.analytic.redunet._NUMBERS_AT_ONCE", 3 * 8 * 7)
    apart = ReduNet(3, labels="true").fit(X, y)
    np.testing.assert_allclose(apart.transform(X), together.transform(X), atol=1e-12)
    np.testing.assert_allclose(apart.decision_function(X), together.decision_function(X), atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_layers": 0}, "n_layers is 0"),
        ({"eps": 0.0}, "eps is 0.0; the distortion must be positive"),
        ({"step_size": -1.0}, "step_size is -1.0"),
        ({"labels": "guessed"}, "labels is 'guessed'; known: 'estimated', 'true'"),
        ({"shape": (3,)}, r"shape is \(3,\); expected .* divides the width 8"),
        ({"shape": (2, 2, 2)}, r"shape is \(2, 2, 2\)"),
        ({"n_kernels": 3}, "n_kernels is about signals"),
        ({"shape": (8,), "intercept": True}, "intercept is about vectors"),
        ({"shape": (2, 4), "n_kernels": 3}, "kernel_size is 3; expected 1 to 2"),
    ],
)
def test_refuses(options, message):
    X, y = classes_on_planes()
    with pytest.raises(ValueError, match=message):
        ReduNet(**options).fit(X, y)


@pytest.mark.parametrize(
    ("X", "message"),
    [
        (np.ones((4, 3)), "all rows of X are equal"),
        (np.full((4, 3), np.inf), "infinity"),
        (np.ones((1, 3)), "minimum of 2"),
        (np.ones((0, 3)), "minimum of 2"),
    ],
)
def test_refuses_rows(X, message):
    for rows in (X, torch.from_numpy(X)):
        with pytest.raises(ValueError, match=message):
            ReduNet().fit(rows, [0, 0, 1, 1][: len(X)])
