"""Tables of the Hugging Face hub, through ``datasets``: on disk, mapped and not loaded.

``hf:OWNER/NAME``, or ``hf:FOLDER`` for one on this machine, may be followed by options, as in
``hf:OWNER/NAME?label=fine_label&test=validation``:

- ``config``: which of the data set's configurations, ``revision``: which of its versions.
- ``split``: what to train on (``train``), ``test``: what to test on (the first of ``val``, ``valid``,
  ``validation`` and ``test`` that is there). With ``split`` alone, a part of it is held back.
- which columns: see ``hub`` and ``sources``.

What is not in the cache of ``datasets`` is fetched, unless ``HF_HUB_OFFLINE=1``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from pellucid.data.images import show_name
from pellucid.data.trees import TEST_NAMES
from pellucid.errors import ConfigError, DataError, suggest

PREFIX = "hf:"
OPTIONS = ("config", "revision", "split", "test")


@dataclass(frozen=True)
class Tables:
    """One table to train on, or one to train and one to test on, in this order, by their splits' names.

    ``name``, ``where``: what to call the data set, safe to print. ``options``: what was asked for.
    """

    name: str
    where: str
    tables: dict[str, Any]
    options: dict[str, str]

    @property
    def train(self) -> Any:
        """The table to train on."""
        return next(iter(self.tables.values()))

    def refuse_missing(self, columns: Iterable[str]) -> None:
        """Raises DataError when a table lacks one of these columns."""
        train = next(iter(self.tables))
        for name, table in self.tables.items():
            for column in columns:
                if column not in table.column_names:
                    raise DataError(
                        f"split {name} has no column {column}, as {train} has - {self.where} - name another"
                    )


def open_tables(spec: str, columns: tuple[str, ...], extra: str) -> Tables:
    """What ``hf:...`` names, where ``columns`` are further options.

    Raises DataError, naming the ``extra`` to install where ``datasets`` is missing, or ConfigError for
    options that cannot be.
    """
    path, options = _parsed(spec, OPTIONS + columns)
    where = show_name(path)
    tables = _tables(path, options, where, extra)
    train, test = _splits(tables, options, where)
    named = {name: tables[name] for name in (train, test) if name is not None}
    return Tables(show_name(os.path.basename(os.path.normpath(path))), where, named, options)


def _parsed(spec: str, known: tuple[str, ...]) -> tuple[str, dict[str, str]]:
    path, _, query = spec.removeprefix(PREFIX).partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    for key, value in options.items():
        if key not in known:
            raise ConfigError(f"{show_name(spec)} has the option '{show_name(key)}'{suggest(key, known)}")
        if not value:
            raise ConfigError(f"{show_name(spec)} has nothing behind '{key}=' - give a name")
    if not path or (query and not options):
        raise ConfigError(
            f"{show_name(spec)} names no data set - write hf:OWNER/NAME, or hf:OWNER/NAME?split=train"
        )
    return path, options


def _tables(path: str, options: dict[str, str], where: str, extra: str) -> dict[str, Any]:
    """Split name -> table."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{PREFIX}{where} needs the package 'datasets' - pip install 'pellucid[{extra}]'"
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


def label_column(table: Any, wanted: str | None, where: str) -> str | None:
    """The column of classes; None where the table has none, or several and nobody has chosen."""
    features = table.features
    if wanted is not None:
        if wanted not in features:
            raise DataError(f"{where} has no column '{show_name(wanted)}'{suggest(wanted, features)}")
        if not (type_of(features[wanted]) == "ClassLabel" or is_plain(features[wanted])):
            raise DataError(
                f"{where}: column {wanted} is {type_of(features[wanted])} - name one of classes, "
                "whole numbers or text"
            )
        return wanted
    classes = [name for name, feature in features.items() if type_of(feature) == "ClassLabel"]
    if len(classes) > 1:
        raise DataError(
            f"{where} has several columns of classes: {', '.join(classes)}"
            f" - choose one: hf:{where}?label={classes[0]}"
        )
    return classes[0] if classes else None


def type_of(feature: Any) -> str:
    """The name of a column's type: "Image", "ClassLabel", "Value", ..."""
    return type(feature).__name__


def is_plain(feature: Any) -> bool:
    """Whether a column holds whole numbers or text."""
    dtype = str(getattr(feature, "dtype", ""))
    return type_of(feature) == "Value" and (
        dtype.startswith(("int", "uint")) or dtype in ("string", "large_string")
    )
