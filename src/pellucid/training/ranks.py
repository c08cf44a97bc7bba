"""What the processes of a run know of each other and tell each other. Alone, each tensor stays as it is."""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch import distributed as dist


def world() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number among them, also before they have met.

    Told by torchrun or SLURM where one of them started it, else by lightning, whose own launcher numbers the
    processes of one machine only: until they have met, one that is not the first of all is 1 or more.
    """
    if world() > 1:
        return dist.get_rank()
    told = os.environ
    launcher = _launcher()
    if launcher is not None:
        return int(told[launcher[0]])
    return int(told.get("NODE_RANK", told.get("GROUP_RANK", 0))) + int(told.get("LOCAL_RANK", 0))


def launched() -> int | None:
    """How many processes torchrun or SLURM started; None where neither did."""
    launcher = _launcher()
    return None if launcher is None else int(os.environ[launcher[1]])


def _launcher() -> tuple[str, str] | None:
    """Where it says a process's number, and how many there are. As lightning recognises them."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "RANK", "WORLD_SIZE"
    if "SLURM_NTASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        return "SLURM_PROCID", "SLURM_NTASKS"
    return None


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


def whole(value: Tensor) -> Tensor:
    """All of a tensor whose rows lie with several processes, each of which has to ask."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def local(value: Tensor) -> Tensor:
    """This process's rows of such a tensor, in its own storage."""
    return value.to_local() if hasattr(value, "to_local") else value


def own_rows(value: Tensor, like: Tensor) -> Tensor:
    """The rows of a whole tensor that this process holds of ``like``, which is cut over processes."""
    rows = value.chunk(world())
    return rows[rank()] if rank() < len(rows) else value[:0]
