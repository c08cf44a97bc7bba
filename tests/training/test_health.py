"""The verdict on a run without labels: on histories that are made up, and on real runs, well and not."""

import json
import math

import pytest

from pellucid.errors import Collapsed, NumericsError
from pellucid.training import open_run
from pellucid.training.checkpoint import load_checkpoint
from pellucid.training.health import verdict

# --- made up ----------------------------------------------------------------------------------------------

CRATE = {"effective rank": 15.5, "cosine": 0.89, "view cosine": 0.90, "step": 0}
"""Untrained, of width 64."""

VIT = {"effective rank": 2.8, "cosine": 0.98, "view cosine": 0.95, "step": 0}


def judged(*measures, start=CRATE, width=64):
    names = ("effective rank", "cosine", "view cosine", "rate share")
    history = [
        {**dict(zip(names, numbers, strict=False)), "step": 10 * (i + 1)}
        for i, numbers in enumerate(measures)
    ]
    return verdict([start, *history], width)


@pytest.mark.parametrize(("state", "measures", "start"), [
    ("healthy", (27.4, 0.69, 0.81), CRATE),  # after an epoch
    ("healthy", (44.9, 0.07, 0.88), CRATE),  # after fifteen
    ("healthy", (11.7, 0.90, 0.945), CRATE),
    ("healthy", (3.4, 0.96, 0.98), VIT),  # few directions, and yet more than it began with
    ("healthy", (2.7, 0.964, 0.979), VIT),
    ("idle", (15.5, 0.89, 0.90), CRATE),
    ("idle", (8.7, 0.944, 0.955), CRATE),
    ("idle", (30.0, 0.5, 0.4), CRATE),
    ("idle", (8.7, 0.42, 0.35), VIT),
    ("healthy", (16.4, 0.896, 0.925), CRATE),
    ("healthy", (8.7, 0.42, 0.55), VIT),  # not close, and much closer than it began
    ("healthy", (40.0, 0.1, 0.85), {"effective rank": 42.0, "cosine": 0.1, "view cosine": 0.84, "step": 0}),
    ("collapsing", (4.8, 0.983, 0.984), CRATE),
    ("collapsing", (3.5, 0.982, 0.999), CRATE),  # however close views of an image are
    ("collapsing", (12.0, 0.995, 0.999), CRATE),
    ("collapsing", (1.8, 0.97, 0.99), VIT),
    ("collapsed", (2.3, 0.995, 0.993), CRATE),
    ("collapsed", (1.0, 1.0, 1.0), CRATE),
    ("collapsed", (1.1, 1.0, 1.0), VIT),
    ("collapsed", (math.nan, math.nan, math.nan), CRATE),
])  # fmt: skip
def test_the_state_follows_from_the_measures(state, measures, start):
    found = judged(measures, start=start)
    assert found.state == state
    assert found.text.startswith("nothing learnt yet" if state == "idle" else state)


def test_the_words_hold_the_numbers():
    assert verdict([CRATE], 64).state == "untrained"
    assert verdict([CRATE], 64).text == (
        "untrained: effective rank 15.5 of 64, different images have cosine 0.89"
    )
    rising = judged((36.5, 0.36, 0.72, 0.40), (39.9, 0.23, 0.74, 0.83), width=192)
    assert rising.text == (
        "healthy: rate 83% of its ceiling and rising, effective rank 39.9 of 192, "
        "views of an image have cosine 0.74, different images 0.23"
    )
    assert judged((2.1, 0.98, 0.99), width=192).text == (
        "collapsing: effective rank 2.1 of 192, different images have cosine 0.98"
    )
    assert "not finite" in judged((math.nan, 0.5, 0.5)).text


@pytest.mark.parametrize(("before", "now", "words"), [
    (0.40, 0.50, "and rising"), (0.50, 0.40, "and falling"), (0.5, 0.501, "and steady"),
])  # fmt: skip
def test_the_trend(before, now, words):
    text = judged((36.5, 0.36, 0.72, before), (36.5, 0.36, 0.72, now)).text
    assert f"of its ceiling {words}, effective rank 36.5 of 64," in text
    without = judged((100 * before, 0.36, 0.72), (100 * now, 0.36, 0.72)).text
    assert f"of 64 {words}, views" in without


