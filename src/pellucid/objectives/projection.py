r"""How samples lie along a few orthonormal directions: how much of them is there, and how spiky it is.

Samples are rows ``X (N, d)``, directions are rows ``U (..., p, d)``, and ``X U^T`` are the coordinates. Both
functions are convex in U, so that on orthonormal directions each is raised by following its own slope
(:mod:`pellucid.steps.power`).
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def captured_energy(U: Float[Tensor, "*b p d"], samples: Float[Tensor, "N d"]) -> Float[Tensor, "*b"]:
    r"""Half the squared length of all coordinates, :math:`\tfrac12\|X U^\top\|_F^2`; PCA raises it.

    For orthonormal directions, half the energy of the samples minus the error that is left by projecting on
    them.

    Raises:
        ValueError: shapes that do not fit, naming both.
    """
    return 0.5 * _coordinates(U, samples).square().sum((-2, -1))


def fourth_power(U: Float[Tensor, "*b p d"], samples: Float[Tensor, "N d"]) -> Float[Tensor, "*b"]:
    r""":math:`\tfrac14\|X U^\top\|_4^4`: large where coordinates of one total energy are few and large.

    Over rotations of whitened samples it is largest where the rows of U are the atoms of a complete sparse
    model (Zhai et al. 2020, "Complete Dictionary Learning via l4-Norm Maximization over the Orthogonal
    Group").

    Raises:
        ValueError: shapes that do not fit, naming both.
    """
    return 0.25 * _coordinates(U, samples).square().square().sum((-2, -1))


def _coordinates(U: Tensor, samples: Tensor) -> Tensor:
    if samples.dim() != 2 or U.dim() < 2 or U.shape[-1] != samples.shape[1]:
        raise ValueError(
            f"directions {tuple(U.shape)} and samples {tuple(samples.shape)} do not fit: expected "
            f"(..., p, d) and (N, d)"
        )
    return samples @ U.mT
