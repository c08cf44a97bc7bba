"""Two processes that train one model."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from pellucid.training.checkpoint import load_checkpoint

pytestmark = pytest.mark.slow

SMALL = ["--model", "crate_digits", "--depth", "2", "--batch-size", "128", "--no-report"]
TWO = ["--devices", "2", "--accelerator", "cpu"]


def start(run, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "pellucid", "train", "digits", "--out", str(run), *SMALL, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finish(program, timeout=240):
    try:
        output, error = program.communicate(timeout=timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGKILL)
    return program.returncode, output, error


def largest_difference(one, other):
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def test_two_processes_equal_two_micro_batches(digits, tmp_path, weights):
    """At rates at which Muon's bfloat16 iteration does not magnify last bits beyond 1e-5."""
    rates = {"epochs": 0.3, "lr": 1e-4, "matrix_lr": 1e-4}
    code, _, error = finish(
        start(tmp_path / "run", *TWO, "--epochs", "0.3", "--lr", "1e-4", "--matrix-lr", "1e-4")
    )
    assert code == 0, error
    alone = digits.reference(accumulate=2, **rates)
    assert largest_difference(weights(tmp_path / "run"), weights(alone)) <= 1e-5
    other_data = digits.reference(accumulate=2, seed=1, **rates)
    assert largest_difference(weights(other_data), weights(alone)) > 1e-3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_a_signal_to_one_process_stops_both_and_they_resume(tmp_path, weights, number):
    run = tmp_path / "run"
    whole = start(tmp_path / "whole", *TWO, "--epochs", "6")
    code, _, error = finish(whole)
    assert code == 0, error
    program = start(run, *TWO, "--epochs", "6")
    for _ in range(6000):
        if (run / "metrics.jsonl").exists() or program.poll() is not None:
            break
        time.sleep(0.01)
    program.send_signal(number)
    code, _, error = finish(program, timeout=60)
    assert code == 75, error
    assert "error: stopped by " in error
    assert 11 <= load_checkpoint(run / "checkpoints").step < 64
    code, _, error = finish(start(run, *TWO, "--epochs", "6", "--resume"))
    assert code == 0, error
    one, other = weights(run), weights(tmp_path / "whole")
    assert all(torch.equal(one[name], other[name]) for name in one)
