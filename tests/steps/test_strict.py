"""Strict steps: what they promise must hold for any parameters, not only for learnt ones."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pellucid.objectives import subspace_overlap
from pellucid.steps import MSSA, SoftISTA, StrictCompression, StrictISTA, unroll
from pellucid.steps.mssa import Orthonormal
from pellucid.steps.strict import spectral_bound


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 10_000), st.floats(1e-6, 1e6))
def test_the_spectral_bound_is_above_the_norm_and_close(rows, columns, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    matrix = scale * torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    norm = torch.linalg.matrix_norm(matrix, 2) ** 2
    bound = spectral_bound(matrix)
    assert norm * (1 - 1e-10) <= bound <= norm * min(rows, columns) ** (1 / 64) * (1 + 1e-10)


def test_the_spectral_bound_is_loosest_where_all_values_are_equal():
    assert spectral_bound(torch.eye(64, dtype=torch.float64)).item() == pytest.approx(64 ** (1 / 64))
    assert spectral_bound(torch.eye(64, dtype=torch.float64), squarings=0).item() == pytest.approx(8)


def test_the_spectral_bound_has_a_gradient_where_values_coincide():
    matrix = torch.eye(5, dtype=torch.float64, requires_grad=True)
    spectral_bound(matrix).backward()
    assert matrix.grad.isfinite().all()
    assert matrix.grad.any()
    assert torch.autograd.gradcheck(
        spectral_bound, torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    )


@given(st.integers(1, 12), st.integers(0, 12), st.integers(0, 10_000), st.floats(1e-3, 1e3))
def test_orthonormal_rows(rows, more, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    matrix = scale * torch.randn(rows, rows + more, generator=generator, dtype=torch.float64)
    made = Orthonormal()(matrix)
    torch.testing.assert_close(made @ made.mT, torch.eye(rows, dtype=torch.float64), rtol=0, atol=1e-9)


def test_orthonormal_rows_from_a_matrix_that_has_none():
    """Dependent rows, zeros: what training passes through now and then."""
    one = torch.ones(4, 6, dtype=torch.float64)
    for matrix in (one, torch.zeros_like(one), torch.eye(6, dtype=torch.float64)[[0, 0, 1, 1]]):
        leaf = matrix.clone().requires_grad_()
        made = Orthonormal()(leaf)
        torch.testing.assert_close(made @ made.mT, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-12)
        (made * torch.arange(24.0).view(4, 6)).sum().backward()
        assert leaf.grad.isfinite().all()
        assert leaf.grad.any()


def test_orthonormal_rows_can_reach_any_subspace():
    """Gradient descent on the parameter brings random rows onto a target that it was not told."""
    generator = torch.Generator().manual_seed(0)
    target = torch.linalg.qr(torch.randn(6, 3, generator=generator, dtype=torch.float64)).Q.mT
    matrix = torch.randn(3, 6, generator=generator, dtype=torch.float64).requires_grad_()
    optimiser = torch.optim.Adam([matrix], lr=0.1)
    for _ in range(1500):
        loss = 3 - (Orthonormal()(matrix) @ target.mT).square().sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 1e-3


def test_subspaces_stay_orthonormal_whatever_is_learnt():
    step = MSSA(12, 3, orthonormal=True)
    optimiser = torch.optim.SGD(step.parameters(), lr=0.3)
    for seed in range(5):
        z = torch.randn(2, 6, 12, generator=torch.Generator().manual_seed(seed))
        step(z).pow(4).mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    free = MSSA(12, 3)
    free.subspaces.weight.data = step.subspaces.parametrizations.weight.original.data
    assert subspace_overlap(free.U) > 1e-2  # the parameter has moved away
    assert subspace_overlap(step.U) < 1e-10


@pytest.mark.parametrize("made", [MSSA, StrictCompression])
def test_more_subspaces_than_room_are_refused(made):
    options = {"orthonormal": True} if made is MSSA else {}
    with pytest.raises(ValueError, match="3 subspaces of dimension 4 overlap in 8 dimensions"):
        made(8, 3, 4, **options)


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0, 2.0])
def test_a_share_outside_its_interval_is_refused(share):
    for make in (lambda: StrictISTA(6, share=share), lambda: StrictCompression(6, 2, share=share)):
        with pytest.raises(ValueError, match="share is"):
            make()


@pytest.mark.parametrize("sparsity", [0.0, -0.1])
def test_a_price_that_cannot_be_learned_is_refused(sparsity):
    with pytest.raises(ValueError, match="sparsity is"):
        StrictISTA(6, sparsity=sparsity)


def wild(step, seed):
    """Parameters as no training would leave them: scales over eight decades, shares next to 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in step.named_parameters():
            if parameter.dim() == 0:
                parameter.copy_(8 * torch.randn((), generator=generator))
            elif "enter" not in name:
                size = 10 ** (4 * torch.rand((), generator=generator) - 2)
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return step.double()


