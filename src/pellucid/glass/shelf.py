"""Runs in a folder, finished and in progress: what they are and how they go. Nothing is ever written."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from pellucid.data import show_name
from pellucid.errors import PellucidError
from pellucid.regular import open_regular, read_json, read_regular
from pellucid.training import read_config
from pellucid.training.step_lengths import OF_A_LAYER

MAX_RUNS = 200
MAX_POINTS = 1500
"""Of one curve; a longer one is thinned, its last point kept."""

MAX_LOG = 64 * 2**20
"""Bytes of a log, from its end, that are read."""

MAX_CONFIG = 2**20
"""Bytes of a run's options."""

_PID = re.compile(r"pid (\d+) on (.+)")


class Shelf:
    """The runs in a folder: itself, the folders in it, and the runs that were trained beside them.

    A run is asked for by a name that is looked up in a fresh listing and never becomes part of a path. A link
    that leads out of the folder is passed over.

    Args:
        root: the folder.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)

    def names(self) -> list[str]:
        return list(self._found())

    def path(self, name: str) -> Path | None:
        """Where a run is; None of one that is not there."""
        return self._found().get(name)

    def list(self) -> dict[str, Any]:
        """Every run with its options and where it stands, the latest first."""
        rows = [_row(name, path, self.root) for name, path in self._found().items()]
        return {"runs": rows}

    def curves(self, name: str) -> dict[str, Any] | None:
        """What a run has logged so far, columns of training and test lines; None of one that is not there."""
        path = self.path(name)
        if path is None:
            return None
        lines = _lines(path / "metrics.jsonl")
        return {
            **_row(name, path, self.root),
            "train": _columns(lines, "train"),
            "test": _columns(lines, "test"),
        }

    def _found(self) -> dict[str, Path]:
        inside = self.root.resolve()
        runs = []
        for pattern in (".", "*", "*/beside-*"):
            for path in sorted(self.root.glob(pattern)) if pattern != "." else [self.root]:
                config = path / "config.yaml"
                if config.is_file() and config.resolve().is_relative_to(inside):
                    runs.append(path)
        runs = sorted(dict.fromkeys(runs), key=_changed, reverse=True)[:MAX_RUNS]
        return {_name(path.relative_to(self.root)): path for path in runs}


def _name(relative: Path) -> str:
    return hashlib.sha256(os.fsencode(relative)).hexdigest()[:12]


def _changed(path: Path) -> float:
    times = [0.0]
    for file in ("metrics.jsonl", "config.yaml"):
        try:
            times.append((path / file).stat().st_mtime)
        except OSError:
            continue
    return max(times)


def _row(name: str, path: Path, root: Path) -> dict[str, Any]:
    config = _config(path / "config.yaml")
    lines = _lines(path / "metrics.jsonl")
    result = _result(path)
    tested: dict[str, Any] = next((line for line in reversed(lines) if line.get("split") == "test"), {})
    relative = path.relative_to(root)
    return {
        "id": name,
        "name": show_name(root.resolve().name if relative == Path(".") else relative),
        "state": _state(path, result),
        "model": str(config.get("model", "")),
        "objective": str(config.get("objective", "")),
        "data": show_name(str(config.get("data", ""))),
        "epochs": _number(config.get("epochs")),
        "epoch": _number(lines[-1].get("epoch")) if lines else None,
        "step": _number(lines[-1].get("step")) if lines else None,
        "accuracy": _number(result.get("accuracy", tested.get("accuracy"))),
        "loss": _number(tested.get("loss")),
        "seconds": _number(result.get("seconds")),
        "verdict": tested.get("verdict") if isinstance(tested.get("verdict"), str) else None,
        "config": {str(k): _shown(v) for k, v in config.items() if v not in (None, "", {})},
    }


def _config(path: Path) -> dict[str, Any]:
    try:
        return read_config(path) if path.stat().st_size <= MAX_CONFIG else {}
    except (OSError, PellucidError, RecursionError):
        return {}


def _state(path: Path, result: dict[str, Any]) -> str:
    """``finished``, ``running``, or ``stopped``; a lock that a killed run left behind holds nothing."""
    if _alive(path / "run.lock"):
        return "running"
    return "finished" if result else "stopped"


def _alive(lock: Path) -> bool:
    try:
        told = _PID.fullmatch(read_regular(lock, 1000).decode(errors="replace").strip())
        if told is None or told[2] != os.uname().nodename or int(told[1]) == 0:
            return False
        os.kill(int(told[1]), 0)
    except PermissionError:
        return True
    except (OSError, OverflowError, ValueError):
        return False
    return int(told[1]) != os.getpid()


def _result(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path / "result.json")
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a log that may be growing; what is no JSON object, as half a line, is passed over."""
    try:
        with open_regular(path) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - MAX_LOG))
            data = file.read(MAX_LOG)
    except OSError:
        return []
    lines = []
    for line in data.splitlines():
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict):
            lines.append(found)
    return lines


def _columns(lines: list[dict[str, Any]], split: str) -> dict[str, np.ndarray]:
    """Every number of these lines as a column over ``step``, NaN where a line has none.

    Of ISTA's steps the longest only: a chart for each layer would bury the others.
    """
    kept = [line for line in lines if line.get("split") == split and _number(line.get("step")) is not None]
    if len(kept) > MAX_POINTS:
        kept = [kept[round(i)] for i in np.linspace(0, len(kept) - 1, MAX_POINTS)]
    numbers = (key for line in kept for key, value in line.items() if _number(value) is not None)
    keys = dict.fromkeys(key for key in numbers if not key.startswith(OF_A_LAYER))
    return {
        key: np.array([np.nan if (v := _number(line.get(key))) is None else v for line in kept], np.float32)
        for key in keys
    }


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def _shown(value: Any, depth: int = 2) -> str:
    """An option as text; of what is nested deeper, or longer, than any option is, the beginning."""
    if isinstance(value, dict | list) and depth:
        pairs = value.items() if isinstance(value, dict) else ((None, item) for item in value)
        said = [
            _shown(item, depth - 1) if key is None else f"{show_name(str(key))}={_shown(item, depth - 1)}"
            for key, item in itertools.islice(pairs, 20)
        ]
        return ", ".join(said + ["…"] * (len(value) > 20))
    if isinstance(value, dict | list):
        return "…"
    return show_name(str(value)[:200])


__all__ = ["Shelf"]
