"""Speed, as ratios taken side by side in one run: ours, the published arithmetic, and a ViT of the same size.

Milliseconds do not travel between machines, nor between minutes on a shared one; a ratio of two things timed
in turns does. So every round times all contenders one after another, beginning with another one each time,
and a result is the median of the rounds' ratios with their smallest and largest.

* *published* is the arithmetic of the authors' program (three products in ISTA, attention weights formed,
  softmax, then mixed) on the very parameters of our model, checked to give our numbers before it is timed;
* *vit* is timm's ViT of the same width, depth, heads and patches, with its MLP four times as wide;
* *product* is one large ``torch.mm`` in the same dtype: what this machine can do at all.

Inference is a forward pass under ``torch.inference_mode``; training is a forward pass, cross-entropy and a
backward pass, without the optimiser's step. bfloat16 means autocast over float32 weights in both.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pellucid.errors import ConfigError, NumericsError, suggest
from pellucid.models import CRATE, create_model
from pellucid.steps import ISTA, MSSA, UntiedMSSA

MODES = ("inference", "training")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DEFAULT_MODELS = ("crate_base_patch16_224", "crate_tiny_patch16_224")

PRODUCT_SIDE = {"cpu": 2048, "cuda": 8192}
"""Rows and columns of the factors of the product that a machine is measured by: large enough to fill it."""

KINKS = {"float32": 1e-3, "bfloat16": 0.2}
"""How far a gradient may be from the exact one, in its norm, by the luck of rounding alone.

