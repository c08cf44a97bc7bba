"""Every step beside its formula, written as in the papers: tokens in columns, nothing saved, float64."""

import pytest
import torch
from torch.nn import functional as F

from pellucid.steps import ISTA, MSSA, ExactCompression, SoftISTA, UntiedMSSA


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
    return Z + step.step_size * (step.output.weight @ stacked + step.output.bias[:, None])


def naive_exact_compression(step, Z, X):
    N = step.norm(Z.T).T
    n, p = Z.shape[1], step.head_dim
    b = p / (n * step.eps**2)
    eye = torch.eye(n, dtype=Z.dtype)
    gradient = sum(b * U @ U.T @ N @ torch.linalg.inv(eye + b * (U.T @ N).T @ (U.T @ N)) for U in step.U)
    return Z - step.step_size * gradient


NAIVE = {
    ISTA: naive_ista,
    SoftISTA: naive_soft_ista,
    MSSA: naive_mssa,
    UntiedMSSA: naive_untied_mssa,
    ExactCompression: naive_exact_compression,
}


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
    has_norm = hasattr(make(step_class), "norm")
    for options in (
        [{"step_size": 0.3}, {"step_size": 0.1, "norm": norm}] if has_norm else [{"step_size": 0.3}]
    ):
        step = make(step_class, **options)
        z, weight = tokens(3, n), tokens(3, n, seed=8)
        x = tokens(3, n, seed=1) if with_signal else None

        def naive(z, step=step, x=x):
            columns = zip(z, z if x is None else x, strict=True)
            return torch.stack([NAIVE[type(step)](step, zi.T, xi.T).T for zi, xi in columns])

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
