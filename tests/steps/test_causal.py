"""Steps on tokens in their order: what each token descends, what it cannot see, and how a step goes on."""

import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pellucid.objectives import (
    coding_rate,
    prefix_coding_rate,
    prefix_variational_coding_rate,
    variational_coding_rate,
)
from pellucid.steps import (
    ISTA,
    MHSA,
    MLP,
    MSSA,
    CausalTSSA,
    Layer,
    Memory,
    StepRecord,
    UntiedCausalTSSA,
    UntiedMSSA,
    unroll,
)

DIM = 8
CAUSAL = {
    "MSSA": lambda **kw: MSSA(DIM, 2, causal=True, **kw),
    "UntiedMSSA": lambda **kw: UntiedMSSA(DIM, 2, causal=True, **kw),
    "MHSA": lambda **kw: MHSA(DIM, 2, causal=True, **kw),
    "MSSA, near": lambda **kw: MSSA(DIM, 2, causal=True, recency=True, **kw),
    "MSSA, of others": lambda **kw: MSSA(DIM, 2, causal=True, own=False, **kw),
    "UntiedMSSA, near, of others": lambda **kw: UntiedMSSA(
        DIM, 2, causal=True, recency=True, own=False, **kw
    ),
    "MHSA, near": lambda **kw: MHSA(DIM, 2, causal=True, recency=True, **kw),
    "CausalTSSA": lambda **kw: CausalTSSA(DIM, 2, **kw),
    "UntiedCausalTSSA": lambda **kw: UntiedCausalTSSA(DIM, 2, block_size=12, layer_scale=0.5, **kw),
}
every = pytest.mark.parametrize("name", CAUSAL)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def made(name, seed=0, dtype=torch.float64, **options):
    step = CAUSAL[name](**options).to(dtype)
    with torch.no_grad():
        for i, parameter in enumerate(step.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=100 * seed + i) / DIM**0.5)
    return step


# --- objectives of prefixes -------------------------------------------------------------------------------


@pytest.mark.parametrize("entries", [1, 200, 2**22])
def test_the_rate_of_prefixes_is_the_mean_of_their_rates(entries, monkeypatch):
    """However many Gram matrices are held at once."""
    monkeypatch.setattr(sys.modules[prefix_coding_rate.__module__], "PREFIX_ENTRIES", entries)
    z = normal(2, 3, 9, 4)
    expected = torch.stack([coding_rate(z[..., :t, :], 0.3) for t in range(1, 10)]).mean(0)
    torch.testing.assert_close(prefix_coding_rate(z, 0.3), expected)
    assert prefix_coding_rate(z.bfloat16(), 0.3).dtype == torch.float32


def test_the_bound_of_prefixes_is_the_mean_of_their_bounds():
    z, U, shift = normal(2, 9, 6), normal(2, 6, 3, seed=1), normal(2, 3, seed=2)
    membership = normal(2, 9, 2, seed=3).softmax(-1)
    options = {"eps": 0.3, "shift": shift}
    expected = torch.stack(
        [variational_coding_rate(z[:, :t], U, membership[:, :t], **options) for t in range(1, 10)]
    ).mean(0)
    torch.testing.assert_close(prefix_variational_coding_rate(z, U, membership, **options), expected)


def test_what_cannot_be_coded():
    with pytest.raises(ValueError, match="eps is 0"):
        prefix_coding_rate(normal(1, 3, 2), 0.0)
    with pytest.raises(ValueError, match="NaN"):
        prefix_coding_rate(torch.full((1, 3, 2), torch.nan), 0.1)


# --- what each token descends -----------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [0.5, None])
def test_a_token_moves_by_the_gradient_of_its_own_prefix(eps):
    """At groups chosen when each token arrived, which is what the objective holds fixed."""
    step = made("CausalTSSA", step_size=0.7, eps=eps)
    z = normal(2, 6, DIM)
    moved, membership = step(z) - z, step.membership(step.project(z)).mT
    for t in range(6):
        prefix = z[:, : t + 1].clone().requires_grad_()
        bound = variational_coding_rate(prefix, step.U, membership[:, : t + 1], step.eps)
        gradient = torch.autograd.grad(bound.sum(), prefix)[0][:, -1]
        torch.testing.assert_close(moved[:, t], -0.7 * (t + 1) * gradient, rtol=1e-9, atol=1e-12)


