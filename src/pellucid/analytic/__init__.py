"""Models fitted in closed form or by iteration: scikit-learn estimators on the same objectives and steps."""

from pellucid.analytic.denoisers import Empirical, GaussianMixture, Sphere, SubspaceMixture
from pellucid.analytic.dictionary import CompleteDictionary, OvercompleteDictionary, matched_cosines
from pellucid.analytic.diffusion import Diffusion
from pellucid.analytic.linear import PCA, TiedAutoencoder
from pellucid.analytic.lista import LISTA
from pellucid.analytic.lossy import LossyCodingClustering, covering, gaussian_rate_distortion
from pellucid.analytic.memorisation import memorisation_ratio, memorised_share
from pellucid.analytic.nearest_neighbours import NearestNeighbours
from pellucid.analytic.nearest_subspace import NearestSubspace
from pellucid.analytic.redunet import ReduNet
from pellucid.analytic.sparse_coding import SparseCoder, SparseCodes, sparse_code

__all__ = [
    "LISTA",
    "PCA",
    "CompleteDictionary",
    "Diffusion",
    "Empirical",
    "GaussianMixture",
    "LossyCodingClustering",
    "NearestNeighbours",
    "NearestSubspace",
    "OvercompleteDictionary",
    "ReduNet",
    "SparseCoder",
    "SparseCodes",
    "Sphere",
    "SubspaceMixture",
    "TiedAutoencoder",
    "covering",
    "gaussian_rate_distortion",
    "matched_cosines",
    "memorisation_ratio",
    "memorised_share",
    "sparse_code",
]
