"""One pass through a model with an eye on every step, white box or not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from pellucid.errors import ConfigError
from pellucid.steps import Step, StepRecord


@dataclass(frozen=True, slots=True)
class Sighting:
    """Tokens after one step of any model.

    Attributes:
        layer: from 1.
        name: ``compress`` and ``sparsify`` in CRATE, ``attention`` and ``mlp`` in a ViT.
        tokens: after the step, ``(b, n, d)``.
        record: the step itself, where the model has steps.
    """

    layer: int
    name: str
    tokens: Tensor
    record: StepRecord | None = None


class Text(Protocol):
    """A batch of text. A target below zero does not count."""

    @property
    def ids(self) -> Int[Tensor, "b n"]:
        """What the model reads."""

    @property
    def targets(self) -> Int[Tensor, "b n"]:
        """What it has to tell at each place."""

    @property
    def real(self) -> Bool[Tensor, "b n"]:
        """Which words are no padding."""


def has_steps(model: nn.Module) -> bool:
    """Whether the model is made of steps, white or black."""
    return any(isinstance(module, Step) for module in model.modules())


def is_white_box(model: nn.Module) -> bool:
    """Whether some step of the model states an objective."""
    return any(isinstance(m, Step) and m.objective_name is not None for m in model.modules())


@torch.no_grad()
def watch(model: Any, inputs: Tensor | Text, see: Callable[[Sighting], None]) -> Tensor:
    """The model's features of ``inputs``; ``see`` is called after every step.

    Args:
        model: made of steps, or a timm ViT.
        inputs: images; for language models a batch of text, or words by their numbers ``(b, n)``.
        see: gets what is there to see. Of texts that are padded the record says which tokens count.

    Raises:
        ConfigError: a model with neither steps nor timm's transformer blocks.
    """
    given = arguments(inputs)
    if has_steps(model):
        return model.forward_features(*given, on_step=lambda r: see(Sighting(r.layer, r.name, r.z_next, r)))
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.Sequential | nn.ModuleList):
        raise _opaque(model)

    def see_tokens(sighting: Sighting) -> None:
        if not isinstance(sighting.tokens, Tensor) or sighting.tokens.dim() != 3:
            raise _opaque(model)
        see(sighting)

    with ExitStack() as hooks:
        for layer, block in enumerate(blocks, start=1):
            for hook in _block_hooks(layer, block, see_tokens):
                hooks.callback(hook.remove)
        return model.forward_features(*given)


def _opaque(model: Any) -> ConfigError:
    return ConfigError(
        f"cannot look inside {type(model).__name__}: it has neither white-box steps nor transformer "
        f"blocks - take CRATE or a timm ViT"
    )


def _block_hooks(layer: int, block: Any, see: Callable[[Sighting], None]) -> Iterator[Any]:
    """After attention the tokens are what the second norm receives; after the MLP, what the block returns.

    timm's blocks that normalise behind the residual branch give ``norm2`` the MLP's output, not the tokens.
    """
    if hasattr(block, "norm2") and not type(block).__name__.startswith("ResPost"):
        yield block.norm2.register_forward_pre_hook(
            lambda module, args: see(Sighting(layer, "attention", args[0]))
        )
    yield block.register_forward_hook(lambda module, args, out: see(Sighting(layer, "mlp", out)))


def arguments(inputs: Tensor | Text) -> tuple[Tensor, ...]:
    """What the model is called with: images or words, and where some are padding which are not."""
    if isinstance(inputs, Tensor):
        return (inputs,)
    return (inputs.ids,) if bool(inputs.real.all()) else (inputs.ids, inputs.real)


def inputs_of(batch: Any, device: torch.device) -> Tensor | Text:
    """What the model reads in a batch: that itself, or a tuple that begins with it."""
    inputs = batch if isinstance(batch, Tensor) or hasattr(batch, "ids") else batch[0]
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    return type(inputs)(*(part.to(device) for part in inputs))


def input_batches(
    batches: Iterable[Any], device: torch.device, limit: int | None = None
) -> Iterator[Tensor | Text]:
    """What the model reads in ``batches``, ``limit`` rows of it at most."""
    seen = 0
    for batch in batches:
        inputs: Any = inputs_of(batch, device)
        rows = len(arguments(inputs)[0])
        kept = rows if limit is None else min(rows, limit - seen)
        if kept < rows:
            whole = isinstance(inputs, Tensor)
            inputs = inputs[:kept] if whole else type(inputs)(*(part[:kept] for part in inputs))
        seen += kept
        if kept:
            yield inputs
        if limit is not None and seen >= limit:
            return