def test_its_objective_is_the_mean_bound_at_the_starts_groups():
    step, z, other = made("CausalTSSA"), normal(2, 6, DIM), normal(2, 6, DIM, seed=1)
    membership = step.membership(step.project(z)).mT
    expected = prefix_variational_coding_rate(other, step.U, membership, step.eps)
    torch.testing.assert_close(step.objective(other, z), expected)
    assert step.objective_name == "R^c_var(Z_<=t | U)"


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_with_bases_apart_the_bound_of_every_prefix_falls(share):
    """Every coordinate shrinks, so every moment does."""
    for seed in range(10):
        step = made("CausalTSSA", seed, eps=(0.3, 3.0)[seed % 2])
        with torch.no_grad():
            step.subspaces.weight.copy_(torch.linalg.qr(normal(DIM, DIM, seed=seed)).Q)
        step.step_size = share * 2 / step.scale
        z = normal(2, 7, DIM, seed=seed)
        z_next, membership = step(z), step.membership(step.project(z)).mT
        for t in range(1, 8):
            before, after = (
                variational_coding_rate(v[:, :t], step.U, membership[:, :t], step.eps) for v in (z, z_next)
            )
            assert (after < before).all()
        assert step.max_step_size() is None  # nothing holds learned bases there


def test_causal_attention_is_held_to_the_rate_of_prefixes():
    step, z = made("UntiedMSSA", norm=nn.LayerNorm(DIM)), normal(2, 6, DIM)
    assert step.objective_name == "R^c(Z_<=t | U)"
    assert UntiedMSSA(DIM, 2).objective_name == "R^c(Z | U)"
    w = F.normalize(step.project(z), dim=-1)
    torch.testing.assert_close(step.objective(z, z), prefix_coding_rate(w, step.eps).sum(-1))
    whole = MSSA(DIM, 2).double()
    whole.load_state_dict({k: v for k, v in step.state_dict().items() if "subspaces" in k})
    assert not torch.allclose(step.objective(z, z), whole.objective(z, z))


def test_attention_weights_are_those_of_the_past():
    for name in (name for name in CAUSAL if "TSSA" not in name):
        step, z = made(name), normal(1, 5, DIM)
        weights = step.attention(z)
        assert torch.equal(weights, weights.tril())
        torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 5, dtype=torch.float64))


def test_formed_weights_of_a_bfloat16_backward_pass_are_causal_too():
    step = made("MSSA", dtype=torch.bfloat16)
    z = normal(1, 6, DIM, dtype=torch.bfloat16).requires_grad_()
    out = step(z)
    out[0, 2].float().sum().backward()
    assert z.grad[0, :3].any()
    assert not z.grad[0, 3:].any()


# --- the past, and nothing else ---------------------------------------------------------------------------


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_comes_later_changes_no_bit(name, dtype):
    step, z = made(name, dtype=dtype), normal(2, 11, DIM, dtype=dtype)
    with torch.no_grad():
        out = step(z)
        for t in range(11):
            other = z.clone()
            other[:, t:] = 100 * normal(2, 11 - t, DIM, seed=t + 1, dtype=dtype)
            changed = step(other)
            assert torch.equal(changed[:, :t], out[:, :t])
            assert not torch.equal(changed[:, t], out[:, t])


@every
def test_tokens_may_be_zero_or_all_alike(name):
    for z in (torch.zeros(1, 6, DIM), torch.ones(1, 6, DIM)):
        step = made(name, dtype=torch.float32)
        z.requires_grad_()
        step(z).square().sum().backward()
        assert z.grad.isfinite().all()
        assert all(parameter.grad.isfinite().all() for parameter in step.parameters())


# --- going on where the last tokens ended -----------------------------------------------------------------


def in_parts(step, z, parts):
    """The step on ``z`` as it arrives."""
    memory, out, start = Memory(len(z)), [], 0
    for size in parts:
        memory.expect(size)
        moved, memory.states[1, "s"] = step.resume(
            z[:, start : start + size], memory.states.get((1, "s")), memory
        )
        memory.arrive()
        out.append(moved)
        start += size
    return torch.cat(out, 1), memory


@every
@pytest.mark.parametrize("parts", [[11], [1] * 11, [5, 1, 1, 4], [2, 9], [1, 3, 7]])
@torch.no_grad()
def test_in_parts_as_in_one(name, parts):
    step, z = made(name), normal(3, 11, DIM)
    torch.testing.assert_close(in_parts(step, z, parts)[0], step(z), rtol=1e-12, atol=1e-12)


