"""Regular files, and nothing that waits or has no end: pipes, sockets, devices. Imports nothing of ours.

Whatever reads a file that somebody else may have made reads it through here, so that a pipe in the place of a
config never hangs a command, and a file of gigabytes in the place of one of kilobytes is never read.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from typing import Any, BinaryIO

MOST_JSON = 32 * 2**20
"""Bytes of a JSON file. The largest that is written here names 22,000 classes in one."""


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open for reading, or refuse with OSError: never waits on a pipe, never touches a device."""
    _refuse_special(os.stat(path).st_mode)
    # Between stat and open the name may come to mean a pipe: O_NONBLOCK cannot hang, fstat sees it.
    flags = getattr(os, "O_NONBLOCK", 0)
    file = open(path, "rb", opener=lambda name, mode: os.open(name, mode | flags))  # noqa: SIM115
    try:
        _refuse_special(os.fstat(file.fileno()).st_mode)
    except OSError:
        file.close()
        raise
    return file


def read_regular(path: str | os.PathLike[str], most: int | None = None) -> bytes:
    """All bytes of a regular file. Raises OSError for any other, and for one of more than ``most``."""
    with open_regular(path) as file:
        data = file.read(-1 if most is None else most + 1)
    if most is not None and len(data) > most:
        raise OSError(errno.EFBIG, f"it has more than {most / 2**20:.3g} MB")
    return data


def read_json(path: str | os.PathLike[str], most: int = MOST_JSON) -> Any:
    """What a JSON file holds.

    Raises:
        OSError: no regular file of at most ``most`` bytes.
        ValueError: no JSON in UTF-8, or nested deeper than anything that is meant.
    """
    data = read_regular(path, most)
    try:
        return json.loads(data.decode("utf-8-sig"))  # told bytes, json guesses among five encodings
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _refuse_special(mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = _FILE_KINDS.get(stat.S_IFMT(mode), "special file")
        raise OSError(errno.EINVAL, f"not a regular file ({kind})")


_FILE_KINDS = {
    stat.S_IFDIR: "folder",
    stat.S_IFIFO: "named pipe",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}
