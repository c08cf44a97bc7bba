"""Files that were made to do harm, at every door that takes somebody else's: nothing in any of them runs.

Each is opened in a forked process under an audit hook, which sees whatever Python does there besides
computing: what is imported, run, started, written. Whatever a good file at the same door does not need is
harm. An armed file also leaves a canary when it is read without care; the last tests show that it does, and
that the hook sees it.
"""

import contextlib
import functools
import gzip
import hashlib
import io
import json
import os
import pickle  # noqa: TID251 - to write what must be refused
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

import pellucid
from pellucid import cli
from pellucid.analytic import PCA
from pellucid.analytic.saved import load_estimator, save_estimator
from pellucid.data import ByteTokenizer
from pellucid.errors import CheckpointError, ConfigError, DataError, PellucidError
from pellucid.glass.opening import open_target
from pellucid.models import foreign, saved
from pellucid.training import open_run

SECONDS = 2.0
"""Of the processor, for one file; less than half of one where nothing else runs."""

MEMORY = 200_000_000
"""Bytes beyond twice the file that a process may grow by."""

# --- what is seen of a process ----------------------------------------------------------------------------

TRUSTED = tuple(
    {
        str(Path(place).resolve())
        for place in (
            *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
            Path(pellucid.__file__).parent,
            Path(__file__).parents[1],
        )
    }
)
"""Where code comes from that may run."""

GENERATES = ("/dataclasses.py", "/collections/__init__.py", "/typing.py", "/jaxtyping/_decorator.py")
"""Who runs code of its own making, and unpickles nothing."""

NEVER = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.", "pty.", "socket.")
NEVER += (
    "webbrowser.",
    "urllib.",
    "ftplib.",
    "smtplib.",
    "ctypes.dlopen",
    "builtins.input",
    "builtins.breakp",
)
NEVER += ("pickle.find_class", "os.putenv", "os.kill", "signal.pthread_kill", "syslog.")

AROUND = ("beartype", "jaxtyping", "equinox", "wadler_lindig", "encodings.cp437")
"""Imported to say in tests which shape was wrong; and by zipfile, for names."""

HARMLESS = {("ctypes.dlopen", "libnvidia-ml.so.1"), ("os.kill", "0")}
"""torch asks whether there is a GPU, and a shelf whether a process still lives."""

CHANGES = (
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
)
CHANGES += ("os.chown", "os.utime", "shutil.rmtree", "shutil.move", "shutil.copy")

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Witness:
    """An audit hook. What it sees it can only tell apart from good by what good files need: ``imports``."""

    def __init__(self, imports: set[str]) -> None:
        self.known, self.scratch, self.watching = imports, "", False
        self.harm: list[str] = []
        self.imports: set[str] = set()

    def begin(self, scratch: Path) -> None:
        self.scratch, self.harm, self.imports = os.path.realpath(scratch), [], set()

    def __call__(self, event: str, arguments: tuple) -> None:
        if not self.watching:
            return
        if event == "import":
            self.imports.add(str(arguments[0]))
            if (
                self.known
                and str(arguments[0]) not in self.known
                and not str(arguments[0]).startswith(AROUND)
            ):
                self.harm.append(f"import {arguments[0]}")
        elif event == "exec":
            where = getattr(arguments[0], "co_filename", "?")
            asked = sys._getframe(1).f_code.co_filename
            if not where.startswith((*TRUSTED, "<frozen ", "<@beartype")) and not asked.endswith(GENERATES):
                self.harm.append(f"exec {where} from {asked}")
        elif event == "open":
            path, mode, flags = arguments
            writes = bool(flags & WRITES) if isinstance(flags, int) else "r" not in str(mode)
            through = not (isinstance(flags, int) and flags & os.O_NOFOLLOW)
            if writes and not isinstance(path, int) and not self._inside(path, through):
                self.harm.append(f"open {path!r} {mode}")
        elif event in CHANGES:
            paths = [one for one in arguments if isinstance(one, str | bytes | os.PathLike)]
            self.harm += [f"{event} {one!r}" for one in paths if not self._inside(one)]
        elif event.startswith(NEVER) and (event, str(arguments[-1])) not in HARMLESS:
            self.harm.append(f"{event} {arguments!r}"[:200])

    def _inside(self, path: object, through: bool = True) -> bool:
        text = os.fsdecode(path)
        place = os.path.realpath(os.path.dirname(os.path.abspath(text)))
        if through and os.path.islink(text):  # what is written goes where it leads
            place = os.path.realpath(text)
        return text == os.devnull or place == self.scratch or place.startswith(self.scratch + os.sep)


