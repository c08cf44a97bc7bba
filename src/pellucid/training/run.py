"""A training run from options to a folder: ``train`` and what it leaves behind."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as tensors_to_bytes
from torch import nn

from pellucid.data import (
    Colour,
    ImageData,
    MaskedView,
    Masking,
    MultiView,
    StepSampler,
    View,
    eval_loader,
    load_data,
    train_loader,
)
from pellucid.data.crops import SMALL_COLOUR
from pellucid.errors import CheckpointError, ConfigError, DataError, NumericsError, Stopped, suggest
from pellucid.models import create_model, load
from pellucid.models.embed import embedding, image_size
from pellucid.models.saved import CONFIG, WEIGHTS, copy_weights, describe_model
from pellucid.training.checkpoint import (
    last_good,
    load_checkpoint,
    locked,
    new_folder,
    remove_folder,
    saving,
    sweep,
    write_file,
    write_flushed,
)
from pellucid.training.config import TrainConfig, read_config, refuse_changes
from pellucid.training.learner import Learner
from pellucid.training.loops import fit_lightning, fit_plain
from pellucid.training.masked import MAE
from pellucid.training.mcr2 import MCR2, SelfSupervisedMCR2
from pellucid.training.objective import Held, Objective
from pellucid.training.ranks import launched, rank
from pellucid.training.recipe import MuonAdamW
from pellucid.training.recorder import Recorder, StopFlag, read_lines
from pellucid.training.self_distillation import DINO, SimDINO, SimDINOv2
from pellucid.training.supervised import Supervised

OBJECTIVES: dict[str, type[Objective]] = {
    "supervised": Supervised,
    "mcr2": MCR2,
    "simdino": SimDINO,
    "simdinov2": SimDINOv2,
    "dino": DINO,
    "mcr2-views": SelfSupervisedMCR2,
    "mae": MAE,
}

REFERENCE = 5_000
"""Training images at most that measures compare with."""

VIEWED = 512
"""Test images at most whose views are compared."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        out: its folder.
        config: as resolved.
        model: trained, in eval mode.
        accuracy: share of test images classified rightly at the end; None without a classifier.
        measures: of the test images at the end: the objective's parts, or what its features are worth.
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
    data: str | os.PathLike[str] | ImageData,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    say: Say = lambda line: None,
    **options: Any,
) -> Run:
    """Train a model and leave a run folder behind.

    Args:
        data: see :func:`pellucid.load_data`.
        resume: go on from the newest checkpoint in ``out``; to the same bits on the same CPU.
        overwrite: replace a run that stands at ``out``.
        progress: draw a bar.
        say: gets one line of news at a time.
        options: fields of :class:`~pellucid.training.config.TrainConfig`.

    Raises:
        ConfigError, DataError: before anything is written.
        CheckpointError: ``out`` exists, is in use, or cannot be written.
        NumericsError: a loss or gradient was not finite; the step was not applied, all before it is saved.
        Stopped: by a signal; the state is saved.
        ProcessLost: one of several processes that train together is gone.
    """
    name = data.name if isinstance(data, ImageData) else os.fspath(data)
    config = TrainConfig.from_mapping({**options, "data": name})
    if config.objective not in OBJECTIVES:
        raise ConfigError(f"unknown objective '{config.objective}'{suggest(config.objective, OBJECTIVES)}")
    config = replace(
        config, **{k: v for k, v in OBJECTIVES[config.objective].recipe.items() if k not in options}
    )
    _refuse_strategy(config)
    _refuse_other_processes(config)
    images = load_images(config, data)
    setting = _set_up(_resolved(config, images), images)
    config = setting.config
    out = Path(config.out)
    if rank() > 0:  # the first process owns the folder
        try:
            with StopFlag() as stop:
                return _train(setting, out, stop, resume, progress=False, say=lambda line: None)
        except (Stopped, NumericsError) as error:
            raise SystemExit(error.exit_code) from error  # the first process says why
    _claim(out, config, resume=resume, overwrite=overwrite)
    with locked(out), StopFlag() as stop:
        for folder in (out, out / "checkpoints"):
            sweep(folder)
        return _train(setting, out, stop, resume, progress, say)


def load_images(config: TrainConfig, data: str | os.PathLike[str] | ImageData | None = None) -> ImageData:
    """The images of a run, with labels where its objective needs them."""
    return load_data(
        config.data if data is None else data,
        labels="required" if OBJECTIVES[config.objective].needs_labels else "optional",
        download=config.download,
        root=config.data_root,
        max_bad=config.max_bad,
    )


