"""Sums that do not depend on how many processes share the work, to the last bit.

Addition rounds, so a sum depends on its order. Part ``m`` of a batch is computed by process ``m`` modulo
their number, and parts are added as a binary tree that splits them by their lowest bit first. A process then
holds a whole branch of the tree, whatever power of two their number is, and the tree's top is left to add.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch import distributed as dist

from pellucid.training.ranks import world


def in_pairs(parts: Sequence[Tensor]) -> Tensor:
    """The sum of those with an even number plus that of those with an odd one, each added in the same way."""
    return parts[0] if len(parts) == 1 else in_pairs(parts[::2]) + in_pairs(parts[1::2])


def fixed_sum(parts: Sequence[Tensor]) -> Tensor:
    """Of this process's parts and all others': the same bits for 1, 2, 4, ... processes."""
    branch = in_pairs(parts)
    if world() == 1:
        return branch
    branches = [torch.empty_like(branch) for _ in range(world())]
    dist.all_gather(branches, branch.contiguous())
    return in_pairs(branches)


class Gradients:
    """Puts the gradients of a batch's parts aside and adds them up in the end.

    It holds one set of gradients for each part of this process.
    """

    def __init__(self, module: nn.Module) -> None:
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.parts: list[list[Tensor | None]] = []

    def take(self) -> None:
        """Of one part, whose backward pass has just ended."""
        self.parts.append([p.grad for p in self.parameters])
        for p in self.parameters:
            p.grad = None

    def give(self) -> None:
        """The sums, in place of the parameters' gradients. Every process takes part."""
        for p, grads in zip(self.parameters, zip(*self.parts, strict=True), strict=True):
            # A parameter that no part has used has none on any process: all compute the same function.
            if any(grad is not None for grad in grads):
                p.grad = fixed_sum([torch.zeros_like(p) if grad is None else grad for grad in grads])
        self.parts = []