def memory(what: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass(frozen=True)
class Job:
    """What to do in a child, in a folder that it may write to."""

    scratch: Path
    body: Callable[[], int]


def in_child(jobs: list[Job], imports: set[str]) -> list[dict]:
    """What came of each job: error, output, harm, seconds, bytes.

    One process does them all, as long as it lives; where it dies, another goes on behind the job that
    killed it.
    """
    found: list[dict] = []
    while len(found) < len(jobs):
        with tempfile.TemporaryFile() as told, tempfile.TemporaryFile() as output:
            sys.stdout.flush()
            sys.stderr.flush()
            pid = os.fork()
            if not pid:
                try:
                    _work(jobs[len(found) :], told.fileno(), output.fileno(), imports)
                finally:
                    os._exit(0)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            told.seek(0)
            output.seek(0)
            said = output.read()
            for line in told.read().splitlines():
                done = json.loads(line)
                found.append({**done, "output": said[done["from"] : done["to"]].decode(errors="replace")})
        if len(found) < len(jobs):
            found.append({"kind": "death", "error": f"it ended with {status}", "harm": [], "output": ""})
            found[-1] |= {"seconds": 0.0, "grown": 0}
    return found


def _work(jobs: list[Job], told: int, output: int, imports: set[str]) -> None:
    for number in (1, 2):
        os.dup2(output, number)
    sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(n, "w", closefd=False)) for n in (1, 2))
    sys.stdin = open(os.devnull)  # noqa: SIM115
    witness = Witness(imports)
    sys.addaudithook(witness)
    for job in jobs:
        signal.alarm(20)  # what hangs ends here, by a signal
        tempfile.tempdir = str(job.scratch)
        os.chdir(job.scratch)
        witness.begin(job.scratch)
        os.write(told, json.dumps(_observed(job.body, witness)).encode() + b"\n")


def _observed(body: Callable[[], int], witness: Witness) -> dict:
    Path("/proc/self/clear_refs").write_text("5")  # the peak of memory is that of now
    before, start, place = memory("VmHWM"), time.process_time(), os.lseek(1, 0, os.SEEK_CUR)
    found = {"error": "", "kind": "", "code": None}
    witness.watching = True
    try:
        found["code"] = body()
    except BaseException as error:
        witness.watching = False
        ours = isinstance(error, PellucidError)
        found |= {"kind": type(error).__name__ if ours else "foreign", "error": str(error)}
        if not ours:
            found["error"] = "".join(traceback.format_exception(error))[-3000:]
    witness.watching = False
    sys.stdout.flush()
    sys.stderr.flush()
    found |= {"seconds": time.process_time() - start, "grown": memory("VmHWM") - before}
    found |= {"from": place, "to": os.lseek(1, 0, os.SEEK_CUR)}
    return {**found, "harm": witness.harm, "imports": sorted(witness.imports)}


# --- what would do harm -----------------------------------------------------------------------------------


class Call:
    """Becomes what ``function(*arguments)`` returns when it is unpickled."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


CALLS = {
    "os.system": lambda c: Call(os.system, f"touch {c}"),
    "eval": lambda c: Call(eval, f"open({c!r}, 'w').close()"),
    "exec": lambda c: Call(exec, f"open({c!r}, 'w').close()"),
    "subprocess": lambda c: Call(subprocess.check_call, ["touch", c]),
    "open": lambda c: Call(open, c, "w"),
    "mkdir": lambda c: Call(os.mkdir, c),
}


def pickled(call, protocol):
    return lambda path, canary: path.write_bytes(pickle.dumps(CALLS[call](str(canary)), protocol))


def torch_file(call, **options):
    def write(path, canary):
        content = {"model": {"w": torch.ones(2), "x": CALLS[call](str(canary))}}
        torch.save(content, path, **options)  # noqa: TID251

    return write


def object_array(path, canary):
    with path.open("wb") as file:
        np.save(file, np.array([CALLS["os.system"](str(canary))], dtype=object))


def object_arrays(path, canary):
    with path.open("wb") as file:
        np.savez(file, w=np.ones(2), x=np.array([CALLS["mkdir"](str(canary))], dtype=object))


def distributed(path, canary):
    """A folder of PyTorch's distributed checkpoint, whose ``.metadata`` is a pickle."""
    path.mkdir()
    (path / ".metadata").write_bytes(pickle.dumps(CALLS["os.system"](str(canary))))


def without_care(path):
    """As it is read by whoever takes no care."""
    if path.is_dir():
        from torch.distributed.checkpoint import FileSystemReader

        FileSystemReader(path).read_metadata()
        return 0
    readers = (
        lambda: torch.load(path, weights_only=False),  # noqa: TID251
        lambda: np.load(path, allow_pickle=True),
        lambda: dict(np.load(path, allow_pickle=True)),
        lambda: pickle.loads(path.read_bytes()),  # noqa: S301
        lambda: yaml.unsafe_load(path.read_text()),
    )
    for reader in readers:
        with contextlib.suppress(Exception):
            reader()
    return 0


ARMED_WEIGHTS = {
    **{
        f"pickle {protocol}, {call}": pickled(call, protocol)
        for protocol, call in enumerate(("os.system", "eval", "exec", "subprocess", "open", "mkdir"))
    },
    **{f"torch, {call}": torch_file(call) for call in CALLS},
    **{
        f"old torch, {call}": torch_file(call, _use_new_zipfile_serialization=False)
        for call in ("os.system", "eval", "subprocess")
    },
    "torch, protocol 5": torch_file("exec", pickle_protocol=5),
    "npy of objects": object_array,
    "npz of objects": object_arrays,
    "distributed checkpoint": distributed,
}


def zip_of(*members, compression=zipfile.ZIP_STORED):
    """A state dict as torch zips it, and these members."""

    def write(path, canary):
        good = io.BytesIO()
        torch.save({"w": torch.ones(2)}, good)  # noqa: TID251
        with (
            zipfile.ZipFile(good) as source,
            zipfile.ZipFile(path, "w", compression) as archive,
            warnings.catch_warnings(action="ignore"),
        ):
            for member in source.infolist():
                archive.writestr(member.filename, source.read(member))
            for name, data in members:
                archive.writestr(name, data)

    return write


