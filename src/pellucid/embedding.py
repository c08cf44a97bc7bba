"""Features of a data set put to use: written to a file for other programs, or searched for like pictures.

Memory holds one batch of features, whatever the number of images.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pellucid.data import ImageData, ImageRejected, ImageSet, eval_loader, read_image, show_name
from pellucid.errors import ConfigError, DataError, unwritten
from pellucid.glass.feed import eval_view
from pellucid.measure.features import Features, Tokens, feature_batches, features, patch_grid, prefix_length
from pellucid.training.checkpoint import new_file

Progress = Callable[[int], None] | None

SPLITS = ("train", "test")


@dataclass(frozen=True)
class Embedded:
    """What was written.

    Attributes:
        path: the file.
        images: how many are in it.
        shape: of one image's features: ``(d,)`` or ``(tokens, d)``.
        left_out: images that cannot be read.
    """

    path: Path
    images: int
    shape: tuple[int, ...]
    left_out: int


def embed(
    model: Any,
    images: ImageData,
    path: str | os.PathLike[str],
    tokens: Tokens = "pooled",
    *,
    overwrite: bool = False,
    progress: Progress = None,
) -> Embedded:
    """Write the features of a data set, its two parts one after the other, whole or not at all.

    ``.npz`` and ``.safetensors`` hold arrays: ``features`` float32, ``(images, d)`` or ``(images, tokens,
    d)``, and ``label`` ``(images,)``, -1 where not known; of several tokens ``row`` and ``column`` in the
    grid of patches, ``(tokens,)``, -1 for class token and registers. The first has ``class_name``, ``path``
    and ``split`` besides, as text; the second ``split`` as 0 (train) or 1 (test), and ``class_names``,
    ``paths`` and ``splits`` in its metadata as JSON. A ``.parquet`` has one row for each image, or for each
    token, with the columns ``features, label, class_name, path, split[, row, column]``.

    Args:
        model: from ``pellucid.load`` or ``create_model``.
        images: labelled or not.
        path: of the file; its ending tells the format.
        tokens: see :func:`~pellucid.measure.features.feature_batches`.
        overwrite: replace a file that stands there.
        progress: is told the number of images of each batch.

    Raises:
        ConfigError: another ending, a file that stands there or cannot be written, a missing package, tokens
            that the model does not have.
        DataError: no image can be read.
    """
    path = Path(path)
    writer = _writer(path)
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} stands there already - give --overwrite, or name another file")
    items = _Items.of(images)
    stream = items.features(model, tokens, progress)
    first = next(stream)
    table = _Table(items, tuple(first.values.shape[1:]), tokens, *_places(model, tokens, first))
    with _written(path) as scratch:
        writer(scratch, table, _chained(first, stream))
    return Embedded(path, len(items), table.shape, items.left_out)


@dataclass(frozen=True)
class Hit:
    """A picture that was found.

    Attributes:
        path: its name in the data set; safe to print.
        class_name: None where not known.
        cosine: of the angle between its feature and the query's.
        image: uint8 ``(c, h, w)``.
    """

    path: str
    class_name: str | None
    cosine: float
    image: Tensor


@dataclass(frozen=True)
class Query:
    """A picture and those nearest to it, the nearest first."""

    path: str
    image: Tensor
    hits: list[Hit] = field(default_factory=list)


def neighbours(
    model: Any,
    images: ImageData,
    queries: Sequence[str | os.PathLike[str]],
    *,
    k: int = 8,
    tokens: Tokens = "pooled",
    progress: Progress = None,
) -> list[Query]:
    """The pictures of a data set whose features point where those of each query point, by cosine.

    A query that is itself a file of the data set is not found as its own neighbour.

    Args:
        model: from ``pellucid.load`` or ``create_model``.
        images: to search, both parts; labelled or not.
        queries: picture files.
        k: how many to find for each; all of them where there are fewer.
        tokens: ``"pooled"``, ``"cls"`` or ``"avg"``.
        progress: is told the number of images of each batch.

    Raises:
        ConfigError: no k, or tokens that are several for an image or that the model does not have.
        DataError: a query that cannot be read, or no image to search.
    """
    if k < 1:
        raise ConfigError(f"k is {k}; it must be larger than 0")
    if tokens in ("patch", "all"):
        raise ConfigError(f"{tokens} are several features of an image - take pooled, cls or avg")
    asked = [Query(show_name(path), _picture(path)) for path in queries]
    view = eval_view(model)
    seen = [view.batch([query.image], [i]) for i, query in enumerate(asked)]
    directions = F.normalize(features(model, seen, tokens).values, dim=-1)
    items = _Items.of(images)
    own = [_real(path) for path in queries]
    cosines = torch.empty(len(asked), 0)
    found = torch.empty(len(asked), 0, dtype=torch.int64)
    for batch in items.features(model, tokens, progress):
        near = directions @ F.normalize(batch.values, dim=-1).mT
        for column, i in enumerate(batch.index.tolist()):
            if items.real_path(i) in own:
                near[own.index(items.real_path(i)), column] = -torch.inf
        cosines, found = (
            torch.cat([cosines, near], 1),
            torch.cat([found, batch.index.expand(len(asked), -1)], 1),
        )
        cosines, best = cosines.topk(min(k, cosines.shape[1]))
        found = found.gather(1, best)
    for query, near, which in zip(asked, cosines, found, strict=True):
        pairs = zip(which.tolist(), near.tolist(), strict=True)
        query.hits.extend(items.hit(i, cosine) for i, cosine in pairs if cosine > -torch.inf)
    return asked


class _Items:
    """The readable images of a data set's two parts, numbered through.

    In training a picture of the same class stands in for one that cannot be read. Here its feature would go
    by another picture's name, so these are left out.
    """

    def __init__(self, images: ImageData, parts: Sequence[tuple[str, ImageSet]]) -> None:
        self.images, self.parts = images, parts
        self.paths = [path for _, part in parts for path in part.paths]
        self.kept = torch.ones(len(self.paths), dtype=torch.bool)
        for first, part in self._placed():
            self.kept[[first + i for i in part.bad]] = False
        self.labels = torch.cat([part.labels for _, part in parts])
        self.split = torch.cat([torch.full((len(part),), SPLITS.index(name)) for name, part in parts])
        if not bool(self.kept.any()):
            raise DataError(f"no image of {images.name} can be read - look at it with pellucid check")

    @classmethod
    def of(cls, images: ImageData) -> _Items:
        same = images.train is images.test
        return cls(
            images, [("test", images.test)] if same else [("train", images.train), ("test", images.test)]
        )

    def __len__(self) -> int:
        return int(self.kept.sum())

    @property
    def left_out(self) -> int:
        return len(self.kept) - len(self)

    def features(self, model: Any, tokens: Tokens, progress: Progress) -> Iterator[Features]:
        """Of all readable images, with their number in place of the index."""
        view = eval_view(model)
        for first, part in self._placed():
            for batch in feature_batches(model, eval_loader(part, view), tokens, progress=progress):
                number = batch.index + first
                kept = self.kept[number]
                if bool(kept.any()):
                    yield Features(batch.values[kept], batch.labels[kept], number[kept])
            self._refuse_found_bad(part, first)

    def _placed(self) -> Iterator[tuple[int, ImageSet]]:
        """Each part with the number of its first image."""
        first = 0
        for _, part in self.parts:
            yield first, part
            first += len(part)

    def _refuse_found_bad(self, part: ImageSet, first: int) -> None:
        """Of very many files only the headers are looked at before; what they hide shows now."""
        for i in sorted(part.bad):
            if bool(self.kept[first + i]):
                raise DataError(
                    f"{part.name(i)} cannot be read, though its header could - remove or replace it; nothing "
                    f"was written"
                )

    def class_name(self, i: int) -> str | None:
        label = int(self.labels[i])
        return show_name(self.images.class_names[label]) if label >= 0 else None

    def real_path(self, i: int) -> str:
        return _real(self.paths[i])

    def hit(self, i: int, cosine: float) -> Hit:
        part, place = next((part, i - first) for first, part in self._placed() if i < first + len(part))
        return Hit(part.name(place), self.class_name(i), cosine, part.image(place))


@dataclass(frozen=True)
class _Table:
    """What a file says besides features: of every image, and of every token."""

    items: _Items
    shape: tuple[int, ...]
    tokens: str
    row: Tensor | None
    column: Tensor | None

    def numbers(self) -> dict[str, np.ndarray]:
        kept = self.items.kept
        found = {"label": self.items.labels[kept], "split": self.items.split[kept]}
        if self.row is not None and self.column is not None:
            found |= {"row": self.row, "column": self.column}
        return {name: value.numpy().astype("<i8") for name, value in found.items()}

    def paths(self) -> list[str]:
        return [show_name(self.items.paths[i]) for i in self.items.kept.nonzero().flatten().tolist()]

    def class_names(self) -> list[str | None]:
        return [self.items.class_name(i) for i in self.items.kept.nonzero().flatten().tolist()]


Writer = Callable[[Path, _Table, Iterator[Features]], None]


def _writer(path: Path) -> Writer:
    writers = {".parquet": _write_parquet, ".npz": _write_npz, ".safetensors": _write_safetensors}
    if path.suffix not in writers:
        raise ConfigError(f"cannot tell the format of {path} - name a file that ends in {', '.join(writers)}")
    if path.suffix == ".parquet":
        _pyarrow()
    return writers[path.suffix]


def _write_npz(file: Path, table: _Table, stream: Iterator[Features]) -> None:
    form = np.lib.format
    texts = {
        "class_name": np.array([name or "" for name in table.class_names()]),
        "path": np.array(table.paths()),
        "split": np.array(SPLITS)[table.numbers()["split"]],
    }
    arrays = {**table.numbers(), **texts}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open("features.npy", "w", force_zip64=True) as entry:
            shape = (len(table.items), *table.shape)
            form.write_array_header_2_0(entry, {"descr": "<f4", "fortran_order": False, "shape": shape})
            for batch in stream:
                entry.write(_bytes(batch.values))
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                form.write_array(entry, array, allow_pickle=False)


def _write_safetensors(file: Path, table: _Table, stream: Iterator[Features]) -> None:
    """The format's header by hand, as its own writer would want all features in memory."""
    numbers = table.numbers()
    shapes = {"features": ("F32", (len(table.items), *table.shape))}
    shapes |= {name: ("I64", array.shape) for name, array in numbers.items()}
    header: dict[str, Any] = {
        "__metadata__": {
            "tokens": table.tokens,
            "class_names": json.dumps([show_name(name) for name in table.items.images.class_names]),
            "splits": json.dumps(SPLITS),
            "paths": json.dumps(table.paths()),
        }
    }
    end = 0
    for name, (kind, shape) in shapes.items():
        start, end = end, end + int(np.prod(shape)) * (4 if kind == "F32" else 8)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for batch in stream:
            out.write(_bytes(batch.values))
        for array in numbers.values():
            out.write(array.tobytes())


