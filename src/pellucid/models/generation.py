"""Text from a causal language model, one token at a time.

A step keeps what it needs of the tokens so far (:class:`~pellucid.steps.Memory`), so that each new one goes
through the network alone: CRATE one tensor for each layer, as query, key and value are one projection; ToST
three running sums, as large after a thousand tokens as after one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pellucid.errors import ConfigError, NumericsError
from pellucid.models.language import LanguageModel
from pellucid.steps import Memory

Prompts = Tensor | Sequence[Tensor] | Sequence[Sequence[int]]

ENDED = -1
"""What :func:`stream` gives for a row that has ended."""

PART = 512
"""So many tokens of a prompt go through the network at once.

What a layer needs on its way is as large as they are: of a long prompt, more than the sums that ToST keeps.
"""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from its scores.

    Attributes:
        temperature: scores are divided by it; 0 takes the likeliest.
        top_k: leave only so many of the likeliest.
        top_p: leave only the likeliest that together reach this probability, at least one.
        repetition_penalty: a word that stands in the row already has its score divided by this where
            positive, multiplied where negative (Keskar et al. 2019); 1 changes nothing.
        seed: row i draws from ``seed + i``, whatever stands in the rows beside it.
    """

    temperature: int | float = 1.0
    top_k: int | None = None
    top_p: int | float | None = None
    repetition_penalty: int | float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ConfigError(f"temperature is {self.temperature}; 0 takes the likeliest, 1 the model's own")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k is {self.top_k}; at least one token must be left")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; expected a probability above 0")
        if not self.repetition_penalty > 0:
            raise ConfigError(f"repetition_penalty is {self.repetition_penalty}; 1 changes nothing")

    def distribution(self, scores: Float[Tensor, "b v"], used: Bool[Tensor, "b v"]) -> Float[Tensor, "b v"]:
        """Probabilities that the next token is drawn from; ``used``: which words stand in the row already."""
        scores = scores.float()
        if self.repetition_penalty != 1:
            penalised = torch.where(
                scores > 0, scores / self.repetition_penalty, scores * self.repetition_penalty
            )
            scores = torch.where(used, penalised, scores)
        if self.temperature == 0:
            return torch.zeros_like(scores).scatter_(-1, scores.argmax(-1, keepdim=True), 1.0)
        # The largest to zero first: a small temperature must not take scores to infinity.
        scores = (scores - scores.amax(-1, keepdim=True)) / self.temperature
        if self.top_k is not None and self.top_k < scores.shape[-1]:
            smallest = scores.topk(self.top_k, -1).values[:, -1:]
            scores = scores.masked_fill(scores < smallest, -torch.inf)
        if self.top_p is not None and self.top_p < 1:
            ranked, order = scores.softmax(-1).sort(dim=-1, descending=True, stable=True)
            beyond = ranked.cumsum(-1) - ranked >= self.top_p
            scores = scores.masked_fill(torch.zeros_like(beyond).scatter_(-1, order, beyond), -torch.inf)
        return scores.softmax(-1)


def generate(
    model: LanguageModel,
    prompts: Prompts,
    max_new_tokens: int,
    *,
    stop: int | None = None,
    cache: bool = True,
    temperature: int | float = 1.0,
    top_k: int | None = None,
    top_p: int | float | None = None,
    repetition_penalty: int | float = 1.0,
    seed: int = 0,
) -> list[Tensor]:
    """Each prompt with what the model writes behind it.

    Args:
        model: causal.
        prompts: one row ``(n,)`` or ``(b, n)``, or rows of different lengths, each at least one token.
        max_new_tokens: how many to write to each row at most.
        stop: a word that ends a row; it is kept.
        cache: False computes the whole text again for every token, to the same scores up to rounding.
        temperature, top_k, top_p, repetition_penalty, seed: see :class:`Sampling`.

    Returns:
        One row for each prompt: its tokens and the new ones.

    Raises:
        ConfigError: a masked model, a text longer than its context, or options that cannot be.
        NumericsError: scores that are not finite.
    """
    rows = _rows(prompts)
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty, seed)
    written = list(stream(model, rows, max_new_tokens, sampling, stop=stop, cache=cache))
    if not written:
        return rows
    new = torch.stack(written, 1).to(rows[0].device)
    return [torch.cat([row, fresh[fresh != ENDED]]) for row, fresh in zip(rows, new, strict=True)]


