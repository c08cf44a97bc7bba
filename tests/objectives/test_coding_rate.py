"""The rates against published numbers, exact gradients, invariances and the limits of float32."""

import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from pellucid.objectives import (
    class_coding_rate,
    coding_rate,
    effective_rank,
    nats_to_bits,
    rate_ceiling,
    rate_reduction,
    sparse_rate_reduction,
    subspace_coding_rate,
    variational_coding_rate,
)

EPS = 0.5


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def soft_rows(n, classes, seed=1):
    return normal(n, classes, seed=seed).softmax(-1)


# Tokens of every kind that a determinant can stumble over.
TOKENS = {
    "full rank": normal(12, 5),
    "fewer tokens than dimensions": normal(4, 6),
    "rank two": normal(9, 2) @ normal(2, 5, seed=1),
    "all equal": normal(1, 5).expand(7, 5).clone(),
    "one token": normal(1, 4),
    "zero": torch.zeros(6, 4, dtype=torch.float64),
}
tokens = pytest.mark.parametrize("z", TOKENS.values(), ids=TOKENS.keys())

# Every public rate as a function of the tokens alone, with what must be turned when the tokens are.
RATES = {
    "whole": lambda z, labels, U: coding_rate(z, EPS),
    "by labels": lambda z, labels, U: class_coding_rate(z, labels, EPS),
    "by soft classes": lambda z, labels, U: class_coding_rate(z, (F.one_hot(labels, 3) + 0.5) / 2.5, EPS),
    "by subspaces": lambda z, labels, U: subspace_coding_rate(z, U, EPS),
    "variational": lambda z, labels, U: variational_coding_rate(z, U, labels % len(U), EPS),
    "rate reduction": lambda z, labels, U: rate_reduction(z, labels, EPS),
    "sparse rate reduction": lambda z, labels, U: sparse_rate_reduction(z, U, EPS, 0.1),
}
rates = pytest.mark.parametrize("rate", RATES.values(), ids=RATES.keys())


@st.composite
def problems(draw):
    """Random tokens (b, n, d) over six orders of magnitude, labels and bases."""
    b, n, d = draw(st.integers(1, 3)), draw(st.integers(1, 8)), draw(st.integers(1, 8))
    seed = draw(st.integers(0, 10**6))
    z = normal(b, n, d, seed=seed) * 10 ** draw(st.floats(-3, 3))
    labels = torch.randint(0, 3, (n,), generator=torch.Generator().manual_seed(seed))
    return z, labels, normal(2, d, draw(st.integers(1, 4)), seed=seed + 1)


# --- published numbers ------------------------------------------------------------------------------------


def test_equals_published_rate_reduction(recorded):
    data = recorded("redunet")
    z, eps = F.normalize(data["X"], dim=-1), math.sqrt(data["meta"]["eps"])
    ours = [rate_reduction(z, data["y"], eps), coding_rate(z, eps), class_coding_rate(z, data["y"], eps)]
    torch.testing.assert_close(torch.stack(ours).double(), data["mcr2"], rtol=1e-5, atol=0)


def test_equals_published_layerwise_measure(recorded):
    data = recorded("coding_rate_measure")
    w = F.normalize(data["projected"], dim=-1)
    per_sample = coding_rate(w, math.sqrt(0.01)).sum(-1)
    torch.testing.assert_close(per_sample.mean(), data["mean"], rtol=1e-5, atol=0)
    torch.testing.assert_close(per_sample.std(), data["std"], rtol=1e-4, atol=0)
    # The same number as coding around coordinate subspaces.
    heads, p = w.shape[1], w.shape[3]
    U = torch.eye(heads * p).unflatten(1, (heads, p)).transpose(0, 1)
    together = subspace_coding_rate(w.transpose(1, 2).flatten(2), U, math.sqrt(0.01))
    torch.testing.assert_close(together, per_sample, rtol=1e-5, atol=0)


# --- labels by themselves, many, and unknown --------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 17), min_size=1, max_size=12),
    d=st.integers(1, 12),
    batch=st.sampled_from([(), (2,), (2, 1)]),
    seed=st.integers(0, 99),
)
def test_labels_are_memberships_of_ones_and_zeros(sizes, d, batch, seed):
    names = normal(len(sizes), seed=seed).argsort() * 7  # any numbers, in any order
    labels = names.repeat_interleave(torch.tensor(sizes))[normal(sum(sizes), seed=seed).argsort()]
    z = normal(*batch, len(labels), d, seed=seed).requires_grad_()
    soft = (labels[:, None] == names).double()
    by_labels, by_weights = class_coding_rate(z, labels, EPS), class_coding_rate(z, soft, EPS)
    torch.testing.assert_close(by_labels, by_weights, rtol=1e-10, atol=1e-12)
    exactly(*[torch.autograd.grad(rate.sum(), z)[0] for rate in (by_labels, by_weights)])