def _write_parquet(file: Path, table: _Table, stream: Iterator[Features]) -> None:
    arrow, parquet = _pyarrow()
    *tokens, width = table.shape
    columns = {
        "features": arrow.list_(arrow.float32(), width),
        "label": arrow.int64(),
        "class_name": arrow.string(),
        "path": arrow.string(),
        "split": arrow.string(),
        **({"row": arrow.int32(), "column": arrow.int32()} if tokens else {}),
    }
    schema = arrow.schema(columns, metadata={"tokens": table.tokens})
    items, each = table.items, tokens[0] if tokens else 1
    with parquet.ParquetWriter(file, schema) as writer:
        for batch in stream:
            numbers = batch.index.tolist()
            flat = arrow.array(batch.values.flatten().numpy())
            of_image = {
                "label": items.labels[batch.index].tolist(),
                "class_name": [items.class_name(i) for i in numbers],
                "path": [show_name(items.paths[i]) for i in numbers],
                "split": [SPLITS[i] for i in items.split[batch.index].tolist()],
            }
            rows = {"features": arrow.FixedSizeListArray.from_arrays(flat, width)}
            rows |= {name: [v for v in values for _ in range(each)] for name, values in of_image.items()}
            if table.row is not None and table.column is not None:
                rows |= {"row": table.row.tolist() * len(batch), "column": table.column.tolist() * len(batch)}
            writer.write_table(arrow.table(rows, schema))