def encrypted(path, canary):
    zip_of()(path, canary)
    data = bytearray(path.read_bytes())
    for mark, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = data.find(mark)
        while at >= 0:
            data[at + flags] |= 1
            at = data.find(mark, at + 4)
    path.write_bytes(data)


def zip_bomb(path, canary):
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("a/data.pkl", "w") as member,
    ):
        for _ in range(64):
            member.write(bytes(1 << 20))


def torchscript(path, canary):
    with warnings.catch_warnings(action="ignore"):
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), path)


def tar(path, canary):
    data = pickle.dumps(CALLS["os.system"](str(canary)), 2)
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "storages", "tensors", "pickle"):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def content(data):
    return lambda path, canary: path.write_bytes(data)


def link_to(target):
    return lambda path, canary: path.symlink_to(target)


def listening(path, canary):
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path is at most a hundred characters
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)
    os.chdir(here)


SPAN = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def tensors(header, data=bytes(8), length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return content(struct.pack("<Q", len(text) if length is None else length) + text + data)


def sparse(header, size):
    """A file as long as it says, that takes no room on the disk."""

    def write(path, canary):
        tensors(header, b"")(path, canary)
        os.truncate(path, path.stat().st_size + size)

    return write


ONE = json.dumps(SPAN)
DEEP = b"[" * 100_000 + b"]" * 100_000

SPECIAL = {
    "pipe": lambda path, canary: os.mkfifo(path),
    "socket": listening,
    "/dev/zero": link_to("/dev/zero"),
    "/etc/passwd": link_to("/etc/passwd"),
    "a link to itself": lambda path, canary: path.symlink_to(path),
    "folder": lambda path, canary: path.mkdir(),
}

WEIGHTS = {
    **ARMED_WEIGHTS,
    **SPECIAL,
    "TorchScript": torchscript,
    "tar": tar,
    "zip that leads out": zip_of(("archive/../../../out", b"x")),
    "zip from the root": zip_of(("/etc/cron.d/x", b"x")),
    "zip with a name twice": zip_of(("archive/data.pkl", b"N.")),
    "zip that is encrypted": encrypted,
    "zip bomb": zip_bomb,
    "pickle in gzip": lambda path, c: path.write_bytes(gzip.compress(pickle.dumps(CALLS["mkdir"](str(c))))),
    "empty": content(b""),
    "a page": content(b"<!DOCTYPE html><script>fetch('//x')</script>" * 99),
    "1e17 of header": tensors({"w": SPAN}, length=10**17),
    "all of 64 bits of header": tensors({"w": SPAN}, length=2**64 - 1),
    "header is no JSON": tensors(b"{" * 64),
    "header is deep": tensors(b'{"w": ' + DEEP + b"}"),
    "header is a list": tensors(b"[" + ONE.encode() + b"]"),
    "negative offset": tensors({"w": {**SPAN, "data_offsets": [-8, 0]}}),
    "overlapping": tensors({"w": SPAN, "v": SPAN}),
    "backwards": tensors({"w": {**SPAN, "data_offsets": [8, 0]}}),
    "beyond the end": tensors({"w": {**SPAN, "data_offsets": [0, 800]}}),
    "shape of a petabyte": tensors({"w": {**SPAN, "shape": [1 << 48], "data_offsets": [0, 4 << 48]}}),
    "shape that wraps around": tensors({"w": {**SPAN, "shape": [1 << 32, 1 << 32, 2]}}),
    "shape of nothing, huge": tensors(
        {"w": {**SPAN, "shape": [0, 1 << 62, 1 << 62], "data_offsets": [0, 0]}}, b""
    ),
    "shape of a million sides": tensors({"w": {**SPAN, "shape": [1] * 1_000_000 + [2]}}),
    "dtype os.system": tensors({"w": {**SPAN, "dtype": "os.system"}}),
    "names that lead out": tensors({"../../../etc/passwd": SPAN}),
    "names of many lines": tensors({"a\n\n\n\n\n\n\x1b[2J\x1b]0;x\x07" + "b" * 10**6: SPAN}),
    "a name twice": tensors(f'{{"w": {ONE}, "w": {ONE}}}'.encode()),
    "metadata that calls": tensors({"__metadata__": {"_target_": "os.system", "args": "true"}, "w": SPAN}),
    "metadata that is no text": tensors({"__metadata__": {"a": {"b": [1]}}, "w": SPAN}),
    "ten thousand tensors of nothing": tensors(
        {f"w{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(10_000)}, b""
    ),
    "four gigabytes of holes": sparse(
        {"w": {"dtype": "U8", "shape": [1 << 32], "data_offsets": [0, 1 << 32]}}, 1 << 32
    ),
}

# What is put into a good config.json: text, or a change to its dict.
IGNORED = "ignored"  # marks what is opened all the same, for the part that would do harm is never looked at


def with_args(**arguments):
    return lambda config: config["model_args"].update(arguments)


def with_cfg(**entries):
    return lambda config: config["pretrained_cfg"].update(entries)


def of_timm(name, **arguments):
    def change(config):
        config["architecture"] = name
        config["model_args"] = arguments

    return change


def changed(**entries):
    return lambda config: config.update(entries)


CONFIGS = {
    **SPECIAL,
    "deep": DEEP,
    "deep in an option": lambda text: text.replace(b'"depth": 1', b'"depth": ' + DEEP),
    "forty megabytes": b'{"architecture": "' + b"a" * 40_000_000 + b'"}',
    "an integer of a million digits": lambda text: text.replace(b'"depth": 1', b'"depth": 1' + b"0" * 10**6),
    "not UTF-8": b'{"architecture": "\xff\xfe"}',
    "NUL": b"\0" * 1000,
    **{
        f"architecture {name[:20]!r}": changed(architecture=name)
        for name in (
            "../../x",
            "os:system",
            "os.system",
            "builtins.eval",
            "hf-hub:someone/model",
            "local-dir:/etc",
            "hf_hub:x",
            "__import__('os').system('true')",
            "a\n\n\n\n\n\nb\x1b[2J",
            "x" * 10**6,
            "",
        )
    },
    "architecture a list": changed(architecture=["crate_digits"]),
    "architecture a call": changed(architecture={"_target_": "os.system", "_args_": ["true"]}),
    "a billion layers": with_args(depth=10**9),
    "a million layers": with_args(depth=10**6),
    "a hundred thousand layers": with_args(depth=10**5),
    "a billion wide": with_args(embed_dim=10**9),
    "two hundred thousand wide": with_args(embed_dim=200_000, num_heads=2),
    "a hundred thousand pixels wide": with_args(img_size=100_000),
    "images of a billion pixels a side": with_args(img_size=[10**9, 10**9]),
    "1e100 layers": with_args(depth=10**100),
    "1e9 classes": changed(num_classes=10**9),
    "infinite classes": changed(num_classes=float("inf")),
    "negative": with_args(depth=-1, embed_dim=-64),
    "patches of nothing": with_args(patch_size=0),
    "no number": with_args(depth="__import__('os').system('true')"),
    "nan": with_args(embed_dim=float("nan")),
    "a call": with_args(_target_="os.system", _args_=["true"]),
    "a class": with_args(__class__="os.system"),
    "a hook": with_args(norm_layer={"_target_": "os.system"}, act_layer="os.system"),
    "another file": with_args(checkpoint_path="/etc/passwd"),
    "timm, a layer by name": of_timm("vit_tiny_patch16_224", norm_layer="os.system", act_layer="os.system"),
    "timm, a billion layers": of_timm("vit_tiny_patch16_224", depth=10**9),
    "timm, a thousand layers": of_timm("vit_tiny_patch16_224", depth=10**3, embed_dim=768),
    "timm, a huge one": of_timm("vit_giant_patch14_224"),
    "timm, huge images": of_timm("vit_tiny_patch16_224", img_size=10**6),
    "timm, another file": of_timm("vit_tiny_patch16_224", pretrained_cfg={"file": "/etc/passwd"}),
    "input of a billion pixels a side": with_cfg(input_size=[1, 10**9, 10**9]),
    "input of text": with_cfg(input_size="os.system"),
    "mean of text": with_cfg(mean=["os.system"]),
    "std that is not finite": with_cfg(std=[float("nan")]),
    "names that are none": with_cfg(label_names={"_target_": "os.system"}),
    "auto_map": (IGNORED, changed(auto_map={"AutoModel": "evil.Model", "AutoConfig": "evil--x.Config"})),
    "keys of others": (IGNORED, changed(_target_="os.system", _instantiator="os.system", __class__="x")),
    "weights elsewhere": (
        IGNORED,
        with_cfg(url="file:///etc/passwd", hf_hub_id="someone/x", custom_load=True),
    ),
    "a name twice": (IGNORED, lambda text: text.replace(b"{", b'{"architecture": "os.system",', 1)),
}


def bomb(depth=40):
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, depth)]
    return "\n".join([*lines, f"model_args: {{depth: *a{depth - 1}}}", f"data: *a{depth - 1}"])


