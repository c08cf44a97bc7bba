"""``pellucid pack``: a data set of any kind into shards that are read by random access.

Every picture is decoded whole once before it is written; its file is kept as it was, byte by byte. Training
archives hold their pictures in an order that was shuffled once, so that programs that stream them see the
classes mixed; the index has them in the data set's own order, so that training here is the same as from the
files.

The folder is written aside, flushed and renamed: it stands whole or not at all. What a killed process left
aside is removed by the next one that packs to the same place.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import os
import shutil
import tarfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from pellucid.data.dataset import EncodedImages, FileImages, ImageData, ImageSet, Reject
from pellucid.data.images import KINDS, MAX_PIXELS, Header, ImageRejected, extension, show_name
from pellucid.data.load import MAX_BAD
from pellucid.data.randomness import order
from pellucid.data.shards import COLUMNS, Columns, Index, flush, is_packed, packed_names, write_index
from pellucid.data.verify import header_of, refusal
from pellucid.errors import ConfigError, DataError, ResourceError, unwritten

MAX_SHARD_MB = 500
_KEY_DIGITS = 9
_LOCK = ".lock"
_PART = ".part"  # behind an archive's name until all are whole


@dataclass(frozen=True)
class Packed:
    """What was written. ``rejects`` were left out."""

    folder: str
    train: int
    test: int
    shards: int
    bytes: int
    rejects: tuple[Reject, ...]


class _Sample(NamedTuple):
    data: bytes
    header: Header
    extension: str


def pack(
    data: ImageData,
    out: str | os.PathLike[str],
    *,
    max_shard_mb: float = MAX_SHARD_MB,
    max_bad: float = MAX_BAD,
    overwrite: bool = False,
    progress: Callable[[int], object] = lambda done: None,
) -> Packed:
    """Write ``data`` as a folder of shards, with its split and its labels.

    An archive is closed before it would be larger than ``max_shard_mb`` million bytes, but holds one picture
    at least. Pictures that cannot be read are left out and named, if they are no more than the share
    ``max_bad``. Arrays become PNG. ``progress`` is called with 1 for each picture.

    Raises DataError: ``out`` exists, is in use or cannot be written, too many pictures are rejected, or they
    have other than 1 or 3 channels.
    """
    if not max_shard_mb > 0:
        raise ConfigError(f"--max-shard-mb is {max_shard_mb} - give a number larger than 0, such as 500")
    folder = os.path.abspath(os.fspath(out))
    where = show_name(folder)
    _refuse_place(folder, data, overwrite)
    try:
        with _aside(folder) as scratch:
            packed = _write(data, folder, scratch, int(max_shard_mb * 1e6), max_bad, progress)
            _put(scratch, folder)
    except OSError as error:
        raise unwritten(
            f"cannot write {where}: {error.strerror or error} - make room, or name another", error
        ) from error
    return packed


def _write(
    data: ImageData,
    folder: str,
    scratch: str,
    limit: int,
    max_bad: float,
    progress: Callable[[int], object],
) -> Packed:
    shards: list[dict[str, Any]] = []
    parts: list[Columns] = []
    names: list[str] = []
    rejects: dict[str, Reject] = {}  # by path
    count = len(data.train) + len(data.test)
    for split, images in (("train", data.train), ("test", data.test)):
        columns = _columns(len(images), images.labels.numpy())
        sequence = order(0, 0, len(images)) if split == "train" else np.arange(len(images))
        with contextlib.closing(_Archives(scratch, split, limit, shards)) as archives:
            for i, sample in _samples(images, sequence.tolist()):
                progress(1)
                if isinstance(sample, _Sample):
                    archives.add(columns, i, sample, labelled=bool(data.class_names))
                    continue
                rejects[images.path(i)] = Reject(images.relative(i), sample)
                named = [(show_name(name), reason) for name, reason in rejects.values()]
                if message := refusal(named, count, max_bad, data.name):
                    raise DataError(message)
        kept = np.flatnonzero(columns["channels"] > 0)
        if not len(kept):
            raise DataError(f"no {split} image can be read - {data.name} - replace the images")
        parts.append({key: column[kept] for key, column in columns.items()})
        names += [images.relative(i) for i in kept.tolist()]
    text, name_columns = packed_names(names)
    every = {key: np.concatenate([part[key] for part in parts]) for key in COLUMNS} | name_columns
    left_out = (*rejects.values(), *(reject for reject in data.rejects if reject.path not in rejects))
    info = {
        "class_names": data.class_names,
        "splits": _splits(shards),
        "shards": shards,
        "rejects": left_out,
    }
    write_index(scratch, Index(info, every, text))
    for shard in shards:
        path = os.path.join(scratch, shard["file"])
        os.rename(path + _PART, path)
    train, test = (len(part["shard"]) for part in parts)
    return Packed(folder, train, test, len(shards), sum(shard["bytes"] for shard in shards), left_out)


def _columns(n: int, labels: np.ndarray) -> Columns:
    columns = {key: np.zeros(n, dtype=kind) for key, kind in COLUMNS.items()}
    return columns | {"label": labels.astype(np.int32)}


def _splits(shards: list[dict[str, Any]]) -> dict[str, Any]:
    """The splits in the form in which timm's reader of WebDataset takes them from info.json."""
    splits = {}
    for name in ("train", "test"):
        own = [shard for shard in shards if shard["split"] == name]
        splits[name] = {
            "name": name,
            "num_samples": sum(shard["images"] for shard in own),
            "filenames": [shard["file"] for shard in own],
            "shard_lengths": [shard["images"] for shard in own],
        }
    return splits