def test_tokens_whose_class_is_not_known_are_not_coded():
    z, labels = normal(2, 9, 4), torch.tensor([2, -1, 0, 0, -1, 5, 2, 0, -1])
    known = labels >= 0
    alone = class_coding_rate(z[:, known], labels[known], EPS)
    exactly(class_coding_rate(z, labels, EPS), alone)
    exactly(class_coding_rate(z, labels.expand(2, 9), EPS), alone)
    exactly(rate_reduction(z, labels, EPS), coding_rate(z, EPS) - alone)
    U = normal(6, 4, 2, seed=3)
    variational = variational_coding_rate(z[:, known], U, labels[known], EPS)
    exactly(variational_coding_rate(z, U, labels, EPS), variational)


def test_nothing_known_costs_nothing():
    z, nobody = normal(3, 5, 4), torch.full((5,), -1)
    for labels in (nobody, nobody.expand(3, 5)):
        assert torch.equal(class_coding_rate(z, labels, EPS), torch.zeros(3).double())


# --- exact gradients --------------------------------------------------------------------------------------


def gradient(rate, z):
    z = z.clone().requires_grad_()
    return torch.autograd.grad(rate(z), z)[0]


def inverse_of_shifted(a, gram):
    return torch.linalg.inv(torch.eye(len(gram), dtype=gram.dtype) + a * gram)


def exactly(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@tokens
def test_gradient_of_the_rate_is_the_expansion_operator(z):
    n, d = z.shape
    a = d / (n * EPS**2)
    exactly(gradient(lambda z: coding_rate(z, EPS), z), z @ (a * inverse_of_shifted(a, z.T @ z)))


@tokens
@pytest.mark.parametrize("soft", [False, True])
def test_gradient_of_the_class_rate_is_the_sum_of_compression_operators(z, soft):
    n, d = z.shape
    labels = torch.arange(n) % 3
    membership = soft_rows(n, 3) if soft else labels
    weights = membership if soft else F.one_hot(labels, 3).double()
    expected = torch.zeros_like(z)
    for pi in weights.unbind(1):
        if pi.sum() > 0:
            a = d / (pi.sum() * EPS**2)
            gamma = pi.sum() / n
            expected += gamma * (pi[:, None] * z) @ (a * inverse_of_shifted(a, z.T @ (pi[:, None] * z)))
    exactly(gradient(lambda z: class_coding_rate(z, membership, EPS), z), expected)


@tokens
@pytest.mark.parametrize("p", [1, 3, 10])
def test_gradient_of_the_subspace_rate_has_a_small_and_a_large_form(z, p):
    n, d = z.shape
    U, b = normal(3, d, p, seed=4), p / (n * EPS**2)
    large = sum(b * inverse_of_shifted(b, z @ u @ u.T @ z.T) @ z @ u @ u.T for u in U)
    small = sum(b * z @ u @ inverse_of_shifted(b, u.T @ z.T @ z @ u) @ u.T for u in U)
    exactly(small, large)
    exactly(gradient(lambda z: subspace_coding_rate(z, U, EPS), z), small)


@pytest.mark.parametrize(
    ("z", "rate"),
    [
        pytest.param(z, rate, id=f"{name}-{kind}")
        for kind, z in TOKENS.items()
        for name, rate in RATES.items()
        if z.any() or name != "sparse rate reduction"  # the l1 norm has a kink at zero
    ],
)
def test_first_and_second_derivatives(z, rate):
    labels, U = torch.arange(len(z)) % 3, normal(2, z.shape[1], 3, seed=5)
    z = z.clone().requires_grad_()
    assert gradcheck(lambda z: rate(z, labels, U), (z,))
    assert gradgradcheck(lambda z: rate(z, labels, U), (z,))


@tokens
def test_derivatives_in_membership_and_bases(z):
    hard = F.one_hot(torch.arange(len(z)) % 3, 3).double()
    for weights in (soft_rows(len(z), 3), hard):  # the zeros of hard weights are a square root's trap
        assert gradient(lambda weights: class_coding_rate(z, weights, EPS), weights).isfinite().all()
    logits = normal(len(z), 3, seed=7).requires_grad_()
    U = normal(2, z.shape[1], 3, seed=6).requires_grad_()
    for check in (gradcheck, gradgradcheck):
        assert check(lambda t: class_coding_rate(z, t.softmax(-1), EPS), (logits,))
        assert check(lambda U: subspace_coding_rate(z, U, EPS), (U,))
        assert check(lambda U: variational_coding_rate(z, U, torch.arange(len(z)) % 2, EPS), (U,))


# --- properties -------------------------------------------------------------------------------------------


def close(actual, expected, scale=0.0):
    # A difference of rates is as exact as the rates: compare on their scale.
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9 * (1 + float(scale)))


