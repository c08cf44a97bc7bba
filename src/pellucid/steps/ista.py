r"""Sparsification: proximal gradient steps on the LASSO, the iterative shrinkage-thresholding algorithm.

.. math:: Z^+ = \mathrm{prox}_{\eta\lambda}\bigl(Z + \eta (X - Z D^\top) D\bigr)

With non-negative codes the proximal operator is a shifted ReLU, and a step looks like a layer of a network.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from pellucid.objectives.reconstruction import lasso
from pellucid.steps.step import Step, full_precision


class ISTA(Step):
    r"""One non-negative ISTA step, CRATE's ``sparsify`` (Yu et al. 2023, eq. 17).

    .. math:: Z^+ = \mathrm{ReLU}\bigl(Z + \eta (X - Z D^\top) D - \eta\lambda\bigr)

    With no signal given the tokens are their own signal and first code, ``X = Z = start``, as in CRATE; the
    step is then one affine map and a ReLU, and is computed with one product where that is cheaper:

    .. math:: Z^+ = \mathrm{ReLU}(Z + Z C - \eta\lambda), \qquad C = \eta (D - D^\top D).

    The identity stays out of C: a low-precision product would round the tokens themselves, not only their
    change.

    Descends: for ``step_size < 2/||D||^2`` from a non-negative start. From a signed start, as in CRATE, the
    step also leaves the orthant's outside, which can cost more than it gains; the audit measures it.

    Args:
        dim: width d of a token.
        num_atoms: columns m of the dictionary; ``dim`` unless given.
        step_size: :math:`\eta`.
        sparsity: :math:`\lambda`, the price of one unit of code.
        enter: see :class:`~pellucid.steps.step.Step`.
    """

    objective_name = "LASSO"

    def __init__(
        self,
        dim: int,
        num_atoms: int | None = None,
        *,
        step_size: float = 0.1,
        sparsity: float = 0.1,
        enter: nn.Module | None = None,
    ) -> None:
        super().__init__(enter)
        self.step_size, self.sparsity = step_size, sparsity
        self.dictionary = nn.Parameter(torch.empty(dim, dim if num_atoms is None else num_atoms))
        nn.init.orthogonal_(self.dictionary)
        self._fold: _Fold | None = None

    def forward(self, z: Float[Tensor, "b n m"], x: Tensor | None = None) -> Float[Tensor, "b n m"]:
        if x is not None:
            return self.shrink(self._gradient_step(z, x))
        self.check_complete()
        fold = self._choose_fold(z)
        return self.shrink(self._gradient_step(z, z) if fold is None else z + z @ fold.to(z.dtype))

    def check_complete(self) -> None:
        """Tokens can be their own code only where there is one atom for each of their dimensions."""
        if self.dictionary.shape[0] != self.dictionary.shape[1]:
            raise ValueError(
                f"a dictionary of {self.dictionary.shape[1]} atoms for tokens of width "
                f"{self.dictionary.shape[0]} needs a start and a signal: step(code, signal)"
            )

    def shrink(self, v: Float[Tensor, "b n m"]) -> Float[Tensor, "b n m"]:
        r"""The proximal operator of :math:`\eta\lambda\|\cdot\|_1` on non-negative codes."""
        return F.relu_(v - self.step_size * self.sparsity)

    def objective(
        self, z: Float[Tensor, "b n m"], start: Float[Tensor, "b n m"], x: Tensor | None = None
    ) -> Float[Tensor, " b"]:
        return lasso(z, start if x is None else x, self.dictionary, self.sparsity)

    def max_step_size(self, num_tokens: int | None = None) -> float:
        """2/||D||^2, from the exact spectral norm."""
        norm = torch.linalg.matrix_norm(self.dictionary.detach().float(), 2).item()
        return 2 / norm**2 if norm > 0 else float("inf")

    def _gradient_step(self, z: Tensor, x: Tensor) -> Tensor:
        residual = x - z @ self.dictionary.mT
        return torch.add(z, residual @ self.dictionary, alpha=self.step_size)

    def _choose_fold(self, z: Tensor) -> Tensor | None:
        """The matrix C, or None where two products cost less than making it.

        For t tokens of width d a step costs 2td^2 unfolded (6td^2 with its backward pass) and td^2 + d^3
        (3td^2 + 3d^3) with a fresh C, so C pays from t = d on. On a CPU a kept C serves every later call.
        A compiler must not branch on sizes; it gets C, which it can fold as a constant, outside training.
        """
        if torch.compiler.is_compiling():
            return None if self.training else self._make_fold()
        gradients = torch.is_grad_enabled() and (z.requires_grad or self.dictionary.requires_grad)
        if not self.training and not gradients and z.device.type == "cpu":
            return self._kept_fold()
        tokens = z.numel() // z.shape[-1]
        return self._make_fold() if tokens > self.dictionary.shape[0] else None

    def _make_fold(self) -> Tensor:
        """C. Its product, too, runs in autocast's precision: C is rounded to that when it is used."""
        dictionary: Tensor = self.dictionary
        if dictionary.dtype in (torch.float16, torch.bfloat16):
            dictionary = dictionary.float()
        return self.step_size * (dictionary - dictionary.mT @ dictionary)

    def _kept_fold(self) -> Tensor:
        """C from the last call if the dictionary still holds the same numbers, else made anew.

        Compared number by number: version counters miss writes through ``.data``, and reading d^2 numbers is
        nothing beside a product.
        """
        fold = self._fold
        if fold is None or not fold.holds_for(self):
            # Kept for callers in any precision, so made in full.
            with torch.no_grad(), full_precision(self.dictionary):
                matrix = self._make_fold().to(self.dictionary.dtype)
                fold = _Fold(self.dictionary.detach().clone(), self.step_size, matrix)
            self._fold = fold
        return fold.matrix

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_fold": None}


