"""A training run from options to a folder: ``train`` and what it leaves behind."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pellucid.data import ImageData, StepSampler, TextData
from pellucid.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    NumericsError,
    ResourceError,
    Stopped,
    gives_out,
    suggest,
)
from pellucid.models import create_model, load
from pellucid.models.saved import copy_weights
from pellucid.regular import read_json
from pellucid.training.checkpoint import (
    Checkpoint,
    last_good,
    load_checkpoint,
    locked,
    new_folder,
    remove_folder,
    saving,
    sweep,
    thread_fingerprint,
    write_file,
    write_flushed,
)
from pellucid.training.config import TrainConfig, read_config, refuse_changes
from pellucid.training.inventory import changes, write_inventory
from pellucid.training.language import CausalLM, MaskedLM, TextClassification
from pellucid.training.learner import Learner
from pellucid.training.loops import fit_lightning, fit_plain
from pellucid.training.masked import MAE
from pellucid.training.material import Material
from pellucid.training.mcr2 import MCR2, SelfSupervisedMCR2
from pellucid.training.objective import Objective
from pellucid.training.pictures import Pictures
from pellucid.training.ranks import launched, rank
from pellucid.training.recipe import MuonAdamW
from pellucid.training.recorder import Recorder, StopFlag, read_lines
from pellucid.training.self_distillation import DINO, SimDINO, SimDINOv2
from pellucid.training.supervised import Supervised
from pellucid.training.texts import Texts

OBJECTIVES: dict[str, type[Objective]] = {
    "supervised": Supervised,
    "mcr2": MCR2,
    "simdino": SimDINO,
    "simdinov2": SimDINOv2,
    "dino": DINO,
    "mcr2-views": SelfSupervisedMCR2,
    "mae": MAE,
    "causal-lm": CausalLM,
    "masked-lm": MaskedLM,
    "text-classification": TextClassification,
}

Data = str | os.PathLike[str] | ImageData | TextData

Say = Callable[[str], None]


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        out: its folder.
        config: as resolved.
        model: trained, in eval mode.
        accuracy: share of test images, or texts, classified rightly at the end; None without a classifier.
        measures: of what was held back, at the end: the objective's parts, or what its features are worth.
        seconds: of training, over all sittings.
    """

    out: Path
    config: TrainConfig
    model: Any
    accuracy: float | None
    seconds: float
    measures: dict[str, float] = field(default_factory=dict)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """Lines of ``metrics.jsonl``: step, epoch, split and the objective's parts."""
        return read_lines(self.out / "metrics.jsonl")


def train(
    data: Data,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    say: Say = lambda line: None,
    **options: Any,
) -> Run:
    """Train a model and leave a run folder behind.

    Args:
        data: see :func:`pellucid.load_data`; text for objectives that read it, see
            :func:`pellucid.data.load_text`.
        resume: go on from the newest checkpoint in ``out``; to the same bits on the same CPU.
        overwrite: replace a run that stands at ``out``.
        progress: draw a bar.
        say: gets one line of news at a time.
        options: fields of :class:`~pellucid.training.config.TrainConfig`.

    Raises:
        ConfigError, DataError: before anything is written; also where ``out`` exists or is in use.
        CheckpointError: no checkpoint in it holds, or weights to begin at do not fit.
        ResourceError: the disk is full, memory runs out, or ``out`` cannot be written any more.
        NumericsError: a loss or gradient was not finite; the step was not applied, all before it is saved.
        Stopped: by a signal; the state is saved.
        ProcessLost: one of several processes that train together is gone.
    """
    name = data.name if isinstance(data, ImageData | TextData) else os.fspath(data)
    config = TrainConfig.from_mapping({**options, "data": name})
    _refuse_objective(config)
    config = replace(
        config, **{k: v for k, v in OBJECTIVES[config.objective].recipe.items() if k not in options}
    )
    _refuse_strategy(config)
    _refuse_other_processes(config)
    _refuse_exact(config)
    material = load_material(config, data, resume)
    setting = set_up(material.resolved(config), material)
    config = setting.config
    out = Path(config.out)
    if rank() > 0:  # the first process owns the folder
        try:
            with StopFlag() as stop:
                return _train(setting, out, stop, resume, progress=False, say=lambda line: None)
        except (Stopped, NumericsError) as error:
            raise SystemExit(error.exit_code) from error  # the first process says why
    _claim(out, config, resume=resume, overwrite=overwrite, say=say)
    for note in material.notes:
        say(note)
    with locked(out), StopFlag() as stop:
        for file, content in material.kept_files().items():
            write_file(out / file, content)
        for folder in (out, out / "checkpoints", out / "bad"):
            if count := sweep(folder):
                say(f"removed what a killed process left half-written in {folder} ({count})")
        if resume and (out / "config.yaml").read_bytes() != config.to_yaml().encode():
            write_file(out / "config.yaml", config.to_yaml())  # with what has changed and may
        if not any((out / "checkpoints").glob("step-*")):
            write_inventory(out, material.stamps())
        return _train(setting, out, stop, resume, progress, say)


