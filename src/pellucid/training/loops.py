"""Two drivers of a :class:`Learner`: a plain loop, and lightning. They give the same bits on one CPU."""

from __future__ import annotations

import logging
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from torch import Tensor
from torch.utils._pytree import tree_map

from pellucid.errors import ConfigError
from pellucid.training.fixed_sum import fixed_sum
from pellucid.training.learner import Learner
from pellucid.training.lifeline import Lifeline
from pellucid.training.ranks import averaged

Batch = tuple[Any, ...]
AfterStep = Callable[[dict[str, Tensor]], None]
"""Called after each optimiser step with the step's parts, each the mean over its micro-batches."""

PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed"}


def fit_plain(
    learner: Learner,
    batches: Iterable[Batch],
    after_step: AfterStep,
    *,
    begin: Callable[[], None] = lambda: None,
    accumulate: int = 1,
    precision: str = "32",
    device: str | torch.device = "cpu",
) -> None:
    """Train on micro-batches in reading order, ``accumulate`` of them to a step.

    ``begin`` is called when the learner is in its place; ``after_step`` may raise to stop.
    """
    device = torch.device(device)
    accumulate = learner.exact or accumulate
    learner.objective.to(device).train()
    learner.follow_model()
    begin()
    # As in lightning: without the cache, the two uses of a tied matrix add their gradients in float32.
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)
    parts: list[dict[str, Tensor]] = []
    for batch in batches:
        batch = tree_map(lambda part: part.to(device, non_blocking=True), batch)
        with autocast:
            parts.append(learner.losses(batch, micro=len(parts)))
        learner.backward(parts[-1]["loss"], accumulate)
        if len(parts) == accumulate:
            learner.update()
            after_step(_mean(parts, learner.exact))
            parts = []


