"""Fitted estimators on disk: a folder with ``estimator.json`` and ``estimator.safetensors``, nothing pickled.

The JSON holds what is no tensor and says where each tensor belongs. A name in it only ever selects from
tables of our own classes, never an import.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor, nn

from pellucid import analytic, steps
from pellucid.analytic.base import Estimator
from pellucid.errors import CheckpointError, ConfigError, PellucidError
from pellucid.regular import read_json, read_regular
from pellucid.steps.kept import Kept

DESCRIPTION = "estimator.json"
TENSORS = "estimator.safetensors"
SCHEMA = 1

_PLAIN = (bool, int, float, str, type(None))


def save_estimator(estimator: Estimator) -> dict[str, bytes]:
    """The two files of a fitted estimator, by name. Tensors come from any device and load on the CPU.

    Raises:
        ConfigError: an option or fitted attribute that is neither number, text, tensor nor a step of ours.
    """
    tensors: dict[str, Tensor] = {}
    options = estimator.get_params(deep=False)
    state = {name: value for name, value in vars(estimator).items() if name not in options}
    description = {
        "schema": SCHEMA,
        "estimator": type(estimator).__name__,
        "options": _encode_all(options, "options", tensors),
        "state": _encode_all(state, "state", tensors),
    }
    return {
        DESCRIPTION: json.dumps(description, indent=1).encode(),
        TENSORS: tensors_to_bytes(tensors, metadata={"format": "pt"}),
    }


def load_estimator(folder: str | os.PathLike[str]) -> Any:
    """A fitted estimator from the folder that :func:`save_estimator`'s files lie in, ready to use.

    Raises:
        CheckpointError: files that are missing, damaged, or do not name an estimator of ours.
    """
    path = Path(folder)
    try:
        description = read_json(path / DESCRIPTION)
        tensors = tensors_from_bytes(read_regular(path / TENSORS))
    except OSError as error:
        raise CheckpointError(
            f"no fitted estimator in {path}: {error.strerror} - give the folder that fit made"
        ) from error
    except (ValueError, SafetensorError) as error:
        raise CheckpointError(f"the estimator in {path} is damaged ({error}) - fit it again") from error
    try:
        if description["schema"] != SCHEMA:
            raise CheckpointError(f"{path} is of another version of this program - fit it again")
        cls = _known(description["estimator"], estimators())
        estimator = cls(**_decode_all(description["options"], tensors))
        vars(estimator).update(_decode_all(description["state"], tensors))
    except (
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        ValueError,
        RuntimeError,
        RecursionError,
    ) as error:
        if isinstance(error, PellucidError):
            raise
        detail = " ".join(str(error).split())[:160]
        raise CheckpointError(
            f"the estimator in {path} is damaged ({type(error).__name__}: {detail}) - fit it again"
        ) from error
    return estimator


def estimators() -> dict[str, type[Estimator]]:
    """Every estimator of the public names, by its own."""
    found = {name: getattr(analytic, name) for name in getattr(analytic, "__all__", ())}
    return {n: c for n, c in found.items() if isinstance(c, type) and issubclass(c, Estimator)}


def modules() -> dict[str, type[nn.Module]]:
    """What a fitted network may be made of."""
    ours = {name: getattr(steps, name) for name in steps.__all__}
    torches = (
        nn.Identity,
        nn.ModuleList,
        nn.ModuleDict,
        nn.Sequential,
        nn.Linear,
        nn.LayerNorm,
        nn.ReLU,
        nn.GELU,
        nn.SiLU,
    )
    found = {**ours, **{cls.__name__: cls for cls in torches}}
    return {n: c for n, c in found.items() if isinstance(c, type) and issubclass(c, nn.Module)}


def _encode_all(values: Mapping[str, Any], where: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {name: _encode(value, f"{where}.{name}", tensors) for name, value in values.items()}


def _encode(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` as JSON; its tensors go into ``tensors`` under names that begin with ``where``."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Tensor):
        tensors[where] = value.detach().cpu().contiguous().clone()
        return {"tensor": where}
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        tensors[where] = torch.from_numpy(np.array(value))
        return {"array": where}
    if (
        isinstance(value, np.ndarray)
        and value.dtype.kind in "UO"
        and all(isinstance(v, str) for v in value.flat)
    ):
        return {"strings": value.tolist(), "dtype": value.dtype.kind}
    if type(value) in (list, tuple):
        items = [_encode(item, f"{where}.{i}", tensors) for i, item in enumerate(value)]
        return {type(value).__name__: items}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": _encode_all(value, where, tensors)}
    if isinstance(value, Kept):
        return {"kept": None}  # made anew when it is next asked for
    if type(value) in modules().values():
        return _encode_module(value, where, tensors)
    raise ConfigError(
        f"cannot save {where}, a {type(value).__name__} - give numbers, text, arrays or tensors"
    )


def _encode_module(module: nn.Module, where: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """A module as its class, its tensors, the modules inside, and the plain attributes it was given."""
    fresh = nn.Module()
    plain = {k: v for k, v in vars(module).items() if k not in vars(fresh)}
    parts: dict[str, Any] = {
        "parameters": module._parameters,
        "buffers": module._buffers,
        "modules": module._modules,
    }
    return {
        "module": type(module).__name__,
        "training": module.training,
        "plain": _encode_all(plain, where, tensors),
        **{kind: _encode_all(found, where, tensors) for kind, found in parts.items()},
    }


def _decode_all(values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: _decode(value, tensors) for name, value in values.items()}


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, _PLAIN):
        return value
    if "module" in value:
        return _decode_module(value, tensors)
    if "strings" in value:
        strings = np.array(value["strings"], dtype=object if value["dtype"] == "O" else None)
        if not all(isinstance(text, str) for text in strings.flat):
            raise TypeError("strings that are none")
        return strings
    (kind, content), *_ = value.items()
    readers = {
        "kept": Kept,
        "tensor": lambda: tensors[content],
        "array": lambda: tensors[content].numpy(),
        "list": lambda: [_decode(item, tensors) for item in content],
        "tuple": lambda: tuple(_decode(item, tensors) for item in content),
        "dict": lambda: _decode_all(content, tensors),
    }
    return readers[kind]()


def _decode_module(value: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    cls = _known(value["module"], modules())
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    vars(module).update(_decode_all(value["plain"], tensors))
    for name, content in _decode_all(value["parameters"], tensors).items():
        module.register_parameter(name, None if content is None else nn.Parameter(content))
    for name, content in _decode_all(value["buffers"], tensors).items():
        module.register_buffer(name, content)
    for name, content in _decode_all(value["modules"], tensors).items():
        module.add_module(name, content)
    module.training = bool(value["training"])
    return module


def _known(name: str, table: Mapping[str, Any]) -> Any:
    if not isinstance(name, str) or name not in table:
        raise CheckpointError(
            f"nothing of ours is called '{str(name)[:100]}' - the file is damaged, or from a later version"
        )
    return table[name]
