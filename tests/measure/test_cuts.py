"""The relaxed cut against a dense solver of the generalised problem, and against cuts that were planted."""

import numpy as np
import pytest
import scipy.linalg
import torch

from pellucid.measure import cuts
from pellucid.measure.cuts import FLOOR, affinity, cut_value, relaxed_cut


def planted(sizes, inside=1.0, between=0.05, noise=0.02):
    """A symmetric graph of groups, and the group of each node, shuffled."""
    random = np.random.default_rng(sum(sizes))
    group = random.permutation(np.repeat(np.arange(len(sizes)), sizes))
    weights = np.where(group[:, None] == group, inside, between) + noise * random.random((len(group),) * 2)
    return torch.from_numpy((weights + weights.T) / 2), torch.from_numpy(group)


def oracle(weights):
    w = weights.numpy()
    degrees = np.diag(w.sum(1))
    values, vectors = scipy.linalg.eigh(degrees - w, degrees)
    return values, vectors


@pytest.mark.parametrize("sizes", [(5, 5), (30, 12), (20, 15, 9)])
@pytest.mark.parametrize("dense", [True, False])
def test_the_vector_is_the_generalised_problems_second(sizes, dense, monkeypatch):
    if not dense:
        monkeypatch.setattr(cuts, "LANCZOS_FROM", 0)
    weights, _ = planted(sizes, noise=0.2)
    y, value = relaxed_cut(weights)
    values, vectors = oracle(weights)
    assert value == pytest.approx(values[1], abs=1e-10)
    second = torch.from_numpy(vectors[:, 1])
    torch.testing.assert_close(y, second * torch.sign(second @ y), atol=1e-7, rtol=0)
    assert y[y.abs().argmax()] > 0
    degrees = weights.sum(1)
    residual = degrees * y - weights @ y - value * degrees * y
    assert residual.abs().max() < 1e-8
    assert float(y @ (degrees * y)) == pytest.approx(1)


@pytest.mark.parametrize("sizes", [(8, 8), (40, 6)])
def test_a_planted_cut_is_found(sizes):
    weights, group = planted(sizes)
    y, value = relaxed_cut(weights)
    part = y > y.mean()
    assert torch.equal(part, group == group[part][0])
    assert value <= cut_value(weights, part) < 0.5


def test_a_graph_that_falls_apart_is_cut_where_it_does():
    weights = torch.block_diag(torch.ones(4, 4), torch.ones(9, 9)).double()
    y, value = relaxed_cut(weights)
    assert value == pytest.approx(0, abs=1e-12)
    assert torch.equal(y > y.mean(), torch.arange(13) < 4)
    assert cut_value(weights, torch.arange(13) < 4) == 0


def test_the_value_by_hand():
    # 0 - 1 strongly, 2 alone: cut({2}) = 1 + 2, vol({2}) = 3, vol({0, 1}) = 5 + 6.
    weights = torch.tensor([[0.0, 4, 1], [4, 0, 2], [1, 2, 0]])
    assert cut_value(weights, torch.tensor([False, False, True])) == pytest.approx(3 / 3 + 3 / 11)
    assert cut_value(weights, torch.tensor([True, True, True])) == 2.0
    ones = torch.ones(10, 10)
    assert cut_value(ones, torch.arange(10) < 3) == pytest.approx(1)


def test_affinity_by_hand():
    features = torch.tensor([[2.0, 0], [1, 1], [0, 3], [-1, 0], [0, 0]])
    root = 0.5**0.5
    like = affinity(features, 0.5)
    expected = torch.full((5, 5), FLOOR, dtype=torch.float64)
    expected[[0, 1, 2, 3], [0, 1, 2, 3]] = 1
    expected[[0, 1, 1, 2], [1, 0, 2, 1]] = root
    torch.testing.assert_close(like, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(
        affinity(features, 0.5, "binary"), (expected > 0.5).double().clamp_min(FLOOR), atol=0, rtol=0
    )
    assert (affinity(features, -1.0) >= FLOOR).all()
