"""WebDataset archives: which pictures and labels a ``.tar`` holds, and where in it their bytes lie.

Members of one archive that share a name up to the first dot of its last part are one sample: ``a/007.jpg``
and ``a/007.cls``. Only plain files count. A name is never a path here: nothing is written, no link is
followed. Compressed archives are refused, for their bytes cannot be read out of order.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from pellucid.data.images import EXTENSIONS, show_name
from pellucid.errors import DataError

LABEL = "cls"
PREFERRED = ("jpg", "jpeg", "png", "webp")  # where a sample has several pictures
_MAX_LABEL = 4096  # bytes

_PARTS = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class Sample(NamedTuple):
    """A picture in an archive: ``size`` bytes at ``offset``; ``label`` is the text of its ``.cls``."""

    name: str
    offset: int
    size: int
    label: str | None


class Archive(NamedTuple):
    """``passed_over``: how many members of what kind are no part of a sample with a picture."""

    samples: list[Sample]
    passed_over: Counter[str]


def read_archive(path: str) -> Archive:
    """The samples of a ``.tar``, in the order of their first members.

    Raises DataError when it cannot be read, is cut off, goes on after its end, or has a name twice.
    """
    try:
        with open(path, "rb") as file:
            return _read(file, show_name(path))
    except DataError:
        raise
    except (OSError, tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or show_name(str(error))[:120] or type(error).__name__
        raise DataError(f"cannot read {show_name(path)}: {reason} - get it again") from error


def _read(file: BinaryIO, shown: str) -> Archive:
    head = file.read(6)
    for signature, kind in _COMPRESSED.items():
        if head.startswith(signature):
            raise DataError(f"{shown} is compressed ({kind}) - decompress it: images are read in any order")
    file.seek(0)
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    passed_over: Counter[str] = Counter()
    for member in _members(file, shown):
        parts = _PARTS.fullmatch(member.name)
        if not member.isreg() or member.issparse():
            passed_over["folders" if member.isdir() else "links and special files"] += 1
        elif parts is None:
            passed_over["files without a key and an extension"] += 1
        elif samples.setdefault(parts[1], {}).setdefault(parts[2].lower(), member) is not member:
            raise DataError(
                f"{shown} has {show_name(member.name)} twice - give every image a name of its own"
            )
    found = []
    for members in samples.values():
        picture = _picture(members)
        if picture is None:
            passed_over["samples without an image"] += 1
        else:
            found.append(
                Sample(picture.name, picture.offset_data, picture.size, _label(file, members, shown))
            )
    return Archive(found, passed_over)


def _members(file: BinaryIO, shown: str) -> Iterator[tarfile.TarInfo]:
    """Every member, whole. tarfile stops without a word at damage, at a cut, and at a second archive."""
    length = file.seek(0, os.SEEK_END)
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as archive:
        while (member := archive.next()) is not None:
            if member.size < 0 or archive.offset <= member.offset:
                raise DataError(f"{shown} has a member of negative size - get it again")
            if member.isreg() and member.offset_data + member.size > length:
                raise DataError(f"{shown} is cut off inside of {show_name(member.name)} - get it again")
            yield member
            archive.members.clear()  # type: ignore[attr-defined]  # else it keeps them all
        end = archive.offset
    file.seek(end)
    if not file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE):
        raise DataError(f"{shown} is damaged or cut off at byte {end:,} - get it again")
    while rest := file.read(1 << 20):
        if any(rest):
            raise DataError(f"{shown} goes on after its end - unpack it and make one archive of it")


def _picture(members: dict[str, tarfile.TarInfo]) -> tarfile.TarInfo | None:
    """The preferred picture of a sample; others may be masks, depths, ..."""
    extensions = [ext for ext in members if f".{ext.rpartition('.')[2]}" in EXTENSIONS]
    if not extensions:
        return None
    rank = {ext: k for k, ext in enumerate(PREFERRED)}
    return members[min(extensions, key=lambda ext: (rank.get(ext, len(rank)), "." in ext, ext))]


def _label(file: BinaryIO, members: dict[str, tarfile.TarInfo], shown: str) -> str | None:
    member = members.get(LABEL)
    if member is None:
        return None
    file.seek(member.offset_data)
    text = file.read(min(member.size, _MAX_LABEL)).decode("utf-8", "surrogateescape").strip()
    if not text or member.size > _MAX_LABEL:
        raise DataError(f"{shown}: {show_name(member.name)} is no label - write a number or a name into it")
    return text
