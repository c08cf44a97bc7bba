r"""LISTA: sparse coding in as many layers as one can afford, each of them learnt.

ISTA unrolled for K steps is a network of K equal layers whose weights are known. Let each have its own, train
them so that the last layer's output comes near the codes that ISTA would reach in the end, and K layers do
what takes ISTA several times K (Gregor and LeCun 2010). It is where unrolled optimisation began.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from sklearn.base import ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from pellucid.analytic.base import Estimator
from pellucid.analytic.sparse_coding import cosine_basis, sparse_code
from pellucid.errors import ConfigError, DataError, suggest
from pellucid.steps.ista import FreeISTA
from pellucid.steps.step import OnStep, Step, unroll
from pellucid.steps.strict import StrictISTA, spectral_bound

FORMS = ("tied", "free")


class LISTA(ClassNamePrefixFeaturesOutMixin, TransformerMixin, Estimator):
    r"""A network of K layers that predicts sparse codes.

    ``tied``: each layer is a :class:`~pellucid.steps.StrictISTA` with a dictionary, a step size and a price
    of its own, so that each lowers a LASSO that can be read off it, whatever was learnt. ``free``: each is a
    :class:`~pellucid.steps.FreeISTA` with two matrices and thresholds of its own. Both begin as ISTA. Trained
    by Adam, learning rate falling to zero along a cosine, on :math:`\|Z_K - Z^*\|^2` with the codes
    :math:`Z^*` that the LASSO asks for.

    Args:
        dictionary: atoms in columns ``(d, m)``; None takes the cosine basis of the signals' width.
        n_layers: K.
        form: ``tied`` or ``free``.
        sparsity: :math:`\lambda` of the codes to predict.
        epochs, batch_size, learning_rate: of the training; signals are drawn anew in each epoch.
        random_state: for the order of signals.

    Attributes:
        dictionary_: atoms of the LASSO ``(d, m)``.
        layers_: the K steps, run by ``unroll``.
        loss_: mean squared error of a code, relative to the mean square of the codes, by epoch.

    Raises:
        ValueError: a dictionary that does not fit the signals, or options that cannot be.
    """

    dictionary_: Tensor
    layers_: nn.ModuleList

    def __init__(
        self,
        dictionary: Any = None,
        *,
        n_layers: int = 8,
        form: str = "tied",
        sparsity: float = 0.1,
        epochs: int = 100,
        batch_size: int = 128,
        learning_rate: float = 3e-3,
        random_state: Any = None,
    ) -> None:
        self.dictionary = dictionary
        self.n_layers = n_layers
        self.form = form
        self.sparsity = sparsity
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> LISTA:
        """Solve the LASSO of every signal, and train the layers to predict the solutions."""
        if self.form not in FORMS:
            raise ConfigError(f"unknown form '{self.form}'{suggest(self.form, FORMS)}")
        if self.n_layers < 1 or self.epochs < 0 or self.batch_size < 1:
            raise ConfigError(
                f"n_layers {self.n_layers} and batch_size {self.batch_size} must be 1 or larger, epochs "
                f"{self.epochs} 0 or larger"
            )
        rows = self._rows(X, reset=True)
        given = cosine_basis(rows.shape[1]) if self.dictionary is None else torch.as_tensor(self.dictionary)
        self.dictionary_ = given.detach().to(rows)
        codes = sparse_code(rows, self.dictionary_, self.sparsity).codes
        if not bool(codes.any()):
            raise DataError(
                f"every code is zero at sparsity {self.sparsity} - there is nothing to learn; lower it"
            )
        self.layers_ = nn.ModuleList(self._layer() for _ in range(self.n_layers))
        self._train(rows, codes)
        return self

    def transform(self, X: Any) -> Any:
        """Predicted codes ``(n, m)`` of signals ``(n, d)``."""
        return self._like(self.unrolled(X), X)

    def unrolled(self, X: Any, on_step: OnStep | None = None) -> Float[Tensor, "n m"]:
        """The codes as a tensor; ``on_step`` sees every layer, as in ``unroll``."""
        check_is_fitted(self)
        rows = self._rows(X)
        with torch.no_grad():
            return self._forward(rows.to(self.dictionary_), on_step).to(rows)

    @property
    def dictionaries_(self) -> Float[Tensor, "K d m"]:
        """The atoms of each layer: of a tied one those it codes in, of a free one those it encodes by."""
        check_is_fitted(self)
        return torch.stack([getattr(layer, "dictionary").detach() for layer in self.layers_])  # noqa: B009

    @property
    def _n_features_out(self) -> int:
        return self.dictionary_.shape[1]

    def _forward(self, rows: Tensor, on_step: OnStep | None = None) -> Tensor:
        start = rows.new_zeros(1, len(rows), self.dictionary_.shape[1])
        return unroll(self.layers_, start, rows[None], on_step)[0]

    def _layer(self) -> Step:
        """One step of ISTA in the dictionary, of the longest size that needs no luck."""
        d, m = self.dictionary_.shape
        eta = 1 / float(torch.linalg.matrix_norm(self.dictionary_, 2)) ** 2
        step: StrictISTA | FreeISTA
        if self.form == "free":
            step = FreeISTA(d, m, step_size=eta).to(self.dictionary_)
            step.begin_at(self.dictionary_, self.sparsity)
            return step
        share = min(eta * float(spectral_bound(self.dictionary_)) / 2, 0.9)
        step = StrictISTA(d, m, share=share, sparsity=self.sparsity).to(self.dictionary_)
        with torch.no_grad():
            step.dictionary.copy_(self.dictionary_)
        return step

    def _train(self, rows: Tensor, codes: Tensor) -> None:
        energy = codes.square().mean()
        batches = -(-len(rows) // self.batch_size)
        optimiser = torch.optim.Adam(self.layers_.parameters(), lr=self.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, self.epochs * batches))
        generator, self.loss_ = self._generator(), []
        for _ in range(self.epochs):
            total = 0.0
            for chosen in torch.randperm(len(rows), generator=generator).to(rows.device).chunk(batches):
                loss = (self._forward(rows[chosen]) - codes[chosen]).square().mean() / energy
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
                total += loss.item() * len(chosen)
            self.loss_.append(total / len(rows))