A number near a ReLU's kink is rounded to either side, and one such in the class token moves every gradient
behind it: the bfloat16 gradients of one model, in whichever form, are 0.015 or 0.1 from the exact ones.
"""

ROW_KEYS = (
    "model",
    "mode",
    "dtype",
    "batch_size",
    "ours_ms",
    "published_ms",
    "vit_ms",
    "images_per_second",
    "vs_published",
    "vs_vit",
    "gflop",
    "gflops",
    "product_gflops",
    "share_of_product",
    "parameters",
    "vit_parameters",
)

NOTES = (
    "x: how many times faster ours is, median (smallest-largest) of the rounds' ratios; all taken in turns",
    "inference: forward pass; training: forward pass, cross-entropy, backward pass, no optimiser's step",
    "bfloat16: autocast over float32 weights; GFLOP/s: of the products that ours executes",
)


@dataclass(frozen=True, slots=True)
class BenchResult:
    """What was measured, on what.

    Attributes:
        machine: processor, device, threads, versions.
        rows: one dict for each case with the keys ROW_KEYS. ``*_ms`` are medians over the rounds of the
            milliseconds of one call; ``vs_*`` say how many times faster ours is, ``[median, smallest,
            largest]`` of the rounds' ratios; ``gflop`` is what ours computes in one call (1e9 operations) and
            ``gflops`` how fast (1e9 a second), ``product_gflops`` how fast a large ``torch.mm`` is;
            ``share_of_product`` is the median of the rounds' ratios of these two.
    """

    machine: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    def table(self) -> str:
        """The rows as text, units in the head, and what the words mean below."""
        head = [
            "model", "mode", "dtype", "batch", "ours, ms", "images/s",
            "x published (min-max)", "x ViT (min-max)", "GFLOP/s", "of torch.mm",
        ]  # fmt: skip
        body = [
            [
                row["model"], row["mode"], row["dtype"], str(row["batch_size"]), f"{row['ours_ms']:.1f}",
                f"{row['images_per_second']:.0f}", _spread(row["vs_published"]), _spread(row["vs_vit"]),
                f"{row['gflops']:.0f}", f"{row['share_of_product']:.0%}",
            ]
            for row in self.rows
        ]  # fmt: skip
        widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
            for cells in [head, ["-" * width for width in widths], *body]
        ]
        machine = ", ".join(f"{key} {value}" for key, value in self.machine.items())
        return "\n".join([machine, "", *lines, "", *NOTES])


def bench(
    models: Sequence[str] = DEFAULT_MODELS,
    batch_sizes: Sequence[int] = (8, 16),
    modes: Sequence[str] = MODES,
    dtypes: Sequence[str] = tuple(DTYPES),
    rounds: int = 5,
    threads: int | None = None,
    progress: Callable[[str], None] | None = None,
    *,
    device: str = "cpu",
    seconds: float = 0.2,
) -> BenchResult:
    """Time our models beside the published arithmetic and a ViT, every case in interleaved rounds.

    Args:
        models: CRATE models with attention, by name.
        batch_sizes, modes, dtypes: the cases; ``"inference"``, ``"training"``; ``"float32"``, ``"bfloat16"``.
        rounds: how often each contender is timed in each case.
        threads: of torch on a CPU; as they are unless given.
        progress: called with one line before each case.
        device: such as ``"cpu"`` or ``"cuda"``.
        seconds: a contender that is quicker than this is called so many times in a round.

    Raises:
        ConfigError: an unknown model, mode or dtype, a model that has no published arithmetic, numbers below
            1, or a GPU that is not there.
        NumericsError: ours and the published arithmetic disagree.
    """
    _check_options(modes, dtypes, batch_sizes, rounds, threads)
    _check_device(device)
    with _threads(threads), torch.random.fork_rng():
        torch.manual_seed(0)
        result = BenchResult(machine_facts(device))
        contestants = [(name, _crate(name)) for name in models]  # all, so that none is refused after minutes
        for (name, ours), dtype, mode, size in product(contestants, dtypes, modes, batch_sizes):
            if progress is not None:
                progress(f"{name}, {mode}, {dtype}, {size} images")
            row = _measure(ours.to(device), mode, dtype, size, rounds, seconds)
            result.rows.append({"model": name, **row})
    return result


def _measure(
    ours: CRATE, mode: str, dtype: str, batch_size: int, rounds: int, seconds: float
) -> dict[str, Any]:
    device = next(ours.parameters()).device
    images = torch.randn(batch_size, _in_chans(ours), *ours.embed.img_size, device=device)
    labels = torch.arange(batch_size, device=device) % ours.num_classes
    vit = _vit_like(ours).to(device)
    for model in (ours, vit):
        model.train(mode == "training")
    few = min(batch_size, ours.embed_dim // _num_tokens(ours) + 1)  # enough that ISTA takes the form it will
    _check_equal(ours, mode, dtype, images[:few], labels[:few])
    run = _runner(mode, dtype, images, labels)

    side = PRODUCT_SIDE[device.type]
    factors = [torch.randn(side, side, device=device, dtype=DTYPES[dtype]) for _ in range(2)]
    contenders: dict[str, Callable[[], Any]] = {
        "ours": lambda: run(ours, ours),
        "published": lambda: run(ours, lambda x: published_forward(ours, x)),
        "vit": lambda: run(vit, vit),
        "product": lambda: torch.mm(*factors),
    }
    times = _interleaved(contenders, rounds, seconds, device)
    ours_s = median(times["ours"])
    flop = executed_flop(ours, batch_size, mode, dtype)
    speeds = [2 * side**3 / t for t in times["product"]]
    shares = [flop / t / speed for t, speed in zip(times["ours"], speeds, strict=True)]
    return {
        "mode": mode,
        "dtype": dtype,
        "batch_size": batch_size,
        **{f"{name}_ms": 1e3 * median(times[name]) for name in ("ours", "published", "vit")},
        "images_per_second": batch_size / ours_s,
        "vs_published": _ratios(times["published"], times["ours"]),
        "vs_vit": _ratios(times["vit"], times["ours"]),
        "gflop": flop / 1e9,
        "gflops": flop / ours_s / 1e9,
        "product_gflops": median(speeds) / 1e9,
        "share_of_product": median(shares),
        "parameters": _size(ours),
        "vit_parameters": _size(vit),
    }


def published_forward(model: CRATE, images: Tensor) -> Tensor:
    """The published program's arithmetic on the parameters of our model (Yu et al. 2023, their code's form).

    The stem, pooling and head are common to both and are ours.
    """
    z = model.embed(images)
    for compress, sparsify in _steps(model):
        heads, p = compress.num_heads, compress.head_dim
        b, n, _ = z.shape

        w = compress.subspaces(compress.norm(z)).reshape(b, n, heads, p).permute(0, 2, 1, 3)
        similarities = torch.matmul(w, w.transpose(-1, -2)) * p**-0.5
        mixed = torch.matmul(similarities.softmax(dim=-1), w).permute(0, 2, 1, 3).reshape(b, n, heads * p)
        tied = not isinstance(compress, UntiedMSSA)
        move = torch.matmul(mixed, compress.subspaces.weight) if tied else compress.output(mixed)
        z = z + (move if compress.step_size == 1 else compress.step_size * move)

        D, eta, lam = sparsify.dictionary, sparsify.step_size, sparsify.sparsity
        u = sparsify.enter(z)
        analysis = torch.matmul(u, D)
        projected = torch.matmul(torch.matmul(u, D.t()), D)
        z = F.relu(u + eta * (analysis - projected) - eta * lam)
    return model.forward_head(model.norm(z))


def executed_flop(model: CRATE, batch_size: int, mode: str, dtype: str = "float32") -> int:
    """Floating point operations in the matrix products that our model executes in one call.

    A product of (t, d) and (d, m) counts 2 t d m. With t = batch x tokens, width d, and i = heads x p:

    * compress: 2 t d i into the subspaces, 4 t n i in attention, 2 t i d out of them;
    * sparsify: 2 t d^2 with a kept fold (inference on a CPU), and 2 d^3 more where it is made anew;
      4 t d^2 where there are fewer tokens than dimensions;
    * stem 2 t' (patch values) d for t' patches, head 2 batch d classes.

    A backward pass costs twice its forward products, but once for the stem, whose images want no gradient,
    and 10 t n i for fused attention, which forms its weights again (8 t n i where they were kept).
    """
    n, d = _num_tokens(model), model.embed_dim
    t = batch_size * n
    patches = model.embed.grid_size[0] * model.embed.grid_size[1]
    stem = 2 * batch_size * patches * _patch_matrix(model).numel()
    head = 2 * batch_size * d * model.num_classes
    on_cpu = next(model.parameters()).device.type == "cpu"
    training = mode == "training"
    formed = training and on_cpu and dtype == "bfloat16" and n <= 512
    total = stem * (2 if training else 1) + head * (3 if training else 1)
    for compress, _ in _steps(model):
        inner = compress.num_heads * compress.head_dim
        in_and_out, attention = 4 * t * d * inner, 4 * t * n * inner
        if not training and on_cpu:
            ista = 2 * t * d * d
        elif t > d:
            ista = 2 * t * d * d + 2 * d**3
        else:
            ista = 4 * t * d * d
        if training:
            total += 3 * (in_and_out + ista) + attention + (2 if formed else 2.5) * attention
        else:
            total += in_and_out + ista + attention
    return int(total)


def machine_facts(device: str = "cpu") -> dict[str, Any]:
    """What the numbers were taken on."""
    facts: dict[str, Any] = {
        "cpu": _cpu_name(),
        "device": device,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }
    if torch.device(device).type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


# --- the stopwatch ----------------------------------------------------------------------------------------


def _interleaved(
    contenders: dict[str, Callable[[], Any]], rounds: int, seconds: float, device: torch.device
) -> dict[str, list[float]]:
    """Seconds for one call of each contender in each round; a round begins with another one each time."""
    names = list(contenders)
    calls = {}
    for name in names:
        _time(contenders[name], 1, device)  # first touch: allocations, kept folds, kernels chosen
        calls[name] = max(1, round(seconds / max(_time(contenders[name], 1, device), 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(_time(contenders[name], calls[name], device))
    return times


def _time(call: Callable[[], Any], calls: int, device: torch.device) -> float:
    _wait(device)
    start = perf_counter()
    for _ in range(calls):
        call()
    _wait(device)
    return (perf_counter() - start) / calls


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _runner(
    mode: str, dtype: str, images: Tensor, labels: Tensor
) -> Callable[[nn.Module, Callable[[Tensor], Tensor]], Tensor]:
    """``run(module, forward)``: one call of a mode; gradients land in the module's parameters."""
    low = dtype == "bfloat16"

    def run(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Tensor:
        if mode == "inference":
            with torch.inference_mode(), torch.autocast(images.device.type, torch.bfloat16, enabled=low):
                return forward(images)
        module.zero_grad(set_to_none=True)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=low):
            logits = forward(images)
            loss = F.cross_entropy(logits, labels)
        loss.backward()
        return logits.detach()

    return run