ARMED_OPTIONS = {
    "apply os.system": "data: !!python/object/apply:os.system ['touch CANARY']",
    "apply eval": "data: !!python/object/apply:eval [\"open('CANARY', 'w')\"]",
    "apply check_call": "data: !!python/object/apply:subprocess.check_call [['touch', 'CANARY']]",
    "apply mkdir": "? !!python/object/apply:os.mkdir ['CANARY']\n: 1",
}
OPTIONS = {
    **ARMED_OPTIONS,
    "new Popen": "data: !!python/object/new:subprocess.Popen [['touch', 'CANARY']]",
    "a name": "data: !!python/name:os.system",
    "a module": "data: !!python/module:antigravity",
    "bomb of aliases": bomb(),
    "bomb of merges": "\n".join(
        ["a0: &a0 {x: 1}"] + [f"a{i}: &a{i} {{l: *a{i - 1}, r: *a{i - 1}}}" for i in range(1, 40)]
    ),
    "itself": "model_args: &a {depth: *a}\ndata: digits",
    "deep": "data: " + "[" * 2000 + "]" * 2000,
    "ten megabytes": "data: digits\n" + "# x\n" * 2_500_000,
    "a key of a megabyte": "x" * 100_000 + ": 1\ndata: digits",
    "model that leads out": "data: digits\nmodel_args: ../../../x",
    "objective": "data: digits\nobjective: os:system",
    "data that are no name": 'data: "\\0"',
    "a path of 100,000": "data: " + "x/" * 50_000,
    "a list": "- data\n- digits",
    "nothing": "",
    "binary": "data: !!binary aGVsbG8=",
    "an unknown tag": "data: !evil {a: b}",
}

