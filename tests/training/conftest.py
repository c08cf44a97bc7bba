"""Small real runs on digits, what to do to them between two steps, and how to compare two of them."""

import contextlib
import io
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pellucid.cli import main
from pellucid.data import load_data
from pellucid.errors import Stopped
from pellucid.training import train
from pellucid.training.recorder import Recorder

SMALL = {"model": "crate_digits", "model_args": {"depth": 2}, "batch_size": 128, "epochs": 2}
"""22 steps: logged, evaluated and saved after 11 and 22."""


@dataclass(frozen=True)
class Digits:
    """Runs on digits with the options of SMALL unless given."""

    images: Any
    folder: Path
    finished: dict[str, Path]

    def train(self, out: Path, **options: Any) -> Path:
        train(self.images, out=str(out), progress=False, **{**SMALL, **options})
        return out

    def reference(self, **options: Any) -> Path:
        """The uninterrupted run with these options, made once and not to be changed."""
        key = repr(sorted(options.items()))
        if key not in self.finished:
            self.finished[key] = self.train(self.folder / f"reference-{len(self.finished)}", **options)
        return self.finished[key]

    def stopped(self, out: Path, after: int, **options: Any) -> str:
        """Train until SIGTERM arrives in step ``after``; returns what was said."""
        with (
            between_steps({after: lambda: os.kill(os.getpid(), signal.SIGTERM)}),
            pytest.raises(Stopped) as stop,
        ):
            self.train(out, **options)
        return str(stop.value)


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    return Digits(load_data("digits"), tmp_path_factory.mktemp("runs"), {})


@contextlib.contextmanager
def between_steps(actions: dict[int, Callable[[], Any]]):
    """Run ``actions[step]`` when that step has been taken, before anything is logged or saved."""
    before = Recorder.__call__

    def recorder(self, parts):
        actions.get(self.learner.step, lambda: None)()
        before(self, parts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "__call__", recorder)
        yield


def in_child(body: Callable[[], Any]) -> tuple[int, str]:
    """Run ``body`` in a forked process: (exit code or minus the signal, what it printed)."""
    with tempfile.TemporaryFile() as output:
        pid = fork(body, output.fileno())
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        output.seek(0)
        return status, output.read().decode()


def fork(body: Callable[[], Any], output: int | None = None) -> int:
    """A child that runs ``body`` and nothing after it; its exit code is what ``body`` returns, or 99."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        where = os.open(os.devnull, os.O_WRONLY) if output is None else output
        os.dup2(where, 1)
        os.dup2(where, 2)
        sys.stdout, sys.stderr = (
            io.TextIOWrapper(io.FileIO(number, "w", closefd=False)) for number in (1, 2)
        )
        code = body() or 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def command(*arguments: str | Path) -> int:
    """The exit code of the command line."""
    return main([str(argument) for argument in arguments])


def train_command(run: Path, *arguments: str, epochs: float = 2) -> int:
    """``pellucid train digits`` with the options of SMALL."""
    small = ["--model", "crate_digits", "--depth", "2", "--batch-size", "128", "--epochs", epochs]
    return command("train", "digits", "--no-report", "--out", run, *small, *arguments)


@pytest.fixture(name="command")
def _command():
    return command


@pytest.fixture(name="train_command")
def _train_command():
    return train_command


@pytest.fixture(name="in_child")
def _in_child():
    return in_child


@pytest.fixture(name="fork")
def _fork():
    return fork


@pytest.fixture(name="between_steps")
def _between_steps():
    return between_steps


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


@pytest.fixture(name="weights")
def _weights():
    return weights


def differences(one: Path, other: Path) -> list[str]:
    """What two finished runs differ in, bit by bit: tensors by name, the log, the final optimiser state."""
    a, b = weights(one), weights(other)
    found = [f"model {name}" for name in a.keys() | b.keys() if not torch.equal(a[name], b[name])]
    if (one / "metrics.jsonl").read_bytes() != (other / "metrics.jsonl").read_bytes():
        found.append("metrics.jsonl")
    last = [sorted((run / "checkpoints").glob("step-*"))[-1] / "state.safetensors" for run in (one, other)]
    if last[0].read_bytes() != last[1].read_bytes():
        found.append("final checkpoint")
    return found


@pytest.fixture(name="differences")
def _differences():
    return differences
