"""pellucid: white-box transformers, in which every layer is one step of a stated objective.

The public names are loaded when first used, so that ``import pellucid`` costs next to nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "audit": "pellucid.measure",
    "batches": "pellucid.glass.feed",
    "create_model": "pellucid.models",
    "evaluate": "pellucid.measure",
    "from_published": "pellucid.models",
    "generate": "pellucid.models",
    "list_models": "pellucid.models",
    "load": "pellucid.models",
    "load_data": "pellucid.data",
    "read_published": "pellucid.models",
    "train": "pellucid.training",
    "unroll": "pellucid.steps",
}

__all__ = ["__version__", *sorted(_HOMES)]

if TYPE_CHECKING:
    from pellucid.data import load_data
    from pellucid.glass.feed import batches
    from pellucid.measure import audit, evaluate
    from pellucid.models import create_model, from_published, generate, list_models, load, read_published
    from pellucid.steps import unroll
    from pellucid.training import train


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pellucid' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
