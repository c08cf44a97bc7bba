"""One contract over every final step, whoever wrote it: what unroll, the audit and the models rely on."""

import copy

import pytest
import torch

from pellucid.steps import (
    MHSA,
    MLP,
    MSP,
    MSSA,
    TSSA,
    CausalTSSA,
    Decompression,
    Denoise,
    ExactCompression,
    FreeISTA,
    OrthogonalIteration,
    OvercompleteISTA,
    RateReduction,
    ShiftInvariantRateReduction,
    Step,
    StrictCompression,
    StrictISTA,
    Synthesis,
    UntiedCausalTSSA,
    UntiedMSSA,
    UntiedTSSA,
    unroll,
)
from pellucid.steps.strict import spectral_bound

# Derived from no objective, as their docstrings say; all others must name one.
STATE_NOTHING = {FreeISTA, MHSA, MLP, Synthesis}

# Descent of these is only measured, as their docstrings say; all others must prove it below.
ONLY_MEASURED = {MSSA, UntiedMSSA, Decompression, UntiedTSSA, CausalTSSA, UntiedCausalTSSA}
ONLY_MEASURED |= {RateReduction, ShiftInvariantRateReduction}

# Cannot fall from where it is meant to begin, whatever the step size: test_power.py proves it by convexity.
ONLY_MEASURED |= {OrthogonalIteration, MSP}

# Learn how far to go as a share of the bound; nothing takes them above it.
CANNOT_RISE = {StrictCompression, StrictISTA}


def test_every_final_step_is_under_contract(step_class, made):
    assert step_class in made, f"tell tests/steps/conftest.py how to make a {step_class.__name__}"


def test_the_search_finds_steps(made):
    assert len(made) >= 5
    assert all(issubclass(cls, Step) for cls in made)


def test_says_what_it_lowers_and_how_far_it_goes(step_class, make):
    step = make(step_class)
    if step_class in STATE_NOTHING:
        assert step.objective_name is None
    else:
        assert isinstance(step.objective_name, str)
        assert step.objective_name
    assert step.step_size > 0


def test_without_an_objective_there_is_nothing_to_measure(step_class, make, tokens):
    step, z = make(step_class), tokens()
    if step_class in STATE_NOTHING:
        for measure in (step.objective, step.before_and_after):
            with pytest.raises(TypeError, match=f"{step_class.__name__} .*nothing to measure"):
                measure(z, z)
    else:
        assert all(value.isfinite().all() for value in step.before_and_after(z, step(z)))


def test_shapes(step_class, make, tokens):
    step = make(step_class)
    for b, n in ((3, 5), (1, 1), (2, 9)):
        z = tokens(b, n)
        z_next = step(z)
        assert z_next.shape == z.shape
        assert z_next.dtype == z.dtype
        assert not torch.equal(z_next, z)


def variable_and_start(step, tokens):
    """What the step's objective may be asked about: tokens beside tokens, or codes beside their signal."""
    width = {"width": step.dictionary.shape[1]} if isinstance(step, OvercompleteISTA) else {}
    return tokens(**width), tokens(seed=1)


def test_one_value_for_each_sample(lowering_class, make, tokens):
    step = make(lowering_class)
    z, start = variable_and_start(step, tokens)
    assert step.objective(z, start).shape == (3,)
    for b, n in ((3, 5), (1, 1), (2, 9)):
        z = tokens(b, n)
        for value in step.before_and_after(z, step(z)):
            assert value.shape == (b,)
            assert value.isfinite().all()


