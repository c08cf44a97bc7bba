r"""Sparse coding: the fewest atoms that explain a signal, as the LASSO asks for them.

.. math:: \min_z \tfrac12\|x - D z\|^2 + \lambda \|z\|_1

Three ideas, each for what it is good at. *Sweeps* over blocks of atoms run on all signals at once, as
products of matrices, and find which atoms take part. Once those and their signs are known the LASSO is a
quadratic *on a face* of the l1 ball, and one small linear system finishes exactly. The *duality gap* says
when a signal is done, and those that are done leave the batch.
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

METHODS = ("blocks", "fista", "ista")

BATCH = 256
"""Signals whose gap is measured together on a CPU: as many as keep the arrays in its cache."""

TOGETHER = {"blocks": 2048, "fista": 256, "ista": 256}
"""Signals that are stepped together on a CPU: few keep to its cache, and sweeps take more calls."""

BLOCK = 16
"""Atoms that a sweep moves at once."""

REACH = 1.4
"""Step size of a block in units of 1 / ||D_b||^2; below 2 each step descends."""

MOMENTUM = 0.6
"""Share of the last sweep's move that is made once more before the next."""

LONG = 20
"""Steps between two looks from which on they are taken in the signals' own precision."""

NEAR = 0.003
"""Share of the zero code's objective that the gap must fall below before a face is worth solving on."""

SETTLED = 2
"""Atoms that may still have changed sign in the last two sweeps where a face is worth solving on."""

LARGEST_FACE = 96
"""Atoms in the largest linear system that is solved."""

SYSTEMS = 128
"""Systems of like size that are padded to the largest and solved together on a CPU."""


class SparseCodes(NamedTuple):
    """Codes with their certificate.

    Attributes:
        codes: ``(n, m)``.
        gap: duality gap of each signal ``(n,)``, measured in float64; its LASSO is at most that far above its
            minimum.
        iterations: steps or sweeps that each signal took ``(n,)``.
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
    method: str = "blocks",
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
        method: ``blocks`` sweeps over blocks of atoms, each with its own step size; ``fista``
            takes steps of all atoms, of size 1 / ||D||^2, with momentum; ``ista`` without.
        tol: see above.
        max_iter: steps or sweeps for each signal.
        start: codes to begin with ``(n, m)``; zero unless given.
        exact: finish on faces. Without it, the method alone.

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
    if start is not None:
        gap = solver.gap(codes, X)
    open_ = (~(gap <= allowed)).nonzero()[:, 0]
    for length in solver.walk.lengths(max_iter):
        if not len(open_):
            break
        for rows in open_.split(solver.together):
            codes[rows], gap[rows] = solver.advance(codes[rows], X[rows], rows, length)
            iterations[rows] += length
        open_ = open_[~(gap[open_] <= allowed[open_])]
    return SparseCodes(codes, gap, iterations)


class SparseCoder(ClassNamePrefixFeaturesOutMixin, TransformerMixin, Estimator):
    r"""Sparse codes in a given dictionary, certified by their duality gap.

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
        method: str = "blocks",
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


