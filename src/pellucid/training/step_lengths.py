"""How long ISTA's step is beside what its dictionary allows.

Up to 1 in units of 1/||D||^2 a step minimises a bound from above; below 2 the LASSO still cannot rise from a
feasible start; from 2 on nothing is promised. The step is a constant of the architecture, and training moves
the dictionary.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pellucid.steps import ISTA, StrictISTA
from pellucid.steps.ista import squared_norm

SAFE, LIMIT = 1.0, 2.0

LONGEST, OF_A_LAYER = "longest ISTA step", "ISTA step, "
"""What the log calls the longest of a model, and, with the layer's name behind it, each."""


def step_lengths(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, float]:
    """Name -> eta ||D||^2 of every ISTA step of ``model`` whose length is fixed, with these weights.

    A step that chooses its length by its dictionary is left out, and one whose dictionary is not finite.
    """
    found = {}
    for name, step in model.named_modules():
        if isinstance(step, ISTA) and not isinstance(step, StrictISTA):
            dictionary = weights[f"{name}.dictionary"].cpu()
            if torch.isfinite(dictionary).all():
                found[name.removesuffix(".coder")] = step.step_size * squared_norm(dictionary)
    return found