def fit_lightning(
    learner: Learner,
    make_batches: Callable[[int, int], Iterable[Batch]],
    after_step: AfterStep,
    *,
    begin: Callable[[], None] = lambda: None,
    accumulate: int = 1,
    precision: str = "32",
    accelerator: str = "auto",
    devices: int | str = 1,
    nodes: int = 1,
    strategy: str = "auto",
    remedy: Callable[[], str] = lambda: "start again",
) -> None:
    """Train under lightning, which brings devices, nodes, launchers and precision.

    Lightning counts nothing here: the batches say where the run begins and ends, and checkpoints, logs and
    the progress bar hang on ``after_step``. Its own resumption restores a loop's position from a snapshot;
    ours needs none.

    Args:
        make_batches: ``(rank, world) -> micro-batches`` of that rank.
        strategy: of several processes; ``fsdp`` cuts the learner up over them, else each holds all of it.
        begin: called when the learner is in its place.
        remedy: what to tell the user when one of several processes is lost.

    Raises:
        ConfigError: devices that are not there, or other numbers than those that a launcher has started.
        ProcessLost: another process is gone.
    """
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with warnings.catch_warnings(), Lifeline(remedy) as lifeline:
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")
        warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")  # the teacher
        several = nodes > 1 or str(devices) != "1"
        together = Sharded if strategy == "fsdp" else Exactly if learner.exact else Together
        with _plainly(MisconfigurationException, ValueError, RuntimeError):
            # Lightning's own way of going on after SLURM's time limit would save beside ours.
            slurm = [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []
            trainer = lightning.Trainer(
                accelerator=accelerator,
                devices=devices,
                num_nodes=nodes,
                strategy=together(lifeline, learner) if several else "auto",
                plugins=slurm,  # type: ignore[arg-type]
                precision=PRECISIONS[precision],  # type: ignore[arg-type]
                max_epochs=1,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                use_distributed_sampler=False,
                num_sanity_val_steps=0,
            )
        with _plainly(MisconfigurationException):
            trainer.fit(_Module(learner, make_batches, after_step, begin, accumulate))


@contextmanager
def _plainly(*refusals: type[Exception]) -> Iterator[None]:
    """What lightning refuses, such as a device that is not there, in our words."""
    try:
        yield
    except refusals as error:
        raise ConfigError(
            f"{' '.join(str(error).split())} - see --accelerator, --devices, --nodes"
        ) from error


class Together(DDPStrategy):
    """Processes that hold the same weights and add up their gradients, and notice when one is gone."""

    def __init__(self, lifeline: Lifeline, learner: Learner) -> None:
        super().__init__()
        self.lifeline, self.learner = lifeline, learner

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        self._launcher = _Launcher(
            self.lifeline, self.cluster_environment, self.num_processes, self.num_nodes
        )

    def setup_environment(self) -> None:
        super().setup_environment()
        assert self.cluster_environment is not None
        self.lifeline.connect(self.cluster_environment.main_address)


class Exactly(Together):
    """Processes that hold the same weights, and whose gradients the learner adds up itself."""

    def configure_ddp(self) -> None:
        pass


class Sharded(Together):
    """Processes each of which holds its rows of every matrix: FSDP2, without a wrapper."""

    def model_to_device(self) -> None:
        from pellucid.training.sharding import shard

        shard(self.learner, self.root_device)  # layer by layer: whole, it may not fit there

    def configure_ddp(self) -> None:
        pass

    def teardown(self) -> None:
        assert self.cluster_environment is not None
        assert self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()  # and the rows stay where they are: they are to be put together yet


class _Launcher(_SubprocessScriptLauncher):
    """Lightning's, whose watch over its children would end this process before it can say why.

    It would also choose the number of CPU threads, which is chosen by then.
    """

    def __init__(self, lifeline: Lifeline, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.lifeline = lifeline

    def launch(
        self, function: Callable[..., Any], *arguments: Any, trainer: Any = None, **options: Any
    ) -> Any:
        environment = self.cluster_environment
        with _plainly(ValueError):
            environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not environment.creates_processes_externally:
            self._call_children_scripts()
            self.lifeline.watch_children(self.procs)
        return function(*arguments, **options)


class _Module(lightning.LightningModule):
    """The learner in lightning's words."""

    def __init__(
        self,
        learner: Learner,
        make_batches: Callable[[int, int], Iterable[Batch]],
        after_step: AfterStep,
        begin: Callable[[], None],
        accumulate: int,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.objective = learner.objective
        self.learner, self.make_batches = learner, make_batches
        self.after_step, self.begin, self.accumulate = after_step, begin, accumulate
        self.parts: list[dict[str, Tensor]] = []
        self.on_sigterm = signal.getsignal(signal.SIGTERM)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.learner.optimizer

    def train_dataloader(self) -> Iterable[Batch]:
        return self.make_batches(self.global_rank, self.trainer.world_size)

    def on_fit_start(self) -> None:
        self.learner.any_rank = self._any_rank
        self.learner.follow_model()

    def on_train_start(self) -> None:
        # Lightning's own handler, set by now, would end the run between two micro-batches with nothing saved.
        if self.on_sigterm is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self.on_sigterm)
        self.begin()

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        # The number of this part of the batch: the same randomness however parts are dealt.
        micro = len(self.parts) * self.trainer.world_size + self.global_rank
        self.parts.append(self.learner.losses(batch, micro))
        with torch.autocast(self.device.type, enabled=False):  # lightning's holds for the forward pass only
            accumulate = self.learner.exact // self.trainer.world_size or self.accumulate
            self.learner.backward(self.parts[-1]["loss"], accumulate, self.manual_backward)
            if len(self.parts) == accumulate:
                optimizer: Any = self.optimizers()
                self.learner.update(apply=optimizer.step)
                self.after_step(_mean(self.parts, self.learner.exact))
                self.parts = []

    def _any_rank(self, flag: bool) -> bool:
        if self.trainer.world_size == 1:
            return flag
        total: Any = self.trainer.strategy.reduce(
            torch.tensor(float(flag), device=self.device), reduce_op="sum"
        )
        return bool(total > 0)


def _mean(parts: list[dict[str, Tensor]], exact: int) -> dict[str, Tensor]:
    """Over micro-batches and processes."""
    if exact:
        values = [torch.stack([value.detach().float() for value in part.values()]) for part in parts]
        return dict(zip(parts[0], fixed_sum(values) / exact, strict=True))
    means = [torch.stack([part[key].detach().float() for part in parts]).mean() for key in parts[0]]
    return dict(zip(parts[0], averaged(torch.stack(means)), strict=True))