def test_before_and_after_are_the_objective_where_the_variable_is_the_token(lowering_class, make, tokens):
    step, z, x = make(lowering_class), tokens(), tokens(seed=1)
    if isinstance(step, OvercompleteISTA):
        code = step.code(z)
        expected = step.objective(torch.zeros_like(code), z), step.objective(code, z)
        assert not torch.equal(*expected)
        x = None
    else:
        expected = step.objective(z, z, x), step.objective(step(z, x), z, x)
    for actual, wanted in zip(step.before_and_after(z, step(z, x), x), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_leaves_its_input_alone(step_class, make, tokens):
    step = make(step_class).eval()
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        z, x = tokens(), tokens(seed=1)
        before = z.clone(), x.clone()
        with context():
            step(z)
            step(z, x)
        assert torch.equal(z, before[0])
        assert torch.equal(x, before[1])


def test_one_sample_does_not_depend_on_its_batch(step_class, make, tokens):
    step, z = make(step_class), tokens()
    together = step(z)
    for i in range(len(z)):
        alone = z[i : i + 1]
        torch.testing.assert_close(step(alone), together[i : i + 1], rtol=1e-12, atol=1e-12)
    other = torch.cat([z[:1], 100 * z[1:]])
    torch.testing.assert_close(step(other)[0], together[0], rtol=1e-12, atol=1e-12)


def test_the_value_of_one_sample_does_not_depend_on_its_batch(lowering_class, make, tokens):
    step, z = make(lowering_class), tokens()
    values = torch.stack(step.before_and_after(z, step(z)))
    for i in range(len(z)):
        alone = z[i : i + 1]
        value = torch.stack(step.before_and_after(alone, step(alone)))
        torch.testing.assert_close(value, values[:, i : i + 1], rtol=1e-12, atol=1e-12)


def test_sees_what_it_says(step_class, make, tokens):
    """Which tokens change when the fourth of five does: itself, those behind it, or those before it too."""
    step, z = make(step_class), tokens()
    other = z.clone()
    other[:, 3] += 1
    moved = (step(other) - step(z)).abs().amax((0, 2)) > 0
    seen = {"itself": [0, 0, 0, 1, 0], "past": [0, 0, 0, 1, 1], "all": [1, 1, 1, 1, 1]}
    # The gradient of a rate by classes, and others that see more than they use, may change fewer.
    assert (moved <= torch.tensor(seen[step.sees], dtype=torch.bool)).all()
    assert moved[3]


def test_moves_tokens_whatever_their_order(step_class, make, tokens):
    step, z, order = make(step_class), tokens(), torch.tensor([3, 0, 4, 1, 2])
    if step.sees == "past":
        assert not torch.allclose(step(z[:, order]), step(z)[:, order])
        return
    torch.testing.assert_close(step(z[:, order]), step(z)[:, order], rtol=1e-12, atol=1e-12)


def test_values_tokens_whatever_their_order(lowering_class, make, tokens):
    step, z, order = make(lowering_class), tokens(), torch.tensor([3, 0, 4, 1, 2])
    values = step.before_and_after(z[:, order], step(z[:, order]))
    if step.sees == "past":
        assert not torch.allclose(values[0], step.before_and_after(z, step(z))[0])
        return
    torch.testing.assert_close(values, step.before_and_after(z, step(z)), rtol=1e-12, atol=1e-12)


def test_every_parameter_and_the_tokens_get_a_gradient(step_class, make, tokens, norm):
    step = make(step_class, enter=norm)
    z = tokens().requires_grad_()
    unroll([step], z).square().sum().backward()
    for name, tensor in [("tokens", z), *step.named_parameters()]:
        assert tensor.grad is not None, name
        assert tensor.grad.isfinite().all(), name
        assert tensor.grad.any(), name


def test_the_objective_is_differentiable(lowering_class, make, tokens):
    step = make(lowering_class)
    z, start = variable_and_start(step, tokens)
    z.requires_grad_()
    step.objective(z, start).sum().backward()
    assert z.grad.isfinite().all()
    assert z.grad.any()


def test_a_deep_copy_is_the_same_step_and_another_object(step_class, make, tokens):
    step, z = make(step_class).eval(), tokens()
    with torch.no_grad():
        before = step(z)
        twin = copy.deepcopy(step)
        assert torch.equal(twin(z), before)
        for parameter in twin.parameters():
            parameter.add_(torch.rand_like(parameter))
        assert not torch.allclose(twin(z), before)
        assert torch.equal(step(z), before)


def test_state_dict_round_trip(step_class, make, tokens):
    source, target, z = make(step_class, seed=0).eval(), make(step_class, seed=1).eval(), tokens()
    with torch.no_grad():
        assert not torch.allclose(source(z), target(z))  # whatever is kept of the old weights is kept now
        target.load_state_dict(source.state_dict())
        assert torch.equal(source(z), target(z))
    assert source.state_dict().keys() == {name for name, _ in source.named_parameters()}


def test_records_replay_exactly(step_class, make, tokens, norm):
    records = []
    layers = [make(step_class, seed=i, enter=norm if i else None) for i in range(3)]
    for x in (None, tokens(seed=1)):
        records.clear()
        out = unroll(layers, tokens(), x, on_step=records.append)
        assert [record.layer for record in records] == [1, 2, 3]
        for record in records:
            assert record.x is x
            assert torch.equal(record.step(record.z, record.x), record.z_next)
        assert records[-1].z_next is out
        assert torch.equal(records[1].z, norm(records[0].z_next))  # z is what the step saw behind its door


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("training", [True, False])
def test_compiles_without_a_graph_break(step_class, make, tokens, training):
    step = make(step_class).train(training)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    z = tokens().requires_grad_(training)
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(compiled(z), step(z), rtol=1e-10, atol=1e-12)


def test_bfloat16_is_close_to_float64(step_class, make, tokens):
    step = make(step_class)
    narrow = copy.deepcopy(step).bfloat16()
    wide = copy.deepcopy(narrow).double()  # the same rounded weights
    z = tokens(dtype=torch.bfloat16).requires_grad_()
    z_wide = z.detach().double().requires_grad_()
    out, expected = narrow(z), wide(z_wide)
    assert out.dtype == torch.bfloat16
    assert (out.double() - expected).norm() < 0.02 * expected.norm()
    weight = tokens(seed=8)  # the squares of tokens on a sphere have no gradient
    (out.double() * weight).sum().backward()
    (expected * weight).sum().backward()
    assert (z.grad.double() - z_wide.grad).norm() < 0.05 * z_wide.grad.norm()


def test_autocast_is_close_to_float32(step_class, make, tokens):
    step, z = make(step_class, dtype=torch.float32), tokens(dtype=torch.float32)
    for mode in (step.train(), step.eval()):
        with torch.no_grad():
            expected = mode(z)
            with torch.autocast("cpu", torch.bfloat16):
                low = mode(z).float()
        assert 0 < (low - expected).norm() < 0.02 * expected.norm()


# --- descent ----------------------------------------------------------------------------------------------


def test_only_the_named_steps_have_no_guarantee(step_class, make):
    guaranteed = make(step_class).max_step_size(num_tokens=5) is not None
    assert guaranteed == (step_class not in ONLY_MEASURED | STATE_NOTHING)


def problems_of(step_class, make, tokens):
    """Twenty random problems ``(step, z, x)``: a feasible start, with and without a signal."""
    for seed in range(20):
        step, z = make(step_class, seed=seed), 3 * tokens(2, 4 + seed % 5, seed=seed)
        if issubclass(step_class, ExactCompression):
            step.eps = (0.1, 0.5, 2.0)[seed % 3]
            yield step, z, None
        elif issubclass(step_class, TSSA):
            step.eps = (0.5, 2.0, 20.0)[seed % 3]
            yield step, z, None
        elif issubclass(step_class, OvercompleteISTA):
            step.iterations = (1, 2, 40)[seed % 3]
            yield step, z, None
        else:
            start = torch.zeros_like(z) if seed % 2 else z.abs()
            yield step, start, z if seed % 4 < 2 else start.flip(1)


def rounds(step, most):
    """A code is a whole descent; of statistics, which cost more to take than to use, fewer are taken."""
    return 1 if isinstance(step, OvercompleteISTA) else min(most, 8) if isinstance(step, TSSA) else most


def gradient_step(step, num_tokens):
    """How far along the objective's gradient one unit of ``step_size`` goes."""
    if isinstance(step, Denoise):
        return step.t**2
    if isinstance(step, TSSA):
        return num_tokens  # its objective is a mean over tokens
    if isinstance(step, StrictCompression):
        return 2 * num_tokens * step.eps**2 / step.head_dim
    if isinstance(step, StrictISTA):
        return 2 / spectral_bound(step.dictionary).item()
    return 1.0


def go(step, step_size):
    """Set how far the step goes."""
    if type(step) in CANNOT_RISE:
        with torch.no_grad():
            step.share.fill_(torch.logit(torch.tensor(step_size, dtype=torch.float64)))
    else:
        step.step_size = step_size
    assert step.step_size == pytest.approx(step_size)


def way(step, z, z_next):
    """The squared lengths of all gradient steps between ``z`` and ``z_next``, of the variable that moves."""
    if not isinstance(step, OvercompleteISTA):
        return (z_next - z).square().sum((-2, -1))
    codes = [z.new_zeros(*z.shape[:-1], step.dictionary.shape[1])]
    for _ in range(step.iterations):
        codes.append(step.coder(codes[-1], step.norm(z)))
    return torch.stack(codes).diff(dim=0).square().sum((0, -2, -1))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95, 0.999])
