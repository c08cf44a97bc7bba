r"""How well a model tells words: in bits for each byte of text, which no choice of words can flatter.

A model that reads long words is asked less often and is less sure each time, so nats per word compare only
models that read the same words. Bytes of the text itself are the same for all:

.. math:: \frac{1}{\ln 2}\,\frac{\sum_t -\ln p(w_t \mid w_{<t})}{\text{bytes of the text}}
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import NormalDist
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pellucid.errors import ConfigError, DataError, NumericsError
from pellucid.measure.scores import t_quantile
from pellucid.measure.watch import Text, inputs_of, watch
from pellucid.models.language import LanguageModel
from pellucid.models.modes import in_eval_mode

SCORES_AT_ONCE = 2**24
"""Scores of words that are held at once: a large vocabulary times a batch of long texts is tens of GB."""

MANY = 200
"""Degrees of freedom from which on Student's t is taken for normal."""


class Told(NamedTuple):
    """How a model told the words of a batch.

    Attributes:
        nats: ``-ln p`` of each target ``(b, n)``; zero where none counts.
        rank: how many words were likelier, ``(b, n)``.
        likeliest: the ``k`` likeliest words, best first, ``(b, n, k)``.
        chances: their probabilities, ``(b, n, k)``.
    """

    nats: Float[Tensor, "b n"]
    rank: Int[Tensor, "b n"]
    likeliest: Int[Tensor, "b n k"]
    chances: Float[Tensor, "b n k"]


@torch.no_grad()
def tell(model: LanguageModel, text: Text, likeliest: int = 0) -> Told:
    """How surprising each target was, and what the model held for likelier.

    Args:
        model: causal or masked; put in eval mode by whoever asks.
        text: on the model's device. Targets below zero do not count.
        likeliest: how many words to name at each place.

    Raises:
        ConfigError: a model that classifies texts.
        NumericsError: scores that are not finite.
    """
    if model.classifier is not None:
        raise ConfigError("the model gives scores of classes, not of words - measure its accuracy")
    counted = text.targets >= 0
    real = None if bool(text.real.all()) else text.real
    tokens = model.forward_features(text.ids, real)[counted]
    targets = text.targets[counted]
    parts = []
    for rows in torch.arange(len(targets), device=targets.device).split(_rows_at_once(model)):
        scores = model.forward_head(tokens[rows]).float()
        if not bool(scores.isfinite().all()):
            raise NumericsError("scores hold NaN or infinity - look at the model's weights")
        nats = scores.logsumexp(-1, keepdim=True) - scores
        own = nats.gather(-1, targets[rows, None])
        least, words = nats.topk(min(likeliest, nats.shape[-1]), -1, largest=False)
        parts.append((own[:, 0], (nats < own).sum(-1), words, (-least).exp()))
    found = [torch.cat(column) for column in zip(*parts, strict=True)] if parts else []
    return Told(*(_spread(counted, column) for column in found)) if found else _nothing(counted, likeliest)


class Lens(NamedTuple):
    """What a model would say if it ended after each of its L layers; at 0, after none.

    Attributes:
        likeliest: the ``k`` likeliest words at each place, best first, ``(L + 1, n, k)``.
        chances: their probabilities, ``(L + 1, n, k)``.
        own: that of the target, ``(L + 1, n)``; NaN where there is none.
    """

    likeliest: Int[Tensor, "L n k"]
    chances: Float[Tensor, "L n k"]
    own: Float[Tensor, "L n"]


