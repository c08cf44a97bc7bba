"""Scores against scikit-learn, intervals against known values."""

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support
from torch import nn

from pellucid.errors import DataError
from pellucid.measure.scores import evaluate, predict, wilson_interval


class Told(nn.Module):
    """Predicts the class that stands in the picture's first pixel."""

    def __init__(self, num_classes):
        super().__init__()
        self.num_classes = num_classes
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, images):
        return nn.functional.one_hot(images[:, 0, 0, 0].long(), self.num_classes).float()


def batch(guesses, labels):
    return torch.as_tensor(guesses).float().view(-1, 1, 1, 1), torch.as_tensor(labels)


def test_scores_are_scikit_learns():
    rng = np.random.default_rng(0)
    labels, guesses = rng.integers(0, 5, 200), rng.integers(0, 5, 200)
    scores = evaluate(Told(5), [batch(guesses[:60], labels[:60]), batch(guesses[60:], labels[60:])], "abcde")
    assert scores.accuracy == accuracy_score(labels, guesses)
    assert scores.count == 200
    np.testing.assert_array_equal(scores.confusion, confusion_matrix(labels, guesses))
    precision, recall, f1, count = precision_recall_fscore_support(labels, guesses)
    for i, row in enumerate(scores.classes):
        assert row["name"] == "abcde"[i]
        assert row["count"] == count[i]
        assert (row["precision"], row["recall"], row["f1"]) == pytest.approx((precision[i], recall[i], f1[i]))
    assert "abcde"[0] in scores.table()


def test_classes_that_were_not_seen_have_no_scores():
    scores = evaluate(Told(3), [batch([0, 0], [0, 1])])
    assert scores.classes[2] == {"name": "2", "count": 0, "precision": None, "recall": None, "f1": None}
    assert scores.classes[1]["precision"] is None
    assert scores.classes[1]["recall"] == 0


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962)],
)
def test_wilson_interval(successes, count, low, high):
    assert wilson_interval(successes, count) == pytest.approx((low, high), abs=1e-4)


def test_wilson_interval_covers():
    rng = np.random.default_rng(0)
    draws = rng.binomial(60, 0.9, 4000)
    covered = np.mean([low <= 0.9 <= high for low, high in (wilson_interval(int(k), 60) for k in draws)])
    assert 0.93 < covered < 0.975


def test_wrong_input():
    with pytest.raises(DataError, match="nothing to evaluate"):
        evaluate(Told(3), [])
    with pytest.raises(DataError, match="nothing to evaluate"):
        evaluate(Told(3), [batch([], torch.zeros(0, dtype=torch.long))])
    for label in (3, 4, -1):
        with pytest.raises(DataError, match=f"a label is {label}, the model has 3 classes"):
            evaluate(Told(3), [batch([0, 1], [1, label])])
    with pytest.raises(DataError, match="2 class names, the model has 3 classes"):
        evaluate(Told(3), [batch([0], [0])], ["cat", "dog"])
    with pytest.raises(DataError, match="4 class names, the model has 3 classes"):
        evaluate(Told(3), [batch([0], [0])], "abcd")


def test_a_model_is_scored_as_it_is_used_and_left_as_it_was():
    model = nn.Sequential(nn.Dropout(0.9), Told(4)).train()
    model[1].eval()
    seen = []
    scores = evaluate(model, [(*batch([3, 1], [3, 1]), torch.arange(2))], progress=seen.append)
    assert scores.accuracy == 1
    assert seen == [2]
    assert model.training
    assert model[0].training
    assert not model[1].training


def test_confidence_widens_the_interval():
    batches = [batch([0, 1, 1, 0, 1, 1], [0, 1, 1, 0, 1, 0])]
    narrow, wide = (evaluate(Told(2), batches, confidence=share) for share in (0.8, 0.99))
    assert narrow.confidence == 0.8
    assert wide.interval[0] < narrow.interval[0] < 5 / 6 < narrow.interval[1] < wide.interval[1]
    assert wide.interval == pytest.approx(wilson_interval(5, 6, 0.99))


def test_the_table_shows_what_is_undefined():
    lines = evaluate(Told(3), [batch([0, 0], [0, 1])], ["cat", "a long name", "eel"]).table().splitlines()
    assert lines[0].split() == ["class", "images", "precision", "recall", "f1"]
    assert lines[1].split() == ["cat", "1", "50.0%", "100.0%", "66.7%"]
    assert lines[2].split() == ["a", "long", "name", "1", "-", "0.0%", "0.0%"]
    assert lines[3].split() == ["eel", "0", "-", "-", "-"]
    assert len({len(line) for line in lines}) == 1


def test_predictions_are_chances():
    chances = predict(Told(4), batch([2, 0], [0, 0])[0])
    torch.testing.assert_close(chances.sum(-1), torch.ones(2))
    assert chances.argmax(-1).tolist() == [2, 0]
