"""A folder that transformers loads by itself: weights, config, code and tokenizer, checked once written."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from pellucid.errors import CheckpointError
from pellucid.hf.convert import Model, to_transformers
from pellucid.models.language import LanguageModel

SAMPLE = "In the beginning, 1 < 2.\n\tNaïve déjà-vu: «Straße», 天地, 🙂"
"""What both tokenizers must read alike."""


_WRITTEN = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|model\.safetensors\.index)\.json"
    r"|model(-\d+-of-\d+)?\.safetensors|pellucid_\w+\.py"
)


class Words(Protocol):
    """What is asked of a tokenizer: see :class:`pellucid.data.Tokenizer`."""

    end: int
    mask: int

    def encode(self, data: bytes) -> Any: ...
    def to_json(self) -> str: ...


def save_folder(
    model: LanguageModel, folder: str | os.PathLike[str], tokenizer: Words | None = None
) -> list[str]:
    """Write a language model for transformers, with the code that it needs, and its tokenizer if it has one.

    ``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)``, or its like for what the model
    is, then needs transformers alone. With a tokenizer, so does ``pipeline("text-generation", folder,
    trust_remote_code=True)``: as in training, a text begins with the word that ends one.

    Args:
        model: as :func:`to_transformers` takes it.
        folder: made where it is missing; files of the same names are written over.
        tokenizer: that it was trained with.

    Returns:
        Names of the files.

    Raises:
        ConfigError: a model that cannot be given to transformers.
        CheckpointError: what was written does not give the model's scores to the last bit, or its tokenizer
            other words.
    """
    made, folder = to_transformers(model), Path(folder)
    if tokenizer is not None:
        words = _tokenizer(tokenizer, made)
        ids = {"bos_token_id": tokenizer.end, "eos_token_id": tokenizer.end, "pad_token_id": tokenizer.end}
        for name, word in ids.items():
            setattr(made.config, name, word)
            if made.can_generate():
                setattr(made.generation_config, name, word)
    with _without_bars():
        made.save_pretrained(folder)
        if tokenizer is not None:
            words.save_pretrained(folder)
            _compare_words(folder, tokenizer)
        _compare_scores(folder, made, model)
    return sorted(path.name for path in folder.iterdir())


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether what stands there is a folder of this kind and nothing else, so that it can be written anew."""
    try:
        config = json.loads(Path(path, "config.json").read_text(encoding="utf-8"))
        known = config["model_type"] in ("crate_lm", "tost_lm")
        return known and all(_WRITTEN.fullmatch(name) for name in os.listdir(path))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _tokenizer(tokenizer: Words, model: Model) -> PreTrainedTokenizerFast:
    """transformers' form of it. The word that ends a text stands in front of one; if masked, behind too."""
    from tokenizers import Tokenizer, processors

    words = Tokenizer.from_str(tokenizer.to_json())
    end, mask = (words.id_to_token(word) for word in (tokenizer.end, tokenizer.mask))
    causal = getattr(model.config, "causal", True)
    words.post_processor = processors.TemplateProcessing(
        single=f"{end} $A" if causal else f"{end} $A {end}", special_tokens=[(end, tokenizer.end)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token=end,
        eos_token=end,
        pad_token=end,
        mask_token=mask,
        padding_side="left" if causal else "right",
        model_max_length=model.config.context,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def _compare_words(folder: Path, tokenizer: Words) -> None:
    written = PreTrainedTokenizerFast.from_pretrained(folder)
    given = written(SAMPLE, add_special_tokens=False)["input_ids"]
    expected = [int(word) for word in tokenizer.encode(SAMPLE.encode())]
    if given != expected:
        raise CheckpointError(
            f"{folder}: its tokenizer.json gives other words than the model's own tokenizer - "
            f"{given[:8]} in place of {expected[:8]}"
        )


@torch.no_grad()
def _compare_scores(folder: Path, made: Model, model: LanguageModel) -> None:
    """What the folder's own code makes of the folder, beside the model that it was made from."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.vocab_size, (2, min(model.context, 32)), generator=generator)
    ids = ids.to(model.embed.words.weight.device)
    expected = model.eval()(ids)
    with _code_of(folder) as module:
        loaded = getattr(module, type(made).__name__).from_pretrained(folder, dtype=made.dtype)
        given: Tensor = loaded.to(ids.device)(ids).logits
    if not torch.equal(given, expected):
        raise CheckpointError(
            f"{folder}: what it carries gives other scores than the model, by up to "
            f"{(given - expected).abs().max():.2g} - look at the model's weights"
        )


@contextmanager
def _without_bars() -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def _code_of(folder: Path) -> Iterator[ModuleType]:
    """The folder's module of models, from its files alone."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    home = config["auto_map"]["AutoModel"].split(".")[0]
    package = ModuleType(f"carried_{abs(hash(folder)):x}")
    package.__path__ = [str(folder.resolve())]
    written = sys.dont_write_bytecode
    sys.dont_write_bytecode = True  # no __pycache__ beside what was written
    sys.modules[package.__name__] = package
    try:
        yield import_module(f"{package.__name__}.{home}")
    finally:
        sys.dont_write_bytecode = written
        for name in [name for name in sys.modules if name.split(".")[0] == package.__name__]:
            del sys.modules[name]