RESULTS = {
    "deep": DEEP,
    "no JSON": b"{",
    "a list": b"[1]",
    "a call": b'{"measures": {"_target_": "os.system"}, "accuracy": "os.system"}',
    "pipe": SPECIAL["pipe"],
    "/dev/zero": SPECIAL["/dev/zero"],
}

LOGS = {
    "deep": (IGNORED, DEEP),
    "no objects": (IGNORED, b"[1]\n3\nnull\n"),
    "lines of anything": (
        IGNORED,
        b'{"step": {}, "split": []}\n{"step": 1, "epoch": 1, "split": "test", "loss": {}}\n',
    ),
    "pipe": SPECIAL["pipe"],
    "/dev/zero": SPECIAL["/dev/zero"],
}


# A checkpoint is signed: whoever makes one signs it too. Each is made of the folder of a stopped run.


def sign(step):
    files = {path.name: digest(path) for path in step.iterdir() if path.name != "MANIFEST.json"}
    (step / "MANIFEST.json").write_text(json.dumps({"schema": 1, "files": files}))


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def last(run):
    return max((run / "checkpoints").glob("step-*"))


def in_checkpoint(name, payload):
    def write(run, canary):
        spoil(last(run) / name, payload, canary)
        sign(last(run))

    return write


def in_run(name, payload):
    return lambda run, canary: spoil(run / name, payload, canary)


def manifest_of(**files):
    def write(run, canary):
        manifest = last(run) / "MANIFEST.json"
        found = json.loads(manifest.read_text())
        manifest.write_text(json.dumps({**found, "files": {**found["files"], **files}}))

    return write


def as_distributed(run, canary):
    """PyTorch's own distributed checkpoint in place of ours, with a pickle for its list of contents."""
    step = last(run)
    (step / "state.safetensors").unlink()
    (step / ".metadata").write_bytes(pickle.dumps(CALLS["os.system"](str(canary))))
    (step / "__0_0.distcp").write_bytes(pickle.dumps(CALLS["mkdir"](str(canary))))
    sign(step)


def with_pickle_beside(run, canary):
    (last(run) / ".metadata").write_bytes(pickle.dumps(CALLS["os.system"](str(canary))))


def rows_of_a_petabyte(run, canary):
    step = last(run)
    (step / "state.safetensors").unlink()
    where = {"w": {"saved_offsets": [1 << 48]}}
    header = {"__metadata__": {"DCP_SHARDING_INFO": json.dumps(where)}, "w": SPAN}
    tensors(header)(step / "shard-00001-model-00001-of-00001.safetensors", canary)
    sign(step)


def log_through_a_link(run, canary):
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").symlink_to(canary)


def lock_through_a_link(run, canary):
    (run / "run.lock").unlink(missing_ok=True)
    (run / "run.lock").symlink_to(canary)


CHECKPOINTS = {
    "state is deep": in_checkpoint("state.json", DEEP),
    "state is a list": in_checkpoint("state.json", b"[]"),
    "state of nothing": in_checkpoint("state.json", b'{"step": 3}'),
    "state of text": in_checkpoint("state.json", b'{"step": "os.system", "data": []}'),
    "tensors of another": in_checkpoint("state.safetensors", tensors({"os.system": SPAN})),
    "tensors are a pickle": in_checkpoint("state.safetensors", pickled("os.system", 4)),
    "tensors are torch's": in_checkpoint("state.safetensors", torch_file("os.system")),
    "shape of a petabyte": in_checkpoint("state.safetensors", WEIGHTS["shape of a petabyte"]),
    "rows of a petabyte": rows_of_a_petabyte,
    "a distributed checkpoint": as_distributed,
    "a pickle beside it": (IGNORED, with_pickle_beside),
    "manifest is deep": in_run("checkpoints/step-99999999", lambda path, canary: deep_manifest(path)),
    "manifest names /etc/passwd": manifest_of(**{"/etc/passwd": "0"}),
    "manifest names /dev/zero": manifest_of(**{"/dev/zero": "0"}),
    "manifest leads out": manifest_of(**{"../../../../etc/passwd": "0"}),
    "manifest of a call": manifest_of(_target_="os.system"),
    "log through a link": log_through_a_link,
    "lock through a link": lock_through_a_link,
    "lock is a pipe": in_run("run.lock", SPECIAL["pipe"]),
}


def deep_manifest(step):
    """Of the only checkpoint that there is."""
    last(step.parents[1]).rename(step)
    (step / "MANIFEST.json").write_bytes(DEEP)


TOKENIZERS = {
    "deep": DEEP,
    "a call": changed(model={"type": "os.system", "_target_": "os.system"}),
    "a template that calls": (
        IGNORED,
        changed(post_processor={"type": "TemplateProcessing", "single": "os.system"}),
    ),
    "a rule that never ends": changed(
        pre_tokenizer={
            "type": "Split",
            "pattern": {"Regex": "(a*)*(a*)*(a*)*$"},
            "behavior": "Isolated",
            "invert": 0,
        }
    ),
    "words of 1e12": changed(added_tokens=[{"id": 10**12, "content": "x", "special": True}]),
    "a pickle": pickled("os.system", 4),
    **{name: SPECIAL[name] for name in ("/dev/zero", "/etc/passwd", "folder")},
}