def _refuse_objective(config: TrainConfig) -> None:
    if config.objective not in OBJECTIVES:
        shown = config.objective[:100]
        raise ConfigError(f"unknown objective '{shown}'{suggest(shown, OBJECTIVES)}")


def load_material(config: TrainConfig, data: Data | None = None, resume: bool = False) -> Material:
    """What a run learns from, as its objective reads it."""
    kind = OBJECTIVES[config.objective]
    material: type[Pictures] | type[Texts] = Texts if kind.reads == "text" else Pictures
    given: Any = config.data if data is None else data
    other = ImageData if kind.reads == "text" else TextData
    if isinstance(given, other):
        raise ConfigError(
            f"{config.objective} reads {kind.reads}, and {given.name} is none - see --objective"
        )
    return material.load(given, config, kind, resume)


def load_images(config: TrainConfig) -> ImageData:
    """The images of a run, with labels where its objective needs them."""
    material = load_material(config)
    if not isinstance(material, Pictures):
        raise ConfigError(f"{config.objective} has learnt from text, and this is about images")
    return material.images


def open_run(path: str | os.PathLike[str]) -> Run:
    """A finished run from its folder.

    Raises:
        CheckpointError: no run there, or one that has not ended.
    """
    out = Path(path)
    if not (out / "config.yaml").is_file():
        raise CheckpointError(f"{out} is not a run (no config.yaml) - give the folder that train made")
    config = options_of(out)
    result = _read_result(out / "result.json")
    return Run(
        out, config, load(out), result.get("accuracy"), result.get("seconds", 0.0), result.get("measures", {})
    )


def options_of(run: Path) -> TrainConfig:
    """What a run was asked to do, from its ``config.yaml``. Raises ConfigError for what no run can be."""
    config = TrainConfig.from_mapping(read_config(run / "config.yaml"))
    _refuse_objective(config)
    return config


def _read_result(path: Path) -> dict[str, Any]:
    """What a run has come to; nothing, of one that has not ended."""
    if not path.exists():
        return {}
    try:
        result = read_json(path)
        numbers = [result.get("accuracy"), result.get("seconds", 0.0), *result.get("measures", {}).values()]
        if not all(value is None or type(value) in (int, float) for value in numbers):
            raise ValueError("expected numbers")
    except (OSError, ValueError, AttributeError, TypeError) as error:
        reason = getattr(error, "strerror", None) or str(error)[:160]
        raise CheckpointError(
            f"{path} is not the result of a run ({reason}) - go on with --resume"
        ) from error
    return dict(result)


class Waiting:
    """Batches of a loader; how long each was waited for is added to ``seconds[0]``."""

    def __init__(self, loader: Any, seconds: list[float]) -> None:
        self.loader, self.seconds = loader, seconds

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.loader)
        while True:
            asked = time.monotonic()
            batch = next(batches, None)
            self.seconds[0] += time.monotonic() - asked
            if batch is None:
                return
            yield batch

    def __len__(self) -> int:
        return len(self.loader)