def test_a_run_whose_start_was_not_measured_is_judged_from_then_on():
    first = {"effective rank": 5.5, "cosine": 0.97, "step": 21}
    assert verdict([first], 64).state == "healthy"
    assert verdict([first, {**first, "effective rank": 2.0}], 64).state == "collapsing"
    assert verdict([first, {**first, "effective rank": 1.5, "cosine": 0.999}], 64).state == "collapsed"


# --- real runs --------------------------------------------------------------------------------------------

SHORT = {"model": "", "model_args": {"depth": 2}, "batch_size": 64, "epochs": 2, "engine": "plain"}
"""43 steps, judged before the first one, after each epoch, and in the end."""

GOOD = {
    "simdino": {"objective": "simdino"},
    "a class token": {"objective": "simdino", "model": "crate_digits"},
    "vit": {"objective": "simdino", "model": "vit_digits"},
    "tost": {"objective": "simdino", "model": "tost_digits"},
    "mcr2-views": {"objective": "mcr2-views"},
}
BAD = {
    "no rate, no stop-gradient": {
        "objective": "simdino",
        "objective_args": {"gamma": 0.0, "stop_gradient": False},
    },
    "no rate": {"objective": "simdino", "objective_args": {"gamma": 0.0}},
    "absurd rates": {"objective": "simdino", "lr": 3.0, "matrix_lr": 10.0},
    "absurd rates, dino": {"objective": "dino", "lr": 3.0, "matrix_lr": 10.0},
    "no centre, a hot teacher": {
        "objective": "dino",
        "objective_args": {"centre_momentum": 1.0, "teacher_temperature": [1.0, 1.0]},
    },
}


def states(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["health"] for line in lines if line["split"] == "test"]


def slow_but(names, few):
    return [name if name in few else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", slow_but(GOOD, {"simdino"}))
def test_good_runs_are_called_healthy(digits, tmp_path, name):
    run = digits.train(tmp_path / "run", **{**SHORT, **GOOD[name]})
    found = states(run)
    assert found[0] == "untrained"
    assert found[-1] == "healthy"
    assert not {"collapsing", "collapsed"} & set(found)
    measures = open_run(run).measures
    assert measures["view cosine"] > measures["cosine"]


@pytest.mark.parametrize("name", slow_but(BAD, {"absurd rates"}))
def test_runs_that_are_not_well_are_called_out(digits, tmp_path, name):
    try:
        run = digits.train(tmp_path / "run", **{**SHORT, **BAD[name]})
    except NumericsError:
        return
    found = states(run)
    assert found[0] == "untrained"
    assert found[-1] in {"idle", "collapsing", "collapsed"}
    assert "healthy" not in found[2:]


@pytest.mark.slow
def test_a_collapse_ends_a_run_that_was_asked_to_which_can_go_on(digits, tmp_path, differences):
    """On to the next verdict; and without the question, to the end that it would have had."""
    bad = {**SHORT, **BAD["no rate, no stop-gradient"]}
    options = {**bad, "epochs": 1.2, "eval_every": 0.2, "lr": 3e-3}  # 26 steps, a verdict after every 4
    out = tmp_path / "run"
    with pytest.raises(
        Collapsed, match=r"collaps\w+: effective rank .* stopped after step \d+, which is saved"
    ):
        digits.train(out, **options, stop_on_collapse=True)
    first = load_checkpoint(out / "checkpoints").step
    assert first in (12, 16, 20)
    assert states(out)[-1] in {"collapsing", "collapsed"}
    assert not (out / "model").exists()
    with pytest.raises(Collapsed):
        digits.train(out, **options, stop_on_collapse=True, resume=True)
    assert load_checkpoint(out / "checkpoints").step == first + 4
    digits.train(out, **options, resume=True)
    assert differences(out, digits.reference(**options)) == []


def test_one_bad_verdict_that_leaves_doubt_ends_nothing(digits, tmp_path, monkeypatch):
    from pellucid.training import representation
    from pellucid.training.health import Verdict

    given = iter(["untrained", "collapsing", "healthy", "collapsing", "healthy", "healthy"])
    told = {}

    def said(history, width):
        step = history[-1]["step"]
        told.setdefault(step, Verdict(next(given), "so it was said") if step not in told else None)
        return told[step]

    monkeypatch.setattr(representation, "verdict", said)
    run = digits.train(
        tmp_path / "run", **{**SHORT, **GOOD["simdino"], "epochs": 1}, eval_every=0.3, stop_on_collapse=True
    )
    assert states(run)[:4] == ["untrained", "collapsing", "healthy", "collapsing"]
