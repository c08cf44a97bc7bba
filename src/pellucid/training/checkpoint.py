"""The files door: whatever is written here is either there whole or not there at all.

A checkpoint is a folder ``step-00000400`` with ``state.safetensors``, ``state.json`` and ``MANIFEST.json``
(SHA-256 of the others); of several processes it may hold one ``shard-*.safetensors`` each in place of the
first, PyTorch's distributed checkpoint, which any number of processes reads. It is written as ``.tmp-*``,
flushed, and renamed; the newest folder whose manifest holds is the checkpoint. Nothing is overwritten in
place, and deletion begins with a rename, so a process killed at any moment leaves the old state, the new one,
or leftovers that the next one removes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from pellucid.errors import CheckpointError, ConfigError, NumericsError, ResourceError, gives_out
from pellucid.regular import read_json, read_regular
from pellucid.training.lifeline import quiet
from pellucid.training.ranks import local

MANIFEST = "MANIFEST.json"
SCHEMA = 1
KEEP = 2


@dataclass(frozen=True)
class Checkpoint:
    """A state as it was saved.

    Attributes:
        step: optimiser steps done.
        tensors: by name.
        meta: whatever else, as JSON.
        damaged: newer checkpoints that were passed over, each with the reason.
    """

    step: int
    tensors: dict[str, Tensor]
    meta: dict[str, Any]
    damaged: list[str] = field(default_factory=list)


def save_checkpoint(folder: Path, step: int, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Path:
    """Write the state after ``step`` steps; keep the newest two.

    Raises:
        NumericsError: a tensor holds NaN or infinity. Nothing is written.
        ResourceError: the disk is full or the folder cannot be written; earlier checkpoints stand.
    """
    bad = [name for name, value in tensors.items() if not bool(value.isfinite().all())]
    if bad:
        raise NumericsError(_about_bad(bad, step, folder))
    final = folder / f"step-{step:08d}"
    if final.exists() and _damage(final) is None:
        return final
    with quiet():
        state = tensors_to_bytes({name: value.detach().cpu().contiguous() for name, value in tensors.items()})
    contents = {"state.safetensors": state, "state.json": json.dumps({"step": step, **meta}).encode()}
    with saving(folder, sum(map(len, contents.values()))):
        with new_folder(final) as scratch:
            for name, content in contents.items():
                write_flushed(scratch / name, content)
            _write_manifest(scratch, {name: _digest(content) for name, content in contents.items()})
        _forget_old(folder, final)
    return final


def save_sharded(folder: Path, step: int, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Path:
    """As :func:`save_checkpoint`, by all processes of a run together, each of which writes its own rows.

    The first makes the scratch folder, which every process must see, lists what all have written and flushed,
    and renames it; so this too is there whole or not at all. ``meta`` and tensors that are not cut up are the
    first process's.

    Raises:
        NumericsError: a tensor holds NaN or infinity, in any process. Nothing is written.
        ResourceError: a process could not write; earlier checkpoints stand.
    """
    from torch import distributed as dist
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    first = dist.get_rank() == 0
    bad = [name for name, value in tensors.items() if not bool(local(value).isfinite().all())]
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, bad)
    if any(everywhere):
        names = sorted({name for part in everywhere for name in part})
        raise NumericsError(_about_bad(names, step, folder))
    final = folder / f"step-{step:08d}"
    told = [first and final.exists() and _damage(final) is None]
    dist.broadcast_object_list(told, 0)
    if told[0]:
        return final
    ours = {k: v.detach() for k, v in tensors.items() if first or hasattr(v, "to_local")}
    with saving(folder, sum(local(value).nbytes for value in ours.values())), contextlib.ExitStack() as stack:
        place = [str(stack.enter_context(new_folder(final))) if first else ""]
        dist.broadcast_object_list(place, 0)
        scratch = Path(place[0])
        try:
            with quiet():
                dcp.save(ours, storage_writer=dcp.HuggingFaceStorageWriter(place[0], save_distributed=True))
        except CheckpointException as error:  # in every process, whichever of them failed
            number, (reason, _) = next(iter(error.failures.items()))
            raise ResourceError(
                f"cannot write: process {number}: {type(reason).__name__}: {reason} - make room, then run "
                f"again with --resume; {last_good(folder)}"
            ) from error
        written = scratch.glob(f"shard-{dist.get_rank() + 1:05d}-*")
        dist.all_gather_object(everywhere, {path.name: _digest(path.read_bytes()) for path in written})
        if first:
            content = json.dumps({"step": step, **meta}).encode()
            write_flushed(scratch / "state.json", content)
            digests = {name: digest for part in everywhere for name, digest in part.items()}
            _write_manifest(scratch, {**digests, "state.json": _digest(content)})
    if first:
        _forget_old(folder, final)
    return final


def _about_bad(names: list[str], step: int, folder: Path) -> str:
    return (
        f"step {step} holds {len(names)} non-finite tensors ({', '.join(names[:3])}) - it was not saved; "
        f"{last_good(folder)}"
    )


def _write_manifest(scratch: Path, digests: dict[str, str]) -> None:
    write_flushed(scratch / MANIFEST, json.dumps({"schema": SCHEMA, "files": digests}).encode())


def _forget_old(folder: Path, newest: Path) -> None:
    for old in [path for path in _steps(folder) if path < newest][: -(KEEP - 1)]:
        remove_folder(old)


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest valid checkpoint in ``folder``, or None where there is none at all.

    Raises:
        CheckpointError: there are checkpoints and every one is damaged.
    """
    damaged: list[str] = []
    for path in reversed(_steps(folder)):
        found = _read(path)
        if isinstance(found, Checkpoint):
            return replace(found, damaged=damaged)
        damaged.append(f"{path.name}: {found}")
    if damaged:
        raise CheckpointError(
            f"no valid checkpoint in {folder} - start again with --overwrite\n" + "\n".join(damaged[:3])
        )
    return None


