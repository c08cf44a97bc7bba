"""Shards: many pictures in few ``.tar`` files, read at their offsets, in any order.

A packed folder holds ``train-000000.tar``, ..., ``test-000000.tar``, ..., ``info.json`` (what they are, with
SHA-256) and ``pellucid-index.npz`` (where in them each picture lies, in columns). The archives are plain
WebDataset: ``000000007.jpg``, the file as it was, and ``000000007.cls``, its class as a number.

Archives of other makers are indexed when they are first read, and the index is kept beside the named data
sets; it is made again when an archive changes its size or time.

Every picture is compared with its CRC-32 when it is read. Where a picture lies, what it is and which class
it has are columns of numbers, which processes share without copying.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import re
import shutil
import weakref
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, final

import numpy as np
import numpy.typing as npt
import torch

from pellucid.data.dataset import EncodedImages, Reject
from pellucid.data.folders import is_picture
from pellucid.data.found import Asked, Found, Looks, settle, taken_reasons
from pellucid.data.images import KINDS, Header, ImageRejected, show_name, too_large
from pellucid.data.tars import read_archive
from pellucid.data.trees import TEST_NAMES, holds, split_word
from pellucid.data.verify import DECODE_LIMIT, header_of, watched
from pellucid.errors import DataError

INFO = "info.json"
INDEX = "pellucid-index.npz"
FORMAT = "pellucid shards"
VERSION = 1

Columns = dict[str, npt.NDArray]

COLUMNS = {
    "shard": np.int32,  # which archive
    "offset": np.int64,  # of the file's first byte in it
    "size": np.int64,  # bytes
    "crc": np.uint32,
    "label": np.int32,  # -1: not known
    "kind": np.uint8,  # index into KINDS
    "channels": np.uint8,  # 0: rejected
    "height": np.int32,
    "width": np.int32,
    "name_start": np.int64,  # in ``names``
    "name_size": np.int32,
}
OPEN_AT_ONCE = 64  # archives; others are opened again when they are needed

_TAR = re.compile(r"\.(tar(\.(gz|bz2|xz|zst))?|tgz)$", re.IGNORECASE)
_log = logging.getLogger(__name__)


class Index(NamedTuple):
    """``info`` as in info.json; ``columns`` (n,) each; ``names``: uint8, those of all pictures in a row."""

    info: dict[str, Any]
    columns: Columns
    names: npt.NDArray[np.uint8]


class _Descriptor:
    """An open archive, closed when its last reader has let go of it."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self.number)


@final
class ShardImages(EncodedImages):
    """Pictures in archives. ``reasons``: why those among them that are rejected are.

    Reading names its offset, so that threads and forked processes may share what is open.
    """

    def __init__(
        self,
        files: list[str],
        columns: Columns,
        names: npt.NDArray[np.uint8],
        *,
        reasons: dict[int, str],
        max_pixels: int,
    ) -> None:
        super().__init__(torch.from_numpy(columns["label"].astype(np.int64)), reasons, max_pixels)
        self.files = files
        self.columns = columns
        self.reasons = reasons
        self._names = names
        self._open: dict[int, _Descriptor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}

    def source(self, i: int) -> bytes:
        data = self.read(i)
        if zlib.crc32(data) != self.columns["crc"][i]:
            raise DataError(
                f"{self._shard(i)} is damaged at {show_name(self.relative(i))}: the bytes are not those that"
                " were indexed - copy it again, or make it again"
            )
        return data

    def read(self, i: int) -> bytes:
        """The bytes that stand where picture i should, unchecked."""
        shard, offset, size = (int(self.columns[key][i]) for key in ("shard", "offset", "size"))
        data = bytearray()
        try:
            file = self._descriptor(shard)
            while len(data) < size and (piece := os.pread(file.number, size - len(data), offset + len(data))):
                data += piece
        except OSError as error:
            raise DataError(
                f"cannot read {self._shard(i)}: {error.strerror} - put it back, or make it again"
            ) from error
        return bytes(data)

    def byte_sizes(self) -> npt.NDArray[np.int64]:
        return self.columns["size"].astype(np.int64)

    def looks(self) -> Looks:
        """What the pictures are, as it was written down; those over ``max_pixels`` are rejected besides."""
        columns = {key: self.columns[key] for key in ("kind", "channels", "height", "width")}
        reasons = dict(self.reasons)
        pixels = columns["height"].astype(np.int64) * columns["width"]
        for i in np.flatnonzero(pixels > self.max_pixels).tolist():
            reasons[i] = str(too_large(int(pixels[i]), self.max_pixels))
        bad = np.zeros(len(self), dtype=bool)
        bad[list(reasons)] = True
        return Looks(**{key: np.where(bad, 0, column) for key, column in columns.items()}, reasons=reasons)

    def name(self, i: int) -> str:
        return show_name(self.path(i))

    def path(self, i: int) -> str:
        return f"{self.files[self.columns['shard'][i]]}: {self.relative(i)}"

    def relative(self, i: int) -> str:
        start, size = (int(self.columns[key][i]) for key in ("name_start", "name_size"))
        return os.fsdecode(self._names[start : start + size].tobytes())

    def _shard(self, i: int) -> str:
        return show_name(self.files[self.columns["shard"][i]])

    def _descriptor(self, shard: int) -> _Descriptor:
        file = self._open.get(shard)
        if file is None:
            file = self._open[shard] = _Descriptor(self.files[shard])
            for oldest in list(self._open)[:-OPEN_AT_ONCE]:
                self._open.pop(oldest, None)
        return file

    def _taken(self, indices: npt.NDArray[np.int64]) -> ShardImages:
        part = ShardImages(
            self.files,
            {key: column[indices] for key, column in self.columns.items()},
            self._names,
            reasons=taken_reasons(self.reasons, indices),
            max_pixels=self.max_pixels,
        )
        part.labels = self.labels[indices]
        return part