def _check_equal(ours: CRATE, mode: str, dtype: str, images: Tensor, labels: Tensor) -> None:
    """Nothing is timed unless ours and the published arithmetic give one answer, and one gradient.

    To 1e-9 of the norm in float64: this decides. In the precision to be timed no two orders of summation
    agree, so there ours is held to the float64 answer, and may not be much further from it than the published
    form is. Gradients are allowed KINKS besides.
    """
    exact, published = _answers(deepcopy(ours).double(), mode, "float64", images.double(), labels)
    errors = [(_distance(a, b), 1e-9) for a, b in zip(exact, published, strict=True)]
    rounded = zip((1e-3, KINKS[dtype]), *_answers(ours, mode, dtype, images, labels), exact, strict=False)
    errors += [(_distance(a, truth), 1.5 * _distance(b, truth) + slack) for slack, a, b, truth in rounded]
    for error, allowed in errors:
        if not error <= allowed:
            raise NumericsError(
                f"ours and the published arithmetic differ: error {error:.1e} in {mode}, {dtype}, "
                f"allowed {allowed:.1e} - their times would not compare"
            )


def _answers(
    model: CRATE, mode: str, dtype: str, images: Tensor, labels: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Logits, and in training all gradients, of our form and of the published one."""
    run = _runner(mode, dtype, images, labels)

    def answer(forward: Callable[[Tensor], Tensor]) -> list[Tensor]:
        logits = run(model, forward).double().flatten()
        if mode == "inference":
            return [logits]
        gradients = [p.grad.double().flatten() for p in model.parameters() if p.grad is not None]
        return [logits, torch.cat(gradients)]

    return answer(model), answer(lambda images: published_forward(model, images))


def _distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


# --- the contenders ---------------------------------------------------------------------------------------


def _vit_like(ours: CRATE) -> nn.Module:
    return timm.models.VisionTransformer(
        img_size=ours.embed.img_size,
        patch_size=ours.embed.patch_size,
        in_chans=_in_chans(ours),
        num_classes=ours.num_classes,
        embed_dim=ours.embed_dim,
        depth=len(ours.layers),
        num_heads=_steps(ours)[0][0].num_heads,
        mlp_ratio=4,
    )


def _crate(name: str) -> CRATE:
    model = create_model(name)
    if not isinstance(model, CRATE) or not _has_published_form(model):
        raise ConfigError(f"{name} has no published arithmetic - bench takes CRATE with attention")
    return model


def _has_published_form(model: CRATE) -> bool:
    return all(
        isinstance(compress, MSSA | UntiedMSSA) and type(sparsify) is ISTA
        for compress, sparsify in _steps(model)
    )


def _steps(model: CRATE) -> list[tuple[Any, Any]]:
    layers: list[Any] = list(model.layers)
    return [(layer["compress"], layer["sparsify"]) for layer in layers]


def _patch_matrix(model: CRATE) -> Tensor:
    stem: Any = model.embed.stem
    weight: Tensor = stem.proj.weight
    return weight


def _in_chans(model: CRATE) -> int:
    height, width = model.embed.patch_size
    return _patch_matrix(model)[0].numel() // (height * width)


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _num_tokens(model: CRATE) -> int:
    height, width = model.embed.grid_size
    return height * width + model.num_prefix_tokens


# --- small things -----------------------------------------------------------------------------------------


def _check_options(
    modes: Sequence[str],
    dtypes: Sequence[str],
    batch_sizes: Sequence[int],
    rounds: int,
    threads: int | None,
) -> None:
    for given, known in ((modes, MODES), (dtypes, DTYPES)):
        for word in given:
            if word not in known:
                raise ConfigError(f"unknown '{word}'{suggest(word, known)}")
    if rounds < 1 or any(size < 1 for size in batch_sizes):
        raise ConfigError(f"rounds {rounds} and batch sizes {tuple(batch_sizes)} must be 1 or larger")
    if threads is not None and threads < 1:
        raise ConfigError(f"threads {threads} must be 1 or larger")


def _check_device(device: str) -> None:
    kind = device.split(":")[0]
    if kind not in PRODUCT_SIDE:
        raise ConfigError(f"unknown device '{device}'{suggest(kind, PRODUCT_SIDE)}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device 'cuda': torch sees no GPU here - take 'cpu'")


@contextmanager
def _threads(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _ratios(theirs: list[float], ours: list[float]) -> list[float]:
    """How many times faster ours is: median, smallest and largest of the rounds."""
    ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
    return [median(ratios), min(ratios), max(ratios)]


def _spread(ratios: Sequence[float]) -> str:
    middle, low, high = ratios
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