@torch.no_grad()
def lens(
    model: LanguageModel, ids: Int[Tensor, "1 n"], likeliest: int = 5, targets: Sequence[int] = ()
) -> Lens:
    """Read the tokens behind each layer as the model reads its last ones: its norm, then its words.

    The norm and the words were learnt for the last layer. What they make of an earlier one is a guess at
    what is settled there, not what the layers above read in it (nostalgebraist 2020, "the logit lens").

    Args:
        model: causal or masked; put in eval mode by whoever asks.
        ids: one text, on the model's device.
        likeliest: how many words to name at each place.
        targets: the word to tell at each place, below zero where there is none; none at all unless given.

    Raises:
        ConfigError: a model that classifies texts, or several texts.
        NumericsError: scores that are not finite.
    """
    if model.classifier is not None:
        raise ConfigError("the model gives scores of classes, not of words - look at its classes")
    if len(ids) != 1:
        raise ConfigError(f"{len(ids)} texts - look at one at a time")
    n = ids.shape[1]
    behind = {0: model.embed(ids, torch.arange(n, device=ids.device)[None])[0]}
    watch(model, ids, lambda sighting: behind.update({sighting.layer: sighting.tokens[0]}))
    told = torch.tensor(list(targets) or [-1] * n, device=ids.device)
    layers = []
    for tokens in behind.values():
        parts = []
        for rows in torch.arange(n, device=ids.device).split(_rows_at_once(model)):
            scores = model.forward_head(model.norm(tokens[rows])).float()
            if not bool(scores.isfinite().all()):
                raise NumericsError("scores hold NaN or infinity - look at the model's weights")
            chances = scores.softmax(-1)
            best, words = chances.topk(min(likeliest, chances.shape[-1]), -1)
            own = chances.gather(-1, told[rows, None].clamp_min(0))[:, 0]
            parts.append((words.cpu(), best.cpu(), own.masked_fill(told[rows] < 0, torch.nan).cpu()))
        layers.append([torch.cat(column) for column in zip(*parts, strict=True)])
    return Lens(*(torch.stack(column) for column in zip(*layers, strict=True)))


@dataclass(frozen=True)
class TextScores:
    """How well a model tells words, over all texts that it was given.

    Intervals come from how much texts differ: a text's words are no independent draws, so whole documents
    are what is counted (windows, where it is not known which document they are from). A mean over words is a
    ratio of two sums over documents, and its deviation that of a ratio (Cochran 1977, 6.3); Student's t over
    documents makes an interval of it. None of fewer than two documents.

    Attributes:
        task: ``next`` word, or ``masked`` ones.
        words: targets that counted.
        windows, documents: that they stood in.
        nats: mean of a target; ``perplexity`` is its exponential: as unsure as between so many words.
        interval: of ``nats``.
        bits_per_byte: see the head of this module; None of masked models, which tell a part of the text only,
            and where the bytes are not known.
        bits_interval: of ``bits_per_byte``.
        bytes: of text that the targets stand for.
        accuracy: share of targets that were the likeliest word.
        accuracy_interval: of ``accuracy``.
        confidence: of the intervals.
        by_position: by how far into a window a word stood, ``first`` and ``last`` place from 1, ``nats`` and
            ``words``: what more context is worth. A range is half as long as what lies before it.
    """

    task: Literal["next", "masked"]
    words: int
    windows: int
    documents: int
    nats: float
    interval: tuple[float, float] | None
    bits_per_byte: float | None
    bits_interval: tuple[float, float] | None
    bytes: float | None
    accuracy: float
    accuracy_interval: tuple[float, float] | None
    confidence: float
    by_position: list[dict[str, Any]]
    sums: Float[Tensor, "3 documents"] = field(repr=False, compare=False)
    """Of each document the nats, the words and the bytes, which are NaN where they are not known."""

    @property
    def perplexity(self) -> float:
        return _exp(self.nats)

    @property
    def perplexity_interval(self) -> tuple[float, float] | None:
        return None if self.interval is None else (_exp(self.interval[0]), _exp(self.interval[1]))

    def to_dict(self) -> dict[str, Any]:
        """All but ``sums``, with ``perplexity`` and its interval."""
        own = {"perplexity": self.perplexity, "perplexity_interval": self.perplexity_interval}
        return {key: value for key, value in asdict(self).items() if key != "sums"} | own

    def table(self) -> str:
        """Its numbers as text for a terminal."""
        rows = [
            ("bits per byte", self.bits_per_byte, self.bits_interval, ".4f"),
            ("nats per word", self.nats, self.interval, ".4f"),
            ("perplexity per word", self.perplexity, self.perplexity_interval, ".2f"),
            ("accuracy", self.accuracy, self.accuracy_interval, ".2%"),
        ]
        lines = [
            f"{name:<20} {value:{form}}"
            + ("" if ends is None else f"  ({self.confidence:.0%} {ends[0]:{form}} to {ends[1]:{form}})")
            for name, value, ends, form in rows
            if value is not None
        ]
        told = "words told" if self.task == "next" else "hidden words told"
        return "\n".join([*lines, f"{told:<20} {self.words:,} of {self.documents:,} documents"])


