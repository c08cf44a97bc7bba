r"""Lossy coding: what rows cost up to a distortion, and clustering by what it costs to store them.

Storing n rows of width d up to distortion :math:`\epsilon` takes the rows themselves and the basis that
they are written in, :math:`(n + d)\, R(X; \epsilon)` nats with the coding rate R (Ma, Derksen, Hong and
Wright 2007). Rows from several subspaces are cheaper stored by parts, and the cheapest partition is a
clustering whose number of clusters nobody chose:

.. math::
    L(X_1, \dots, X_K) = \sum_k (n_k + d)\, R(X_k; \epsilon) - n_k \log\frac{n_k}{n},

the last term for saying which part each row belongs to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Self

import torch
from jaxtyping import Float, Int
from sklearn.base import ClusterMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from pellucid.analytic.base import Estimator


class LossyCodingClustering(ClusterMixin, Estimator):
    r"""Merges clusters while that makes the data cheaper to store (Ma et al. 2007).

    Begins with every row by itself and merges the pair that saves most, until no merge saves. A merge is
    priced from second moments, which add up, so all prices of a new cluster are one batch of Cholesky
    factorisations, and a price is computed once. n rows take about :math:`n^2 d^3 / 6` operations and
    :math:`n d^2` numbers of memory, d being the width or, if smaller, the number of rows.

    Args:
        eps: distortion, in the unit of the data; about the noise's length :math:`\sigma\sqrt d`. Larger
            values give fewer clusters.
        center: each cluster has a mean of its own, which costs
            :math:`\tfrac d2\log(1 + \|\mu\|^2/\epsilon^2)`; without, all subspaces pass through the origin.

    Attributes:
        labels_: the cluster of each row, ``(n,)``, numbered by first appearance.
        n_clusters_: how many remained.
        merge_path_: the pairs that were merged, ``(merges, 2)``; rows are clusters 0 to n - 1, the t-th merge
            makes cluster n + t.
        coding_lengths_: nats for all rows before the first merge and after each, ``(merges + 1,)``.
        sizes_: rows of each cluster, ``(K,)``.
        means_: ``(K, d)``, zero where ``center`` is False.
        scatters_: second moments about them, ``(K, d, d)``.
    """

    def __init__(self, eps: float = 1.0, *, center: bool = True) -> None:
        self.eps = eps
        self.center = center

    def fit(self, X: Any, y: None = None) -> Self:
        """Cluster the rows.

        Raises:
            ValueError: unusable rows, all rows equal, or an ``eps`` that is not positive.
        """
        if not self.eps > 0:
            raise ValueError(f"eps is {self.eps}; the distortion must be positive")
        x = self._rows(X, reset=True, min_samples=2)
        if bool((x == x[0]).all()):
            raise ValueError("all rows of X are equal - they are one cluster, whatever the distortion")
        n, d = x.shape
        wide = x.double()  # a merge saves little of a large sum
        basis = torch.linalg.qr(wide.mT).Q if n < d else None  # rates do not know of directions without rows
        groups, lengths, pairs, members = self._merge(wide if basis is None else wide @ basis, d)
        labels = torch.empty(n, dtype=torch.long)
        for k, rows in enumerate(sorted(members, key=min)):
            labels[rows] = k
        order = torch.tensor(sorted(range(len(members)), key=lambda k: min(members[k])), device=x.device)
        chosen = groups[order]
        self.labels_ = self._like(labels.to(x.device), X)
        self.n_clusters_ = len(members)
        self.merge_path_ = torch.tensor(pairs, dtype=torch.long, device=x.device).reshape(-1, 2)
        self.coding_lengths_ = torch.tensor(lengths, dtype=x.dtype, device=x.device)
        self.sizes_ = chosen.size.long()
        means, scatters = chosen.mean, chosen.scatter
        if basis is not None:
            means, scatters = means @ basis.mT, basis @ scatters @ basis.mT
        self.means_, self.scatters_ = means.to(x.dtype), scatters.to(x.dtype)
        return self

    def predict(self, X: Any) -> Any:
        """The cluster that each row makes least more expensive, on its own, ``(n,)``.

        Raises:
            ValueError: not fitted, or rows that do not fit the training data.
        """
        check_is_fitted(self, "sizes_")
        x = self._rows(X).to(self.means_)
        d = x.shape[1]
        wide, total = x.double(), self.sizes_.sum()
        added = []
        for size, mean, scatter in zip(
            self.sizes_.double(), self.means_.double(), self.scatters_.double(), strict=True
        ):
            group = _Groups(size, mean, scatter)
            moved = wide - mean if self.center else wide
            weight = size / (size + 1) if self.center else torch.ones_like(size)
            # A row adds rank one to the scatter: det(A + c v v^T) = det(A) (1 + c v^T A^-1 v).
            scale = d / ((size + 1) * self.eps**2)
            factor = torch.linalg.cholesky(scale * scatter + torch.eye(d, dtype=wide.dtype, device=x.device))
            solved = torch.linalg.solve_triangular(factor, moved.mT, upper=False).square().sum(0)
            half_logdet = factor.diagonal().log().sum() + 0.5 * torch.log1p(scale * weight * solved)
            after = (size + 1 + d) * half_logdet
            if self.center:
                after = after + self._mean_length((size * mean + wide) / (size + 1), d)
            added.append(after - self._lengths(group, d) - torch.log(size / total))
        return self._like(torch.stack(added, -1).argmin(-1), X)

    def _merge(
        self, x: Tensor, d: int
    ) -> tuple[_Groups, list[float], list[tuple[int, int]], list[list[int]]]:
        """Clusters, total lengths, merged pairs, and the rows of each cluster, of rows of true width ``d``.

        Living clusters stand in the first ``k`` places of everything; the last fills the gap of one that is
        merged away. ``price[i, j]`` is what the union of i and j costs more than both apart.
        """
        n = len(x)
        zero = x.new_zeros(n, x.shape[1], x.shape[1])
        if self.center:
            groups = _Groups(x.new_ones(n), x.clone(), zero)
        else:
            groups = _Groups(x.new_ones(n), torch.zeros_like(x), x.unsqueeze(-1) * x.unsqueeze(-2))
        own = self._lengths(groups, d)
        price = torch.full((n, n), math.inf, dtype=x.dtype, device=x.device)
        for i in range(n - 1):
            price[i, i + 1 :] = self._prices(groups, own, i, torch.arange(i + 1, n, device=x.device), n, d)
        price = torch.minimum(price, price.mT)
        names, members = list(range(n)), [[i] for i in range(n)]
        lengths: list[float] = [own.sum().item() + n * math.log(n)]
        pairs: list[tuple[int, int]] = []
        for k in range(n, 1, -1):
            best = price[:k, :k].reshape(-1).argmin()
            i, j = sorted(divmod(int(best), k))
            saved = price[i, j].item()
            if not saved < 0:
                break
            pairs.append((names[i], names[j]))
            lengths.append(lengths[-1] + saved)
            groups.put(i, groups[[i]].joined(groups[[j]]))
            groups.put(j, groups[[k - 1]])
            names[i], names[j] = n + len(pairs) - 1, names[k - 1]
            members[i], members[j] = members[i] + members[j], members[k - 1]
            del names[k - 1], members[k - 1]
            own[i] = self._lengths(groups[[i]], d)[0]
            own[j] = own[k - 1]
            price[j, : k - 1] = price[k - 1, : k - 1]
            price[: k - 1, j] = price[: k - 1, k - 1]
            price[j, j] = math.inf
            others = torch.tensor([other for other in range(k - 1) if other != i], device=x.device)
            if len(others):
                price[i, others] = price[others, i] = self._prices(groups, own, i, others, n, d)
        return groups[list(range(len(members)))], lengths, pairs, members

    def _prices(self, groups: _Groups, own: Tensor, i: int, others: Tensor, n: int, d: int) -> Tensor:
        """What the union of group ``i`` with each of the others costs more than the two apart."""
        union = groups[[i]].joined(groups[others])
        labels = [-size * torch.log(size / n) for size in (union.size, groups.size[i], groups.size[others])]
        return self._lengths(union, d) - own[i] - own[others] + labels[0] - labels[1] - labels[2]

    def _lengths(self, groups: _Groups, d: int) -> Tensor:
        """Nats for the rows of each group: coordinates, basis and, with ``center``, the mean."""
        scale = d / (groups.size * self.eps**2)
        eye = torch.eye(groups.scatter.shape[-1], dtype=groups.scatter.dtype, device=groups.scatter.device)
        factor = torch.linalg.cholesky(eye + scale[..., None, None] * groups.scatter)
        rate = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        length = (groups.size + d) * rate
        return length + self._mean_length(groups.mean, d) if self.center else length

    def _mean_length(self, mean: Tensor, d: int) -> Tensor:
        return d / 2 * torch.log1p(mean.square().sum(-1) / self.eps**2)


@dataclass
class _Groups:
    """Numbers, means and scatters of groups of rows, all that their lengths depend on."""

    size: Float[Tensor, "*k"]
    mean: Float[Tensor, "*k d"]
    scatter: Float[Tensor, "*k d d"]

    def __getitem__(self, index: Any) -> _Groups:
        return _Groups(self.size[index], self.mean[index], self.scatter[index])

    def put(self, index: int, other: _Groups) -> None:
        self.size[index], self.mean[index] = other.size[0], other.mean[0]
        self.scatter[index] = other.scatter[0]

    def joined(self, other: _Groups) -> _Groups:
        """The unions of these groups with those."""
        size = self.size + other.size
        share = (other.size / size).unsqueeze(-1)
        apart = other.mean - self.mean
        between = (self.size * other.size / size)[..., None, None] * apart.unsqueeze(-1) * apart.unsqueeze(-2)
        return _Groups(size, self.mean + share * apart, self.scatter + other.scatter + between)


def gaussian_rate_distortion(variances: Float[Tensor, " d"], eps: float) -> Float[Tensor, ""]:
    r"""Nats that a Gaussian row takes, at best, up to mean squared distortion :math:`\epsilon^2`.

    .. math:: R(D) = \sum_i \max\bigl(0, \tfrac12 \log\tfrac{\lambda_i}{\theta}\bigr),
        \qquad \sum_i \min(\theta, \lambda_i) = \epsilon^2

    by reverse water-filling (Cover and Thomas, ch. 10). The coding rate is never below it: it spends
    :math:`\tfrac12\log(1 + d\lambda_i/\epsilon^2)` on each direction, the same for small distortions.

    Args:
        variances: along the principal directions, none negative.
        eps: distortion. Positive.

    Raises:
        ValueError: a negative variance or a distortion that is not positive.
    """
    if not eps > 0:
        raise ValueError(f"eps is {eps}; the distortion must be positive")
    if bool((variances < 0).any()):
        raise ValueError("a variance is negative")
    small_first = variances.sort().values
    if eps**2 >= small_first.sum():
        return variances.new_zeros(())
    # With the m smallest directions under water, the others share what is left of the distortion evenly.
    under = small_first.cumsum(0) - small_first
    levels = (eps**2 - under) / torch.arange(len(small_first), 0, -1, device=variances.device)
    level = levels[(levels <= small_first).nonzero()[0, 0]]
    return 0.5 * (small_first / level).clamp_min(1).log().sum()


def covering(X: Float[Tensor, "n d"], eps: float) -> Int[Tensor, " k"]:
    r"""Rows to put into a codebook so that every row is within ``eps`` of one: indices, farthest first.

    Each next word is the row that is farthest from all words so far (Gonzalez 1985), so words are more than
    ``eps`` apart, and no covering with balls of half the radius has fewer. Its logarithm in bits is what one
    row costs with this codebook.

    Args:
        X: rows.
        eps: radius. Positive.
    """
    if not eps > 0:
        raise ValueError(f"eps is {eps}; the distortion must be positive")
    words = [int((X - X.mean(0)).square().sum(-1).argmin())]
    distance = torch.linalg.vector_norm(X - X[words[0]], dim=-1)
    while float(distance.max()) > eps:
        words.append(int(distance.argmax()))
        distance = torch.minimum(distance, torch.linalg.vector_norm(X - X[words[-1]], dim=-1))
    return torch.tensor(words, device=X.device)
