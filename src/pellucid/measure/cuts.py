r"""Cutting a graph of patches in two: the normalised cut and its relaxation (Shi & Malik 2000).

With weights W, degrees d and a part A, :math:`\mathrm{NCut}(A) = \frac{\mathrm{cut}(A)}{\mathrm{vol}(A)} +
\frac{\mathrm{cut}(A)}{\mathrm{vol}(\bar A)}`, between 0 and 2. Its relaxation is the second smallest solution
of :math:`(D - W) y = \lambda D y`, and :math:`\lambda` bounds every cut from below.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

Weights = Literal["clipped", "binary"]

FLOOR = 1e-5
"""The weight between patches that are not alike: the graph hangs together, so its cut is one and no other."""

LANCZOS_FROM = 800
"""Patches from which on the eigenvector is found by Lanczos iteration in place of a dense solver."""


def affinity(
    features: Float[Tensor, "n d"], tau: float, weights: Weights = "clipped"
) -> Float[Tensor, "n n"]:
    """How alike patches are, float64: the cosine of their features where it is at least tau, else ``FLOOR``.

    ``"binary"`` has 1 in place of the cosine (TokenCut's and CutLER's programs; the texts on MaskCut in CRATE
    keep the cosine). Features of length zero are like no others.
    """
    directions = F.normalize(features.double(), dim=-1)
    cosine = directions @ directions.mT
    kept = torch.ones_like(cosine) if weights == "binary" else cosine
    return torch.where(cosine >= tau, kept, FLOOR).clamp_min(FLOOR)


def relaxed_cut(weights: Float[Tensor, "n n"]) -> tuple[Float[Tensor, " n"], float]:
    r"""The second smallest solution :math:`(y, \lambda)` of :math:`(D - W) y = \lambda D y`.

    y has unit length in the metric D, and its largest entry is positive. The matrix :math:`N = D^{-1/2} W
    D^{-1/2}` has the known eigenvector :math:`u = D^{1/2} 1` to its eigenvalue 1, so :math:`N + I - 2uu^\top`
    (u of unit length) is positive, has 0 there, and its largest eigenvalue is :math:`2 - \lambda`: one
    extreme eigenvector is all that has to be found, and u cannot stand in for it where the graph falls apart.

    Args:
        weights: symmetric, not negative, at least two patches, every row with a positive sum.
    """
    from scipy.linalg import eigh
    from scipy.sparse.linalg import ArpackNoConvergence, eigsh

    w = weights.double().numpy()
    n = len(w)
    root = np.sqrt(w.sum(1))
    trivial = root / np.linalg.norm(root)
    matrix = w / np.outer(root, root) - 2 * np.outer(trivial, trivial)
    matrix[np.diag_indices(n)] += 1
    value = None
    if n >= LANCZOS_FROM:
        start = np.cos(np.arange(n) + 1.0)  # any fixed vector that no symmetry of a picture shares
        with suppress(ArpackNoConvergence):
            value, vector = eigsh(matrix, 1, which="LA", v0=start)
    if value is None:
        # The whole spectrum: the solver of one eigenvector gives none at all where very many are alike.
        value, vector = (part[..., -1:] for part in eigh(matrix, driver="evd"))
    y = vector[:, 0] / root
    y = y if y[np.abs(y).argmax()] > 0 else -y
    return torch.from_numpy(y.copy()), float(2 - value[0])


def cut_value(weights: Float[Tensor, "n n"], part: Bool[Tensor, " n"]) -> float:
    """NCut of ``part`` and the rest; 2 where one of them is empty. About 1 for a part taken at random."""
    degrees = weights.sum(1)
    inside, outside = degrees[part].sum(), degrees[~part].sum()
    if not part.any() or part.all():
        return 2.0
    cut = weights[part][:, ~part].sum()
    return float(cut / inside + cut / outside)