@rates
@given(problem=problems())
def test_order_of_tokens_does_not_matter(rate, problem):
    z, labels, U = problem
    order = torch.randperm(z.shape[1], generator=torch.Generator().manual_seed(0))
    close(rate(z[:, order], labels[order], U), rate(z, labels, U), coding_rate(z, EPS).max())


@pytest.mark.parametrize("name", [name for name in RATES if name != "sparse rate reduction"])
@given(problem=problems())
def test_rotation_does_not_matter(name, problem):
    z, labels, U = problem
    Q = torch.linalg.qr(normal(z.shape[-1], z.shape[-1], seed=9)).Q
    rate = RATES[name]
    close(rate(z @ Q, labels, Q.T @ U), rate(z, labels, U), coding_rate(z, EPS).max())


@rates
@given(problem=problems())
def test_a_batch_is_its_samples(rate, problem):
    z, labels, U = problem
    together = rate(z, labels, U)
    assert together.shape == z.shape[:1]
    scale = coding_rate(z, EPS).max()
    close(together, torch.stack([rate(sample, labels, U) for sample in z]), scale)
    close(rate(z[:, None], labels, U), together[:, None], scale)  # any number of leading dimensions
    changed = z.clone()
    changed[1:] = -3 * changed[1:].flip(1) + 1
    close(rate(changed, labels, U)[0], together[0], scale)


@given(problem=problems())
def test_rate_is_the_log_volume_of_singular_values(problem):
    z, _, U = problem
    n, d = z.shape[-2:]
    s = torch.linalg.svdvals(z)
    close(coding_rate(z, EPS), 0.5 * torch.log1p(d / (n * EPS**2) * s**2).sum(-1))
    parts = [(z @ u, u.shape[1]) for u in U]
    expected = [0.5 * torch.log1p(p / (n * EPS**2) * torch.linalg.svdvals(w) ** 2).sum(-1) for w, p in parts]
    close(subspace_coding_rate(z, U, EPS), sum(expected))


@given(problem=problems(), which=st.integers(0, 7), factor=st.floats(1.01, 10))
def test_rate_grows_with_every_singular_value(problem, which, factor):
    z, *_ = problem
    u, s, v = torch.linalg.svd(z, full_matrices=False)
    s[:, which % s.shape[1]] *= factor
    assert (coding_rate(u * s[:, None] @ v, EPS) > coding_rate(z, EPS)).all()


@given(problem=problems())
def test_parts_cost_less_than_the_whole_and_nothing_costs_less_than_zero(problem):
    z, labels, U = problem
    whole = coding_rate(z, EPS)
    slack = 1e-9 * (1 + whole)
    for membership in (labels, soft_rows(z.shape[1], 4)):
        by_class = class_coding_rate(z, membership, EPS)
        assert (by_class <= whole + slack).all()
        assert (by_class >= 0).all()
        assert (rate_reduction(z, membership, EPS) >= -slack).all()
    assert (whole > 0).all()
    assert (subspace_coding_rate(z, U, EPS) > 0).all()


def test_one_class_is_the_whole_and_every_token_its_own_class_is_known():
    z = normal(6, 4)
    close(class_coding_rate(z, torch.zeros(6, dtype=torch.long), EPS), coding_rate(z, EPS))
    alone = 0.5 * torch.log1p(4 / EPS**2 * z.square().sum(-1)).mean()
    close(class_coding_rate(z, torch.arange(6), EPS), alone)


