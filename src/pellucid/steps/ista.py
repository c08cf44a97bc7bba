r"""Sparsification: proximal gradient steps on the LASSO, the iterative shrinkage-thresholding algorithm.

.. math:: Z^+ = \mathrm{prox}_{\eta\lambda}\bigl(Z + \eta (X - Z D^\top) D\bigr)

With non-negative codes the proximal operator is a shifted ReLU, and a step looks like a layer of a network.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from pellucid.objectives.reconstruction import lasso
from pellucid.steps.kept import Kept, is_inference
from pellucid.steps.step import Step, full_precision

FEW = 8
"""Tokens are few up to d/8 of them: a kept fold is quicker from d/6 to d/4 on (one core, d = 128 to 1024)."""


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
    sees = "itself"

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
        self._fold = Kept()

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
        square = squared_norm(self.dictionary)
        return 2 / square if square > 0 else float("inf")

    def _gradient_step(self, z: Tensor, x: Tensor) -> Tensor:
        residual = x - z @ self.dictionary.mT
        return torch.add(z, residual @ self.dictionary, alpha=self.step_size)

    def _choose_fold(self, z: Tensor) -> Tensor | None:
        """The matrix C, or None where two products cost less than making it.

        For t tokens of width d a step costs 2td^2 unfolded (6td^2 with its backward pass) and td^2 + d^3
        (3td^2 + 3d^3) with a fresh C, so C pays from t = d on. On a CPU a kept C serves every later call, but
        is read beside D and the D that it was made of: few tokens, such as one of a text that is being
        written, for which reading is all the work, take two products.
        A compiler must not branch on sizes; it gets C, which it can fold as a constant, outside training.
        """
        if torch.compiler.is_compiling():
            return None if self.training else self._make_fold()
        tokens = z.numel() // z.shape[-1]
        if not self.training and is_inference(z, self.dictionary):
            if FEW * tokens < self.dictionary.shape[0]:
                return None
            return self._fold(self._make_kept_fold, (self.dictionary,), (self.step_size,))
        return self._make_fold() if tokens > self.dictionary.shape[0] else None

    def _make_fold(self) -> Tensor:
        """C. Its product, too, runs in autocast's precision: C is rounded to that when it is used."""
        dictionary: Tensor = self.dictionary
        if dictionary.dtype in (torch.float16, torch.bfloat16):
            dictionary = dictionary.float()
        return self.step_size * (dictionary - dictionary.mT @ dictionary)

    def _make_kept_fold(self) -> Tensor:
        """C for callers in any precision, so made in full."""
        with full_precision(self.dictionary):
            return self._make_fold().to(self.dictionary.dtype)


def squared_norm(dictionary: Float[Tensor, "d m"]) -> float:
    """||D||^2, of the exact spectral norm."""
    norm: float = torch.linalg.matrix_norm(dictionary.detach().float(), 2).item()
    return norm**2


class SoftISTA(ISTA):
    r"""One ISTA step on the plain LASSO: codes of either sign, soft threshold. Descends for any start."""

    def shrink(self, v: Float[Tensor, "b n m"]) -> Float[Tensor, "b n m"]:
        return F.softshrink(v, self.step_size * self.sparsity)


class FreeISTA(Step):
    r"""A layer of the original LISTA (Gregor and LeCun 2010): ISTA's step with every matrix free.

    .. math:: Z^+ = h_\theta(X W_e^\top + Z S^\top), \qquad h_\theta(v) = \mathrm{sign}(v)\,(|v| - \theta)_+

    At :math:`W_e = \eta D^\top`, :math:`S = I - \eta D^\top D` and :math:`\theta = \eta\lambda`, where it
    begins, it is :class:`SoftISTA`. Once learnt, nothing ties it to a dictionary, and it states no objective.

    Args:
        dim, num_atoms, step_size, sparsity, enter: see :class:`ISTA`; of a random orthogonal dictionary.
    """

    objective_name = None
    sees = "itself"

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
        m = dim if num_atoms is None else num_atoms
        self.step_size = step_size
        self.encoder = nn.Parameter(torch.empty(m, dim))
        self.lateral = nn.Parameter(torch.empty(m, m))
        self.threshold = nn.Parameter(torch.empty(m))
        self.begin_at(nn.init.orthogonal_(torch.empty(dim, m)), sparsity)

    @torch.no_grad()
    def begin_at(self, dictionary: Float[Tensor, "d m"], sparsity: float) -> None:
        """Become one step of ISTA in this dictionary."""
        self.encoder.copy_(self.step_size * dictionary.mT)
        self.lateral.copy_(-self.step_size * dictionary.mT @ dictionary).diagonal().add_(1)
        self.threshold.fill_(self.step_size * sparsity)

    @property
    def dictionary(self) -> Float[Tensor, "d m"]:
        """What the encoder takes the atoms to be, ``W_e^T / step_size``."""
        return self.encoder.mT / self.step_size

    def forward(self, z: Float[Tensor, "b n m"], x: Tensor | None = None) -> Float[Tensor, "b n m"]:
        v = (z if x is None else x) @ self.encoder.mT + z @ self.lateral.mT
        return v - v.clamp(-self.threshold.abs(), self.threshold.abs())

    def objective(
        self, z: Float[Tensor, "b n m"], start: Float[Tensor, "b n m"], x: Tensor | None = None
    ) -> Float[Tensor, " b"]:
        raise TypeError("FreeISTA states no objective - there is nothing to measure")


class Momentum(nn.Module):
    r"""Nesterov's extrapolation at the door of a step: ISTA that is entered through it is FISTA.

    .. math:: Y_k = Z_k + \frac{t_k - 1}{t_{k+1}} (Z_k - Z_{k-1}), \qquad
        t_{k+1} = \tfrac12\bigl(1 + \sqrt{1 + 4 t_k^2}\bigr)

    (Beck and Teboulle 2009). Each step still lowers its objective from Y, where it begins; the sequence of Z
    need not fall. A token whose last step went against its momentum begins anew with t = 1 (O'Donoghue and
    Candès 2015). The objective's excess falls with the square of the number of steps for
    ``step_size <= 1/||D||^2``, half of what ISTA may take.

    One door for one run of :func:`~pellucid.steps.unroll`: it remembers.

    Attributes:
        memory: the tokens of the last call, what they were extrapolated to, and t; None before the first. A
            run goes on where another stopped by taking over its memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.memory: tuple[Tensor, Tensor, Tensor] | None = None

    def forward(self, z: Float[Tensor, "b n m"]) -> Float[Tensor, "b n m"]:
        if self.memory is None:
            self.memory = z, z, torch.ones_like(z[..., :1])
            return z
        last, entered, t = self.memory
        moved = z - last
        against = torch.linalg.vecdot(entered - z, moved).unsqueeze(-1) > 0
        t_next = (1 + (1 + 4 * t.square()).sqrt()) / 2
        entered = torch.addcmul(z, moved, ((t - 1) / t_next).masked_fill(against, 0))
        self.memory = z, entered, t_next.masked_fill(against, 1)
        return entered


class Synthesis(Step):
    r"""Speak a code in a dictionary, :math:`Z D^\top`: the inverse of a sparsification, not itself a descent.

    Args:
        dim: width of a token, and number of atoms.
        enter: see :class:`~pellucid.steps.step.Step`.
    """

    objective_name = None
    sees = "itself"
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
