"""Images as a run sees them: a size, an augmentation, and where an objective compares them, several views."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

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
from pellucid.data.dataset import EncodedImages
from pellucid.errors import ConfigError
from pellucid.models.embed import embedding, image_size
from pellucid.models.saved import CONFIG, WEIGHTS, describe_model
from pellucid.training.config import TrainConfig
from pellucid.training.material import Material, about_rejects
from pellucid.training.objective import Held, Objective

REFERENCE = 5_000
"""Training images at most that measures compare with."""

VIEWED = 512
"""Test images at most whose views are compared."""


class Pictures(Material):
    """Images, and how the model of a run sees them.

    Args:
        images: as ``load_data`` gives them.
        kind: the objective that reads them.
    """

    unit: ClassVar[str] = "images"
    items: ClassVar[str] = "images"

    def __init__(self, images: ImageData, kind: type[Objective]) -> None:
        self.data = self.images = images
        self.kind = kind
        self.name, self.fingerprint = images.name, images.fingerprint
        self.notes = about_rejects(images.rejects, "images")

    @classmethod
    def load(
        cls,
        data: str | os.PathLike[str] | ImageData,
        config: TrainConfig,
        kind: type[Objective],
        resume: bool = False,
    ) -> Pictures:
        """With labels where the objective needs them."""
        images = load_data(
            data,
            labels="required" if kind.needs_labels else "optional",
            download=config.download,
            root=config.data_root,
            max_bad=config.max_bad,
        )
        return cls(images, kind)

    def resolved(self, config: TrainConfig) -> TrainConfig:
        images, kind, model, model_args = self.images, self.kind, config.model, dict(config.model_args)
        if not model:
            model, sizes = _choose_model(images, kind.family)
            # Without labels and in few steps, the mean of the patches tells more than a class token learns.
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

    def model_args(self, config: TrainConfig) -> dict[str, Any]:
        classes = len(self.images.class_names) if self.kind.needs_labels else 0
        found = {**config.model_args, "in_chans": self.images.in_chans, "num_classes": classes}
        if self.kind.many_views:
            found["dynamic_img_size"] = True
        return found

    def cut_for(self, model: nn.Module, config: TrainConfig) -> None:
        self.patches = math.prod(image_size(model)) / _patch_area(model)
        self.view = training_view(config, self.images, image_size(model))
        self.views: MultiView | MaskedView | None = None

    def shown_to(self, model: nn.Module, objective: Objective, config: TrainConfig) -> TrainConfig:
        if objective.many_views:
            config = replace(config, **_crop_choices(config, model))
            self.views = several_views(config, self.view, objective.masking)
        elif objective.masking:
            self.views = MaskedView(self.view, objective.masking)
        return config

    def __len__(self) -> int:
        return len(self.images.train)

    def batches(self, sampler: StepSampler, workers: int, timeout: float = 60) -> Any:
        seen = self.views or self.view
        return train_loader(self.images.train, seen, sampler, workers=workers, timeout=timeout)

    def held(self, workers: int, final: bool) -> Held:
        view = replace(self.view, augment="none")
        train = eval_loader(self.images.train, view, workers=workers, limit=REFERENCE)
        test = eval_loader(self.images.test, view, workers=workers)
        if not isinstance(self.views, MultiView):
            return Held(test, train)
        views = eval_loader(self.images.test, self.views, workers=workers, limit=VIEWED)
        return Held(test, train, views)

    @property
    def tokens(self) -> float:
        return self.patches * (self.views.large if isinstance(self.views, MultiView) else 1)

    def stamps(self) -> Iterator[tuple[str, str]]:
        for part in (self.images.train, self.images.test):
            labels = part.labels.tolist()
            if isinstance(part, EncodedImages):
                sizes = part.byte_sizes().tolist()
                root = f"{getattr(part, 'root', '')}/"  # the folder may have been moved
                for i in range(len(part)):
                    yield part.name(i).removeprefix(root), f"{labels[i]} {sizes[i]}"
                continue
            for i in range(len(part)):
                pixels = part.image(i).contiguous().numpy().tobytes()
                yield part.name(i), f"{labels[i]} {hashlib.blake2b(pixels, digest_size=8).hexdigest()}"

    @property
    def class_names(self) -> Sequence[str]:
        return self.images.class_names if self.kind.needs_labels else ()

    def item_name(self, i: int) -> str:
        return self.images.train.name(i)

    def model_files(self, model: Any) -> dict[str, bytes]:
        weights = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
        config = describe_model(
            model,
            weights,
            class_names=self.images.class_names if model.num_classes else [],
            mean=self.view.mean,
            std=self.view.std,
            img_size=self.view.img_size,
            in_chans=self.view.in_chans,
        )
        model.pretrained_cfg = {**model.pretrained_cfg, **config["pretrained_cfg"]}
        data = tensors_to_bytes(weights, metadata={"format": "pt"})
        return {WEIGHTS: data, CONFIG: json.dumps(config, indent=1).encode()}

    def facts(self) -> dict[str, Any]:
        return {
            "train_images": len(self.images.train),
            "test_images": len(self.images.test),
            "rejects": [reject._asdict() for reject in self.images.rejects],
        }


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


def _crop_choices(config: TrainConfig, model: Any) -> dict[str, Any]:
    """How many small views, and of what size: about half of the images' side, in whole patches."""
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


def _patch_area(model: Any) -> int:
    height, width = getattr(embedding(model), "patch_size", (1, 1))
    return height * width


def _choose_model(images: ImageData, family: str) -> tuple[str, dict[str, Any]]:
    """A model of this family for pictures of this size, with the size it takes."""
    if images.img_size is None:
        return f"{family}_tiny_patch16_224", {}
    kind, patch = ("digits", 2) if max(images.img_size) <= 12 else ("micro_patch4_32", 4)
    height, width = (math.ceil(side / patch) * patch for side in images.img_size)
    return f"{family}_{kind}", {"img_size": height if height == width else (height, width)}
