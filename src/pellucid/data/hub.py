"""Data sets of the Hugging Face hub, through ``datasets``: tables on disk, mapped and not loaded.

``hf:OWNER/NAME``, or ``hf:FOLDER`` for one on this machine, may be followed by options, as in
``hf:OWNER/NAME?image=photo&label=fine_label&test=validation``:

- ``config``: which of the data set's configurations, ``revision``: which of its versions.
- ``split``: what to train on (``train``), ``test``: what to test on (the first of ``val``, ``valid``,
  ``validation`` and ``test`` that is there). With ``split`` alone, a part of it is held back.
- ``image``, ``label``: the columns, where their types do not tell.

What is not in the cache of ``datasets`` is fetched, unless ``HF_HUB_OFFLINE=1``.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from typing import Any, final
from urllib.parse import parse_qsl

import numpy as np
import numpy.typing as npt
import torch

from pellucid.data.dataset import EncodedImages
from pellucid.data.folders import TEST_NAMES
from pellucid.data.found import Asked, Found, settle
from pellucid.data.images import ImageRejected, show_name
from pellucid.errors import ConfigError, DataError, suggest

PREFIX = "hf:"
OPTIONS = ("config", "revision", "split", "test", "image", "label")


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
    path, options = _parsed(spec)
    where = show_name(path)
    tables = _tables(path, options, where)
    train, test = _splits(tables, options, where)
    named = {name: tables[name] for name in (train, test) if name is not None}
    image = _image_column(named[train], options.get("image"), where)
    label = _label_column(named[train], options.get("label"), where)
    for name, table in named.items():
        for column in (image, label):
            if column is not None and column not in table.column_names:
                raise DataError(
                    f"split {name} has no column {column}, as {train} has - {where} - name another"
                )
    class_names, labels = _labels(named, label)
    sets = [_pictures(table, image, labels[name], f"{where}/{name}", asked) for name, table in named.items()]
    title = f"{os.path.basename(os.path.normpath(path))}"
    found = Found(show_name(title), where, sets[0], sets[0], class_names, _fingerprint(class_names, sets))
    settle(sets[0], sets[1] if test is not None else None, class_names, asked, found)
    return found


def _parsed(spec: str) -> tuple[str, dict[str, str]]:
    path, _, query = spec.removeprefix(PREFIX).partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    for key, value in options.items():
        if key not in OPTIONS:
            raise ConfigError(f"{show_name(spec)} has the option '{show_name(key)}'{suggest(key, OPTIONS)}")
        if not value:
            raise ConfigError(f"{show_name(spec)} has nothing behind '{key}=' - give a name")
    if not path or (query and not options):
        raise ConfigError(
            f"{show_name(spec)} names no data set - write hf:OWNER/NAME, or hf:OWNER/NAME?split=train"
        )
    return path, options


def _tables(path: str, options: dict[str, str], where: str) -> dict[str, Any]:
    """Split name -> table."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{PREFIX}{where} needs the package 'datasets' - pip install 'pellucid[hub]'"
        ) from error
    saved = any(os.path.isfile(os.path.join(path, name)) for name in ("dataset_dict.json", "state.json"))
    try:
        if saved:
            found = datasets.load_from_disk(path)
        else:
            found = datasets.load_dataset(path, options.get("config"), revision=options.get("revision"))
    except Exception as error:  # of datasets, huggingface_hub, pyarrow, httpx, fsspec: no common class
        raise DataError(_why(path, where, error)) from error
    return dict(found) if isinstance(found, dict) else {str(found.split or "train"): found}


def _why(path: str, where: str, error: Exception) -> str:
    kinds = {kind.__name__ for kind in type(error).__mro__}
    detail = show_name((str(error).splitlines() or [type(error).__name__])[0])[:200]
    if os.path.isdir(path):
        return f"cannot read {where} - name a folder of Parquet files, or of save_to_disk\n  ({detail})"
    if "Config" in detail and "config" in detail:
        return f"{where} has several configurations - choose one: hf:{where}?config=NAME\n  ({detail})"
    if "DatasetNotFoundError" in kinds:
        return (
            f"no data set of the hub is called {where}, or it is private - check it, or log in\n  ({detail})"
        )
    return (
        f"cannot get {where} from the hub - check the connection; once fetched it is read without one\n"
        f"  ({type(error).__name__}: {detail})"
    )


def _splits(tables: dict[str, Any], options: dict[str, str], where: str) -> tuple[str, str | None]:
    """The names of the split to train on and of that to test on, if any."""
    for option in ("split", "test"):
        if (name := options.get(option)) is not None and name not in tables:
            raise DataError(f"{where} has no split '{show_name(name)}'{suggest(name, tables)}")
    train = options.get("split", "train" if "train" in tables else next(iter(tables)))
    test = options.get("test")
    if test is None and "split" not in options:
        test = next((name for name in TEST_NAMES if name in tables and name != train), None)
    if test == train:
        raise ConfigError(f"{where}: split and test are both '{train}' - leave out test to hold back a part")
    return train, test


def _image_column(table: Any, wanted: str | None, where: str) -> str:
    features = table.features
    images = [name for name, feature in features.items() if _type(feature) == "Image"]
    if wanted is not None:
        if wanted not in images:
            raise DataError(f"{where} has no column of images '{show_name(wanted)}'{suggest(wanted, images)}")
        return wanted
    if len(images) != 1:
        has = f"the columns of images {', '.join(images)}" if images else "no column of images"
        remedy = f"choose one: hf:{where}?image={images[0]}" if images else f"it has {', '.join(features)}"
        raise DataError(f"{where} has {has} - {remedy}")
    return images[0]


def _label_column(table: Any, wanted: str | None, where: str) -> str | None:
    """The column of classes; None where the table has none, or several and nobody has chosen."""
    features = table.features
    if wanted is not None:
        if wanted not in features:
            raise DataError(f"{where} has no column '{show_name(wanted)}'{suggest(wanted, features)}")
        if not (_type(features[wanted]) == "ClassLabel" or _is_plain(features[wanted])):
            raise DataError(
                f"{where}: column {wanted} is {_type(features[wanted])} - name one of classes, "
                "whole numbers or text"
            )
        return wanted
    classes = [name for name, feature in features.items() if _type(feature) == "ClassLabel"]
    if len(classes) > 1:
        raise DataError(
            f"{where} has several columns of classes: {', '.join(classes)}"
            f" - choose one: hf:{where}?label={classes[0]}"
        )
    return classes[0] if classes else None


def _type(feature: Any) -> str:
    return type(feature).__name__


def _is_plain(feature: Any) -> bool:
    dtype = str(getattr(feature, "dtype", ""))
    return _type(feature) == "Value" and (
        dtype.startswith(("int", "uint")) or dtype in ("string", "large_string")
    )


def _labels(tables: dict[str, Any], column: str | None) -> tuple[list[str], dict[str, npt.NDArray[np.int64]]]:
    """Class names, and the class of each row of each split, -1 where it has none."""
    if column is None:
        return [], {name: np.full(len(table), -1, dtype=np.int64) for name, table in tables.items()}
    values = {
        name: table.select_columns(column).with_format("arrow")[:][column].to_pylist()
        for name, table in tables.items()
    }
    feature = next(iter(tables.values())).features[column]
    if _type(feature) == "ClassLabel":
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
