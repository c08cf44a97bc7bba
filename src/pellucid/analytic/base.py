"""What all estimators share: NumPy or torch in, the same kind out, scikit-learn's rules for the rest."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from sklearn.utils.validation import validate_data
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