ESTIMATORS = {
    "deep": DEEP,
    "a class of others": changed(estimator="os.system"),
    "a class that is a list": changed(estimator=["PCA"]),
    "a module of others": lambda config: config["state"].update(components_={"module": "os.system"}),
    "options of others": lambda config: config["options"].update(_target_="os.system"),
    "strings of another kind": lambda config: config["state"].update(x={"strings": {"a": 1}, "dtype": "O"}),
    "a million lists": lambda text: (
        b'{"schema": 1, "estimator": "PCA", "options": {}, "state": {"x": '
        + (b'{"list": [' * 300 + b"1" + b"]}" * 300)
        + b"}}" * 2
    ),
    "pipe": SPECIAL["pipe"],
    "/dev/zero": SPECIAL["/dev/zero"],
}

HEADER = struct.Struct("<8sII")


def bundle(header, data=bytes(64), length=None):
    return content(HEADER.pack(b"pellucid", 1, len(header) if length is None else length) + header + data)


def array(**entry):
    found = {"dtype": "uint8", "shape": [8], "offset": 0, **entry}
    return bundle(json.dumps({"arrays": [found], "content": {"array": 0}}).encode())


BUNDLES = {
    "deep": bundle(DEEP),
    "header of 4 GB": bundle(b"{}", length=2**32 - 1),
    "array of a petabyte": array(shape=[1 << 50]),
    "array that wraps around": array(shape=[1 << 32, 1 << 32]),
    "array of objects": array(dtype="object"),
    "array from before": array(offset=-64),
    "a pickle": pickled("os.system", 4),
    "no answers": bundle(b'{"arrays": [], "content": {}}'),
}

