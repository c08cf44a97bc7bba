"""The only loop over layers: order, names, recomputation, what it accepts."""

import pytest
import torch
from torch import nn

from pellucid.steps import ISTA, MSSA, Step, unroll


def layers(depth=3):
    return nn.ModuleList(
        nn.ModuleDict(
            {"compress": MSSA(6, 2, norm=nn.LayerNorm(6)), "sparsify": ISTA(6, enter=nn.LayerNorm(6))}
        )
        for _ in range(depth)
    )


def test_steps_run_in_order_under_their_names():
    net, z, seen = layers(), torch.randn(2, 5, 6), []
    out = unroll(net, z, on_step=seen.append)
    assert [(r.layer, r.name) for r in seen] == [
        (1, "compress"), (1, "sparsify"), (2, "compress"), (2, "sparsify"), (3, "compress"), (3, "sparsify"),
    ]  # fmt: skip
    assert [r.step for r in seen] == [step for layer in net for step in layer.values()]
    by_hand = z
    for layer in net:
        by_hand = layer["compress"](by_hand)
        by_hand = layer["sparsify"](layer["sparsify"].enter(by_hand))
    assert torch.equal(out, by_hand)
    assert torch.equal(out, unroll(net, z))  # watching changes nothing


def test_bare_steps_are_layers_named_by_their_class():
    seen = []
    step = ISTA(6)
    out = unroll([MSSA(6, 2), step, {"again": step}], torch.randn(2, 5, 6), on_step=seen.append)
    assert [(r.layer, r.name) for r in seen] == [(1, "mssa"), (2, "ista"), (3, "again")]
    assert out.shape == (2, 5, 6)


def test_the_signal_reaches_every_step_unchanged():
    x, seen = torch.randn(2, 5, 6), []
    step = ISTA(6, 9)
    out = unroll([step] * 4, torch.zeros(2, 5, 9), x, on_step=seen.append)
    assert all(r.x is x for r in seen)
    z = torch.zeros(2, 5, 9)
    for _ in range(4):
        z = step(z, x)
    assert torch.equal(out, z)


def test_no_layers_is_the_identity():
    z = torch.randn(2, 5, 6)
    assert unroll([], z) is z


def test_recomputation_gives_the_same_gradients_and_runs_twice():
    net, calls = layers(), []
    net[0]["compress"].register_forward_hook(lambda *_: calls.append(1))
    z = torch.randn(2, 5, 6, requires_grad=True)
    gradients = []
    for checkpoint in (False, True):
        calls.clear()
        out = unroll(net, z, checkpoint=checkpoint)
        gradients.append(torch.autograd.grad(out.square().sum(), [z, *net.parameters()]))
        assert len(calls) == 1 + checkpoint
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain.any()
        assert torch.equal(plain, recomputed)


def test_watching_switches_recomputation_off():
    net, seen = layers(), []
    unroll(
        net, torch.randn(2, 5, 6, requires_grad=True), on_step=seen.append, checkpoint=True
    ).sum().backward()
    assert len(seen) == 6


def test_a_step_must_say_how_it_moves_and_what_it_lowers():
    class Half(Step):
        def forward(self, z, x=None):
            return z

    with pytest.raises(TypeError, match="objective"):
        Half()
