"""How one update improves an objective: each step is a module with its parameters and what it lowers."""

from pellucid.steps.blackbox import MHSA, MLP, BlackBox
from pellucid.steps.denoise import Denoise, Renoise
from pellucid.steps.ista import ISTA, FreeISTA, Momentum, SoftISTA, Synthesis
from pellucid.steps.memory import Memory
from pellucid.steps.mssa import MSSA, Decompression, ExactCompression, SubspaceStep, UntiedMSSA
from pellucid.steps.overcomplete import OvercompleteISTA
from pellucid.steps.power import MSP, OrthogonalIteration, PowerStep
from pellucid.steps.rate_reduction import RateReduction, ShiftInvariantRateReduction
from pellucid.steps.step import Layer, OnStep, Step, StepRecord, unroll
from pellucid.steps.strict import StrictCompression, StrictISTA
from pellucid.steps.tssa import TSSA, CausalTSSA, UntiedCausalTSSA, UntiedTSSA

__all__ = [
    "ISTA",
    "MHSA",
    "MLP",
    "MSP",
    "MSSA",
    "TSSA",
    "BlackBox",
    "CausalTSSA",
    "Decompression",
    "Denoise",
    "ExactCompression",
    "FreeISTA",
    "Layer",
    "Memory",
    "Momentum",
    "OnStep",
    "OrthogonalIteration",
    "OvercompleteISTA",
    "PowerStep",
    "RateReduction",
    "Renoise",
    "ShiftInvariantRateReduction",
    "SoftISTA",
    "Step",
    "StepRecord",
    "StrictCompression",
    "StrictISTA",
    "SubspaceStep",
    "Synthesis",
    "UntiedCausalTSSA",
    "UntiedMSSA",
    "UntiedTSSA",
    "unroll",
]