@dataclass(frozen=True)
class Setting:
    """A run's parts, made from its options and data alone."""

    config: TrainConfig
    material: Material
    model: nn.Module
    learner: Learner
    waited: list[float]

    @property
    def steps_per_epoch(self) -> float:
        return len(self.material) / self.config.batch_size

    def batches(self, rank: int, world: int) -> Any:
        """Micro-batches from the learner's step to the end."""
        config, learner = self.config, self.learner
        sampler = StepSampler(
            n=len(self.material),
            batch_size=config.batch_size,
            seed=config.seed,
            steps=learner.total_steps,
            start=learner.step,
            accumulate=config.exact // world or config.accumulate,
            rank=rank,
            world=world,
        )
        return Waiting(self.material.batches(sampler, config.workers, config.data_timeout), self.waited)

    @property
    def parts(self) -> int:
        """How many micro-batches a step is cut into, over all processes."""
        return self.config.exact or self.config.accumulate * self.processes

    @property
    def processes(self) -> int:
        """How many are to train together; one where only lightning knows."""
        devices = self.config.devices
        return max(1, devices) * self.config.nodes if isinstance(devices, int) else 1

    def list_batch(self, step: int, reason: str) -> Path:
        """Write down in ``bad/step-N.json`` what step N, counted from 1, is made of."""
        config, material = self.config, self.material
        sampler = StepSampler(len(material), config.batch_size, config.seed, step, step - 1)
        keys = [key for batch in sampler for key in batch]
        items = [{"index": index, "epoch": epoch, "name": material.item_name(index)} for index, epoch in keys]
        path = Path(config.out) / "bad" / f"step-{step:08d}.json"
        path.parent.mkdir(exist_ok=True)
        told = {"step": step, "reason": reason, "parts": self.parts, "items": items}
        write_file(path, json.dumps(told, indent=1))
        return path


def _refuse_strategy(config: TrainConfig) -> None:
    """What fsdp cannot do, and what only fsdp does."""
    if config.checkpoint_format == "sharded" and config.strategy != "fsdp":
        raise ConfigError("sharded checkpoints are of what fsdp has cut up - add --strategy fsdp")
    if config.strategy == "fsdp":
        if config.engine == "plain" or (config.devices == 1 and config.nodes == 1):
            raise ConfigError("fsdp cuts a run up over several processes - give --devices, or leave it out")
        if config.incoherence:
            raise ConfigError("incoherence looks into layers that fsdp takes apart - take --strategy ddp")


def _refuse_exact(config: TrainConfig) -> None:
    """What cannot be the same to the last bit on any number of processes."""
    parts, kind = config.exact, OBJECTIVES[config.objective]
    if not parts:
        return
    if not kind.each_alone:
        alone = [name for name, other in OBJECTIVES.items() if other.each_alone]
        raise ConfigError(
            f"exact cuts a batch into parts, and {config.objective} looks at it as a whole - "
            f"possible with {', '.join(alone)}"
        )
    if config.strategy == "fsdp":
        raise ConfigError("exact adds gradients in one order, and fsdp in its own - take --strategy ddp")
    if config.accumulate != 1:
        raise ConfigError("exact says into how many parts a batch is cut - leave out --accumulate")
    processes = config.devices * config.nodes if isinstance(config.devices, int) else config.nodes
    if parts < 1 or parts & (parts - 1) or processes & (processes - 1) or parts < processes:
        raise ConfigError(
            f"exact {parts} on {processes} processes - give powers of two, exact the larger or the same"
        )


def _refuse_other_processes(config: TrainConfig) -> None:
    """Whoever starts the processes must have started as many as the run is to have."""
    found = launched()
    if found is None or not isinstance(config.devices, int) or config.devices < 1:
        return
    if found != config.devices * config.nodes:
        raise ConfigError(
            f"torchrun or srun has started {found} processes, and the run is to have {config.devices} on "
            f"each of {config.nodes} nodes - say so with --devices and --nodes"
        )