def test_planted_subspaces_are_the_cheapest_classes():
    # Two orthogonal planes: by planes the parts are cheap, by any other split they are not.
    basis = torch.linalg.qr(normal(8, 4)).Q.T
    z = torch.cat([normal(20, 2, seed=1) @ basis[:2], normal(20, 2, seed=2) @ basis[2:]])
    planted = torch.arange(40) // 20
    for seed in range(20):
        other = planted[torch.randperm(40, generator=torch.Generator().manual_seed(seed))]
        assert rate_reduction(z, planted, 0.1) > rate_reduction(z, other, 0.1) + 1


@given(problem=problems())
def test_hard_labels_are_one_hot_memberships(problem):
    z, labels, _ = problem
    one_hot = F.one_hot(labels, 5).double()  # classes 3 and 4 are empty
    expected = class_coding_rate(z, labels, EPS)
    close(class_coding_rate(z, one_hot, EPS), expected)
    close(class_coding_rate(z, labels * 7, EPS), expected)  # names of classes do not matter
    per_sample = torch.stack([labels.roll(i) for i in range(len(z))])
    rolled = torch.stack([class_coding_rate(s, y, EPS) for s, y in zip(z, per_sample, strict=True)])
    close(class_coding_rate(z, per_sample, EPS), rolled)


def test_empty_class_costs_nothing_and_has_finite_gradients():
    z = normal(6, 4).requires_grad_()
    weights = torch.cat([soft_rows(6, 2), torch.zeros(6, 1, dtype=torch.float64)], 1).requires_grad_()
    rate = class_coding_rate(z, weights, EPS)
    close(rate, class_coding_rate(z, weights[:, :2], EPS))
    for gradient in torch.autograd.grad(rate, (z, weights)):
        assert gradient.isfinite().all()


def test_sparse_rate_reduction_is_its_three_terms():
    z, U = normal(2, 6, 4), normal(3, 4, 2)
    expected = coding_rate(z, EPS) - subspace_coding_rate(z, U, EPS) - 0.3 * z.abs().sum((-2, -1))
    close(sparse_rate_reduction(z, U, EPS, 0.3), expected)


# --- the variational bound --------------------------------------------------------------------------------


def exact_rates(z, U, weights):
    """What :func:`variational_coding_rate` bounds: one determinant for each group, tokens in columns."""
    n, d = z.shape
    rates = []
    for u, pi in zip(U, weights.unbind(-1), strict=True):
        second_moments = u.T @ z.T @ torch.diag(pi) @ z @ u
        scale = d / (max(pi.sum().item(), 1e-300) * EPS**2)
        rates.append(
            pi.sum() / (2 * n) * torch.logdet(torch.eye(len(second_moments)) + scale * second_moments)
        )
    return torch.stack(rates)


def orthonormal(K, d, p, seed=0):
    return torch.linalg.qr(normal(K, d, max(d, p), seed=seed)).Q[..., :p]


@st.composite
def memberships(draw):
    """Tokens, orthonormal bases of up to d dimensions, and soft memberships, some next to hard or empty."""
    n, d, K = draw(st.integers(1, 9)), draw(st.integers(1, 7)), draw(st.integers(1, 4))
    seed = draw(st.integers(0, 10**6))
    logits = normal(n, K, seed=seed + 1) * draw(st.sampled_from([0.0, 1.0, 30.0]))
    U = orthonormal(K, d, draw(st.integers(1, d)), seed=seed + 2)
    return normal(n, d, seed=seed) * 10 ** draw(st.floats(-2, 2)), U, logits.softmax(-1)


@given(problem=memberships())
def test_variational_rate_is_never_below_the_determinants_it_bounds(problem):
    z, U, weights = problem
    bound, exact = variational_coding_rate(z, U, weights, EPS), exact_rates(z, U, weights).sum()
    assert bound >= exact - 1e-9 * (1 + exact)
    if U.shape[-1] == 1:
        close(bound, exact)


@given(problem=memberships())
def test_variational_rate_is_met_where_second_moments_are_diagonal(problem):
    z, U, weights = problem
    turned = []
    for u, pi in zip(U, weights.unbind(-1), strict=True):
        second_moments = u.T @ z.T @ torch.diag(pi) @ z @ u
        turned.append(u @ torch.linalg.eigh(second_moments).eigenvectors)
    turned = torch.stack(turned)
    exact = exact_rates(z, turned, weights).sum()
    close(variational_coding_rate(z, turned, weights, EPS), exact)
    close(exact, exact_rates(z, U, weights).sum())  # the determinant does not see the turn: this is the least