@every
@torch.no_grad()
def test_rows_of_different_lengths(name):
    """Padded behind at first; each row then goes on behind its own last token."""
    step, lengths, more = made(name), torch.tensor([3, 7, 1]), 4
    rows = [normal(1, int(n) + more, DIM, seed=i) for i, n in enumerate(lengths)]
    padded = torch.cat(
        [F.pad(row[:, :n], (0, 0, 0, 7 - n), value=9.0) for row, n in zip(rows, lengths, strict=True)]
    )
    memory = Memory(3)
    for t in range(-1, more):
        arriving = (
            padded
            if t < 0
            else torch.cat([row[:, n + t, None] for row, n in zip(rows, lengths, strict=True)])
        )
        memory.expect(arriving.shape[1], lengths if t < 0 else None)
        moved, memory.states[1, "s"] = step.resume(arriving, memory.states.get((1, "s")), memory)
        memory.arrive()
        for i, (row, n) in enumerate(zip(rows, lengths, strict=True)):
            whole = step(row)[0]
            expected = whole[:n] if t < 0 else whole[n + t, None]
            torch.testing.assert_close(moved[i, : len(expected)], expected, rtol=1e-11, atol=1e-12)


@torch.no_grad()
def test_what_is_kept():
    """One tensor for subspaces, two for free attention, and of statistics the same at any length."""
    for n in (8, 64):
        z = normal(1, n, DIM)
        kept = {}
        for name in CAUSAL:
            step = made(name) if name != "UntiedCausalTSSA" else CausalTSSA(DIM, 2).double()
            kept[name] = in_parts(step, z, [n])[1].numel()
        assert kept["MSSA"] == kept["UntiedMSSA"] == n * DIM
        assert kept["MHSA"] == 2 * n * DIM
        assert kept["CausalTSSA"] == kept["UntiedCausalTSSA"] == 2 * DIM + 2


def test_room_grows_by_doubling():
    memory = in_parts(made("MSSA"), normal(1, 40, DIM), [1] * 40)[1]
    assert memory.states[1, "s"].shape[-2] == 64


def test_more_tokens_than_there_are_offsets():
    step = made("UntiedCausalTSSA")
    with pytest.raises(ValueError, match="13 tokens for a step with an offset for each of 12 places"):
        step(normal(1, 13, DIM))
    with pytest.raises(ValueError, match="13 tokens"):
        in_parts(step, normal(1, 13, DIM), [12, 1])
    assert CausalTSSA(DIM, 2)(torch.zeros(1, 100, DIM)).shape == (1, 100, DIM)


def test_a_step_that_sees_the_future_cannot_go_on():
    for step in (MSSA(DIM, 2), MHSA(DIM, 2)):
        with pytest.raises(TypeError, match="still to come"):
            step.resume(torch.zeros(1, 1, DIM), None, Memory(1))


@torch.no_grad()
def test_unroll_with_a_memory_is_unroll():
    layers = [
        Layer({"compress": made("MSSA", i), "sparsify": ISTA(DIM).double(), "mlp": MLP(DIM).double()})
        for i in range(3)
    ]
    z, memory = normal(2, 6, DIM), Memory(2)
    out = []
    for part in z.split([4, 1, 1], 1):
        memory.expect(part.shape[1])
        out.append(unroll(layers, part, memory=memory))
        memory.arrive()
    torch.testing.assert_close(torch.cat(out, 1), unroll(layers, z), rtol=1e-12, atol=1e-12)
    assert set(memory.states) == {(1, "compress"), (2, "compress"), (3, "compress")}


# --- padding ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [
    lambda: MSSA(DIM, 2), lambda: UntiedMSSA(DIM, 2), lambda: MHSA(DIM, 2),
    lambda: MSSA(DIM, 2, recency=True, own=False), lambda: MHSA(DIM, 2, recency=True),
])  # fmt: skip
def test_padding_is_not_seen(make):
    torch.manual_seed(0)
    layers = [Layer({"compress": make().double(), "sparsify": ISTA(DIM).double()}) for _ in range(2)]
    z, lengths = normal(3, 7, DIM), [7, 4, 1]
    real = torch.arange(7) < torch.tensor(lengths)[:, None]
    records: list[StepRecord] = []
    out = unroll(layers, z, real=real, on_step=records.append)
    again = unroll(layers, torch.where(real.unsqueeze(-1), z, 50.0), real=real, checkpoint=True)
    for i, n in enumerate(lengths):
        alone: list[StepRecord] = []
        expected = unroll(layers, z[i : i + 1, :n], on_step=alone.append)[0]
        torch.testing.assert_close(out[i, :n], expected, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(again[i, :n], expected, rtol=1e-11, atol=1e-12)
        for padded, own in zip(records, alone, strict=True):
            if own.step.objective_name is not None:
                for measured, wanted in zip(padded.before_and_after(), own.before_and_after(), strict=True):
                    torch.testing.assert_close(measured[i : i + 1], wanted)
