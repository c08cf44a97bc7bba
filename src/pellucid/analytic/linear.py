r"""Linear structure: principal components, the shallowest white-box network.

.. math:: \min_{U U^\top = I} \tfrac12\|X - X U^\top U\|_F^2

Encode by U, decode by its transpose: two linear layers with one matrix, whose optimum is known. The rows of U
are the leading eigenvectors of :math:`X^\top X`.
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
from torch import Tensor, nn

from pellucid.analytic.base import Estimator
from pellucid.errors import ConfigError, DataError, suggest
from pellucid.steps.power import OrthogonalIteration
from pellucid.steps.step import OnStep, unroll

METHODS = ("svd", "power")

BLOCK = 10
"""Orthogonal iterations between two looks at the residual."""


class PCA(ClassNamePrefixFeaturesOutMixin, TransformerMixin, Estimator):
    r"""Principal components, as a projection, as a tied autoencoder and as a Gaussian.

    Args:
        n_components: how many; all, ``min(n, d)``, unless given.
        center: subtract the mean first. Without it directions pass through the origin, as in the
            derivation of the autoencoder, and variances are second moments.
        method: ``svd``, or ``power``: orthogonal iteration from random directions, one
            :class:`~pellucid.steps.power.OrthogonalIteration` many times.
        max_iter, tol: of ``power``; it ends when the directions' images leave their span by at most
            ``tol`` of the largest eigenvalue (or the dtype's resolution, where that is more).
        random_state: for the start of ``power``.

    Attributes:
        components_: directions ``(k, d)``, by falling variance; the entry of largest modulus is positive.
        mean_: ``(d,)``, zero without centring.
        explained_variance_: of the coordinates ``(k,)``, divided by n - 1, or n without centring.
        explained_variance_ratio_: the same as a share of the whole.
        noise_variance_: mean variance of the directions left out: maximum likelihood of the noise in
            probabilistic PCA (Tipping and Bishop 1999).
        n_components_: k.
        n_iter_: orthogonal iterations, 1 by SVD.

    Raises:
        ValueError: fewer than two samples, samples without variance, or more components than there are.
    """

    components_: Tensor
    mean_: Tensor
    explained_variance_: Tensor

    def __init__(
        self,
        n_components: int | None = None,
        *,
        center: bool = True,
        method: str = "svd",
        max_iter: int = 2000,
        tol: float = 1e-7,
        random_state: Any = None,
    ) -> None:
        self.n_components = n_components
        self.center = center
        self.method = method
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None, *, on_step: OnStep | None = None) -> PCA:
        """Find the components; ``on_step`` sees every orthogonal iteration, as in ``unroll``."""
        if self.method not in METHODS:
            raise ConfigError(f"unknown method '{self.method}'{suggest(self.method, METHODS)}")
        rows = self._rows(X, reset=True, min_samples=2)
        n, d = rows.shape
        k = min(n, d) if self.n_components is None else self.n_components
        if not 1 <= k <= min(n, d):
            raise ConfigError(f"n_components={k} must lie between 1 and min(n, d) = {min(n, d)}")
        self.mean_ = rows.mean(0) if self.center else torch.zeros_like(rows[0])
        centred = rows - self.mean_
        self._count = n - 1 if self.center else n
        total = centred.square().sum()
        # Rounding of the mean leaves a little of what is constant.
        if total <= 4 * n * d * (torch.finfo(rows.dtype).eps * rows.abs().max()) ** 2:
            raise DataError("the samples are constant - there is no direction of variance to find")
        solve = self._by_svd if self.method == "svd" else self._by_power
        singular, directions = solve(centred, k, on_step)
        signs = directions.gather(1, directions.abs().argmax(1, keepdim=True)).sign()
        self.components_ = directions * signs
        self.n_components_ = k
        self.explained_variance_ = singular.square() / self._count
        self.explained_variance_ratio_ = singular.square() / total
        left = min(n, d) - k
        rest = (total - singular.square().sum()).clamp_min(0) / self._count
        self.noise_variance_ = float(rest / left) if left else 0.0
        return self

    def transform(self, X: Any) -> Any:
        """Coordinates ``(n, k)`` of samples ``(n, d)``."""
        check_is_fitted(self)
        rows = self._rows(X)
        return self._like((rows - self.mean_.to(rows)) @ self.components_.to(rows).mT, X)

    def inverse_transform(self, X: Any) -> Any:
        """Samples ``(n, d)`` of coordinates ``(n, k)``; after :meth:`transform`, the PCA denoiser."""
        check_is_fitted(self)
        z = torch.as_tensor(X)
        return self._like(z @ self.components_.to(z) + self.mean_.to(z), X)

    def autoencoder(self) -> TiedAutoencoder:
        """The same as a network, ready to be trained further."""
        check_is_fitted(self)
        return TiedAutoencoder(self.components_, self.mean_)

    def score_samples(self, X: Any) -> Any:
        r"""Log-likelihood in nats of each sample under probabilistic PCA ``(n,)``.

        A Gaussian with variance ``explained_variance_`` along the components and ``noise_variance_`` along
        all other directions.

        Raises:
            ValueError: fewer components than dimensions and no noise: the Gaussian has no density.
        """
        check_is_fitted(self)
        rows = self._rows(X)
        k, d = self.components_.shape
        deviation = rows - self.mean_.to(rows)
        along = deviation @ self.components_.to(rows).mT
        variance = self.explained_variance_.to(rows)
        log_det = variance.log().sum()
        distance = (along.square() / variance).sum(1)
        if k < d:
            if not self.noise_variance_ > 0:
                raise DataError(
                    f"the samples lie in {k} dimensions and their Gaussian has no density in {d} - take "
                    f"fewer components, so that some variance is noise"
                )
            outside = deviation - along @ self.components_.to(rows)
            log_det = log_det + (d - k) * math.log(self.noise_variance_)
            distance = distance + outside.square().sum(1) / self.noise_variance_
        return self._like(-0.5 * (d * math.log(2 * math.pi) + log_det + distance), X)

    def score(self, X: Any, y: Any = None) -> float:
        """Mean log-likelihood in nats under probabilistic PCA."""
        return float(self.score_samples(X).mean())

    @property
    def _n_features_out(self) -> int:
        return self.components_.shape[0]

    def _by_svd(self, centred: Tensor, k: int, on_step: OnStep | None) -> tuple[Tensor, Tensor]:
        self.n_iter_ = 1
        _, singular, directions = torch.linalg.svd(centred, full_matrices=False)
        return singular[:k], directions[:k]

    def _by_power(self, centred: Tensor, k: int, on_step: OnStep | None) -> tuple[Tensor, Tensor]:
        """Iterate until the span is invariant, then turn the directions to the axes inside it."""
        n, d = centred.shape
        # Any matrix with the same Gram matrix will do, and a triangular factor is the smallest.
        root = centred if n <= d else torch.linalg.qr(centred, mode="r")[1]
        step = OrthogonalIteration(root).requires_grad_(False)
        U = torch.randn(1, k, d, generator=self._generator(), dtype=torch.float64).to(root)
        U = torch.linalg.qr(U.mT)[0].mT
        tol = max(self.tol, 4 * math.sqrt(d) * torch.finfo(root.dtype).eps)
        self.n_iter_, residual = 0, math.inf
        while residual > tol and self.n_iter_ < self.max_iter:
            length = min(BLOCK, self.max_iter - self.n_iter_)
            U = unroll([step] * length, U, on_step=on_step)
            self.n_iter_ += length
            image = step.slope(U)[0]
            inner = image @ U[0].mT
            residual = float(
                torch.linalg.matrix_norm(image - inner @ U[0]) / torch.linalg.matrix_norm(inner, 2)
            )
        if residual > tol:
            warnings.warn(
                f"{k} directions still turn by {residual:.1e} after {self.max_iter} iterations - raise "
                f"max_iter, or take method='svd'",
                ConvergenceWarning,
                stacklevel=3,
            )
        _, singular, turn = torch.linalg.svd(root @ U[0].mT, full_matrices=False)
        return singular, turn @ U[0]


class TiedAutoencoder(nn.Module):
    """Two linear layers with one matrix, ``x -> (x - mean) U^T -> (x - mean) U^T U + mean``.

    Args:
        components: U, directions in rows ``(k, d)``.
        mean: ``(d,)``.
    """

    def __init__(self, components: Float[Tensor, "k d"], mean: Float[Tensor, " d"]) -> None:
        super().__init__()
        self.components = nn.Parameter(components.clone())
        self.mean = nn.Parameter(mean.clone())

    def encode(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b k"]:
        """Coordinates along the components."""
        return (x - self.mean) @ self.components.mT

    def decode(self, z: Float[Tensor, "*b k"]) -> Float[Tensor, "*b d"]:
        """The point with these coordinates."""
        return z @ self.components + self.mean

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        return self.decode(self.encode(x))
