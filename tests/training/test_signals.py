"""Ctrl-C and SIGTERM to the real program."""

import os
import signal
import subprocess
import sys
import time

import pytest

from pellucid.errors import Stopped
from pellucid.training.recorder import Recorder, StopFlag


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_a_stopped_program_saves_and_says_how_to_go_on(digits, tmp_path, differences, train_command, number):
    run = tmp_path / "run"
    arguments = ["--out", str(run), "--model", "crate_digits", "--depth", "2", "--epochs", "6", "--no-report"]
    program = subprocess.Popen(
        [sys.executable, "-m", "pellucid", "train", "digits", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        for _ in range(6000):
            if (run / "metrics.jsonl").exists() or program.poll() is not None:
                break
            time.sleep(0.01)
        program.send_signal(number)
        sent = time.monotonic()
        _, error = program.communicate(timeout=60)
    finally:
        program.kill()
    assert program.returncode == 75, error
    assert time.monotonic() - sent < 5
    step = int(sorted((run / "checkpoints").iterdir())[-1].name.removeprefix("step-"))
    assert 11 <= step < 64
    assert f"error: stopped by {number.name}: saved step {step} of 64 in {run} " in error
    assert "run the same command with --resume to go on" in error
    assert "Traceback" not in error
    assert error.count("\n") <= 5
    assert train_command(run, "--resume", epochs=6) == 0
    assert differences(run, digits.reference(epochs=6)) == []


def test_a_signal_between_two_looks_at_the_flag(digits, tmp_path):
    """It arrives after the step's save was decided on: the message may only speak of what is saved."""
    run = tmp_path / "run"
    looks = []

    class Late(StopFlag):
        @property
        def name(self):
            looks.append(None)
            return "SIGTERM" if len(looks) == 4 else ""  # each step looks once, or says the name

        @name.setter
        def name(self, value):
            pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pellucid.training.run.StopFlag", Late)
        with pytest.raises(Stopped, match="saved step 4 of 22"):
            digits.train(run, engine="plain")
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000004"]


def test_a_second_signal_is_not_caught():
    with StopFlag() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.name == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with StopFlag() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.name == "SIGTERM"
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_all_ranks_stop_when_one_is_asked_to(digits, tmp_path, monkeypatch):
    """The flag goes through ``any_rank``, so that no rank waits for another that has stopped."""
    asked = []

    def other_rank_has_a_signal(flag):
        asked.append(flag)
        return len(asked) > 5

    init = Recorder.__init__

    def recorder(self, out, learner, *args, **kwargs):
        init(self, out, learner, *args, **kwargs)
        learner_flags = learner.any_rank

        def any_rank(flag, calls=[0]):  # noqa: B006
            calls[0] += 1
            return learner_flags(flag) if calls[0] % 2 else other_rank_has_a_signal(flag)

        learner.any_rank = any_rank

    monkeypatch.setattr(Recorder, "__init__", recorder)
    with pytest.raises(Stopped, match="stopped by a signal: saved step 6 of 22"):
        digits.train(tmp_path / "run", engine="plain")
    assert asked == [False] * 6
