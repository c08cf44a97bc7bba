"""The door for foreign weights: a checkpoint of anybody's becomes tensors, or a refusal that says why.

A ``.pth`` file is a pickle, a program for a small machine that can call any function of Python. It is read in
a process of its own, with limits on time and memory, behind three filters that do not depend on each other:

1. every name that the pickle mentions is read off without running it, and must be in :data:`ALLOWED`;
2. ``torch.load(weights_only=True)`` runs the pickle, and calls what makes tensors and nothing else;
3. an audit hook stops whatever the reader might try besides reading this file: import, open, start, connect.

What is no tensor (options, schedules, NumPy numbers) becomes an empty :class:`_StandIn`. The tensors of one
part of the file come back as safetensors. No text in a file ever selects an import.

torch does not look at the checksums of its own format; here every byte of a zip file is compared with its
CRC-32. The format before torch 1.6 has none, so a bit flipped in its numbers passes.
"""

from __future__ import annotations

import _compat_pickle
import codecs
import contextlib
import io
import json
import os
import pickletools
import re
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pellucid.errors import CheckpointError

PREFERRED = ("teacher", "student", "state_dict", "model", "model_ema")
"""Which part of a file is taken when none is asked for: the first of these that is there."""

STAND_INS = (
    "argparse.Namespace",
    "numpy.core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "numpy.dtype",
    "numpy.ndarray",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
)
"""What published checkpoints hold besides tensors. None is made; an empty object stands in its place."""

ALLOWED = re.compile(
    "|".join(
        [
            r"collections\.(OrderedDict|Counter)",
            r"_codecs\.encode",
            r"builtins\.set",
            r"torch\.(Size|device|[A-Z]\w+Storage|(float|bfloat|int|uint|complex)\d\w*|bool)",
            r"torch\.storage\.(TypedStorage|UntypedStorage)",
            r"torch\.nn\.parameter\.Parameter",
            r"torch\._utils\._rebuild_(tensor|tensor_v2|tensor_v3|parameter)",
            *map(re.escape, STAND_INS),
        ]
    )
)
"""Names that a pickle of weights may mention."""

SECONDS = 600.0
"""Time that reading one file may take. A file of many gigabytes takes one or two minutes."""

_SLACK = 2 << 30
"""Bytes of memory beyond four times the file, for a reader that otherwise holds it at most three times."""

_ANSWER, _TENSORS = "answer.json", "tensors.safetensors"


@dataclass(frozen=True)
class ForeignWeights:
    """What was taken out of a file.

    Attributes:
        tensors: by their names in the file.
        part: the part that they came from; None where the file has no parts.
        others: parts that hold tensors too and were left.
    """

    tensors: dict[str, Tensor]
    part: str | None = None
    others: tuple[str, ...] = ()