# --- packed folders ---------------------------------------------------------------------------------


def is_packed(path: str) -> bool:
    """Whether ``pack`` wrote this folder, be it whole or not."""
    if os.path.isfile(os.path.join(path, INDEX)):
        return True
    try:
        with open(os.path.join(path, INFO), "rb") as file:
            return FORMAT.encode() in file.read(200)
    except OSError:
        return False


def find_packed(path: str, name: str, asked: Asked) -> Found:
    """The pictures of a packed folder. Raises DataError naming the archive or index that is damaged."""
    index = read_index(path)
    shards = index.info["shards"]
    _refuse_changed(path, shards)
    whole = ShardImages(
        [os.path.join(path, shard["file"]) for shard in shards],
        index.columns,
        index.names,
        reasons={},
        max_pixels=asked.max_pixels,
    )
    is_test = np.array([shard["split"] == "test" for shard in shards])[index.columns["shard"]]
    found = _found(name, show_name(path), whole, index)
    parts = whole.taken(np.flatnonzero(~is_test)), whole.taken(np.flatnonzero(is_test))
    _settle(found, *parts, index.info["class_names"], asked)
    found.unread = tuple(Reject(*reject) for reject in index.info["rejects"])
    found.inspect = lambda: _damaged(path, shards)
    return found


def read_index(folder: str) -> Index:
    """The index of a folder, held to its own checksums and bounds. Raises DataError."""
    where = show_name(folder)
    try:
        with open(os.path.join(folder, INFO), "rb") as file:
            info = json.load(file)
        if info["format"] != FORMAT or info["version"] != VERSION:
            raise DataError(f"{where} is of version {info['version']}, this reads {VERSION} - pack it again")
        with open(os.path.join(folder, INDEX), "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != info["index_sha256"]:
                raise ValueError("its SHA-256 differs")
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                columns = {key: arrays[key].astype(kind, casting="safe") for key, kind in COLUMNS.items()}
                index = Index(info, columns, arrays["names"])
        _refuse_bounds(index)
    except DataError:
        raise
    except FileNotFoundError as error:
        missing = os.path.basename(str(error.filename))
        raise DataError(f"{missing} is missing in {where} - copy it again, or pack again") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, EOFError) as error:
        raise _damaged_index(where, error) from error
    except (zipfile.BadZipFile, zlib.error) as error:
        raise _damaged_index(where, error) from error
    return index


def write_index(folder: str, index: Index) -> None:
    """Write ``info.json`` and the columns, flushed."""
    path = os.path.join(folder, INDEX)
    with open(path, "w+b") as file:
        np.savez(file, names=index.names, **index.columns)  # type: ignore[arg-type]
        flush(file.fileno(), file.flush)
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    info = {"format": FORMAT, "version": VERSION, "index_sha256": digest} | index.info
    with open(os.path.join(folder, INFO), "w", encoding="ascii") as text:
        json.dump(info, text, indent=1)
        flush(text.fileno(), text.flush)


def flush(descriptor: int, out_of_python: Callable[[], object] = lambda: None) -> None:
    """On the disk, not in a cache, when this returns."""
    out_of_python()
    os.fsync(descriptor)


def packed_names(names: Iterable[str]) -> tuple[npt.NDArray[np.uint8], Columns]:
    """Names in a row, and the columns that say where each of them stands."""
    encoded = [os.fsencode(name) for name in names]
    sizes = np.array([len(name) for name in encoded], dtype=np.int64)
    starts = np.cumsum(sizes) - sizes
    return np.frombuffer(b"".join(encoded), dtype=np.uint8), {
        "name_start": starts,
        "name_size": sizes.astype(np.int32),
    }


