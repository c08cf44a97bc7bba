"""One optimiser step, the same for every loop that drives it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pellucid.errors import NumericsError
from pellucid.training.fixed_sum import Gradients
from pellucid.training.objective import Objective
from pellucid.training.ranks import whole
from pellucid.training.recipe import Average, MuonAdamW, cosine, cosine_with_warmup


class Learner:
    """Everything that a step of training reads and changes.

    A loop calls :meth:`losses` for each micro-batch, sends them backward with :meth:`backward`, and calls
    :meth:`update` once. All randomness is a function of (seed, step, micro-batch), so nothing depends on what
    ran before.

    Args:
        objective: turns a batch into ``{"loss": ..., parts}`` and owns ``model``.
        optimizer: over the objective's parameters.
        total_steps: length of the run, for the schedule.
        warmup: share of the run over which the rate rises.
        clip: largest norm of the gradient; 0 leaves it alone.
        average: decay of the averaged weights; 0 keeps none.
        weight_decay: at the start and at the end of the run; the optimiser's own unless given.
        seed: of dropout and whatever else is random in a step.
        exact: parts that a batch is cut into, over all processes, whose gradients are added in an order that
            does not depend on the number of processes; 0 leaves it to them.
    """

    def __init__(
        self,
        objective: Objective,
        optimizer: MuonAdamW,
        total_steps: int,
        *,
        warmup: float = 0.05,
        clip: float = 0.0,
        average: float = 0.0,
        weight_decay: tuple[float, float] | None = None,
        seed: int = 0,
        exact: int = 0,
    ) -> None:
        self.objective, self.optimizer, self.weight_decay = objective, optimizer, weight_decay
        self.plain = objective  # what measures, and holds the result; a copy where the objective is cut up
        self.model: nn.Module = objective.model
        self.total_steps, self.warmup, self.clip, self.seed = total_steps, warmup, clip, seed
        self.average = Average(self.model, average) if average else None
        self.exact = exact
        self.gradients = Gradients(objective) if exact else None
        self.step = 0
        self.any_rank: Callable[[bool], bool] = lambda flag: flag
        self._finite: Tensor | None = None

    def losses(self, batch: tuple[Any, ...], micro: int) -> dict[str, Tensor]:
        """The objective on one micro-batch ``(images, labels, index)`` of the current step."""
        torch.manual_seed(_mix(self.seed, self.step, micro))
        parts = self.objective(*batch[:2])
        finite = parts["loss"].detach().isfinite()
        self._finite = finite if self._finite is None else self._finite & finite
        return parts

    def backward(self, loss: Tensor, parts: int, run: Callable[[Tensor], Any] = Tensor.backward) -> None:
        """Add the gradient of one of the ``parts`` that this process computes in a step, with ``run``."""
        run(loss / (self.exact or parts))
        if self.gradients is not None:
            self.gradients.take()

    def update(self, apply: Callable[[], Any] | None = None) -> None:
        """Move the parameters along the accumulated gradient.

        Args:
            apply: called in place of ``optimizer.step``, where an engine wraps it.

        Raises:
            NumericsError: the loss or a gradient is not finite, here or on another rank. Parameters,
                optimiser, average and step are as before the call.
        """
        if self.gradients is not None:
            self.gradients.give()
        parameters = [p for p in self.objective.parameters() if p.grad is not None]
        norm = whole(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        finite_loss, self._finite = self._finite, None
        bad_loss = finite_loss is not None and not bool(finite_loss)
        if self.any_rank(bad_loss or not bool(norm.isfinite())):
            self.optimizer.zero_grad(set_to_none=True)
            self.objective.refused_step()
            what = "loss" if bad_loss else "gradient" if not bool(norm.isfinite()) else "loss on another rank"
            raise NumericsError(f"non-finite {what} at step {self.step + 1}")
        if self.clip:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.clip, norm)
        self.optimizer.set_lr(self.lr_factor)
        if self.weight_decay is not None:
            self.optimizer.set_weight_decay(cosine(*self.weight_decay, self.step, self.total_steps))
        (apply or self.optimizer.step)()
        self.optimizer.zero_grad(set_to_none=True)
        self.objective.after_step(self.step, self.total_steps)
        if self.average is not None:
            self.average.update(self.model, self.step)
        self.step += 1

    @property
    def lr_factor(self) -> float:
        return cosine_with_warmup(self.step, self.total_steps, self.warmup)

    def final_weights(self) -> Mapping[str, Tensor]:
        """What the run hands over: the averaged weights where there are any."""
        return self.objective.handed_over() if self.average is None else self.average.weights

    @contextmanager
    def measured(self, keep: bool = True) -> Iterator[tuple[Objective, Mapping[str, Tensor]]]:
        """An objective to measure with, and the weights of its model that the run would hand over now.

        Every process of a run asks; one that does not ``keep`` them only helps to put them together.
        """
        if self.plain is self.objective:
            yield self.objective, self.final_weights()
            return
        state = _put_together(self.objective.state_dict(), keep)
        average = None if self.average is None else _put_together(self.average.weights, keep)
        if keep:
            self.plain.load_state_dict(state)
            self.plain.to(next(self.objective.parameters()).device)
        yield self.plain, self.plain.handed_over() if average is None else average
        self.plain.cpu()

    def follow_model(self) -> None:
        """Bring the optimiser's state and the average to the device that the model has moved to."""
        self.optimizer.load_tensors(self.optimizer.tensors())
        if self.average is not None:
            self.average.to_device_of(self.model)

    def tensors(self) -> dict[str, Tensor]:
        """All state as named tensors."""
        state = {f"objective/{name}": value for name, value in self.objective.state_dict().items()}
        state |= {f"optimizer/{name}": value for name, value in self.optimizer.tensors().items()}
        if self.average is not None:
            state |= {f"average/{name}": value for name, value in self.average.weights.items()}
        return state

    def whole_tensors(self, keep: bool = True) -> dict[str, Tensor]:
        """As :meth:`tensors`, put together where they are cut up, for a process that is to ``keep`` them."""
        return self.tensors() if self.plain is self.objective else _put_together(self.tensors(), keep)

    def load_tensors(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """The inverse of :meth:`tensors`."""
        parts: dict[str, dict[str, Tensor]] = {"objective": {}, "optimizer": {}, "average": {}}
        for key, value in tensors.items():
            part, name = key.split("/", 1)
            parts[part][name] = value
        self.objective.load_state_dict(parts["objective"])
        self.optimizer.load_tensors(parts["optimizer"])
        if self.average is not None:
            for name, value in parts["average"].items():
                self.average.weights[name].copy_(value)
        self.step = step


def _put_together(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Whole tensors on the CPU, one after the other; every process takes part."""
    found = {}
    for name, value in tensors.items():
        together = whole(value.detach())
        if keep:
            found[name] = together.cpu()
    return found


def _mix(seed: int, step: int, micro: int) -> int:
    """A 63-bit seed that differs for every (seed, step, micro-batch) in reach."""
    return (seed * 1_000_003 + step * 8_191 + micro) * 2_654_435_761 % (1 << 63)
