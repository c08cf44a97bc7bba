"""How fast ReduNet's layers are made: batched factorisations beside a loop of inverses, in turns.

A layer of ReduNet is one matrix for the whole and one for each class, for signals at each frequency. Written
down as in the papers that is a Python loop of ``torch.linalg.inv`` on full matrices, over all frequencies of
a complex spectrum. Ours is one batch of Cholesky factorisations, on the smaller side (Woodbury's identity)
where classes are small, and on half of the spectrum. Both make the same matrices, which is checked before
anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from pellucid.errors import NumericsError
from pellucid.steps.rate_reduction import EPS, one_hot, operators, spectrum


@dataclass(frozen=True)
class Case:
    """A layer to build.

    Attributes:
        name: what it stands for.
        classes, per_class: how many classes of how many tokens.
        shape: ``(d,)`` for vectors, ``(C, T)`` or ``(C, H, W)`` for signals.
    """

    name: str
    classes: int
    per_class: int
    shape: tuple[int, ...]


CASES = (
    Case("vectors, many tokens", 10, 500, (256,)),
    Case("vectors, few tokens", 10, 20, (784,)),
    Case("signals of 200 places", 10, 10, (15, 200)),
    Case("pictures of 28 x 28", 10, 10, (35, 28, 28)),
)
"""The last two as published: rotated digits in polar coordinates, and translated ones."""


Maker = Callable[[Case, Tensor, Tensor], list[Tensor]]


def bench_redunet(
    cases: Sequence[Case] = CASES,
    *,
    device: str = "cpu",
    rounds: int = 5,
    seed: int = 0,
    progress: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Time the making of one layer's operators, both ways, in turns.

    Args:
        cases: layers to build.
        device: where.
        rounds: turns; the first of each is not counted.
        seed: of the tokens.
        progress: gets a line for each case.

    Returns:
        For each case ``name``, ``classes``, ``per_class``, ``shape``, ``ours_ms``, ``loop_ms`` (medians) and
        ``vs_loop``: how many times faster ours is, ``[median, smallest, largest]`` of the rounds' ratios.

    Raises:
        NumericsError: the two do not make the same matrices.
    """
    rows = []
    for case in cases:
        generator = torch.Generator().manual_seed(seed)
        width = torch.Size(case.shape).numel()
        z = torch.randn(case.classes * case.per_class, width, generator=generator)
        z = F.normalize(z, dim=-1).to(device)
        labels = torch.arange(case.classes, device=device).repeat_interleave(case.per_class)
        _check_equal(case, z, labels)
        times: dict[Maker, list[float]] = {batched: [], loop_of_inverses: []}
        for turn in range(rounds + 1):
            for make in list(times)[:: 1 if turn % 2 else -1]:
                seconds = _time(make, case, z, labels)
                if turn:
                    times[make].append(seconds * 1e3)
        ratios = [loop / own for own, loop in zip(*times.values(), strict=True)]
        own, loop = map(median, times.values())
        rows.append(
            {
                "name": case.name,
                "classes": case.classes,
                "per_class": case.per_class,
                "shape": list(case.shape),
                "ours_ms": own,
                "loop_ms": loop,
                "vs_loop": [median(ratios), min(ratios), max(ratios)],
            }
        )
        progress(f"{case.name}: {median(ratios):.1f} times as fast as a loop of inverses")
    return rows


def batched(case: Case, z: Float[Tensor, "n d"], labels: Tensor) -> list[Tensor]:
    """E and every C_j as the library makes them; at half of the frequencies, which are all that it needs."""
    v = z if len(case.shape) == 1 else spectrum(z, case.shape)
    expand, compress = operators(v, one_hot(labels, z), EPS)
    return [expand, *compress]


def loop_of_inverses(case: Case, z: Float[Tensor, "n d"], labels: Tensor) -> list[Tensor]:
    """E and every C_j as the papers write them: one inverse after another, at each frequency."""
    groups = [z, *[z[labels == j] for j in range(case.classes)]]
    if len(case.shape) == 1:
        return [_inverse(group.mT) for group in groups]
    found = []
    for group in groups:
        places = tuple(range(2, 1 + len(case.shape)))
        spectrum = torch.fft.fftn(group.unflatten(-1, case.shape), dim=places, norm="ortho").flatten(2)
        found.append(torch.stack([_inverse(spectrum[..., w].mT) for w in range(spectrum.shape[-1])]))
    return found


def _inverse(columns: Tensor) -> Tensor:
    d, n = columns.shape
    a = d / (n * EPS**2)
    return a * torch.linalg.inv(
        torch.eye(d, dtype=columns.dtype, device=columns.device) + a * columns @ columns.mH
    )


def _check_equal(case: Case, z: Tensor, labels: Tensor) -> None:
    for found, whole in zip(batched(case, z, labels), loop_of_inverses(case, z, labels), strict=True):
        expected = whole
        if len(case.shape) > 1:
            *first, last = case.shape[1:]
            kept = whole.unflatten(0, (*first, last)).narrow(len(first), 0, last // 2 + 1)
            expected = kept.flatten(0, len(first))
        off = float(torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected))
        if not off < 1e-3:
            raise NumericsError(f"{case.name}: the two layers differ by {off:.1e} of their length")


def _time(make: Maker, case: Case, z: Tensor, labels: Tensor) -> float:
    """Seconds of one call. A GPU is waited for."""
    if z.device.type == "cuda":
        torch.cuda.synchronize(z.device)
    started = perf_counter()
    make(case, z, labels)
    if z.device.type == "cuda":
        torch.cuda.synchronize(z.device)
    return perf_counter() - started
