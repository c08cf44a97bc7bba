r"""Sparse coding: the fewest atoms that explain a signal, as the LASSO asks for them.

.. math:: \min_z \tfrac12\|x - D z\|^2 + \lambda \|z\|_1

Three ideas, each for what it is good at. *FISTA* runs on all signals at once as products of matrices, and
finds which atoms take part. Once those and their signs are known the LASSO is a quadratic *on a face* of the
l1 ball, and one small linear system finishes exactly. The *duality gap* says when a signal is done, and those
that are done leave the batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from sklearn.base import ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor, nn

from pellucid.analytic.base import Estimator
from pellucid.errors import ConfigError, DataError, suggest
from pellucid.objectives.reconstruction import lasso, lasso_gap
from pellucid.steps.ista import ISTA, Momentum, SoftISTA
from pellucid.steps.step import unroll

METHODS = ("fista", "ista")

BATCH = 256
"""Signals that are coded together on a CPU: as many as keep the arrays in its cache."""

NEAR = 0.003
"""Share of the zero code's objective that the gap must fall below before a face is worth solving on."""

LARGEST_FACE = 96
"""Atoms in the largest linear system that is solved."""


class SparseCodes(NamedTuple):
    """Codes with their certificate.

    Attributes:
        codes: ``(n, m)``.
        gap: duality gap of each signal ``(n,)``, measured in float64; its LASSO is at most that far above its
            minimum.
        iterations: ISTA steps that each signal took ``(n,)``.
    """

    codes: Tensor
    gap: Tensor
    iterations: Tensor


def sparse_code(
    X: Tensor,
    dictionary: Tensor,
    sparsity: float,
    *,
    nonnegative: bool = False,
    method: str = "fista",
    tol: float = 1e-6,
    max_iter: int = 2000,
    start: Tensor | None = None,
    exact: bool = True,
) -> SparseCodes:
    r"""Codes of all signals, each to within ``tol`` of the least LASSO that it can have.

    A signal is done when its duality gap is at most ``tol`` times :math:`\tfrac12\|x\|^2`, what the zero code
    costs; ``tol`` below the resolution of X's dtype is raised to it. Signals still open after ``max_iter``
    steps are returned as they stand.

    Args:
        X: signals ``(n, d)``.
        dictionary: atoms in columns ``(d, m)``.
        sparsity: :math:`\lambda`, the price of one unit of code. Positive.
        nonnegative: codes without negative entries.
        method: ``fista``, or ``ista`` without momentum. The step size is 1 / ||D||^2.
        tol: see above.
        max_iter: steps for each signal.
        start: codes to begin with ``(n, m)``; zero unless given.
        exact: finish on faces. Without it, ISTA or FISTA alone.

    Raises:
        ConfigError: an unknown method, a price or tolerance that is not positive, an empty dictionary.
        DataError: shapes that do not fit, or a dictionary that is not finite.
    """
    solver = _Solver(X, dictionary, sparsity, nonnegative, method, exact)
    allowed = _allowed(X, tol)
    if not tol > 0 or max_iter < 1:
        raise ConfigError(f"tol {tol} and max_iter {max_iter} must be positive")
    codes = torch.zeros(len(X), dictionary.shape[1], dtype=X.dtype, device=X.device)
    if start is not None:
        if start.shape != codes.shape:
            raise DataError(f"start has shape {tuple(start.shape)}; expected {tuple(codes.shape)}")
        codes = start.to(X).clamp_min(0) if nonnegative else start.to(X, copy=True)
    solver.begin(codes)
    gap = torch.full((len(X),), float("inf"), dtype=torch.float64, device=X.device)
    iterations = torch.zeros(len(X), dtype=torch.long, device=X.device)
    batch = BATCH if X.device.type == "cpu" else 64 * BATCH
    if start is not None:
        gap = solver.gap(codes, X)
    open_ = (gap > allowed).nonzero()[:, 0]
    for length in _blocks(max_iter):
        if not len(open_):
            break
        for rows in open_.split(batch):
            codes[rows], gap[rows] = solver.advance(codes[rows], X[rows], rows, length)
            iterations[rows] += length
        open_ = open_[gap[open_] > allowed[open_]]
    return SparseCodes(codes, gap, iterations)


