"""A refused step once more, with an eye on every module: where is the first number that is not finite?"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from pellucid.data import StepSampler
from pellucid.errors import CheckpointError, ConfigError, DataError
from pellucid.training.checkpoint import Checkpoint, load_checkpoint, read_checkpoint
from pellucid.training.run import load_material, options_of, set_up


def replay(listed: str | os.PathLike[str], say: Callable[[str], None] = lambda line: None) -> bool:
    """Run the batch that a run has listed in ``bad/step-N.json`` again, on the state before step N.

    Nothing is written. On one device, with all micro-batches one after the other.

    Args:
        listed: that file.
        say: gets what is found, a line at a time.

    Returns:
        Whether a number came out that is not finite.

    Raises:
        ConfigError: not such a file.
        CheckpointError: the state before the step is kept no more.
        DataError: the run's data have changed.
    """
    path = Path(listed)
    step, parts = _read(path)
    out = path.resolve().parent.parent
    config = replace(
        options_of(out), out=str(out), accumulate=parts, exact=0, devices=1, nodes=1, strategy="auto"
    )
    material = load_material(config, resume=True)
    saved = _state_before(out, step)
    setting = set_up(material.resolved(config), material)
    learner = setting.learner
    if "data" in saved.meta and saved.meta["data"] != material.fingerprint:
        raise DataError(f"{config.data} has changed since the run began - restore its files")
    learner.load_tensors(saved.tensors, saved.step)
    device = torch.device("cuda" if config.accelerator != "cpu" and torch.cuda.is_available() else "cpu")
    learner.objective.to(device).train()
    sampler = StepSampler(
        len(material), config.batch_size, config.seed, steps=step, start=step - 1, accumulate=parts
    )
    say(f"step {step} again, from the state after step {saved.step}: {config.batch_size} {material.items}")
    found = False
    autocast = torch.autocast(
        device.type, torch.bfloat16, enabled=config.precision == "bf16", cache_enabled=False
    )
    for micro, batch in enumerate(material.batches(sampler, 0)):
        names = [material.item_name(int(i)) for i in batch[2]]
        moved = tree_map(lambda part: part.to(device), batch)
        with _watched(learner.objective) as seen, autocast:
            values = learner.losses(moved, micro)
        told = [f"{name} {value.item():.4g}" for name, value in values.items()]
        say(f"part {micro + 1} of {parts}: {', '.join(told)}")
        if bad := _not_finite(moved):
            seen.insert(0, f"what goes in: {bad}")
        if not seen and bool(values["loss"].isfinite()):
            with _watched_back(learner.objective, values["loss"], parts) as back:
                seen.extend(back)
        if seen:
            found = True
            say(f"  first not finite: {_with_items(seen[0], names)}")
    if not found:
        say("everything is finite here: it takes another device or precision, or several processes")
    return found


def _read(path: Path) -> tuple[int, int]:
    """Number of the step, from 1, and of the parts that it is cut into."""
    try:
        told = json.loads(path.read_text("utf-8"))
        return int(told["step"]), int(told.get("parts", 1))
    except OSError as error:
        raise ConfigError(f"cannot read {path} ({error.strerror}) - give a run's bad/step-N.json") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} lists no batch - give a run's bad/step-N.json") from error


def _state_before(out: Path, step: int) -> Checkpoint:
    for folder in (out / "bad", out / "checkpoints"):
        saved = read_checkpoint(folder / f"step-{step - 1:08d}")
        if saved is not None:
            return saved
    newest = load_checkpoint(out / "checkpoints")
    kept = f"the newest that is kept is step {newest.step}" if newest else "none is kept"
    raise CheckpointError(f"the state after step {step - 1} of {out} is gone, {kept} - replay a later file")


@contextmanager
def _watched(objective: nn.Module) -> Iterator[list[str]]:
    """The outputs of modules that are not finite, in the order in which they come."""
    seen: list[str] = []
    handles = []
    for name, module in objective.named_modules():

        def look(_: nn.Module, inputs: Any, output: Any, name: str = name) -> None:
            if bad := _not_finite(output):
                seen.append(f"{f'output of {name}' if name else 'the loss itself'}, {bad}")

        handles.append(module.register_forward_hook(look))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _watched_back(objective: nn.Module, loss: Tensor, parts: int) -> Iterator[list[str]]:
    """The gradients that are not finite, in the order in which they come."""
    seen: list[str] = []
    handles = []
    for name, parameter in objective.named_parameters():
        if not parameter.requires_grad:
            continue

        def look(gradient: Tensor, name: str = name) -> None:
            if bad := _not_finite(gradient):
                seen.append(f"gradient of {name}, {bad}")

        handles.append(parameter.register_hook(look))
    try:
        (loss / parts).backward()
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _not_finite(value: Any) -> str:
    """How many numbers of the tensors in ``value`` are NaN or infinite, and in which rows; empty if none."""
    for tensor in tree_leaves(value):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            continue
        bad = ~tensor.detach().isfinite()
        if bool(bad.any()):
            rows = bad.flatten(1).any(1).nonzero().flatten().tolist() if tensor.dim() > 1 else []
            of = f"{int(bad.sum()):,} of {tensor.numel():,} numbers"
            return f"{of}; rows {','.join(map(str, rows[:50]))} of {len(tensor)}" if rows else of
    return ""


def _with_items(found: str, names: list[str]) -> str:
    """Rows by the names of their items, where a row is an item."""
    head, _, rows = found.partition("; rows ")
    numbers, _, count = rows.partition(" of ")
    if not rows or int(count) != len(names) or head.startswith("gradient"):
        return head
    listed = [names[int(i)] for i in numbers.split(",")]
    if len(listed) == len(names):
        return f"{head}; all items"
    return f"{head}; of {', '.join(listed[:5])}{', ...' if len(listed) > 5 else ''}"


__all__ = ["replay"]
