"""Every step beside its formula, written as in the papers: tokens in columns, nothing saved, float64."""

import inspect
import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from pellucid.objectives import VP, Flow
from pellucid.steps import (
    ISTA,
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
    SoftISTA,
    StrictCompression,
    StrictISTA,
    Synthesis,
    UntiedCausalTSSA,
    UntiedMSSA,
    UntiedTSSA,
)


def relu(v):
    return torch.where(v > 0, v, torch.zeros_like(v))


def soft_threshold(v, t):
    return torch.sign(v) * relu(v.abs() - t)


def naive_ista(step, Z, X):
    D, eta, lam = step.dictionary, step.step_size, step.sparsity
    return relu(Z + eta * D.T @ (X - D @ Z) - eta * lam)


def naive_soft_ista(step, Z, X):
    D, eta, lam = step.dictionary, step.step_size, step.sparsity
    return soft_threshold(Z + eta * D.T @ (X - D @ Z), eta * lam)


def attention_of(V, scale):
    """``V softmax(V^T V)``; the softmax is over the tokens looked at, which are the rows here."""
    return V @ torch.softmax(scale * (V.T @ V), dim=0)


def naive_mssa(step, Z, X):
    N = step.norm(Z.T).T
    return Z + step.step_size * sum(U @ attention_of(U.T @ N, step.head_dim**-0.5) for U in step.U)


def naive_untied_mssa(step, Z, X):
    N = step.norm(Z.T).T
    stacked = torch.cat([attention_of(U.T @ N, step.head_dim**-0.5) for U in step.U])
    bias = 0 if step.output.bias is None else step.output.bias[:, None]
    return Z + step.step_size * (step.output.weight @ stacked + bias)


def naive_decompression(step, Z, X):
    return 2 * Z - naive_untied_mssa(step, Z, X)


def gradient_of_rate(bases, N, b):
    eye = torch.eye(N.shape[1], dtype=N.dtype)
    return sum(b * U @ U.T @ N @ torch.linalg.inv(eye + b * (U.T @ N).T @ (U.T @ N)) for U in bases)


def naive_exact_compression(step, Z, X):
    N = step.norm(Z.T).T
    b = step.head_dim / (Z.shape[1] * step.eps**2)
    return Z - step.step_size * gradient_of_rate(step.U, N, b)


def naive_strict_compression(step, Z, X):
    original = step.subspaces.parametrizations.weight.original
    d = len(Z)
    entry = lambda i, j: original[i, j] if i < len(original) else torch.zeros((), dtype=Z.dtype)
    S = torch.stack([torch.stack([entry(i, j) - entry(j, i) for j in range(d)]) for i in range(d)])
    eye = torch.eye(d, dtype=Z.dtype)
    rows = list(((eye - S) @ torch.linalg.inv(eye + S))[: len(original)])  # Cayley's
    bases = [torch.stack(rows[i : i + step.head_dim], 1) for i in range(0, len(rows), step.head_dim)]
    b = step.head_dim / (Z.shape[1] * step.eps**2)
    return Z - torch.sigmoid(step.share) * 2 / b * gradient_of_rate(bases, Z, b)


def naive_strict_ista(step, Z, X):
    D, lam = step.dictionary, torch.exp(step.log_sparsity)
    beta = (torch.linalg.svdvals(D) ** 128).sum() ** (1 / 64)
    eta = torch.sigmoid(step.share) * 2 / beta
    return soft_threshold(Z + eta * D.T @ (X - D @ Z), eta * lam)


def naive_synthesis(step, Z, X):
    return torch.stack([sum(a * atom for a, atom in zip(z, step.dictionary.T, strict=True)) for z in Z.T], 1)


def naive_overcomplete(step, Z, X):
    D, eta, lam, codes = step.dictionary, step.step_size, step.sparsity, []
    for x in step.norm(Z.T):
        a = x if D.shape[0] == D.shape[1] else torch.zeros(D.shape[1], dtype=Z.dtype)
        for _ in range(step.iterations):
            a = relu(a + eta * (D.T @ (x - D @ a)) - eta * lam)
        codes.append(a)
    A = torch.stack(codes, 1)
    if step.output is not None:
        A = step.output @ A
    elif D.shape[0] != D.shape[1]:
        A = D @ A
    return Z + A if step.residual else A


