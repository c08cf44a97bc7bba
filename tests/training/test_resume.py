"""Stopped anywhere and resumed, a run ends in the same bits."""

import os
import random
import signal

import numpy as np
import pytest
import torch

from pellucid.data import StepSampler
from pellucid.errors import Stopped
from pellucid.training import run as run_module
from pellucid.training.learner import Learner

STOPS = [1, 10, 11, 12, 21]
"""The first step; before, at and after an evaluation, which is also the end of an epoch; the last but one."""

VARIANTS = {
    "lightning": {},
    "plain": {"engine": "plain"},
    "averaged": {"average": 0.9},
    "accumulated": {"accumulate": 4, "engine": "plain"},
    "all": {"accumulate": 2, "average": 0.9, "clip": 0.5, "precision": "bf16"},
    "dropout": {"model": "vit_digits", "model_args": {"depth": 2, "proj_drop_rate": 0.2}, "engine": "plain"},
}


@pytest.mark.parametrize("after", STOPS)
def test_stop_at_any_step_and_resume(digits, tmp_path, differences, after):
    options = {"epochs": 2, "average": 0.9}
    message = digits.stopped(tmp_path / "run", after, **options)
    assert f"stopped by SIGTERM: saved step {after} of 22 in {tmp_path / 'run'}" in message
    assert "--resume" in message
    assert not (tmp_path / "run" / "model").exists()
    digits.train(tmp_path / "run", resume=True, **options)
    assert differences(tmp_path / "run", digits.reference(**options)) == []


@pytest.mark.parametrize("name", VARIANTS)
def test_every_kind_of_run_resumes_exactly(digits, tmp_path, differences, name):
    """Twice interrupted: inside the first epoch, and again a few steps later."""
    options = {"epochs": 1.5, **VARIANTS[name]}
    digits.stopped(tmp_path / "run", 4, **options)
    digits.stopped(tmp_path / "run", 13, resume=True, **options)
    digits.train(tmp_path / "run", resume=True, **options)
    assert differences(tmp_path / "run", digits.reference(**options)) == []


def test_engine_may_change_at_every_interruption(digits, tmp_path, differences):
    digits.stopped(tmp_path / "run", 5, engine="lightning")
    digits.stopped(tmp_path / "run", 12, resume=True, engine="plain")
    digits.train(tmp_path / "run", resume=True, engine="lightning")
    assert differences(tmp_path / "run", digits.reference()) == []


def test_workers_may_change_too(digits, tmp_path, differences):
    digits.stopped(tmp_path / "run", 5, workers=2)
    digits.stopped(tmp_path / "run", 11, resume=True, workers=0)
    digits.train(tmp_path / "run", resume=True, workers=2)
    assert differences(tmp_path / "run", digits.reference()) == []


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["plain", "lightning"])
def test_stop_after_every_single_step(digits, tmp_path, differences, engine):
    for after in range(1, 22):
        run = tmp_path / str(after)
        digits.stopped(run, after, engine=engine)
        digits.train(run, resume=True, engine=engine)
        assert differences(run, digits.reference()) == [], after


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_in_the_last_step_is_the_end(digits, tmp_path, differences, between_steps, number):
    with between_steps({22: lambda: os.kill(os.getpid(), number)}):
        digits.train(tmp_path / "run")
    assert differences(tmp_path / "run", digits.reference()) == []


@pytest.mark.parametrize("engine", ["plain", "lightning"])
def test_a_stop_between_micro_batches_waits_for_the_step(digits, tmp_path, differences, monkeypatch, engine):
    options = {"accumulate": 4, "epochs": 1, "engine": engine}
    losses = Learner.losses

    def interrupted(self, batch, micro):
        if (self.step, micro) == (6, 1):
            os.kill(os.getpid(), signal.SIGTERM)
        return losses(self, batch, micro)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "losses", interrupted)
        with pytest.raises(Stopped, match="saved step 7 of 11"):
            digits.train(tmp_path / "run", **options)
    digits.train(tmp_path / "run", resume=True, **options)
    assert differences(tmp_path / "run", digits.reference(**options)) == []


@pytest.mark.parametrize("engine", ["plain", "lightning"])
def test_handlers_are_given_back(digits, tmp_path, engine):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    digits.stopped(tmp_path / "run", 1, engine=engine)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_resuming_a_finished_run_changes_nothing(digits, tmp_path, differences):
    digits.train(tmp_path / "run")
    digits.train(tmp_path / "run", resume=True)
    assert differences(tmp_path / "run", digits.reference()) == []


def test_killed_before_the_first_checkpoint(digits, tmp_path, differences, between_steps):
    """The log has a line by then, which must not come twice."""

    class Killed(BaseException):
        pass

    def die():
        raise Killed

    with between_steps({15: die}), pytest.raises(Killed):
        digits.train(tmp_path / "run", save_every=20)
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 2
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    digits.train(tmp_path / "run", resume=True, save_every=20)
    assert differences(tmp_path / "run", digits.reference()) == []


def test_half_a_line_in_the_log(digits, tmp_path, differences):
    digits.stopped(tmp_path / "run", 15)
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 20, "epo')
    digits.train(tmp_path / "run", resume=True)
    assert differences(tmp_path / "run", digits.reference()) == []


@pytest.mark.parametrize("name", ["lightning", pytest.param("dropout", marks=pytest.mark.slow)])
def test_nothing_reads_the_global_random_state(digits, tmp_path, differences, between_steps, name):
    options = {"epochs": 1.5, **VARIANTS[name]}

    def poison():
        torch.manual_seed(torch.seed())
        np.random.seed()  # noqa: NPY002
        random.seed()

    with between_steps(dict.fromkeys(range(1, 22), poison)):
        digits.train(tmp_path / "run", **options)
    assert differences(tmp_path / "run", digits.reference(**options)) == []


# --- and these are what the tests above would see ------------------------------------------------------


def test_a_sampler_off_by_one_step_is_seen(digits, tmp_path, differences, monkeypatch):
    digits.stopped(tmp_path / "run", 5)

    def late(**options):
        return StepSampler(**{**options, "start": options["start"] + 1, "steps": options["steps"] + 1})

    monkeypatch.setattr(run_module, "StepSampler", late)
    digits.train(tmp_path / "run", resume=True)
    found = differences(tmp_path / "run", digits.reference())
    assert "model head.weight" in found
    assert "metrics.jsonl" in found


@pytest.mark.parametrize("lost", ["optimizer/", "average/"])
def test_lost_state_is_seen(digits, tmp_path, differences, monkeypatch, lost):
    options = {"epochs": 2, "average": 0.9}
    digits.stopped(tmp_path / "run", 5, **options)
    load = Learner.load_tensors
    monkeypatch.setattr(
        Learner,
        "load_tensors",
        lambda self, tensors, step: load(
            self, {k: v for k, v in tensors.items() if not k.startswith(lost)}, step
        ),
    )
    digits.train(tmp_path / "run", resume=True, **options)
    assert "model head.weight" in differences(tmp_path / "run", digits.reference(**options))


def test_dropout_that_reads_the_global_state_is_seen(digits, tmp_path, differences, monkeypatch):
    options = {"epochs": 1.5, **VARIANTS["dropout"]}
    reference = digits.reference(**options)
    monkeypatch.setattr("pellucid.training.learner._mix", lambda seed, step, micro: torch.seed() % 2**62)
    digits.train(tmp_path / "run", **options)
    assert "model head.weight" in differences(tmp_path / "run", reference)