def score_text(
    model: LanguageModel,
    batches: Iterable[Any],
    *,
    text_bytes: float | None = None,
    word_bytes: Float[Tensor, " v"] | None = None,
    documents: Int[Tensor, " w"] | None = None,
    confidence: float = 0.95,
    progress: Callable[[int], None] | None = None,
) -> TextScores:
    """Score a model on ``(text, labels, index)``; each target counts once.

    Args:
        model: causal or masked.
        batches: such as ``eval_token_loader`` gives.
        text_bytes: bytes of the text that all targets of ``batches`` together stand for.
        word_bytes: bytes that each word of the vocabulary stands for, zero of those that stand for none.
            Needed where ``batches`` are not all of a text; with ``text_bytes`` as well they say how these
            are spread over documents.
        documents: of each window its document, by the window's ``index``.
        confidence: of the intervals.
        progress: called with the number of windows after each batch.

    Raises:
        ConfigError: a model that classifies texts.
        DataError: nothing to tell.
        NumericsError: scores that are not finite.
    """
    device = next(model.parameters()).device
    sums = torch.zeros(2, model.context, dtype=torch.float64)
    rows: list[Tensor] = []
    keys: list[Tensor] = []
    seen = 0
    with in_eval_mode(model):
        for batch in batches:
            text: Any = inputs_of(batch, device)
            told = tell(model, text, likeliest=1)
            counted = text.targets >= 0
            right = (told.likeliest[..., 0] == text.targets) & counted
            bytes_ = _bytes(text.targets, counted, word_bytes)
            rows.append(torch.stack([told.nats.double().sum(1), counted.sum(1), right.sum(1), bytes_]).cpu())
            index = None if hasattr(batch, "ids") or len(batch) < 3 else batch[2]
            keys.append(torch.arange(seen, seen + len(text.ids)) if index is None else index.cpu())
            n = text.ids.shape[1]
            sums[0, :n] += told.nats.double().sum(0).cpu()
            sums[1, :n] += counted.sum(0).cpu()
            seen += len(text.ids)
            if progress is not None:
                progress(len(text.ids))
    if not rows or not float(sums[1].sum()):
        raise DataError("no words to tell - give at least one batch with targets that count")
    nats, words, right, bytes_ = _by_document(torch.cat(rows, 1), torch.cat(keys), documents)
    known = _resolved_bytes(bytes_, words, text_bytes, word_bytes) if model.causal else None
    in_bits = None if known is None else nats / math.log(2)
    return TextScores(
        task="next" if model.causal else "masked",
        words=int(words.sum()),
        windows=seen,
        documents=len(words),
        nats=_ratio(nats, words),
        interval=_ratio_interval(nats, words, confidence),
        bits_per_byte=None if in_bits is None or known is None else _ratio(in_bits, known),
        bits_interval=None
        if in_bits is None or known is None
        else _ratio_interval(in_bits, known, confidence),
        bytes=None if known is None else float(known.sum()),
        accuracy=_ratio(right, words),
        accuracy_interval=_within_one(_ratio_interval(right, words, confidence)),
        confidence=confidence,
        by_position=_by_position(sums),
        sums=torch.stack([nats, words, torch.full_like(nats, math.nan) if known is None else known]),
    )