def _lengths(max_iter: int, first: int, then: int, until: int) -> Iterator[int]:
    """Numbers of steps between two looks: the first, some like the next, then half of all before."""
    done = 0
    while done < max_iter:
        length = min(first if not done else then if done < until else done // 2, max_iter - done)
        yield length
        done += length


class _Steps:
    """ISTA or FISTA: steps of all atoms at once.

    This and :class:`_Sweeps` are two ways to walk. ``advance`` goes on from the codes ``(n, m)`` of the
    signals ``rows`` and says where a face is worth solving on; ``rest`` puts signals somewhere, without
    momentum.
    """

    def __init__(
        self,
        dictionary: Tensor,
        sparsity: float,
        nonnegative: bool,
        dtypes: tuple[torch.dtype, ...],
        momentum: bool,
    ) -> None:
        self.sparsity, self.nonnegative, self.momentum = sparsity, nonnegative, momentum
        self.steps = {dtype: self._step(dictionary.to(dtype)) for dtype in dtypes}
        self.memory: tuple[Tensor, Tensor, Tensor] | None = None

    def _step(self, dictionary: Tensor) -> ISTA:
        step = (ISTA if self.nonnegative else SoftISTA)(*dictionary.shape, sparsity=self.sparsity)
        step.dictionary = nn.Parameter(dictionary, requires_grad=False)
        step.step_size = min(0.5 * step.max_step_size(), 1e30)  # 1 / ||D||^2; a dictionary of zeros has none
        return step

    @staticmethod
    def lengths(max_iter: int) -> Iterator[int]:
        return _lengths(max_iter, 30, 10, 100)

    def begin(self, z: Tensor) -> None:
        self.memory = (z.clone(), z.clone(), torch.ones_like(z[:, :1])) if self.momentum else None

    def rest(self, rows: Tensor, z: Tensor) -> None:
        self._remember((z, z, torch.ones_like(z[:, :1])), rows)

    def advance(self, z: Tensor, x: Tensor, rows: Tensor, length: int) -> tuple[Tensor, Tensor]:
        step, door = self.steps[z.dtype], Momentum()
        step.enter = door if self.momentum else nn.Identity()
        door.memory = self._recall(rows, z.dtype)
        z = unroll([step] * length, z[None], x[None])[0]
        self._remember(door.memory, rows)
        gap = lasso_gap(z, x, step.dictionary, self.sparsity, nonnegative=self.nonnegative)
        return z, gap <= NEAR * 0.5 * x.square().sum(1)

    def _recall(self, rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor] | None:
        if self.memory is None:
            return None
        last, entered, t = (part[None, rows].to(dtype) for part in self.memory)
        return last, entered, t

    def _remember(self, memory: tuple[Tensor, Tensor, Tensor] | None, rows: Tensor) -> None:
        """Momentum is kept row by row, since which rows are still open changes from look to look."""
        if self.memory is not None and memory is not None:
            for kept, part in zip(self.memory, memory, strict=True):
                kept[rows] = part.reshape(len(rows), kept.shape[1]).to(kept.dtype)


class _Sweeps:
    r"""Proximal gradient steps on one block of atoms after another, with momentum from sweep to sweep.

    .. math:: z_b \leftarrow S_{\eta_b\lambda}\bigl(z_b + \eta_b D_b^\top r\bigr), \qquad
        r \leftarrow r + D_b (z_b^{\rm old} - z_b)

    A block's curvature :math:`\|D_b\|^2` is far below that of all atoms, and the next block already sees what
    this one changed: a sweep costs no more than a step of ISTA and goes several times as far.
    """

    def __init__(
        self, dictionary: Tensor, sparsity: float, nonnegative: bool, dtypes: tuple[torch.dtype, ...]
    ) -> None:
        self.sparsity, self.nonnegative = sparsity, nonnegative
        m = dictionary.shape[1]
        count = -(-m // BLOCK)
        # Atoms side by side are often alike, so each block takes every count-th.
        blocks = [torch.arange(i, m, count, device=dictionary.device) for i in range(count)]
        self.order = torch.cat(blocks)
        self.place = self.order.argsort()
        self.sizes = [len(block) for block in blocks]
        self.etas = [
            REACH / max(float(torch.linalg.matrix_norm(dictionary[:, block].double(), 2)) ** 2, 1e-30)
            for block in blocks
        ]
        self.parts = {dtype: self._parts(dictionary.to(dtype)) for dtype in dtypes}
        self.before = torch.zeros(0)

    def _parts(self, dictionary: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The atoms in their new order, and for each block ``eta D_b^T`` and ``D_b``."""
        atoms = dictionary[:, self.order]
        blocks = atoms.split(self.sizes, 1)
        ups = [(eta * block.mT).contiguous() for eta, block in zip(self.etas, blocks, strict=True)]
        return atoms, ups, [block.contiguous() for block in blocks]

    @staticmethod
    def lengths(max_iter: int) -> Iterator[int]:
        return _lengths(max_iter, 8, 4, 60)

    def begin(self, z: Tensor) -> None:
        self.before = z.clone()

    def rest(self, rows: Tensor, z: Tensor) -> None:
        self.before[rows] = z

    def advance(self, z: Tensor, x: Tensor, rows: Tensor, length: int) -> tuple[Tensor, Tensor]:
        atoms, ups, downs = self.parts[z.dtype]
        if bool(z.any()):
            z, last = (self._columns(codes) for codes in (z, self.before[rows].to(z.dtype)))
            r, r_last = (torch.addmm(x.mT, atoms, codes, alpha=-1) for codes in (z, last))
            price = self.sparsity
        else:
            # From zero the price falls to its own by halves: few atoms enter that have to leave again.
            z, last = (torch.zeros_like(z.mT, memory_format=torch.contiguous_format) for _ in range(2))
            r, r_last = (x.mT.clone(memory_format=torch.contiguous_format) for _ in range(2))
            price = float(torch.linalg.vector_norm(atoms.mT @ r, torch.inf, 0).mean())
        seen, value = z, self._value(z, r, price)
        for i in range(length):
            price = max(0.5 * price, self.sparsity)
            last, z = z, torch.lerp(last, z, 1 + MOMENTUM, out=last)
            r_last, r = r, torch.lerp(r_last, r, 1 + MOMENTUM, out=r_last)
            for part, eta, up, down in zip(z.split(self.sizes), self.etas, ups, downs, strict=True):
                new = self._shrink(torch.addmm(part, up, r), eta * price)
                r.addmm_(down, part - new)
                part.copy_(new)
            before, value = value, self._value(z, r, price)
            rose = value > before * (1 + 8 * torch.finfo(z.dtype).eps)  # by more than rounding
            if bool(rose.any()):
                # Only momentum can raise it. Back to where it began, and at rest: from there the next cannot.
                value = torch.where(rose, before, value)
                z[:, rose], r[:, rose] = last[:, rose], r_last[:, rose]
            if i == max(length - 3, 0):
                seen = z.sign()
        changed = (z.sign() != seen).sum(0)
        self.before[rows] = self._rows(last).to(self.before.dtype)
        return self._rows(z), changed <= SETTLED

    def _value(self, z: Tensor, r: Tensor, price: float) -> Tensor:
        """The LASSO, infinite while its price still falls."""
        if price > self.sparsity:
            return torch.full_like(z[0], float("inf"))
        norm = torch.linalg.vector_norm
        return 0.5 * norm(r, 2, 0).square() + self.sparsity * norm(z, 1, 0)

    def _shrink(self, z: Tensor, by: float) -> Tensor:
        return (z - by).clamp_min_(0) if self.nonnegative else nn.functional.softshrink(z, by)

    def _columns(self, z: Tensor) -> Tensor:
        return z.mT.index_select(0, self.order)

    def _rows(self, z: Tensor) -> Tensor:
        return z.mT.index_select(1, self.place)


class _Solver:
    """Some steps or sweeps, then the exact minimum on the face where they arrived."""

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
        self.sparsity, self.nonnegative, self.exact = sparsity, nonnegative, exact
        # float32 finds the face of float64 signals in half the time; the minimum on it is found in float64.
        self.dtypes = (torch.float32, X.dtype) if exact else (X.dtype,)
        self.walk: _Steps | _Sweeps = (
            _Sweeps(dictionary, sparsity, nonnegative, self.dtypes)
            if method == "blocks"
            else _Steps(dictionary, sparsity, nonnegative, self.dtypes, momentum=method == "fista")
        )
        # Systems smaller than the largest of their like are filled up from the identity behind the Gram.
        self.largest = min(LARGEST_FACE, *dictionary.shape)
        self.gram = torch.block_diag(self.wide.mT @ self.wide, torch.eye(self.largest).to(self.wide))
        on_cpu = X.device.type == "cpu"
        self.together = TOGETHER[method] if on_cpu else 64 * 256
        self.measured, self.systems = (BATCH, SYSTEMS) if on_cpu else (64 * 256, 64 * SYSTEMS)

    def begin(self, codes: Tensor) -> None:
        """Without momentum at these codes."""
        self.walk.begin(codes.to(self.dtypes[0]))

    def advance(self, z: Tensor, x: Tensor, rows: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Codes of these rows after ``length`` steps and what their face adds, with their gaps in float64.

        The gap is infinite where it was not worth measuring.
        """
        # Long walks come to those few that a face did not finish, and get the signals' own precision.
        dtype = self.dtypes[0] if length < LONG else self.dtypes[-1]
        with torch.no_grad():
            near, ready = self.walk.advance(z.to(dtype), x.to(dtype), rows, length)
            z = near.to(z.dtype)
            if not self.exact:
                return z, self.gap(z, x)
            gap = self.gap(z, x) if length >= LONG else torch.full((len(x),), float("inf")).to(self.wide)
            chosen = (ready & ((near != 0).sum(1) <= self.largest)).nonzero()[:, 0]
            if len(chosen):
                finished, arrived = self._finish(near[chosen], x[chosen])
                chosen, finished = chosen[arrived], finished[arrived].to(z.dtype)
                z[chosen], gap[chosen] = finished, self.gap(finished, x[chosen])
                self.walk.rest(rows[chosen], finished.to(self.dtypes[0]))
            return z, gap

    def gap(self, z: Tensor, x: Tensor) -> Tensor:
        parts = zip(z.split(self.measured), x.split(self.measured), strict=True)
        return torch.cat(
            [
                lasso_gap(a.double(), b.double(), self.wide, self.sparsity, nonnegative=self.nonnegative)
                for a, b in parts
            ]
        )

    def _finish(self, z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Minima on the faces of z, or on what is left of them where signs change, and which of them hold."""
        target = x.double() @ self.wide
        result, solved, whole = self._on_faces(z, target)
        again = (solved & ~whole).nonzero()[:, 0]
        if len(again):
            second, _, whole_now = self._on_faces(result[again], target[again])
            # The first minimum lies below z because its face holds z; this one need not.
            value = self._value(torch.stack([second, z[again].double()]), x[again].double())
            result[again], whole[again] = second, whole_now & (value[0] <= value[1])
        return result, whole

    def _value(self, z: Tensor, x: Tensor) -> Tensor:
        return lasso(z[..., None, :], x.expand(*z.shape[:-1], -1)[..., None, :], self.wide, self.sparsity)

    def _on_faces(self, z: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""Least LASSO with the atoms and the signs of z: :math:`G_{SS} z_S = (D^\top x)_S - \lambda s_S`.

        Entries that come out with another sign are set to zero.

        Returns:
            The codes, where there was one solution, and where no sign has changed.
        """
        n, m = z.shape
        size, order = (z != 0).sum(1).sort()
        rank, atom = (z != 0)[order].nonzero(as_tuple=True)
        widest = int(size[-1]) if n else 0
        place = rank * widest + torch.arange(len(rank), device=z.device) - (size.cumsum(0) - size)[rank]
        entry = order[rank] * m + atom
        signs = z.flatten()[entry].sign().double()
        # What a system lacks to the largest of its like it gets from the identity behind the Gram matrix.
        places = torch.int32 if self.gram.numel() < 2**31 else torch.int64
        atoms = torch.arange(m, m + widest, dtype=places, device=z.device).repeat(n, 1)
        atoms.view(-1)[place] = atom.to(places)
        right = torch.zeros(n, widest, dtype=torch.float64, device=z.device)
        right.view(-1)[place] = target.flatten()[entry] - self.sparsity * signs
        found, solved = torch.zeros_like(right), torch.ones_like(size, dtype=torch.bool)
        for some in torch.arange(n, device=z.device).split(self.systems):
            a, b = int(some[0]), int(some[-1]) + 1
            k = int(size[b - 1])
            if k:
                index = atoms[a:b, :k]
                system = self.gram.view(-1).index_select(
                    0, (index[:, :, None] * len(self.gram) + index[:, None, :]).flatten()
                )
                factor, info = torch.linalg.cholesky_ex(system.view(b - a, k, k))
                found[a:b, :k] = torch.cholesky_solve(right[a:b, :k, None], factor)[:, :, 0]
                solved[a:b] = info == 0
        value = found.view(-1)[place]
        other = value * signs <= 0
        changed = torch.zeros(n, dtype=torch.long, device=z.device).index_add_(0, rank, other.long())
        result = torch.zeros(n, m, dtype=torch.float64, device=z.device)
        result.view(-1)[entry] = value.masked_fill(other, 0)
        back = order.argsort()
        return result, solved[back], (solved & (changed == 0))[back]