def read_checkpoint(path: Path) -> Checkpoint | None:
    """The checkpoint in this very folder; None where there is none, or it is damaged."""
    found = _read(path)
    return found if isinstance(found, Checkpoint) else None


def _read(path: Path) -> Checkpoint | str:
    """The checkpoint in a folder, or why it cannot be used."""
    reason = _damage(path)
    if reason is not None:
        return reason
    try:
        meta = dict(read_json(path / "state.json"))
        tensors = _tensors(path)
        bad = [name for name, value in tensors.items() if not bool(value.isfinite().all())]
        if not bad:
            return Checkpoint(int(meta.pop("step")), tensors, meta)
        return f"holds {len(bad)} non-finite tensors ({', '.join(bad[:3])})"
    except (ValueError, KeyError, TypeError, OSError, RuntimeError, SafetensorError) as error:
        return f"holds no state of a run ({type(error).__name__})"


def _tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a valid checkpoint, whole."""
    if (path / "state.safetensors").exists():
        return tensors_from_bytes(read_regular(path / "state.safetensors"))
    from torch.distributed import checkpoint as dcp

    known: dict[str, Any] = dcp.HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    held = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    if sum(one.size.numel() * one.properties.dtype.itemsize for one in known.values()) > held:
        raise ValueError("its files say that they hold more than they do")
    found = {name: torch.empty(one.size, dtype=one.properties.dtype) for name, one in known.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assuming the intent is to load in a single process.*")
        dcp.load(found, storage_reader=dcp.HuggingFaceStorageReader(str(path)), no_dist=True)
    return found


def sweep(folder: Path) -> int:
    """Remove what a killed process left half written or half deleted; returns how many folders."""
    leftovers = [*folder.glob(".tmp-*"), *folder.glob(".del-*")]
    for path in leftovers:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return len(leftovers)


@contextlib.contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A scratch folder that becomes ``final`` when the block ends well, and vanishes when it does not.

    What stood at ``final`` is moved aside first and removed last.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    scratch = final.parent / f".tmp-{final.name}-{os.getpid()}"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        yield scratch
        for path in scratch.iterdir():
            _flush(path)
        _flush(scratch)
        if final.exists():
            remove_folder(final, then=lambda: os.rename(scratch, final))
        else:
            os.rename(scratch, final)
        _flush(final.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def remove_folder(path: Path, then: Any = None) -> None:
    """Out of sight by one rename, then deleted. ``then`` runs between; if it fails, all is as before."""
    aside = path.parent / f".del-{path.name}-{os.getpid()}"
    os.rename(path, aside)
    try:
        if then is not None:
            then()
    except BaseException:
        os.rename(aside, path)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def write_file(path: Path, content: str | bytes) -> None:
    """A small file, whole or not at all."""
    data = content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace")
    with saving(path.parent, len(data)), _becomes(path) as scratch:
        write_flushed(scratch, data)


@contextlib.contextmanager
def new_file(final: Path) -> Iterator[Path]:
    """The name of a scratch file that becomes ``final`` when the block ends well, else vanishes."""
    with _becomes(final) as scratch:
        yield scratch
        _flush(scratch)


@contextlib.contextmanager
def _becomes(final: Path) -> Iterator[Path]:
    """As :func:`new_file`, for a block that flushes what it writes."""
    scratch = final.parent / f".tmp-{final.name}-{os.getpid()}"
    try:
        yield scratch
        os.replace(scratch, final)
        _flush(final.parent)
    finally:
        scratch.unlink(missing_ok=True)


def write_flushed(path: Path, content: bytes) -> None:
    """Bytes that are on the disk, not in a cache, when this returns."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def saving(folder: Path, needed: int) -> Iterator[None]:
    """Turn a failed write into an error that says what was needed and what still stands."""
    try:
        yield
    except OSError as error:
        what = {errno.ENOSPC: "disk full", errno.EDQUOT: "disk quota used up", errno.EFBIG: "file too large"}
        full = what.get(error.errno or 0)
        free = f", {_megabytes(shutil.disk_usage(folder).free)} free" if folder.exists() else ""
        remedy = "make room, then run again with --resume" if full else "check the folder, or take another"
        raise ResourceError(
            f"{full or 'cannot write'}: needs {_megabytes(needed)}{free} on {folder} "
            f"({error.strerror}) - {remedy}; {last_good(folder)}"
        ) from error


