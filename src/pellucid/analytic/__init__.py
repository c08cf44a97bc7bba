"""Models fitted in closed form or by iteration: scikit-learn estimators on the same objectives and steps."""

from pellucid.analytic.linear import PCA, TiedAutoencoder
from pellucid.analytic.lossy import LossyCodingClustering, covering, gaussian_rate_distortion
from pellucid.analytic.nearest_subspace import NearestSubspace
from pellucid.analytic.redunet import ReduNet

__all__ = [
    "PCA",
    "LossyCodingClustering",
    "NearestSubspace",
    "ReduNet",
    "TiedAutoencoder",
    "covering",
    "gaussian_rate_distortion",
]
