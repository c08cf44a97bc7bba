"""Speed, as ratios taken side by side in one run: ours, the published arithmetic, and a ViT of the same size.

Milliseconds do not travel between machines, nor between minutes on a shared one; a ratio of two things timed
in turns does. So every round times all contenders one after another, beginning with another one each time,
and a result is the median of the rounds' ratios with their smallest and largest.

* *published* is the arithmetic of the authors' program, ``published_arithmetic.py``, on the very parameters
  of our model, checked to give our numbers before it is timed;
* *vit* is timm's ViT of the same width, depth, heads and patches, with its MLP four times as wide; beside a
  masked autoencoder there is none;
* *compiled* are both forms through ``torch.compile``, when asked for: what is left of the difference when a
  compiler may fuse either;
* *product* is one large ``torch.mm`` in the same dtype: what this machine can do at all.

Inference is a forward pass under ``torch.inference_mode``; training is a forward pass, cross-entropy and a
backward pass, without the optimiser's step. bfloat16 means autocast over float32 weights in both. A masked
autoencoder reconstructs images with three quarters of their patches hidden, as published: mask tokens go
through the encoder.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from pellucid.errors import ConfigError, NumericsError, suggest
from pellucid.measure.published_arithmetic import has_published_form, published_twin
from pellucid.models import create_model
from pellucid.models.mae import CRATEMAE
from pellucid.models.mae import PUBLISHED as MAE_PUBLISHED

MODES = ("inference", "training")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DEFAULT_MODELS = (
    "crate_base_patch16_224",
    "crate_tiny_patch16_224",
    "crate_alpha_tiny_patch16_224",
    "tost_tiny_12_patch16_224",
)

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
    "compiled_ms",
    "published_compiled_ms",
    "images_per_second",
    "vs_published",
    "vs_vit",
    "compiled_vs_published",
    "compiled_vs_published_compiled",
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
            largest]`` of the rounds' ratios, ``compiled_vs_*`` the same of ours compiled; None where there
            was no such contender; ``gflop`` is what ours computes in one call (1e9 operations) and
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
        compiled = any(row["compiled_ms"] is not None for row in self.rows)
        head = [
            "model", "mode", "dtype", "batch", "ours, ms", "images/s",
            "x published (min-max)", "x ViT (min-max)", "GFLOP/s", "of torch.mm",
            *(["compiled, ms", "x published", "x published compiled"] if compiled else []),
        ]  # fmt: skip
        body = [
            [
                row["model"], row["mode"], row["dtype"], str(row["batch_size"]), f"{row['ours_ms']:.1f}",
                f"{row['images_per_second']:.0f}", _spread(row["vs_published"]), _spread(row["vs_vit"]),
                f"{row['gflops']:.0f}", f"{row['share_of_product']:.0%}",
                *([
                    f"{row['compiled_ms']:.1f}", _spread(row["compiled_vs_published"]),
                    _spread(row["compiled_vs_published_compiled"]),
                ] if compiled else []),
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
    batch_sizes: Sequence[int] = (8,),
    modes: Sequence[str] = MODES,
    dtypes: Sequence[str] = ("float32",),
    rounds: int = 3,
    threads: int | None = None,
    progress: Callable[[str], None] | None = None,
    *,
    device: str = "cpu",
    compile: bool = False,
    seconds: float = 0.2,
) -> BenchResult:
    """Time our models beside the published arithmetic and a ViT, every case in interleaved rounds.

    Args:
        models: CRATE, CRATE-alpha, CRATE-MAE and ToST, by name.
        batch_sizes, modes, dtypes: the cases; ``"inference"``, ``"training"``; ``"float32"``, ``"bfloat16"``.
        rounds: how often each contender is timed in each case.
        threads: of torch on a CPU; as they are unless given.
        progress: called with one line before each case, and one with its ratios behind it: a run that is
            stopped has said what it found.
        device: such as ``"cpu"`` or ``"cuda"``.
        compile: time ours and the published form through ``torch.compile`` besides; a minute or more for each
            case, most of it compiling.
        seconds: a contender that is quicker than this is called so many times in a round.

    Raises:
        ConfigError: an unknown model, mode or dtype, a model that has no published arithmetic, numbers below
            1, or a GPU or a compiler that is not there.
        NumericsError: ours and the published arithmetic disagree.
    """
    _check_options(modes, dtypes, batch_sizes, rounds, threads)
    _check_device(device)
    if compile and device == "cpu":
        _check_compiler()
    with _threads(threads), torch.random.fork_rng():
        torch.manual_seed(0)
        result = BenchResult(machine_facts(device))
        contestants = [(name, _contestant(name)) for name in models]  # all: none is refused after minutes
        cases = list(product(contestants, dtypes, modes, batch_sizes))
        for number, ((name, ours), dtype, mode, size) in enumerate(cases, 1):
            if progress is not None:
                progress(f"{number} of {len(cases)}: {name}, {mode}, {dtype}, {size} images")
            row = _measure(ours.to(device), mode, dtype, size, rounds, seconds, compile)
            result.rows.append({"model": name, **row})
            if progress is not None:
                progress(_headline(row))
    return result


def _measure(
    ours: Any, mode: str, dtype: str, batch_size: int, rounds: int, seconds: float, compile: bool
) -> dict[str, Any]:
    device = next(ours.parameters()).device
    images = torch.randn(batch_size, *_image_shape(ours), device=device)
    labels = torch.arange(batch_size, device=device) % max(ours.num_classes, 1)
    vit = None if isinstance(ours, CRATEMAE) else _vit_like(ours).to(device)
    twin = published_twin(ours)
    for model in filter(None, (ours, twin, vit)):
        model.train(mode == "training")
    few = min(batch_size, ours.embed_dim // _num_tokens(ours) + 1)  # enough that ISTA takes the form it will
    _check_equal(ours, mode, dtype, images[:few], labels[:few])
    run = _runner(mode, dtype, images, labels)
    forward, published = _task(ours), _task(twin)

    side = PRODUCT_SIDE[device.type]
    factors = [torch.randn(side, side, device=device, dtype=DTYPES[dtype]) for _ in range(2)]
    contenders: dict[str, Callable[[], Any]] = {
        "ours": lambda: run(ours, forward),
        "published": lambda: run(ours, published),
        "product": lambda: torch.mm(*factors),
    }
    if vit is not None:
        contenders["vit"] = lambda: run(vit, vit)
    if compile:
        torch.compiler.reset()  # the last case's code would only count against the limit of recompilations
        fused, published_fused = torch.compile(forward), torch.compile(published)
        contenders["compiled"] = lambda: run(ours, fused)
        contenders["published_compiled"] = lambda: run(ours, published_fused)
    times = _interleaved(contenders, rounds, seconds, device)
    ours_s = median(times["ours"])
    flop = executed_flop(lambda: run(ours, forward))
    speeds = [2 * side**3 / t for t in times["product"]]
    shares = [flop / t / speed for t, speed in zip(times["ours"], speeds, strict=True)]

    def ms(name: str) -> float | None:
        return 1e3 * median(times[name]) if name in times else None

    def ratios(theirs: str, mine: str) -> list[float] | None:
        return _ratios(times[theirs], times[mine]) if theirs in times and mine in times else None

    return {
        "mode": mode,
        "dtype": dtype,
        "batch_size": batch_size,
        **{f"{name}_ms": ms(name) for name in ("ours", "published", "vit", "compiled", "published_compiled")},
        "images_per_second": batch_size / ours_s,
        "vs_published": ratios("published", "ours"),
        "vs_vit": ratios("vit", "ours"),
        "compiled_vs_published": ratios("published", "compiled"),
        "compiled_vs_published_compiled": ratios("published_compiled", "compiled"),
        "gflop": flop / 1e9,
        "gflops": flop / ours_s / 1e9,
        "product_gflops": median(speeds) / 1e9,
        "share_of_product": median(shares),
        "parameters": _size(ours),
        "vit_parameters": None if vit is None else _size(vit),
    }


def executed_flop(call: Callable[[], Any]) -> int:
    """Floating point operations in the matrix products, convolutions and attention that a call executes.

    As torch counts them: a product of (t, d) and (d, m) is 2 t d m. Call once before, so that what is made
    once and kept does not count.
    """
    with _Operations() as counter:
        call()
    return counter.total


class _Operations(TorchDispatchMode):
    """Counts as torch's ``FlopCounterMode`` does, with the formulas of torch.

    That one follows modules besides, and breaks in inference where a parameter is an argument of a module, as
    a mask token is.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, formula = kwargs or {}, OPERATIONS.get(func._overloadpacket)
        if formula is None:
            with self:  # what is only a name for other operations, such as matmul, says so
                inner = func.decompose(*args, **kwargs)
            if inner is not NotImplemented:
                return inner
        result = func(*args, **kwargs)
        if formula is not None:
            self.total += int(formula(*args, **kwargs, out_val=result))
        return result


