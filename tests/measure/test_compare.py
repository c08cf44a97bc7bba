"""Comparing models: paired differences, operations counted, speeds taken in turns."""

import json
import math
import time

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from pellucid.errors import ConfigError
from pellucid.measure import audit
from pellucid.measure.compare import (
    Comparison,
    Contender,
    Outcome,
    difference,
    forward_flop,
    held_steps,
    inference_speed,
    sparsity,
    t_quantile,
)
from pellucid.models import create_model


def contender(label, accuracies, count=450, steps=(), nonzero=None, first_seed=0):
    outcomes = [
        Outcome(
            seed=first_seed + i,
            accuracy=float(accuracy),
            interval=(accuracy - 0.01, accuracy + 0.01),
            count=count,
            seconds=10.0 + i,
            images_per_second=1000.0,
            steps=list(steps),
            nonzero=nonzero,
        )
        for i, accuracy in enumerate(accuracies)
    ]
    return Contender(label, f"{label}_digits", {}, 1234, 5_000_000, outcomes)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 8, 9, 30, 101])
def test_quantiles_of_t(freedom):
    for share in (0.75, 0.95, 0.975, 0.9995):
        assert t_quantile(share, freedom) == pytest.approx(stats.t.ppf(share, freedom), rel=1e-9)


def test_a_difference_is_taken_seed_by_seed():
    first, other = contender("a", [0.90, 0.95, 0.85]), contender("b", [0.92, 0.96, 0.88])
    found = difference(other, first)
    assert found.mean == pytest.approx(0.02)
    half = stats.t.ppf(0.975, 2) * 0.01 / math.sqrt(3)  # the gaps are 0.02, 0.01, 0.03
    assert found.interval == pytest.approx((0.02 - half, 0.02 + half))
    assert found.better is None
    assert found.text == "b against a: +2.00 points (95% interval -0.48 to +4.48 points): cannot tell."


@pytest.mark.parametrize(("gap", "better", "word"), [(0.05, True, "better."), (-0.05, False, "worse.")])
def test_a_difference_far_from_zero_is_called(gap, better, word):
    base = np.array([0.80, 0.70, 0.75, 0.72])
    found = difference(contender("b", base + gap + np.array([0, 0.004, -0.004, 0])), contender("a", base))
    assert found.better is better
    assert found.text.endswith(word)


def test_one_seed_and_agreement_by_chance_tell_nothing():
    alone = difference(contender("b", [0.9]), contender("a", [0.5]))
    assert (alone.interval, alone.better) == (None, None)
    assert alone.text.endswith("cannot tell.")
    one_image = 1 / 450
    lucky = difference(contender("b", [0.9 + one_image, 0.8 + one_image]), contender("a", [0.9, 0.8]))
    assert lucky.better is None
    assert lucky.interval[0] < 0 < lucky.interval[1]


def test_the_interval_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(1000):
        luck = rng.normal(0.7, 0.1, 3)  # of the seed, which both share
        found = difference(
            contender("b", luck + 0.03 + rng.normal(0, 0.02, 3), count=10**6),
            contender("a", luck, count=10**6),
        )
        held += found.interval[0] <= 0.03 <= found.interval[1]
    assert 0.93 <= held / 1000 <= 0.97


@pytest.mark.parametrize(
    "other",
    [
        contender("b", [0.9, 0.8]),
        contender("b", [0.9, 0.8, 0.7], first_seed=1),
        contender("b", [0.9, 0.8, 0.7], count=449),
    ],
    ids=["fewer seeds", "other seeds", "other images"],
)
def test_what_cannot_be_paired_is_refused(other):
    with pytest.raises(ConfigError, match="b and a were not trained and tested alike"):
        difference(other, contender("a", [0.9, 0.8, 0.7]))


def test_operations_of_known_layers():
    linear = nn.Sequential(nn.Flatten(), nn.Linear(48, 10, bias=False))
    assert forward_flop(linear, torch.randn(5, 3, 4, 4)) == 2 * 48 * 10
    conv = nn.Conv2d(3, 8, 2, stride=2, bias=False)
    assert forward_flop(conv, torch.randn(2, 3, 8, 8)) == 2 * 16 * 8 * 12