class SparseCoder(ClassNamePrefixFeaturesOutMixin, TransformerMixin, Estimator):
    r"""Sparse codes in a given dictionary, by ISTA or FISTA, certified by their duality gap.

    Args:
        dictionary: atoms in columns ``(d, m)``, array or tensor; None takes the cosine basis (DCT-II) of the
            signals' width.
        sparsity: :math:`\lambda`, the price of one unit of code.
        nonnegative, method, tol, max_iter, exact: see :func:`sparse_code`.

    Attributes:
        dictionary_: atoms as used ``(d, m)``.
        gap_, iterations_: duality gap and number of steps of each signal that it was fitted on.
        n_iter_: the largest of these numbers.

    Raises:
        ValueError: a dictionary that is not finite or does not fit the signals, or options that cannot be.
    """

    dictionary_: Tensor

    def __init__(
        self,
        dictionary: Any = None,
        *,
        sparsity: float = 0.1,
        nonnegative: bool = False,
        method: str = "fista",
        tol: float = 1e-6,
        max_iter: int = 2000,
        exact: bool = True,
    ) -> None:
        self.dictionary = dictionary
        self.sparsity = sparsity
        self.nonnegative = nonnegative
        self.method = method
        self.tol = tol
        self.max_iter = max_iter
        self.exact = exact

    def fit(self, X: Any, y: Any = None) -> SparseCoder:
        """Check the dictionary against the signals' width, and code them for ``gap_`` and ``iterations_``."""
        self._fit_codes(X)
        return self

    def fit_transform(self, X: Any, y: Any = None) -> Any:
        """The codes of the signals it is fitted on."""
        return self._like(self._fit_codes(X).codes, X)

    def transform(self, X: Any, start: Any = None) -> Any:
        """Codes ``(n, m)`` of signals ``(n, d)``; ``start`` are codes to begin with."""
        return self._like(self.encode(X, start).codes, X)

    def encode(self, X: Any, start: Any = None) -> SparseCodes:
        """As :meth:`transform`, with the gap and the number of steps of each signal; tensors."""
        from sklearn.utils.validation import check_is_fitted

        check_is_fitted(self)
        rows = self._rows(X)
        return self._encode(rows, None if start is None else torch.as_tensor(start))

    def inverse_transform(self, X: Any) -> Any:
        """The signals that codes stand for, ``Z D^T``."""
        codes = torch.as_tensor(X)
        return self._like(codes @ self.dictionary_.to(codes).mT, X)

    @property
    def _n_features_out(self) -> int:
        return self.dictionary_.shape[1]

    def _fit_codes(self, X: Any) -> SparseCodes:
        rows = self._rows(X, reset=True)
        width = rows.shape[1]
        given = cosine_basis(width) if self.dictionary is None else torch.as_tensor(self.dictionary)
        self.dictionary_ = given.detach().to(rows)
        result = self._encode(rows, None)
        self.gap_, self.iterations_ = result.gap, result.iterations
        self.n_iter_ = int(result.iterations.max())
        return result

    def _encode(self, rows: Tensor, start: Tensor | None) -> SparseCodes:
        result = sparse_code(
            rows,
            self.dictionary_.to(rows),
            self.sparsity,
            nonnegative=self.nonnegative,
            method=self.method,
            tol=self.tol,
            max_iter=self.max_iter,
            start=start,
            exact=self.exact,
        )
        late = int((result.gap > _allowed(rows, self.tol)).sum())
        if late:
            warnings.warn(
                f"{late} of {len(rows)} signals have not reached the duality gap tol={self.tol:g} in "
                f"{self.max_iter} steps - raise max_iter, or tol",
                ConvergenceWarning,
                stacklevel=4,
            )
        return result


def cosine_basis(width: int) -> Tensor:
    """The orthonormal DCT-II ``(width, width)``: cosine waves in columns, float64."""
    time = torch.arange(width, dtype=torch.float64)[:, None] + 0.5
    waves = torch.cos(torch.pi / width * time * torch.arange(width, dtype=torch.float64))
    return torch.nn.functional.normalize(waves, dim=0)


def _allowed(X: Tensor, tol: float) -> Tensor:
    """The gap at which a signal is done; rounded codes have one themselves."""
    return max(tol, 32 * torch.finfo(X.dtype).eps) * 0.5 * X.double().square().sum(1)