def read_foreign(path: str | os.PathLike[str], key: str | None = None) -> ForeignWeights:
    """Tensors of a ``.pth``, ``.pt``, ``.bin``, ``.npz`` or ``.safetensors`` file, told apart by content.

    Args:
        path: the file.
        key: the part to take, such as ``"student"``; the first of :data:`PREFERRED` unless given, or the
            whole file where that is a state dict, or its only part with tensors.

    Raises:
        CheckpointError: a file that is damaged, holds more than tensors and plain numbers, takes too much
            time or memory, or has no such part. Nothing in it was run.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} {'is not a file' if path.exists() else 'does not exist'}")
    if _is_safetensors(path):
        from pellucid.models.saved import read_weights  # not at the top: the reader process does without timm

        if key is not None:
            raise CheckpointError(
                f"{path} is a safetensors file, which has no parts - leave out the key '{key}'"
            )
        return ForeignWeights(read_weights(path))
    with tempfile.TemporaryDirectory(prefix="pellucid-") as folder:
        _read_aside(path, key, Path(folder))
        answer = _answer(path, Path(folder))
        return ForeignWeights(
            load_file(Path(folder) / _TENSORS), part=answer["part"], others=tuple(answer["others"])
        )


def _is_safetensors(path: Path) -> bool:
    """Eight bytes of length, then a JSON object of that length."""
    try:
        with open(path, "rb") as file:
            head = file.read(9)
    except OSError as error:
        raise CheckpointError(f"cannot read {path} ({error.strerror or error})") from error
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size


def _read_aside(path: Path, key: str | None, folder: Path) -> None:
    """Run :func:`_main` of this very file in a process of its own, which leaves its answer in ``folder``."""
    # By its path and not as a module: the package around it would bring in timm, which takes seconds.
    # Isolated (-P) from the folder that it stands in, and seeing the same packages as this process.
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(os.path.abspath(entry) for entry in sys.path if entry),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [
        sys.executable,
        "-P",
        __file__,
        str(path.resolve()),
        str(folder),
        *([] if key is None else [key]),
    ]
    with open(folder / "stderr", "wb") as stderr:
        try:
            subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                cwd=folder,
                env=environment,
                timeout=SECONDS,
                check=True,
            )
        except subprocess.TimeoutExpired as error:
            raise CheckpointError(
                f"refused: reading {path} took more than {SECONDS:g} s, as a file made to block it does"
            ) from error
        except subprocess.CalledProcessError as error:
            last = (folder / "stderr").read_text(errors="replace").strip().splitlines()[-1:]
            signalled = error.returncode < 0
            how = f" ended with signal {-error.returncode}" if signalled else ": " + "".join(last)[:200]
            raise CheckpointError(
                f"{path} could not be read: its reader{how} - nothing else was harmed; get the file "
                f"again, or as safetensors"
            ) from error


def _answer(path: Path, folder: Path) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads((folder / _ANSWER).read_text())
    if "error" in answer:
        raise CheckpointError(answer["error"].replace(_HERE, str(path)))
    return answer


# --- What follows runs in the process of its own ----------------------------------------------------------


_HERE = "{file}"
"""The file's name in messages, until the parent puts in the one that it was asked for."""


class _Refused(Exception):
    """Says why, in the words that the user reads."""


def _shown(names: list[str], most: int = 3) -> str:
    """Names from a file, as many and as long as a message can take."""
    short = ("".join(c if c.isprintable() else "?" for c in name[:100]) for name in names[:most])
    return ", ".join(short) + (f" and {len(names) - most} more" if len(names) > most else "")


