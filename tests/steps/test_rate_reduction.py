"""Layers computed from data: operators are gradients, shifts go through, the rise is a theorem."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from pellucid.objectives import class_coding_rate, coding_rate, rate_reduction
from pellucid.steps import RateReduction, ShiftInvariantRateReduction, StepRecord, unroll
from pellucid.steps.rate_reduction import compression, expansion, one_hot, operators, signal, spectrum

EPS = 0.5


def sphere(n, d, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=-1)


def soft_rows(n, classes, seed=1):
    return (4 * sphere(n, classes, seed)).softmax(-1)


def exactly(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# As many tokens as make each side of the determinant the smaller one, in a class or in all.
SIZES = [(40, 6), (9, 20), (30, 25), (3, 4)]


@pytest.mark.parametrize(("n", "d"), SIZES)
@pytest.mark.parametrize("soft", [False, True])
def test_operators_are_the_gradients_of_the_rates(n, d, soft):
    z = sphere(n, d).requires_grad_()
    membership = soft_rows(n, 3) if soft else torch.arange(n) % 3
    weights = one_hot(membership, z)
    (gradient,) = torch.autograd.grad(coding_rate(z, EPS), z)
    exactly(z @ expansion(z, EPS), gradient)
    (gradient,) = torch.autograd.grad(class_coding_rate(z, membership, EPS), z)
    share = weights.mean(0)
    operators = compression(z, weights, EPS)
    exactly(
        sum(g * pi[:, None] * (z @ C) for g, pi, C in zip(share, weights.T, operators, strict=True)), gradient
    )


@pytest.mark.parametrize(("n", "d"), SIZES)
@pytest.mark.parametrize("kind", ["labels", "soft", "some unknown"])
def test_products_in_common_change_nothing(n, d, kind):
    labels = torch.arange(n) % 3
    membership = {
        "labels": labels,
        "soft": soft_rows(n, 3),
        "some unknown": labels.where(torch.arange(n) < n - 1, -1),
    }
    z = sphere(n, d)
    weights = one_hot(membership[kind], z)
    for rows in (z, spectrum(z, (1, d))):
        expand, compress = operators(rows, weights, EPS)
        exactly(expand, expansion(rows, EPS))
        exactly(compress, compression(rows, weights, EPS))


@pytest.mark.parametrize("sizes", [(2, 2, 2), (5, 1, 9), (1, 1, 1), (40, 3, 2)])
def test_either_side_gives_the_inverse(sizes):
    z, labels = sphere(sum(sizes), 20), torch.arange(3).repeat_interleave(torch.tensor(sizes))
    a = [20 / (size * EPS**2) for size in sizes]
    expected = [
        a_j * torch.linalg.inv(torch.eye(20).double() + a_j * part.T @ part)
        for a_j, part in zip(a, z.split(sizes), strict=True)
    ]
    exactly(compression(z, one_hot(labels, z), EPS), torch.stack(expected))


def test_operators_of_a_spectrum_are_those_of_each_frequency():
    shape = (3, 2, 5)
    for n in (40, 4):
        z, labels = sphere(n, 30), torch.arange(n) % 2
        step = ShiftInvariantRateReduction.from_tokens(z, labels, shape=shape, eps=EPS)
        V = torch.fft.fft2(z.unflatten(-1, shape), norm="ortho").permute(2, 3, 1, 0)  # H W C n, all of them
        for kernel, rows in (
            (step.expand, labels >= 0),
            *((C, labels == j) for j, C in enumerate(step.compress)),
        ):
            a, part = 3 / (int(rows.sum()) * EPS**2), V[..., rows]
            expected = a * torch.linalg.inv(torch.eye(3) + a * part @ part.mH)
            exactly(torch.fft.fft2(kernel).permute(2, 3, 0, 1), expected)


@pytest.mark.parametrize("shape", [(2, 5), (3, 4), (1, 6), (2, 3, 4), (2, 4, 3), (1, 1, 5), (4, 1)])
def test_a_spectrum_says_everything(shape):
    z = sphere(6, torch.Size(shape).numel()).reshape(2, 3, -1)
    v = spectrum(z, shape)
    exactly(signal(v, shape), z)
    step = ShiftInvariantRateReduction(shape, 2).double()
    assert v.shape == (2, len(step.multiplicity), 3, shape[0])
    exactly((v.abs().square().sum(-1) * step.multiplicity[:, None]).sum(-2), z.square().sum(-1))  # Parseval
    assert step.multiplicity.sum() == torch.Size(shape[1:]).numel()


def test_operators_on_one_long_row_of_places_are_those_on_a_flat_picture():
    z, labels = sphere(20, 12), torch.arange(20) % 2
    flat = ShiftInvariantRateReduction.from_tokens(z, labels, shape=(2, 1, 6), sharpness=3.0)
    row = ShiftInvariantRateReduction.from_tokens(z, labels, shape=(2, 6), sharpness=3.0)
    exactly(flat(z[None]), row(z[None]))


@pytest.mark.parametrize("shape", [(3, 7), (2, 3, 4)])
def test_shifts_go_through(shape):
    z, labels = sphere(30, torch.Size(shape).numel()), torch.arange(30) % 3
    step = ShiftInvariantRateReduction.from_tokens(z, labels, shape=shape, sharpness=5.0)
    places, by = tuple(range(2, 2 + len(shape) - 1)), (2, 1)[: len(shape) - 1]

    def shift(z):
        return z.unflatten(-1, shape).roll(by, tuple(p + 1 for p in places)).flatten(2)

    z = z[None]
    assert not torch.allclose(shift(z), z)
    exactly(step(shift(z)), shift(step(z)))
    exactly(step.membership(shift(z)), step.membership(z))
    vector = RateReduction.from_tokens(z[0], labels, sharpness=5.0)
    assert (vector(shift(z)) - shift(vector(z))).abs().max() > 1e-3  # not so without the convolution


@pytest.mark.parametrize("shape", [(3, 8), (2, 5), (2, 3, 2)])
def test_the_shift_invariant_objective_is_that_of_all_shifts(shape):
    z, labels = sphere(12, torch.Size(shape).numel()), torch.arange(12) % 3
    step = ShiftInvariantRateReduction.from_tokens(z, labels, shape=shape, sharpness=4.0)
    pictures, places = z.unflatten(-1, shape), torch.Size(shape[1:]).numel()
    shifts = torch.cartesian_prod(*[torch.arange(size) for size in shape[1:]]).reshape(places, -1)
    dims = tuple(range(2, 1 + len(shape)))
    together = torch.cat([pictures.roll(tuple(by.tolist()), dims).flatten(1) for by in shifts])
    start = sphere(12, z.shape[1], seed=3)
    membership = step.membership(start[None])[0].repeat(places, 1)
    expected = -rate_reduction(together, membership, step.eps * places**0.5) / places
    exactly(step.objective(z[None], start[None]), expected[None])


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(2, 30),
    d=st.integers(2, 12),
    classes=st.integers(1, 4),
    eps=st.floats(0.05, 2),
    share=st.floats(0.1, 1),
    soft=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_with_known_classes_it_rises_up_to_the_step_size_of_the_theorem(
    n, d, classes, eps, share, soft, seed
):
    z = sphere(n, d, seed)
    labels = torch.arange(n) % min(classes, n)
    membership = soft_rows(n, classes, seed + 1) if soft else labels
    step = RateReduction.from_tokens(z, membership, eps=eps, step_size=share * 8 * n * eps**2 / (9 * d))
    after = step.move(z[None], one_hot(membership, z)[None])[0]
    gained = rate_reduction(after, membership, eps) - rate_reduction(z, membership, eps)
    # Descent lemma with projection onto the sphere: (1/(2 eta) - L/2) ||dz||^2 with L = 9a/8.
    owed = (1 / share - 1) * 9 * d / (16 * n * eps**2) * (after - z).square().sum()
    assert gained >= owed - 1e-9 * (1 + rate_reduction(z, membership, eps))


def test_the_theorem_holds_for_signals_and_their_shifts():
    for seed in range(10):
        z, labels = sphere(20, 12, seed), torch.arange(20) % 3
        step = ShiftInvariantRateReduction.from_tokens(
            z, labels, shape=(3, 4), eps=EPS, step_size=8 * 20 * EPS**2 / (9 * 3), sharpness=1e4
        )
        step.membership = lambda z, labels=labels: one_hot(labels, z[0])[None]  # the objective's, too
        before, after = step.before_and_after(z[None], step.move(z[None], one_hot(labels, z)[None]))
        assert after < before


def test_far_above_it_can_fall():
    falls = 0
    for seed in range(5):
        z, labels = sphere(20, 4, seed), torch.arange(20) % 2
        for _ in range(15):
            step = RateReduction.from_tokens(z, labels, eps=0.3, step_size=5 * 8 * 20 * 0.3**2 / (9 * 4))
            z_next = step.move(z[None], one_hot(labels, z)[None])[0].detach()
            falls += int(rate_reduction(z_next, labels, 0.3) < rate_reduction(z, labels, 0.3) - 1e-6)
            z = z_next
    assert falls


def test_classes_that_are_not_known_take_part_in_the_expansion_only():
    z = sphere(12, 5)
    labels = torch.tensor([0, 1, 2] * 4)
    hidden = labels.where(torch.arange(12) < 9, -1)
    step = RateReduction.from_tokens(z, hidden)
    known = RateReduction.from_tokens(z[:9], labels[:9])
    exactly(step.expand, RateReduction.from_tokens(z, labels).expand)
    exactly(step.compress, known.compress)
    exactly(step.share, known.share)


def test_layers_unroll_and_are_seen():
    z, labels = sphere(30, 6), torch.arange(30) % 3
    layers, start = [], z[None]
    for _ in range(3):
        layers.append(RateReduction.from_tokens(start[0], labels, sharpness=20.0))
        start = layers[-1](start)
    seen: list[StepRecord] = []
    out = unroll(layers, z[None], on_step=seen.append)
    assert torch.equal(out, start)
    assert [record.layer for record in seen] == [1, 2, 3]
    exactly(out.norm(dim=-1), torch.ones(1, 30).double())


@pytest.mark.parametrize("build", [RateReduction.from_tokens, ShiftInvariantRateReduction.from_tokens])
def test_refuses_what_has_no_layer(build):
    options = {"shape": (2, 3)} if build.__self__ is ShiftInvariantRateReduction else {}
    z = sphere(6, 6)
    with pytest.raises(ValueError, match="no tokens in class 1, 2"):
        build(z, torch.tensor([0, 3, 0, 3, 0, 3]), **options)
    with pytest.raises(ValueError, match="float32 have no Cholesky factor at this eps"):
        build(1e12 * z[:1].expand(6, 6).float(), torch.arange(6) % 2, **options)