def open_run(path: str | os.PathLike[str]) -> Run:
    """A finished run from its folder.

    Raises:
        CheckpointError: no run there, or one that has not ended.
    """
    out = Path(path)
    if not (out / "config.yaml").is_file():
        raise CheckpointError(f"{out} is not a run (no config.yaml) - give the folder that train made")
    config = TrainConfig.from_mapping(read_config(out / "config.yaml"))
    result = json.loads((out / "result.json").read_text()) if (out / "result.json").is_file() else {}
    return Run(
        out,
        config,
        load(out),
        result.get("accuracy"),
        result.get("seconds", 0.0),
        result.get("measures", {}),
    )


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
class _Setting:
    """A run's parts, made from its options and data alone."""

    config: TrainConfig
    images: ImageData
    model: nn.Module
    learner: Learner
    view: View
    views: MultiView | MaskedView | None
    waited: list[float]

    @property
    def steps_per_epoch(self) -> float:
        return len(self.images.train) / self.config.batch_size

    def batches(self, rank: int, world: int) -> Any:
        """Micro-batches from the learner's step to the end."""
        config, learner = self.config, self.learner
        sampler = StepSampler(
            n=len(self.images.train),
            batch_size=config.batch_size,
            seed=config.seed,
            steps=learner.total_steps,
            start=learner.step,
            accumulate=config.accumulate,
            rank=rank,
            world=world,
        )
        view = self.views or self.view
        loader = train_loader(self.images.train, view, sampler, workers=config.workers)
        return Waiting(loader, self.waited)

    def held(self) -> Held:
        """What is measured on."""
        view, workers = replace(self.view, augment="none"), self.config.workers
        train = eval_loader(self.images.train, view, workers=workers, limit=REFERENCE)
        test = eval_loader(self.images.test, view, workers=workers)
        if not isinstance(self.views, MultiView):
            return Held(test, train)
        views = eval_loader(self.images.test, self.views, workers=workers, limit=VIEWED)
        return Held(test, train, views)


def _refuse_strategy(config: TrainConfig) -> None:
    """What fsdp cannot do, and what only fsdp does."""
    if config.checkpoint_format == "sharded" and config.strategy != "fsdp":
        raise ConfigError("sharded checkpoints are of what fsdp has cut up - add --strategy fsdp")
    if config.strategy == "fsdp":
        if config.engine == "plain" or (config.devices == 1 and config.nodes == 1):
            raise ConfigError("fsdp cuts a run up over several processes - give --devices, or leave it out")
        if config.incoherence:
            raise ConfigError("incoherence looks into layers that fsdp takes apart - take --strategy ddp")


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


def _set_up(config: TrainConfig, images: ImageData) -> _Setting:
    kind = OBJECTIVES[config.objective]
    steps = math.ceil(config.epochs * len(images.train) / config.batch_size)
    # An orthogonal matrix has other last bits with other threads, and a run begins there.
    with _cpu_threads(1):
        torch.manual_seed(config.seed)
        model = create_model(config.model, **_model_args(config, images))
        if config.init_from is not None:
            copy_weights(model, config.init_from, new_head=config.new_head)
        objective = kind.build(model, config, steps)
    if config.strategy == "fsdp":
        _refuse_to_cut(objective)
    config = replace(config, objective_args=_arguments(objective), **_crop_choices(config, model))
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
    )
    view = training_view(config, images, image_size(model))
    setting = _Setting(config, images, model, learner, view, _views(config, view, objective), [0.0])
    setting.batches(0, max(1, config.devices) * config.nodes if isinstance(config.devices, int) else 1)
    return setting


def _model_args(config: TrainConfig, images: ImageData) -> dict[str, Any]:
    """The architecture's options, those that the data and the objective settle among them."""
    kind = OBJECTIVES[config.objective]
    found = {**config.model_args, "in_chans": images.in_chans, "num_classes": len(images.class_names)}
    if not kind.needs_labels:
        found["num_classes"] = 0
    if kind.many_views:
        found["dynamic_img_size"] = True
    return found


def _arguments(objective: Objective) -> dict[str, Any]:
    """As YAML gives them back, and without what the run's own options say."""
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in objective.settings.items()}
    return {k: v for k, v in settings.items() if k not in ("label_smoothing", "incoherence")}


def _crop_choices(config: TrainConfig, model: Any) -> dict[str, Any]:
    """How many small views, and of what size: about half of the images' side, in whole patches."""
    if not OBJECTIVES[config.objective].many_views:
        return {}
    side, patch = min(image_size(model)), math.isqrt(_patch_area(model))
    # In few pixels a part says little about the whole.
    tiny = config.augment == "small"
    count = config.small_crops if config.small_crops is not None else 0 if tiny else 8
    split = config.crop_split if config.crop_split is not None else 0.8 if tiny else 0.4
    size = config.small_size or max(1, round(side / 2 / patch)) * patch
    if config.large_crops + count < 2:
        raise ConfigError("one view of an image has no other to agree with - take two --large-crops")
    if count and size % patch:
        raise ConfigError(f"small_size is {size}; it must be made of patches of {patch}")
    return {"small_crops": count, "small_size": size, "crop_split": split}