class _StandIn:
    """An empty object in the place of one that is not needed."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


def _main(path: str, folder: str, key: str | None = None) -> None:
    reached: dict[str, Any]
    try:
        part, others, tensors = _choose(_read(path), key)
        _check_sizes(tensors, os.path.getsize(path))
        # Fresh memory for each: safetensors takes no two names for the same.
        own = {name: value.detach().contiguous().clone() for name, value in tensors.items()}
        save_file(own, os.path.join(folder, _TENSORS))
        reached = {"part": part, "others": others}
    except _Refused as error:
        reached = {"error": str(error)}
    except Exception as error:
        short = (str(error).strip().splitlines() or [""])[0][:200] or type(error).__name__
        if isinstance(error, MemoryError) or "memory" in short:
            short = "it asks for more memory than its weights can need"
        reached = {"error": f"{_HERE} is damaged or no checkpoint ({short}) - get it again"}
    with open(os.path.join(folder, _ANSWER), "w") as file:
        json.dump(reached, file)


def _read(path: str) -> Any:
    """Whatever the file holds."""
    with open(path, "rb") as file:
        head = file.read(512)
        if head[:4] == b"PK\x03\x04":
            return _read_zip(path)
        if head[:1] == b"\x80":
            file.seek(0)
            for _ in range(5):  # magic number, protocol, machine, content, names of the storages
                _refuse_names(_names(file))
            return _load(path, mmap=False)
        if head[257:262] == b"ustar":
            raise _Refused(
                f"refused: {_HERE} is in the tar format of torch before 0.1.10, which is not read safely - "
                f"ask for a newer form of it"
            )
    raise _Refused(f"{_HERE} is no file of weights - known: .pth, .pt, .bin, .npz, .safetensors")


def _read_zip(path: str) -> Any:
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        names = [member.filename for member in members]
        if any(name.startswith("/") or "\\" in name or ".." in name.split("/") for name in names):
            raise _Refused(f"refused: {_HERE} holds names that lead out of it")
        if len(set(names)) < len(names):
            raise _Refused(f"refused: {_HERE} holds two members of one name")
        tops = {name.split("/")[0] for name in names}
        inner = {name.partition("/")[2] for name in names}
        if any(name.startswith("code/") or name == "constants.pkl" for name in inner):
            raise _Refused(
                f"refused: {_HERE} is a TorchScript archive, which is a program - ask for a state dict"
            )
        if any(name.startswith(".data/extern_modules") for name in inner):
            raise _Refused(f"refused: {_HERE} is a torch.package, which is a program - ask for a state dict")
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise _Refused(
                f"refused: {_HERE} is compressed, which checkpoints are not - unpack it, or save it again "
                f"with torch.save or numpy.savez"
            )
        if sum(member.file_size for member in members) > os.path.getsize(path):
            raise _Refused(f"refused: {_HERE} says that it holds more than it does")
        damaged = archive.testzip()
        if damaged is not None:
            raise _Refused(
                f"{_HERE} is damaged ({_shown([damaged])} differs from its checksum) - get it again"
            )
        if names and all(name.endswith(".npy") for name in names):
            return _read_arrays(path)
        if len(tops) != 1 or "data.pkl" not in inner:
            raise _Refused(f"{_HERE} is a zip file, but not one that torch.save or numpy.savez made")
        with archive.open(f"{tops.pop()}/data.pkl") as pickled:
            _refuse_names(_names(pickled))
    return _load(path, mmap=True)


def _read_arrays(path: str) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as arrays:
        return {
            name: torch.from_numpy(array) if array.dtype.kind in "fiubc" else array.dtype
            for name in arrays.files
            if (array := arrays[name]) is not None
        }


def _names(pickled: IO[bytes]) -> Iterator[str]:
    """Everything that one pickle would look up by name, without running it."""
    texts: deque[str] = deque(["?", "?"], maxlen=2)
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name in ("GLOBAL", "INST"):
            # Pickles of protocol 2 spell the standard library as Python 2 did; their readers know.
            module, _, name = str(argument).partition(" ")
            renamed = _compat_pickle.IMPORT_MAPPING.get(module, module), name
            yield ".".join(_compat_pickle.NAME_MAPPING.get((module, name), renamed))
        elif opcode.name == "STACK_GLOBAL":
            yield ".".join(texts)
        elif opcode.name.startswith("EXT"):
            yield f"extension {argument}"
        elif isinstance(argument, str):
            texts.append(argument)


def _refuse_names(names: Iterator[str]) -> None:
    strange = sorted({name for name in names if not ALLOWED.fullmatch(name)})
    if strange:
        raise _Refused(
            f"refused: {_HERE} needs {_shown(strange)}: no tensor and no plain value, it could run code - "
            f"nothing was run\n"
            f"ask for the state dict alone, best as safetensors"
        )


def _load(path: str, mmap: bool) -> Any:
    """``torch.load`` behind the second and the third filter, with no more memory than weights need."""
    warnings.simplefilter("ignore")
    stand_ins: list[Any] = [(_StandIn, name) for name in STAND_INS]
    torch.serialization.add_safe_globals(stand_ins)
    # What reading imports is brought in by reading something of our own, before the watch begins.
    codecs.lookup("latin-1")
    for new_format in (True, False):
        sample = io.BytesIO()
        torch.save({"a": torch.zeros(1)}, sample, _use_new_zipfile_serialization=new_format)  # noqa: TID251
        sample.seek(0)
        torch.load(sample, weights_only=True)  # noqa: TID251
    _limit_memory(4 * os.path.getsize(path) + _SLACK)
    with _watched(path):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)  # noqa: TID251


@contextlib.contextmanager
def _watched(path: str) -> Iterator[None]:
    """While this lasts, Python does nothing in this process but compute and open ``path``."""
    tried: list[str] = []
    watching = True

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event not in _HARMLESS and not (event == "open" and arguments[0] == path):
            tried.append(event)
            raise RuntimeError(event)

    sys.addaudithook(refuse)
    try:
        yield
    except Exception as error:
        if tried:
            raise _Refused(
                f"refused: reading {_HERE} tried to do more ({tried[0]}) - it was stopped"
            ) from error
        raise
    finally:
        watching = False


_HARMLESS = {"object.__getattr__", "sys._getframe"}
"""Events of Python looking at itself, as warnings and tracebacks do."""


def _limit_memory(more: int) -> None:
    """Let this process grow by so many bytes, where the system says how large it is."""
    with contextlib.suppress(ImportError, OSError):
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        wanted = pages * resource.getpagesize() + more
        resource.setrlimit(
            resource.RLIMIT_AS, (wanted if most == resource.RLIM_INFINITY else min(wanted, most), most)
        )


def _choose(content: Any, key: str | None) -> tuple[str | None, list[str], dict[str, Tensor]]:
    """The part to take, the others, and its tensors."""
    if not isinstance(content, Mapping):
        raise _Refused(f"{_HERE} holds a {type(content).__name__.strip('_')}, expected names and tensors")
    parts = {name: value for name, value in content.items() if isinstance(name, str) and _has_tensors(value)}
    listed = f"known here: {_shown(list(parts), 9)}" if parts else "it has no parts"
    preferred = [name for name in PREFERRED if name in parts]
    if key is not None:
        if key not in parts:
            raise _Refused(f"{_HERE} has no part '{key}' with tensors - {listed}")
        taken = key
    elif preferred:
        taken = preferred[0]
    elif _has_tensors(content):
        return None, list(parts), _all_tensors(content)
    elif len(parts) == 1:
        (taken,) = parts
    elif not parts:
        raise _Refused(f"{_HERE} holds no tensors by name - ask for the state dict")
    else:
        raise _Refused(f"{_HERE} does not say which part is the model - {listed}; name it as the key")
    return taken, [name for name in parts if name != taken], _all_tensors(parts[taken])


def _has_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(entry, Tensor) for entry in value.values())


def _all_tensors(part: Mapping[Any, Any]) -> dict[str, Tensor]:
    others = [
        f"{name} ({type(value).__name__.strip('_')})"
        for name, value in part.items()
        if not (isinstance(name, str) and isinstance(value, Tensor))
    ]
    if others:
        raise _Refused(f"{_HERE}: not all of it are tensors: {_shown(others)} - take another key")
    return dict(part)


def _check_sizes(tensors: Mapping[str, Tensor], size: int) -> None:
    """Refuse tensors that no memory backs: other kinds than dense ones, or more numbers than the file has.

    Up to four names for one memory are let through, as tied weights have them.
    """
    total = 0
    for name, value in tensors.items():
        if value.layout is not torch.strided or value.is_quantized or value.device.type != "cpu":
            raise _Refused(f"{_HERE}: {_shown([name])} is not a dense tensor - ask for plain weights")
        total += value.numel() * value.element_size()
    if total > 4 * size:
        raise _Refused(
            f"refused: {_HERE} says it holds {total / 1e6:.0f} MB of weights in {size / 1e6:.1f} MB"
        )


if __name__ == "__main__":
    _main(*sys.argv[1:])