def _refuse_to_cut(objective: Objective) -> None:
    for name, parameter in objective.named_parameters():
        if parameter.dim() == 0:
            raise ConfigError(f"fsdp cuts by rows, and {name} is a single number - take --strategy ddp")


def _refuse_running_moments(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ConfigError(
                f"{name} keeps moments of the batches that its own process sees (BatchNorm), so exact cannot "
                f"hold - take a model without, or leave out --exact"
            )


def set_up(config: TrainConfig, material: Material) -> Setting:
    """A run's parts from its options, which the material has resolved. Nothing is written."""
    kind = OBJECTIVES[config.objective]
    # An orthogonal matrix has other last bits with other threads, and a run begins there.
    with _cpu_threads(1):
        torch.manual_seed(config.seed)
        model = create_model(config.model, **material.model_args(config))
        if config.init_from is not None:
            copy_weights(model, config.init_from, new_head=config.new_head, class_names=material.class_names)
        material.cut_for(model, config)
        steps = math.ceil(config.epochs * len(material) / config.batch_size)
        objective = kind.build(model, config, steps)
    if config.strategy == "fsdp":
        _refuse_to_cut(objective)
    if config.exact:
        _refuse_running_moments(model)
    config = material.shown_to(model, objective, replace(config, objective_args=_arguments(objective)))
    end = config.weight_decay_end
    learner = Learner(
        objective,
        MuonAdamW(model, config.lr, config.matrix_lr, config.weight_decay, objective.heads),
        steps,
        weight_decay=None if end is None else (config.weight_decay, end),
        warmup=config.warmup,
        clip=config.clip,
        average=config.average,
        seed=config.seed,
        exact=config.exact,
    )
    setting = Setting(config, material, model, learner, [0.0])
    setting.batches(0, setting.processes)  # refuses a batch that does not divide
    return setting


def _arguments(objective: Objective) -> dict[str, Any]:
    """As YAML gives them back, and without what the run's own options say."""
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in objective.settings.items()}
    return {k: v for k, v in settings.items() if k not in ("label_smoothing", "incoherence")}


def _train(setting: Setting, out: Path, stop: StopFlag, resume: bool, progress: bool, say: Say) -> Run:
    config, material, learner = setting.config, setting.material, setting.learner
    saved = load_checkpoint(out / "checkpoints") if resume else None
    if saved is not None:
        _refuse_changed_data(saved.meta.get("data"), material, config, out)
        with _fitting(saved, out):
            learner.load_tensors(saved.tensors, saved.step)
        for line in saved.damaged:
            say(f"passed over {line}")
        say(_resuming(saved, learner.total_steps, out))
        for line in _elsewhere(saved.meta.get("made_by", {}), setting):
            say(line)
    recorder = Recorder(
        out,
        learner,
        lambda final: material.held(config.workers, final),
        steps_per_epoch=setting.steps_per_epoch,
        eval_every=_interval(
            config.eval_every, setting.steps_per_epoch, learner.total_steps, at_most=material.looks
        ),
        save_every=config.save_every
        or _interval(0, setting.steps_per_epoch, learner.total_steps, at_most=20),
        data=material.fingerprint,
        stop=stop,
        sharded=config.checkpoint_format == "sharded",
        max_skipped=config.max_skipped,
        list_batch=setting.list_batch,
        stop_on_collapse=config.stop_on_collapse,
        stop_past_bound=config.ista_bound == "stop",
        waited=lambda: setting.waited[0],
        units_per_step=config.batch_size * material.units,
        unit=material.unit,
        writes=rank() == 0,
        progress=progress,
        say=say,
    )
    if saved is not None:
        with _fitting(saved, out):
            recorder.restore(saved.meta)
    if resume:
        recorder.drop_later_lines()
    try:
        with _threads(setting):
            _fit(setting, recorder)
    except NumericsError as error:
        if recorder.refused:
            raise
        recorder.save()
        recorder.keep_before()
        if rank() > 0:
            raise
        raise NumericsError(_about_bad_batch(error, setting, recorder.skipped)) from error
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        raise ResourceError(_about_memory(setting, out)) from error
    finally:
        recorder.bar.close()
    with learner.measured() as (objective, weights):
        model: Any = objective.model
        model.load_state_dict(dict(weights))
    model.cpu().eval()
    measures = {k.removeprefix("test "): v for k, v in recorder.latest.items() if k.startswith("test ")}
    run = Run(out, config, model, measures.get("accuracy"), recorder.seconds, measures)
    if rank() == 0:
        _hand_over(run, setting)
    return run


