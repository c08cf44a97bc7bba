"""How one update improves an objective: each step is a module with its parameters and what it lowers."""

from pellucid.steps.ista import ISTA, SoftISTA
from pellucid.steps.mssa import MSSA, ExactCompression, SubspaceStep, UntiedMSSA
from pellucid.steps.step import OnStep, Step, StepRecord, unroll

__all__ = [
    "ISTA",
    "MSSA",
    "ExactCompression",
    "OnStep",
    "SoftISTA",
    "Step",
    "StepRecord",
    "SubspaceStep",
    "UntiedMSSA",
    "unroll",
]
