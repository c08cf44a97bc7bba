"""CRATE-alpha's sparse code: two steps from zero, three switches that lead to CRATE, and what it costs."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pellucid.objectives import lasso, nonzero_fraction
from pellucid.steps import ISTA, OvercompleteISTA, unroll


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def made(dim=6, num_atoms=None, seed=0, **options):
    step = OvercompleteISTA(dim, num_atoms, **options).double()
    with torch.no_grad():
        for number, parameter in enumerate(step.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=seed + number) / dim**0.5)
    return step


# --- the code ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_a_code_is_so_many_proximal_steps_from_zero(iterations):
    norm = nn.LayerNorm(6).double()
    step, z = made(iterations=iterations, norm=norm), 2 * normal(3, 5, 6)
    ista = ISTA(6, 24).double()
    ista.load_state_dict({"dictionary": step.dictionary})
    expected = unroll([ista] * iterations, torch.zeros(3, 5, 24, dtype=torch.float64), norm(z))
    code = step.code(z)
    torch.testing.assert_close(code, expected, rtol=1e-12, atol=1e-14)
    assert (code >= 0).all()
    assert 0 < nonzero_fraction(code).mean() < 1


def test_two_steps_and_four_times_the_width_unless_told_otherwise():
    """As published: eta, lambda, and the first step, which is affine and a ReLU, by hand."""
    step, z = made(), normal(1, 4, 6)
    assert (step.iterations, step.step_size, step.sparsity) == (2, 0.1, 0.1)
    assert step.dictionary.shape == (6, 24)
    D = step.dictionary
    first = torch.relu(0.1 * z @ D - 0.01)
    second = torch.relu(first - 0.1 * (first @ D.T - z) @ D - 0.01)
    torch.testing.assert_close(step.code(z), second)
    torch.testing.assert_close(step(z), z + second @ step.output.T)


def test_the_code_is_sparser_the_more_it_costs():
    z, shares = normal(2, 50, 6), []
    for sparsity in (0.0, 0.1, 0.3, 1.0, 2.0):
        shares.append(nonzero_fraction(made(sparsity=sparsity).code(z)).mean().item())
    assert all(more > less + 0.03 for more, less in pairwise(shares))
    # At zero the slope is x D: from there on no atom is worth its price.
    step = made()
    enough = (z @ step.dictionary).max().item()
    assert not made(sparsity=1.0001 * enough, iterations=9).code(z).any()
    assert made(sparsity=0.9999 * enough, iterations=9).code(z).any()


def test_planted_atoms_are_found():
    dim, atoms = 40, 60
    step = made(dim, atoms, sparsity=0.01, iterations=2000)
    step.step_size = 0.9 * step.max_step_size()
    planted = torch.zeros(1, 5, atoms, dtype=torch.float64)
    for token in range(5):
        planted[0, token, torch.randperm(atoms, generator=torch.Generator().manual_seed(token))[:4]] = 1.0
    with torch.no_grad():
        code = step.code(planted @ step.dictionary.mT)
    assert torch.equal(code > 0.5, planted > 0.5)


# --- descent ----------------------------------------------------------------------------------------------


@given(
    d=st.integers(1, 8),
    m=st.integers(1, 20),
    scale=st.floats(0.01, 100),
    sparsity=st.floats(0, 2),
    share=st.floats(0.01, 0.999),
    iterations=st.integers(1, 5),
    seed=st.integers(0, 10**6),
)
def test_the_lasso_falls_for_every_token_from_zero(d, m, scale, sparsity, share, iterations, seed):
    m = m + 1 if m == d else m  # a complete code starts at the token
    step = made(d, m, seed, sparsity=sparsity, iterations=iterations)
    step.step_size = share * step.max_step_size()
    tokens = scale * normal(9, 1, d, seed=seed + 7)  # each its own sample
    with torch.no_grad():
        before, after = step.before_and_after(tokens, step(tokens))
        code = step.code(tokens)
    energy = 0.5 * tokens.square().sum((-2, -1))
    torch.testing.assert_close(before, energy)
    assert (after <= before * (1 + 1e-12)).all()
    active = code.flatten(1).any(1)
    assert (after[active] < before[active]).all()
    assert torch.equal(after[~active], energy[~active])  # the others stay where they were


def test_the_bound_is_that_of_the_dictionary_that_codes():
    step = made()
    spectral = torch.linalg.matrix_norm(step.dictionary, 2).item()
    assert step.max_step_size() == pytest.approx(2 / spectral**2, rel=1e-6)
    with torch.no_grad():
        step.output.mul_(100)
    assert step.max_step_size() == pytest.approx(2 / spectral**2, rel=1e-6)
    # And it is tight where nothing is shrunk away: a token along the strongest direction of one atom.
    alone = OvercompleteISTA(4, 1, sparsity=0.0, iterations=1).double()
    z = alone.dictionary.detach().T[None].clone()
    for share, rises in ((0.999, False), (1.001, True)):
        alone.step_size = share * alone.max_step_size()
        before, after = alone.before_and_after(z, alone(z))
        assert (after > before).item() == rises


def test_the_objective_is_about_codes_of_the_normalised_token():
    norm = nn.LayerNorm(6).double()
    step, z = made(norm=norm, sparsity=0.3), normal(2, 5, 6)
    before, after = step.before_and_after(z, step(z))
    torch.testing.assert_close(before, lasso(torch.zeros(2, 5, 24).double(), norm(z), step.dictionary, 0.3))
    torch.testing.assert_close(after, lasso(step.code(z), norm(z), step.dictionary, 0.3))
    code = step.code(z)
    torch.testing.assert_close(step.objective(code, norm(z)), after)  # the signal as the start
    torch.testing.assert_close(step.objective(code, torch.zeros_like(code), norm(z)), after)


# --- three switches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_without_any_switch_it_is_crates_ista(training):
    step = made(6, 6, decoupled=False, residual=False, step_size=0.2, sparsity=0.3).train(training)
    ista = ISTA(6, step_size=0.2, sparsity=0.3).double().train(training)
    ista.load_state_dict({"dictionary": step.dictionary})
    for n in (2, 50):
        z = normal(2, n, 6)
        with torch.set_grad_enabled(training):
            assert torch.equal(step(z), ista(z))
            assert all(
                torch.equal(ours, theirs)
                for ours, theirs in zip(
                    step.before_and_after(z, step(z)), ista.before_and_after(z, ista(z)), strict=True
                )
            )
    assert {name for name, _ in step.named_parameters()} == {"coder.dictionary"}


@pytest.mark.parametrize(
    "options", [{}, {"decoupled": False}, {"num_atoms": 6}, {"num_atoms": 6, "decoupled": False}]
)
def test_residual_adds_to_the_token_what_else_takes_its_place(options):
    z = normal(2, 5, 6)
    added, placed = made(**options), made(**options, residual=False)
    torch.testing.assert_close(added(z) - z, placed(z))
    torch.testing.assert_close(placed(z), placed.decode(placed.code(z)), rtol=0, atol=0)


def test_a_decoupled_dictionary_speaks_and_does_not_code():
    step, z = made(), normal(2, 5, 6)
    code, spoken = step.code(z), step(z) - z
    with torch.no_grad():
        step.output.mul_(2)
    assert torch.equal(step.code(z), code)
    torch.testing.assert_close(step(z) - z, 2 * spoken)
    coupled = made(decoupled=False)
    torch.testing.assert_close(coupled(z) - z, coupled.code(z) @ coupled.dictionary.T)
    assert {name for name, _ in coupled.named_parameters()} == {"coder.dictionary"}
    assert {name for name, _ in step.named_parameters()} == {"coder.dictionary", "output"}


def test_both_dictionaries_begin_as_one():
    step = OvercompleteISTA(6)
    assert torch.equal(step.output, step.dictionary)
    assert step.output.data_ptr() != step.dictionary.data_ptr()
    torch.testing.assert_close(step.dictionary @ step.dictionary.T, torch.eye(6))  # a tight frame


def test_a_complete_code_starts_at_the_token_and_takes_one_step():
    step, z = made(6, 6, iterations=7), normal(2, 5, 6)
    assert step.iterations == 1
    D = step.dictionary
    expected = torch.relu(z + 0.1 * (z - z @ D.T) @ D - 0.01)
    torch.testing.assert_close(step.code(z), expected)
    before, _ = step.before_and_after(z, step(z))
    torch.testing.assert_close(before, lasso(z, z, D, 0.1))


def test_no_iterations_are_refused():
    with pytest.raises(ValueError, match="iterations is 0; a code takes at least one step"):
        OvercompleteISTA(6, iterations=0)


# --- cost -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("iterations", "products"), [(1, 2), (2, 4), (3, 6)])
def test_the_first_step_from_zero_costs_one_product(iterations, products):
    """Two for each step, less one at zero, and one to speak: four as published."""
    b, n, d, m = 2, 50, 8, 32
    step = OvercompleteISTA(d, m, iterations=iterations)
    with FlopCounterMode(display=False) as counter:
        step(normal(b, n, d, dtype=torch.float32))
    assert counter.get_total_flops() == products * 2 * b * n * d * m
