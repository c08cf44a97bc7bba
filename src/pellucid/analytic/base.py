"""What all estimators share: NumPy or torch in, the same kind out, scikit-learn's rules for the rest."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_consistent_length, check_is_fitted, column_or_1d, validate_data
from torch import Tensor


class Estimator(BaseEstimator):
    """Reads rows, computes in torch, answers in the caller's own kind, precision and device.

    A subclass takes its rows with :meth:`_rows` and returns what :meth:`_like` makes of the result. Fitted
    attributes are torch tensors with a trailing underscore, on the device of the data. Randomness comes from
    ``random_state`` through :meth:`_generator`, never from torch's global state.
    """

    n_features_in_: int

    def _rows(self, X: Any, *, reset: bool = False, min_samples: int = 1) -> Tensor:
        """``X`` as a float tensor ``(n, d)``; with ``reset`` its width becomes the estimator's.

        Raises:
            ValueError: NaN or infinity, no rows, fewer than ``min_samples``, not two-dimensional, complex
                numbers, or another width than the estimator was fitted with.
        """
        if isinstance(X, Tensor):
            return self._checked_tensor(X, reset, min_samples)
        array = validate_data(
            self, X, reset=reset, dtype=[np.float64, np.float32], ensure_min_samples=min_samples
        )
        # A copy where NumPy's memory cannot be shared: torch has no negative strides and writes anywhere.
        return torch.from_numpy(array if array.flags.writeable and array.flags.c_contiguous else array.copy())

    def _checked_tensor(self, X: Tensor, reset: bool, min_samples: int) -> Tensor:
        name = type(self).__name__
        if X.dim() != 2:
            raise ValueError(
                f"Expected 2D array, got {X.dim()}D instead - reshape to (n_samples, n_features)"
            )
        if X.is_complex():
            raise ValueError("Complex data not supported")
        if X.shape[0] < min_samples or X.shape[1] < 1:
            raise ValueError(
                f"Found array with {X.shape[0]} sample(s) and {X.shape[1]} feature(s) "
                f"(shape={tuple(X.shape)}) while a minimum of {min_samples} sample(s) and 1 feature is "
                f"required by {name}."
            )
        if not X.is_floating_point():
            X = X.double()
        if not bool(X.isfinite().all()):
            raise ValueError(f"Input X contains NaN or infinity, which {name} cannot use - remove those rows")
        if reset:
            self.n_features_in_ = X.shape[1]
        elif X.shape[1] != self.n_features_in_:
            raise ValueError(
                f"X has {X.shape[1]} features, but {name} is expecting {self.n_features_in_} features as "
                f"input"
            )
        return X.detach()

    @staticmethod
    def _like(result: Tensor, X: Any) -> Any:
        """``result`` as a tensor where ``X`` is one, else as a NumPy array."""
        return result if isinstance(X, Tensor) else result.cpu().numpy()

    def _generator(self) -> torch.Generator:
        """Random numbers of this estimator's ``random_state``: a seed, a NumPy RandomState or None."""
        state = check_random_state(getattr(self, "random_state", None))
        return torch.Generator().manual_seed(int(state.randint(np.iinfo(np.int32).max)))


class Classifier(ClassifierMixin, Estimator):
    """Reads rows with the names of their classes, and answers with names.

    Attributes:
        classes_: names of the classes, sorted.
    """

    classes_: np.ndarray

    def _labelled_rows(
        self, X: Any, y: Any, missing: Any = None, *, min_samples: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Rows, and for each the number of its class, -1 where its label is ``missing``. Sets ``classes_``.

        Raises:
            ValueError: as :meth:`_rows`; no labels, of another number, not of classes, or none known.
        """
        if y is None:
            raise ValueError(f"{type(self).__name__} requires y to be passed, but the target y is None")
        x = self._rows(X, reset=True, min_samples=min_samples)
        labels = column_or_1d(y.cpu().numpy() if isinstance(y, Tensor) else y, warn=True)
        check_classification_targets(labels)
        check_consistent_length(X, labels)
        known = np.ones(len(labels), dtype=bool) if missing is None else labels != missing
        if not known.any():
            raise ValueError(f"every label is {missing!r}, which says unknown - at least one class is needed")
        self.classes_, found = np.unique(labels[known], return_inverse=True)
        codes = np.full(len(labels), -1)
        codes[known] = found
        return x, torch.from_numpy(codes).to(x.device)

    def _fitted_rows(self, X: Any) -> Tensor:
        check_is_fitted(self, "classes_")
        return self._rows(X)

    def _names(self, codes: Tensor, X: Any) -> Any:
        """Classes by their numbers: a tensor where X is one and classes are numbers."""
        if isinstance(X, Tensor) and self.classes_.dtype.kind in "biuf":
            return torch.from_numpy(self.classes_).to(X.device)[codes.to(X.device)]
        return self.classes_[codes.cpu().numpy()]