STEM_AND_HEAD = 2 * 16 * 4 * 64 + 2 * 64 * 10
"""Of the models for digits: 16 patches of 4 values, width 64, 10 classes."""


def test_operations_of_crate_with_its_attention_and_one_product_in_ista():
    n, d = 17, 64
    layer = 2 * n * d * d + 4 * n * n * d + 2 * n * d * d + 2 * n * d * d
    images = torch.randn(3, 1, 8, 8)
    assert forward_flop(create_model("crate_digits"), images) == 4 * layer + STEM_AND_HEAD


def test_operations_of_a_vit_with_its_attention():
    n, d = 17, 64
    layer = 2 * n * d * 3 * d + 4 * n * n * d + 2 * n * d * d + 16 * n * d * d
    images = torch.randn(3, 1, 8, 8)
    assert forward_flop(create_model("vit_digits"), images) == 4 * layer + STEM_AND_HEAD


def test_counting_leaves_the_model_as_it_was():
    model = create_model("crate_digits").train()
    forward_flop(model, torch.randn(2, 1, 8, 8))
    assert model.training


class Slow(nn.Module):
    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def forward(self, images):
        time.sleep(self.seconds)
        return images


def test_speeds_are_ratios_to_the_first():
    models = [Slow(0.006), Slow(0.003), Slow(0.012)]
    images = [torch.zeros(8, 1, 2, 2)] * 2 + [torch.zeros(4, 1, 2, 2)]
    (rate, own), (_, faster), (_, slower) = inference_speed(models, images, rounds=3, seconds=0.02)
    assert own == [1.0, 1.0, 1.0]
    assert 300 < rate <= 8 / 0.006
    assert 1.2 < faster[0] < 2.5  # half the time for as many
    assert 0.15 < slower[0] < 0.4  # twice the time for half as many
    assert faster[1] <= faster[0] <= faster[2]


def test_what_an_audit_holds_steps_to():
    images = torch.randn(6, 1, 8, 8)
    white = audit(create_model("crate_digits"), [images]).to_dict()
    steps = held_steps(white)
    assert [(s["layer"], s["step"]) for s in steps[:3]] == [(1, "compress"), (1, "sparsify"), (2, "compress")]
    assert [s["descended"] for s in steps] == [row["descended"] for row in white["rows"]]
    shares = [row["nonzero"] for row in white["rows"] if row["step"] == "sparsify"]
    assert len(shares) == 4
    assert sparsity(white) == pytest.approx(sum(shares) / 4)

    black = audit(create_model("vit_digits"), [images]).to_dict()
    assert (held_steps(black), sparsity(black)) == ([], None)
    assert (held_steps(None), sparsity(None)) == ([], None)


def test_a_comparison_in_numbers_and_words():
    steps = [
        {"layer": 1, "step": "compress", "descended": 1.0},
        {"layer": 1, "step": "sparsify", "descended": 0.98},
    ]
    result = Comparison(
        "digits",
        "width",
        3,
        [contender("crate", [0.9, 0.92], steps=steps, nonzero=0.25), contender("vit", [0.9, 0.93])],
        {"cpu": "x"},
    )
    found = json.loads(json.dumps(result.to_dict()))
    crate, vit = found["models"]
    assert found["seeds"] == [0, 1]
    assert crate["accuracy"] == pytest.approx(0.91)
    assert crate["deviation"] == pytest.approx(0.02 / math.sqrt(2))
    assert [o["descending"] for o in crate["outcomes"]] == [1, 1]
    assert crate["descended"] == pytest.approx(0.99)
    assert crate["nonzero"] == pytest.approx(0.25)
    assert crate["difference"] is None
    assert vit["difference"]["mean"] == pytest.approx(0.005)
    assert (vit["descended"], vit["nonzero"]) == (None, None)

    table = result.table().splitlines()
    assert "91.00 +- 1.41 %" in table[1]
    assert "1 1 of 2" in table[1]
    assert "no objective" in table[2]
    assert table[-1].startswith("vit against crate: +0.50 points")
