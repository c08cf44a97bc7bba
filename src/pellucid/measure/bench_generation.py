"""Speed and memory of writing text: ours beside a GPT-2 of the same size, in one run, in turns, as ratios.

* *writing* is :func:`~pellucid.models.stream` behind a prompt, each new token with what the layers keep of
  the tokens so far, beside the same with the whole text computed again for every token;
* *at a length* the memory is filled with a random text, a part at a time, and one more token goes through the
  network and to its scores. It is taken back each time, so every token that is timed stands at this length.
  Where that is affordable, a forward pass over the whole text is timed beside it.

What is kept is given in bytes twice. *Counted* is what the arithmetic needs: of attention's keys and values
2nC numbers for each layer, nC where both are one projection, of sums 2C + h. *Held* is what torch has
allocated for it, whole storages, room for the token that is timed included.

Nothing is timed unless the scores of the memory are those of a full forward pass. Weights are random; times
do not depend on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from pellucid.errors import ConfigError, NumericsError, suggest
from pellucid.measure.bench import _check_threads, _interleaved, _ratios, _spread, _threads, machine_facts
from pellucid.models import create_model, stream
from pellucid.models.language import MODELS, LanguageModel
from pellucid.steps import CausalTSSA, Memory
from pellucid.steps.blackbox import MHSA
from pellucid.steps.distance import COORDINATES
from pellucid.steps.mssa import AttentionStep

DEFAULT_MODELS = ("crate_gpt_small", "crate_alpha_gpt_small", "tost_gpt_small")
LENGTHS = (256, 1024, 4096, 16384, 65536)

PART = 512
"""Tokens that are read at once where a memory is filled."""

AGAIN = 2
"""Tokens that are written in a round where each computes the whole text again."""

TOLERANCE = 1e-3
"""How far scores by a memory may be from those of a full forward pass, as a share of the largest.

