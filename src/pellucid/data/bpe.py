"""Words as the library ``tokenizers`` finds them: byte-level BPE trained here, GPT-2's, and any other's."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterable, Iterator
from typing import Any, final

import numpy as np

from pellucid.data.words import END, LETTERS, MASK, Ids, Tokenizer, shown
from pellucid.errors import ConfigError, DataError

LEAST = 258  # words of a BPE: all bytes, and two special ones
MOST = 2**31 - 1

# What others call the word that ends a text, and the one for a hidden word; the first that is there is used.
_ENDS = (END, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
_MASKS = (MASK, "[MASK]", "<mask>")

_KNOWN = 2**18  # stretches whose words are remembered,
_SHORT = 64  # each of at most so many characters
_BLOCK = 2**20  # characters that are cut into stretches at once

# A text falls into stretches: space, and what follows it. GPT-2's rule never takes a piece across their
# borders, so that the words of a stretch are the same wherever it stands. Blocks with characters of which
# Python and the library do not agree whether they are space are left to the library whole.
_STRETCH = re.compile(r"\s*\S+|\s+")
_DOUBTFUL = re.compile("[\x1c-\x1f\u180e]")
_BORDER = re.compile("(?<=[^\\s\u180e])[ \\t\\n\\r]")
_INVALID = re.compile("[\udc80-\udcff]+")  # bytes that are no UTF-8, as surrogateescape has them


@final
class BPETokenizer(Tokenizer):
    """A tokenizer of the library ``tokenizers``, to which the special words are added that it lacks.

    If it is byte-level, ``decode(encode(data)) == data`` for any bytes. Else it is for text, and what it does
    to it (to spaces, capitals, characters that it does not know) is not undone.

    Args:
        text: a ``tokenizer.json``.
        name: what to call it.

    Raises:
        DataError: the library is missing, or cannot read it.
    """

    def __init__(self, text: str, name: str) -> None:
        library = _library()
        try:
            inner = library.Tokenizer.from_str(text)
        except Exception as error:  # the library raises plain Exception
            detail = str(error).splitlines()[0][:120]
            raise DataError(
                f"{name} is no tokenizer.json - give one of the library tokenizers\n  ({detail})"
            ) from error
        inner.no_truncation()
        inner.no_padding()
        self.name = name
        self.end = _special(inner, _ENDS)
        self.mask = _special(inner, _MASKS)
        self._json = inner.to_str()
        found = json.loads(self._json)
        added = {token["id"]: token for token in found["added_tokens"]}
        vocabulary = inner.get_vocab(with_added_tokens=True)
        self.special = frozenset(word for word, token in added.items() if token["special"])
        self.vocab_size = max(vocabulary.values()) + 1
        inner.encode_special_tokens = True  # as any other text
        if hasattr(inner.model, "dropout"):
            inner.model.dropout = None
        self._inner = inner
        self._bytes = _bytes_of(vocabulary, added) if _is_byte_level(found) else None
        plain = all(token["special"] for token in added.values())
        self._stretches = self._bytes is not None and plain and _cuts_as_gpt2(found)
        self._known: dict[str, bytes] = {}  # stretch -> its words, as int32

    def encode(self, data: bytes) -> Ids:
        try:
            return self._encode(data.decode())
        except UnicodeDecodeError:
            if self._bytes is None:
                return self._encode(data.decode("utf-8", "replace"))
        return self._encode_any(data)

    def encode_each(self, texts: Iterable[bytes]) -> Iterator[Ids]:
        """The words of each text, in order; many short ones are looked at together."""
        batch: list[bytes] = []
        size = 0
        for text in texts:
            batch.append(text)
            size += len(text)
            if size >= _BLOCK:
                yield from self._encode_batch(batch[:-1])
                yield self.encode(text)
                batch, size = [], 0
        yield from self._encode_batch(batch)

    def decode(self, ids: Iterable[int]) -> bytes:
        words = [int(word) for word in ids]
        self._refuse(words)
        if self._bytes is not None:
            return b"".join(map(self._bytes.__getitem__, words))
        return str(self._inner.decode(words, skip_special_tokens=True)).encode("utf-8", "replace")

    def piece(self, word: int) -> str:
        self._refuse([word])
        if word in self.special or self._bytes is None:
            return shown((self._inner.id_to_token(word) or "").encode("utf-8", "replace"))
        return shown(self._bytes[word])

    def to_json(self) -> str:
        return self._json

    def __reduce__(self) -> tuple[type[BPETokenizer], tuple[str, str]]:
        return BPETokenizer, (self._json, self.name)

    def _encode(self, text: str) -> Ids:
        if not self._stretches:
            return np.array(self._inner.encode(text, add_special_tokens=False).ids, dtype=np.int32)
        return np.frombuffer(
            b"".join(self._looked_up([block])[0] for block in _blocks(text)), np.int32
        ).copy()

    def _encode_batch(self, batch: list[bytes]) -> Iterator[Ids]:
        """Of texts that are short."""
        try:
            texts = [text.decode() for text in batch]
        except UnicodeDecodeError:
            yield from map(self.encode, batch)
            return
        if self._stretches:
            yield from (np.frombuffer(ids, np.int32) for ids in self._looked_up(texts))
        else:
            found = self._inner.encode_batch_fast(texts, add_special_tokens=False)
            yield from (np.array(item.ids, dtype=np.int32) for item in found)

    def _looked_up(self, texts: list[str]) -> list[bytes]:
        """The words of each text, as int32; the library looks at each of their stretches only once."""
        cut = [[text] if _DOUBTFUL.search(text) else _STRETCH.findall(text) for text in texts]
        each = set().union(*cut)
        words = {stretch: self._known[stretch] for stretch in each if stretch in self._known}
        new = [stretch for stretch in each if stretch not in words]
        found = self._inner.encode_batch_fast(new, add_special_tokens=False)
        for stretch, found in zip(
            new, self._inner.encode_batch_fast(new, add_special_tokens=False), strict=True
        ):
            words[stretch] = array("i", found.ids).tobytes()
            if len(stretch) <= _SHORT and len(self._known) < _KNOWN:
                self._known[stretch] = words[stretch]
        return [b"".join(map(words.__getitem__, stretches)) for stretches in cut]

    def _encode_any(self, data: bytes) -> Ids:
        """Bytes that are no UTF-8: each of them is a word of its own."""
        assert self._bytes is not None
        single = {text[0]: word for word, text in enumerate(self._bytes) if len(text) == 1}
        text, at, parts = data.decode("utf-8", "surrogateescape"), 0, []
        for match in _INVALID.finditer(text):
            parts.append(self._encode(text[at : match.start()]))
            parts.append(np.array([single[ord(c) - 0xDC00] for c in match[0]], dtype=np.int32))
            at = match.end()
        return np.concatenate([*parts, self._encode(text[at:])])


def train_bpe(texts: Iterable[bytes], vocab_size: int) -> BPETokenizer:
    """Byte-level BPE (Sennrich et al. 2016, on bytes as in GPT-2) of at most ``vocab_size`` words.

    A function of the texts alone. Pairs that occur once are not merged, so that few texts give fewer words.

    Raises:
        ConfigError: fewer words than there are bytes and special words.
        DataError: the library ``tokenizers`` is missing.
    """
    refuse_training(vocab_size)
    library = _library()
    inner = library.Tokenizer(library.models.BPE())
    inner.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END, MASK],
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    decoded = (text.decode("utf-8", "ignore") for text in texts)
    inner.train_from_iterator((block for text in decoded for block in _blocks(text)), trainer)
    return BPETokenizer(inner.to_str(), "bpe")


def refuse_training(vocab_size: int) -> None:
    """Raises what ``train_bpe`` would, before any text is read."""
    if not LEAST <= vocab_size <= MOST:
        raise ConfigError(
            f"vocab_size {vocab_size} - give at least {LEAST}, for all bytes and two special words,"
            " such as 8192"
        )
    _library()


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise DataError(
            "all tokenizers but bytes need the package 'tokenizers' - pip install 'pellucid[lm]'"
        ) from error
    return tokenizers


def _blocks(text: str) -> Iterator[str]:
    """Pieces of a text, cut where a stretch ends; together they are the text."""
    at = 0
    while len(text) - at > _BLOCK:
        cut = _BORDER.search(text, at + _BLOCK)
        stop = cut.start() if cut else len(text)
        yield text[at:stop]
        at = stop
    yield text[at:]


def _special(inner: Any, names: tuple[str, ...]) -> int:
    """The word that one of these names stands for; the first is added where none does."""
    known = [name for name in names if inner.token_to_id(name) is not None]
    inner.add_special_tokens([known[0] if known else names[0]])
    return int(inner.token_to_id(known[0] if known else names[0]))


def _is_byte_level(found: dict[str, Any]) -> bool:
    """Whether words are made of bytes, each by its letter, and no text is rewritten before."""
    vocab = found["model"].get("vocab") or {}
    return (
        found["model"].get("type") == "BPE"
        and (found.get("decoder") or {}).get("type") == "ByteLevel"
        and not found.get("normalizer")
        and not any(step.get("add_prefix_space") for step in _steps(found))
        and vocab.keys() >= LETTERS.keys()
    )


def _cuts_as_gpt2(found: dict[str, Any]) -> bool:
    steps = _steps(found)
    return len(steps) == 1 and steps[0]["type"] == "ByteLevel" and steps[0].get("use_regex", True)


def _steps(found: dict[str, Any]) -> list[dict[str, Any]]:
    """What cuts a text before its words are looked for."""
    before = found.get("pre_tokenizer") or {}
    return before.get("pretokenizers", [before] if before else [])


def _bytes_of(vocabulary: dict[str, int], added: dict[int, dict[str, Any]]) -> list[bytes]:
    """The bytes that each word stands for; none for special words and for numbers that are none."""
    pieces = [b""] * (max(vocabulary.values()) + 1)
    for token, word in vocabulary.items():
        if word in added:
            pieces[word] = b"" if added[word]["special"] else token.encode()
        else:
            pieces[word] = bytes(map(LETTERS.__getitem__, token))
    return pieces
