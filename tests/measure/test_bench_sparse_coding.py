"""The benchmark of sparse coding compares like with like. No speed is asserted."""

import json

import pytest
import torch

from pellucid.errors import ConfigError, NumericsError
from pellucid.measure import bench_sparse_coding as bench


def test_both_solve_one_problem_to_one_gap():
    lines = []
    rows = bench.bench_sparse_coding(40, 24, 12, sparsities=(0.1, 0.4), rounds=2, progress=lines.append)
    assert [(row["dtype"], row["sparsity"]) for row in rows] == [
        ("float64", 0.1), ("float64", 0.4), ("float32", 0.1), ("float32", 0.4)
    ]  # fmt: skip
    assert len(lines) == 4
    for row in rows:
        assert row["gap"] <= 1.01 * row["scikit_learn_gap"] < 1e-2
        assert row["ours_us"] > 0
        assert row["vs_scikit_learn"][1] <= row["vs_scikit_learn"][0] <= row["vs_scikit_learn"][2]
        assert 0 < row["nonzeros"] < 12
    assert rows[0]["nonzeros"] > rows[1]["nonzeros"]
    json.dumps(rows)


def test_a_larger_gap_is_not_timed(monkeypatch):
    honest = bench.sparse_code
    monkeypatch.setattr(bench, "sparse_code", lambda X, D, s, tol: honest(X, D, 1.5 * s))
    with pytest.raises(NumericsError, match="would not compare"):
        bench.bench_sparse_coding(20, 24, 12, sparsities=(0.1,), dtypes=("float64",), rounds=1)


def test_signals_are_planted():
    X, D = bench.planted_signals(2000, 50, 20)
    torch.testing.assert_close(D.norm(dim=0), torch.ones(50).double())
    assert X.shape == (2000, 20)
    assert X.square().sum(1).mean().item() == pytest.approx(0.04 * 50, rel=0.1)


def test_options_that_cannot_be():
    with pytest.raises(ConfigError, match="did you mean 'float32'"):
        bench.bench_sparse_coding(dtypes=("float3",))
    with pytest.raises(ConfigError, match="rounds 0"):
        bench.bench_sparse_coding(rounds=0)
