r"""Power iterations: directions that turn to where the samples are, or to where their coordinates are sparse.

Let f be convex. On matrices with orthonormal rows its linearisation is largest at a polar factor,

.. math:: U^+ = P[\nabla f(U)], \qquad P[A \Sigma B^\top] = A B^\top,

and f lies above its linearisation, so :math:`f(U^+) \ge f(U) + \langle \nabla f(U), U^+ - U\rangle \ge f(U)`
from every orthonormal U: no step size, and no way down. A quadratic f is PCA, a quartic f is dictionary
learning.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pellucid.objectives.projection import captured_energy, fourth_power
from pellucid.steps.step import Step


class PowerStep(Step):
    """Directions (the tokens, ``(b, p, d)``) move to the polar factor of a convex function's slope.

    The objective is that function's negative at the nearest orthonormal directions. Ascent is guaranteed from
    orthonormal directions, by convexity rather than by a bound on the step: ``max_step_size`` is None.

    Args:
        samples: rows ``(N, d)``, or any matrix with the same Gram matrix where only that matters.
        enter: see :class:`~pellucid.steps.step.Step`.
    """

    step_size = 1.0

    def __init__(self, samples: Float[Tensor, "N d"], *, enter: nn.Module | None = None) -> None:
        super().__init__(enter)
        self.samples = nn.Parameter(samples)

    @staticmethod
    @abstractmethod
    def stretch(coordinates: Tensor) -> Tensor:
        """The function's slope in the coordinates ``U X^T``."""

    def slope(self, z: Float[Tensor, "b p d"]) -> Float[Tensor, "b p d"]:
        """Gradient of the convex function. A polar factor magnifies rounding, so at least float32 inside."""
        stretched = self.stretch(_at_least_float32(z) @ _at_least_float32(self.samples).mT)
        with torch.autocast(z.device.type, enabled=False):
            return _at_least_float32(stretched) @ _at_least_float32(self.samples)

    def forward(self, z: Float[Tensor, "b p d"], x: Tensor | None = None) -> Float[Tensor, "b p d"]:
        return polar_factor(self.slope(z)).to(z.dtype)


class OrthogonalIteration(PowerStep):
    r"""Orthogonal iteration, :math:`U^+ = P[U X^\top X]`; with one direction, power iteration.

    Each step raises the captured variance; the span tends to that of the leading principal components at the
    rate :math:`\sigma_{p+1}^2 / \sigma_p^2`.
    """

    objective_name = "-captured variance"

    @staticmethod
    def stretch(coordinates: Tensor) -> Tensor:
        return coordinates

    def objective(
        self, z: Float[Tensor, "b p d"], start: Float[Tensor, "b p d"], x: Tensor | None = None
    ) -> Float[Tensor, " b"]:
        return -captured_energy(polar_factor(z), self.samples)


class MSP(PowerStep):
    r"""Matching, stretching and projection (Zhai et al. 2020): :math:`A^+ = P[(A X^\top)^{\circ 3} X]`.

    Match the samples with the atoms, stretch the coordinates by their cubes, project on the orthogonal group.
    Each step raises the l4 norm of the coordinates. Near the dictionary of whitened samples with independent
    codes the error shrinks by three over the codes' kurtosis: by the share of active atoms, if those are
    Gaussian.
    """

    objective_name = "-l4 norm"

    @staticmethod
    def stretch(coordinates: Tensor) -> Tensor:
        return coordinates * coordinates.square()

    def objective(
        self, z: Float[Tensor, "b p d"], start: Float[Tensor, "b p d"], x: Tensor | None = None
    ) -> Float[Tensor, " b"]:
        return -fourth_power(polar_factor(z), self.samples)


def polar_factor(matrix: Float[Tensor, "*b p d"]) -> Float[Tensor, "*b p d"]:
    r"""The nearest matrix with orthonormal rows (columns, where p > d): :math:`A B^\top` of the SVD.

    Of a matrix without full rank it is one of several. At least float32 inside.
    """
    with torch.autocast(matrix.device.type, enabled=False):
        left, _, right = torch.linalg.svd(_at_least_float32(matrix), full_matrices=False)
        return (left @ right).to(matrix.dtype)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
