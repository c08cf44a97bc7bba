"""What a run learns from, item by item, so that a run that goes on can say what has changed."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path

from pellucid.training.checkpoint import write_file

FILE = "data.jsonl.gz"
MOST = 2_000_000
"""Items; of more there is no list, and a change is noticed without saying which."""


def write_inventory(out: Path, items: Iterable[tuple[str, str]]) -> None:
    """One line for each item, its name and a stamp of what is in it."""
    lines = [json.dumps(item) for item in islice(items, MOST + 1)]
    if len(lines) <= MOST:
        write_file(out / FILE, gzip.compress("\n".join(lines).encode(), 6, mtime=0))


def changes(out: Path, items: Iterable[tuple[str, str]]) -> str:
    """What differs from the list in ``out``, in words with the first names of each kind; may be empty."""
    try:
        text = gzip.decompress((out / FILE).read_bytes()).decode()
        before = dict(json.loads(line) for line in text.splitlines())
    except (OSError, ValueError, EOFError):
        return ""
    now = dict(items)
    kinds: Mapping[str, list[str]] = {
        "added": [name for name in now if name not in before],
        "removed": [name for name in before if name not in now],
        "edited": [name for name in now if name in before and now[name] != before[name]],
    }
    told = [f"{len(names)} {kind} ({_first(names)})" for kind, names in kinds.items() if names]
    return ", ".join(told)


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
