"""Compression: attention that is never formed, and the exact gradient beside it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pellucid.objectives import subspace_coding_rate
from pellucid.steps import MSSA, Decompression, ExactCompression, UntiedMSSA

attention_steps = pytest.mark.parametrize("cls", [MSSA, UntiedMSSA])


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@attention_steps
@pytest.mark.parametrize("with_norm", [False, True])
def test_the_attention_shown_is_the_attention_used(cls, with_norm):
    step = cls(8, 2, norm=nn.LayerNorm(8) if with_norm else None).double()
    z = 2 * normal(3, 7, 8)
    weights = step.attention(z)
    assert weights.shape == (3, 2, 7, 7)
    assert (weights > 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 2, 7, dtype=torch.float64))
    mixed = (weights @ step.project(z)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(step.attend(step.project(z)), mixed, rtol=1e-10, atol=1e-12)
    output = step.output(mixed) if cls is UntiedMSSA else mixed @ step.subspaces.weight
    torch.testing.assert_close(step(z), z + output, rtol=1e-10, atol=1e-12)


def test_projection_and_bases_agree():
    step = MSSA(8, 2, head_dim=3).double()
    z = normal(3, 5, 8)
    assert step.U.shape == (2, 8, 3)
    for k in range(2):
        torch.testing.assert_close(step.project(z)[:, k], z @ step.U[k])


def test_published_form_starts_as_the_derived_one():
    tied, untied = MSSA(8, 2).double(), UntiedMSSA(8, 2).double()
    untied.subspaces.load_state_dict(tied.subspaces.state_dict())
    with torch.no_grad():
        untied.output.weight.copy_(tied.subspaces.weight.T)
    fresh = UntiedMSSA(8, 2)
    assert torch.equal(fresh.output.weight, fresh.subspaces.weight.T)
    assert not fresh.output.bias.any()
    z = normal(2, 5, 8)
    torch.testing.assert_close(untied(z), tied(z))


@attention_steps
def test_attention_is_held_to_the_published_layerwise_measure(cls, recorded):
    data = recorded("coding_rate_measure")
    b, heads, n, p = data["projected"].shape
    step = cls(heads * p, heads, eps=0.1)  # the program's eps of 0.01 is a square
    with torch.no_grad():
        step.subspaces.weight.copy_(torch.eye(heads * p))
    z = data["projected"].transpose(1, 2).flatten(2)
    value = step.objective(z, z)
    assert value.shape == (b,)
    torch.testing.assert_close(value.mean(), data["mean"], rtol=1e-5, atol=0)
    torch.testing.assert_close(value.std(), data["std"], rtol=1e-4, atol=0)
    lengths = torch.linspace(0.1, 10, n)[:, None]
    torch.testing.assert_close(
        step.objective(lengths * z, z), value, rtol=1e-4, atol=0
    )  # growth fakes nothing


def test_exact_compression_is_held_to_the_rate_of_normalised_tokens():
    norm = nn.LayerNorm(8).double()
    step, z = ExactCompression(8, 2, eps=0.3, norm=norm).double(), normal(2, 5, 8)
    expected = subspace_coding_rate(norm(z), step.U, 0.3)
    torch.testing.assert_close(step.objective(z, z), expected)
    torch.testing.assert_close(step.objective(5 * z, z), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 9, 20])  # p = 4
def test_exact_compression_is_the_gradient_of_its_objective(n):
    step = ExactCompression(8, 2, step_size=0.7, eps=0.4).double()
    with torch.no_grad():
        step.subspaces.weight.copy_(normal(8, 8, seed=2))
    for scale in (1e-3, 1.0, 1e3):
        z = (scale * normal(3, n, 8)).requires_grad_()
        gradient = torch.autograd.grad(step.objective(z, z).sum(), z)[0]
        torch.testing.assert_close(step(z), z - 0.7 * gradient, rtol=1e-9, atol=1e-12)


def test_exact_compression_survives_tokens_that_are_all_equal_or_zero():
    step = ExactCompression(8, 2, eps=0.1)
    for z in (torch.zeros(1, 6, 8), torch.ones(1, 6, 8), torch.ones(1, 2, 8)):
        z = z.requires_grad_()
        out = step(z)
        out.sum().backward()
        assert out.isfinite().all()
        assert z.grad.isfinite().all()


def test_planted_subspaces_attract_their_tokens():
    """Tokens near two orthogonal planes, and those planes as the heads: attention goes to one's own plane."""
    basis = torch.linalg.qr(normal(8, 4)).Q
    z = torch.cat([normal(10, 2, seed=1) @ basis[:, :2].T, normal(10, 2, seed=2) @ basis[:, 2:].T])[None]
    step = MSSA(8, 2, head_dim=2).double()
    with torch.no_grad():
        step.subspaces.weight.copy_(4 * basis.T)
    weights = step.attention(z)[0]
    own = torch.arange(20) // 10
    for head in range(2):
        inside = weights[head][own == head][:, own == head].sum(-1).mean()
        assert inside > 0.8
    exact = ExactCompression(8, 2, head_dim=2).double()
    exact.load_state_dict(step.state_dict())
    exact.step_size = 0.5 * exact.max_step_size(num_tokens=20)
    assert exact.objective(exact(z), z) < exact.objective(z, z)