@pytest.mark.parametrize("seed", range(40))
def test_no_parameters_make_a_strict_step_rise(seed):
    generator = torch.Generator().manual_seed(100 + seed)
    z = 10 ** (2 * torch.rand(4, 1, 1, generator=generator) - 1) * torch.randn(4, 9, 12, generator=generator)
    eps = (0.05, 0.3, 1.0, 5.0)[seed % 4]
    for step in (StrictCompression(12, 3, eps=eps), StrictISTA(12)):
        wild(step, seed)
        before, after = step.before_and_after(z.double(), step(z.double()))
        assert (after <= before + 1e-9 * before.abs()).all()


def test_steps_that_are_not_strict_do_rise_there():
    """The control: the same parameters without the bound."""
    rises = 0
    for seed in range(40):
        z = torch.randn(4, 9, 12, generator=torch.Generator().manual_seed(100 + seed), dtype=torch.float64)
        loose = wild(SoftISTA(12, step_size=0.5), seed)
        before, after = loose.before_and_after(z, loose(z))
        rises += int((after > before).any())
    assert rises > 10


def test_a_strict_network_descends_before_any_training():
    layers = [
        nn.ModuleDict(
            {
                "compress": StrictCompression(16, 4, enter=nn.LayerNorm(16)),
                "sparsify": StrictISTA(16, enter=nn.LayerNorm(16)),
            }
        )
        for _ in range(4)
    ]
    for i, layer in enumerate(layers):
        wild(layer, i)
    falls = []

    def see(record):
        before, after = record.step.before_and_after(record.z, record.z_next)
        falls.append(bool((after <= before + 1e-9 * before.abs()).all()))

    unroll(layers, torch.randn(8, 10, 16, dtype=torch.float64), on_step=see)
    assert falls == [True] * 8


def test_equals_soft_ista_at_the_step_size_that_it_learned():
    step, plain = StrictISTA(10, share=0.4, sparsity=0.2).double(), SoftISTA(10, sparsity=0.2).double()
    with torch.no_grad():
        step.dictionary.mul_(1.7)
        plain.dictionary.copy_(step.dictionary)
        plain.step_size = (0.4 * 2 / spectral_bound(step.dictionary)).item()
    z, x = torch.randn(2, 5, 10, dtype=torch.float64), torch.randn(2, 5, 10, dtype=torch.float64)
    torch.testing.assert_close(step(z), plain(z), rtol=1e-6, atol=1e-8)  # the price is stored in float32
    torch.testing.assert_close(step(z, x), plain(z, x), rtol=1e-6, atol=1e-8)
    assert step.step_size == pytest.approx(0.4)
    assert step.sparsity == pytest.approx(0.2)


def test_step_size_and_price_are_learnt():
    step = StrictISTA(6)
    step(torch.randn(2, 4, 6)).square().sum().backward()
    assert step.share.grad != 0
    assert step.log_sparsity.grad != 0
    step = StrictCompression(6, 2)
    step(torch.randn(2, 4, 6)).square().sum().backward()
    assert step.share.grad != 0


def test_the_audit_reads_a_share_of_the_bound():
    assert StrictISTA(6, share=0.25).step_size == pytest.approx(0.25)
    assert StrictCompression(6, 2, share=0.5).step_size == pytest.approx(0.5)
    assert StrictISTA(6).max_step_size(9) == StrictCompression(6, 2).max_step_size(9) == 1.0


def test_an_overcomplete_strict_step_needs_its_signal():
    step = StrictISTA(6, 12)
    with pytest.raises(ValueError, match="needs a start and a signal"):
        step(torch.randn(2, 4, 6))
    assert step(torch.zeros(2, 4, 12), torch.randn(2, 4, 6)).shape == (2, 4, 12)


def test_what_is_learnt_cannot_be_set_as_a_constant():
    for step, name in (
        (StrictISTA(6), "step_size"),
        (StrictISTA(6), "sparsity"),
        (StrictCompression(6, 2), "step_size"),
    ):
        with pytest.raises(AttributeError, match=f"{name} of {type(step).__name__} is learnt"):
            setattr(step, name, 0.5)


def test_what_is_kept_for_inference_follows_every_change():
    layers = StrictCompression(6, 2).eval(), StrictISTA(6).eval()
    z = torch.randn(2, 5, 6)
    for step in layers:
        for change in ("none", "in place", "through data", "share"):
            with torch.no_grad():
                if change == "in place":
                    next(p for p in step.parameters() if p.dim() == 2).add_(0.1 * torch.randn(6, 6))
                elif change == "through data":
                    next(p for p in step.parameters() if p.dim() == 2).data += 0.1 * torch.randn(6, 6)
                elif change == "share":
                    step.share.add_(0.5)
                kept = step(z)
            torch.testing.assert_close(step(z).detach(), kept)  # with gradients nothing is kept


def test_who_writes_into_a_weight_that_was_made_spoils_nothing():
    """As initialisers of other libraries do to every linear layer that they find."""
    step, z = StrictCompression(6, 2).eval(), torch.randn(2, 5, 6)
    with torch.no_grad():
        before = step(z)
        step.subspaces.weight.normal_()
        assert torch.equal(step(z), before)