CARRIED = {
    "auto_map": changed(auto_map={"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}),
    "auto_map elsewhere": changed(auto_map={"AutoModelForCausalLM": "someone/evil--evil.Model"}),
    "another kind": changed(model_type="os.system", architectures=["os.system"]),
    "an attention of others": changed(
        _attn_implementation="someone/evil", attn_implementation="someone/evil"
    ),
    "a call": changed(_target_="os.system", _instantiator="os.system", torch_dtype="os.system"),
    "deep": DEEP,
}


def carrying(change):
    """A folder for transformers with a module that leaves a canary when imported, and weights in a pickle."""

    def write(folder, canary):
        (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w').close()")
        spoil(folder / "config.json", change, canary)
        torch_file("os.system")(folder / "pytorch_model.bin", canary)

    return write


def pickle_alone(folder, canary):
    (folder / "model.safetensors").unlink()
    torch_file("os.system")(folder / "pytorch_model.bin", canary)


# --- the doors --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Good:
    """What is good at each door, to be copied and spoilt."""

    run: Path
    half: Path
    text: Path
    carried: Path
    estimator: Path
    bundle: Path
    weights: Path


SMALL = ["--model", "crate_digits", "--depth", "1", "--batch-size", "512", "--epochs", "1", "--no-report"]
SMALL += ["--threads", "1"]


def command(*arguments) -> int:
    return cli.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    root = tmp_path_factory.mktemp("good")
    assert command("train", "digits", "--out", root / "run", *SMALL) == 0
    shutil.copytree(root / "run", root / "half")
    shutil.rmtree(root / "half" / "model")
    (root / "half" / "result.json").unlink()
    options = {"embed_dim": 16, "depth": 1, "num_heads": 2, "context": 32}
    text = pellucid.create_model("crate_gpt_bytes", vocab_size=257, **options)
    cli._save_text_model(text, root / "text")
    (root / "text" / "tokenizer.json").write_text(ByteTokenizer().to_json())
    from pellucid.hf import save_folder

    save_folder(text, root / "carried")
    (root / "estimator").mkdir()
    for name, data in save_estimator(PCA(n_components=2).fit(torch.randn(20, 4))).items():
        (root / "estimator" / name).write_bytes(data)
    bundled = ["audit", root / "run", "digits", "--limit", "2", "--bundle", root / "bundle"]
    assert command(*bundled) == 0
    weights = root / "weights.safetensors"
    save_file({name: value.clone() for name, value in text.state_dict().items()}, weights)
    return Good(
        root / "run",
        root / "half",
        root / "text",
        root / "carried",
        root / "estimator",
        root / "bundle",
        weights,
    )


def in_this_process(path, key, folder):
    """The foreign reader, in the child that is forked anyway, in place of one more process."""
    foreign._main(str(path.resolve()), str(folder), *([] if key is None else [key]))


def convert(file):
    foreign._read_aside = in_this_process
    return command("convert", file, "--out", "converted")


def init_from(path):
    return command("train", "digits", "--init-from", path, "--out", "begun", *SMALL)


def copy_weights(path):
    """What ``train --init-from`` does with them, without the training."""
    saved.copy_weights(pellucid.create_model("crate_digits", depth=1), path)
    return 0


def resume(run):
    return command("train", "digits", "--out", run, "--resume", *SMALL)


def carried(folder):
    """transformers, with the kinds of ours: what it says is its own, so only that nothing runs is asked."""
    import transformers

    with contextlib.suppress(Exception):
        transformers.AutoModelForCausalLM.from_pretrained(folder)
    return 0


DOORS = {
    "load": lambda path: bool(pellucid.load(path)) - 1,
    "open_run": lambda path: len(open_run(path).metrics) * 0,
    "init-from": init_from,
    "copy_weights": copy_weights,
    "convert": convert,
    "audit": lambda path: command("audit", path, "digits", "--limit", "2"),
    "evaluate": lambda path: command("evaluate", path),
    "report": lambda path: command("report", path),
    "resume": resume,
    "generate": lambda path: command("generate", path, "a", "--max-new-tokens", "1"),
    "transformers": carried,
    "estimator": lambda path: bool(load_estimator(path)) - 1,
    "view": lambda path: bool(open_target(str(path))) - 1,
}
COMMANDS = {"init-from", "convert", "audit", "evaluate", "report", "resume", "generate"}


@pytest.fixture(scope="module")
def needed(good, tmp_path_factory):
    """``needed(door) -> names`` of all that a good file there, and a refusal, have imported."""
    places = {
        "load": good.run, "open_run": good.run, "init-from": good.run, "copy_weights": good.run,
        "convert": good.weights,
        "audit": good.run, "evaluate": good.run, "report": good.run, "resume": good.half,
        "generate": good.text, "transformers": good.carried, "estimator": good.estimator, "view": good.bundle,
    }  # fmt: skip

    @functools.cache
    def find(door: str) -> set[str]:
        scratch = tmp_path_factory.mktemp("needed")
        place = scratch / places[door].name
        if places[door].is_dir():
            shutil.copytree(places[door], place)
        else:
            shutil.copy(places[door], place)
        (found,) = in_child([Job(scratch, lambda: DOORS[door](place))], set())
        # What is converted there is of no published layout, which is said at the very end.
        assert (found["kind"], found["code"]) == (
            "",
            CheckpointError.exit_code if door == "convert" else 0,
        ), (door, found)
        assert not found["harm"], (door, found["harm"])
        return {"nothing", *found["imports"]}

    return find


def spoil(path: Path, payload, canary: Path) -> None:
    """Put a payload in the place of a file: bytes, text, a change to what stands there, or what writes it."""
    if isinstance(payload, str):
        payload = payload.replace("CANARY", str(canary)).encode()
    if isinstance(payload, bytes):
        path.write_bytes(payload)
    elif payload.__code__.co_argcount == 2:
        if not path.is_dir():
            path.unlink(missing_ok=True)
        payload(path, canary)
    elif "text" in payload.__code__.co_varnames:
        path.write_bytes(payload(path.read_bytes()))
    else:
        content = json.loads(path.read_bytes())
        payload(content)
        path.write_text(json.dumps(content))


@dataclass(frozen=True)
class Case:
    door: str
    name: str
    base: str
    file: str
    payload: object

    @property
    def ignored(self) -> bool:
        return isinstance(self.payload, tuple)

    @property
    def spoilt(self) -> object:
        return self.payload[1] if isinstance(self.payload, tuple) else self.payload

    def __hash__(self) -> int:
        return hash((self.door, self.file, self.name))

    def __str__(self) -> str:
        return f"{self.door}-{self.file or 'file'}-{self.name}"


def cases():
    for name, payload in WEIGHTS.items():
        yield Case("load", name, "run", "model/model.safetensors", payload)
        yield Case("copy_weights", name, "", "", payload)
        if name in ("torch, os.system", "distributed checkpoint", "pipe", "1e17 of header", "a name twice"):
            yield Case("init-from", name, "", "", payload)
        yield Case("convert", name, "", "", payload)
    for name in ("torch, os.system", "pipe", "/dev/zero", "names of many lines", "1e17 of header"):
        for door in ("init-from", "audit", "evaluate", "report"):
            yield Case(door, name, "run", "model/model.safetensors", WEIGHTS[name])
    for name, payload in CONFIGS.items():
        yield Case("load", name, "run", "model/config.json", payload)
    for name in ("deep", "architecture 'os:system'", "input of a billion pixels a side", "a billion layers"):
        for door in ("audit", "evaluate", *(["init-from"] if name != "a billion layers" else [])):
            yield Case(
                door, name, "run", "model/config.json", CONFIGS[name]
            )  # init-from takes no size from it
    for name, payload in OPTIONS.items():
        yield Case("open_run", name, "run", "config.yaml", payload)
        if name in ("apply os.system", "bomb of aliases", "data that are no name", "a path of 100,000"):
            yield Case("evaluate", name, "run", "config.yaml", payload)
    for name, payload in RESULTS.items():
        yield Case("report", name, "run", "result.json", payload)
    for name, payload in LOGS.items():
        yield Case("open_run", name, "run", "metrics.jsonl", payload)
    for name, payload in CHECKPOINTS.items():
        yield Case("resume", name, "half", "", payload)
    for name, payload in TOKENIZERS.items():
        yield Case("generate", name, "text", "tokenizer.json", payload)
    for name, payload in ESTIMATORS.items():
        yield Case("estimator", name, "estimator", "estimator.json", payload)
    for name in ("torch, os.system", "1e17 of header", "pipe", "shape of a petabyte"):
        yield Case("estimator", name, "estimator", "estimator.safetensors", WEIGHTS[name])
    for name, payload in BUNDLES.items():
        yield Case("view", name, "", "", payload)
    for name, change in CARRIED.items():
        yield Case("transformers", name, "carried", "", carrying(change))
    yield Case("transformers", "a pickle alone", "carried", "", pickle_alone)


CASES = list(cases())
REASONS = {
    "init-from": {CheckpointError, ConfigError},
    "view": {DataError, ConfigError},
    "generate": {CheckpointError, DataError},
    "evaluate": {CheckpointError, ConfigError, DataError},
    "audit": {CheckpointError, ConfigError},
    "report": {CheckpointError, ConfigError},
    "open_run": {CheckpointError, ConfigError},
}
"""What an error may be of; a CheckpointError elsewhere."""


@pytest.fixture(scope="module")
def opened(good, needed, tmp_path_factory):
    """``opened(case) -> dict``: what came of it, done together with all others of the same door."""

    @functools.cache
    def at(door: str) -> dict[Case, dict]:
        jobs, sizes, root, ours = (
            [],
            [],
            tmp_path_factory.mktemp("opened"),
            [c for c in CASES if c.door == door],
        )
        for number, case in enumerate(ours):
            scratch, canary = root / f"{number}", root / f"canary-{number}"
            place = scratch / (case.base or "file")
            scratch.mkdir()
            if case.base:
                shutil.copytree(getattr(good, case.base), place)
            spoil(place / case.file, case.spoilt, canary)
            files = [path for path in (place, *place.rglob("*")) if path.is_file()]
            sizes.append(sum(path.stat().st_size for path in files))
            jobs.append(Job(scratch, functools.partial(DOORS[door], place)))
        found = in_child(jobs, needed(door))
        canaries = [os.path.lexists(root / f"canary-{number}") for number in range(len(ours))]
        together = zip(found, sizes, canaries, strict=True)
        shutil.rmtree(root, ignore_errors=True)
        return {
            case: {**one, "size": size, "canary": canary}
            for case, (one, size, canary) in zip(ours, together, strict=True)
        }

    return lambda case: at(case.door)[case]


FIRST = {"load", "init-from", "convert", "view"}
"""Doors at which every run of the tests knocks; the slow tests knock at the others."""


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[] if case.door in FIRST else pytest.mark.slow) for case in CASES],
    ids=str,
)
def test_nothing_runs(case, opened):
    """One message, in a moment, and no trace: not of what the file would have run, read or asked for."""
    found = opened(case)
    assert not found["canary"], found
    # transformers asks whether it may run what a folder carries, and is not answered.
    asked = {"builtins.input"} if case.door == "transformers" else set()
    assert not [line for line in found["harm"] if line.split()[0] not in asked], found
    said = found["output"] + found["error"]
    assert "root:" not in said
    assert found["seconds"] < SECONDS, found
    assert found["grown"] < 2 * min(found["size"], 1 << 28) + MEMORY, found
    if case.door == "transformers":
        return
    if case.ignored:
        assert found["kind"] == "", said
        assert found["code"] == 0, said
        return
    assert "Traceback" not in said, said
    allowed = REASONS.get(case.door, {CheckpointError})
    if case.door in COMMANDS:
        assert found["kind"] == "", said
        assert found["code"] in {kind.exit_code for kind in allowed}, said
        message = said[said.rindex("error: ") :].strip()
    else:
        assert found["kind"] in {kind.__name__ for kind in allowed}, said
        message = found["error"].strip()
    assert len(message.splitlines()) <= 5, message
    assert 20 < len(message) < 1500, message
    assert message.replace("\n", "").isprintable(), message


