"""Which optimiser for which parameter, the schedule, the average."""

import math

import pytest
import timm
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from pellucid.models import create_model
from pellucid.training.learner import _mix
from pellucid.training.recipe import Average, MuonAdamW, cosine_with_warmup, split_parameters

LAYER_MATRICES = {
    "crate_digits": {"compress.subspaces.weight", "sparsify.dictionary"},
    "vit_digits": {"attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"},
}


@pytest.mark.parametrize(
    "name", ["crate_digits", "vit_digits", "crate_micro_patch4_32", "vit_micro_patch4_32"]
)
def test_every_parameter_has_one_place(name):
    model = create_model(name)
    parts = split_parameters(model)
    names = [key for part in parts for key in part]
    assert sorted(names) == sorted(key for key, _ in model.named_parameters())
    optimizer = MuonAdamW(model, 1e-3, 1e-2, 0.05)
    ours = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(ours) == sorted(id(p) for p in model.parameters())


@pytest.mark.parametrize("name", ["crate_digits", "vit_digits"])
def test_which_parameters_go_where(name):
    model = create_model(name)
    matrices, decayed, plain = split_parameters(model)
    layers = "layers" if name.startswith("crate") else "blocks"
    for key, parameter in matrices.items():
        assert key.startswith(f"{layers}."), key
        assert parameter.dim() == 2
    expected = {key for key, p in model.named_parameters() if key.startswith(f"{layers}.") and p.dim() == 2}
    assert set(matrices) == expected
    assert {key.split(".", 2)[2] for key in matrices} == LAYER_MATRICES[name]
    stem = "embed.stem.proj.weight" if name.startswith("crate") else "patch_embed.proj.weight"
    assert set(decayed) == {stem, "head.weight"}
    positions = [key for key, _ in model.named_parameters() if "pos_embed" in key or "cls_token" in key]
    positions += [key for key, _ in model.named_parameters() if "class_token" in key]
    assert len(positions) == 2
    vectors = {key for key, p in model.named_parameters() if p.dim() < 2}
    assert any("norm" in key for key in vectors)
    assert set(plain) == vectors | set(positions)


def test_frozen_parameters_are_left_out():
    model = create_model("crate_digits")
    model.embed.requires_grad_(False)
    names = [key for part in split_parameters(model) for key in part]
    assert names
    assert not [key for key in names if key.startswith("embed.")]


def test_any_model_of_timm_and_a_bare_module():
    model = timm.create_model("resnet10t", num_classes=3)
    matrices, decayed, _ = split_parameters(model)
    assert matrices == {}
    assert "fc.weight" in decayed
    assert sorted(split_parameters(nn.Linear(3, 2))[0]) == ["weight"]


def test_rates_and_decay_reach_the_right_groups():
    model = create_model("crate_digits")
    optimizer = MuonAdamW(model, lr=1e-3, matrix_lr=2e-2, weight_decay=0.07)
    optimizer.set_lr(0.5)
    matrices, decayed, plain = split_parameters(model)
    expected = {id(p): (1e-2, 0.07) for p in matrices.values()}
    expected |= {id(p): (5e-4, 0.07) for p in decayed.values()}
    expected |= {id(p): (5e-4, 0.0) for p in plain.values()}
    found = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert found == expected
    kinds = {
        id(p): type(part).__name__ for part in optimizer.parts for g in part.param_groups for p in g["params"]
    }
    assert {kinds[id(p)] for p in matrices.values()} == {"Muon"}
    assert {kinds[id(p)] for p in [*decayed.values(), *plain.values()]} == {"AdamW"}


def test_decay_alone_shrinks_what_it_should():
    """One step along a zero gradient: matrices and classifier by lr * decay, norms and positions not."""
    model = create_model("crate_digits")
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = MuonAdamW(model, lr=0.1, matrix_lr=0.2, weight_decay=0.5)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    matrices, decayed, plain = split_parameters(model)
    for names, factor in ((matrices, 1 - 0.2 * 0.5), (decayed, 1 - 0.1 * 0.5), (plain, 1.0)):
        for name in names:
            torch.testing.assert_close(names[name].detach(), start[name] * factor)


def steps(model, optimizer, count, seed):
    for step in range(count):
        generator = torch.Generator().manual_seed(seed + step)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.set_lr(1 / (1 + step))
        optimizer.step()