_held: set[int] = set()
"""Descriptors of the locks that this process holds."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder against a second run. The kernel lets go when the process ends, however it ends."""
    lock = folder / "run.lock"
    # Not through a link: what is written here would stand in place of what the link leads to.
    if os.path.lexists(lock) and not stat.S_ISREG(os.lstat(lock).st_mode):
        raise CheckpointError(f"{lock} is not a file - remove it, or take another --out")
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if gives_out(error):
            raise
        raise ConfigError(f"cannot write {folder}: {error.strerror} - take another --out") from error
    _held.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(descriptor, 1000).decode(errors="replace").strip() or "another process"
            raise ConfigError(f"{folder} is in use by {holder} - wait, or take another --out") from None
        os.ftruncate(descriptor, 0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        os.write(descriptor, f"pid {os.getpid()} on {os.uname().nodename} since {since}".encode())
        yield
    finally:
        if descriptor in _held:
            _held.remove(descriptor)
            os.close(descriptor)


def _let_go() -> None:
    """In a forked process, such as a data worker: it may outlive the run and must not hold its lock."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


def _damage(path: Path) -> str | None:
    """Why this checkpoint cannot be used, or None."""
    try:
        manifest = read_json(path / MANIFEST)
        if manifest["schema"] != SCHEMA:
            return f"{MANIFEST} is damaged, or of another version"
        files = manifest["files"]
        for name, expected in files.items():
            if "/" in name or name in ("", ".", ".."):
                return f"{MANIFEST} names files elsewhere"
            if _digest(read_regular(path / name)) != expected:
                return f"{name} is damaged (SHA-256 differs)"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"incomplete ({type(error).__name__})"
    has_tensors = any(name.endswith(".safetensors") for name in files)
    return None if has_tensors and "state.json" in files else "incomplete"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _steps(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def last_good(folder: Path) -> str:
    """The newest checkpoint of a run that holds, in words."""
    kept = _steps(folder) or _steps(folder / "checkpoints")
    good = next((path.name for path in reversed(kept) if _damage(path) is None), None)
    return f"last good checkpoint: {good}" if good else "no earlier checkpoint"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def thread_fingerprint() -> dict[str, Any]:
    """What bit-identical results depend on besides the seed."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"torch": torch.__version__, "device": device, "threads": torch.get_num_threads()}
