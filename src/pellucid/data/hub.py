"""Pictures of the Hugging Face hub: those of a table that ``tables`` opens.

Two more options, ``image`` and ``label``, name the columns where their types do not tell.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, final

import numpy as np
import numpy.typing as npt
import torch

from pellucid.data.dataset import EncodedImages
from pellucid.data.found import Asked, Found, settle
from pellucid.data.images import ImageRejected, show_name
from pellucid.data.tables import label_column, open_tables, type_of
from pellucid.errors import DataError, suggest

COLUMNS = ("image", "label")


@final
class HubImages(EncodedImages):
    """The pictures of a table: ``rows`` (n,) of its column ``column``."""

    def __init__(
        self,
        table: Any,
        column: str,
        labels: torch.Tensor,
        *,
        title: str,
        rows: npt.NDArray[np.int64],
        max_pixels: int,
    ) -> None:
        super().__init__(labels, (), max_pixels)
        self._table, self._column, self._title, self._rows = table, column, title, rows

    def source(self, i: int) -> str | bytes:
        cell = self._table[int(self._rows[i])][self._column]
        if not cell or (cell["bytes"] is None and cell["path"] is None):
            raise ImageRejected("no image in this row")
        return cell["path"] if cell["bytes"] is None else cell["bytes"]

    def byte_sizes(self) -> npt.NDArray[np.int64]:
        import pyarrow.compute as arrow

        column = self._table.with_format("arrow")[:][self._column]
        sizes = arrow.fill_null(arrow.binary_length(arrow.struct_field(column, "bytes")), 0)
        return sizes.to_numpy().astype(np.int64)[self._rows]

    def name(self, i: int) -> str:
        return f"{self._title}[{self._rows[i]}]"

    def _taken(self, indices: npt.NDArray[np.int64]) -> HubImages:
        return HubImages(
            self._table,
            self._column,
            self.labels[indices],
            title=self._title,
            rows=self._rows[indices],
            max_pixels=self.max_pixels,
        )


def find_hub(spec: str, asked: Asked) -> Found:
    """The pictures of ``hf:OWNER/NAME``. Raises DataError, or ConfigError for options that cannot be."""
    opened = open_tables(spec, COLUMNS, extra="hub")
    where, first = opened.where, opened.train
    image = _image_column(first, opened.options.get("image"), where)
    label = label_column(first, opened.options.get("label"), where)
    opened.refuse_missing([column for column in (image, label) if column is not None])
    class_names, labels = _labels(opened.tables, label)
    sets = [
        _pictures(table, image, labels[name], f"{where}/{name}", asked)
        for name, table in opened.tables.items()
    ]
    found = Found(opened.name, where, sets[0], sets[0], class_names, _fingerprint(class_names, sets))
    settle(sets[0], sets[1] if len(sets) > 1 else None, class_names, asked, found)
    return found


def _image_column(table: Any, wanted: str | None, where: str) -> str:
    features = table.features
    images = [name for name, feature in features.items() if type_of(feature) == "Image"]
    if wanted is not None:
        if wanted not in images:
            raise DataError(f"{where} has no column of images '{show_name(wanted)}'{suggest(wanted, images)}")
        return wanted
    if len(images) != 1:
        has = f"the columns of images {', '.join(images)}" if images else "no column of images"
        remedy = f"choose one: hf:{where}?image={images[0]}" if images else f"it has {', '.join(features)}"
        raise DataError(f"{where} has {has} - {remedy}")
    return images[0]


def _labels(tables: dict[str, Any], column: str | None) -> tuple[list[str], dict[str, npt.NDArray[np.int64]]]:
    """Class names, and the class of each row of each split, -1 where it has none."""
    if column is None:
        return [], {name: np.full(len(table), -1, dtype=np.int64) for name, table in tables.items()}
    values = {
        name: table.select_columns(column).with_format("arrow")[:][column].to_pylist()
        for name, table in tables.items()
    }
    feature = next(iter(tables.values())).features[column]
    if type_of(feature) == "ClassLabel":
        names = list(feature.names)
        place: Callable[[Any], int] = lambda value: value
    else:
        known = sorted({value for part in values.values() for value in part if value is not None})
        names = [str(value) for value in known]
        rank = {value: k for k, value in enumerate(known)}
        place = rank.__getitem__
    labels = {
        name: np.array([-1 if value is None else place(value) for value in part], dtype=np.int64)
        for name, part in values.items()
    }
    return names, labels


def _pictures(table: Any, column: str, labels: npt.NDArray[np.int64], title: str, asked: Asked) -> HubImages:
    from datasets import Image

    encoded = table.select_columns(column).cast_column(column, Image(decode=False))
    return HubImages(
        encoded,
        column,
        torch.from_numpy(labels),
        title=title,
        rows=np.arange(len(table), dtype=np.int64),
        max_pixels=asked.max_pixels,
    )


def _fingerprint(class_names: list[str], sets: list[HubImages]) -> str:
    digest = hashlib.sha256("\0".join(class_names).encode("utf-8", "surrogatepass"))
    for images in sets:
        digest.update(b"%d\0" % len(images))
        digest.update(images.labels.numpy().tobytes())
        digest.update(images.byte_sizes().tobytes())
    return digest.hexdigest()