Of long texts the two add up thousands of numbers in other orders: in float32 3e-5 was seen at 65,536 tokens.
"""

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Generation:
    """What was measured, on what.

    Attributes:
        machine: processor, threads, versions.
        options: the model beside, prompt, new tokens, rows of a batch, depth, rounds, budget in seconds,
            limit of memory in GiB.
        writing: one dict for each model: ``model``, ``parameters``, ``difference`` (of scores from those of
            a full forward pass, as a share of the largest), ``ms`` and ``tokens_per_second`` with the
            memory, all rows of a batch counted, ``again_ms`` without, ``gain`` how many times faster the
            memory makes it, ``vs_beside`` how many times faster than the model beside, both ``[median,
            smallest, largest]`` of the rounds' ratios.
        lengths: one for each model at each length: ``model``, ``tokens``, ``ms`` of one more token,
            ``vs_beside``, ``again_ms``, ``gain`` and ``difference`` where a full pass was affordable,
            ``fill_s`` to read the text, ``counted_bytes`` and ``held_bytes`` of one text, ``skipped``: why
            the length was left out, or None.
    """

    machine: dict[str, Any]
    options: dict[str, Any]
    writing: list[dict[str, Any]] = field(default_factory=list)
    lengths: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> str:
        """Both tables as text, and what was left out."""
        beside = self.options["beside"]
        writing = [
            ["model", "M", "tokens/s", f"x {beside} (min-max)", "tokens/s again", "x again", "difference"],
            *(
                [
                    row["model"], f"{row['parameters'] / 1e6:.1f}", f"{row['tokens_per_second']:.2f}",
                    _spread(row["vs_beside"]), f"{1e3 * self.options['batch_size'] / row['again_ms']:.2f}",
                    _spread(row["gain"]), f"{row['difference']:.0e}",
                ]
                for row in self.writing
            ),
        ]  # fmt: skip
        held = {row["tokens"]: row["held_bytes"] for row in self.lengths if row["model"] == beside}
        lengths = [
            [
                "tokens", "model", "ms/token", f"x {beside} (min-max)", "x again", "counted, MiB",
                "held, MiB", f"of {beside}'s", "difference",
            ],
            *(
                [
                    f"{row['tokens']}", row["model"], f"{row['ms']:.2f}", _spread(row["vs_beside"]),
                    _spread(row["gain"]), f"{row['counted_bytes'] / MIB:.3f}",
                    f"{row['held_bytes'] / MIB:.3f}", _share(row["held_bytes"], held[row["tokens"]]),
                    "-" if row["difference"] is None else f"{row['difference']:.0e}",
                ]
                for row in self.lengths
                if row["skipped"] is None
            ),
        ]  # fmt: skip
        machine = ", ".join(f"{key} {value}" for key, value in {**self.machine, **self.options}.items())
        skipped = [
            f"{row['tokens']} tokens, {row['model']}: {row['skipped']}"
            for row in self.lengths
            if row["skipped"]
        ]
        return "\n".join([machine, "", *_align(writing), "", *_align(lengths), *skipped, "", *NOTES])


NOTES = (
    "x: how many times faster, median (smallest-largest) of the rounds' ratios; all taken in turns",
    "again: the whole text computed again for every token; MiB: kept of one text, of all layers",
    "difference: of scores from those of a full forward pass, as a share of the largest",
)


def bench_generation(
    models: Sequence[str] = DEFAULT_MODELS,
    lengths: Sequence[int] = LENGTHS,
    *,
    beside: str | None = None,
    prompt: int = 256,
    new_tokens: int = 16,
    batch_size: int = 1,
    depth: int | None = None,
    rounds: int = 3,
    threads: int | None = None,
    budget: float = 60.0,
    limit_gib: float = 12.0,
    seconds: float = 0.5,
    progress: Callable[[str], None] | None = None,
) -> Generation:
    """Time causal language models that write, with their memory and without, and what they keep.

    Args:
        models: causal, by name.
        lengths: of texts in memory, in tokens.
        beside: the model that all are compared with; the GPT-2 of the first one's size unless given.
        prompt, new_tokens: words to read, and to write behind them, where writing is timed.
        batch_size: texts at once.
        depth: layers of every model, as named unless given: what is kept, and attention's time, are in
            proportion to it, and long texts are read the sooner.
        rounds: how often each is timed.
        threads: of torch; as they are unless given.
        budget: seconds that a model may take to read a text; a longer one is left out, and so are full
            forward passes that would together take longer.
        limit_gib: a length at which the memories of all models outgrow this is left out, in GiB.
        seconds: a token that is quicker than this is timed so many times in a round.
        progress: called with a line before what takes a while, and one for each result.

    Raises:
        ConfigError: unknown models, such as write no text, or numbers below 1.
        NumericsError: scores by the memory are not those of a full forward pass.
    """
    _check_threads(threads)
    counts = (prompt, new_tokens, batch_size, 1 if depth is None else depth, rounds, *lengths)
    if not models or not lengths or min(counts) < 1 or min(budget, limit_gib) <= 0:
        raise ConfigError(
            "name models and lengths; all numbers must be 1 or larger, budget and limit above 0"
        )
    say = progress or (lambda line: None)
    beside = beside or f"gpt2_{models[0].rsplit('_', 1)[-1]}"
    context = max(*lengths, prompt + new_tokens) + 1
    with _threads(threads), torch.random.fork_rng():
        torch.manual_seed(0)
        writers = {name: _Writer(name, context, depth) for name in dict.fromkeys([*models, beside])}
        options = {
            "beside": beside, "prompt": prompt, "new_tokens": new_tokens, "batch_size": batch_size,
            "depth": depth or "as named", "rounds": rounds, "budget_s": budget, "limit_gib": limit_gib,
        }  # fmt: skip
        result = Generation(machine_facts(), options)
        words = min(writer.model.vocab_size for writer in writers.values())
        text = torch.randint(0, words, (batch_size, context))
        result.writing.extend(_writing(writers, text, beside, prompt, new_tokens, rounds, say))
        for row in result.writing:
            say(_headline(row, beside))
        for tokens in sorted(set(lengths)):
            rows = _at_length(writers, text[:, : tokens + 1], beside, rounds, budget, limit_gib, seconds, say)
            result.lengths.extend(rows)
            for row in rows:
                say(_headline(row, beside))
    return result


class _Writer:
    """A model that writes, and how long it took to read.

    Attributes:
        model: in evaluation mode.
        reading: tokens and seconds of the longest text that it has read.
    """

    def __init__(self, name: str, context: int, depth: int | None = None) -> None:
        causal = [key for key, found in MODELS.items() if found.sizes.get("causal", True)]
        if name not in causal:
            near = suggest(name, causal, DEFAULT_MODELS)
            raise ConfigError(f"'{name}' is no causal language model{near}")
        sizes: dict[str, Any] = {} if depth is None else {"depth": depth}
        model: Any = create_model(name, context=context, **sizes)
        for key, parameter in model.named_parameters():
            if key.endswith("layer_scale"):  # as small as it begins it would hide a memory that is wrong
                torch.nn.init.ones_(parameter)
        self.model = model.eval()
        self.reading: tuple[int, float] = (0, 0.0)

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    @torch.inference_mode()
    def read(self, text: Tensor, budget: float) -> Memory | str:
        """A memory of the text with room for one token more; or why it would take too long."""
        tokens = text.shape[1]
        before, took = self.reading
        if before and took * tokens / before > budget:
            return f"reading takes over {took * tokens / before:.0f} s, budget {budget:g} s"
        memory = Memory(len(text), room=tokens + 1)
        start = perf_counter()
        for part in text.split(PART, 1):
            begun = perf_counter()
            self.model.resume(part, memory)
            now = perf_counter()
            left = (now - begun) * (tokens - memory.longest) / part.shape[1]
            if now - start + left > budget:  # a part takes no less than the one before it
                return f"reading takes over {now - start + left:.0f} s, budget {budget:g} s"
        self.reading = (tokens, perf_counter() - start)
        return memory

    @torch.inference_mode()
    def add(self, new: Tensor, memory: Memory) -> Tensor:
        """Scores after one more word, the memory as before."""
        with _taken_back(memory):
            return self.model.forward_head(self.model.resume(new, memory)[:, -1])

    @torch.inference_mode()
    def again(self, text: Tensor) -> Tensor:
        """The same from the whole text."""
        return self.model.forward_head(self.model.forward_features(text)[:, -1])


@contextmanager
def _taken_back(memory: Memory) -> Iterator[None]:
    """What arrives meanwhile has not arrived. Of a cache its place is free again; sums are new tensors."""
    states, lengths, longest = dict(memory.states), memory.lengths, memory.longest
    yield
    memory.states, memory.lengths, memory.longest = states, lengths, longest


def _writing(
    writers: dict[str, _Writer],
    text: Tensor,
    beside: str,
    prompt: int,
    new_tokens: int,
    rounds: int,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Rows of what it takes to write behind a prompt."""
    read = text[:, :prompt]
    differences = {}
    for name, writer in writers.items():
        differences[name] = _difference(name, *_scores(writer.model, text[:, : prompt + new_tokens], prompt))
        say(f"{name}: scores differ by {differences[name]:.1e} of the largest")
    jobs = [(name, cache) for name in writers for cache in (True, False)]
    times: dict[tuple[str, bool], list[float]] = {job: [] for job in jobs}
    for index in range(rounds + 1):  # the first touches everything and does not count
        say(f"writing behind {prompt} words, round {index} of {rounds}")
        first = index % len(jobs)
        for job in jobs[first:] + jobs[:first]:
            name, cache = job
            count = new_tokens if cache else min(AGAIN, new_tokens)
            taken = _write(writers[name].model, read, count, cache)
            if index:
                times[job].append(taken)
    return [
        {
            "model": name,
            "parameters": writer.parameters,
            "difference": differences[name],
            "ms": 1e3 * median(times[name, True]),
            "tokens_per_second": len(text) / median(times[name, True]),
            "vs_beside": _ratios(times[beside, True], times[name, True]),
            "again_ms": 1e3 * median(times[name, False]),
            "gain": _ratios(times[name, False], times[name, True]),
        }
        for name, writer in writers.items()
    ]