def _damaged_index(where: str, error: Exception) -> DataError:
    reason = show_name(str(error) or type(error).__name__)[:100]
    return DataError(f"the index of {where} is damaged ({reason}) - copy the folder again, or pack again")


def _refuse_bounds(index: Index) -> None:
    """Raises ValueError for an index that does not agree with itself."""
    info, columns, names = index
    shards, n = info["shards"], len(columns["shard"])
    if {column.shape for column in columns.values()} != {(n,)} or names.dtype != np.uint8:
        raise ValueError("columns of different lengths")
    if n and not 0 <= columns["shard"].min() <= columns["shard"].max() < len(shards):
        raise ValueError("a picture in no archive")
    count = np.bincount(columns["shard"], minlength=len(shards))
    if count.tolist() != [shard["images"] for shard in shards]:
        raise ValueError("other numbers of images than stated")
    ends = columns["offset"] + columns["size"]
    length = np.array([shard["bytes"] for shard in shards], dtype=np.int64)
    if n and (
        min(columns["offset"].min(), columns["size"].min()) < 0 or (ends > length[columns["shard"]]).any()
    ):
        raise ValueError("a picture outside of its archive")
    if n and not -1 <= columns["label"].min() <= columns["label"].max() < len(info["class_names"]):
        raise ValueError("a label that is no class")
    if n and (columns["kind"].max() >= len(KINDS) or columns["name_start"].min() < 0):
        raise ValueError("a picture of no kind or name")
    if not all(isinstance(name, str) for name in info["class_names"]):
        raise ValueError("class names that are no text")


def _refuse_changed(folder: str, shards: list[dict[str, Any]]) -> None:
    for shard in shards:
        if os.path.basename(shard["file"]) != shard["file"]:
            raise DataError(f"the index of {show_name(folder)} names an archive elsewhere - pack again")
        path = os.path.join(folder, shard["file"])
        try:
            size = os.stat(path).st_size
        except OSError as error:
            raise DataError(f"{show_name(path)}: {error.strerror} - copy it again, or pack again") from None
        if size != shard["bytes"]:
            raise DataError(
                f"{show_name(path)} has {size:,} bytes, not the {shard['bytes']:,} that were packed"
                " - copy it again, or pack again"
            )


def _damaged(folder: str, shards: list[dict[str, Any]]) -> list[str]:
    """The archives whose SHA-256 is not what was packed."""
    found = []
    for shard in watched(shards, "checking shards"):
        path = os.path.join(folder, shard["file"])
        try:
            with open(path, "rb") as file:
                same = hashlib.file_digest(file, "sha256").hexdigest() == shard["sha256"]
        except OSError:
            same = False
        if not same:
            found.append(f"{show_name(path)} is damaged (SHA-256 differs) - copy it again, or pack again")
    return found


# --- archives of other makers -----------------------------------------------------------------------


def tar_files(path: str) -> list[str]:
    """The archives that ``path`` names: one, those of a pattern, or those of a folder that holds no pictures
    in sub-folders. Raises DataError for a pattern that matches none.
    """
    if os.path.isdir(path):
        train_and_test = ("train", *TEST_NAMES)
        folders = [path] + [
            entry.path for entry in _listed(path) if entry.name.lower() in train_and_test and entry.is_dir()
        ]
        found = sorted(e.path for folder in folders for e in _listed(folder) if _is_tar(e.path))
        return found if found and not holds(path, is_picture, below=True) else []
    if os.path.lexists(path):
        return [path] if _is_tar(path) else []
    if not glob.has_magic(path) or not _TAR.search(path):
        return []
    found = sorted(filter(_is_tar, glob.glob(path)))
    if not found:
        raise DataError(f"no archive matches {show_name(path)} - check the pattern")
    return found


def find_tars(tars: list[str], where: str, name: str, data_root: str, asked: Asked) -> Found:
    """The pictures in other people's archives. Raises DataError naming the one that cannot be read."""
    index = _kept_index(tars, os.path.join(data_root, "shards"), asked.max_pixels)
    whole = ShardImages(
        tars,
        index.columns,
        index.names,
        reasons=dict(index.info["reasons"]),
        max_pixels=asked.max_pixels,
    )
    found = _found(name, where, whole, index)
    found.notes += index.info["notes"]
    split = [split_word(tar) for tar in tars]
    of_test = next((word for word in TEST_NAMES if word in split), None)
    of_picture = np.array(split, dtype=object)[index.columns["shard"]]
    train, test = whole, None
    if "train" in split and of_test is not None:
        train = whole.taken(np.flatnonzero(of_picture == "train"))
        test = whole.taken(np.flatnonzero(of_picture == of_test))
        if others := len(whole) - len(train) - len(test):
            found.notes.append(
                f"{others:,} images of archives that are neither train nor {of_test} are ignored"
            )
    _settle(found, train, test, index.info["class_names"], asked)
    return found