def test_never_rises_below_the_step_size_it_promises(step_class, make, tokens, share):
    """And falls by what the descent lemma owes: (1/eta - L/2) ||dz||^2 with L = 2 / max_step_size."""
    if step_class in ONLY_MEASURED | STATE_NOTHING:
        assert make(step_class).max_step_size(num_tokens=5) is None
        return
    moved = 0.0  # total way
    for step, z, x in problems_of(step_class, make, tokens):
        limit = step.max_step_size(num_tokens=z.shape[1])
        go(step, share * limit)
        unit = gradient_step(step, z.shape[1])
        for _ in range(rounds(step, 40)):
            z_next = step(z, x)
            value, next_value = step.before_and_after(z, z_next, x)
            steps = way(step, z, z_next)
            owed = (1 / step.step_size - 1 / limit) / unit * steps
            slack = 1e-6 * owed + 1e-12 * (1 + value.abs())  # the limit is computed in float32
            assert (next_value <= value - owed + slack).all()
            moved += steps.sum().sqrt().item()
            z = z_next
    assert moved > 1  # and it did move


def test_far_above_that_step_size_it_can_rise(step_class, make, tokens):
    """The bound is about something: ten times above it some problem does rise."""
    if step_class in ONLY_MEASURED | STATE_NOTHING:
        assert make(step_class).max_step_size(num_tokens=5) is None
        return
    rises = 0
    for step, z, x in problems_of(step_class, make, tokens):
        if step_class in CANNOT_RISE:
            go(step, 1.0)  # an infinite parameter
            value, next_value = step.before_and_after(z, step(z, x), x)
            assert (next_value <= value + 1e-12 * (1 + value.abs())).all()
            continue
        go(step, 10 * step.max_step_size(num_tokens=z.shape[1]))
        start = z
        for _ in range(rounds(step, 5)):
            z = step(z, x)
        value, last_value = step.before_and_after(start, z, x)
        rises += int((last_value > value).any())
    assert rises or step_class in CANNOT_RISE
