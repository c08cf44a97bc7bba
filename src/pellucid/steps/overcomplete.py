r"""Sparsification with more atoms than dimensions: CRATE-alpha's half of a layer (Yang et al. 2024).

.. math::
    A = \operatorname{ISTA}_T(\cdot \mid D, \mathrm{norm}(Z)), \qquad Z^+ = Z + A \hat D^\top

Tokens are coded in an overcomplete dictionary D; a code has no place in the next layer's subspaces, so it is
spoken back to the tokens' width. Three switches lead there from CRATE: the dictionary is *overcomplete*, the
dictionary that speaks is *decoupled* from the one that codes, and there is a *residual*.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from pellucid.objectives.reconstruction import lasso
from pellucid.steps.ista import ISTA
from pellucid.steps.step import Step


class OvercompleteISTA(Step):
    r"""A few ISTA steps on the code of the normalised token, spoken back to the token's width.

    The variable that moves downhill is the code A, not the token: :meth:`objective` takes codes, and
    :meth:`before_and_after` compares the code that the step starts from with the one it ends at. From zero,
    as in CRATE-alpha, the start is feasible, so the LASSO falls for every token below the bound.

    Args:
        dim: width d of a token.
        num_atoms: m columns of the dictionary. With ``m == dim`` the code starts at the token itself and
            takes one step, as in CRATE; else at zero and takes ``iterations``.
        step_size, sparsity: of ISTA; 0.1 and 0.1 as published.
        iterations: ISTA steps from zero; 2 as published.
        decoupled: a second dictionary speaks the code back; else the same one, or for ``m == dim`` none.
        residual: add to the token; else take its place.
        norm: in front of the coder; none unless given.
        enter: see :class:`~pellucid.steps.step.Step`.
    """

    objective_name = "LASSO"
    sees = "itself"

    def __init__(
        self,
        dim: int,
        num_atoms: int | None = None,
        *,
        step_size: float = 0.1,
        sparsity: float = 0.1,
        iterations: int = 2,
        decoupled: bool = True,
        residual: bool = True,
        norm: nn.Module | None = None,
        enter: nn.Module | None = None,
    ) -> None:
        super().__init__(enter)
        if iterations < 1:
            raise ValueError(f"iterations is {iterations}; a code takes at least one step")
        self.norm = nn.Identity() if norm is None else norm
        self.coder = ISTA(dim, 4 * dim if num_atoms is None else num_atoms)
        self.coder.step_size, self.coder.sparsity = step_size, sparsity
        self.complete = self.coder.dictionary.shape[1] == dim
        self.iterations = 1 if self.complete else iterations
        self.output = nn.Parameter(self.coder.dictionary.detach().clone()) if decoupled else None
        self.residual = residual

    @property
    def dictionary(self) -> Float[Tensor, "d m"]:
        """The atoms that code, in columns."""
        return self.coder.dictionary

    @property
    def step_size(self) -> float:
        return self.coder.step_size

    @step_size.setter
    def step_size(self, value: float) -> None:
        self.coder.step_size = value

    @property
    def sparsity(self) -> float:
        return self.coder.sparsity

    def forward(self, z: Float[Tensor, "b n d"], x: Tensor | None = None) -> Float[Tensor, "b n d"]:
        spoken = self.decode(self.code(z))
        return z + spoken if self.residual else spoken

    def code(self, z: Float[Tensor, "b n d"]) -> Float[Tensor, "b n m"]:
        """The sparse codes of the tokens."""
        signal = self.norm(z)
        if self.complete:
            return self.coder(signal)
        return self._code_from_zero(signal.flatten(0, -2)).unflatten(0, signal.shape[:-1])

    def _code_from_zero(self, signal: Float[Tensor, "t d"]) -> Float[Tensor, "t m"]:
        """``unroll([coder] * iterations, zeros, signal)``, with what can be done inside a product done there.

        A code is wider than a token, and each pass over it is felt beside the products.
        """
        D, eta, threshold = self.dictionary, self.step_size, self.step_size * self.sparsity
        code = torch.addmm(signal.new_full((D.shape[1],), -threshold), signal, D, alpha=eta).relu_()
        for _ in range(self.iterations - 1):
            residual = signal - F.linear(code, D)
            code = torch.addmm(code, residual, D, alpha=eta).sub_(threshold).relu_()
        return code

    def decode(self, code: Float[Tensor, "b n m"]) -> Float[Tensor, "b n d"]:
        """Codes in the width of a token."""
        if self.output is not None:
            return F.linear(code, self.output)
        return code if self.complete else F.linear(code, self.dictionary)

    def objective(
        self, z: Float[Tensor, "b n m"], start: Float[Tensor, "b n _"], x: Tensor | None = None
    ) -> Float[Tensor, " b"]:
        """The LASSO of codes ``z`` of the signal ``x``; of the signal ``start`` where there is none."""
        return lasso(z, start if x is None else x, self.dictionary, self.sparsity)

    def before_and_after(
        self, z: Float[Tensor, "b n d"], z_next: Float[Tensor, "b n d"], x: Tensor | None = None
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        signal, code = self.norm(z), self.code(z)
        start = signal if self.complete else torch.zeros_like(code)
        return self.objective(start, start, signal), self.objective(code, start, signal)

    def max_step_size(self, num_tokens: int | None = None) -> float:
        """2/||D||^2, from the exact spectral norm."""
        return self.coder.max_step_size(num_tokens)