def _attention_flop(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward_flop(
    _: Tensor, query: Tensor, key: Tensor, value: Tensor, *__: Any, **___: Any
) -> int:
    """Five products in place of two: the fused kernel forms its weights again."""
    return int(2.5 * sdpa_flop_count(query.shape, key.shape, value.shape))


OPERATIONS = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flop,
}
"""Torch's formulas, and those of attention on a CPU, which it does not have."""


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
            loss = F.cross_entropy(logits, labels) if logits.dim() == 2 else logits.square().mean()
        loss.backward()
        return logits.detach()

    return run


def _check_equal(ours: nn.Module, mode: str, dtype: str, images: Tensor, labels: Tensor) -> None:
    """Nothing is timed unless ours and the published arithmetic give one answer, and one gradient.

    To 1e-7 of the norm in float64: this decides; published TSSA adds 1e-8 to the size of a group, CRATE
    agrees to 1e-13. In the precision to be timed no two orders of summation
    agree, so there ours is held to the float64 answer, and may not be much further from it than the published
    form is. Gradients are allowed KINKS besides.
    """
    exact, published = _answers(deepcopy(ours).double(), mode, "float64", images.double(), labels)
    errors = [(_distance(a, b), 1e-7) for a, b in zip(exact, published, strict=True)]
    rounded = zip((1e-3, KINKS[dtype]), *_answers(ours, mode, dtype, images, labels), exact, strict=False)
    errors += [(_distance(a, truth), 1.5 * _distance(b, truth) + slack) for slack, a, b, truth in rounded]
    for error, allowed in errors:
        if not error <= allowed:
            raise NumericsError(
                f"ours and the published arithmetic differ: error {error:.1e} in {mode}, {dtype}, "
                f"allowed {allowed:.1e} - their times would not compare"
            )


