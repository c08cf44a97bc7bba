"""How fast signals are coded: ours beside scikit-learn's coordinate descent, to one duality gap, in turns.

scikit-learn's ``SparseCoder(transform_algorithm="lasso_cd")`` solves one signal after another, to a tolerance
that it does not let one choose. So it goes first, the largest duality gap that it left is measured, and ours
has to leave none that is larger. Both are handed the same signals, planted in a random dictionary with a
little noise, and both run on as many threads as torch is given.

In float32 scikit-learn asks for a gap that float32 cannot resolve, and iterates on: that ratio says what
happens to whoever passes float32, not how good coordinate descent can be.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pellucid.analytic.sparse_coding import sparse_code
from pellucid.errors import ConfigError, NumericsError, suggest
from pellucid.objectives.reconstruction import lasso_gap

DTYPES = {"float64": torch.float64, "float32": torch.float32}


def bench_sparse_coding(
    num_signals: int = 10_000,
    num_atoms: int = 256,
    dim: int = 64,
    *,
    sparsities: Sequence[float] = (0.05, 0.1, 0.3),
    dtypes: Sequence[str] = ("float64", "float32"),
    rounds: int = 3,
    seed: int = 0,
    progress: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Time both on planted signals, for each price and dtype.

    Args:
        num_signals, num_atoms, dim: sizes.
        sparsities: prices of a unit of code; the planted entries are standard normal.
        dtypes: of signals and dictionary.
        rounds: turns.
        seed: of the signals.
        progress: gets a line for each case.

    Returns:
        For each case ``dtype``, ``sparsity``, ``nonzeros`` (mean number in our codes), ``gap`` and
        ``scikit_learn_gap`` (largest over the signals, relative to half their energy), ``ours_us`` and
        ``scikit_learn_us`` (microseconds for a signal, medians) and ``vs_scikit_learn``: how many times
        faster ours is, ``[median, smallest, largest]`` of the rounds' ratios.

    Raises:
        ConfigError: an unknown dtype, or fewer than one round.
        NumericsError: ours left a larger gap.
    """
    if rounds < 1:
        raise ConfigError(f"rounds {rounds} must be 1 or larger")
    for name in dtypes:
        if name not in DTYPES:
            raise ConfigError(f"unknown '{name}'{suggest(name, DTYPES)}")
    rows = []
    for name in dtypes:
        X, D = (tensor.to(DTYPES[name]) for tensor in planted_signals(num_signals, num_atoms, dim, seed))
        for sparsity in sparsities:
            ours_s, theirs_s, theirs_gap = [], [], 0.0
            codes = torch.zeros(0)
            for _ in range(rounds):
                codes, seconds = _timed(partial(by_scikit_learn, X, D, sparsity))
                theirs_s.append(seconds)
                theirs_gap = _largest_gap(codes, X, D, sparsity)
                codes, seconds = _timed(partial(_ours, X, D, sparsity, theirs_gap))
                ours_s.append(seconds)
            gap = _largest_gap(codes, X, D, sparsity)
            if gap > 1.01 * theirs_gap:
                raise NumericsError(
                    f"ours left a gap of {gap:.1e} and scikit-learn of {theirs_gap:.1e} in {name} at "
                    f"{sparsity} - their times would not compare"
                )
            ratios = [theirs / own for own, theirs in zip(ours_s, theirs_s, strict=True)]
            rows.append(
                {
                    "dtype": name,
                    "sparsity": sparsity,
                    "nonzeros": (codes != 0).sum(1).double().mean().item(),
                    "gap": gap,
                    "scikit_learn_gap": theirs_gap,
                    "ours_us": 1e6 * median(ours_s) / num_signals,
                    "scikit_learn_us": 1e6 * median(theirs_s) / num_signals,
                    "vs_scikit_learn": [median(ratios), min(ratios), max(ratios)],
                }
            )
            progress(
                f"sparse coding, {name}, price {sparsity}: {median(ratios):.1f} times scikit-learn's speed "
                f"at a gap of {theirs_gap:.0e}"
            )
    return rows


def planted_signals(num_signals: int, num_atoms: int, dim: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Signals ``(n, d)`` of about one atom in 25, and the dictionary ``(d, m)``; float64."""
    rng = torch.Generator().manual_seed(seed)
    D = F.normalize(torch.randn(dim, num_atoms, generator=rng, dtype=torch.float64), dim=0)
    active = torch.rand(num_signals, num_atoms, generator=rng) < 0.04
    codes = active * torch.randn(num_signals, num_atoms, generator=rng, dtype=torch.float64)
    return codes @ D.mT + 0.02 * torch.randn(num_signals, dim, generator=rng, dtype=torch.float64), D


def by_scikit_learn(X: Tensor, dictionary: Tensor, sparsity: float) -> Tensor:
    """Codes by coordinate descent, ``(n, m)``."""
    from sklearn.decomposition import SparseCoder

    coder = SparseCoder(
        dictionary.mT.contiguous().numpy(), transform_algorithm="lasso_cd", transform_alpha=sparsity
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the gap that it left is measured
        return torch.from_numpy(coder.transform(X.numpy()))


def _ours(X: Tensor, dictionary: Tensor, sparsity: float, tol: float) -> Tensor:
    return sparse_code(X, dictionary, sparsity, tol=tol).codes


def _largest_gap(codes: Tensor, X: Tensor, dictionary: Tensor, sparsity: float) -> float:
    gap = lasso_gap(codes.double(), X.double(), dictionary.double(), sparsity)
    return (gap / (0.5 * X.double().square().sum(1))).max().item()


def _timed(call: Callable[[], Tensor]) -> tuple[Tensor, float]:
    start = perf_counter()
    return call(), perf_counter() - start
