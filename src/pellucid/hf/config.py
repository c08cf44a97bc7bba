"""Sizes and options of language models, in transformers' terms: the ``config.json`` of a saved folder."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from pellucid.models.language import CRATELM, LanguageModel, ToSTLM

SHARED: dict[str, Any] = {
    "use_cache": True,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


class TextConfig(PreTrainedConfig):
    """What the two configurations share.

    Attributes:
        network_class: what is built from it, in this library.
        carry: told the folder that a config is about to be saved to, to put the code there that reads it
            back; None where the code lies in such a folder already, which transformers then copies.
    """

    network_class: ClassVar[type[LanguageModel]]
    carry: ClassVar[Callable[..., None] | None] = None
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "embed_dim",
        "num_hidden_layers": "depth",
        "num_attention_heads": "num_heads",
        "max_position_embeddings": "context",
    }
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache", "past_key_values"]

    def __init__(self, **options: Any) -> None:
        options = {self.attribute_map.get(name, name): value for name, value in options.items()}
        for name, default in {**_defaults(self.network_class), **SHARED}.items():
            setattr(self, name, options.pop(name, default))
        super().__init__(**options)

    def network_options(self) -> dict[str, Any]:
        """Arguments of ``network_class``, as they stand here; classes of texts are counted by the task."""
        return {name: getattr(self, name) for name in _defaults(self.network_class)}

    def to_diff_dict(self) -> dict[str, Any]:
        """What differs from the defaults, and all that the network is built from: defaults may change."""
        return {**super().to_diff_dict(), **self.network_options()}

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **options: Any) -> None:
        if self.carry is not None:
            os.makedirs(save_directory, exist_ok=True)
            self.carry(save_directory)
        super().save_pretrained(save_directory, *args, **options)


class CrateConfig(TextConfig):
    """Of :class:`~pellucid.models.language.CRATELM`: its arguments by their names, and transformers' own.

    ``hidden_size``, ``num_hidden_layers``, ``num_attention_heads`` and ``max_position_embeddings`` stand for
    ``embed_dim``, ``depth``, ``num_heads`` and ``context``.
    """

    model_type = "crate_lm"
    network_class = CRATELM

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)  # written out: transformers makes another for a class without


class TostConfig(TextConfig):
    """Of :class:`~pellucid.models.language.ToSTLM`, in the same words."""

    model_type = "tost_lm"
    network_class = ToSTLM

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)


def _defaults(network: type[LanguageModel]) -> dict[str, Any]:
    parameters = list(inspect.signature(network.__init__).parameters.values())[1:]
    return {p.name: p.default for p in parameters if p.name != "num_labels"}
