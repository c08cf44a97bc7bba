"""Tokenizers by name, and from files."""

from __future__ import annotations

import json
import os

from pellucid.data.bpe import BPETokenizer, train_bpe
from pellucid.data.images import show_name
from pellucid.data.words import ByteTokenizer, Tokenizer, is_bytes
from pellucid.errors import ConfigError, DataError, suggest
from pellucid.regular import open_regular

__all__ = ["BPETokenizer", "ByteTokenizer", "Tokenizer", "find_tokenizer", "read_tokenizer", "train_bpe"]

BYTES, BPE, GPT2 = NAMES = ("bytes", "bpe", "gpt2")
FILE = "tokenizer.json"

_REPOSITORIES = ("openai-community/gpt2", "gpt2")  # it has moved; either may be what is kept on this machine


def find_tokenizer(name: str) -> Tokenizer:
    """``"bytes"``, ``"gpt2"``, or the tokenizer of a ``tokenizer.json`` or of a folder that holds one.

    A name goes before a file of that name; say ``./gpt2`` for it. Raises ConfigError or DataError, naming why
    there is none.
    """
    if name == BYTES:
        return ByteTokenizer()
    if name == GPT2:
        return _gpt2()
    if os.path.lexists(name):
        return read_tokenizer(name)
    known = suggest(name, NAMES, [*NAMES, f"the path of a {FILE}"])
    raise ConfigError(f"no tokenizer and no file is called '{show_name(name)}'{known}")


def read_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """From a ``tokenizer.json``, or a folder that holds one. That of bytes needs no library.

    Raises:
        DataError: it cannot be read, or is none; or the library ``tokenizers`` is missing.
    """
    file = os.path.join(path, FILE) if os.path.isdir(path) else os.fspath(path)
    shown = show_name(file)
    try:
        with open_regular(file) as opened:
            text = opened.read().decode("utf-8-sig")
        found = json.loads(text)
        if is_bytes(found):
            return ByteTokenizer()
    except OSError as error:
        raise DataError(f"cannot read {shown}: {error.strerror} - name a {FILE}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{shown} is no {FILE} - give one of the library tokenizers") from error
    return BPETokenizer(text, shown)


def _gpt2() -> Tokenizer:
    """GPT-2's, as it is kept on this machine, or else from the hub."""
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise DataError(
            "tokenizer gpt2 needs the package 'huggingface_hub' - pip install 'pellucid[lm]'"
        ) from error
    for kept in _REPOSITORIES:
        try:
            return _named(hf_hub_download(kept, FILE, local_files_only=True))
        except OSError:
            continue
    try:
        return _named(hf_hub_download(_REPOSITORIES[0], FILE))
    except Exception as error:  # of huggingface_hub and httpx: no common class
        detail = show_name((str(error).splitlines() or [type(error).__name__])[0])[:120]
        raise DataError(
            f"cannot get the tokenizer gpt2 from the hub - check the connection, or give the path of a {FILE}"
            f"\n  ({type(error).__name__}: {detail})"
        ) from error


def _named(path: str) -> Tokenizer:
    with open(path, encoding="utf-8") as file:
        return BPETokenizer(file.read(), GPT2)