def _views(config: TrainConfig, view: View, objective: Objective) -> MultiView | MaskedView | None:
    if not objective.many_views:
        return MaskedView(view, objective.masking) if objective.masking else None
    return several_views(config, view, objective.masking)


def training_view(config: TrainConfig, images: ImageData, img_size: tuple[int, int]) -> View:
    """How a run whose options are resolved sees a training image."""
    return View(
        img_size=img_size,
        in_chans=images.in_chans,
        mean=images.mean,
        std=images.std,
        augment=config.augment,  # type: ignore[arg-type]  # resolved: no longer "auto"
        flip=bool(config.flip),
        seed=config.seed,
    )


def several_views(config: TrainConfig, view: View, masking: Masking | None) -> MultiView:
    """How it sees one where its objective compares views."""
    assert config.small_crops is not None
    assert config.small_size is not None
    assert config.crop_split is not None
    return MultiView(
        view,
        large=config.large_crops,
        small=config.small_crops,
        small_size=(config.small_size, config.small_size),
        split=config.crop_split,
        colour=SMALL_COLOUR if config.augment == "small" else Colour(),
        masking=masking,
    )


def _train(setting: _Setting, out: Path, stop: StopFlag, resume: bool, progress: bool, say: Say) -> Run:
    config, images, learner = setting.config, setting.images, setting.learner
    saved = load_checkpoint(out / "checkpoints") if resume else None
    if saved is not None:
        _refuse_changed_data(saved.meta["data"], images, config, out)
        learner.load_tensors(saved.tensors, saved.step)
        for line in saved.damaged:
            say(f"passed over {line}")
        say(f"resuming from step {saved.step} of {learner.total_steps}")
    recorder = Recorder(
        out,
        learner,
        setting.held,
        steps_per_epoch=setting.steps_per_epoch,
        eval_every=_interval(config.eval_every, setting.steps_per_epoch, learner.total_steps, at_most=40),
        save_every=config.save_every
        or _interval(0, setting.steps_per_epoch, learner.total_steps, at_most=20),
        data=images.fingerprint,
        stop=stop,
        sharded=config.checkpoint_format == "sharded",
        stop_on_collapse=config.stop_on_collapse,
        waited=lambda: setting.waited[0],
        images_per_step=config.batch_size,
        writes=rank() == 0,
        progress=progress,
        say=say,
    )
    if saved is not None:
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
        if rank() > 0:
            raise
        raise NumericsError(_about_bad_batch(error, setting, out)) from error
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


def _fit(setting: _Setting, recorder: Recorder) -> None:
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


def _threads(setting: _Setting) -> AbstractContextManager[None]:
    """The run's number of CPU threads. The numbers of a run depend on it in their last bits."""
    height, width = setting.view.img_size
    tokens = height * width / _patch_area(setting.model)
    if isinstance(setting.views, MultiView):
        tokens *= setting.views.large
    parameters = sum(p.numel() for p in setting.model.parameters())
    small = 6 * parameters * tokens * setting.config.batch_size < SMALL_STEP
    return _cpu_threads(setting.config.threads or (1 if small else torch.get_num_threads()))


@contextmanager
def _cpu_threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _patch_area(model: Any) -> int:
    height, width = getattr(embedding(model), "patch_size", (1, 1))
    return height * width


def _resolved(config: TrainConfig, images: ImageData) -> TrainConfig:
    """The options with every choice that was left to the data made."""
    kind, model, model_args = OBJECTIVES[config.objective], config.model, dict(config.model_args)
    if not model:
        model, sizes = _choose_model(images, kind.family)
        # Without labels, and in few steps, the mean of the patches tells more than a class token learns to.
        pool = {} if kind.needs_labels else {"global_pool": "avg"}
        model_args = {**sizes, **pool, **model_args}
    for key, found in (("num_classes", len(images.class_names)), ("in_chans", images.in_chans)):
        if model_args.pop(key, found) != found:
            given = config.model_args[key]
            raise ConfigError(f"model_args has {key} {given}, the data has {found} - leave it out")
    augment = config.augment
    if augment == "auto":
        augment = kind.small_augment if images.small else "photo"
    flip = config.flip if config.flip is not None else not images.small
    out = config.out or f"runs/{Path(config.data).stem}-{model}"
    return replace(config, model=model, model_args=model_args, augment=augment, flip=flip, out=out)


