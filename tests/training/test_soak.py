"""Fault after fault, for as long as ``PELLUCID_SOAK`` says: 3600 for an hour of them."""

import errno
import os
import random
import signal
import socket
import time
from pathlib import Path

import pytest
import torch

from pellucid.training.learner import Learner

SECONDS = float(os.environ.get("PELLUCID_SOAK", "30"))
RUN = {"model_args": {"depth": 1}, "exact": 2, "average": 0.9, "max_skipped": 0}


def sends(number):
    return lambda patch: os.kill(os.getpid(), number)


def fills_the_disk(patch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    patch.setattr(os, "fsync", full)


def spoils_a_loss(patch):
    before = Learner.losses

    def losses(self, batch, micro):
        parts = before(self, batch, micro)
        return {**parts, "loss": parts["loss"] * float("nan")}

    patch.setattr(Learner, "losses", losses)


def runs_out_of_memory(patch):
    def losses(self, batch, micro):
        raise torch.OutOfMemoryError("injected")

    patch.setattr(Learner, "losses", losses)


def turns_back_the_clock(patch):
    patch.setattr(time, "time", lambda: 0.0)


FAULTS = {
    "nothing": lambda patch: None,
    "kill -9": sends(signal.SIGKILL),
    "SIGTERM": sends(signal.SIGTERM),
    "SIGINT": sends(signal.SIGINT),
    "SIGUSR1": sends(signal.SIGUSR1),
    "a full disk": fills_the_disk,
    "a loss that is not finite": spoils_a_loss,
    "out of memory": runs_out_of_memory,
    "a clock that goes back": turns_back_the_clock,
}
ENDS = {0, 5, 6, 70, 75, -signal.SIGKILL}
"""Done, numbers, resources, another process lost, stopped, killed: as docs/cli.md lists them."""


def children() -> list[int]:
    found = []
    for task in Path("/proc/self/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return found


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


@pytest.mark.slow
def test_fault_after_fault(digits, fork, between_steps, differences, command, tmp_path):
    """Runs of one and two processes, each hit again and again, end in the bits of one that was left alone."""
    reference = digits.reference(engine="plain", **{k: v for k, v in RUN.items() if k != "max_skipped"})
    draw, begun, rounds, lives = random.Random(0), time.monotonic(), 0, 0
    files = open_files()

    def life(run, number, world, port, fault, victim, step):
        os.environ["OMP_NUM_THREADS"] = "1"
        if world > 1:
            told = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
            told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "soak"}
            os.environ |= {name: str(value) for name, value in (told | {"GROUP_RANK": 0}).items()}
        with pytest.MonkeyPatch.context() as patch:
            hit = {step: lambda: FAULTS[fault](patch)} if number == victim else {}
            with between_steps(hit):
                again = ["--resume"] if (run / "config.yaml").is_file() else []
                options = ["--model", "crate_digits", "--depth", 1, "--batch-size", 128, "--epochs", 2]
                options += ["--exact", 2, "--average", 0.9, "--max-skipped", 0, "--save-every", 1]
                place = ["--accelerator", "cpu", "--devices", world, "--no-report", "--out", run]
                return command("train", "digits", *options, *place, *again)

    while rounds == 0 or time.monotonic() < begun + SECONDS:
        run = tmp_path / str(rounds)
        while not (run / "result.json").is_file():
            world, fault = draw.choice([1, 2]), draw.choice(list(FAULTS))
            saved = [int(path.name[5:]) for path in (run / "checkpoints").glob("step-*")]
            step = max(saved, default=0) + draw.randrange(1, 9)
            what = (run, world, free_port(), fault, draw.randrange(world), step)
            with open(tmp_path / "said", "w+") as said:
                pids = [
                    fork(lambda rank=rank, what=what: life(what[0], rank, *what[1:]), said.fileno())
                    for rank in range(world)
                ]
                ends = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
                said.seek(0)
                words = said.read()
            assert set(ends) <= ENDS, (fault, ends, words)
            assert "Traceback" not in words, (fault, ends, words)
            assert children() == []
            assert open_files() == files
            lives += 1
        assert differences(run, reference) == []
        assert not list(run.rglob(".tmp-*"))
        assert not list(run.rglob(".del-*"))
        rounds += 1
    print(f"{lives} lives of {rounds} runs")
    assert lives > rounds
