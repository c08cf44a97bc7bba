"""The sequences of operations that the authors' programs run, on the parameters of our steps.

Written from their formulas, one operation of theirs for one here, so that what they cost can be timed beside
ours. Stems, pooling, heads, class attention and MLPs are the same on both sides, and are ours.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from pellucid.steps import (
    ISTA,
    MHSA,
    MLP,
    MSSA,
    TSSA,
    Decompression,
    OvercompleteISTA,
    Step,
    Synthesis,
    UntiedMSSA,
    UntiedTSSA,
)

Tokens = Float[Tensor, "b n d"]


def mssa(step: MSSA | UntiedMSSA, z: Tokens, x: Tensor | None = None) -> Tokens:
    """Attention with its weights formed, softmax, then mixed (CRATE, CRATE-alpha)."""
    return z + _scaled(_attention(step, z), step.step_size)


def decompression(step: Decompression, z: Tokens, x: Tensor | None = None) -> Tokens:
    """The same, subtracted (CRATE-MAE's decoder)."""
    return z - _scaled(_attention(step, z), step.step_size)


def ista(step: ISTA, z: Tokens, x: Tensor | None = None) -> Tokens:
    """Three products (CRATE)."""
    D, eta, lam = step.dictionary, step.step_size, step.sparsity
    analysis = torch.matmul(z, D)
    projected = torch.matmul(torch.matmul(z, D.t()), D)
    return F.relu(z + eta * (analysis - projected) - eta * lam)


def overcomplete_ista(step: OvercompleteISTA, z: Tokens, x: Tensor | None = None) -> Tokens:
    """A code from zero in ISTA steps, each operation on a tensor of its own (CRATE-alpha)."""
    D, eta, lam = step.dictionary, step.step_size, step.sparsity
    u = step.norm(z)
    code = F.relu(eta * torch.matmul(u, D) - eta * lam)
    for _ in range(step.iterations - 1):
        gradient = torch.matmul(torch.matmul(code, D.t()) - u, D)
        code = F.relu(code - eta * gradient - eta * lam)
    spoken = torch.matmul(code, (D if step.output is None else step.output).t())
    return z + spoken if step.residual else spoken


def tssa(step: TSSA, z: Tokens, x: Tensor | None = None) -> Tokens:
    """Projections with the heads in front, normalised and squared, weighted, multiplied twice (ToST)."""
    w = _heads(step, z)
    unit = F.normalize(w, dim=-2)
    membership = torch.softmax(torch.sum(unit**2, dim=-1) * step.temperature[:, None], dim=1)
    weights = membership / (membership.sum(dim=-1, keepdim=True) + 1e-8)
    moments = torch.matmul(weights.unsqueeze(-2), w**2)
    slope = step.scale / (1 + step.scale * moments)
    moved = -torch.mul(w.mul(membership.unsqueeze(-1)), slope)
    out = _speak(step, moved)
    layer_scale = getattr(step, "layer_scale", None)
    return z + _scaled(out if layer_scale is None else layer_scale * out, step.step_size)


def _attention(step: Any, z: Tensor) -> Tensor:
    w = _heads(step, z)
    similarities = torch.matmul(w, w.transpose(-1, -2)) * step.head_dim**-0.5
    return _speak(step, torch.matmul(similarities.softmax(dim=-1), w))


def _heads(step: Any, z: Tensor) -> Tensor:
    b, n, _ = z.shape
    return step.subspaces(step.norm(z)).reshape(b, n, step.num_heads, step.head_dim).permute(0, 2, 1, 3)


def _speak(step: Any, w: Tensor) -> Tensor:
    """From heads in front back to tokens, through the output matrix, which is U where it is tied."""
    b, heads, n, p = w.shape
    mixed = w.permute(0, 2, 1, 3).reshape(b, n, heads * p)
    return step.output(mixed) if hasattr(step, "output") else torch.matmul(mixed, step.subspaces.weight)


def _scaled(move: Tensor, step_size: float) -> Tensor:
    return move if step_size == 1 else step_size * move


ARITHMETIC: dict[type[Step], Callable[..., Tensor]] = {
    MSSA: mssa,
    UntiedMSSA: mssa,
    Decompression: decompression,
    ISTA: ista,
    OvercompleteISTA: overcomplete_ista,
    TSSA: tssa,
    UntiedTSSA: tssa,
}
"""Step -> what its authors' program computes. Of exactly that class: a subclass computes something else."""

ALIKE: tuple[type[Step], ...] = (MHSA, MLP, Synthesis)
"""Steps that are computed in one way by everybody."""


def has_published_form(model: nn.Module) -> bool:
    """Whether all its steps were published in this form, and at least one is computed in another way here."""
    steps = [module for module in model.modules() if isinstance(module, Step)]
    inner = {step.coder for step in steps if isinstance(step, OvercompleteISTA)}
    complete = any(step.complete for step in steps if isinstance(step, OvercompleteISTA))
    kinds = {type(step) for step in steps if step not in inner}
    known = kinds <= ARITHMETIC.keys() | set(ALIKE) and all(step.sees != "past" for step in steps)
    return known and not complete and bool(kinds & ARITHMETIC.keys())


def published_twin(model: nn.Module) -> Any:
    """The same model, on the very same parameters and buffers, whose steps compute as their authors' do."""
    shared: Any = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    twin = deepcopy(model, shared)
    for module in twin.modules():
        if isinstance(module, Step) and type(module) in ARITHMETIC:
            module.forward = partial(ARITHMETIC[type(module)], module)  # type: ignore[method-assign]
    return twin