def _blocks(max_iter: int) -> Iterator[int]:
    """Numbers of steps between two looks at the gap: 30, tens up to 100, then half of what has been done."""
    done = 0
    while done < max_iter:
        length = min(30 if not done else 10 if done < 100 else done // 2, max_iter - done)
        yield length
        done += length


class _Solver:
    """Some steps of ISTA or FISTA, then the exact minimum on the face where they arrived."""

    def __init__(
        self, X: Tensor, dictionary: Tensor, sparsity: float, nonnegative: bool, method: str, exact: bool
    ) -> None:
        if method not in METHODS:
            raise ConfigError(f"unknown method '{method}'{suggest(method, METHODS)}")
        if not sparsity > 0:
            raise ConfigError(f"sparsity is {sparsity}; the price of a code must be positive")
        if dictionary.dim() != 2 or dictionary.shape[0] != X.shape[1] or not dictionary.shape[1]:
            raise DataError(
                f"dictionary {tuple(dictionary.shape)} does not fit signals of width {X.shape[1]} - expected "
                f"(d, m), atoms in columns"
            )
        if not bool(dictionary.isfinite().all()):
            raise DataError("the dictionary contains NaN or infinity")
        self.wide = dictionary.double()
        self.gram = self.wide.mT @ self.wide
        self.sparsity, self.nonnegative, self.method, self.exact = sparsity, nonnegative, method, exact
        self.memory: tuple[Tensor, Tensor, Tensor] | None = None
        # float32 finds the face of float64 signals in half the time; the minimum on it is found in float64.
        self.dtypes = (torch.float32, X.dtype) if exact else (X.dtype,)
        self.steps = {dtype: self._step(dictionary.to(dtype)) for dtype in self.dtypes}

    def begin(self, codes: Tensor) -> None:
        """Without momentum at these codes."""
        z = codes.to(self.dtypes[0])
        at_rest = z.clone(), z.clone(), torch.ones_like(z[:, :1])
        self.memory = at_rest if self.method == "fista" else None

    def _step(self, dictionary: Tensor) -> ISTA:
        step = (ISTA if self.nonnegative else SoftISTA)(*dictionary.shape, sparsity=self.sparsity)
        step.dictionary = nn.Parameter(dictionary, requires_grad=False)
        step.step_size = min(0.5 * step.max_step_size(), 1e30)  # 1 / ||D||^2; a dictionary of zeros has none
        return step

    def advance(self, z: Tensor, x: Tensor, rows: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Codes of these rows after ``length`` steps and what their face adds, with their gaps in float64.

        The gap is infinite where it was not worth measuring.
        """
        # Long blocks come to those few that a face did not finish, and get the signals' own precision.
        dtype = self.dtypes[0] if length < 50 else self.dtypes[-1]
        step, door = self.steps[dtype], Momentum()
        step.enter = door if self.method == "fista" else nn.Identity()
        door.memory = self._recall(rows, dtype)
        with torch.no_grad():
            near = unroll([step] * length, z[None].to(dtype), x[None].to(dtype))[0]
            self._remember(door.memory, rows)
            z = near.to(z.dtype)
            if not self.exact:
                return z, self.gap(z, x)
            energy = 0.5 * x.to(dtype).square().sum(1)
            gap = lasso_gap(near, x.to(dtype), step.dictionary, self.sparsity, nonnegative=self.nonnegative)
            ready = (near != 0).sum(1) <= min(LARGEST_FACE, x.shape[1])
            ready &= gap <= NEAR * energy
            gap = self.gap(z, x) if length >= 50 else torch.full_like(gap, float("inf")).double()
            ready = ready.nonzero()[:, 0]
            if len(ready):
                there = x[ready]
                finished = self._on_faces(near[ready].double(), there.double()).to(z.dtype)
                better = self._value(finished, there) <= self._value(z[ready], there)
                ready, finished, there = ready[better], finished[better], there[better]
                z[ready], gap[ready] = finished, self.gap(finished, there)
                arrived = finished.to(self.dtypes[0])
                self._remember((arrived, arrived, torch.ones_like(arrived[:, :1])), rows[ready])
            return z, gap

    def _recall(self, rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor] | None:
        if self.memory is None:
            return None
        last, entered, t = (part[None, rows].to(dtype) for part in self.memory)
        return last, entered, t

    def _remember(self, memory: tuple[Tensor, Tensor, Tensor] | None, rows: Tensor) -> None:
        """Momentum is kept row by row, since which rows are still open changes from block to block."""
        if self.memory is not None and memory is not None:
            for kept, part in zip(self.memory, memory, strict=True):
                kept[rows] = part.reshape(len(rows), kept.shape[1]).to(kept.dtype)

    def gap(self, z: Tensor, x: Tensor) -> Tensor:
        return lasso_gap(z.double(), x.double(), self.wide, self.sparsity, nonnegative=self.nonnegative)

    def _value(self, z: Tensor, x: Tensor) -> Tensor:
        return lasso(z[:, None], x[:, None], self.wide.to(z.dtype), self.sparsity)

    def _on_faces(self, z: Tensor, x: Tensor) -> Tensor:
        r"""Least LASSO with the atoms and the signs of z: :math:`G_{SS} z_S = D_S^\top x - \lambda s_S`.

        Entries that come out with another sign are set to zero; where the system is singular z stays.
        """
        active, signs = z != 0, z.sign()
        target = x @ self.wide - self.sparsity * signs
        size = active.sum(1)
        result = z.clone()
        # Systems of like size together: all are padded to the largest.
        for rows in size.argsort().split(64):
            k = int(size[rows].max())
            if not k:
                continue
            i, j = active[rows].nonzero(as_tuple=True)
            place = torch.arange(len(i), device=z.device) - (size[rows].cumsum(0) - size[rows])[i]
            atoms = torch.zeros(len(rows), k, dtype=torch.long, device=z.device)
            atoms[i, place] = j
            real = (torch.arange(k, device=z.device) < size[rows, None]).to(z.dtype)
            flat = (atoms[:, :, None] * len(self.gram) + atoms[:, None, :]).flatten()
            system = self.gram.flatten().index_select(0, flat).unflatten(0, (len(rows), k, k))
            system = system * real[:, :, None] * real[:, None, :]
            system.diagonal(dim1=1, dim2=2).add_(1 - real)
            right = torch.zeros(len(rows), k, dtype=z.dtype, device=z.device)
            right[i, place] = target[rows[i], j]
            factor, info = torch.linalg.cholesky_ex(system)
            solved = torch.cholesky_solve(right[:, :, None], factor)[:, :, 0][i, place]
            kept = torch.where(solved * signs[rows[i], j] > 0, solved, 0.0)
            result[rows[i], j] = torch.where(info[i] == 0, kept, z[rows[i], j])
        return result
