"""What a run learns from: the one interface between a kind of data and ``run.py``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from torch import nn

from pellucid.data import Reject, StepSampler, show_name
from pellucid.training.config import TrainConfig
from pellucid.training.objective import Held, Objective


def about_rejects(rejects: Sequence[Reject], things: str) -> list[str]:
    """A line on what could not be read and is left out of a run, if there is any."""
    if not rejects:
        return []
    named = "; ".join(f"{show_name(reject.path)}: {reject.reason}" for reject in rejects[:3])
    more = f"; and {len(rejects) - 3:,} more" if len(rejects) > 3 else ""
    count = f"{len(rejects):,} {things if len(rejects) > 1 else things.removesuffix('s')}"
    return [f"{count} rejected ({named}{more}) - pellucid check lists all, so does result.json"]


class Material(ABC):
    """Data as an objective reads them.

    A run asks in this order: :meth:`resolved`, :meth:`model_args`; when the model is made, :meth:`cut_for`;
    when the objective is, :meth:`shown_to`. The rest may be asked only then.

    Attributes:
        unit: what the throughput counts.
        items: what an epoch has so many of.
        looks: evaluations of a run at most, unless it is told how often.
        name: of the data.
        fingerprint: changes when the data do.
        data: what was loaded.
        notes: what its reader should know, a line each.
    """

    unit: ClassVar[str]
    items: ClassVar[str]
    looks: ClassVar[int] = 40
    name: str
    fingerprint: str
    data: Any
    notes: Sequence[str] = ()

    @abstractmethod
    def resolved(self, config: TrainConfig) -> TrainConfig:
        """The options with every choice made that was left to the data, the model among them."""

    @abstractmethod
    def model_args(self, config: TrainConfig) -> dict[str, Any]:
        """The architecture's options, those that the data and the objective settle among them."""

    @abstractmethod
    def cut_for(self, model: nn.Module, config: TrainConfig) -> None:
        """Settle what an item is: an image of a size, a row of so many words."""

    def shown_to(self, model: nn.Module, objective: Objective, config: TrainConfig) -> TrainConfig:
        """Settle what an objective sees of an item; what was chosen for that is in the options returned."""
        return config

    @abstractmethod
    def __len__(self) -> int:
        """Items of an epoch."""

    @abstractmethod
    def batches(self, sampler: StepSampler, workers: int, timeout: float = 60) -> Any:
        """A loader of the sampler's micro-batches; a worker has ``timeout`` seconds to answer."""

    @abstractmethod
    def held(self, workers: int, final: bool) -> Held:
        """What to measure on, at the end of the run or on the way there."""

    @property
    @abstractmethod
    def tokens(self) -> float:
        """Tokens that an item becomes, at most."""

    @property
    def units(self) -> int:
        """How many of :attr:`unit` an item counts for."""
        return 1

    @abstractmethod
    def item_name(self, i: int) -> str:
        """What to call item ``i`` of an epoch in a message; safe to print."""

    @abstractmethod
    def model_files(self, model: Any) -> dict[str, bytes]:
        """File name -> content of ``model/``: weights, config, whatever else it takes to use the model."""

    @abstractmethod
    def stamps(self) -> Iterator[tuple[str, str]]:
        """Each item's name, and what tells whether there is something else in it."""

    @property
    def class_names(self) -> Sequence[str]:
        """What the model is to tell apart; empty without labels."""
        return ()

    def kept_files(self) -> dict[str, bytes]:
        """File name -> content of what a run that goes on must find again."""
        return {}

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What ``result.json`` says of the data."""