class _Archives:
    """The archives of one split, one after the other, described in ``shards``."""

    def __init__(self, folder: str, split: str, limit: int, shards: list[dict[str, Any]]) -> None:
        self._folder, self._split, self._limit, self._shards = folder, split, limit, shards
        self._open: _Archive | None = None
        self._count = 0

    def add(self, columns: Columns, i: int, sample: _Sample, *, labelled: bool) -> None:
        """Write picture ``i``, and where it lies into row i of ``columns``."""
        members = [(sample.extension, sample.data)]
        if labelled:
            members.append(("cls", b"%d" % columns["label"][i]))
        needed = sum(tarfile.BLOCKSIZE + _padded(len(content)) for _, content in members)
        archive = self._room_for(needed)
        columns["shard"][i], columns["offset"][i] = len(self._shards) - 1, archive.written + tarfile.BLOCKSIZE
        columns["size"][i], columns["crc"][i] = len(sample.data), zlib.crc32(sample.data)
        columns["kind"][i] = KINDS.index(sample.header.kind)
        for key in ("channels", "height", "width"):
            columns[key][i] = getattr(sample.header, key)
        for suffix, content in members:
            archive.add(f"{i:0{_KEY_DIGITS}d}.{suffix}", content)
        self._shards[-1]["images"] += 1

    def close(self) -> None:
        if self._open is not None:
            self._shards[-1] |= self._open.finish()
            self._open = None

    def _room_for(self, needed: int) -> _Archive:
        if self._open is not None and _whole(self._open.written + needed) > self._limit:
            self.close()
        if self._open is None:
            name = f"{self._split}-{self._count:06d}.tar"
            self._open = _Archive(os.path.join(self._folder, name + _PART))
            self._count += 1
            self._shards.append({"file": name, "split": self._split, "images": 0})
        return self._open