def test_variational_rate_is_strictly_above_where_they_are_not():
    z, U, weights = normal(20, 5), orthonormal(2, 5, 3), soft_rows(20, 2)
    assert variational_coding_rate(z, U, weights, EPS) > 1.01 * exact_rates(z, U, weights).sum()


@given(problem=memberships())
def test_variational_rate_of_whole_bases_bounds_the_class_rate(problem):
    z, U, weights = problem
    whole = orthonormal(len(U), z.shape[1], z.shape[1])
    rate = class_coding_rate(z, weights, EPS)
    assert variational_coding_rate(z, whole, weights, EPS) >= rate - 1e-9 * (1 + rate)


@tokens
def test_gradient_of_the_variational_rate_needs_second_moments_only(z):
    n, d = z.shape
    U, weights, s = normal(3, d, 2, seed=4), soft_rows(n, 3), d / EPS**2
    expected = torch.zeros_like(z)
    for u, pi in zip(U, weights.unbind(-1), strict=True):
        moments = (pi[:, None] * (z @ u) ** 2).sum(0) / pi.sum()
        expected += pi[:, None] * (z @ u) * (s / (1 + s * moments)) @ u.T / n
    exactly(gradient(lambda z: variational_coding_rate(z, U, weights, EPS), z), expected)