@contextmanager
def _fitting(saved: Checkpoint, out: Path) -> Iterator[None]:
    """A checkpoint that is whole may still be of another run."""
    try:
        yield
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(
            f"step {saved.step} in {out} is not of this run ({type(error).__name__}: {reason}) - restore its "
            f"checkpoints, or begin anew with --overwrite"
        ) from error


def _fit(setting: Setting, recorder: Recorder) -> None:
    config, learner = setting.config, setting.learner
    if learner.step == learner.total_steps:
        return
    if config.engine == "plain":
        fit_plain(
            learner,
            setting.batches(0, 1),
            recorder,
            begin=recorder.begin,
            accumulate=config.accumulate,
            precision=config.precision,
            device="cuda" if config.accelerator != "cpu" and torch.cuda.is_available() else "cpu",
        )
    else:
        fit_lightning(
            learner,
            setting.batches,
            recorder,
            begin=recorder.begin,
            accumulate=config.accumulate,
            precision=config.precision,
            accelerator=config.accelerator,
            devices=config.devices,
            nodes=config.nodes,
            strategy=config.strategy,
            remedy=lambda: _how_to_go_on(recorder.out),
        )


def _how_to_go_on(out: Path) -> str:
    return f"{last_good(out)} in {out} - run the same command with --resume to go on from there"


SMALL_STEP = 4e9
"""Floating point operations of a step below which one CPU thread serves best: more wait on each other."""


def _threads(setting: Setting) -> AbstractContextManager[None]:
    """The run's number of CPU threads. The numbers of a run depend on it in their last bits."""
    parameters = sum(p.numel() for p in setting.model.parameters())
    small = 6 * parameters * setting.material.tokens * setting.config.batch_size < SMALL_STEP
    return _cpu_threads(setting.config.threads or (1 if small else torch.get_num_threads()))


@contextmanager
def _cpu_threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _interval(epochs: float, steps_per_epoch: float, total: int, at_most: int) -> int:
    """Steps between two events that come every so many epochs; of 0, at most so often in the run."""
    if epochs:
        return max(1, round(epochs * steps_per_epoch))
    return max(1, round(steps_per_epoch), math.ceil(total / at_most))