class _Archive:
    """One archive as it is written. Same pictures, same bytes: members have no times and no owners."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "wb")  # noqa: SIM115
        self._digest = hashlib.sha256()
        self.written = 0

    def add(self, name: str, content: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        self._write(member.tobuf(tarfile.USTAR_FORMAT))
        self._write(content.ljust(_padded(len(content)), b"\0"))

    def finish(self) -> dict[str, Any]:
        """The end mark, flushed; what the archive is."""
        with self._file:
            self._write(bytes(_whole(self.written) - self.written))
            flush(self._file.fileno(), self._file.flush)
        return {"bytes": self.written, "sha256": self._digest.hexdigest()}

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self._digest.update(content)
        self.written += len(content)


def _padded(size: int) -> int:
    return size + -size % tarfile.BLOCKSIZE


def _whole(written: int) -> int:
    """Size of an archive with so many bytes of members: two empty blocks more, in whole records."""
    end = written + 2 * tarfile.BLOCKSIZE
    return end + -end % tarfile.RECORDSIZE


def _samples(images: ImageSet, sequence: list[int]) -> Iterator[tuple[int, _Sample | str]]:
    """Each picture read and decoded, or why it cannot be, in this order; a few ahead of the writer."""
    ahead = 4 * (os.cpu_count() or 1)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        pending: deque[tuple[int, Future[_Sample | str]]] = deque()
        try:
            for i in sequence:
                pending.append((i, pool.submit(_sample, images, i)))
                if len(pending) > ahead:
                    yield pending[0][0], pending.popleft()[1].result()
            while pending:
                yield pending[0][0], pending.popleft()[1].result()
        finally:
            for _, future in pending:
                future.cancel()


def _sample(images: ImageSet, i: int) -> _Sample | str:
    limit = images.max_pixels if isinstance(images, EncodedImages) else MAX_PIXELS
    try:
        data = images.encoded(i) if isinstance(images, EncodedImages) else _as_png(images, i)
        return _Sample(data, header_of(data, limit, decode=True), extension(data))
    except ImageRejected as error:
        return error.reason


def _as_png(images: ImageSet, i: int) -> bytes:
    pixels = images.image(i).permute(1, 2, 0).numpy()
    if pixels.shape[-1] not in (1, 3):
        raise DataError(
            f"{images.name(i)} has {pixels.shape[-1]} channels - shards hold pictures of 1 or 3, .npz others"
        )
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, "PNG")
    return file.getvalue()


# --- the place ----------------------------------------------------------------------------------------


def _refuse_place(folder: str, data: ImageData, overwrite: bool) -> None:
    where = show_name(folder)
    source = os.path.realpath(data.train.root) if isinstance(data.train, FileImages) else ""
    if source and os.path.commonpath([source, os.path.realpath(folder)]) == source:
        raise ConfigError(f"{where} lies in the folder that is packed - name a place outside of it")
    if os.path.lexists(folder) and not (os.path.isdir(folder) and not os.listdir(folder)):
        if not is_packed(folder):
            raise ConfigError(f"{where} exists and holds no shards - name another place; it is left as it is")
        if not overwrite:
            raise ConfigError(
                f"{where} holds shards already - give --overwrite to replace them, or name another"
            )
    encoded = [images for images in (data.train, data.test) if isinstance(images, EncodedImages)]
    needed = sum(int(images.byte_sizes().sum()) for images in encoded)
    parent = os.path.dirname(folder)
    while not os.path.isdir(parent):
        parent = os.path.dirname(parent)
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise ResourceError(
            f"{where} needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
            " - make room, or name another place"
        )


@contextlib.contextmanager
def _aside(folder: str) -> Iterator[str]:
    """A locked scratch folder beside ``folder``, gone at the end; those of killed processes go first."""
    parent, name = os.path.split(folder)
    os.makedirs(parent, exist_ok=True)
    for entry in os.listdir(parent):
        if entry.startswith((f".tmp-{name}-", f".del-{name}-")):
            _sweep(os.path.join(parent, entry), folder)
    scratch = os.path.join(parent, f".tmp-{name}-{os.getpid()}")
    os.mkdir(scratch)
    lock = _locked(scratch)
    try:
        yield scratch
    finally:
        os.close(lock)
        shutil.rmtree(scratch, ignore_errors=True)


def _locked(scratch: str) -> int:
    """A lock on it, which the kernel lets go when the process ends, however it ends."""
    lock = os.open(os.path.join(scratch, _LOCK), os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise
    return lock


def _sweep(leftover: str, folder: str) -> None:
    try:
        lock = _locked(leftover)
    except BlockingIOError:
        raise ConfigError(f"{show_name(folder)} is being packed by another process - wait for it") from None
    shutil.rmtree(leftover, ignore_errors=True)
    os.close(lock)


def _put(scratch: str, folder: str) -> None:
    """Give the folder its name; what stood there is moved aside first and removed last."""
    os.unlink(os.path.join(scratch, _LOCK))
    descriptor = os.open(scratch, os.O_RDONLY)
    try:
        flush(descriptor)
    finally:
        os.close(descriptor)
    parent, name = os.path.split(folder)
    old = os.path.join(parent, f".del-{name}-{os.getpid()}")
    if os.path.isdir(folder):
        os.rename(folder, old)
    try:
        os.rename(scratch, folder)
    except OSError:
        if os.path.isdir(old):
            os.rename(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
    descriptor = os.open(parent, os.O_RDONLY)
    try:
        flush(descriptor)
    finally:
        os.close(descriptor)
