"""Pictures cut into things by a model that was never shown a mask: where the files and the measuring meet.

Pictures are looked at one by one, each at its own shape; the features of all of them wait for their common
colours.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from pellucid.data import ImageRejected, read_image, show_name, to_channels
from pellucid.errors import ConfigError, DataError, suggest, unwritten
from pellucid.glass.feed import eval_view
from pellucid.glass.segments import Shown, colour_picture, overlay, reduced, segment_page
from pellucid.measure import coco
from pellucid.measure.segmentation import (
    MASKCUT_TAU,
    SHARE,
    TOKENCUT_TAU,
    By,
    Colours,
    Look,
    Segment,
    default_layer,
    enlarged,
    head_masks,
    look,
    mask_cut,
    pca_colours,
    token_cut,
)
from pellucid.models.embed import embedding, image_size, resized
from pellucid.training.checkpoint import new_folder, write_flushed

Method = Literal["heads", "maskcut", "tokencut", "pca"]
METHODS: tuple[Method, ...] = get_args(Method)

ABOUT, SHEET = "about.json", "index.html"

MOST_PATCHES = 2500
"""Of one picture: every head compares all of them with all, and a cut is solved for all at once."""

MOST_SHOWN = 60
"""Pictures on the sheet, about 0.1 MB each; the files are there for all."""


@dataclass(frozen=True)
class Options:
    """How pictures are cut.

    Attributes:
        methods: what is done: the mask of each head, MaskCut, TokenCut, PCA of the features to colours.
        layer: which one is read, from 1; the last but one of a white box, the last of a ViT unless given.
        size: shorter side at which the model sees a picture, in pixels; its own unless given. Larger ones
            have more and, on the picture, smaller patches.
        share: of the patches or of the attention that a head's mask keeps.
        by: ``"count"`` or ``"mass"``; see :func:`~pellucid.measure.segmentation.head_masks`.
        tau: cosine from which on patches count as alike; 0.15 in MaskCut and 0.2 in TokenCut unless given.
        masks: of MaskCut, at most.
    """

    methods: Sequence[Method] = METHODS
    layer: int | None = None
    size: int | None = None
    share: float = SHARE
    by: By = "count"
    tau: float | None = None
    masks: int = 3

    def __post_init__(self) -> None:
        for method in self.methods:
            if method not in METHODS:
                raise ConfigError(f"no method is called '{method}'{suggest(method, METHODS)}")
        if not self.methods:
            raise ConfigError(f"no method is given - known: {', '.join(METHODS)}")
        if self.by not in get_args(By):
            raise ConfigError(f"by is '{self.by}'{suggest(self.by, get_args(By))}")
        if not 0 < self.share <= 1:
            raise ConfigError(f"share is {self.share:g}; it must be larger than 0 and at most 1")
        if self.tau is not None and not -1 <= self.tau <= 1:
            raise ConfigError(f"tau is {self.tau:g}; it is a cosine, between -1 and 1")
        for name, value in (("size", self.size), ("masks", self.masks)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be larger than 0")


@dataclass(frozen=True)
class Segmented:
    """What was written.

    Attributes:
        out: the folder.
        images: how many pictures are in it.
        masks: method -> how many masks.
        unread: name and reason of each picture that cannot be read.
    """

    out: Path
    images: int
    masks: dict[str, int]
    unread: list[tuple[str, str]]


def segment(
    model: Any,
    images: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    options: Options | None = None,
    *,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Segmented:
    """Cut pictures into things and write masks, overlays and a sheet, all of them or nothing.

    ``DIR/METHOD.json`` holds the masks in COCO's format, at the size of each picture, ``DIR/masks/`` the same
    as PNG (0 and 255), ``DIR/overlays/`` pictures to look at, ``DIR/index.html`` all of it on one page,
    ``DIR/about.json`` what was done.

    Args:
        model: from ``pellucid.load`` or ``create_model``: CRATE, ToST, or a timm ViT.
        images: picture files.
        out: a folder that does not exist, or with ``overwrite`` one that this function wrote, with nothing
            else in it.
        options: see :class:`Options`.
        overwrite: replace it.
        progress: is told 1 for each picture.

    Raises:
        ConfigError: a folder that stands there or cannot be written, options or a model that cannot be.
        DataError: no picture at all, or none that can be read.
    """
    options = options or Options()
    if not images:
        raise DataError("no images given - name at least one file")
    final = refuse_folder(out, overwrite)
    layer = default_layer(model) if options.layer is None else options.layer
    with _written(final) as scratch:
        work = _Work(model, options, layer, scratch)
        for path in images:
            work.add(path)
            if progress is not None:
                progress(1)
        if not work.images:
            listed = "".join(f"\n  {name}: {reason}" for name, reason in work.unread[:3])
            raise DataError(f"none of {len(images)} images can be read - name picture files{listed}")
        work.finish()
    counts = {method: len(found) for method, found in work.annotations.items()}
    return Segmented(Path(out), len(work.images), counts, work.unread)


def refuse_folder(out: str | os.PathLike[str], overwrite: bool) -> Path:
    """Where the folder really lies; refused where anything stands that is not to be replaced.

    Raises:
        ConfigError: it exists and ``overwrite`` is not given, or it holds what ``segment`` did not write.
    """
    final = Path(os.path.realpath(out))
    if not final.exists() or (final.is_dir() and not any(final.iterdir())):
        return final
    shown = show_name(os.fspath(out))
    own = _own_files(final)
    foreign = [] if own is None else [path for path in _files(final) if path not in own]
    if own is None or foreign:
        what = f"holds {show_name(foreign[0])}" if foreign else "was not written by segment"
        raise ConfigError(f"{shown} exists and {what} - take another --out; it is left as it is")
    if not overwrite:
        raise ConfigError(f"{shown} stands there already - give --overwrite, or another --out")
    return final


def _own_files(folder: Path) -> set[str] | None:
    """The files that ``about.json`` says ``segment`` wrote; None without one."""
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        return {*about["files"], ABOUT}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _files(folder: Path) -> list[str]:
    """Everything in a folder that is no folder, as ``masks/x.png``; a link is not followed."""
    return [
        os.path.relpath(os.path.join(at, name), folder)
        for at, folders, names in os.walk(folder)
        for name in (*names, *(link for link in folders if os.path.islink(os.path.join(at, link))))
    ]


def fitted_size(model: Any, height: int, width: int, shorter: int | None = None) -> tuple[int, int]:
    """The size at which the model sees a whole picture: of its shape, as nearly as patches tile it.

    Args:
        model: with patches.
        height, width: of the picture.
        shorter: its shorter side, in pixels; that of the model's own images unless given. At most 2,500
            patches in all: a larger or a very long picture is seen smaller.
    """
    patch = getattr(embedding(model), "patch_size", None)
    if patch is None:
        raise ConfigError(f"{type(model).__name__} cuts no patches - take CRATE, ToST or a timm ViT")
    scale = (shorter or min(image_size(model))) / min(height, width)
    rows, columns = (
        max(1, round(side * scale / each)) for side, each in zip((height, width), patch, strict=True)
    )
    if rows * columns > MOST_PATCHES:
        shrink = (MOST_PATCHES / (rows * columns)) ** 0.5
        rows = min(max(1, int(rows * shrink)), MOST_PATCHES)
        columns = min(max(1, int(columns * shrink)), MOST_PATCHES // rows)
    return rows * patch[0], columns * patch[1]


@dataclass
class _Work:
    """Everything between the first picture and the last."""

    model: Any
    options: Options
    layer: int
    folder: Path
    images: list[dict[str, Any]] = field(default_factory=list)
    annotations: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    unread: list[tuple[str, str]] = field(default_factory=list)
    shown: list[Shown] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)
    grids: list[tuple[int, int]] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    heads: int = 0

    def __post_init__(self) -> None:
        for name in ("masks", "overlays"):
            (self.folder / name).mkdir()
        self.annotations = {method: [] for method in self.options.methods}
        self.view = eval_view(self.model)
        self.device = next(self.model.parameters()).device
        self.fitted = self.model
        self.names: list[str] = []

    def add(self, path: str | os.PathLike[str]) -> None:
        """One picture: all that can be said of it before the others are known."""
        try:
            image = read_image(path)
        except ImageRejected as error:
            self.unread.append((show_name(path), error.reason))
            return
        height, width = image.shape[-2:]
        number = len(self.images) + 1
        self.images.append({"id": number, "file_name": show_name(path), "height": height, "width": width})
        self.names.append(f"{number:04d}-{_slug(path)}")
        seen = self._look(image)
        options, size = self.options, (height, width)
        picture = to_channels(image if len(image) in (1, 3) else image[:1], 3)
        segments: dict[str, list[Segment]] = {}
        if "maskcut" in options.methods:
            tau = MASKCUT_TAU if options.tau is None else options.tau
            segments["maskcut"] = mask_cut(seen.features[0], seen.grid, tau, options.masks)
        if "tokencut" in options.methods:
            tau = TOKENCUT_TAU if options.tau is None else options.tau
            segments["tokencut"] = token_cut(seen.features[0], seen.grid, tau)
        for method, found in segments.items():
            for i, segment in enumerate(found, start=1):
                self._mask(method, f"-{i}", 1, enlarged(segment.mask, size), segment.score)
            drawn = overlay(picture, [segment.mask for segment in found])
            self._write(f"overlays/{self.names[-1]}-{method}.png", drawn)
        heads = seen.heads[0].unflatten(-1, seen.grid)
        kept = head_masks(seen.heads[0], options.share, options.by).unflatten(-1, seen.grid)
        self.heads = len(heads)
        if "heads" in options.methods:
            for i, mask in enumerate(kept, start=1):
                self._mask("heads", f"-{i}", i, enlarged(mask, size))
        if "pca" in options.methods:
            self.features.append(seen.features[0])
            self.grids.append(seen.grid)
        if len(self.shown) < MOST_SHOWN:
            small = reduced(picture)
            self.shown.append(Shown(self.images[-1]["file_name"], size, small, seen.grid, segments))
            if "heads" in options.methods:
                self.shown[-1].heads = heads
                self.shown[-1].head_masks = kept

    def finish(self) -> None:
        """What needs all pictures: the colours, the lists, the sheet."""
        if self.features:
            for number, colours in enumerate(pca_colours(self.features, self.grids), start=1):
                self._colours(number, colours)
        categories = {"heads": [f"head {i}" for i in range(1, self.heads + 1)]}
        for method, masks in self.annotations.items():
            data = coco.dataset(self.images, masks, categories.get(method, ["thing"]))
            self._write(f"{method}.json", json.dumps(data, indent=1).encode())
        name = getattr(self.model, "architecture", type(self.model).__name__)
        title = "Things, found without masks"
        page = segment_page(
            title,
            self.shown,
            model=str(name),
            layer=self.layer,
            share=self.options.share,
            by=self.options.by,
            pictures=len(self.images),
        )
        self._write(SHEET, page.encode("utf-8", "backslashreplace"))
        about = {
            "what": "pellucid segment",
            "model": str(name),
            "layer": self.layer,
            "options": asdict(self.options),
            "images": [
                {**image, "files": f"{name}-*.png"}
                for image, name in zip(self.images, self.names, strict=True)
            ],
            "unread": [{"file_name": name, "reason": reason} for name, reason in self.unread],
            "files": sorted(self.files),
        }
        self._write(ABOUT, json.dumps(about, indent=1).encode())

    def _look(self, image: Tensor) -> Look:
        size = fitted_size(self.model, image.shape[-2], image.shape[-1], self.options.size)
        if image_size(self.fitted) != size:
            self.fitted = resized(self.model, size)
        return look(self.fitted, self.view.at(size).whole(image).to(self.device), self.layer)

    def _colours(self, number: int, colours: Colours) -> None:
        image, name = self.images[number - 1], self.names[number - 1]
        size = (image["height"], image["width"])
        self._mask("pca", "", 1, enlarged(colours.foreground, size), number=number)
        self._write(f"overlays/{name}-pca.png", colour_picture(colours.colours, size))
        if number <= len(self.shown):
            self.shown[number - 1].colours = colours

    def _mask(
        self, method: str, ending: str, category: int, mask: Tensor, score: float | None = None,
        number: int | None = None,
    ) -> None:  # fmt: skip
        """One mask, as a picture and as an annotation; an empty one is a picture only."""
        number = len(self.images) if number is None else number
        self._write(f"masks/{self.names[number - 1]}-{method}{ending}.png", _gray(mask))
        if bool(mask.any()):
            found = self.annotations[method]
            found.append(coco.annotation(len(found) + 1, number, category, mask, score))

    def _write(self, name: str, content: bytes) -> None:
        write_flushed(self.folder / name, content)
        self.files.append(name)


def _slug(path: str | os.PathLike[str]) -> str:
    """A piece of a file's name that is a file's name anywhere."""
    stem = os.path.splitext(os.path.basename(os.fsdecode(path)))[0]
    return re.sub(r"[^A-Za-z0-9_-]+", "_", stem)[:40].strip("_") or "picture"


def _gray(mask: Tensor) -> bytes:
    from pellucid.glass.segments import png

    return png(mask.to(torch.uint8) * 255)


@contextmanager
def _written(final: Path) -> Iterator[Path]:
    try:
        with new_folder(final) as scratch:
            yield scratch
    except OSError as error:
        raise unwritten(
            f"cannot write {show_name(final)}: {error.strerror or error} - make room, or take another --out",
            error,
        ) from error


__all__ = ["METHODS", "Options", "Segmented", "fitted_size", "refuse_folder", "segment"]
