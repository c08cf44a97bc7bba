"""Language models in answers: a passage word by word, what layers would say of it, what atoms respond to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pellucid.data import TextData, Tokenizer, Windows, eval_token_loader
from pellucid.data.words import END, MASK
from pellucid.errors import ConfigError
from pellucid.glass.language import AUDITED_WORDS, audit_text
from pellucid.glass.passages import spaced
from pellucid.glass.spelling import one_by_one
from pellucid.measure import read_atoms
from pellucid.measure.atoms import BEFORE, NO_WORD
from pellucid.measure.language import lens
from pellucid.models.language import LanguageModel
from pellucid.models.modes import in_eval_mode

PASSAGES, PASSAGE_WORDS = 8, 64
"""Held-out texts that are there to begin with, and words of each at most."""

MOST_WORDS = 256
"""Words that are looked at at once: attention and the objective grow with their square."""

MOST_BYTES = 2**14
"""Bytes of a text that is typed."""

LIKELIEST = 5
"""Words that are named at each place after each layer."""

ATOM_WORDS = 16_384
"""Words among which the contexts of an atom are looked for."""

CONTEXTS, SHOWN_BEFORE, SHOWN_AFTER = 4, 10, 4
"""Contexts of each atom, and words that are shown on either side of the one at which it responds."""

BEGINS = 80
"""Characters that say which passage it is."""

UNKNOWN = -1
"""In place of a word that is not known or not there."""


@dataclass(frozen=True)
class Passage:
    """A text as a model reads it.

    Attributes:
        words: as text, one for each token.
        ids: their numbers.
        targets: what there is to tell at each place: the word that follows, or the one that is hidden;
            ``UNKNOWN`` where that is not known.
    """

    words: Sequence[str]
    ids: Sequence[int]
    targets: Sequence[int]

    @property
    def begins(self) -> str:
        """Its first characters, to know it by."""
        first = 1 if len(self.words) > 1 and self.words[0] == END else 0
        return "".join(self.words[first:])[:BEGINS]


def typed(model: LanguageModel, tokenizer: Tokenizer, text: str, *, cut: bool = False) -> Passage:
    """What a reader wrote, as the model reads it: behind the word that begins a text.

    For a masked model ``<|mask|>`` in it stands for a hidden word. With ``cut`` a longer one ends where what
    is looked at ends.

    Raises:
        ConfigError: no text, none that can be encoded, or more words than are looked at.
    """
    if len(text) > MOST_BYTES:
        raise ConfigError(f"{len(text)} characters, and {MOST_BYTES} are read at most - shorten it")
    try:
        parts = [tokenizer.encode(part.encode()).tolist() for part in _parts(model, text)]
    except UnicodeEncodeError:
        raise ConfigError("half a character in it - leave it out") from None
    ids: list[int] = [tokenizer.end]
    hidden: set[int] = set()
    for k, part in enumerate(parts):
        if k:
            hidden.add(len(ids))
            ids.append(tokenizer.mask)
        ids += part
    if len(ids) == 1:
        raise ConfigError("no text - type some")
    most = min(MOST_WORDS, model.context)
    if cut:
        ids = ids[:most]
        hidden = {place for place in hidden if place < most}
    if len(ids) > most:
        raise ConfigError(f"{len(ids)} words, and {most} are looked at at most - shorten it")
    targets = [*ids[1:], UNKNOWN] if model.causal and model.classifier is None else [UNKNOWN] * len(ids)
    return Passage(_spelt(tokenizer, ids, hidden), ids, targets)


def held_out(model: LanguageModel, windows: Windows, context: int) -> list[tuple[str, int, Passage]]:
    """Name, label and beginning of some held-out rows, evenly spaced; no longer than ``context``."""
    found = []
    for i in spaced(PASSAGES, len(windows)):
        tokens, labels, _ = windows[(i, 0)]
        size = min(PASSAGE_WORDS, context, int(tokens.real[0].sum()))
        ids, told = tokens.ids[0].tolist(), tokens.targets[0].tolist()
        hidden: set[int] = set()
        if windows.task == "next":
            # A word that an earlier row has told counts no more there; here it is still the one that follows.
            targets = [*ids[1:], max(told[-1], UNKNOWN)][:size]
        else:
            targets = [max(target, UNKNOWN) for target in told[:size]]
            hidden = {k for k in range(size) if targets[k] >= 0 and ids[k] == windows.tokenizer.mask}
        passage = Passage(_spelt(windows.tokenizer, ids[:size], hidden), ids[:size], targets)
        found.append((windows.name(i), int(labels[0]), passage))
    return found


def said(model: LanguageModel, tokenizer: Tokenizer, passage: Passage) -> dict[str, Any] | None:
    """What the model would say of each place if it ended after each layer; None of one that classifies.

    ``words`` are those that are named, ``likeliest`` indices into them, ``(layers + 1, n, k)``, with their
    probabilities ``chances``; ``own`` ``(layers + 1, n)`` is that of the target, NaN where there is none.
    """
    if model.classifier is not None:
        return None
    device = next(model.parameters()).device
    with in_eval_mode(model):
        seen = lens(model, torch.tensor([list(passage.ids)], device=device), LIKELIEST, passage.targets)
    words, likeliest = _named(tokenizer, seen.likeliest)
    return {"words": words, "likeliest": likeliest, "chances": seen.chances, "own": seen.own}


def audited(
    model: LanguageModel, windows: Windows, texts: TextData, rows: int | None = None, known: Any = None
) -> dict[str, Any]:
    """The audit on held-out rows unless it is known, and what the atoms of each layer respond to.

    Of a layer ``fires`` ``(m)`` is the share of places at which each atom does, ``score`` ``(m)`` how well a
    list of words tells it, ``values`` ``(m, k)`` its strongest responses with ``contexts`` ``(m, k, c)``: 0
    where there is no word, else one more than its place in ``words``. It responds at number ``at`` of these.
    """
    if known is None:
        known = audit_text(model, windows, texts.name, rows)
    found: dict[str, Any] = {"audit": known, "atoms": {}, "gallery": [], "words": [], "at": SHOWN_BEFORE}
    limit = max(2, ATOM_WORDS // windows.context)
    if len(windows) < 2:
        return found
    try:
        layers = read_atoms(model, eval_token_loader(windows, batch_size=8, limit=limit), top=CONTEXTS)
    except ConfigError:  # attention alone
        return found
    kept = slice(BEFORE - SHOWN_BEFORE, BEFORE + 1 + SHOWN_AFTER)
    numbers = [each.contexts[..., kept].transpose(0, 1) for each in layers]
    words, places = _named(windows.tokenizer, torch.cat([part.flatten() for part in numbers]))
    places = (places + 1).to(torch.uint8 if len(words) < 256 else torch.int32)  # in most are few words
    split = places.split([part.numel() for part in numbers])
    for each, part, place in zip(layers, numbers, split, strict=True):
        fired = each.windows.mT >= 0
        found["atoms"][str(each.layer)] = {
            "kind": each.kind,
            "fires": each.fires.float(),
            "score": each.score.float(),
            "values": each.values.mT.float().masked_fill(~fired, torch.nan),
            "contexts": place.view(part.shape),
        }
    return {**found, "words": words, "looked_at": min(limit, len(windows))}


def _parts(model: LanguageModel, text: str) -> list[str]:
    return [text] if model.causal else text.split(MASK)


def _spelt(tokenizer: Tokenizer, ids: Sequence[int], hidden: Iterable[int]) -> list[str]:
    words = one_by_one(tokenizer, ids)
    for place in hidden:
        words[place] = MASK
    return words


def _named(tokenizer: Tokenizer, numbers: Tensor) -> tuple[list[str], Tensor]:
    """The different words among ``numbers`` as text, and in place of each number its place among them."""
    ids, places = np.unique(numbers.numpy(), return_inverse=True)
    known = ids[ids != NO_WORD]
    shift = len(ids) - len(known)  # NO_WORD is the least
    within = [int(i) for i in known if i < tokenizer.vocab_size]
    names = dict(zip(within, one_by_one(tokenizer, within), strict=True))
    shown = [names.get(int(i), f"word {i}") for i in known]
    return shown, torch.from_numpy(places.reshape(numbers.shape) - shift)


__all__ = [
    "AUDITED_WORDS",
    "MOST_BYTES",
    "MOST_WORDS",
    "UNKNOWN",
    "Passage",
    "audited",
    "held_out",
    "said",
    "typed",
]
