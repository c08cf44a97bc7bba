"""Models fitted in closed form or by iteration: scikit-learn estimators on the same objectives and steps."""

from pellucid.analytic.denoisers import Empirical, GaussianMixture, Sphere, SubspaceMixture
from pellucid.analytic.diffusion import Diffusion
from pellucid.analytic.linear import PCA, TiedAutoencoder
from pellucid.analytic.lossy import LossyCodingClustering, covering, gaussian_rate_distortion
from pellucid.analytic.memorisation import memorisation_ratio, memorised_share
from pellucid.analytic.nearest_subspace import NearestSubspace
from pellucid.analytic.redunet import ReduNet

__all__ = [
    "PCA",
    "Diffusion",
    "Empirical",
    "GaussianMixture",
    "LossyCodingClustering",
    "NearestSubspace",
    "ReduNet",
    "Sphere",
    "SubspaceMixture",
    "TiedAutoencoder",
    "covering",
    "gaussian_rate_distortion",
    "memorisation_ratio",
    "memorised_share",
]
