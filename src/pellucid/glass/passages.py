"""Held-out texts word by word: how surprising each was, and where one of them looks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pellucid.data import Tokens, Windows
from pellucid.glass.spelling import Piece, pieces, spelt
from pellucid.measure import attention_maps, predict
from pellucid.measure.language import tell
from pellucid.models.language import LanguageModel
from pellucid.models.modes import in_eval_mode
from pellucid.steps import TSSA

TEXTS, WORDS = 4, 320
"""Texts that are shown, and how many words of each at most."""

LIKELIEST = 3
"""Likeliest words that are named beside each."""

GAZES, GAZE_WORDS = 2, 64
"""Texts in which one word's attention is shown, and how many words of each at most."""


def samples(model: LanguageModel, windows: Windows, class_names: list[str]) -> list[dict[str, Any]]:
    """Texts with the bits that each word took, and what was likeliest in its place."""
    shown = []
    with in_eval_mode(model):
        for i in spaced(TEXTS, len(windows)):
            text, label = _row(model, windows, i)
            name = class_names[label] if 0 <= label < len(class_names) else None
            guessed = None
            if model.classifier is not None:
                guessed = class_names[int(predict(model, text)[0].argmax())]
            sample = {"name": windows.name(i), "label": name, "predicted": guessed}
            shown.append(sample | {"words": _told(model, windows, text)})
    return shown


def gazes(model: LanguageModel, windows: Windows, alone: Tensor) -> list[dict[str, Any]]:
    """Where one word looks, in every layer and head, in a few texts.

    It is the one whose text helped most: what had to be told there cost so much less than by how common it
    is, which ``alone`` says. In a model that classifies it is the mean over all words.
    """
    shown = []
    kind = "membership" if any(isinstance(step, TSSA) for step in model.modules()) else "attention"
    with in_eval_mode(model), torch.no_grad():
        for i in spaced(GAZES, len(windows)):
            text, _ = _row(model, windows, i)
            reader = None if model.classifier is not None else _reader(model, text, alone)
            if reader is None and model.classifier is None:
                continue
            cut = reader + 1 if model.causal and reader is not None else GAZE_WORDS
            ids = text.ids[:, :cut]
            maps = attention_maps(model, ids, reader)
            parts = pieces(windows.tokenizer, ids[0].tolist())
            target = -1 if reader is None else int(text.targets[0, reader])
            gaze = {
                "name": windows.name(i),
                "kind": kind,
                "words": [piece.text for piece in parts],
                "reader": None if reader is None else _holding(parts, reader),
                "told": spelt(windows.tokenizer, [target]) if target >= 0 else None,
                "layers": [
                    {"layer": layer, "heads": [_by_piece(head, parts, kind) for head in weights[0]]}
                    for layer, weights in maps.items()
                ],
            }
            shown.append(gaze)
    return [gaze for gaze in shown if gaze["layers"]]


def spaced(count: int, among: int) -> list[int]:
    """So many of the numbers below ``among``, or all of them, evenly spaced."""
    count = min(count, among)
    return [k * among // count for k in range(count)]


def _row(model: LanguageModel, windows: Windows, i: int) -> tuple[Tokens, int]:
    """One window on the model's device, as in epoch 0, and its label."""
    tokens, labels, _ = windows[(i, 0)]
    device = next(model.parameters()).device
    return Tokens(*(part.to(device) for part in tokens)), int(labels[0])


def _told(model: LanguageModel, windows: Windows, text: Tokens) -> list[dict[str, Any]]:
    ids, targets = text.ids[0].tolist(), text.targets[0].tolist()
    told = None if windows.task == "whole" else tell(model, text, LIKELIEST)
    places: list[int | None] = [k if target >= 0 else None for k, target in enumerate(targets)]
    words = ids
    if windows.task == "next":  # a word is told at the place before it
        words, places = [*ids, targets[-1]], [None, *places]
    elif windows.task == "masked":
        words = [target if target >= 0 else word for word, target in zip(ids, targets, strict=True)]
    shown = []
    for piece in pieces(windows.tokenizer, words[:WORDS]):
        # Of a character in several words, those that were given cost nothing.
        known = [k for k in places[piece.first : piece.last + 1] if k is not None]
        word: dict[str, Any] = {"text": piece.text, "special": piece.special, "bits": None, "likeliest": []}
        if told is not None and known:
            word["bits"] = sum(float(told.nats[0, k]) for k in known) / math.log(2)
            likeliest, chances = (part[0, known[0]].tolist() for part in (told.likeliest, told.chances))
            word["likeliest"] = [
                [spelt(windows.tokenizer, [w]), chance] for w, chance in zip(likeliest, chances, strict=True)
            ]
        shown.append(word)
    return shown


def _reader(model: LanguageModel, text: Tokens, alone: Tensor) -> int | None:
    """The place where context helped most, away from the beginning where there is a choice."""
    told = tell(model, text)
    targets = text.targets[0, :GAZE_WORDS].cpu()
    counts = targets >= 0
    late = counts & (torch.arange(len(targets)) >= min(24, len(targets) // 2))
    counts = late if bool(late.any()) else counts
    if not bool(counts.any()):
        return None
    gain = alone[targets.clamp_min(0)] - told.nats[0, : len(targets)].cpu().double()
    return int(gain.masked_fill(~counts, -torch.inf).argmax())


def _holding(parts: list[Piece], place: int) -> int:
    return next(i for i, piece in enumerate(parts) if piece.first <= place <= piece.last)


def _by_piece(weights: Tensor, parts: list[Piece], kind: str) -> list[float]:
    """Attention that a piece gets in all, or its words' mean share."""
    values = weights.tolist()
    sums = [sum(values[piece.first : piece.last + 1]) for piece in parts]
    if kind == "membership":
        sums = [total / (p.last - p.first + 1) for total, p in zip(sums, parts, strict=True)]
    return [round(value, 5) for value in sums]