def difference(model: TextScores, other: TextScores) -> tuple[float, tuple[float, float] | None]:
    """How many bits a byte ``model`` needs more than ``other``, and the interval of that.

    The documents are the same, and what is hard in one is hard for both: differences are taken document by
    document, so the interval is narrower than those of the two scores. In nats for a word where bytes are
    not known.

    Raises:
        ConfigError: scores of other documents.
    """
    (nats, words, bytes_), (others, those, _) = model.sums, other.sums
    if nats.shape != others.shape or not torch.equal(words, those):
        raise ConfigError("scores of other words - nothing to pair; score both models on the same documents")
    known = bool(bytes_.isfinite().all())
    below, unit = (bytes_, math.log(2)) if known else (words, 1.0)
    more = (nats - others) / unit
    return _ratio(more, below), _ratio_interval(more, below, model.confidence)


def nats_alone(counts: Int[Tensor, " v"]) -> Float[Tensor, " v"]:
    r"""What each word costs a model that knows only how common it is: :math:`-\ln\frac{c_w + 1}{N + V}`.

    The cost that any use of context has to beat. One is added to every count, so that a word which the
    training text lacks is dear and not impossible.
    """
    raised = counts.double() + 1
    return raised.sum().log() - raised.log()


def _rows_at_once(model: LanguageModel) -> int:
    return max(1, SCORES_AT_ONCE // model.vocab_size)


def _spread(counted: Tensor, values: Tensor) -> Tensor:
    """Values of the places that count, at these places; zero elsewhere."""
    out = values.new_zeros(*counted.shape, *values.shape[1:])
    out[counted] = values
    return out


def _nothing(counted: Tensor, likeliest: int) -> Told:
    shape = (*counted.shape, likeliest)
    zeros, ids = counted.float() * 0, counted.long() * 0
    return Told(zeros, ids, ids.new_zeros(shape), zeros.new_zeros(shape))


def _bytes(targets: Tensor, counted: Tensor, word_bytes: Tensor | None) -> Tensor:
    if word_bytes is None:
        return counted.sum(1).double()
    each = word_bytes.to(targets.device).double()[targets.clamp_min(0)]
    return (each * counted).sum(1)


def _by_document(rows: Tensor, index: Tensor, documents: Tensor | None) -> Tensor:
    """Sums over each document of what is known of its windows, ``(4, documents)``."""
    own = index if documents is None else documents[index]
    _, place = own.unique(return_inverse=True)
    return rows.double().new_zeros(len(rows), int(place.max()) + 1).index_add_(1, place, rows.double())


def _resolved_bytes(
    found: Tensor, words: Tensor, text_bytes: float | None, word_bytes: Tensor | None
) -> Tensor | None:
    """Bytes of each document: as its words say, or a share of all bytes by how many words it has."""
    if text_bytes is None and word_bytes is None:
        return None
    by = words if word_bytes is None else found
    return by if text_bytes is None else by * (text_bytes / float(by.sum()))


def _ratio(above: Tensor, below: Tensor) -> float:
    return float(above.sum() / below.sum())


def _ratio_interval(above: Tensor, below: Tensor, confidence: float) -> tuple[float, float] | None:
    """Of a ratio of sums over documents, by the deviations from it that each document shows."""
    count = len(above)
    if count < 2:
        return None
    ratio = _ratio(above, below)
    rest = above - ratio * below
    deviation = math.sqrt(count / (count - 1) * float(rest.square().sum())) / float(below.sum())
    share = 0.5 + confidence / 2
    times = t_quantile(share, count - 1) if count - 1 < MANY else NormalDist().inv_cdf(share)
    return ratio - times * deviation, ratio + times * deviation


def _within_one(ends: tuple[float, float] | None) -> tuple[float, float] | None:
    return None if ends is None else (max(0.0, ends[0]), min(1.0, ends[1]))


def _by_position(sums: Float[Tensor, "2 n"]) -> list[dict[str, Any]]:
    found = []
    first, step = 0, 1
    while first < sums.shape[1]:
        last = min(first + step, sums.shape[1])
        nats, words = sums[:, first:last].sum(1).tolist()
        if words:
            found.append({"first": first + 1, "last": last, "nats": nats / words, "words": int(words)})
        first, step = last, max(1, (last + 1) // 2)
    return found


def _exp(nats: float) -> float:
    """e^nats, as far as a float goes: an interval from two documents may end anywhere."""
    return math.exp(min(nats, 700.0))
