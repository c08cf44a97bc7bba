"""Token statistics: the bound they descend on, the published layer, and cost linear in the tokens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from pellucid.objectives import class_coding_rate, variational_coding_rate
from pellucid.steps import MSSA, TSSA, UntiedTSSA

both = pytest.mark.parametrize("cls", [TSSA, UntiedTSSA])


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def step_with(weight, num_heads=2, **options):
    """TSSA with these subspaces, and temperatures that differ."""
    step = TSSA(weight.shape[1], num_heads, weight.shape[0] // num_heads, **options).double()
    with torch.no_grad():
        step.subspaces.weight.copy_(weight)
        step.temperature.copy_(torch.linspace(0.5, 3, num_heads))
    return step


# --- the bound --------------------------------------------------------------------------------------------


@given(
    n=st.integers(1, 12),
    d=st.integers(1, 8),
    K=st.integers(1, 3),
    sharpness=st.sampled_from([0.0, 1.0, 30.0]),
    scale=st.floats(0.01, 100),
    eps=st.floats(0.1, 3),
    seed=st.integers(0, 10**6),
)
def test_its_objective_is_above_the_determinants_and_equal_in_their_eigenbasis(
    n, d, K, sharpness, scale, eps, seed
):
    """Whole orthonormal bases, where the exact rate is that of classes; membership as the step chooses it."""
    z = scale * normal(1, n, d, seed=seed)
    bases = torch.linalg.qr(normal(K, d, d, seed=seed + 1)).Q
    step = step_with(bases.mT.reshape(K * d, d), K, eps=eps)
    with torch.no_grad():
        step.temperature.mul_(sharpness)
    membership = step.membership(step.project(z)).mT
    torch.testing.assert_close(membership.sum(-1), torch.ones(1, n, dtype=torch.float64))
    exact = class_coding_rate(z, membership, eps).item()
    assert step.objective(z, z).item() >= exact - 1e-9 * (1 + exact)

    moments = (z.mT.unsqueeze(1) * membership.mT.unsqueeze(-2)) @ z.unsqueeze(1)
    eigenbases = torch.linalg.eigh(moments[0]).eigenvectors
    met = variational_coding_rate(z, eigenbases, membership, eps).item()
    assert met == pytest.approx(exact, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("eps", [0.2, 1.0, None])
@pytest.mark.parametrize("n", [1, 2, 9])
def test_the_step_is_minus_n_times_the_gradient_at_fixed_membership(n, eps):
    step = step_with(normal(6, 6, seed=1), step_size=0.7, eps=eps)
    z = normal(3, n, 6).requires_grad_()
    gradient = torch.autograd.grad(step.objective(z, z.detach()).sum(), z)[0]
    torch.testing.assert_close(step(z) - z, -0.7 * n * gradient, rtol=1e-10, atol=1e-13)
    moving = torch.autograd.grad(step.objective(z, z).sum(), z)[0]
    assert n == 1 or not torch.allclose(moving, gradient)  # that the membership is fixed matters


def test_membership_is_the_starts_while_the_objective_is_compared():
    step, z, other = step_with(normal(6, 6, seed=1)), normal(1, 7, 6), normal(1, 7, 6, seed=2)
    fixed = step.membership(step.project(z))
    expected = variational_coding_rate(other, step.U, fixed.mT, step.eps)
    torch.testing.assert_close(step.objective(other, z), expected)
    assert not torch.isclose(step.objective(other, z), step.objective(other, other))
    before, after = step.before_and_after(z, other)
    torch.testing.assert_close(after, expected)
    torch.testing.assert_close(before, variational_coding_rate(z, step.U, fixed.mT, step.eps))


def test_the_objective_is_that_of_normalised_and_shifted_projections():
    norm = nn.LayerNorm(6).double()
    step = step_with(normal(6, 6, seed=1), norm=norm, bias=True)
    with torch.no_grad():
        step.subspaces.bias.copy_(normal(6, seed=3))
    z, other = normal(2, 7, 6), normal(2, 7, 6, seed=2)
    membership, w = step.membership(step.project(z)), step.project(other)
    size = membership.sum(-1)
    moments = (membership.unsqueeze(-1) * w**2).sum(-2) / size.unsqueeze(-1)
    expected = (size / 7 * torch.log1p(6 / step.eps**2 * moments).sum(-1)).sum(-1) / 2
    torch.testing.assert_close(step.objective(other, z), expected)
    torch.testing.assert_close(step.objective(5 * other, z), expected, rtol=1e-3, atol=0)


def test_the_largest_safe_step_is_tight():
    """One head and tokens near zero, where log(1 + s m) is s m: just above the bound it rises."""
    step = step_with(normal(4, 4, seed=1), 1, eps=0.5)
    spectral = torch.linalg.matrix_norm(step.subspaces.weight, 2).item()
    limit = step.max_step_size()
    assert limit == pytest.approx(2 / (4 / 0.25 * spectral**2), rel=1e-6)
    worst = torch.linalg.svd(step.subspaces.weight).Vh[0].detach()
    z = 1e-4 * normal(1, 5, 1) * worst
    for share, rises in ((0.99, False), (1.01, True)):
        step.step_size = share * limit
        before, after = step.before_and_after(z, step(z))
        assert (after > before).item() == rises


def test_no_bound_behind_a_norm_or_with_a_free_output_and_any_step_without_subspaces():
    assert TSSA(8, 2, norm=nn.LayerNorm(8)).max_step_size() is None
    assert UntiedTSSA(8, 2).max_step_size() is None
    assert TSSA(8, 2).max_step_size() == pytest.approx(2)  # orthogonal, and d / eps^2 = 1
    assert step_with(torch.zeros(4, 4, dtype=torch.float64)).max_step_size() == float("inf")


# --- membership -------------------------------------------------------------------------------------------


def test_tokens_belong_to_the_subspace_where_their_energy_lies():
    basis = torch.linalg.qr(normal(8, 4)).Q
    z = torch.cat([normal(10, 2, seed=1) @ basis[:, :2].T, normal(10, 2, seed=2) @ basis[:, 2:].T])[None]
    step = step_with(basis.T.contiguous())
    with torch.no_grad():
        step.temperature.fill_(200.0)
    own = step.membership(step.project(z))[0].argmax(0)
    assert (own == torch.arange(20) // 10).all()
    weights = step.membership(step.project(1000 * z))
    torch.testing.assert_close(
        weights, step.membership(step.project(z))
    )  # lengths of all tokens do not matter


@both
def test_order_of_tokens_moves_membership_and_tokens_and_no_statistic(cls):
    step, z, order = cls(8, 2).double(), normal(2, 30, 8), torch.randperm(30)
    w = step.project(z)
    membership = step.membership(w)
    torch.testing.assert_close(step.membership(step.project(z[:, order])), membership[..., order])
    shuffled = step.moments(w[:, :, order], membership[..., order])
    torch.testing.assert_close(shuffled, step.moments(w, membership))
    torch.testing.assert_close(step(z[:, order]), step(z)[:, order])


@both
def test_tokens_that_are_all_equal_or_zero_and_heads_that_are_empty(cls):
    for z in (torch.zeros(1, 6, 8), torch.ones(1, 6, 8), torch.ones(1, 1, 8)):
        for temperature in (1.0, 1e4):
            step = cls(8, 2)
            with torch.no_grad():
                step.temperature.copy_(torch.tensor([temperature, 0.0]))
            z = z.detach().requires_grad_()
            out = step(z)
            out.square().sum().backward()
            assert out.isfinite().all()
            assert z.grad.isfinite().all()
            assert all(p.grad.isfinite().all() for p in step.parameters())
            assert step.objective(z, z).isfinite().all()


# --- the published layer ----------------------------------------------------------------------------------


def test_equals_published_attention(recorded):
    data = recorded("tost_vision")
    heads, dim = data["attn_state/temp"].shape[0], data["attn_input"].shape[-1]
    step = UntiedTSSA(dim, heads)
    step.load_state_dict(
        {
            "subspaces.weight": data["attn_state/qkv.weight"],
            "subspaces.bias": data["attn_state/qkv.bias"],
            "temperature": data["attn_state/temp"].flatten(),
            "output.weight": data["attn_state/to_out.0.weight"],
            "output.bias": data["attn_state/to_out.0.bias"],
        }
    )
    z = data["attn_input"]
    with torch.no_grad():
        moved = step.direction(step.project(z))
        torch.testing.assert_close(moved, data["attn_output"], rtol=0, atol=1e-6)
        torch.testing.assert_close(step(z), z + data["attn_output"], rtol=0, atol=1e-6)
    assert data["attn_output"].abs().max() > 0.01
    assert step.scale == pytest.approx(1)


def test_published_form_starts_as_the_derived_one():
    untied = UntiedTSSA(8, 2).double()
    tied = TSSA(8, 2).double()
    tied.subspaces.weight = untied.subspaces.weight
    assert torch.equal(untied.output.weight, untied.subspaces.weight.T)
    assert not untied.output.bias.any()
    assert not untied.subspaces.bias.any()
    z = normal(2, 5, 8)
    torch.testing.assert_close(untied(z), tied(z))


def test_layer_scale_is_a_step_size_for_each_coordinate():
    step = UntiedTSSA(8, 2, layer_scale=0.25).double()
    plain = UntiedTSSA(8, 2).double()
    plain.load_state_dict({k: v for k, v in step.state_dict().items() if k != "layer_scale"})
    few, many = normal(1, 3, 8), normal(2, 5, 8)  # tokens, beside 8 rows of a matrix
    for z in (few, many):
        torch.testing.assert_close(step(z) - z, 0.25 * (plain(z) - z))
    with torch.no_grad():
        step.layer_scale.copy_(torch.arange(8))
    for z in (few, many):
        torch.testing.assert_close(step(z) - z, torch.arange(8) * (plain(z) - z))


# --- cost -------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The largest number of entries of any tensor that is made."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.entries = max([self.entries, *sizes])
        return out


@both
def test_no_tensor_compares_tokens_with_tokens(cls):
    step, n = cls(16, 2), 4096
    z = normal(1, n, 16, dtype=torch.float32).requires_grad_()
    with Largest() as made:
        step(z).sum().backward()
        step.objective(z, z).sum().backward()
    assert made.entries == n * 16 < n * n
    with Largest() as made:  # what it looks like where they are
        MSSA(16, 2).attention(z[:, :256])
    assert made.entries >= 256 * 256


@both
def test_products_grow_in_proportion_to_the_tokens(cls):
    step, counts = cls(16, 2), []
    for n in (512, 1024):
        with FlopCounterMode(display=False) as counter:
            step(normal(1, n, 16, dtype=torch.float32))
        counts.append(counter.get_total_flops())
    assert counts[1] == 2 * counts[0]
    assert 2 * 512 * (2 * 16 * 16 + 16) <= counts[0] < 3 * 512 * (2 * 16 * 16 + 16)  # there, back, statistics


@both
def test_bfloat16_objective_is_near_that_of_float64(cls):
    """Rounded memberships would not sum to one: with many heads the objective would refuse them."""
    step = cls(64, 32).bfloat16()
    wide = cls(64, 32).double()
    wide.load_state_dict(step.state_dict())
    z = F.normalize(normal(2, 50, 64), dim=-1).bfloat16() * 8
    value, expected = step.objective(z, z), wide.objective(z.double(), z.double())
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=1e-2, atol=0)


def test_heads_that_do_not_divide_the_width_are_refused_with_those_that_do():
    for cls in (TSSA, UntiedTSSA):
        with pytest.raises(ValueError, match=r"dim 8 is not divisible by num_heads 3.*\[1, 2, 4, 8\] heads"):
            cls(8, 3)
        assert cls(8, 3, head_dim=5)(torch.ones(1, 2, 8)).shape == (1, 2, 8)