def statistics(step, Z):
    """For each head its rows ``W_k = U_k^T Z``, the weights pi_k of the tokens, and the diagonal of D_k."""
    N, n, p = step.norm(Z.T).T, Z.shape[1], step.head_dim
    W = step.subspaces.weight @ N
    if step.subspaces.bias is not None:
        W = W + step.subspaces.bias[:, None]
    heads = [W[k * p : (k + 1) * p] for k in range(step.num_heads)]
    membership = []
    for j in range(n):
        logits = [
            step.temperature[k] * sum(row[j] ** 2 / (row @ row) for row in rows)
            for k, rows in enumerate(heads)
        ]
        total = sum(torch.exp(logit) for logit in logits)
        membership.append(torch.stack([torch.exp(logit) / total for logit in logits]))
    Pi = torch.stack(membership)
    s = Z.shape[0] / step.eps**2
    slopes = [
        torch.stack([s / (1 + s * (pi @ row**2) / pi.sum()) for row in rows])
        for rows, pi in zip(heads, Pi.T, strict=True)
    ]
    return heads, Pi, slopes


def naive_tssa(step, Z, X):
    heads, Pi, slopes = statistics(step, Z)
    moved = torch.zeros_like(Z)
    for U, W, pi, D in zip(step.U, heads, Pi.T, slopes, strict=True):
        moved = moved + U @ torch.diag(D) @ W @ torch.diag(pi)
    return Z - step.step_size * moved


def naive_untied_tssa(step, Z, X):
    heads, Pi, slopes = statistics(step, Z)
    stacked = torch.cat(
        [torch.diag(D) @ W @ torch.diag(pi) for W, pi, D in zip(heads, Pi.T, slopes, strict=True)]
    )
    moved = step.output.weight @ -stacked + step.output.bias[:, None]
    return Z + step.step_size * (moved if step.layer_scale is None else torch.diag(step.layer_scale) @ moved)


def causal_statistics(step, Z):
    """For each token its row of every head, its memberships, and the diagonals of D of the tokens so far."""
    N, n, p, s = step.norm(Z.T).T, Z.shape[1], step.head_dim, Z.shape[0] / step.eps**2
    W = step.subspaces.weight @ N
    if step.subspaces.bias is not None:
        W = W + step.subspaces.bias[:, None]
    heads = [W[k * p : (k + 1) * p] for k in range(step.num_heads)]
    chosen, slopes = [], []
    for t in range(n):
        logits = []
        for k, rows in enumerate(heads):
            offset = 0.0 if step.offset is None else step.offset[k, t]
            logits.append(
                step.temperature[k] * sum(r[t] ** 2 / (r[: t + 1] @ r[: t + 1]) + offset for r in rows)
            )
        chosen.append(torch.softmax(torch.stack(logits), 0))  # once, when the token arrives
        for k, rows in enumerate(heads):
            pi = torch.stack([membership[k] for membership in chosen])
            slopes.append(torch.stack([s / (1 + s * (pi @ r[: t + 1] ** 2) / pi.sum()) for r in rows]))
    return heads, chosen, [slopes[t * len(heads) : (t + 1) * len(heads)] for t in range(n)]


def causal_directions(step, Z):
    heads, chosen, slopes = causal_statistics(step, Z)
    for t in range(Z.shape[1]):
        yield torch.cat([-D * pi * W[:, t] for D, pi, W in zip(slopes[t], chosen[t], heads, strict=True)])


def naive_causal_tssa(step, Z, X):
    return Z + step.step_size * torch.stack(
        [torch.cat(list(step.U), 1) @ m for m in causal_directions(step, Z)], 1
    )


def naive_untied_causal_tssa(step, Z, X):
    moved = step.output.weight @ torch.stack(list(causal_directions(step, Z)), 1)
    if step.output.bias is not None:
        moved = moved + step.output.bias[:, None]
    return Z + step.step_size * (moved if step.layer_scale is None else torch.diag(step.layer_scale) @ moved)


def naive_rate_reduction(step, Z, X):
    columns = []
    for z in Z.T:
        compressed = [C @ z for C in step.compress]
        likely = [torch.exp(-step.sharpness * torch.sqrt(c @ c)) for c in compressed]
        pulled = sum(g * p / sum(likely) * c for g, p, c in zip(step.share, likely, compressed, strict=True))
        moved = z + step.step_size * (step.expand @ z - pulled)
        columns.append(moved / torch.sqrt(moved @ moved))
    return torch.stack(columns, 1)


