"""Time and memory of one compression step against the number of tokens: what linear attention is worth.

Four ways to step, of the same width and number of heads, on one square picture of g x g patches at a time:

* *TSSA*, from second moments only, and the same *as published*, one operation after the other;
* *MSSA*, with ``scaled_dot_product_attention``, which forms its weights a block at a time;
* *explicit*, the same MSSA with its n x n weights formed, until they would outgrow a stated limit.

Time is a forward pass under ``torch.inference_mode`` in float32, in turns, the shortest of the rounds: the
numbers of tokens are not compared within a round, and what another program takes only adds.
Memory is the largest sum of tensors that were alive at once, the result included, weights and input not: each
allocation of torch is recorded, so it is exact at every size, where the size of the process is too coarse to
show a few hundred tokens. Work space that the linear algebra library takes for itself is not in it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from math import log
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from pellucid.errors import ConfigError
from pellucid.measure.bench import _check_threads, _interleaved, _threads, machine_facts
from pellucid.measure.published_arithmetic import mssa, tssa
from pellucid.steps import MSSA, TSSA

GRIDS = (14, 20, 28, 40, 56, 80, 112, 160, 224)
"""Patches along a side; 196 to 50,176 tokens."""

METHODS = {
    "tssa": "TSSA",
    "published": "TSSA as published",
    "mssa": "MSSA, scaled_dot_product_attention",
    "explicit": "MSSA, weights formed",
}
COLOURS = {"tssa": "#0b7a75", "published": "#7fb8b4", "mssa": "#c4501b", "explicit": "#6b6b76"}

FIT_FROM = 3136
"""Tokens from which on exponents are fitted: below, the projections cost as much as attention."""


@dataclass(frozen=True, slots=True)
class TokenScaling:
    """What was measured, on what.

    Attributes:
        machine: processor, threads, versions.
        options: width, heads, rounds, limit of memory in GiB.
        rows: ``method``, ``tokens``, ``ms``, ``peak_mib``; the last two None where ``skipped`` says why.
    """

    machine: dict[str, Any]
    options: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def exponents(self) -> dict[str, dict[str, float]]:
        """Method -> ``time``, ``memory``: e of the fit n^e to the points from FIT_FROM tokens on."""
        return {
            method: {"time": fit_exponent(large, "ms"), "memory": fit_exponent(large, "peak_mib")}
            for method in METHODS
            if len(large := [row for row in self._measured(method) if row["tokens"] >= FIT_FROM]) > 1
        }

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "exponents": self.exponents}

    def to_json(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    def table(self) -> str:
        """A line for each number of tokens: milliseconds and MiB; then exponents, and what is absent."""
        lines = ["tokens".ljust(10) + "".join(f"{method + ', ms':>14}{'MiB':>10}" for method in METHODS)]
        for tokens in sorted({row["tokens"] for row in self.rows}):
            cells = [
                row
                for method in METHODS
                for row in self.rows
                if (row["method"], row["tokens"]) == (method, tokens)
            ]
            shown = [
                f"{'-':>14}{'-':>10}" if row["ms"] is None else f"{row['ms']:>14.2f}{row['peak_mib']:>10.1f}"
                for row in cells
            ]
            lines.append(f"{tokens:<10}" + "".join(shown))
        for method, fit in self.exponents.items():
            lines.append(
                f"{method}: time as n^{fit['time']:.2f}, memory as n^{fit['memory']:.2f}, from n = {FIT_FROM}"
            )
        skipped = {
            f"{row['method']}, {row['tokens']} tokens: {row['skipped']}"
            for row in self.rows
            if row["skipped"]
        }
        machine = ", ".join(f"{key} {value}" for key, value in {**self.machine, **self.options}.items())
        return "\n".join([machine, "", *lines, *sorted(skipped)])

    def picture(self, *paths: str | Path) -> None:
        """Time and memory against tokens, both axes logarithmic; the suffix says the format.

        Raises:
            ConfigError: matplotlib is not installed, or a suffix that it does not know.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ConfigError("a picture needs matplotlib - pip install 'pellucid[pictures]'") from error

        figure = Figure(figsize=(10, 4.6), layout="constrained")
        panels = figure.subplots(1, 2)
        titles = ("Time of one step, ms", "Peak memory of one step, MiB")
        for axes, key, title in zip(panels, ("ms", "peak_mib"), titles, strict=True):
            for method, colour in COLOURS.items():
                rows = self._measured(method)
                x, y = [row["tokens"] for row in rows], [row[key] for row in rows]
                axes.plot(
                    x, y, color=colour, marker="o", markersize=4, linewidth=2, label=self._label(method)
                )
                if method in self.exponents:
                    power = f"$n^{{{self.exponents[method]['time' if key == 'ms' else 'memory']:.2f}}}$"
                    offset = {"tssa": (7, -1), "mssa": (7, -9)}.get(method, (-4, 6))
                    side = "left" if offset[0] > 0 else "right"
                    axes.annotate(
                        power, (x[-1], y[-1]), offset, textcoords="offset points", ha=side, color=colour
                    )
            axes.set(xscale="log", yscale="log", xlabel="tokens")
            axes.set_title(title, loc="left", fontsize=11)
            grids = sorted({row["tokens"] for row in self.rows})[::2]
            axes.set_xticks(grids, [f"{n:,}" for n in grids])
            axes.minorticks_off()
            axes.yaxis.set_major_formatter("{x:,g}")
            axes.margins(x=0.12)
            axes.grid(color="#dddddd", linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
        figure.legend(
            *panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=4, frameon=False
        )
        for path in paths:
            try:
                figure.savefig(path, dpi=150, metadata={"Date": None} if str(path).endswith(".svg") else None)
            except ValueError as error:
                raise ConfigError(f"{path}: {error} - name a .png or an .svg file") from error

    def _measured(self, method: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["method"] == method and row["ms"] is not None]

    def _label(self, method: str) -> str:
        stops = any(row["skipped"] for row in self.rows if row["method"] == method)
        return METHODS[method] + (f" (stops at {self.options['limit_gib']:g} GiB)" if stops else "")


def token_scaling(
    grids: Sequence[int] = GRIDS,
    dim: int = 192,
    num_heads: int = 3,
    *,
    limit_gib: float = 4.0,
    rounds: int = 5,
    seconds: float = 0.2,
    threads: int = 1,
    progress: Callable[[str], None] | None = None,
) -> TokenScaling:
    """Measure one compression step of each kind at each number of tokens.

    Args:
        grids: patches along a side; tokens are their squares.
        dim, num_heads: of the steps.
        limit_gib: explicit attention stops where its weights, before and after their softmax, outgrow this.
        rounds: how often each is timed.
        seconds: what is quicker than this is called so many times in a round.
        threads: of torch.
        progress: called with one line for each number of tokens.

    Raises:
        ConfigError: numbers below 1, or a width that the heads do not divide.
    """
    if not grids or rounds < 1 or limit_gib <= 0 or min(*grids, dim, num_heads) < 1:
        raise ConfigError("grids, width, heads and rounds must be 1 or larger, the limit of memory above 0")
    if dim % num_heads:
        raise ConfigError(f"a width of {dim} is not divisible by {num_heads} heads")
    _check_threads(threads)
    with _threads(threads), torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(0)
        options = {"dim": dim, "heads": num_heads, "rounds": rounds, "limit_gib": limit_gib}
        result = TokenScaling(machine_facts(), options)
        norms = [nn.LayerNorm(dim) for _ in range(2)]
        statistics, attention = TSSA(dim, num_heads, norm=norms[0]), MSSA(dim, num_heads, norm=norms[1])
        steps: dict[str, Callable[[Tensor], Tensor]] = {
            "tssa": statistics, "published": partial(tssa, statistics),
            "mssa": attention, "explicit": partial(mssa, attention),
        }  # fmt: skip
        for n in (grid * grid for grid in grids):
            if progress is not None:
                progress(f"{n} tokens")
            z = torch.randn(1, n, dim)
            needed = 2 * num_heads * n * n * z.element_size() / 2**30
            calls: dict[str, Callable[[], Any]] = {
                name: partial(step, z)
                for name, step in steps.items()
                if name != "explicit" or needed <= limit_gib
            }
            times = _interleaved(calls, rounds, seconds, z.device)
            for name in steps:
                row = {"method": name, "tokens": n, "ms": None, "peak_mib": None, "skipped": None}
                if name in calls:
                    row |= {"ms": 1e3 * min(times[name]), "peak_mib": peak_memory(calls[name]) / 2**20}
                else:
                    row["skipped"] = f"weights of {needed:.1f} GiB, limit {limit_gib:g} GiB"
                result.rows.append(row)
    return result


def peak_memory(call: Callable[[], Any]) -> int:
    """Bytes of the tensors that a call makes, at the moment when most are alive, its result among them.

    Of the CPU, from torch's record of every allocation.
    """
    with _silent_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = call()
    del result
    events = record.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    alive = peak = 0
    for _, change in changes:
        alive += change
        peak = max(peak, alive)
    return peak


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Torch's profiler writes of its starts and stops, and of GPUs that are not there, past Python."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def fit_exponent(rows: Sequence[dict[str, Any]], key: str) -> float:
    """e of the least-squares fit ``log value = e log tokens + constant``."""
    x, y = [log(row["tokens"]) for row in rows], [log(row[key]) for row in rows]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    over = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return over / sum((a - mean_x) ** 2 for a in x)
