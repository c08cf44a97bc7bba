"""Architectures: steps unrolled, from images or text. Importing this registers those for images with timm."""

from pellucid.models.crate import CRATE
from pellucid.models.create import create_model, list_models
from pellucid.models.generation import Sampling, generate, stream
from pellucid.models.language import CRATELM, LanguageModel, ToSTLM
from pellucid.models.mae import CRATEMAE
from pellucid.models.published import from_published, read_published
from pellucid.models.saved import load
from pellucid.models.tost import ToST

__all__ = [
    "CRATE",
    "CRATELM",
    "CRATEMAE",
    "LanguageModel",
    "Sampling",
    "ToST",
    "ToSTLM",
    "create_model",
    "from_published",
    "generate",
    "list_models",
    "load",
    "read_published",
    "stream",
]
