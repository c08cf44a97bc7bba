"""Learning the parameters of the steps: the only place that imports lightning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pellucid.training.config import TrainConfig, read_config

__all__ = ["Run", "TrainConfig", "load_images", "load_material", "open_run", "read_config", "train"]

if TYPE_CHECKING:
    from pellucid.training.run import Run, load_images, load_material, open_run, train


def __getattr__(name: str) -> Any:
    # Lightning takes seconds to import; a config does not need it.
    if name not in __all__:
        raise AttributeError(f"module 'pellucid.training' has no attribute '{name}'")
    from pellucid.training import run

    return getattr(run, name)