def _write(model: LanguageModel, prompt: Tensor, count: int, cache: bool) -> float:
    """Seconds for each of so many new tokens; the first besides, which reads the prompt."""
    tokens = stream(model, prompt, count + 1, cache=cache)
    next(tokens)
    start = perf_counter()
    for _ in tokens:
        pass
    return (perf_counter() - start) / count


@torch.inference_mode()
def _scores(model: LanguageModel, text: Tensor, prompt: int) -> tuple[Tensor, Tensor]:
    """Of all words behind a prompt: one at a time by a memory, and from one forward pass."""
    memory = Memory(len(text))
    parts = [*text[:, :prompt].split(PART, 1), *text[:, prompt:].split(1, 1)]
    tokens = torch.cat([model.resume(part, memory) for part in parts], 1)
    return model.forward_head(tokens[:, prompt - 1 :]), model(text)[:, prompt - 1 :]


def _difference(name: str, ours: Tensor, full: Tensor) -> float:
    """The largest difference of scores, as a share of the largest of them."""
    found = ((ours - full).abs().max() / full.abs().max()).item()
    if not found <= TOLERANCE:
        raise NumericsError(
            f"{name}: scores by the memory differ from a full forward pass by {found:.1e} of the largest, "
            f"allowed {TOLERANCE:.0e} - their times would not compare"
        )
    return found


