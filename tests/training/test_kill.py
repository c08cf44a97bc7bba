"""kill -9 of real training processes at random moments."""

import os
import random
import signal
import time

import pytest


@pytest.fixture
def kill_at_random(digits, fork, tmp_path):
    """Train in processes that are killed until one gets through; returns how many were killed.

    Each goes on where the last one died, as a user would who runs the same command again.
    """

    def run_until_done(out, longest, seed, **options):
        delay = random.Random(seed)
        kills = 0
        while True:

            def body():
                os.setpgrp()  # so that data workers of a killed process can be found
                resume = (out / "config.yaml").is_file()
                digits.train(out, resume=resume, **options)

            pid = fork(body)
            # Longer as kills add up: on a busy machine a short life may end before the first save.
            deadline = time.monotonic() + delay.uniform(0, longest * (1 + kills / 20))
            status = 0
            while time.monotonic() < deadline and not status:
                done, code = os.waitpid(pid, os.WNOHANG)
                if done:
                    assert code == 0, f"a resumed run failed after {kills} kills"
                    return kills
                time.sleep(0.002)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            groups.append(pid)
            kills += 1
            assert kills < 500

    groups: list[int] = []
    yield run_until_done
    for group in groups:
        try:
            os.killpg(group, signal.SIGKILL)
        except ProcessLookupError:
            continue


def check(run, digits, differences, **options):
    assert differences(run, digits.reference(**options)) == []
    left = [path.name for path in run.rglob(".*")]
    assert left == []
    # Three where the last kill fell between the last save and its pruning.
    assert len(list((run / "checkpoints").iterdir())) in (2, 3)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"engine": "plain", "save_every": 1, "average": 0.9}, 6),
        ({"save_every": 3}, 4),
        ({"save_every": 3, "workers": 2}, 2),
    ],
    ids=["plain", "lightning", "workers"],
)
def test_killed_runs_end_in_the_same_bits(digits, tmp_path, kill_at_random, differences, options, wanted):
    kills, round_ = 0, 0
    while kills < wanted:
        run = tmp_path / str(round_)
        kills += kill_at_random(run, 0.6, seed=round_, **options)
        check(run, digits, differences, **{k: v for k, v in options.items() if k == "average"})
        round_ += 1


@pytest.mark.parametrize("objective", ["simdino", "dino"])
def test_killed_teachers_end_in_the_same_bits(digits, tmp_path, kill_at_random, differences, objective):
    """An evaluation of features before the first step takes its time, which a new process must be left."""
    options = {"objective": objective, "model_args": {"depth": 1}, "epochs": 1, "engine": "plain"}
    kills, round_ = 0, 0
    while kills < 2:
        run = tmp_path / str(round_)
        kills += kill_at_random(run, 2.0, seed=round_, save_every=1, **options)
        check(run, digits, differences, **options)
        round_ += 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"engine": "plain"}, {"workers": 2}], ids=["lightning", "plain", "workers"]
)
def test_a_hundred_kills(digits, tmp_path, kill_at_random, differences, options):
    options = {"save_every": 1, "average": 0.9, **options}
    kills, round_ = 0, 0
    while kills < 100:
        run = tmp_path / str(round_)
        kills += kill_at_random(run, 0.4, seed=100 + round_, **options)
        check(run, digits, differences, average=0.9)
        round_ += 1