def test_tokens_around_two_directions_are_drawn_to_them():
    """One subspace, tokens scattered about two of its directions: the step makes them cheaper to code."""
    centres = torch.eye(8, dtype=torch.float64)[:2].repeat_interleave(10, 0)
    z = (3 * centres + 0.5 * normal(20, 8, seed=3))[None]
    step = MSSA(8, 1).double()
    with torch.no_grad():
        step.subspaces.weight.copy_(torch.eye(8))
    assert step.objective(step(z), z) < 0.9 * step.objective(z, z)
    scaled = step.objective(10 * z, z)
    torch.testing.assert_close(scaled, step.objective(z, z))  # length is not what it measures


def test_attention_lowers_the_rate_of_tokens_that_lie_in_bundles():
    """What it was derived for; elsewhere the audit measures."""
    for seed in range(20):
        bundles = 3 * normal(1, 2, 8, seed=seed).repeat_interleave(10, 1)
        z = bundles + 0.5 * normal(1, 20, 8, seed=seed + 100)
        step = MSSA(8, 2).double()
        assert step.objective(step(z), z) < 0.95 * step.objective(z, z)


def test_decompression_is_compression_backwards():
    there, back = UntiedMSSA(8, 2, step_size=0.3).double(), Decompression(8, 2, step_size=0.3).double()
    back.load_state_dict(there.state_dict())
    with torch.no_grad():
        there.output.bias.copy_(normal(8, seed=4))
        back.output.bias.copy_(there.output.bias)
    z, other = normal(2, 5, 8), normal(2, 5, 8, seed=1)
    torch.testing.assert_close(back(z) - z, z - there(z))
    assert not torch.allclose(back(z), z)
    assert back.objective_name == f"-{there.objective_name}"
    assert torch.equal(back.objective(other, z), -there.objective(other, z))


def test_decompression_raises_the_rate_that_compression_lowers():
    """Tokens in bundles are drawn together by one and driven apart by the other."""
    for seed in range(20):
        bundles = 3 * normal(1, 2, 8, seed=seed).repeat_interleave(10, 1)
        z = bundles + 0.5 * normal(1, 20, 8, seed=seed + 100)
        there, back = UntiedMSSA(8, 2, step_size=0.3).double(), Decompression(8, 2, step_size=0.3).double()
        back.load_state_dict(there.state_dict())
        rate = there.objective(z, z)
        assert there.objective(there(z), z) < 0.99 * rate
        assert there.objective(back(z), z) > 1.01 * rate
        before, after = back.before_and_after(z, back(z))
        assert after < before  # downhill in its own terms


@pytest.mark.parametrize("cls", [UntiedMSSA, Decompression])
def test_the_output_bias_can_be_left_out(cls):
    step, without = cls(8, 2).double(), cls(8, 2, output_bias=False).double()
    assert without.state_dict().keys() == step.state_dict().keys() - {"output.bias"}
    without.load_state_dict({name: p for name, p in step.state_dict().items() if name != "output.bias"})
    z = normal(2, 5, 8)
    torch.testing.assert_close(without(z), step(z))  # it begins at zero


def test_max_step_size_is_a_lipschitz_bound_and_none_behind_a_norm():
    step = ExactCompression(8, 2, eps=0.5)
    b = 4 / (20 * 0.25)
    assert step.max_step_size(num_tokens=20) == pytest.approx(2 / b, rel=1e-5)  # orthogonal bases
    assert step.max_step_size() is None
    assert ExactCompression(8, 2, norm=nn.LayerNorm(8)).max_step_size(num_tokens=20) is None


@attention_steps
@pytest.mark.parametrize("n", [9, 600])  # below and above the length to which weights are formed
def test_bfloat16_training_equals_float64(cls, n):
    step = cls(16, 2).bfloat16()
    wide = cls(16, 2).double()
    wide.load_state_dict(step.state_dict())
    z = normal(2, n, 16, dtype=torch.bfloat16)
    weight = normal(2, n, 16, seed=3)
    gradients = {}
    for name, module, tokens in (("narrow", step, z), ("wide", wide, z.double())):
        tokens.requires_grad_()
        (module(tokens).double() * weight).sum().backward()
        gradients[name] = [tokens.grad, *(p.grad for p in module.parameters())]
    for narrow, exact in zip(gradients["narrow"], gradients["wide"], strict=True):
        assert exact.any()
        assert (narrow.double() - exact).norm() < 0.02 * exact.norm()


def test_weights_are_formed_only_where_that_is_faster(monkeypatch):
    calls = []
    inner = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **kw: calls.append(1) or inner(*a, **kw)
    )
    step, z = MSSA(16, 2), normal(1, 9, 16, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        step(z)
    assert not calls
    step(z)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        step(z)
    assert len(calls) == 2


def test_heads_that_do_not_divide_the_width_are_refused_with_those_that_do():
    for cls in (MSSA, UntiedMSSA, Decompression, ExactCompression):
        with pytest.raises(ValueError, match=r"dim 8 is not divisible by num_heads 3.*\[1, 2, 4, 8\] heads"):
            cls(8, 3)
        assert cls(8, 3, head_dim=5)(torch.ones(1, 2, 8)).shape == (1, 2, 8)
