"""How the parameters of the steps are learnt: which optimiser for which parameter, schedule, averaging.

White-box layers are made of matrices whose columns span subspaces. Muon's update is the nearest orthogonal
matrix to the momentum, so every direction of a subspace moves at the same speed; AdamW has the rest.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from pellucid.training.ranks import local, own_rows, whole


class MuonAdamW(Optimizer):
    """Muon on the matrices of the layers, AdamW on everything else, as one optimiser.

    Args:
        model: sorted by :func:`split_parameters`.
        lr: of AdamW.
        matrix_lr: of Muon, whose updates are scaled to AdamW's root mean square.
        weight_decay: decoupled, on matrices and the classifier; not on vectors, positions and tokens.
        heads: trained beside the model, with AdamW: they face a loss, as a classifier does.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        matrix_lr: float,
        weight_decay: float,
        heads: nn.Module | None = None,
    ) -> None:
        matrices, decayed, plain = split_parameters(model)
        for name, parameter in heads.named_parameters(prefix="heads") if heads is not None else ():
            if parameter.requires_grad:
                (plain if parameter.dim() < 2 else decayed)[name] = parameter
        self.parts: list[Optimizer] = []
        if matrices:
            self.parts.append(
                Muon(
                    matrices.items(),
                    lr=matrix_lr,
                    weight_decay=weight_decay,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
        groups = [
            {"params": list(named.items()), "weight_decay": decay}
            for named, decay in ((decayed, weight_decay), (plain, 0.0))
            if named
        ]
        if groups:
            self.parts.append(AdamW(groups, lr=lr))
        super().__init__([p for part in self.parts for g in part.param_groups for p in g["params"]], {})
        # The parts own the groups; sharing the very dictionaries lets one schedule reach them all.
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        for group in self.param_groups:
            group["peak_lr"] = group["lr"]
            group["decays"] = group["weight_decay"] > 0

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            if isinstance(part, Muon) and any(hasattr(p, "full_tensor") for p in self._parameters(part)):
                _muon_by_rows(part)
            else:
                part.step()
        return loss

    def set_lr(self, factor: float) -> None:
        """Every group's rate to ``factor`` times its peak."""
        for group in self.param_groups:
            group["lr"] = group["peak_lr"] * factor

    def set_weight_decay(self, weight_decay: float) -> None:
        """For whatever decays at all."""
        for group in self.param_groups:
            if group["decays"]:
                group["weight_decay"] = weight_decay

    def replace(self, parameters: Mapping[Tensor, nn.Parameter]) -> None:
        """Go on with others in the place of the parameters, and with their state."""
        for part in self.parts:
            for group in part.param_groups:
                group["params"] = [parameters[p] for p in group["params"]]
            for parameter in list(part.state):
                part.state[parameters[parameter]] = part.state.pop(parameter)

    def map_state(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        """``function(parameter, value)`` in the place of every value of the state."""
        for part in self.parts:
            for parameter, slots in part.state.items():
                part.state[parameter] = {slot: function(parameter, value) for slot, value in slots.items()}

    def tensors(self) -> dict[str, Tensor]:
        """State tensors by ``parameter/slot``, in the optimiser's own storage."""
        return {f"{name}/{slot}": value for name, slot, value in self._slots()}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of :meth:`tensors`, for the same model."""
        known = {
            name: (part, parameter)
            for part in self.parts
            for group in part.param_groups
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
        }
        for key, value in tensors.items():
            name, slot = key.rsplit("/", 1)
            part, parameter = known[name]
            # AdamW keeps its step counter on the CPU, everything else beside the parameter.
            device = value.device if value.dim() == 0 else parameter.device
            part.state[parameter][slot] = value.clone().to(device)

    @staticmethod
    def _parameters(part: Optimizer) -> list[nn.Parameter]:
        return [parameter for group in part.param_groups for parameter in group["params"]]

    def _slots(self) -> Iterator[tuple[str, str, Tensor]]:
        for part in self.parts:
            for group in part.param_groups:
                for name, parameter in zip(group["param_names"], group["params"], strict=True):
                    for slot, value in part.state.get(parameter, {}).items():
                        yield name, slot, value


def _muon_by_rows(muon: Muon) -> None:
    """A step of Muon on matrices that are cut by rows over processes.

    The update is the nearest orthogonal matrix to the *whole* momentum. Iterated on rows, as PyTorch's would
    be, products of bfloat16 numbers are summed in another order, and updates differ; so every
    process gathers each matrix in turn and finds the whole update. Muon without momentum, from zero, with the
    momentum for a gradient, moves by exactly that.
    """
    for group in muon.param_groups:
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = muon.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter.grad)
            momentum = state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
            update = parameter.grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
            moved = nn.Parameter(torch.zeros(parameter.shape, device=parameter.device))
            moved.grad = whole(update)
            settings = {k: group[k] for k in ("lr", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")}
            Muon([moved], momentum=0, nesterov=False, weight_decay=0, **settings).step()
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            local(parameter).add_(own_rows(moved.detach(), parameter))


def split_parameters(model: nn.Module) -> tuple[dict[str, nn.Parameter], ...]:
    """Trainable parameters as (matrices of the layers, others that decay, others that do not).

    The stem and the classifier face pixels and labels, not subspaces: their matrices stay with AdamW. A model
    says which they are through timm's ``group_matcher`` and ``get_classifier``.
    """
    matcher = getattr(model, "group_matcher", None)
    stem = re.compile(matcher()["stem"] if matcher else r"(?!)")
    keep: set[str] = getattr(model, "no_weight_decay", set)()
    head = getattr(model, "get_classifier", nn.Identity)()
    head_parameters = {id(p) for p in head.parameters()} if isinstance(head, nn.Module) else set()
    matrices: dict[str, nn.Parameter] = {}
    decayed: dict[str, nn.Parameter] = {}
    plain: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.dim() < 2 or name in keep:
            plain[name] = parameter
        elif parameter.dim() == 2 and not stem.match(name) and id(parameter) not in head_parameters:
            matrices[name] = parameter
        else:
            decayed[name] = parameter
    return matrices, decayed, plain


def cosine_with_warmup(step: int, total: int, warmup: float = 0.05, final: float = 0.0) -> float:
    """Factor on the peak rate for the update that takes ``step`` to ``step + 1`` of ``total``.

    Rises linearly over the share ``warmup`` of the run, however short, then falls as a half cosine to
    ``final``.
    """
    rise = max(1, round(warmup * total))
    if step < rise:
        return (step + 1) / rise
    progress = (step - rise) / max(1, total - rise)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def cosine(start: float, end: float, step: int, total: int) -> float:
    """From ``start`` at step 0 to ``end`` at ``total``, along half a cosine."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * step / total))


class Average:
    """Exponential moving average of a model's weights, updated once for each optimiser step.

    The decay is held below ``(1 + step) / (10 + step)``, so that a short run does not average its start.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: value.detach().clone() for name, value in model.state_dict().items()}

    def to_device_of(self, model: nn.Module) -> None:
        """Beside the weights that they average."""
        devices = {name: value.device for name, value in model.state_dict().items()}
        self.weights = {name: value.to(devices[name]) for name, value in self.weights.items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            if value.dtype.is_floating_point:
                self.weights[name].lerp_(value, 1 - decay)
            else:
                self.weights[name].copy_(value)