def test_labels_of_the_variational_rate_are_indices_of_subspaces():
    z, U = normal(6, 4), normal(5, 4, 2, seed=1)
    labels = torch.tensor([1, 3, 1, 3, 3, 1])  # 0, 2 and 4 are empty and cost nothing
    value = variational_coding_rate(z, U, labels, EPS)
    close(value, variational_coding_rate(z, U, F.one_hot(labels, 5).double(), EPS))
    close(value, variational_coding_rate(z, U[[1, 3]], labels // 2, EPS))
    assert not torch.isclose(value, variational_coding_rate(z, U, labels - 1, EPS))
    weights = F.one_hot(labels, 5).double().requires_grad_()
    variational_coding_rate(z, U, weights, EPS).backward()
    assert weights.grad.isfinite().all()


def test_a_shift_moves_the_projections():
    z, U, shift, weights = normal(2, 6, 4), normal(3, 4, 2, seed=1), normal(3, 2, seed=2), soft_rows(6, 3)
    value = variational_coding_rate(z, U, weights, EPS, shift=shift)
    # A shift is one more coordinate, which is 1 for every token; eps counts the dimensions of a token.
    longer = F.pad(z, (0, 1), value=1.0)
    expected = variational_coding_rate(
        longer, torch.cat([U, shift[:, None]], 1), weights, EPS * math.sqrt(5 / 4)
    )
    close(value, expected)


def test_variational_rate_under_autocast_and_in_half_precision_is_a_float32_number():
    z, U, weights = FEATURES["full rank"], orthonormal(4, 64, 16).float(), soft_rows(256, 4).float()
    exact = variational_coding_rate(z.double(), U.double(), weights.double(), 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = variational_coding_rate(z, U, weights, 0.1)
    assert narrow.dtype == torch.float32
    assert relative_error(narrow, exact) < 1e-5
    half = variational_coding_rate(z.bfloat16(), U, weights, 0.1)
    assert half.dtype == torch.float32
    assert (
        relative_error(
            half, variational_coding_rate(z.bfloat16().double(), U.double(), weights.double(), 0.1)
        )
        < 1e-5
    )


def test_variational_rate_of_tokens_whose_squares_float32_cannot_hold():
    z, U, weights = 1e25 * FEATURES["full rank"], orthonormal(4, 64, 16).float(), soft_rows(256, 4).float()
    assert z.square().isinf().any()
    exact = variational_coding_rate(z.double(), U.double(), weights.double(), 0.1)
    assert relative_error(variational_coding_rate(z, U, weights, 0.1), exact) < 1e-5


def test_bits():
    assert nats_to_bits(torch.tensor(math.log(8))).item() == pytest.approx(3)


# --- precision --------------------------------------------------------------------------------------------


def unit(z):
    return F.normalize(z, dim=-1).float()


FEATURES = {
    "full rank": unit(normal(256, 64)),
    "rank four": unit(normal(256, 4) @ normal(4, 64, seed=1)),
    "fewer tokens than dimensions": unit(normal(64, 256)),
    "collapsed": unit(normal(1, 64)).expand(256, 64).clone(),
}


def condition_bound(z, eps):
    """1 + d/(n eps^2) ||Z||_F^2, which is 1 + d/eps^2 for tokens of norm one."""
    return 1 + z.shape[1] / (z.shape[0] * eps**2) * z.double().square().sum().item()


def plain_rate(z, eps):
    """The formula in the dtype of z, and whether its Cholesky failed."""
    n, d = z.shape
    gram = z @ z.T if n < d else z.T @ z
    factor, info = torch.linalg.cholesky_ex(torch.eye(len(gram), dtype=z.dtype) + d / (n * eps**2) * gram)
    return factor.diagonal().log().sum(), bool(info)


def relative_error(actual, expected):
    return abs(actual.double() - expected).item() / expected.item()


@pytest.mark.parametrize("eps", [0.5, 0.1, 0.05, 0.01, 0.001])  # bounds from 3e2 to 3e8
@pytest.mark.parametrize("z", FEATURES.values(), ids=FEATURES.keys())
def test_float32_under_autocast_is_within_1e_4_of_float64(z, eps):
    assert 2e2 < condition_bound(z, eps) < 3e8
    labels = torch.arange(len(z)) % 2
    U = torch.eye(z.shape[1]).unflatten(1, (2, -1)).transpose(0, 1)
    wide = z.double()
    with torch.autocast("cpu", torch.bfloat16):
        assert (z @ z.T).dtype == torch.bfloat16  # autocast is at work
        narrow = [coding_rate(z, eps), class_coding_rate(z, labels, eps), subspace_coding_rate(z, U, eps)]
    exact = [
        coding_rate(wide, eps),
        class_coding_rate(wide, labels, eps),
        subspace_coding_rate(wide, U.double(), eps),
    ]
    for actual, expected in zip(narrow, exact, strict=True):
        assert actual.dtype == torch.float32
        assert relative_error(actual, expected) < 1e-4


def test_half_precision_tokens_are_coded_in_float32():
    z = FEATURES["full rank"].bfloat16()
    rate = coding_rate(z, 0.1)
    assert rate.dtype == torch.float32
    assert relative_error(rate, coding_rate(z.double(), 0.1)) < 1e-5
    assert sparse_rate_reduction(z, torch.eye(64).bfloat16()[None], 0.1, 0.1).dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "eps", "fails"),
    [("collapsed", 1e-3, True), ("collapsed", 0.02, False), ("rank four", 1e-3, True)],
)
def test_float64_takes_over_where_float32_fails_or_lies(name, eps, fails, monkeypatch):
    z = FEATURES[name]
    expected = coding_rate(z.double(), eps)
    plain, failed = plain_rate(z, eps)
    assert failed == fails
    assert failed or relative_error(plain, expected) > 1e-4  # nothing failed, and yet it is wrong

    dtypes = []
    module = sys.modules["pellucid.objectives.coding_rate"]
    inner = module._log_diagonal
    monkeypatch.setattr(module, "_log_diagonal", lambda m: (dtypes.append(m.dtype), inner(m))[1])
    assert relative_error(coding_rate(z, eps), expected) < 1e-6
    assert dtypes == [torch.float32, torch.float64]
    z = z.clone().requires_grad_()
    coding_rate(z, eps).backward()
    wide = gradient(lambda z: coding_rate(z, eps), z.detach().double())
    assert (z.grad - wide).norm() < 1e-4 * wide.norm()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@rates
def test_not_finite_tokens_are_refused(rate, bad):
    z = normal(2, 6, 4)
    z[1, 2, 3] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        rate(z, torch.arange(6) % 3, normal(2, 4, 2))


def test_hopeless_eps_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match="eps is too small for tokens of this norm - raise eps"):
        coding_rate(TOKENS["all equal"], 1e-30)


# --- wrong inputs -----------------------------------------------------------------------------------------


@rates
@pytest.mark.parametrize(
    ("z", "message"),
    [
        (torch.ones(0, 4), r"\(0, 4\): nothing to code"),
        (torch.ones(4, 0), r"\(4, 0\): nothing to code"),
    ],
)
def test_empty_tokens_are_refused(rate, z, message):
    with pytest.raises(ValueError, match=message):
        rate(z, torch.zeros(len(z), dtype=torch.long), torch.ones(1, z.shape[1], 1))


