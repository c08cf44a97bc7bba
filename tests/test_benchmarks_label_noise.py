"""Labels are wrong as often as asked, never by chance right, and never in the test set."""

import importlib.util
from pathlib import Path

import pytest
import torch

from pellucid.data.builtin import load_digits

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "label_noise.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("label_noise", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_as_many_as_asked_are_wrong(script, share):
    digits = load_digits()
    noisy = script.with_wrong_labels(digits, share, seed=0)
    wrong = noisy.train.labels != digits.train.labels
    assert wrong.sum() == round(share * len(digits.train))
    assert torch.equal(noisy.test.labels, digits.test.labels)
    assert torch.equal(noisy.train.images, digits.train.images)
    assert noisy.train.labels.unique().tolist() == list(range(10))
    assert torch.equal(script.with_wrong_labels(digits, share, seed=0).train.labels, noisy.train.labels)
    other = script.with_wrong_labels(digits, share, seed=1).train.labels
    assert torch.equal(other, noisy.train.labels) == (share == 0)
