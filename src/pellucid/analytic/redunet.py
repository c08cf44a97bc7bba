r"""ReduNet: a network built forward from data, one step of rate reduction after another (Chan et al. 2022).

Every layer is computed from the features that reach it: expand what all classes share, compress each class.
Nothing is trained by back-propagation, and every weight has a meaning; see
:mod:`pellucid.steps.rate_reduction` for the layer itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float
from sklearn.base import ClassNamePrefixFeaturesOutMixin, TransformerMixin
from torch import Tensor, nn
from torch.nn import functional as F

from pellucid.analytic.nearest_subspace import DistanceClassifier, with_ones
from pellucid.steps.rate_reduction import EPS, RateReduction, ShiftInvariantRateReduction, one_hot
from pellucid.steps.step import unroll

_NUMBERS_AT_ONCE = 1 << 25
"""Of rows times classes times width that pass through a layer together: 128 MB in float32."""


class ReduNet(ClassNamePrefixFeaturesOutMixin, TransformerMixin, DistanceClassifier):
    r"""Features that expand the whole and compress each class, and the class a row then sticks out of least.

    Rows are scaled to the unit sphere and stay there. A row is classified by one more layer's compression,
    :math:`\arg\min_j \|C_j z\|`, the smooth form of the nearest subspace.

    Args:
        n_layers: how many steps to build.
        eps: distortion. Published: the square root of 0.1.
        step_size: of every layer, or one for each. With known classes and a step up to
            :math:`8 n \epsilon^2 / (9 d)` each layer raises :math:`\Delta R`.
        sharpness: of the estimated memberships.
        labels: with what the training rows pass through a layer: ``"estimated"`` memberships, as any other
            row does and as published, or the ``"true"`` ones, which makes every layer a gradient step.
        intercept: append a one to every row, as in :class:`~pellucid.analytic.NearestSubspace`; of vectors
            only.
        shape: of a signal, ``(T,)`` or ``(H, W)``, for a network to which all circular shifts are alike;
            channels, if there are several, come first in a row. None treats rows as vectors.
        n_kernels: with ``shape``: random filters with ReLU in front of the first layer, so that a place knows
            of its neighbours; 0 for none.
        kernel_size: side of these filters.
        missing_label: the label that says "class not known"; such rows take part in the expansion only.
        random_state: of the filters.

    Attributes:
        classes_: names of the classes, sorted.
        layers_: the steps, :class:`~pellucid.steps.RateReduction` each.
        readout_: one more of them, which is asked for the class.
        kernels_: the random filters ``(n_kernels, C, ...)``, or None.
    """

    def __init__(
        self,
        n_layers: int = 20,
        *,
        eps: float = EPS,
        step_size: float | Sequence[float] = 0.5,
        sharpness: float = 500.0,
        labels: str = "estimated",
        intercept: bool = False,
        shape: tuple[int, ...] | None = None,
        n_kernels: int = 0,
        kernel_size: int = 3,
        missing_label: Any = None,
        random_state: Any = None,
    ) -> None:
        self.n_layers = n_layers
        self.eps = eps
        self.step_size = step_size
        self.sharpness = sharpness
        self.labels = labels
        self.intercept = intercept
        self.shape = shape
        self.n_kernels = n_kernels
        self.kernel_size = kernel_size
        self.missing_label = missing_label
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> Self:
        """Build the layers, first to last.

        Raises:
            ValueError: unusable rows, labels or options.
        """
        self.fit_transform(X, y)
        return self

    def fit_transform(self, X: Any, y: Any = None, **fit_params: Any) -> Any:
        """Build the layers; the features that came out of the last, each row passed as ``labels`` says."""
        step_sizes = self._checked_step_sizes()
        x, codes = self._training_data(X, y, self.missing_label)
        self._signal_shape, self.kernels_ = self._draw_kernels(x)
        z = self.start(x)
        known = one_hot(codes, z)
        self.layers_ = nn.ModuleList()
        for step_size in step_sizes:
            step = self._layer(z, codes, step_size)
            self.layers_.append(step)
            forward = self._through([step], z)
            if self.labels == "true":
                rows = codes >= 0
                moved = [step.move(part[None], pi[None])[0] for part, pi in self._parts(z[rows], known[rows])]
                forward[rows] = torch.cat(moved).detach()
            z = forward
        self.readout_ = self._layer(z, codes, 0.0)
        return self._like(z, X)

    def transform(self, X: Any) -> Any:
        """Features ``(n, D)`` on the unit sphere after the last layer.

        Raises:
            ValueError: not fitted, or rows that do not fit the training data.
        """
        return self._like(self._through(self.layers_, self.start(self._fitted_rows(X))), X)

    def _fitted_rows(self, X: Any) -> Tensor:
        return super()._fitted_rows(X).to(self.readout_.expand)

    def start(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n D"]:
        """What enters the first layer: rows, or their random features, on the unit sphere."""
        if self.kernels_ is not None:
            kernels = self.kernels_.to(x)
            signals = x.unflatten(-1, (kernels.shape[1], *self._signal_shape[1:]))
            reach = [pad for size in kernels.shape[:1:-1] for pad in ((size - 1) // 2, size // 2)]
            convolve = F.conv1d if kernels.dim() == 3 else F.conv2d
            x = convolve(F.pad(signals, reach, mode="circular"), kernels).relu().flatten(1)
        elif self.intercept:
            x = with_ones(x)
        return F.normalize(x, dim=-1)

    @property
    def _n_features_out(self) -> int:
        return int(np.prod(self._signal_shape))

    def _distances(self, x: Tensor) -> Tensor:
        z = self._through(self.layers_, self.start(x))
        with torch.no_grad():
            return torch.cat([self.readout_.residuals(part[None])[0] for (part,) in self._parts(z)])

    def _layer(self, z: Tensor, codes: Tensor, step_size: float) -> RateReduction:
        options = {"step_size": step_size, "eps": self.eps, "sharpness": self.sharpness}
        if self.shape is None:
            return RateReduction.from_tokens(z, codes, **options)
        return ShiftInvariantRateReduction.from_tokens(z, codes, shape=self._signal_shape, **options)

    @torch.no_grad()
    def _through(self, layers: Any, z: Tensor) -> Tensor:
        """Rows do not see each other in a built network, so a few at a time do."""
        return torch.cat([unroll(layers, part[None])[0] for (part,) in self._parts(z)]) if len(z) else z

    def _parts(self, *tensors: Tensor) -> Any:
        size = max(1, _NUMBERS_AT_ONCE // (len(self.classes_) * tensors[0].shape[1]))
        return zip(*[tensor.split(size) for tensor in tensors], strict=True)

    def _checked_step_sizes(self) -> list[float]:
        if self.n_layers < 1:
            raise ValueError(f"n_layers is {self.n_layers}; expected 1 or more")
        if self.labels not in ("estimated", "true"):
            raise ValueError(f"labels is {self.labels!r}; known: 'estimated', 'true'")
        if not self.eps > 0:
            raise ValueError(f"eps is {self.eps}; the distortion must be positive")
        given = self.step_size
        sizes = [float(s) for s in given] if isinstance(given, Sequence) else [float(given)] * self.n_layers
        if len(sizes) != self.n_layers:
            raise ValueError(
                f"{len(sizes)} step sizes for {self.n_layers} layers - give one for each, or one"
            )
        if not all(size > 0 for size in sizes):
            raise ValueError(f"step_size is {self.step_size}; expected positive numbers")
        return sizes

    def _draw_kernels(self, x: Tensor) -> tuple[tuple[int, ...], Tensor | None]:
        """The shape ``(channels, ...)`` of what the layers see, and the filters that make it."""
        width = x.shape[1]
        if self.shape is None:
            if self.n_kernels:
                raise ValueError("n_kernels is about signals - give their shape, (T,) or (H, W), as well")
            return (width + self.intercept,), None
        if self.intercept:
            raise ValueError("intercept is about vectors, shape about signals - leave one of them out")
        places = int(np.prod(self.shape))
        if len(self.shape) not in (1, 2) or places < 1 or width % places:
            raise ValueError(
                f"shape is {self.shape}; expected (T,) or (H, W) whose product divides the width {width} of X"
            )
        if not self.n_kernels:
            return (width // places, *self.shape), None
        if not 1 <= self.kernel_size <= min(self.shape):
            raise ValueError(f"kernel_size is {self.kernel_size}; expected 1 to {min(self.shape)}")
        sides = [self.kernel_size] * len(self.shape)
        size = (self.n_kernels, width // places, *sides)
        kernels = torch.randn(size, generator=self._generator(), dtype=torch.float64).to(x)
        return (self.n_kernels, *self.shape), kernels / kernels[0].numel() ** 0.5
