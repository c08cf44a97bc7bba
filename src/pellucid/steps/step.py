"""The one abstraction: a step lowers an objective, and a network is steps unrolled."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from pellucid.steps.memory import Memory


class Step(nn.Module, ABC):
    """One update of the tokens, together with the objective that it was derived from.

    A subclass says how it moves (:meth:`forward`), what that should lower (:meth:`objective`) and how far
    it may go (:meth:`max_step_size`). ``enter`` is the change of variable at the step's door, such as the
    normalisation that precedes ISTA in CRATE: :func:`unroll` applies it, and the step sees only its result.

    Attributes:
        objective_name: what :meth:`objective` measures, as the audit prints it; None for a step that was
            derived from nothing, such as an MLP.
        step_size: how far along its direction the step goes.
        sees: which tokens decide where one goes: ``"all"`` of them, in its ``"past"`` (itself included), or
            ``"itself"`` alone. A batch with padding is handed to the first with ``real=``, a mask of the
            tokens that count; the second can ``resume``; to the third every token is a batch of its own.
    """

    objective_name: str | None
    step_size: float
    sees: Literal["all", "past", "itself"] = "all"

    def __init__(self, enter: nn.Module | None = None) -> None:
        super().__init__()
        self.enter = nn.Identity() if enter is None else enter

    @abstractmethod
    def forward(self, z: Float[Tensor, "b n d"], x: Tensor | None = None) -> Float[Tensor, "b n d"]:
        """The tokens after the step. ``x`` is what stays fixed while ``z`` moves, such as the signal."""

    @abstractmethod
    def objective(
        self, z: Float[Tensor, "b n d"], start: Float[Tensor, "b n d"], x: Tensor | None = None
    ) -> Float[Tensor, " b"]:
        """Value at ``z`` of what this step lowers when it is started at ``start``. One number per sample."""

    def before_and_after(
        self, z: Float[Tensor, "b n d"], z_next: Float[Tensor, "b n d"], x: Tensor | None = None
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """The objective on either side of the step that took ``z`` to ``z_next``."""
        return self.objective(z, z, x), self.objective(z_next, z, x)

    def max_step_size(self, num_tokens: int | None = None) -> float | None:
        """The objective is guaranteed not to rise below this step size; None where it is only measured."""
        return None

    def resume(self, z: Float[Tensor, "b n d"], state: Any, memory: Memory) -> tuple[Tensor, Any]:
        """The tokens that arrive, moved as among all so far, and what to keep of them. Causal steps only.

        Args:
            z: tokens that arrive, at ``memory.places``.
            state: what the last call gave back; None before the first.
            memory: lengths and places.
        """
        raise TypeError(f"{type(self).__name__} sees tokens that are still to come - it cannot be resumed")


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What :func:`unroll` saw at one step: ``step(z, x) == z_next``, without padding or a memory.

    Attributes:
        layer: from 1.
        name: the step's name in its layer, ``compress`` or ``sparsify`` in CRATE.
        z: tokens as the step received them (after ``step.enter``).
        z_next: tokens after the step.
        x: what stayed fixed.
        real: which tokens are no padding; None where all are.

    ``pellucid.measure.run_with_cache`` gives the same by TransformerLens's names, where layers count from 0:

    =====================================  ==========================================================
    in a record                            in the cache, ``l = layer - 1``
    =====================================  ==========================================================
    ``compress``: ``z``                    ``blocks.{l}.hook_resid_pre``
    ``step.project(z)``                    ``blocks.{l}.attn.hook_q``, query, key and value in one
    ``step.attention(z)``                  ``blocks.{l}.attn.hook_pattern``
    ``compress``: ``z_next``               ``blocks.{l}.hook_resid_mid``
    ``sparsify``: its code                 ``blocks.{l}.mlp.hook_post``
    ``sparsify``: ``z_next``               ``blocks.{l}.hook_resid_post``
    =====================================  ==========================================================
    """

    layer: int
    name: str
    step: Step
    z: Tensor
    z_next: Tensor
    x: Tensor | None
    real: Tensor | None = None

    def before_and_after(self) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """The step's objective on either side of it; of each sample over its real tokens alone."""
        if self.real is None:
            return self.step.before_and_after(self.z, self.z_next, self.x)
        before, after = [], []
        for i, keep in enumerate(self.real):
            x = None if self.x is None else self.x[i : i + 1, keep]
            pair = self.step.before_and_after(self.z[i : i + 1, keep], self.z_next[i : i + 1, keep], x)
            before.append(pair[0])
            after.append(pair[1])
        return torch.cat(before), torch.cat(after)


