"""What the processes of a run tell each other. Alone, each of these is the identity."""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist


def world() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gathered(part: Tensor, dim: int = 0) -> Tensor:
    """Every process's part along ``dim``, in the order of ranks.

    The gradient goes back to whom a part came from, summed over processes, all of which compute the same
    loss; data parallelism takes the mean over them, which makes it the gradient of that one loss.
    """
    if world() == 1:
        return part
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(part.contiguous()), dim)


def averaged(value: Tensor) -> Tensor:
    """The mean over processes."""
    if world() > 1:
        dist.all_reduce(value)
        value /= world()
    return value
