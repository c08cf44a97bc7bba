r"""The nearest-subspace classifier: which class's subspace comes closest to a row.

Representations learnt by rate reduction put every class on a subspace of its own, so their natural classifier
asks how much of a row sticks out of each,

.. math:: \hat y(x) = \arg\min_k \|(I - U_k U_k^\top)\, x\|,

with :math:`U_k` the leading directions of class k (Yu et al. 2020).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from pellucid.analytic.base import Classifier


class DistanceClassifier(Classifier):
    """What classifiers share that measure how far a row is from each class."""

    @abstractmethod
    def _distances(self, x: Tensor) -> Float[Tensor, "n K"]:
        """How far each row is from each class."""

    def decision_function(self, X: Any) -> Any:
        """Minus the distance to each class, ``(n, K)``; of two, by how much the second is nearer, ``(n,)``.

        Raises:
            ValueError: not fitted, or rows that do not fit the training data.
        """
        distances = self._distances(self._fitted_rows(X))
        if len(self.classes_) == 2:
            return self._like(distances[:, 0] - distances[:, 1], X)
        return self._like(-distances, X)

    def predict(self, X: Any) -> Any:
        """The nearest class of each row, ``(n,)``: a tensor where X is one and classes are numbers."""
        return self._names(self._distances(self._fitted_rows(X)).argmin(-1), X)

    def _training_data(self, X: Any, y: Any, missing: Any = None) -> tuple[Tensor, Tensor]:
        """As :meth:`_labelled_rows`, of at least two rows that are not all equal."""
        x, codes = self._labelled_rows(X, y, missing, min_samples=2)
        if bool((x == x[0]).all()):
            raise ValueError("all rows of X are equal - there is nothing to tell classes apart by")
        return x, codes


class NearestSubspace(DistanceClassifier):
    """Classifies a row by the subspace it is nearest to, one subspace for each class.

    Args:
        n_components: dimension of every subspace; or, as a number below 1, the share of each class's energy
            that its subspace must hold. Never the whole space, which is near to everything.
        intercept: append a one to every row, for classes that differ by place and not by direction: a plane
            that misses the origin is a subspace with one more dimension.

    Attributes:
        classes_: names of the classes, sorted.
        components_: bases ``(K, r, d)`` in rows, orthonormal; smaller ones are filled up with zeros. With an
            intercept, of width d + 1.
        ranks_: dimension of each subspace, ``(K,)``.
    """

    def __init__(self, n_components: int | float = 0.95, *, intercept: bool = False) -> None:
        self.n_components = n_components
        self.intercept = intercept

    def fit(self, X: Any, y: Any) -> Self:
        """Find each class's leading directions by SVD.

        Raises:
            ValueError: no dimension or share, or unusable rows or labels.
        """
        share = self.n_components < 1
        if not self.n_components > 0 or not (share or float(self.n_components).is_integer()):
            raise ValueError(
                f"n_components is {self.n_components}; expected a whole number or a share between 0 and 1"
            )
        x, codes = self._training_data(X, y)
        x = with_ones(x) if self.intercept else x
        bases = [self._leading(x[codes == k]) for k in range(len(self.classes_))]
        self.ranks_ = torch.tensor([len(basis) for basis in bases])
        self.components_ = x.new_zeros(len(bases), int(self.ranks_.max()), x.shape[1])
        for components, basis in zip(self.components_, bases, strict=True):
            components[: len(basis)] = basis
        return self

    def _leading(self, rows: Tensor) -> Tensor:
        _, s, directions = torch.linalg.svd(rows, full_matrices=False)
        energy = s.square()
        rank = int((energy > energy.max() * torch.finfo(s.dtype).eps).sum())
        wanted = self.n_components
        if self.n_components < 1:
            short = energy.cumsum(0) < self.n_components * energy.sum()
            wanted = int(short.sum()) + 1
        return directions[: min(rank, int(wanted), rows.shape[1] - 1)]

    def _distances(self, x: Tensor) -> Tensor:
        x = x.to(self.components_)
        x = with_ones(x) if self.intercept else x
        distances = [torch.linalg.vector_norm(x - x @ basis.mT @ basis, dim=-1) for basis in self.components_]
        return torch.stack(distances, -1)


def with_ones(x: Float[Tensor, "n d"]) -> Float[Tensor, "n D"]:
    """Rows in homogeneous coordinates: a one behind each."""
    return F.pad(x, (0, 1), value=1.0)
