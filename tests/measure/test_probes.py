"""Probes on features whose answer is known, and against the classifiers they are made of."""

import json

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pellucid.analytic import NearestNeighbours
from pellucid.errors import ConfigError, DataError
from pellucid.measure import probes
from pellucid.measure.features import Features
from pellucid.measure.probes import STRENGTHS, knn_probe, linear_probe
from pellucid.measure.scores import wilson_interval

NAMES = [str(k) for k in range(10)]
BOTH = pytest.mark.parametrize("probe", [knn_probe, linear_probe])


def made(values, labels):
    labels = torch.as_tensor(np.asarray(labels))
    return Features(torch.as_tensor(np.asarray(values)).float(), labels, torch.arange(len(labels)))


@pytest.fixture(scope="module")
def digits():
    X, y = load_digits(return_X_y=True)
    return made(X[:700], y[:700]), made(X[700:1100], y[700:1100])


def blobs(n, seed, classes=3, noise=0.3, d=6):
    random = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    return made(np.eye(d)[labels] * 3 + noise * random.normal(size=(n, d)), labels)


@BOTH
def test_separated_classes_are_found_and_noise_is_not(probe):
    names = ["a", "b", "c"]
    assert probe(blobs(60, 0), blobs(90, 1), names).scores.accuracy == 1
    random = np.random.default_rng(2)
    nothing = [made(random.normal(size=(n, 6)), np.arange(n) % 3) for n in (90, 300)]
    found = probe(*nothing, names)
    assert 0.2 < found.scores.accuracy < 0.47
    assert found.largest == ("a", pytest.approx(1 / 3))


def test_knn_is_that_of_the_estimator(digits):
    train, test = digits
    found = knn_probe(train, test, NAMES, k=(20, 1, 200), temperature=0.1)
    assert [row["k"] for row in found.tried] == [20, 1, 200]
    for row in found.tried:
        by_hand = NearestNeighbours(row["k"], 0.1).fit(train.values, train.labels)
        assert row["accuracy"] == float((by_hand.predict(test.values) == test.labels).double().mean())
    assert found.scores.accuracy == found.tried[0]["accuracy"]
    assert found.settings == {"k": 20, "temperature": 0.1}
    assert found.scores.interval == wilson_interval(round(found.scores.accuracy * 400), 400)
    said = "\n".join(found.lines())
    for words in ("knn accuracy 9", "95% interval", "k 20", "700 training images", "k 200: 8", "always '"):
        assert words in said
    assert json.loads(json.dumps(found.to_dict()))["scores"]["count"] == 400


def test_linear_is_logistic_regression_with_the_chosen_strength(digits):
    train, test = digits
    found = linear_probe(train, test, NAMES)
    assert [row["C"] for row in found.tried] == list(STRENGTHS)
    accuracies = [row["accuracy"] for row in found.tried]
    assert found.settings["C"] == STRENGTHS[int(np.argmax(accuracies))]
    by_hand = make_pipeline(StandardScaler(), LogisticRegression(C=found.settings["C"], max_iter=1000))
    by_hand.fit(train.values.double().numpy(), train.labels.numpy())
    expected = by_hand.score(test.values.double().numpy(), test.labels.numpy())
    assert found.scores.accuracy == pytest.approx(expected, abs=1 / 400)
    assert found.scores.accuracy > 0.9
    assert "held out of training: C 0.0001: " in "\n".join(found.lines())


def test_the_strength_is_chosen_without_the_test_images(digits):
    train, test = digits
    shuffled = made(test.values, test.labels[torch.randperm(400)])
    one, other = linear_probe(train, test, NAMES), linear_probe(train, shuffled, NAMES)
    assert one.tried == other.tried
    assert one.settings == other.settings
    assert linear_probe(train, test, NAMES).scores == one.scores


def test_what_is_held_out_is_a_fifth_of_every_class():
    labels = np.repeat([0, 1, 5], [50, 10, 2])
    held = probes._held_out(labels, 0)
    assert [int(held[labels == k].sum()) for k in (0, 1, 5)] == [10, 2, 0]
    assert not np.array_equal(held, probes._held_out(labels, 1))


def test_an_end_of_the_sweep_and_an_unfinished_fit_are_told(digits, monkeypatch):
    train, test = digits
    assert any(
        "at the end of those tried" in n
        for n in linear_probe(train, test, NAMES, strengths=(1e-6, 1e-5)).notes
    )
    monkeypatch.setattr(probes, "ITERATIONS", 2)
    assert any("before it had converged" in n for n in linear_probe(train, test, NAMES, strengths=[1]).notes)


@BOTH
def test_images_without_a_label_are_left_out_and_told(probe):
    train, test = blobs(60, 0), blobs(30, 1)
    train.labels[5:25] = -1
    test.labels[0] = -1
    found = probe(train, test, ["a", "b", "c"])
    assert (found.train_images, found.scores.count) == (40, 29)
    assert found.notes[:2] == [
        "20 training images without a label were left out",
        "1 test images without a label were left out",
    ]


@BOTH
def test_a_class_that_only_the_test_images_have_is_missed(probe):
    train, test = blobs(60, 0), blobs(40, 1, classes=4)
    found = probe(train, test, ["a", "b", "c", "d"])
    assert found.scores.classes[3]["recall"] == 0
    assert found.scores.accuracy == 0.75


@BOTH
@pytest.mark.filterwarnings("error")
def test_collapsed_features_are_as_good_as_none(probe):
    train, test = made(np.ones((60, 4)), np.arange(60) % 3), made(np.ones((30, 4)), np.arange(30) % 3)
    assert probe(train, test, ["a", "b", "c"]).scores.accuracy == pytest.approx(1 / 3)


@BOTH
def test_refuses_what_has_no_labels(probe):
    for train, test, which in (
        (made(np.eye(4), [-1] * 4), blobs(4, 0), "no training image has a label"),
        (blobs(30, 0), made(np.eye(6), [-1] * 6), "no test image has a label"),
    ):
        with pytest.raises(DataError, match=which):
            probe(train, test, ["a", "b", "c"])
    tokens = made(np.ones((30, 4, 2)), np.arange(30) % 3)
    with pytest.raises(ConfigError, match="one feature of each image"):
        probe(tokens, tokens, ["a", "b", "c"])


def test_refuses_settings_that_cannot_be():
    train, names = blobs(30, 0), ["a", "b", "c"]
    for k in ([], [0], [31], [5, 40]):
        with pytest.raises(ConfigError, match="expected 1 to 30"):
            knn_probe(train, train, names, k=k)
    with pytest.raises(ConfigError, match="temperature is 0"):
        knn_probe(train, train, names, temperature=0)
    for strengths in ([], [0.0, 1.0]):
        with pytest.raises(ConfigError, match="C is"):
            linear_probe(train, train, names, strengths=strengths)
    with pytest.raises(DataError, match="one class"):
        linear_probe(made(np.eye(6), [1] * 6), train, names, strengths=[1.0])
    with pytest.raises(DataError, match="three training images"):
        linear_probe(made(np.eye(6), [0, 0, 1, 1, 2, 2]), train, names)