@pytest.mark.parametrize("eps", [0.0, -1.0, float("nan")])
def test_eps_must_be_positive(eps):
    z, labels, U = normal(4, 3), torch.zeros(4, dtype=torch.long), normal(1, 3, 2)
    for call in (
        lambda: coding_rate(z, eps),
        lambda: class_coding_rate(z, labels, eps),
        lambda: subspace_coding_rate(z, U, eps),
        lambda: variational_coding_rate(z, U, labels, eps),
        lambda: rate_reduction(z, labels, eps),
        lambda: sparse_rate_reduction(z, U, eps, 0.1),
    ):
        with pytest.raises(ValueError, match=f"eps is {eps}; the distortion must be positive"):
            call()


@pytest.mark.usefixtures("unchecked_shapes")  # users run without the checks: the messages must come from us
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: coding_rate(torch.ones(3), 1.0), r"tokens have shape \(3,\); expected \(\.\.\., n, d\)"),
        (lambda: coding_rate(torch.ones(3, 2).long(), 1.0), r"dtype torch.int64.*z\.float\(\)"),
        (
            lambda: subspace_coding_rate(torch.ones(3, 2), torch.ones(1, 4, 1), 1.0),
            r"U has shape \(1, 4, 1\); expected \(K, 2, p\)",
        ),
        (lambda: subspace_coding_rate(torch.ones(3, 2), torch.ones(2, 1), 1.0), r"U has shape \(2, 1\)"),
        (
            lambda: variational_coding_rate(torch.ones(3, 2), torch.ones(1, 4, 1), torch.ones(3, 1), 1.0),
            r"U has shape \(1, 4, 1\); expected \(K, 2, p\)",
        ),
        (
            lambda: variational_coding_rate(torch.ones(3, 2), torch.ones(4, 2, 1), torch.ones(3, 1), 1.0),
            "tells 1 groups apart; expected one for each of 4 subspaces",
        ),
        (
            lambda: variational_coding_rate(torch.ones(3, 2), torch.ones(2, 2, 1), torch.arange(3), 1.0),
            "labels must be below 2, the number of subspaces",
        ),
        (
            lambda: variational_coding_rate(torch.ones(3, 2), torch.ones(2, 2, 1), torch.ones(4, 2), 1.0),
            r"soft membership has shape \(4, 2\); expected \(\.\.\., 3, K\)",
        ),
        (
            lambda: class_coding_rate(torch.ones(3, 2), torch.zeros(4, dtype=torch.long), 1.0),
            r"labels have shape \(4,\); expected \(\.\.\., 3\)",
        ),
        (
            lambda: class_coding_rate(torch.ones(3, 2), torch.tensor([0, -2, 1]), 1.0),
            "labels must be 0 or larger, or -1",
        ),
        (
            lambda: class_coding_rate(torch.ones(3, 2), torch.full((4, 2), 0.5), 1.0),
            r"soft membership has shape \(4, 2\); expected \(\.\.\., 3, K\)",
        ),
        (
            lambda: class_coding_rate(torch.ones(3, 2), torch.full((3, 2), 0.4), 1.0),
            "non-negative and sum to one",
        ),
        (
            lambda: class_coding_rate(torch.ones(3, 2), torch.tensor([[1.5, -0.5]] * 3), 1.0),
            "non-negative and sum to one",
        ),
        (
            lambda: class_coding_rate(torch.ones(3, 2), torch.full((3, 2), float("nan")), 1.0),
            "non-negative and sum to one",
        ),
    ],
)
def test_wrong_inputs_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- the ceiling of the rate --------------------------------------------------------------------------------


def tight_frame(n, d):
    """n unit vectors in d dimensions with Z^T Z = (n / d) I: cosines and sines of whole frequencies."""
    angle = 2 * math.pi * torch.arange(n, dtype=torch.float64)[:, None] * torch.arange(1, d // 2 + 1) / n
    return torch.cat([angle.cos(), angle.sin()], 1) * (2 / d) ** 0.5


SHAPES = [(1, 4), (3, 8), (8, 8), (9, 4), (50, 6), (64, 2)]


@pytest.mark.parametrize("eps", [0.05, 0.5, 3.0])
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_orthonormal_vectors_and_tight_frames_reach_the_ceiling(n, d, eps):
    z = torch.eye(d, dtype=torch.float64)[:n] if n <= d else tight_frame(n, d)
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(n, dtype=torch.float64))
    assert float(coding_rate(z, eps)) == pytest.approx(rate_ceiling(n, d, eps), rel=1e-12)


