"""Models by name: ours and timm's for images, ours for text."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from types import ModuleType
from typing import Any, Literal

import timm
from torch import nn

from pellucid.errors import ConfigError, suggest
from pellucid.models import crate, language, mae, tost, vit
from pellucid.models.backbone import ARCHITECTURES

FAMILIES = (crate, mae, tost, vit)


def list_models(kind: Literal["image", "text"] = "image") -> list[str]:
    """Names of the models defined here, white-box ones first. For images any timm name works as well."""
    if kind == "text":
        return list(language.MODELS)
    if kind != "image":
        raise ConfigError(f"kind is '{kind}'; known: image, text")
    names = [name for family in FAMILIES for name in sorted(_names(family))]
    return sorted(names, key=lambda name: name.startswith("vit"))


def some_models() -> list[str]:
    """One name of each family, for messages that cannot list all; ``pellucid models`` does."""
    return [name for name in list_models() if name.endswith("_digits")] + ["..."]


def create_model(name: str, *, pretrained: bool = False, **model_args: Any) -> nn.Module:
    """A model by its name: ours, and all in timm's registry.

    Args:
        name: such as ``"crate_tiny_patch16_224"``, ``"crate_gpt_small"`` or any timm model.
        pretrained: take timm's published weights (needs the network; none of ours are published yet).
        model_args: sizes and options of the architecture, such as ``num_classes``, ``img_size`` or ``depth``,
            of language models ``vocab_size``, ``context`` or ``depth``.

    Raises:
        ConfigError: an unknown name or option, with the nearest known one; sizes that do not fit.
    """
    if name in language.MODELS:
        return _create_text_model(name, pretrained, model_args)
    if not timm.is_model(name):
        known = list_models() + list_models("text") + timm.list_models("vit_*")
        near = suggest(name, known, some_models())
        raise ConfigError(f"unknown model '{name}'{near}")
    if pretrained and name in list_models():
        raise ConfigError(f"no published weights for {name} yet - leave out pretrained, or train it")
    check_model_args(name, model_args)
    try:
        model: Any = timm.create_model(name, pretrained=pretrained, **model_args)
    except (ValueError, AssertionError, TypeError) as error:
        raise ConfigError(f"{name}: {error}") from error
    # What it takes to make the same again; saving a model writes both down.
    model.architecture, model.model_args = name, model_args
    return model


def _create_text_model(name: str, pretrained: bool, model_args: dict[str, Any]) -> nn.Module:
    found = language.MODELS[name]
    if pretrained:
        raise ConfigError(f"no published weights for {name} yet - leave out pretrained, or train it")
    if model_args.keys() & {"in_chans", "num_classes", "img_size", "patch_size"}:
        raise ConfigError(f"{name} reads text, not images - take an image model, such as crate_digits")
    _refuse_unknown(name, model_args, _options(found.cls))
    try:
        model: Any = found.cls(**{**found.sizes, **model_args})
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{name}: {error}") from error
    model.architecture, model.model_args = name, model_args
    return model


def check_model_args(name: str, model_args: dict[str, Any]) -> None:
    """Refuse an option that the architecture does not have. Only ours are known by name."""
    if name not in ARCHITECTURES:
        return
    _refuse_unknown(name, model_args, _options(ARCHITECTURES[name]), {"features_only", "out_indices"})


def _refuse_unknown(
    name: str, model_args: dict[str, Any], known: set[str], of_timm: Collection[str] = ()
) -> None:
    for key in model_args:
        if key not in known and key not in of_timm:
            raise ConfigError(f"unknown model option '{key}' for {name}{suggest(key, known)}")


def _options(cls: type) -> set[str]:
    """Names that a constructor takes; what it hands on, its parent's too."""
    parameters = inspect.signature(cls).parameters.values()
    named = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
    return named if len(named) == len(parameters) else named | _options(cls.__mro__[1])


def _names(family: ModuleType) -> set[str]:
    return {name.split(".")[0] for name in family.default_cfgs}