def _pyarrow() -> tuple[Any, Any]:
    try:
        return import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError as error:
        raise ConfigError(
            "parquet needs the package pyarrow - pip install 'pellucid[parquet]', or name a .npz"
        ) from error


def _places(model: Any, tokens: Tokens, first: Features) -> tuple[Tensor | None, Tensor | None]:
    """Row and column of each token, where there are several."""
    if first.values.dim() == 2:
        return None, None
    before = prefix_length(model) if tokens == "all" else 0
    rows, columns = patch_grid(model, eval_view(model).img_size, first.values.shape[1] - before)
    nowhere = torch.full((before,), -1)
    row = torch.arange(rows).repeat_interleave(columns)
    return torch.cat([nowhere, row]), torch.cat([nowhere, torch.arange(columns).repeat(rows)])


def _chained(first: Features, rest: Iterator[Features]) -> Iterator[Features]:
    yield first
    yield from rest


@contextmanager
def _written(path: Path) -> Iterator[Path]:
    try:
        with new_file(path) as scratch:
            yield scratch
    except OSError as error:
        raise unwritten(
            f"cannot write {path}: {error.strerror or error} - make room, or name another file", error
        ) from error


def _bytes(values: Tensor) -> bytes:
    return values.numpy().astype("<f4", copy=False).tobytes()


def _picture(path: str | os.PathLike[str]) -> Tensor:
    try:
        return read_image(path)
    except ImageRejected as error:
        raise DataError(f"{show_name(path)} cannot be read: {error.reason} - name another picture") from error


def _real(path: str | os.PathLike[str]) -> str:
    return os.path.realpath(os.fspath(path))