def test_state_round_trip_goes_on_with_the_same_bits():
    models = [create_model("crate_digits", depth=1) for _ in range(3)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    whole, first, second = (MuonAdamW(model, 1e-2, 1e-2, 0.1) for model in models)
    steps(models[0], whole, 3, seed=0)
    steps(models[0], whole, 3, seed=50)

    steps(models[1], first, 3, seed=0)
    saved = {name: value.clone() for name, value in first.tensors().items()}
    models[2].load_state_dict(models[1].state_dict())
    second.load_tensors(saved)
    steps(models[2], second, 3, seed=50)
    for name, value in models[0].state_dict().items():
        assert torch.equal(models[2].state_dict()[name], value), name

    slots = {name.rsplit("/", 1)[1] for name in saved}
    assert slots == {"momentum_buffer", "exp_avg", "exp_avg_sq", "step"}
    assert {name.rsplit("/", 1)[0] for name in saved} == {name for name, _ in models[0].named_parameters()}
    kept = {name: value.clone() for name, value in saved.items()}
    steps(models[2], second, 1, seed=9)
    assert all(torch.equal(saved[name], kept[name]) for name in saved)  # not the optimiser's own storage

    models[1].load_state_dict(models[0].state_dict())
    steps(models[1], MuonAdamW(models[1], 1e-2, 1e-2, 0.1), 1, seed=3)
    steps(models[0], whole, 1, seed=3)
    assert not torch.equal(models[0].head.weight, models[1].head.weight)  # a lost state would show


def test_a_closure_is_called_with_gradients_on():
    model = nn.Linear(3, 2)
    optimizer = MuonAdamW(model, 1e-2, 1e-2, 0.0)

    def closure():
        loss = model(torch.ones(1, 3)).square().sum()
        loss.backward()
        return loss

    before = model.weight.detach().clone()
    assert optimizer.step(closure) > 0
    assert not torch.equal(model.weight, before)


# --- schedule -----------------------------------------------------------------------------------------

shares = st.floats(0, 0.99)


@given(st.integers(1, 5000), shares, st.floats(0, 1))
def test_the_schedule(total, warmup, final):
    factors = [cosine_with_warmup(step, total, warmup, final) for step in range(total)]
    assert all(0 < factor <= 1 or factor == final for factor in factors)
    assert max(factors) == pytest.approx(1)
    peak = factors.index(max(factors))
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    rise = max(1, round(warmup * total))
    assert peak <= rise
    assert all(factor >= min(final, 1) - 1e-12 for factor in factors[rise:])


@given(st.integers(2, 5000), shares)
def test_warm_up_is_a_straight_line(total, warmup):
    rise = max(1, round(warmup * total))
    assume(rise < total)
    assert cosine_with_warmup(rise - 1, total, warmup) == 1
    assert cosine_with_warmup(rise, total, warmup) == 1
    assert cosine_with_warmup(0, total, warmup) == pytest.approx(1 / rise)
    middle = rise + (total - rise) / 2
    assert cosine_with_warmup(middle, total, warmup) == pytest.approx(0.5)


def test_the_shortest_runs():
    assert cosine_with_warmup(0, 1) == 1
    assert [cosine_with_warmup(step, 2) for step in range(2)] == [1, 1]
    assert cosine_with_warmup(10, 10, 0.1) == pytest.approx(0, abs=1e-12)
    assert cosine_with_warmup(10, 10, 0.1, final=0.25) == 0.25


# --- average ------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=40), st.floats(0.01, 0.999))
def test_the_average_is_the_closed_form(values, decay):
    """w_T = sum over t of (1 - d_t) * prod of later d * v_t + prod of all d * v_start."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, 3.0)
    average = Average(model, decay)
    for step, value in enumerate(values):
        nn.init.constant_(model.weight, value)
        average.update(model, step)
    decays = [min(decay, (1 + step) / (10 + step)) for step in range(len(values))]
    expected = 3.0 * math.prod(decays)
    for step, value in enumerate(values):
        expected += (1 - decays[step]) * math.prod(decays[step + 1 :]) * value
    assert average.weights["weight"].item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_the_average_of_a_counter_is_the_counter():
    model = nn.BatchNorm1d(2)
    average = Average(model, 0.9)
    for step in range(3):
        model(torch.randn(4, 2))
        average.update(model, step)
    assert average.weights["num_batches_tracked"] == 3
    assert not torch.equal(average.weights["running_mean"], model.running_mean)


def test_the_average_owns_its_weights():
    model = nn.Linear(2, 2)
    average = Average(model, 0.9)
    before = average.weights["weight"].clone()
    with torch.no_grad():
        model.weight += 1
    assert torch.equal(average.weights["weight"], before)


def test_step_seeds_do_not_meet():
    seeds = {_mix(seed, step, micro) for seed in range(5) for step in range(300) for micro in range(8)}
    assert len(seeds) == 5 * 300 * 8
    assert all(0 <= seed < 2**63 for seed in seeds)