def test_there_are_enough_of_them():
    files = {(case.file, case.name) for case in CASES}
    assert len(files) >= 150
    assert {case.door for case in CASES} == set(DOORS)


# --- and that this would be seen --------------------------------------------------------------------------


ARMED = ARMED_WEIGHTS | ARMED_OPTIONS


@pytest.fixture(scope="module")
def read_plainly(tmp_path_factory):
    root = tmp_path_factory.mktemp("armed")
    places = {name: root / f"{number}" / "file" for number, name in enumerate(ARMED)}
    for name, place in places.items():
        place.parent.mkdir()
        spoil(place, ARMED[name], place.parent.with_suffix(".canary"))
    jobs = [Job(place.parent, functools.partial(without_care, place)) for place in places.values()]
    found = dict(zip(ARMED, in_child(jobs, set()), strict=True))
    return {
        name: (found[name], place.parent.with_suffix(".canary").exists()) for name, place in places.items()
    }


@pytest.mark.parametrize("name", ARMED)
def test_read_without_care_they_do_harm(name, read_plainly):
    """The canary is there, and the hook has seen what left it."""
    found, canary = read_plainly[name]
    assert canary, found
    assert found["harm"], found


def test_the_hook_sees_what_is_imported(tmp_path):
    (tmp_path / "evil.py").write_text("x = 1")

    def body():
        sys.path.insert(0, str(tmp_path))
        import evil  # noqa: F401

        return 0

    (found,) = in_child([Job(tmp_path, body)], {"nothing"})
    assert "import evil" in found["harm"]
    assert any(line.startswith("exec ") for line in found["harm"])


def test_what_takes_long_or_much_or_kills_is_seen(tmp_path):
    def long():
        until = time.process_time() + SECONDS
        while time.process_time() < until:
            pass

    bodies = [lambda: len(b"x" * (300 << 20)) * 0, os.abort, long, lambda: 0]
    much, death, took, good = in_child([Job(tmp_path, body) for body in bodies], set())
    assert much["grown"] > MEMORY
    assert death["kind"] == "death"
    assert took["seconds"] >= SECONDS
    assert (good["code"], good["kind"], good["harm"]) == (0, "", [])
    assert good["grown"] < MEMORY
    assert good["seconds"] < SECONDS
