"""Weights, gradients and the optimiser's state cut by rows over processes (FSDP2), layer by layer."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from pellucid.training.learner import Learner

LAYERS = ("layers", "decoder_layers", "blocks")
"""Where our models and timm's transformers keep what is called one after the other."""


def shard(learner: Learner, device: torch.device) -> None:
    """Leave with each process its rows of what a learner holds: student, teacher, heads, state, average.

    A layer is put together when it is called, in either direction, and taken apart again; what lies around
    the layers stays together through a step. A model without a list of layers is one piece. What a run holds
    already, as after a checkpoint, is cut like the rest.
    """
    objective = learner.objective
    learner.plain = copy.deepcopy(objective)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    # What no gradient moves is written in whole, as MCR2's classifier. Teachers move as their students do.
    kept = {parameter for parameter in objective.model.parameters() if not parameter.requires_grad}
    before = dict(objective.named_parameters())
    objective.register_forward_pre_hook(_same_buffers)
    for module in [*_layers(objective), objective]:
        fully_shard(module, mesh=mesh, ignored_params=kept)
    objective.to(device)
    after = dict(objective.named_parameters())
    learner.optimizer.replace({before[name]: after[name] for name in before})
    learner.optimizer.map_state(lambda parameter, value: _cut_like(parameter, value, mesh))
    if learner.average is not None:
        now = learner.model.state_dict()
        average = learner.average.weights
        learner.average.weights = {name: _cut_like(now[name], average[name], mesh) for name in average}


def _layers(objective: nn.Module) -> Iterator[nn.Module]:
    for name, module in objective.named_modules():
        if name.rpartition(".")[-1] in LAYERS and isinstance(module, nn.ModuleList | nn.Sequential):
            yield from module


def _cut_like(model: Tensor, value: Tensor, mesh: DeviceMesh) -> Tensor:
    """``value`` cut as ``model`` is, where they have the same shape; AdamW's step counter has not."""
    if not hasattr(model, "full_tensor") or value.shape != model.shape:
        return value
    value = value.to(model.device)
    return distribute_tensor(value, mesh, [Shard(0)], src_data_rank=None)


def _same_buffers(objective: nn.Module, arguments: Any) -> None:
    """The first process's, as in DDP: running moments of a BatchNorm are those of a process's own images."""
    if objective.training and torch.is_grad_enabled():
        for buffer in objective.buffers():
            dist.broadcast(buffer, 0)
