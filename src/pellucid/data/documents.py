"""Documents as words: from the name of a folder, a file or a table to two sets of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final, overload

import numpy as np
import numpy.typing as npt
import torch

from pellucid.data.bpe import refuse_training, train_bpe
from pellucid.data.corpora import find_corpus
from pellucid.data.dataset import Reject
from pellucid.data.found import Labels
from pellucid.data.load import MAX_BAD, ask
from pellucid.data.readings import TEST, TRAIN, Reading, divide_texts, read_corpus
from pellucid.data.sources import name_of
from pellucid.data.tokenizers import BPE, Tokenizer, find_tokenizer
from pellucid.data.verify import watched
from pellucid.errors import ConfigError, DataError

TRAIN_BYTES = 2**26
"""As much text as a tokenizer is trained on."""

Ids = npt.NDArray[np.integer]


class TextSet:
    """n documents as words.

    ``ids`` (total,) uint16 or int32: the words of all documents, one after the other, no special ones among
    them. ``starts`` int64 (n + 1,): where each begins, and the end of the last. ``sizes`` int64 (n,): bytes
    of each document's text. ``labels`` int64 (n,): indices into the class names, -1 where none is known.
    """

    def __init__(
        self,
        ids: Ids,
        starts: npt.NDArray[np.int64],
        sizes: npt.NDArray[np.int64],
        labels: torch.Tensor,
        names: Sequence[str],
    ) -> None:
        n = len(starts) - 1
        if not len(sizes) == len(labels) == len(names) == n or starts[0] or starts[-1] != len(ids):
            raise DataError(
                f"{n} documents of {len(ids)} words with {len(sizes)} sizes, {len(labels)} labels and"
                f" {len(names)} names - give one of each, and starts from 0 to the number of words"
            )
        self.ids, self.starts, self.sizes = ids, starts, sizes
        self.labels = labels.to(torch.int64)
        self._names = names

    def __len__(self) -> int:
        return len(self.sizes)

    def document(self, i: int) -> Ids:
        """The words of document i."""
        return self.ids[self.starts[i] : self.starts[i + 1]]

    def name(self, i: int) -> str:
        """What to call document i in a message; safe to print."""
        return self._names[i]


@dataclass(frozen=True)
class TextData:
    """Documents ready to train on, and the words that they are made of.

    ``class_names`` is empty when there are no labels, and every label is -1 then. ``rejects``: texts that are
    in neither set, since they could not be read. ``fingerprint`` (SHA-256) changes when the text, the order
    or the label of a document does, and not with the tokenizer, which has one of its own. ``notes``: what was
    passed over, and why.
    """

    name: str
    train: TextSet
    test: TextSet
    tokenizer: Tokenizer
    class_names: list[str]
    rejects: tuple[Reject, ...]
    fingerprint: str
    notes: tuple[str, ...] = ()


Spec = str | os.PathLike[str] | TextData


def load_text(
    spec: Spec,
    *,
    tokenizer: str | os.PathLike[str] = "bytes",
    vocab_size: int = 8192,
    labels: Labels = "optional",
    test_fraction: float | None = None,
    split_seed: int = 0,
    root: str | os.PathLike[str] | None = None,
    download: bool = False,
    max_bad: float = MAX_BAD,
    test_only: bool = False,
) -> TextData:
    """Read texts, hold some back, and make words of them.

    ``spec`` is a folder of text files, at any depth, each one document; a folder with ``train/`` and ``val/``
    (or ``valid/``, ``validation/``, ``test/``) of them, or with files whose names say so (``train.txt`` and
    ``valid.txt``); one text file, which is cut into parts; a ``.jsonl`` file or a folder of them, with the
    fields ``text`` and, if it likes, ``label`` in every line; a data set of the Hugging Face hub as
    ``hf:OWNER/NAME?text=COLUMN&label=COLUMN`` (see ``tables``); or TextData, which comes back as it is.

    Classes are the folders in which files lie, or the labels. With ``labels="optional"``, labels that
    supervised training could not use are put aside, and noted.

    ``tokenizer`` is ``"bytes"``; ``"bpe"``, which is trained on the training documents, of more than 64 MiB
    on every k-th, to at most ``vocab_size`` words; ``"gpt2"``, from the hub or what is kept of it; or a
    ``tokenizer.json``, or a folder that holds one.

    Data without a split hold back ``test_fraction`` (0.1) of their texts, by ``split_seed``, of each class if
    they have classes; equal texts stay on one side. Data that bring a split keep it. With ``test_only`` train
    and test are both the set to evaluate on. ``root`` and ``download`` are load_data's, for named data sets,
    of which none is text.

    Raises DataError for data that cannot be used, also when more than the share ``max_bad`` of the texts is
    rejected; ConfigError for options that cannot be.
    """
    if isinstance(spec, TextData):
        return spec
    asked = ask(labels, test_fraction, split_seed, test_only)
    words = _tokenizer(os.fspath(tokenizer), vocab_size, test_only)
    corpus = find_corpus(os.fspath(spec), asked)
    reading = read_corpus(corpus, asked, max_bad)
    if shared := divide_texts(reading, asked):
        corpus.notes.append(f"{shared:,} test texts are also in train, so scores will be too good")
    if words is None:
        words = train_bpe(reading.sample(TRAIN_BYTES), vocab_size)
    train, test = _encoded(reading, words)
    return TextData(
        name=corpus.name,
        train=test if train is None else train,
        test=test,
        tokenizer=words,
        class_names=reading.class_names,
        rejects=reading.rejects,
        fingerprint=_fingerprint(reading),
        notes=tuple(corpus.notes),
    )


def _tokenizer(name: str, vocab_size: int, test_only: bool) -> Tokenizer | None:
    """The one of this name, or None where it is yet to be trained. What cannot be is refused at once."""
    if name != BPE:
        return find_tokenizer(name)
    refuse_training(vocab_size)
    if test_only:
        raise ConfigError(
            "a tokenizer cannot be trained with test_only, for there is no text to train on"
            " - give the path of the one that the model was trained with"
        )
    return None


@final
class _Names(Sequence[str]):
    """What some of the texts of a reading are called, made when asked for."""

    def __init__(self, reading: Reading, rows: npt.NDArray[np.int64]) -> None:
        self._sources = reading.sources
        self._source, self._place = reading.source[rows], reading.place[rows]

    def __len__(self) -> int:
        return len(self._source)

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...
    def __getitem__(self, i: int | slice) -> str | list[str]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        return name_of(self._sources[self._source[i]], int(self._place[i]))


class _Words:
    """The words of many documents in one array, which takes up no more memory than they do.

    A word is at least one byte of text, so that so many places are enough but for tokenizers that rewrite it;
    what is never written to is never taken from the machine.
    """

    def __init__(self, vocab_size: int, sizes: npt.NDArray[np.int64]) -> None:
        self._ids: npt.NDArray[Any] = np.empty(
            int(sizes.sum()), dtype=np.uint16 if vocab_size <= 2**16 else np.int32
        )
        self._sizes, self._starts = sizes, [0]

    def add(self, ids: Ids) -> None:
        first = self._starts[-1]
        last = first + len(ids)
        if last > len(self._ids):
            self._ids.resize(2 * last, refcheck=False)
        self._ids[first:last] = ids
        self._starts.append(last)

    def text_set(self, labels: npt.NDArray[np.int64], names: Sequence[str]) -> TextSet:
        self._ids.resize(self._starts[-1], refcheck=False)
        starts = np.array(self._starts, dtype=np.int64)
        return TextSet(self._ids, starts, self._sizes, torch.from_numpy(labels), names)


def _encoded(reading: Reading, tokenizer: Tokenizer) -> tuple[TextSet | None, TextSet]:
    """The documents to train on, if there are any, and those to test on."""
    rows = [np.flatnonzero(reading.side == side) for side in (TRAIN, TEST)]
    words = [_Words(tokenizer.vocab_size, reading.size[part]) for part in rows]
    side = reading.side[reading.side <= TEST].tolist()
    texts = watched(reading.texts(TRAIN, TEST), "encoding", len(side))
    for of, ids in zip(side, tokenizer.encode_each(texts), strict=True):
        words[of].add(ids)
    sets = [
        part.text_set(reading.label[of], _Names(reading, of)) for part, of in zip(words, rows, strict=True)
    ]
    return sets[0] if len(sets[0]) else None, sets[1]


def _fingerprint(reading: Reading) -> str:
    digest = hashlib.sha256("\0".join(reading.class_names).encode("utf-8", "surrogatepass"))
    for side in (TRAIN, TEST):
        rows = np.flatnonzero(reading.side == side)
        digest.update(b"%d\0" % len(rows))
        digest.update(reading.digest[rows].tobytes())
        digest.update(reading.label[rows].tobytes())
    return digest.hexdigest()