@given(
    n=st.integers(1, 12),
    d=st.integers(1, 12),
    eps=st.floats(0.05, 5),
    tilt=st.floats(0, 3),
    seed=st.integers(0, 10_000),
)
def test_no_unit_vectors_exceed_the_ceiling(n, d, eps, tilt, seed):
    z = F.normalize(normal(n, d, seed=seed) + tilt, dim=-1)
    assert float(coding_rate(z, eps)) <= rate_ceiling(n, d, eps) * (1 + 1e-12)


@pytest.mark.parametrize(("n", "d"), [(4, 7), (11, 4), (7, 5)])
def test_climbing_the_rate_ends_at_the_ceiling(n, d):
    start = normal(n, d, seed=3).abs()  # all in one corner
    z = start.clone().requires_grad_()
    ceiling = rate_ceiling(n, d, EPS)
    assert float(coding_rate(F.normalize(start, dim=-1), EPS)) < 0.9 * ceiling
    optimiser = torch.optim.Adam([z], lr=0.05)
    for _ in range(600):
        optimiser.zero_grad()
        (-coding_rate(F.normalize(z, dim=-1), EPS)).backward()
        optimiser.step()
    assert float(coding_rate(F.normalize(z.detach(), dim=-1), EPS)) == pytest.approx(ceiling, rel=1e-6)


def test_the_ceiling_of_the_published_run():
    """64 views of width 256, eps^2 = 0.4, times the published weight: 0.4496."""
    assert (1 / 256 + 1 / 512) * rate_ceiling(64, 256, 0.4**0.5) == pytest.approx(0.4496, abs=5e-5)


def test_a_ceiling_of_nothing_is_refused():
    for n, dim in ((0, 4), (4, 0)):
        with pytest.raises(ValueError, match="nothing to code"):
            rate_ceiling(n, dim, 1.0)
    with pytest.raises(ValueError, match="eps is 0"):
        rate_ceiling(3, 4, 0.0)


# --- effective rank -----------------------------------------------------------------------------------------


def rank_by_definition(z, center=False):
    z = z - z.mean(0) if center else z
    s = torch.linalg.svdvals(z.double())
    p = s / s.sum() + 1e-7
    return float((-(p * p.log()).sum()).exp())


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("shape", [(40, 9), (9, 40), (7, 7), (3, 1)])
def test_effective_rank_is_that_of_the_singular_values(shape, center):
    for z in (normal(*shape), normal(*shape) * torch.linspace(0.01, 3, shape[1]) + 2):
        found = float(effective_rank(z, center=center))
        assert found == pytest.approx(rank_by_definition(z, center), rel=1e-4)
        assert float(effective_rank(z.float(), center=center)) == pytest.approx(found, rel=1e-3)


@pytest.mark.parametrize("used", [1, 3, 8])
def test_effective_rank_counts_equal_directions(used):
    z = torch.linalg.qr(normal(30, 8)).Q[:, :used] @ torch.linalg.qr(normal(8, 8, seed=1)).Q[:used]
    assert float(effective_rank(5 * z)) == pytest.approx(used, rel=1e-4)
    assert float(effective_rank(1e200 * z)) == pytest.approx(used, rel=1e-4)
    assert float(effective_rank(1e-200 * z)) == pytest.approx(used, rel=1e-4)


def test_effective_rank_of_what_has_collapsed():
    point = normal(1, 16).expand(50, 16)
    assert float(effective_rank(point)) == pytest.approx(1, abs=1e-3)
    for z in (point, point.float(), 1e4 * point.float()):
        assert float(effective_rank(z, center=True)) == 0
    assert float(effective_rank(torch.zeros(5, 4))) == 0
    line = point + normal(50, 1, seed=4) * normal(1, 16, seed=5)
    assert float(effective_rank(line, center=True)) == pytest.approx(1, abs=1e-3)
    assert 1 < float(effective_rank(line)) <= 2.001


def test_effective_rank_of_a_batch_is_that_of_each():
    z = normal(3, 10, 4)
    z[1] = z[1, :1]
    found = effective_rank(z)
    assert found.shape == (3,)
    torch.testing.assert_close(found, torch.stack([effective_rank(part) for part in z]))
    assert effective_rank(z.half()).dtype == torch.float32


def test_effective_rank_refuses():
    with pytest.raises(ValueError, match="nothing to code"):
        effective_rank(torch.ones(0, 4))
    with pytest.raises(ValueError, match="NaN or infinity"):
        effective_rank(torch.full((3, 2), torch.nan))
