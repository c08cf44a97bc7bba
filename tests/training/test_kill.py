"""kill -9 of real training processes at random moments."""

import os
import random
import signal
import time
from dataclasses import replace

import pytest

from pellucid.data import load_text


@pytest.fixture
def kill_at_random(digits, fork, tmp_path):
    """Train in processes that are killed until one gets through; returns how many were killed.

    Each goes on where the last one died, as a user would who runs the same command again.
    """

    def run_until_done(out, longest, seed, runs=digits, **options):
        delay = random.Random(seed)
        kills = 0
        while True:

            def body():
                os.setpgrp()  # so that data workers of a killed process can be found
                resume = (out / "config.yaml").is_file()
                runs.train(out, resume=resume, **options)

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
        pytest.param({"save_every": 3}, 4, marks=pytest.mark.slow),
        pytest.param({"save_every": 3, "workers": 2}, 2, marks=pytest.mark.slow),
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


@pytest.mark.parametrize("objective", ["simdino", pytest.param("dino", marks=pytest.mark.slow)])
def test_killed_teachers_end_in_the_same_bits(digits, tmp_path, kill_at_random, differences, objective):
    """An evaluation of features before the first step takes its time, which a new process must be left."""
    options = {"objective": objective, "model_args": {"depth": 1}, "epochs": 1, "engine": "plain"}
    kills, round_ = 0, 0
    while kills < 2:
        run = tmp_path / str(round_)
        kills += kill_at_random(run, 2.0, seed=round_, save_every=1, **options)
        check(run, digits, differences, **options)
        round_ += 1


KILLS = int(os.environ.get("PELLUCID_KILLS", "200"))
"""Over all kinds of run below, in the slow tests; ``PELLUCID_KILLS=5000`` for a night."""

TINY = {"context": 32, "embed_dim": 32, "depth": 1, "num_heads": 4}
VIEWS = {"model_args": {"depth": 1}, "epochs": 1}
KINDS = {
    "supervised": {},
    "plain": {"engine": "plain"},
    "workers": {"workers": 2},
    "exact": {"exact": 2},
    "mcr2": {"objective": "mcr2"},
    "simdino": {"objective": "simdino", **VIEWS},
    "mae": {"objective": "mae", "model": "crate_mae_digits", "model_args": {"depth": 1, "decoder_depth": 1}},
    "causal-lm": {"objective": "causal-lm", "model": "crate_gpt_bytes", "model_args": TINY},
    "masked-lm": {"objective": "masked-lm", "model": "crate_bert_bytes", "model_args": TINY},
}


@pytest.fixture(scope="module")
def sayings(digits, tmp_path_factory):
    """Runs on texts, as those on digits."""
    folder = tmp_path_factory.mktemp("sayings")
    for number in range(40):
        draw = random.Random(number)
        words = draw.choices(["in", "the", "beginning", "was", "a", "word"], k=200)
        (folder / f"{number}.txt").write_text(" ".join(words))
    return replace(digits, images=load_text(folder), folder=tmp_path_factory.mktemp("runs"), finished={})


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_killed_again_and_again(
    kind, digits, sayings, tmp_path, kill_at_random, differences
):
    """Weights, average, optimiser and log end in the bits of the run that nobody touched."""
    options = {"average": 0.9, **KINDS[kind]}
    runs = sayings if kind.endswith("-lm") else digits
    kills, round_ = 0, 0
    while kills < KILLS / len(KINDS):
        run = tmp_path / str(round_)
        kills += kill_at_random(run, 0.6, seed=100 + round_, runs=runs, save_every=1, **options)
        check(run, runs, differences, **{k: v for k, v in options.items() if k not in ("engine", "workers")})
        round_ += 1