def _claim(out: Path, config: TrainConfig, *, resume: bool, overwrite: bool, say: Say) -> None:
    """Make the folder ready, or refuse to touch it."""
    is_run = (out / "config.yaml").is_file()
    if resume and is_run:
        before = TrainConfig.from_mapping(read_config(out / "config.yaml"))
        for line in refuse_changes(before, config):
            say(line)
        return
    if resume:
        raise ConfigError(f"nothing to resume: {out} holds no run - leave out --resume, or check --out")
    if out.exists() and (not out.is_dir() or any(not _is_half_written(path) for path in out.iterdir())):
        if not is_run:
            raise ConfigError(f"{out} exists and is not a run - take another --out; it is left as it is")
        if not overwrite:
            raise ConfigError(
                f"{out} holds a run already - give --resume to go on with it, --overwrite to replace it, or "
                f"another --out"
            )
        with locked(out):
            remove_folder(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_file(out / "config.yaml", config.to_yaml())
        (out / "checkpoints").mkdir(exist_ok=True)
    except (OSError, ResourceError) as error:
        cause = error.__cause__ or error
        if not isinstance(cause, OSError) or gives_out(cause):
            raise
        raise ConfigError(f"cannot write {out}: {cause.strerror} - take another --out") from error


def _is_half_written(path: Path) -> bool:
    """The only thing in the folder of a run that was killed before it had begun."""
    return path.name.startswith(".tmp-config.yaml-")


def _refuse_changed_data(fingerprint: Any, material: Material, config: TrainConfig, out: Path) -> None:
    if not isinstance(fingerprint, str):
        raise CheckpointError(
            f"the last checkpoint in {out} does not say what it has learnt from - restore it, or begin anew "
            f"with --overwrite"
        )
    if fingerprint != material.fingerprint:
        what = changes(out, material.stamps())
        raise DataError(
            f"{config.data} has changed since the run began{': ' * bool(what)}{what} - restore its "
            f"files, or start a new run with --init-from {out}"
        )


def _about_bad_batch(error: NumericsError, setting: Setting, skipped: Sequence[int]) -> str:
    """Write down what the refused step was made of, and say so."""
    step, config = setting.learner.step, setting.config
    path = setting.list_batch(step + 1, str(error))
    before = f", after {len(skipped)} were left out" if skipped else ""
    return (
        f"{error}: the step was not applied, the state after step {step} is saved{before}\n"
        f"its {config.batch_size} {setting.material.items} are listed in {path}\n"
        f"see where it begins with: pellucid replay {path}\n"
        f"then leave it out with --resume --max-skipped {len(skipped) + 1}, or start again with a lower --lr "
        f"and --matrix-lr"
    )


def _resuming(saved: Checkpoint, total: int, out: Path) -> str:
    """From which step a run goes on, when it was saved, and how much of what was done is lost."""
    told = f" (saved {saved.meta['saved']})" if "saved" in saved.meta else ""
    log = out / "metrics.jsonl"
    reached = max((line["step"] for line in read_lines(log)), default=0) if log.exists() else 0
    # The log has a line for every few steps, so that more than it says may have been done.
    lost = f", at least {reached - saved.step} steps to do again" if reached > saved.step else ""
    return f"resuming from step {saved.step} of {total}{told}{lost}"


def _elsewhere(made_by: Mapping[str, Any], setting: Setting) -> list[str]:
    """What the last bits of a run depend on, and is other than it was."""
    with _threads(setting):
        here = thread_fingerprint()
    changed = [f"{k} {made_by[k]} -> {here[k]}" for k in here if made_by.get(k, here[k]) != here[k]]
    return [f"{', '.join(changed)}: results may differ in their last bits"] if changed else []


def _is_out_of_memory(error: BaseException) -> bool:
    """PyTorch has an error of its own for devices, and none for the CPU."""
    said = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(s in str(error) for s in said)


def _about_memory(setting: Setting, out: Path) -> str:
    config, parts = setting.config, setting.parts
    option, now = ("exact", config.exact) if config.exact else ("accumulate", config.accumulate)
    each = parts // now  # processes that take one of these parts each
    more = [2 * now] if config.exact else range(now + 1, config.batch_size // each + 1)
    cut = next((n for n in more if config.batch_size % (n * each) == 0), None)
    smaller = f"--{option} {cut} (the same batch in smaller parts)" if cut else "a smaller model"
    return (
        f"out of memory at step {setting.learner.step + 1}, with a batch of {config.batch_size} in {parts} "
        f"part{'s' if parts > 1 else ''} - start again with --overwrite and {smaller}, or --batch-size "
        f"{max(1, config.batch_size // 2)}\n"
        f"or free some memory and go on with --resume; {last_good(out)}"
    )


def _hand_over(run: Run, setting: Setting) -> None:
    """``model/`` and ``result.json``: what others read."""
    files = setting.material.model_files(run.model)
    with saving(run.out, sum(map(len, files.values()))), new_folder(run.out / "model") as scratch:
        for name, content in files.items():
            write_flushed(scratch / name, content)
    result = {
        "accuracy": run.accuracy,
        "measures": run.measures,
        "seconds": round(run.seconds, 3),
        "steps": setting.learner.total_steps,
        **setting.material.facts(),
    }
    write_file(run.out / "result.json", json.dumps(result, indent=1))