def convolution(kernel, signal):
    """``y_c(t) = sum over c' and s of kernel_cc'(s) signal_c'(t - s)``, around in a circle."""
    places = itertools.product(*map(range, signal.shape[1:]))
    shifts = tuple(range(1, signal.dim()))
    return sum(
        torch.tensordot(kernel[(..., *place)], torch.roll(signal, place, shifts), 1) for place in places
    )


def naive_shift_invariant(step, Z, X):
    columns = []
    for z in Z.T:
        z = z.reshape(step.shape)
        compressed = [convolution(C, z) for C in step.compress]
        likely = [torch.exp(-step.sharpness * c.norm()) for c in compressed]
        pulled = sum(g * p / sum(likely) * c for g, p, c in zip(step.share, likely, compressed, strict=True))
        moved = z + step.step_size * (convolution(step.expand, z) - pulled)
        columns.append((moved / moved.norm()).flatten())
    return torch.stack(columns, 1)


def residual(step, Z, moved):
    return Z + (moved if step.layer_scale is None else torch.diag(step.layer_scale) @ moved)


def naive_mhsa(step, Z, X):
    N, (d, n), K = step.norm(Z.T).T, Z.shape, step.num_heads
    Q, keys, V = ((step.qkv.weight @ N + step.qkv.bias[:, None])[i * d : (i + 1) * d] for i in range(3))
    mixed = []
    for rows in torch.arange(d).chunk(K):
        columns = []
        for j in range(n):
            similar = [torch.exp(Q[rows, j] @ keys[rows, i] / math.sqrt(d // K)) for i in range(n)]
            columns.append(sum(s * V[rows, i] for i, s in enumerate(similar)) / sum(similar))
        mixed.append(torch.stack(columns, 1))
    return residual(step, Z, step.output.weight @ torch.cat(mixed) + step.output.bias[:, None])


def naive_mlp(step, Z, X):
    inner = step.fc1.weight @ step.norm(Z.T).T + step.fc1.bias[:, None]
    gelu = inner / 2 * (1 + torch.special.erf(inner / math.sqrt(2)))
    return residual(step, Z, step.fc2.weight @ gelu + step.fc2.bias[:, None])


def naive_polar(M):
    """Newton and Schulz's iteration, which knows no decomposition."""
    M = M / torch.linalg.norm(M)
    for _ in range(100):
        M = 1.5 * M - 0.5 * M @ M.T @ M
    return M


def naive_orthogonal_iteration(step, Z, X):
    samples = step.samples.T
    return naive_polar(sum(x[:, None] @ (x[None] @ Z) for x in samples.T))


def naive_msp(step, Z, X):
    samples = step.samples.T
    return naive_polar(samples @ ((Z.T @ samples) ** 3).T)


def naive_denoise(step, Z, X):
    a, s, a_next, s_next = (
        f(t) for t in (step.t, step.t_next) for f in (step.schedule.alpha, step.schedule.sigma)
    )
    columns = []
    for z in Z.T:
        distances = torch.stack([(z - p) @ (z - p) for p in step.denoiser.points])
        weights = torch.exp(-distances / (2 * step.t**2)) / torch.exp(-distances / (2 * step.t**2)).sum()
        guess = sum(w * p for w, p in zip(weights, step.denoiser.points, strict=True))
        noise = (z - a * guess) / s
        columns.append(a_next * guess + s_next * noise)
    return torch.stack(columns, 1)


def naive_free_ista(step, Z, X):
    v = step.encoder @ X + step.lateral @ Z
    return soft_threshold(v, step.threshold.abs()[:, None])


NAIVE = {
    Denoise: naive_denoise,
    ISTA: naive_ista,
    SoftISTA: naive_soft_ista,
    MSSA: naive_mssa,
    UntiedMSSA: naive_untied_mssa,
    ExactCompression: naive_exact_compression,
    StrictCompression: naive_strict_compression,
    StrictISTA: naive_strict_ista,
    Decompression: naive_decompression,
    Synthesis: naive_synthesis,
    OvercompleteISTA: naive_overcomplete,
    TSSA: naive_tssa,
    UntiedTSSA: naive_untied_tssa,
    CausalTSSA: naive_causal_tssa,
    UntiedCausalTSSA: naive_untied_causal_tssa,
    RateReduction: naive_rate_reduction,
    ShiftInvariantRateReduction: naive_shift_invariant,
    FreeISTA: naive_free_ista,
    OrthogonalIteration: naive_orthogonal_iteration,
    MSP: naive_msp,
    MHSA: naive_mhsa,
    MLP: naive_mlp,
}

# Beside the step size and the norm: what else a class can be told that changes its numbers.
OPTIONS = {
    Denoise: [{"t_next": 0.0}, {"schedule": VP()}, {"schedule": Flow(), "t": 1.0}],
    OvercompleteISTA: [
        {"decoupled": False},
        {"residual": False},
        {"iterations": 4},
        {"iterations": 1},
        {"num_atoms": 6},
        {"num_atoms": 6, "decoupled": False, "residual": False},
        {"num_atoms": 3},
    ],
    MSSA: [{"causal": True}],
    UntiedMSSA: [{"output_bias": False}, {"causal": True}],
    TSSA: [{"bias": True}, {"head_dim": 2}],
    UntiedTSSA: [{"bias": False}, {"head_dim": 4}],
    CausalTSSA: [{"bias": True}, {"head_dim": 2, "block_size": 7}],
    UntiedCausalTSSA: [{"bias": False, "output_bias": False}, {"head_dim": 4, "block_size": None}],
    ShiftInvariantRateReduction: [
        {"shape": (1, 6)},
        {"shape": (6, 1)},
        {"shape": (1, 3, 2)},
        {"shape": (1, 2, 3)},
    ],
    MHSA: [{"layer_scale": 0.5}, {"causal": True}],
    MLP: [{"layer_scale": 0.5}, {"ratio": 1.5}],
}


def formula(step, Z, X):
    """Attention in order is attention to each prefix, of which the last token is taken."""
    naive = NAIVE[type(step)]
    if step.sees != "past" or isinstance(step, CausalTSSA):
        return naive(step, Z, X)
    return torch.stack([naive(step, Z[:, :t], X[:, :t])[:, -1] for t in range(1, Z.shape[1] + 1)], 1)


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def output_and_gradients(step, forward, z, weight):
    z = z.clone().requires_grad_()
    out = forward(z)
    gradients = torch.autograd.grad((out * weight).sum(), [z, *step.parameters()], allow_unused=True)
    return out.detach(), gradients


def test_every_final_step_has_a_naive_form(step_class):
    assert step_class in NAIVE, f"write {step_class.__name__} as its paper does"


@pytest.mark.parametrize("n", [1, 2, 3, 7])  # fewer, as many and more tokens than dimensions of a subspace
@pytest.mark.parametrize("with_signal", [False, True])
def test_equals_its_formula_in_output_and_gradients(step_class, make, tokens, norm, n, with_signal):
    known = inspect.signature(step_class).parameters
    choices = [{"step_size": 0.3}, {"step_size": 0.1, "norm": norm}]
    choices = [{key: value for key, value in choice.items() if key in known} for choice in choices]
    for options in [*choices, *OPTIONS.get(step_class, [])]:
        step = make(step_class, **options)
        z, weight = tokens(3, n), tokens(3, n, seed=8)
        x = tokens(3, n, seed=1) if with_signal else None

        def naive(z, step=step, x=x):
            columns = zip(z, z if x is None else x, strict=True)
            return torch.stack([formula(step, zi.T, xi.T).T for zi, xi in columns])

        out, gradients = output_and_gradients(step, lambda z, step=step, x=x: step(z, x), z, weight)
        expected, expected_gradients = output_and_gradients(step, naive, z, weight)
        assert out.any()
        same(out, expected)
        assert len(gradients) == 1 + len(list(step.parameters()))
        for actual, wanted in zip(gradients, expected_gradients, strict=True):
            same(actual, wanted)


def test_an_overcomplete_dictionary_equals_the_formula(tokens):
    """A code wider than its signal, from zero and from any start."""
    for cls in (ISTA, SoftISTA):
        step = cls(6, 11, step_size=0.2).double()
        x = tokens()
        for z in (torch.zeros(3, 5, 11, dtype=torch.float64), F.pad(tokens(seed=3), (0, 5))):
            expected = torch.stack([NAIVE[cls](step, zi.T, xi.T).T for zi, xi in zip(z, x, strict=True)])
            same(step(z, x), expected)