def _answers(
    model: nn.Module, mode: str, dtype: str, images: Tensor, labels: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Logits, and in training all gradients, of our form and of the published one."""
    run = _runner(mode, dtype, images, labels)

    def answer(forward: Callable[[Tensor], Tensor]) -> list[Tensor]:
        logits = run(model, forward).double().flatten()
        if mode == "inference":
            return [logits]
        gradients = [p.grad.double().flatten() for p in model.parameters() if p.grad is not None]
        return [logits, torch.cat(gradients)]

    return answer(_task(model)), answer(_task(published_twin(model)))


def _distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


# --- the contenders ---------------------------------------------------------------------------------------


def _contestant(name: str) -> Any:
    options = MAE_PUBLISHED if name.startswith("crate_mae_") else {}
    model = create_model(name, **options)
    if not has_published_form(model):
        raise ConfigError(f"{name} has no published arithmetic - bench takes CRATE, CRATE-alpha, -MAE, ToST")
    return model


def _task(model: Any) -> Callable[[Tensor], Tensor]:
    """What a model is timed at: class scores; of a masked autoencoder, pictures."""
    if not isinstance(model, CRATEMAE):
        return model
    noise = torch.rand(1, math.prod(model.embed.grid_size), generator=torch.Generator().manual_seed(0))

    def reconstruct(images: Tensor) -> Tensor:
        mask = model.random_mask(len(images), noise=noise.to(images.device).expand(len(images), -1))
        return model.reconstruct(images, mask)

    return reconstruct


def _vit_like(ours: Any) -> nn.Module:
    return timm.models.VisionTransformer(
        img_size=ours.embed.img_size,
        patch_size=ours.embed.patch_size,
        in_chans=_image_shape(ours)[0],
        num_classes=ours.num_classes,
        embed_dim=ours.embed_dim,
        depth=len(ours.layers),
        num_heads=ours.layers[0]["compress"].num_heads,
        mlp_ratio=4,
    )


def _image_shape(model: Any) -> tuple[int, int, int]:
    return (model.pretrained_cfg["input_size"][0], *model.embed.img_size)


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _num_tokens(model: Any) -> int:
    return int(math.prod(model.embed.grid_size)) + model.num_prefix_tokens


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
    _check_threads(threads)


def _check_threads(threads: int | None) -> None:
    if threads is not None and threads < 1:
        raise ConfigError(f"threads {threads} must be 1 or larger")


def _check_device(device: str) -> None:
    kind = device.split(":")[0]
    if kind not in PRODUCT_SIDE:
        raise ConfigError(f"unknown device '{device}'{suggest(kind, PRODUCT_SIDE)}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device 'cuda': torch sees no GPU here - take 'cpu'")


def _check_compiler() -> None:
    if not shutil.which(os.environ.get("CXX", "c++")) and not shutil.which("g++"):
        raise ConfigError("compile needs a C++ compiler, and there is none - install g++, or leave it out")


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


def _headline(row: dict[str, Any]) -> str:
    said = [
        ("published", "vs_published"),
        ("ViT", "vs_vit"),
        ("published, compiled", "compiled_vs_published"),
    ]
    said.append(("published compiled, compiled", "compiled_vs_published_compiled"))
    ratios = [f"{_spread(row[key])} x {name}" for name, key in said if row[key] is not None]
    return f"    {row['ours_ms']:.1f} ms: " + "; ".join(ratios)


def _spread(ratios: Sequence[float] | None) -> str:
    if ratios is None:
        return "-"
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