def full_precision(tensor: Tensor) -> AbstractContextManager[object]:
    """No autocast for what is computed from ``tensor``; the meta device knows of none."""
    kind = tensor.device.type
    return nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)


OnStep = Callable[[StepRecord], None]


class Layer(nn.ModuleDict):
    """Named steps in order. Called as one module, so that whatever hangs on a call meets a whole layer."""

    def forward(
        self,
        z: Float[Tensor, "b n d"],
        x: Tensor | None = None,
        on_step: OnStep | None = None,
        index: int = 1,
        real: Bool[Tensor, "b n"] | None = None,
        memory: Memory | None = None,
    ) -> Float[Tensor, "b n d"]:
        """The tokens after all steps; as layer ``index`` in the records that ``on_step`` sees."""
        steps = cast("Iterable[tuple[str, Step]]", self.items())
        return _run_steps(index, steps, z, x, on_step, real, memory)


def unroll(
    layers: Iterable[nn.Module | Mapping[str, Step]],
    z: Float[Tensor, "b n d"],
    x: Tensor | None = None,
    on_step: OnStep | None = None,
    *,
    checkpoint: bool | Callable[..., Tensor] = False,
    real: Bool[Tensor, "b n"] | None = None,
    memory: Memory | None = None,
) -> Float[Tensor, "b n d"]:
    """Run the steps of all layers in order. The only loop over layers in the library.

    A network is ``unroll`` with other parameters in each layer; a solver is ``unroll`` with one step many
    times: ``unroll([ista] * 100, z0, x)``.

    Args:
        layers: each a step, or named steps in order (a :class:`Layer` or a dict).
        z: tokens to start from.
        x: handed to every step unchanged.
        on_step: called with a :class:`StepRecord` after every step. Costs nothing when absent.
        checkpoint: recompute each layer in the backward pass in place of keeping its activations; or what
            does so, called with a function and its arguments. Not combined with ``on_step``, which would be
            called twice.
        real: which tokens are no padding. Steps in which all tokens meet leave out the others; what becomes
            of those does not matter.
        memory: ``z`` follows the tokens that causal steps remember here, and is remembered in turn.
    """
    again = checkpoint if callable(checkpoint) else partial(recompute, use_reentrant=False)
    for index, layer in enumerate(layers, start=1):
        if checkpoint and on_step is None:
            z = again(_run_layer, index, layer, z, x, None, real)
        else:
            z = _run_layer(index, layer, z, x, on_step, real, memory)
    return z


def _run_layer(
    index: int,
    layer: nn.Module | Mapping[str, Step],
    z: Tensor,
    x: Tensor | None,
    on_step: OnStep | None,
    real: Tensor | None = None,
    memory: Memory | None = None,
) -> Tensor:
    if isinstance(layer, Layer):
        return layer(z, x, on_step, index, real, memory)
    if isinstance(layer, Step):
        layer = {type(layer).__name__.lower(): layer}
    return _run_steps(index, cast("Mapping[str, Step]", layer).items(), z, x, on_step, real, memory)


def _run_steps(
    index: int,
    steps: Iterable[tuple[str, Step]],
    z: Tensor,
    x: Tensor | None,
    on_step: OnStep | None,
    real: Tensor | None,
    memory: Memory | None,
) -> Tensor:
    for name, step in steps:
        z = step.enter(z)
        if memory is not None and step.sees != "itself":
            z_next, memory.states[index, name] = step.resume(z, memory.states.get((index, name)), memory)
        elif real is not None and step.sees == "all":
            z_next = step(z, x, real=real)
        else:
            z_next = step(z, x)
        if on_step is not None:
            on_step(StepRecord(index, name, step, z, z_next, x, real))
        z = z_next
    return z