class SoftISTA(ISTA):
    r"""One ISTA step on the plain LASSO: codes of either sign, soft threshold. Descends for any start."""

    def shrink(self, v: Float[Tensor, "b n m"]) -> Float[Tensor, "b n m"]:
        return F.softshrink(v, self.step_size * self.sparsity)


class Momentum(nn.Module):
    r"""Nesterov's extrapolation at the door of a step: ISTA that is entered through it is FISTA.

    .. math:: Y_k = Z_k + \frac{t_k - 1}{t_{k+1}} (Z_k - Z_{k-1}), \qquad
        t_{k+1} = \tfrac12\bigl(1 + \sqrt{1 + 4 t_k^2}\bigr)

    (Beck and Teboulle 2009). Each step still lowers its objective from Y, where it begins; the sequence of Z
    need not fall. A token whose last step went against its momentum begins anew with t = 1 (O'Donoghue and
    Candès 2015). The objective's excess falls with the square of the number of steps for
    ``step_size <= 1/||D||^2``, half of what ISTA may take.

    It remembers the tokens of its last call: one door for one run of :func:`~pellucid.steps.unroll`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._last: Tensor | None = None
        self._entered: Tensor | None = None
        self._t: Tensor | None = None

    def forward(self, z: Float[Tensor, "b n m"]) -> Float[Tensor, "b n m"]:
        if self._last is None or self._entered is None or self._t is None:
            entered, self._t = z, torch.ones_like(z[..., :1])
        else:
            moved = z - self._last
            against = torch.linalg.vecdot(self._entered - z, moved).unsqueeze(-1) > 0
            t = (1 + (1 + 4 * self._t.square()).sqrt()) / 2
            entered = torch.addcmul(z, moved, ((self._t - 1) / t).masked_fill(against, 0))
            self._t = t.masked_fill(against, 1)
        self._last, self._entered = z, entered
        return entered


class Synthesis(Step):
    r"""Speak a code in a dictionary, :math:`Z D^\top`: the inverse of a sparsification, not itself a descent.

    Args:
        dim: width of a token, and number of atoms.
        enter: see :class:`~pellucid.steps.step.Step`.
    """

    objective_name = None
    step_size = 1.0

    def __init__(self, dim: int, *, enter: nn.Module | None = None) -> None:
        super().__init__(enter)
        self.dictionary = nn.Parameter(torch.empty(dim, dim))
        nn.init.orthogonal_(self.dictionary)

    def forward(self, z: Float[Tensor, "b n d"], x: Tensor | None = None) -> Float[Tensor, "b n d"]:
        return z @ self.dictionary.mT

    def objective(
        self, z: Float[Tensor, "b n d"], start: Float[Tensor, "b n d"], x: Tensor | None = None
    ) -> Float[Tensor, " b"]:
        raise TypeError("Synthesis lowers no objective - there is nothing to measure")


@dataclass(frozen=True, slots=True)
class _Fold:
    """A kept fold and what it was made from."""

    dictionary: Tensor
    step_size: float
    matrix: Tensor

    def holds_for(self, step: ISTA) -> bool:
        now = step.dictionary
        return (
            self.step_size == step.step_size
            and self.dictionary.dtype == now.dtype
            and self.dictionary.device == now.device
            and torch.equal(self.dictionary, now)
        )
