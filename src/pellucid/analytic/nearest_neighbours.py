r"""The nearest-neighbours classifier by which features learnt without labels are judged.

The training rows nearest by cosine vote for their classes, and near ones have more to say,

.. math:: v_c(x) = \sum_{i \in N_k(x)} [y_i = c]\, e^{\cos(x, x_i) / \tau},

with k = 20 and :math:`\tau = 0.07` (Wu et al. 2018; so for DINO and SimDINO). Nothing is trained, so the
number belongs to the features alone.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from jaxtyping import Float, Int
from sklearn.utils.validation import check_is_fitted
from torch import Tensor
from torch.nn import functional as F

from pellucid.analytic.base import Classifier

CHUNK = 1 << 24
"""Cosines held at once."""


class NearestNeighbours(Classifier):
    """Classifies a row by its nearest training rows, weighted by their cosines.

    Rows are scaled to unit length; one of length zero has cosine 0 to everything. Without rows,
    ``predict(None)``, ``predict_proba(None)`` and ``score(None, y)`` are about the training rows, each by the
    others: leaving one out.

    Args:
        n_neighbors: how many rows vote; all of them where there are fewer.
        temperature: of the weights; the smaller it is, the more the nearest decide.

    Attributes:
        classes_: names of the classes, sorted.
        rows_: training rows, scaled, ``(n, d)``.
        codes_: for each the number of its class, ``(n,)``.
        of_tensors_: whether the training rows came as a tensor.
    """

    def __init__(self, n_neighbors: int = 20, temperature: float = 0.07) -> None:
        self.n_neighbors = n_neighbors
        self.temperature = temperature

    def fit(self, X: Any, y: Any) -> Self:
        """Keep the rows.

        Raises:
            ValueError: no number of neighbours or temperature, or unusable rows or labels.
        """
        if self.n_neighbors < 1 or int(self.n_neighbors) != self.n_neighbors:
            raise ValueError(f"n_neighbors is {self.n_neighbors}; expected a whole number, at least 1")
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}; it must be larger than 0")
        x, self.codes_ = self._labelled_rows(X, y)
        self.rows_, self.of_tensors_ = _unit(x), isinstance(X, Tensor)
        return self

    def kneighbors(self, X: Any = None, n_neighbors: int | None = None) -> tuple[Any, Any]:
        """Cosines ``(n, k)`` of each row's nearest training rows, falling, and which they are, ``(n, k)``.

        Args:
            X: rows; None for the training rows, each without itself.
            n_neighbors: k, in place of the estimator's.

        Raises:
            ValueError: not fitted, rows that do not fit the training data, or a single training row that
                would be left out.
        """
        cosines, index = self._nearest(X, n_neighbors)
        return self._like(cosines, self._or_own(X)), self._like(index, self._or_own(X))

    def predict(self, X: Any) -> Any:
        """The class with the most votes, ``(n,)``: a tensor where X is one and classes are numbers."""
        return self._names(self._votes(X).argmax(-1), self._or_own(X))

    def predict_proba(self, X: Any) -> Any:
        """Each class's share of the votes, ``(n, K)``."""
        votes = self._votes(X)
        return self._like(votes / votes.sum(-1, keepdim=True), self._or_own(X))

    def _votes(self, X: Any) -> Float[Tensor, "n K"]:
        cosines, index = self._nearest(X, None)
        return weighted_votes(cosines, self.codes_[index], len(self.classes_), self.temperature)

    def _nearest(self, X: Any, n_neighbors: int | None) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
        check_is_fitted(self, "rows_")
        out = X is None
        rows = self.rows_ if out else _unit(self._fitted_rows(X).to(self.rows_))
        k = min(self.n_neighbors if n_neighbors is None else n_neighbors, len(self.rows_) - out)
        if k < 1:
            raise ValueError("there is one training row, and no other to compare it with - fit more rows")
        found = []
        step = max(1, CHUNK // len(self.rows_))
        for first in range(0, len(rows), step):
            cosines = rows[first : first + step] @ self.rows_.mT
            if out:
                cosines.diagonal(first).fill_(-torch.inf)
            found.append(cosines.topk(k))
        cosines, index = (torch.cat(parts) for parts in zip(*found, strict=True))
        return cosines, index

    def _or_own(self, X: Any) -> Any:
        """Rows of the kind in which to answer."""
        if X is not None:
            return X
        return self.rows_ if self.of_tensors_ else self.rows_.cpu().numpy()


def weighted_votes(
    cosines: Float[Tensor, "n k"], codes: Int[Tensor, "n k"], classes: int, temperature: float
) -> Float[Tensor, "n classes"]:
    r"""What the neighbours say: the sum of :math:`e^{\cos / \tau}` for each class, the largest being 1.

    Args:
        cosines: of each row's neighbours.
        codes: numbers of their classes.
        classes: how many there are.
        temperature: :math:`\tau`.
    """
    weights = ((cosines - cosines.amax(-1, keepdim=True)) / temperature).exp()
    return weights.new_zeros(len(weights), classes).scatter_add_(-1, codes, weights)


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)


__all__ = ["NearestNeighbours", "weighted_votes"]