def _choose_model(images: ImageData, family: str) -> tuple[str, dict[str, Any]]:
    """A model of this family for pictures of this size, with the size it takes."""
    if images.img_size is None:
        return f"{family}_tiny_patch16_224", {}
    kind, patch = ("digits", 2) if max(images.img_size) <= 12 else ("micro_patch4_32", 4)
    height, width = (math.ceil(side / patch) * patch for side in images.img_size)
    return f"{family}_{kind}", {"img_size": height if height == width else (height, width)}


def _interval(epochs: float, steps_per_epoch: float, total: int, at_most: int) -> int:
    """Steps between two events that come every so many epochs; of 0, at most so often in the run."""
    if epochs:
        return max(1, round(epochs * steps_per_epoch))
    return max(1, round(steps_per_epoch), math.ceil(total / at_most))


def _claim(out: Path, config: TrainConfig, *, resume: bool, overwrite: bool) -> None:
    """Make the folder ready, or refuse to touch it."""
    is_run = (out / "config.yaml").is_file()
    if resume and is_run:
        refuse_changes(TrainConfig.from_mapping(read_config(out / "config.yaml")), config)
        return
    if resume:
        raise CheckpointError(f"nothing to resume: {out} holds no run - leave out --resume, or check --out")
    if out.exists() and (not out.is_dir() or any(not _is_half_written(path) for path in out.iterdir())):
        if not is_run:
            raise CheckpointError(f"{out} exists and is not a run - take another --out; it is left as it is")
        if not overwrite:
            raise CheckpointError(
                f"{out} holds a run already - give --resume to go on with it, --overwrite to replace it, or "
                f"another --out"
            )
        with locked(out):
            remove_folder(out)
    with saving(out.parent, 0):
        out.mkdir(parents=True, exist_ok=True)
    write_file(out / "config.yaml", config.to_yaml())
    (out / "checkpoints").mkdir(exist_ok=True)


def _is_half_written(path: Path) -> bool:
    """The only thing in the folder of a run that was killed before it had begun."""
    return path.name.startswith(".tmp-config.yaml-")


def _refuse_changed_data(fingerprint: str, images: ImageData, config: TrainConfig, out: Path) -> None:
    if fingerprint != images.fingerprint:
        raise DataError(
            f"{config.data} has changed since the run began - restore its files, or start a new run with "
            f"--init-from {out}"
        )


def _about_bad_batch(error: NumericsError, setting: _Setting, out: Path) -> str:
    """Write down which images the refused step was made of, and say so."""
    step, images = setting.learner.step, setting.images.train
    sampler = StepSampler(len(images), setting.config.batch_size, setting.config.seed, step + 1, step)
    keys = [key for batch in sampler for key in batch]
    items = [{"index": index, "epoch": epoch, "name": images.name(index)} for index, epoch in keys]
    path = out / "bad" / f"step-{step + 1:08d}.json"
    path.parent.mkdir(exist_ok=True)
    write_file(path, json.dumps({"step": step + 1, "reason": str(error), "items": items}, indent=1))
    return (
        f"{error}: the step was not applied, the state after step {step} is saved\n"
        f"its {len(items)} images ({items[0]['name']}, ...) are listed in {path}\n"
        f"look at them, or start again with a lower --lr and --matrix-lr"
    )


def _hand_over(run: Run, setting: _Setting) -> None:
    """``model/`` and ``result.json``: what others read."""
    weights = {name: value.detach().contiguous() for name, value in run.model.state_dict().items()}
    config = describe_model(
        run.model,
        weights,
        class_names=setting.images.class_names if run.model.num_classes else [],
        mean=setting.view.mean,
        std=setting.view.std,
        img_size=setting.view.img_size,
        in_chans=setting.view.in_chans,
    )
    run.model.pretrained_cfg = {**run.model.pretrained_cfg, **config["pretrained_cfg"]}
    data = tensors_to_bytes(weights, metadata={"format": "pt"})
    with saving(run.out, len(data)), new_folder(run.out / "model") as scratch:
        write_flushed(scratch / WEIGHTS, data)
        write_flushed(scratch / CONFIG, json.dumps(config, indent=1).encode())
    images = setting.images
    result = {
        "accuracy": run.accuracy,
        "measures": run.measures,
        "seconds": round(run.seconds, 3),
        "steps": setting.learner.total_steps,
        "train_images": len(images.train),
        "test_images": len(images.test),
        "rejects": [reject._asdict() for reject in images.rejects],
    }
    write_file(run.out / "result.json", json.dumps(result, indent=1))