def _at_length(
    writers: dict[str, _Writer],
    text: Tensor,
    beside: str,
    rounds: int,
    budget: float,
    limit_gib: float,
    seconds: float,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Rows of one more token behind a text of some length."""
    tokens, new = text.shape[1] - 1, text[:, -1:]
    empty = dict.fromkeys(("ms", "vs_beside", "again_ms", "gain", "difference", "fill_s", "held_bytes"))
    rows: dict[str, dict[str, Any]] = {
        name: {
            "model": name, "tokens": tokens, **empty, "skipped": None,
            "counted_bytes": counted_bytes(writer.model, tokens),
        }
        for name, writer in writers.items()
    }  # fmt: skip
    needed = len(text) * sum(row["counted_bytes"] for row in rows.values()) / 2**30
    if needed > limit_gib:
        for row in rows.values():
            row["skipped"] = f"memories of {needed:.2g} GiB together, limit {limit_gib:g} GiB"
        return list(rows.values())
    calls: dict[str, Callable[[], Any]] = {}
    full: dict[str, Callable[[], Any]] = {}
    for name, writer in writers.items():
        say(f"{tokens} tokens: {name} reads")
        memory = writer.read(text[:, :-1], budget)
        if isinstance(memory, str):
            rows[name]["skipped"] = memory
            continue
        held = memory.nbytes() // len(text)
        rows[name] |= {"fill_s": writer.reading[1], "held_bytes": held}
        calls[name] = partial(writer.add, new, memory)
        if (rounds + 3) * writer.reading[1] <= budget:
            full[name] = partial(writer.again, text)
            rows[name]["difference"] = _difference(name, calls[name](), full[name]())
    if not calls:
        return list(rows.values())
    say(f"{tokens} tokens: {', '.join(calls)} in turns")
    again = {f"{name} again": call for name, call in full.items()}
    times = _interleaved({**calls, **again}, rounds, seconds, text.device)
    for name in calls:
        rows[name]["ms"] = 1e3 * median(times[name])
        if beside in calls:
            rows[name]["vs_beside"] = _ratios(times[beside], times[name])
        if name in full:
            rows[name]["again_ms"] = 1e3 * median(times[f"{name} again"])
            rows[name]["gain"] = _ratios(times[f"{name} again"], times[name])
    return list(rows.values())


def counted_bytes(model: LanguageModel, tokens: int) -> int:
    """Bytes of what the arithmetic of all layers needs of so many tokens of one text.

    Of attention keys and values; where they are one projection, that; where distance counts, with the place
    of each in every head; of causal TSSA three running sums, in float32 at least.
    """
    size = model.embed.words.weight.element_size()
    total = 0
    for layer in model.layers:
        for step in layer.values():  # type: ignore[operator]
            if isinstance(step, AttentionStep):
                total += size * tokens * step.num_heads * (step.head_dim + _more(step))
            elif isinstance(step, MHSA):
                total += size * 2 * tokens * (step.output.in_features + step.num_heads * _more(step))
            elif isinstance(step, CausalTSSA):
                total += max(size, 4) * step.num_heads * (2 * step.head_dim + 1)
            elif step.sees != "itself":
                raise TypeError(f"what {type(step).__name__} keeps of a token is not known here")
    return total


def _more(step: AttentionStep | MHSA) -> int:
    """Coordinates that a head keeps besides its projection."""
    return COORDINATES if step.distance else 0


def _headline(row: dict[str, Any], beside: str) -> str:
    """A run that is stopped has said what it found."""
    if row.get("skipped"):
        return f"    {row['model']}: {row['skipped']}"
    ratios = f"{_spread(row['vs_beside'])} x {beside}, {_spread(row['gain'])} x again"
    held = f"; {row['held_bytes']} bytes" if "held_bytes" in row else ""
    return f"    {row['model']}: {row['ms']:.2f} ms, {ratios}{held}"


def _share(part: int, whole: int | None) -> str:
    return "-" if whole is None else f"{part / whole:.3g}"


def _align(rows: list[list[str]]) -> list[str]:
    """Columns side by side, a line below the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
        for cells in rows
    ]
