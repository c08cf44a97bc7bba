r"""Does a generator remember its training samples, or does it make new ones?"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pellucid.errors import DataError


def memorisation_ratio(samples: Any, training: Any) -> Any:
    r"""Distance to the nearest training sample over that to the second nearest, for each sample, in 0..1.

    .. math:: \frac{\|x - x_{(1)}\|}{\|x - x_{(2)}\|}

    Near 0 a sample is a copy of one training sample and of no other; near 1 it has as much of two.

    Args:
        samples: ``(n, ...)``, rows or pictures, NumPy or torch.
        training: ``(N, ...)``; what stands in it twice counts once.

    Returns:
        ``(n,)``, of the kind that ``samples`` are.

    Raises:
        DataError: shapes that do not fit, values that are not finite, or fewer than two different training
            samples.
    """
    x, known = (
        torch.as_tensor(np.asarray(a) if not isinstance(a, Tensor) else a) for a in (samples, training)
    )
    if x.dim() < 2 or x.shape[1:] != known.shape[1:]:
        raise DataError(f"samples {tuple(x.shape)} and training samples {tuple(known.shape)} do not fit")
    x, known = (a.detach().double().flatten(1).to(x.device) for a in (x, known))
    if not (x.isfinite().all() and known.isfinite().all()):
        raise DataError("samples or training samples hold NaN or infinity - remove those rows")
    known = known.unique(dim=0)
    if len(known) < 2:
        raise DataError("the ratio needs at least two different training samples")
    # Without products, which lose small distances between large numbers.
    distances = torch.cdist(x, known, compute_mode="donot_use_mm_for_euclid_dist")
    nearest, second = distances.topk(2, largest=False).values.unbind(-1)
    ratio = nearest / second
    return ratio if isinstance(samples, Tensor) else ratio.cpu().numpy()


def memorised_share(samples: Any, training: Any, threshold: float = 1 / 3) -> float:
    """Share of the samples that are memorised: their :func:`memorisation_ratio` is below ``threshold``.

    A third is the usual threshold for small pictures compared pixel by pixel (Yoon et al. 2023). Samples of
    the data itself that were not trained on say what share to expect from a generator that remembers nothing.
    """
    ratio = memorisation_ratio(samples, training)
    return float((ratio < threshold).sum()) / len(ratio)
