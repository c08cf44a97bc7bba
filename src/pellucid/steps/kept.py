"""What is made from weights alone is made once, as long as they hold the same numbers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Kept:
    """The last result of a function of weights, made anew when any of their numbers has changed.

    Compared number by number: version counters miss writes through ``.data``, and reading weights is nothing
    beside a product with them. For inference on a CPU; elsewhere a comparison would wait for the device.

    Attributes:
        made: the result; None before the first.
    """

    def __init__(self) -> None:
        self._weights: tuple[Tensor, ...] = ()
        self._constants: tuple[float, ...] = ()
        self.made: Tensor | None = None

    def __call__(
        self, make: Callable[[], Tensor], weights: tuple[Tensor, ...], constants: tuple[float, ...] = ()
    ) -> Tensor:
        """``make()``, or what it gave for the same ``weights`` and ``constants``."""
        if self.made is None or constants != self._constants or not self._are(weights):
            with torch.no_grad():
                self.made = make()
                self._weights = tuple(weight.detach().clone() for weight in weights)
            self._constants = constants
        return self.made

    def _are(self, weights: tuple[Tensor, ...]) -> bool:
        return len(weights) == len(self._weights) and all(
            kept.dtype == now.dtype and kept.device == now.device and torch.equal(kept, now)
            for kept, now in zip(self._weights, weights, strict=True)
        )

    def __getstate__(self) -> dict:
        """Copies and pickles begin empty."""
        return Kept().__dict__


def is_inference(*tensors: Tensor) -> bool:
    """Whether nothing made from these tensors will be asked for a gradient, on a CPU, outside a compiler."""
    if torch.compiler.is_compiling() or any(tensor.device.type != "cpu" for tensor in tensors):
        return False
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