def stream(
    model: LanguageModel,
    prompts: Prompts,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    *,
    stop: int | None = None,
    cache: bool = True,
) -> Iterator[Int[Tensor, " b"]]:
    """The next token of every row, as soon as it is there; :data:`ENDED` for rows that have ended.

    Args and errors as for :func:`generate`; what cannot be is refused at the call, before the first token.
    """
    rows = _rows(prompts)
    if not model.causal:
        raise ConfigError("a masked model fills in what is hidden and writes no text - take a causal one")
    if max_new_tokens < 0:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}; expected 0 or more")
    longest = max(len(row) for row in rows)
    if longest + max_new_tokens - 1 > model.context:  # the last token is written and not read
        raise ConfigError(
            f"{longest} tokens and {max_new_tokens} to come, and the model was built for a context of "
            f"{model.context} - ask for at most {max(0, model.context - longest + 1)}, or shorten the prompt"
        )
    return _stream(model, rows, max_new_tokens, sampling or Sampling(), stop, cache)


def _stream(
    model: LanguageModel, rows: list[Tensor], count: int, sampling: Sampling, stop: int | None, cache: bool
) -> Iterator[Tensor]:
    device = model.embed.words.weight.device
    rows = [row.to(device) for row in rows]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    used = torch.zeros(len(rows), model.vocab_size, dtype=torch.bool, device=device)
    ended = torch.zeros(len(rows), dtype=torch.bool, device=device)
    draws = [torch.Generator().manual_seed(sampling.seed + i) for i in range(len(rows))]
    each = torch.arange(len(rows), device=device)
    memory, new = Memory(len(rows), device, room=ids.shape[1] + count - 1), ids
    penalised = sampling.repetition_penalty != 1
    for written in range(count):
        with torch.inference_mode():
            if cache and written:
                tokens = model.resume(new[:, None], memory)[:, 0]
            elif cache:
                tokens = _read(model, ids, lengths, memory)
            else:
                real = torch.arange(ids.shape[1], device=device) < lengths[:, None]
                tokens = model.forward_features(ids, real)[each, lengths - 1]
            if penalised and not written:  # the model has refused numbers that are no words
                for row, words in zip(used, rows, strict=True):
                    row[words] = True
            scores = model.forward_head(tokens)
            if not bool(scores.isfinite().all()):
                raise NumericsError("scores hold NaN or infinity - look at the model's weights")
            new = _draw(sampling.distribution(scores, used), draws)
        yield new.masked_fill(ended, ENDED)
        if stop is not None:
            ended = ended | (new == stop)
            if bool(ended.all()):
                return
        if penalised:
            used[each, new] = True
        if not cache:
            ids = torch.nn.functional.pad(ids, (0, 1)).index_put((each, lengths), new)
        lengths = lengths + 1


def _read(model: LanguageModel, ids: Tensor, lengths: Tensor, memory: Memory) -> Float[Tensor, "b d"]:
    """The prompts into the memory, a part at a time; the normalised last token of each."""
    even = bool((lengths == ids.shape[1]).all())
    each = torch.arange(len(ids), device=ids.device)
    found = torch.empty(0, device=ids.device)
    for start in range(0, ids.shape[1], PART):
        part, left = ids[:, start : start + PART], lengths - start
        tokens = model.resume(part, memory, None if even else left.clamp(0, part.shape[1]))
        last = tokens[each, (left - 1).clamp(0, part.shape[1] - 1)]
        found = last if start == 0 else torch.where(left[:, None] > 0, last, found)
    return found


def _draw(chances: Float[Tensor, "b v"], draws: list[torch.Generator]) -> Int[Tensor, " b"]:
    """A word of each row: where the running sum of its chances passes a number of its own generator."""
    numbers = torch.stack([torch.rand((), generator=draw, dtype=torch.float64) for draw in draws])
    sums = chances.double().cumsum(-1)
    passed = sums > numbers.to(chances.device)[:, None] * sums[:, -1:]
    return passed.int().argmax(-1)


def _rows(prompts: Prompts) -> list[Tensor]:
    """Rows of words, checked."""
    if isinstance(prompts, Tensor):
        rows = list(prompts) if prompts.dim() == 2 else [prompts]
    else:
        rows = [torch.as_tensor(row) for row in prompts]
    if not rows:
        raise ConfigError("no prompts - give at least one")
    for i, row in enumerate(rows):
        if row.dim() != 1 or len(row) == 0 or row.dtype.is_floating_point or row.dtype == torch.bool:
            raise ConfigError(
                f"prompt {i} has shape {tuple(row.shape)} and {row.dtype}; expected words by their "
                f"numbers, at least one - begin with the token that begins a text"
            )
    return [row.long() for row in rows]
