"""Distance in attention: what heads make of it, that a token may leave itself out, and the rate behind it."""

import pytest
import torch
from torch.nn import functional as F

from pellucid.objectives import coding_rate, local_coding_rate, prefix_coding_rate
from pellucid.steps import MHSA, MSSA, UntiedMSSA
from pellucid.steps.distance import Distance, forgetting

DIM = 8
both = pytest.mark.parametrize("causal", [False, True])


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def by_hand(logits, values, rates, own, causal):
    """Token by token, in words of the definition."""
    n = logits.shape[-1]
    out = torch.zeros_like(values)
    for k, rate in enumerate(rates):
        for t in range(n):
            seen = [s for s in range(t + 1 if causal else n) if own or s != t] or [t]
            scores = torch.stack([logits[:, k, t, s] - rate * abs(t - s) for s in seen], -1)
            out[:, k, t] = (scores.softmax(-1).unsqueeze(-1) * values[:, k, seen]).sum(-2)
    return out.transpose(1, 2).flatten(2)


@both
@pytest.mark.parametrize(("recency", "own"), [(True, True), (False, False), (True, False)])
def test_compression_is_by_the_definition(causal, recency, own):
    torch.manual_seed(0)
    step = MSSA(DIM, 2, causal=causal, recency=recency, own=own).double()
    z = normal(2, 6, DIM)
    w = step.project(z)
    rates = forgetting(2).tolist() if recency else [0, 0]
    mixed = by_hand(w @ w.mT * step.scale, w, rates, own, causal)
    torch.testing.assert_close(step.attend(w), mixed)
    torch.testing.assert_close(step(z), z + mixed @ step.subspaces.weight)
    torch.testing.assert_close((step.attention(z) @ w).transpose(1, 2).flatten(2), mixed)


@both
def test_black_boxes_forget_too(causal):
    torch.manual_seed(0)
    step = MHSA(DIM, 2, causal=causal, recency=True).double()
    step.qkv.weight.data.mul_(20)
    z = normal(2, 6, DIM)
    q, k, v = step.heads(z)
    mixed = by_hand(q @ k.mT * step.scale, v, forgetting(2).tolist(), True, causal)
    torch.testing.assert_close(step(z), z + step.output(mixed))
    torch.testing.assert_close((step.attention(z) @ v).transpose(1, 2).flatten(2), mixed)


def test_one_token_alone_meets_itself():
    step = UntiedMSSA(DIM, 2, recency=True, own=False).double()
    z = normal(1, 1, DIM)
    torch.testing.assert_close(step(z), UntiedMSSA.forward(step, z))
    assert torch.equal(step.attention(z), torch.ones(1, 2, 1, 1, dtype=torch.float64))


def test_places_are_exact_in_bfloat16():
    """Two thousand places on, a neighbour is still a neighbour."""
    distance, w = Distance(2, recency=True), torch.zeros(1, 2, 3, 4, dtype=torch.bfloat16)
    places = torch.tensor([[2045, 2046, 2047]])
    logits = (distance.query(w, 0.5).float() @ distance.key(w, places).float().mT) * 0.5
    expected = forgetting(2)[:, None, None] * places.float()
    torch.testing.assert_close(logits[0], expected.expand(2, 3, 3))


def test_heads_forget_from_at_once_to_slowly():
    assert forgetting(7).tolist() == [2, 1, 0.5, 0.25, 0.125, 0.0625, 0.03125]
    assert forgetting(1).tolist() == [0.25]
    assert not Distance(3)
    assert Distance(3, own=False).rates().tolist() == [0, 0, 0]


# --- the rate of what stands around a token ---------------------------------------------------------------


@both
@pytest.mark.parametrize("entries", [1, 200, 2**22])
def test_the_local_rate_is_by_the_definition(causal, entries, monkeypatch):
    """The rate of tokens each scaled by the root of its share of n."""
    import sys

    monkeypatch.setattr(sys.modules[local_coding_rate.__module__], "PREFIX_ENTRIES", entries)
    z, rates = normal(3, 2, 7, 4), torch.tensor([0.3, 1.5])
    expected = torch.zeros(3, 2, dtype=torch.float64)
    for k in range(2):
        for t in range(7):
            seen = torch.arange(t + 1 if causal else 7)
            weights = torch.exp(-rates[k] * (t - seen).abs()).double()
            scaled = z[:, k, seen] * (weights / weights.sum() * len(seen)).sqrt()[:, None]
            expected[:, k] += coding_rate(scaled, 0.3) / 7
    torch.testing.assert_close(
        local_coding_rate(z, 0.3, rates, causal=causal), expected, rtol=1e-6, atol=1e-7
    )


def test_without_forgetting_it_is_the_rate_of_all_or_of_prefixes():
    z = normal(3, 2, 7, 4)
    torch.testing.assert_close(local_coding_rate(z, 0.3, torch.zeros(2)), coding_rate(z, 0.3))
    prefixes = local_coding_rate(z, 0.3, torch.zeros(2), causal=True)
    torch.testing.assert_close(prefixes, prefix_coding_rate(z, 0.3))


@both
def test_steps_that_forget_are_held_to_it(causal):
    step, z = MSSA(DIM, 2, causal=causal, recency=True).double(), normal(2, 6, DIM)
    assert step.objective_name == ("R^c(Z_<=t | U)" if causal else "R^c(Z_~t | U)")
    w = F.normalize(step.project(z), dim=-1)
    expected = local_coding_rate(w, step.eps, forgetting(2), causal=causal).sum(-1)
    torch.testing.assert_close(step.objective(z, z), expected)


def test_the_gradient_of_a_prefix_weighs_tokens_as_the_softmax_does():
    """Of the last token, to second order in b = d / eps^2: b w_tt (z_t - b sum_s w_ts (z_t z_s) z_s)."""
    z, b, distance = normal(5, 4), 1e-3, torch.arange(4, -1, -1)
    weights = torch.exp(-forgetting(1) * distance).double()
    weights = weights / weights.sum()
    last = z[-1].clone().requires_grad_()
    tokens = torch.cat([z[:-1], last[None]])
    rate = 0.5 * torch.logdet(torch.eye(4) + b * (weights[:, None] * tokens).mT @ tokens)
    (gradient,) = torch.autograd.grad(rate, last)
    towards = (weights * (z @ z[-1])) @ z
    torch.testing.assert_close(z[-1] - gradient / (b * weights[-1]), b * towards, rtol=2e-2, atol=0)
