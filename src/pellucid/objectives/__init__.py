"""What is optimised: pure functions from tokens to one number per sample. Imports torch only.

Tokens are rows. ``z`` has shape ``(..., n, d)``: n tokens of width d; leading dimensions are a batch and are
kept. The papers write tokens as columns, so their ``Z`` is our ``z.mT``. Rates are in nats, carry the 1/2,
and ``eps`` is the distortion itself, not its square.
"""

from pellucid.objectives.coding_rate import (
    class_coding_rate,
    coding_rate,
    effective_rank,
    local_coding_rate,
    nats_to_bits,
    prefix_coding_rate,
    prefix_variational_coding_rate,
    rate_ceiling,
    rate_reduction,
    sparse_rate_reduction,
    subspace_coding_rate,
    subspace_overlap,
    variational_coding_rate,
)
from pellucid.objectives.denoising import (
    VE,
    VP,
    Flow,
    Schedule,
    add_noise,
    denoising_loss,
    entropy_slope,
    gaussian_entropy,
    gaussian_entropy_slope,
    make_schedule,
    score_from_denoised,
    tweedie,
)
from pellucid.objectives.projection import captured_energy, fourth_power
from pellucid.objectives.reconstruction import (
    lasso,
    lasso_gap,
    masked_error,
    nonnegative_lasso,
    nonzero_fraction,
    squared_error,
)
from pellucid.objectives.self_distillation import dino, masked_alignment, simdino

__all__ = [
    "VE",
    "VP",
    "Flow",
    "Schedule",
    "add_noise",
    "captured_energy",
    "class_coding_rate",
    "coding_rate",
    "denoising_loss",
    "dino",
    "effective_rank",
    "entropy_slope",
    "fourth_power",
    "gaussian_entropy",
    "gaussian_entropy_slope",
    "lasso",
    "lasso_gap",
    "local_coding_rate",
    "make_schedule",
    "masked_alignment",
    "masked_error",
    "nats_to_bits",
    "nonnegative_lasso",
    "nonzero_fraction",
    "prefix_coding_rate",
    "prefix_variational_coding_rate",
    "rate_ceiling",
    "rate_reduction",
    "score_from_denoised",
    "simdino",
    "sparse_rate_reduction",
    "squared_error",
    "subspace_coding_rate",
    "subspace_overlap",
    "tweedie",
    "variational_coding_rate",
]
