r"""Dictionary learning: find the atoms in which samples are sparse.

A *complete* dictionary has as many atoms as the samples have dimensions. After whitening it is a rotation,
and the rotation that makes the coordinates spikiest is found by a power iteration without a step size. An
*overcomplete* one has more, and takes two turns again and again: codes for the atoms, atoms for the codes.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from jaxtyping import Float
from sklearn.base import ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from pellucid.analytic.base import Estimator
from pellucid.analytic.sparse_coding import sparse_code
from pellucid.errors import ConfigError, DataError
from pellucid.objectives.reconstruction import lasso
from pellucid.steps.power import MSP
from pellucid.steps.step import OnStep, unroll

BLOCK = 10
"""Steps of MSP between two looks at how far the atoms still move."""


CODE_STEPS = 100
"""Steps for the codes within one turn; those that need more go on in the next."""


class CompleteDictionary(ClassNamePrefixFeaturesOutMixin, TransformerMixin, Estimator):
    r"""As many atoms as dimensions, by l4 maximisation over rotations (Zhai et al. 2020).

    Samples ``x = D z`` with independent sparse z become, whitened, a rotation of z, and
    :class:`~pellucid.steps.MSP` turns it back. Atoms are known up to their order, and up to sign and scale.
    Samples that lie in fewer dimensions get a dictionary of that many atoms. Nothing is centred.

    Args:
        max_iter: steps of MSP.
        tol: it stops when one step moves the rotation by no more, in the Frobenius norm (or than the
            dtype can tell).
        random_state: for the rotation it starts at.

    Attributes:
        dictionary_: atoms in columns ``(d, r)``, scaled so that their codes have mean square 1, and signed so
            that their entry of largest modulus is positive.
        analysis_: ``(d, r)``; ``X analysis_`` are the codes, and ``analysis_.T dictionary_`` the identity.
        n_iter_: steps taken.

    Raises:
        ValueError: fewer than two samples, or nothing but zeros.
    """

    dictionary_: Tensor
    analysis_: Tensor

    def __init__(self, *, max_iter: int = 1000, tol: float = 1e-6, random_state: Any = None) -> None:
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None, *, on_step: OnStep | None = None) -> CompleteDictionary:
        """Learn the atoms; ``on_step`` sees every step of MSP, as in ``unroll``."""
        rows = self._rows(X, reset=True, min_samples=2)
        moment = rows.mT @ rows / len(rows)
        values, directions = torch.linalg.eigh(moment)
        there = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
        if not bool(values[-1] > 0):
            raise DataError("the samples are all zero - there is nothing to learn from")
        scale, span = values[there].sqrt(), directions[:, there]
        step = MSP(rows @ span / scale).requires_grad_(False)
        r = len(scale)
        start = torch.randn(r, r, generator=self._generator(), dtype=torch.float64)
        A = torch.linalg.qr(start)[0].to(rows)[None]
        tol = max(self.tol, 8 * r * torch.finfo(rows.dtype).eps)
        self.n_iter_, moved = 0, math.inf
        while moved > tol and self.n_iter_ < self.max_iter:
            length = min(BLOCK, self.max_iter - self.n_iter_)
            before = unroll([step] * (length - 1), A, on_step=on_step)
            A = unroll([step], before, on_step=on_step)
            moved = float((A - before).norm())
            self.n_iter_ += length
        if moved > tol:
            warnings.warn(
                f"the atoms still move by {moved:.1e} at step {self.max_iter} - raise max_iter, or give more "
                f"samples",
                ConvergenceWarning,
                stacklevel=2,
            )
        atoms = (span * scale) @ A[0].mT
        signs = atoms.gather(0, atoms.abs().argmax(0, keepdim=True)).sign()
        self.dictionary_ = atoms * signs
        self.analysis_ = (span / scale) @ A[0].mT * signs
        return self

    def transform(self, X: Any) -> Any:
        """Codes ``(n, r)`` of samples ``(n, d)``: one product, since the dictionary is complete."""
        check_is_fitted(self)
        rows = self._rows(X)
        return self._like(rows @ self.analysis_.to(rows), X)

    def inverse_transform(self, X: Any) -> Any:
        """Samples ``(n, d)`` of codes ``(n, r)``."""
        check_is_fitted(self)
        codes = torch.as_tensor(X)
        return self._like(codes @ self.dictionary_.to(codes).mT, X)

    @property
    def _n_features_out(self) -> int:
        return self.dictionary_.shape[1]


class OvercompleteDictionary(ClassNamePrefixFeaturesOutMixin, TransformerMixin, Estimator):
    r"""More atoms than dimensions, by turns: codes that are optimal for the atoms, atoms for the codes.

    .. math:: \min_{\|d_j\| \le 1,\, Z} \tfrac12\|X - Z D^\top\|_F^2 + \lambda\|Z\|_1

    Codes come from :func:`~pellucid.analytic.sparse_coding.sparse_code`, warm-started. Atoms are then set one
    after another to their exact optimum in the unit ball (Mairal et al. 2009). Neither turn raises the
    objective. An atom that no sample uses becomes the sample that is explained worst, which costs nothing.

    Args:
        n_atoms: m; twice the width unless given.
        sparsity: :math:`\lambda`.
        nonnegative: codes without negative entries.
        max_iter: turns.
        tol: it stops when a turn lowers the objective by a smaller share.
        random_state: for the samples that are the first atoms.

    Attributes:
        dictionary_: atoms in columns ``(d, m)``, none longer than 1.
        objective_: after each turn, per sample.
        n_iter_: turns taken.

    Raises:
        ValueError: fewer than two samples, nothing but zeros, or options that cannot be.
    """

    dictionary_: Tensor

    def __init__(
        self,
        n_atoms: int | None = None,
        *,
        sparsity: float = 0.1,
        nonnegative: bool = False,
        max_iter: int = 100,
        tol: float = 1e-4,
        random_state: Any = None,
    ) -> None:
        self.n_atoms = n_atoms
        self.sparsity = sparsity
        self.nonnegative = nonnegative
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> OvercompleteDictionary:
        """Learn the atoms."""
        rows = self._rows(X, reset=True, min_samples=2)
        m = 2 * rows.shape[1] if self.n_atoms is None else self.n_atoms
        if m < 1 or self.max_iter < 1:
            raise ConfigError(f"n_atoms {m} and max_iter {self.max_iter} must be 1 or larger")
        self.dictionary_ = self._first_atoms(rows, m)
        codes, self.objective_, self.n_iter_ = None, [], 0
        for _ in range(self.max_iter):
            codes = self._codes(rows, codes)
            self.dictionary_ = update_atoms(self.dictionary_, rows, codes)
            self.objective_.append(float(lasso(codes, rows, self.dictionary_, self.sparsity)) / len(rows))
            self.n_iter_ += 1
            if (
                self.n_iter_ > 1
                and self.objective_[-2] - self.objective_[-1] <= self.tol * self.objective_[-2]
            ):
                return self
        warnings.warn(
            f"the objective still falls by more than tol={self.tol:g} after {self.max_iter} turns - raise "
            f"max_iter, or tol",
            ConvergenceWarning,
            stacklevel=2,
        )
        return self

    def transform(self, X: Any) -> Any:
        """Codes ``(n, m)`` of samples ``(n, d)``."""
        check_is_fitted(self)
        return self._like(self._codes(self._rows(X), None), X)

    def inverse_transform(self, X: Any) -> Any:
        """Samples ``(n, d)`` of codes ``(n, m)``."""
        check_is_fitted(self)
        codes = torch.as_tensor(X)
        return self._like(codes @ self.dictionary_.to(codes).mT, X)

    @property
    def _n_features_out(self) -> int:
        return self.dictionary_.shape[1]

    def _codes(self, rows: Tensor, start: Tensor | None) -> Tensor:
        atoms = self.dictionary_.to(rows)
        return sparse_code(
            rows, atoms, self.sparsity, nonnegative=self.nonnegative, start=start, max_iter=CODE_STEPS
        ).codes

    def _first_atoms(self, rows: Tensor, m: int) -> Tensor:
        """Samples drawn at random, at length 1, with a little noise where there are fewer than atoms."""
        generator = self._generator()
        usable = (rows.norm(dim=1) > 0).nonzero()[:, 0]
        if not len(usable):
            raise DataError("the samples are all zero - there is nothing to learn from")
        order = torch.randperm(len(usable), generator=generator).to(rows.device)
        drawn = torch.nn.functional.normalize(rows[usable[order[torch.arange(m) % len(usable)]]], dim=1)
        noise = torch.randn(m, rows.shape[1], generator=generator, dtype=torch.float64).to(rows)
        noise = noise / rows.shape[1] ** 0.5 * (torch.arange(m) >= len(usable)).to(rows)[:, None]
        return torch.nn.functional.normalize(drawn + noise, dim=1).mT.contiguous()


def update_atoms(
    dictionary: Float[Tensor, "d m"], samples: Float[Tensor, "N d"], codes: Float[Tensor, "N m"]
) -> Float[Tensor, "d m"]:
    r"""Each atom in turn at the optimum of :math:`\tfrac12\|X - Z D^\top\|_F^2` in the unit ball.

    .. math:: d_j \leftarrow \Pi_{\|\cdot\| \le 1}\Bigl(d_j + \frac{(X - Z D^\top)^\top z_j}{\|z_j\|^2}\Bigr)

    An atom without use becomes the direction of the sample that the others explain worst, one sample each.
    """
    D = dictionary.clone()
    gram, target = codes.mT @ codes, samples.mT @ codes
    used = gram.diagonal() > 0
    for j in used.nonzero()[:, 0].tolist():
        atom = D[:, j] + (target[:, j] - D @ gram[:, j]) / gram[j, j]
        D[:, j] = atom / atom.norm().clamp_min(1)
    unused = (~used).nonzero()[:, 0]
    if len(unused):
        residual = (samples - codes @ D.mT).norm(dim=1) * (samples.norm(dim=1) > 0)
        worst = residual.topk(min(len(unused), len(samples))).indices
        worst = worst[residual[worst] > 0]
        D[:, unused[: len(worst)]] = torch.nn.functional.normalize(samples[worst], dim=1).mT
    return D


def matched_cosines(learnt: Float[Tensor, "d m"], planted: Float[Tensor, "d k"]) -> Float[Tensor, " k"]:
    """Modulus of the cosine between each planted atom and the learnt one that stands for it.

    No learnt atom stands for two; the assignment is the best one in all. Ones if and only if the planted
    atoms came back, up to order, sign and scale. Planted atoms beyond the number of learnt ones get 0.
    """
    from scipy.optimize import linear_sum_assignment

    cosines = torch.nn.functional.normalize(planted, dim=0).mT @ torch.nn.functional.normalize(learnt, dim=0)
    cosines = cosines.abs()
    i, j = (torch.from_numpy(side) for side in linear_sum_assignment(cosines.cpu().numpy(), maximize=True))
    result = torch.zeros_like(cosines[:, 0])
    result[i.to(result.device)] = cosines[i, j]
    return result
