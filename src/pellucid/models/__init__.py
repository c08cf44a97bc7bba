"""Architectures: steps unrolled, from images to features. Importing this registers them with timm."""

from pellucid.models.crate import CRATE
from pellucid.models.create import create_model, list_models
from pellucid.models.mae import CRATEMAE
from pellucid.models.published import from_published, read_published
from pellucid.models.saved import load
from pellucid.models.tost import ToST

__all__ = [
    "CRATE",
    "CRATEMAE",
    "ToST",
    "create_model",
    "from_published",
    "list_models",
    "load",
    "read_published",
]
