"""Every final step, found by itself: a new one is under the contract as soon as it exists."""

import importlib
import inspect
import pkgutil

import pytest
import torch
from torch import nn

import pellucid.steps
from pellucid.objectives import VE
from pellucid.steps import (
    ISTA,
    MHSA,
    MLP,
    MSP,
    MSSA,
    TSSA,
    CausalTSSA,
    Decompression,
    Denoise,
    ExactCompression,
    FreeISTA,
    OrthogonalIteration,
    OvercompleteISTA,
    RateReduction,
    ShiftInvariantRateReduction,
    SoftISTA,
    Step,
    StrictCompression,
    StrictISTA,
    Synthesis,
    UntiedCausalTSSA,
    UntiedMSSA,
    UntiedTSSA,
)

DIM = 6


class Points(nn.Module):
    """The posterior mean of a few points, which are learned, and the density of what is seen of them."""

    def __init__(self):
        super().__init__()
        self.points = nn.Parameter(torch.randn(4, DIM))

    def logits(self, z, t):
        return -(z.unsqueeze(-2) - self.points).square().sum(-1) / (2 * t**2)

    def forward(self, z, t):
        return self.logits(z, t).softmax(-1) @ self.points

    def log_density(self, z, t):
        return self.logits(z, t).logsumexp(-1)


# How to make one of each for tokens of width DIM. A step missing here fails test_contract.
MAKE = {
    ISTA: lambda **kw: ISTA(DIM, **kw),
    SoftISTA: lambda **kw: SoftISTA(DIM, **kw),
    MSSA: lambda **kw: MSSA(DIM, 2, **kw),
    UntiedMSSA: lambda **kw: UntiedMSSA(DIM, 2, **kw),
    ExactCompression: lambda **kw: ExactCompression(DIM, 2, **kw),
    StrictCompression: lambda **kw: StrictCompression(DIM, 2, **kw),
    StrictISTA: lambda **kw: StrictISTA(DIM, **kw),
    Decompression: lambda **kw: Decompression(DIM, 2, **kw),
    TSSA: lambda **kw: TSSA(DIM, 2, eps=0.5, **kw),
    UntiedTSSA: lambda **kw: UntiedTSSA(DIM, 2, layer_scale=0.5, **kw),
    CausalTSSA: lambda **kw: CausalTSSA(DIM, 2, eps=0.5, **kw),
    UntiedCausalTSSA: lambda **kw: UntiedCausalTSSA(DIM, 2, **{"layer_scale": 0.5, "block_size": 9, **kw}),
    OvercompleteISTA: lambda **kw: OvercompleteISTA(DIM, **kw),
    FreeISTA: lambda **kw: FreeISTA(DIM, **kw),
    OrthogonalIteration: lambda **kw: OrthogonalIteration(torch.randn(8, DIM), **kw),
    MSP: lambda **kw: MSP(torch.randn(8, DIM), **kw),
    Denoise: lambda **kw: Denoise(Points(), **{"schedule": VE(), "t": 0.8, "t_next": 0.5, **kw}),
    Synthesis: lambda **kw: Synthesis(DIM, **kw),
    RateReduction: lambda **kw: RateReduction(DIM, 3, **{"sharpness": 2.0, **kw}),
    ShiftInvariantRateReduction: lambda **kw: ShiftInvariantRateReduction(
        **{"shape": (2, 3), "num_classes": 3, "sharpness": 2.0, **kw}
    ),
    MHSA: lambda **kw: MHSA(DIM, 2, **kw),
    MLP: lambda **kw: MLP(DIM, **kw),
}


def final_steps() -> list[type[Step]]:
    for module in pkgutil.walk_packages(pellucid.steps.__path__, "pellucid.steps."):
        importlib.import_module(module.name)
    found, todo = set(), [Step]
    while todo:
        cls = todo.pop()
        todo += cls.__subclasses__()
        if cls.__module__.startswith("pellucid.") and not inspect.isabstract(cls):
            found.add(cls)
    return sorted(found, key=lambda cls: cls.__name__)


def pytest_generate_tests(metafunc):
    """``step_class``: all of them. ``lowering_class``: those that say what they lower."""
    lowering = [cls for cls in final_steps() if getattr(cls, "objective_name", "") is not None]
    for name, classes in (("step_class", final_steps()), ("lowering_class", lowering)):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, classes, ids=lambda cls: cls.__name__)


@pytest.fixture
def make():
    """``make(step_class, seed=0, dtype=float64, **options)``: a step with parameters in general position."""

    def build(step_class: type[Step], seed: int = 0, dtype: torch.dtype = torch.float64, **options) -> Step:
        step = MAKE[step_class](**options)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in step.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / DIM**0.5)
        return step.to(dtype)

    return build


@pytest.fixture
def tokens():
    """``tokens(b, n, seed=0, dtype=float64, width=DIM)``."""

    def build(
        b: int = 3, n: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64, width: int = DIM
    ) -> torch.Tensor:
        return torch.randn(b, n, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)

    return build


@pytest.fixture
def norm():
    """A LayerNorm whose parameters matter."""
    layer = nn.LayerNorm(DIM, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(0.5, 1.5, DIM))
        layer.bias.copy_(torch.linspace(-0.2, 0.3, DIM))
    return layer


@pytest.fixture
def made():
    """The classes that the contract knows how to make, to hold against those that exist."""
    return set(MAKE)
