"""Text from a trained model: a prompt in, what follows it out, as it comes. Where words become text again."""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pellucid.data import Tokenizer, read_tokenizer
from pellucid.errors import CheckpointError, ConfigError
from pellucid.models import Sampling, load, stream
from pellucid.models.language import LanguageModel
from pellucid.models.saved import tokenizer_of


def open_writer(path: str | os.PathLike[str]) -> tuple[LanguageModel, Tokenizer]:
    """A run's language model and the tokenizer that it reads with.

    Raises:
        CheckpointError: no model there, one for images, or one without a tokenizer.
    """
    model: Any = load(path)
    if not isinstance(model, LanguageModel):
        raise CheckpointError(f"{path} sees images and writes no text - give a run of --objective causal-lm")
    file = tokenizer_file(path)
    tokenizer = read_tokenizer(file)
    if tokenizer.vocab_size > model.vocab_size:
        raise CheckpointError(
            f"{file} has {tokenizer.vocab_size} words, the model knows {model.vocab_size} - put the one that "
            f"it was trained with there"
        )
    return model, tokenizer


def tokenizer_file(path: str | os.PathLike[str]) -> Path:
    """Where the tokenizer of a run's model is.

    Raises:
        CheckpointError: it has none.
    """
    file = tokenizer_of(path)
    if file is None:
        raise CheckpointError(
            f"{path} has no tokenizer.json, so that its words are only numbers - put the one that it was "
            f"trained with into its model/ folder"
        )
    return file


def continuation(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    *,
    beyond_end: bool = False,
) -> Iterator[str]:
    """What a causal model writes behind ``prompt``, piece by piece.

    A text may grow beyond the model's context: when that is full, the model reads the last half of it anew.

    Args:
        model, tokenizer: as :func:`open_writer` gives them.
        prompt: may be empty; of a long one the model sees the last words.
        max_new_tokens: words to write at most.
        sampling: how each is drawn.
        beyond_end: go on with a new text where one ends; else that is where writing ends.

    Yields:
        Text. Bytes that are no UTF-8 come as the replacement character.

    Raises:
        ConfigError: a masked model, or a negative number of words.
    """
    if max_new_tokens < 0:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}; expected 0 or more")
    if not model.causal:
        raise ConfigError("a masked model fills in what is hidden and writes no text - take a causal one")
    return _continuation(model, tokenizer, prompt, max_new_tokens, sampling or Sampling(), beyond_end)


def _continuation(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str,
    count: int,
    sampling: Sampling,
    beyond_end: bool,
) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    words = [tokenizer.end, *tokenizer.encode(prompt.encode("utf-8", "surrogateescape")).tolist()]
    turn = 0
    while count > 0:
        if len(words) >= model.context:
            words = words[-max(1, model.context // 2) :]
        room = min(count, model.context - len(words) + 1)
        # A turn draws other numbers than the one before it, and the first the same as generate.
        fresh = replace(sampling, seed=sampling.seed + 1_000_003 * turn)
        for new in stream(model, torch.tensor([words]), room, fresh):
            word = int(new)
            words.append(word)
            count -= 1
            if word == tokenizer.end:
                if not beyond_end:
                    yield decoder.decode(b"", final=True)
                    return
                yield decoder.decode(b"\n\n")
            elif text := decoder.decode(tokenizer.decode([word])):
                yield text
        turn += 1
    yield decoder.decode(b"", final=True)
