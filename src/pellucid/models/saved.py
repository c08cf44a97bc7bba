"""Models on disk: a folder with ``config.json`` and ``model.safetensors``, in timm's layout.

``timm.create_model("local-dir:FOLDER", pretrained=True)`` and transformers'
``AutoModelForImageClassification.from_pretrained(FOLDER)`` read it too, once ``pellucid.models`` is imported.
Language models have the same two files, with fewer entries, and their tokenizer's. Nothing is ever unpickled,
and a name from a file only ever selects from timm's registry and from our own.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from pellucid.errors import CheckpointError, suggest
from pellucid.models.create import create_model, list_models, some_models
from pellucid.models.language import MODELS, LanguageModel
from pellucid.regular import open_regular, read_json

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"

_SOURCE = ("url", "hf_hub_id", "architecture", "tag", "custom_load")
"""Where timm's published weights of an architecture come from: not where these come from."""

_NOT_SIZES = {"name", "model_name", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay"}
_NOT_SIZES |= {"checkpoint_path", "cache_dir"}
"""Arguments of ``timm.create_model`` that read other files; a config may not."""

SLACK_TENSORS, SLACK_NUMBERS, SLACK_SIZE = 1_000, 10_000_000, 1_000_000
"""What a config may describe beyond four times what its weights hold, before it is refused unbuilt. Below
that the model is built, on no device, and what does not fit is listed name by name."""

MAX_SIDE = 16_384
"""Pixels of an image that a saved model may ask for."""


def describe_model(
    model: Any,
    weights: Mapping[str, Tensor],
    *,
    class_names: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
    img_size: tuple[int, int],
    in_chans: int,
) -> dict[str, Any]:
    """The ``config.json`` of a model made by :func:`~pellucid.models.create.create_model`.

    ``num_classes`` stands beside ``model_args`` and not in it: transformers passes both to timm.
    """
    arguments = {k: v for k, v in model.model_args.items() if k not in ("num_classes", "in_chans")}
    cfg = {k: v for k, v in model.pretrained_cfg.items() if v is not None and k not in _SOURCE}
    cfg |= {
        "num_classes": len(class_names),
        "input_size": [in_chans, *img_size],
        "mean": list(mean),
        "std": list(std),
        "label_names": list(class_names),
    }
    return {
        "architecture": model.architecture,
        "num_classes": len(class_names),
        "num_features": model.num_features,
        "global_pool": model.global_pool if isinstance(model.global_pool, str) else "avg",
        "model_args": {**arguments, "in_chans": in_chans},
        "label_names": list(class_names),
        "pretrained_cfg": cfg,
        "num_parameters": sum(value.numel() for value in weights.values()),
    }


def describe_text_model(model: Any, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The ``config.json`` of a language model made by :func:`~pellucid.models.create.create_model`."""
    return {
        "architecture": model.architecture,
        "model_args": dict(model.model_args),
        "label_names": list(model.label_names),
        "num_parameters": sum(value.numel() for value in weights.values()),
    }


def load(path: str | os.PathLike[str]) -> nn.Module:
    """A trained model, from a run's folder or a ``model/`` folder, in eval mode.

    Class names, mean and std of a model for images are in ``model.pretrained_cfg``; the class names of one
    that classifies text are ``model.label_names``.

    Raises:
        CheckpointError: nothing there, an unknown architecture, a pickle, a damaged file, or weights that
            do not fit the architecture.
    """
    folder = _model_folder(Path(path))
    name, arguments, cfg = _read_config(folder)
    if not isinstance(name, str) or not (name in MODELS or timm.is_model(name)):
        shown = short(name)
        near = suggest(shown, list_models() + list_models("text"), some_models())
        raise CheckpointError(f"{folder}: unknown architecture '{shown}'{near}")
    weights = read_weights(folder / WEIGHTS)
    model = _build(name, arguments, weights, folder / CONFIG)
    load_matched(model, weights, where=str(folder / WEIGHTS))
    if name in MODELS:
        model.label_names = cfg.get("label_names", [])
    else:
        model.pretrained_cfg = {**vars(model)["pretrained_cfg"], **cfg}
    return model.eval()


def tokenizer_of(path: str | os.PathLike[str]) -> Path | None:
    """The tokenizer's file of a run or a ``model/`` folder, where there is one."""
    places = (Path(path) / "model" / TOKENIZER, Path(path) / TOKENIZER)
    return next((place for place in places if place.is_file()), None)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, and of nothing else."""
    try:
        with open_regular(path) as file:
            magic = file.read(9)
        # A safetensors file begins with the length of its header, which may look like a pickle's first bytes.
        pickled = magic[8:] != b"{" and (
            magic[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05") or magic[:4] == b"PK\x03\x04"
        )
        if not pickled:
            return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is damaged or not a safetensors file ({short(error)}) - get it again"
        ) from error
    except (ValueError, RuntimeError, MemoryError, OverflowError) as error:  # of torch, of shapes and strides
        raise CheckpointError(
            f"{path} holds no tensors that can be ({short(error)}) - get it again"
        ) from error
    except OSError as error:
        raise CheckpointError(f"cannot read weights: {path} ({error.strerror or error})") from error
    raise CheckpointError(
        f"refused: {path} is a pickle, which can run code when loaded - use a safetensors file"
    )


def load_matched(model: nn.Module, state: Mapping[str, Tensor], where: str = "the weights") -> None:
    """Load a state dict whose every key, shape and kind of number fits, or list all that do not."""
    expected = model.state_dict()
    missing = sorted(expected.keys() - state.keys())
    unexpected = sorted(state.keys() - expected.keys())
    shapes = [
        f"{key} is {tuple(state[key].shape)}, expected {tuple(expected[key].shape)}"
        for key in sorted(expected.keys() & state.keys())
        if state[key].shape != expected[key].shape
    ]
    kinds = [
        f"{key} is {str(state[key].dtype).removeprefix('torch.')}, expected real numbers"
        for key in sorted(expected.keys() & state.keys())
        if expected[key].is_floating_point() and not state[key].is_floating_point()
    ]
    if missing or unexpected or shapes or kinds:
        lines = [
            f"{title} ({len(items)}): {', '.join(map(short, items[:5]))}{', ...' if len(items) > 5 else ''}"
            for title, items in (
                ("missing", missing),
                ("unexpected", unexpected),
                ("wrong shape", shapes),
                ("wrong type", kinds),
            )
            if items
        ]
        raise CheckpointError(f"{where}: do not fit the model\n" + "\n".join(lines))
    model.load_state_dict(dict(state))


def copy_weights(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    new_head: bool = False,
    class_names: Sequence[str] = (),
) -> None:
    """Start a model from the weights of a saved one: ``--init-from``.

    Args:
        model: to be filled, made by ``create_model``.
        path: a run, a model folder or a ``.safetensors`` file.
        new_head: leave the model's fresh classifier in place of the saved one.
        class_names: what the data call their classes, where the model is to tell them apart.

    Raises:
        CheckpointError: another architecture or class count, naming both and the way on.
    """
    source = Path(path)
    known: Sequence[str] = ()
    sizes = ""
    if source.is_file():
        state = read_weights(source)
    else:
        folder = _model_folder(source)
        saved, arguments, cfg = _read_config(folder)
        if saved != model.architecture:
            saved = short(saved, 60)
            raise CheckpointError(
                f"{path} is {saved}, the run asks for {model.architecture} - give --model {saved}"
            )
        known = cfg.get("label_names") or ()
        sizes = _other_sizes(arguments, vars(model).get("model_args", {}))
        state = read_weights(folder / WEIGHTS)
    head = _head(model)
    if new_head and head is None:
        raise CheckpointError("a language model has no classifier to begin anew - leave out --new-head")
    ours, theirs = model.state_dict(), dict(state)
    names = [key for key in ours if key.startswith(f"{head}.")]
    if new_head:
        if isinstance(model, LanguageModel):  # what told words stands where classes are told now
            theirs = {
                key: value for key, value in theirs.items() if not key.startswith(("head.", f"{head}."))
            }
        theirs |= {key: ours[key] for key in names}
    elif isinstance(model, LanguageModel) and names and not any(key in theirs for key in names):
        raise CheckpointError(f"{path} has no classifier - give --new-head to learn a fresh one")
    for key in names:
        if key in theirs and theirs[key].shape[:1] != ours[key].shape[:1] and theirs[key].dim():
            raise CheckpointError(
                f"{path} knows {len(theirs[key])} classes, the data has {len(ours[key])} - give --new-head "
                f"to learn a fresh classifier, or train on data with the same classes"
            )
    if known and class_names and not new_head and list(known) != list(class_names):
        same = sorted(known) == sorted(class_names)
        raise CheckpointError(
            f"{path} knows {_some(known)}, the data has {_some(class_names)}"
            f"{' in another order' if same else ''} - give --new-head to learn a fresh classifier, or train "
            f"on data with the same classes"
        )
    load_matched(model, theirs, where=f"{path}{sizes}")


def _some(names: Sequence[str]) -> str:
    return f"{len(names)} classes ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


_SIZES = ("embed_dim", "depth", "num_heads", "patch_size", "img_size", "dim_head", "mlp_ratio", "context")


def _other_sizes(saved: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """What two models of one name were told differently about their sizes, and the way on; may be empty."""
    other = [key for key in _SIZES if saved.get(key) != ours.get(key)][:5]
    told = ", ".join(f"{key} {saved.get(key, 'as named')}" for key in other)
    asked = ", ".join(f"{key} {ours.get(key, 'as named')}" for key in other)
    give = " ".join(f"--model-arg {key}={saved[key]}" for key in other if key in saved)
    return f" ({told}; the run asks for {asked} - give {give or 'the same'})" if other else ""


def _head(model: Any) -> str | None:
    """What the classifier is called among the weights."""
    if isinstance(model, LanguageModel):
        return "classifier" if model.classifier is not None else None
    return getattr(model, "pretrained_cfg", {}).get("classifier", "head")


def _read_config(folder: Path) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Architecture, arguments and ``pretrained_cfg`` of a ``config.json``; of text the names of classes."""
    path = folder / CONFIG
    try:
        config = read_json(path)
        name, arguments, cfg = config["architecture"], dict(config["model_args"]), {}
        classes = {}
        if str(name) in MODELS:
            cfg = {"label_names": [str(label) for label in config.get("label_names", [])]}
        else:
            cfg, classes = dict(config["pretrained_cfg"]), {"num_classes": int(config["num_classes"])}
            _refuse_input(cfg)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or short(error)
        raise CheckpointError(f"{path} is not a model's config ({reason}) - save the model again") from error
    foreign = sorted(_NOT_SIZES & arguments.keys())
    if foreign:
        raise CheckpointError(f"refused: {path} sets {', '.join(foreign)} in model_args - remove it")
    return name, {**arguments, **classes}, cfg


def _refuse_input(cfg: Mapping[str, Any]) -> None:
    """What images a saved model asks for goes into arithmetic as it stands: it must be such numbers."""
    size = cfg.get("input_size", [1, 1, 1])
    sides = isinstance(size, list) and len(size) == 3 and all(type(side) is int for side in size)
    if not sides or not all(1 <= side <= MAX_SIDE for side in size):
        raise ValueError(f"input_size is {short(size)}; expected channels, height and width")
    for key in ("mean", "std"):
        numbers = cfg.get(key, [1.0])
        if not isinstance(numbers, list) or not all(
            type(number) in (int, float) and math.isfinite(number) for number in numbers
        ):
            raise ValueError(f"{key} is {short(numbers)}; expected numbers")
    names = cfg.get("label_names")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError("label_names are not names")


def _build(name: str, arguments: dict[str, Any], weights: Mapping[str, Tensor], config: Path) -> Any:
    """The model that a config describes, when it can be that of these weights.

    First without memory, on the device "meta", and with every parameter counted as it is made: sizes from a
    file could otherwise ask for any memory and any number of layers.
    """
    numbers = sum(value.numel() for value in weights.values())
    largest = max(_integers(arguments), default=0)
    if largest > max(numbers, SLACK_SIZE):
        raise CheckpointError(
            f"refused: {config} asks for {short(largest, 20)} of something, and the weights beside it are "
            f"{numbers:,} numbers - save the model again"
        )
    most = 4 * len(weights) + SLACK_TENSORS, 4 * numbers + SLACK_NUMBERS
    try:
        # Some of timm's look at numbers while they are built, which "meta" has none of: a RuntimeError.
        with _counted(*most), contextlib.suppress(RuntimeError), torch.device("meta"):
            create_model(name, **arguments)
        with _counted(*most):
            return create_model(name, **arguments)
    except _TooLarge as error:
        raise CheckpointError(
            f"refused: {config} describes a model of {error}, and the weights beside it are {len(weights):,} "
            f"tensors of {numbers:,} numbers - save the model again"
        ) from None
    except Exception as error:  # whatever a constructor makes of values that were never meant for it
        raise CheckpointError(
            f"{config} does not describe a model ({short(error)}) - save the model again"
        ) from error


class _TooLarge(Exception):
    """Says what a model has more of than its weights."""


@contextlib.contextmanager
def _counted(most_tensors: int, most_numbers: int) -> Iterator[None]:
    """While this lasts, modules that this thread makes may have so many parameters, of so many numbers."""
    tensors = numbers = 0
    here = threading.get_ident()

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal tensors, numbers
        if parameter is None or threading.get_ident() != here:
            return
        tensors, numbers = tensors + 1, numbers + parameter.numel()
        if tensors > most_tensors:
            raise _TooLarge(f"more than {most_tensors:,} tensors")
        if numbers > most_numbers:
            raise _TooLarge(f"more than {most_numbers:,} numbers")

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def _integers(value: Any) -> Iterator[int]:
    """Every integer in what JSON gives, as a size."""
    if isinstance(value, int):
        yield abs(value)
    elif isinstance(value, Mapping | list):
        inside: Iterable[Any] = value.values() if isinstance(value, Mapping) else value
        for item in inside:
            yield from _integers(item)


def short(value: Any, most: int = 160) -> str:
    """A value or an error from a file, in one printable line that a message can take."""
    try:
        text = str(value) or type(value).__name__
    except (ValueError, RecursionError):  # an integer of thousands of digits, a list of lists of lists
        text = type(value).__name__
    line = "".join(c if c.isprintable() else "?" for c in " ".join(text[: 4 * most].split()))
    return line if len(line) <= most else line[: most - 3] + "..."


def _model_folder(path: Path) -> Path:
    for folder in (path / "model", path):
        if (folder / CONFIG).is_file():
            return folder
    if path.is_file():
        raise CheckpointError(f"{path} is a file; expected a run's folder or its model/ folder")
    if (path / "checkpoints").is_dir():
        raise CheckpointError(f"{path} holds a run that has not ended - finish it with --resume")
    what = "holds no model" if path.exists() else "does not exist"
    raise CheckpointError(f"{path} {what}; expected a run's folder or a folder with {CONFIG} and {WEIGHTS}")
