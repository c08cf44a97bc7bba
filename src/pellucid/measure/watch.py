"""One pass through a model with an eye on every step, white box or not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
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


def has_steps(model: nn.Module) -> bool:
    """Whether the model is made of steps, white or black."""
    return any(isinstance(module, Step) for module in model.modules())


def is_white_box(model: nn.Module) -> bool:
    """Whether some step of the model states an objective."""
    return any(isinstance(m, Step) and m.objective_name is not None for m in model.modules())


@torch.no_grad()
def watch(model: Any, images: Tensor, see: Callable[[Sighting], None]) -> Tensor:
    """The model's features of ``images``; ``see`` is called after every step.

    Raises:
        ConfigError: a model with neither steps nor timm's transformer blocks.
    """
    if has_steps(model):
        return model.forward_features(images, on_step=lambda r: see(Sighting(r.layer, r.name, r.z_next, r)))
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
        return model.forward_features(images)


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


def image_batches(batches: Iterable[Any], device: torch.device, limit: int | None = None) -> Iterator[Tensor]:
    """The images of ``batches`` (tensors, or tuples that begin with them), at most ``limit`` of them."""
    seen = 0
    for batch in batches:
        images = batch[0] if isinstance(batch, tuple | list) else batch
        images = images if limit is None else images[: max(0, limit - seen)]
        seen += len(images)
        if len(images):
            yield images.to(device)
        if limit is not None and seen >= limit:
            return