def _settle(
    found: Found, train: ShardImages, test: ShardImages | None, class_names: list[str], asked: Asked
) -> None:
    settle(train, test, class_names, asked, found)
    parts = found.train, found.test
    looks = [part.looks() for part in parts if isinstance(part, ShardImages)]
    found.looks = looks[0], looks[1]


def _found(name: str, where: str, whole: ShardImages, index: Index) -> Found:
    digest = hashlib.sha256("\0".join(index.info["class_names"]).encode("utf-8", "surrogatepass"))
    for key in sorted(index.columns):
        digest.update(np.ascontiguousarray(index.columns[key]).data)
    digest.update(np.ascontiguousarray(index.names).data)
    return Found(name, where, whole, whole, [], digest.hexdigest())


def _kept_index(tars: list[str], folder: str, max_pixels: int) -> Index:
    """The index of these archives, as it is kept in ``folder``, or made and kept there."""
    try:
        states = [(os.path.abspath(tar), os.stat(tar)) for tar in tars]
    except OSError as error:
        raise DataError(f"cannot read {show_name(error.filename)}: {error.strerror}") from None
    key = json.dumps([VERSION, max_pixels, [(path, s.st_size, s.st_mtime_ns) for path, s in states]])
    place = os.path.join(folder, hashlib.sha256(key.encode()).hexdigest()[:32])
    try:
        return read_index(place)
    except DataError:  # not there, or damaged: then it is made again
        pass
    index = _make_index(tars, [s.st_size for _, s in states], max_pixels)
    scratch = f"{place}.tmp-{os.getpid()}"
    try:
        os.makedirs(scratch, exist_ok=True)
        write_index(scratch, index)
        if os.path.isdir(place):
            os.replace(os.path.join(scratch, INDEX), os.path.join(place, INDEX))
            os.replace(os.path.join(scratch, INFO), os.path.join(place, INFO))
        else:
            os.rename(scratch, place)
    except OSError as error:
        _log.warning("the index is not kept, and made again next time: %s", error)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return index


def _make_index(tars: list[str], lengths: list[int], max_pixels: int) -> Index:
    archives = [read_archive(tar) for tar in watched(tars, "indexing")]
    samples = [sample for archive in archives for sample in archive.samples]
    counts = [len(archive.samples) for archive in archives]
    class_names, labels = _classes([sample.label for sample in samples])
    names, name_columns = packed_names(sample.name for sample in samples)
    n = len(samples)
    columns: Columns = {key: np.zeros(n, dtype=kind) for key, kind in COLUMNS.items()} | name_columns
    columns["shard"][:] = np.repeat(np.arange(len(tars)), counts)
    columns["offset"][:] = [sample.offset for sample in samples]
    columns["size"][:] = [sample.size for sample in samples]
    columns["label"][:] = labels
    images = ShardImages(tars, columns, names, reasons={}, max_pixels=max_pixels)

    def look(i: int) -> tuple[int, Header | str]:
        data = images.read(i)
        try:
            return zlib.crc32(data), header_of(data, max_pixels, decode=n <= DECODE_LIMIT)
        except ImageRejected as error:
            return zlib.crc32(data), error.reason

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        seen = list(watched(pool.map(look, range(n)), "looking", n))
    columns["crc"][:] = [crc for crc, _ in seen]
    looks = Looks.of([header for _, header in seen])
    for key in ("kind", "channels", "height", "width"):
        columns[key][:] = getattr(looks, key)
    passed_over = sum((archive.passed_over for archive in archives), Counter())
    info = {
        "class_names": class_names,
        "shards": [
            {"file": os.path.abspath(tar), "images": count, "bytes": size}
            for tar, count, size in zip(tars, counts, lengths, strict=True)
        ],
        "reasons": list(looks.reasons.items()),
        "notes": [f"{count:,} {kind} in the archives are passed over" for kind, count in passed_over.items()],
    }
    return Index(info, columns, names)


def _classes(texts: list[str | None]) -> tuple[list[str], list[int]]:
    """Class names, ascending, and the class of each picture, -1 where none is stated.

    Numbers are classes by their value, so that 10 comes after 9; anything else by its text.
    """
    stated = {text for text in texts if text is not None}
    if all(re.fullmatch(r"[+-]?\d{1,18}", text, re.ASCII) for text in stated):
        values = {text: int(text) for text in stated}
    else:
        values = {text: text for text in stated}  # type: ignore[misc]
    ordered = sorted(set(values.values()))
    rank = {value: k for k, value in enumerate(ordered)}
    return [str(value) for value in ordered], [-1 if t is None else rank[values[t]] for t in texts]


def _is_tar(path: str) -> bool:
    return (
        _TAR.search(path) is not None and not os.path.basename(path).startswith(".") and os.path.isfile(path)
    )


def _listed(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError:
        return []
