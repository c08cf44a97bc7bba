"""The benchmark of ReduNet's layers: the same matrices before they are timed. No speed is asserted."""

import json
import math

import pytest
import torch

from pellucid.errors import NumericsError
from pellucid.measure import bench_redunet as module
from pellucid.measure.bench_redunet import Case, bench_redunet

SMALL = (
    Case("vectors", 3, 20, (6,)),
    Case("few vectors", 3, 2, (9,)),
    Case("signals", 2, 8, (3, 5)),
    Case("few pictures", 2, 2, (5, 2, 4)),
)


def test_every_case_once_and_numbers_agree():
    lines = []
    rows = bench_redunet(SMALL, rounds=2, progress=lines.append)
    assert [row["name"] for row in rows] == [case.name for case in SMALL]
    assert len(lines) == len(rows)
    for row in rows:
        middle, low, high = row["vs_loop"]
        assert 0 < low <= middle <= high < math.inf
        assert 0 < row["ours_ms"] < math.inf
        assert low <= row["loop_ms"] / row["ours_ms"] <= high
    assert json.loads(json.dumps(rows)) == rows


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_refuses_to_time_what_differs(monkeypatch, case):
    honest = module.loop_of_inverses
    monkeypatch.setattr(module, "loop_of_inverses", lambda *given: [1.01 * m for m in honest(*given)])
    with pytest.raises(NumericsError, match=r"the two layers differ by 9\.9e-03"):
        bench_redunet([case], rounds=1)


def test_the_seed_makes_the_tokens(monkeypatch):
    seen = []
    monkeypatch.setattr(module, "_check_equal", lambda case, z, labels: seen.append(z))
    for seed in (0, 0, 1):
        bench_redunet(SMALL[:1], rounds=1, seed=seed)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
