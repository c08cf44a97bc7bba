"""The files door: killed, torn, flipped, full, or locked, the newest whole state is what loads."""

import builtins
import errno
import json
import os
import resource
import signal
import time
from pathlib import Path

import pytest
import torch

from pellucid.errors import CheckpointError, ConfigError, NumericsError, ResourceError
from pellucid.training import checkpoint
from pellucid.training.checkpoint import (
    load_checkpoint,
    locked,
    new_folder,
    save_checkpoint,
    sweep,
    write_file,
)


def state(step):
    generator = torch.Generator().manual_seed(step)
    return {
        "objective/w": torch.randn(3, 5, generator=generator),
        "optimizer/w/step": torch.tensor(float(step)),
        "optimizer/half": torch.randn(4, generator=generator).bfloat16(),
        "count": torch.tensor([step]),
        "empty": torch.empty(0, 2),
    }


def save(folder, step):
    return save_checkpoint(folder, step, state(step), {"window": {"loss": step / 3}, "data": "abc"})


def assert_is(saved, step):
    assert saved.step == step
    assert saved.meta == {"window": {"loss": step / 3}, "data": "abc"}
    assert saved.tensors.keys() == state(step).keys()
    for name, value in state(step).items():
        assert saved.tensors[name].dtype == value.dtype
        assert torch.equal(saved.tensors[name], value), name


def names(folder):
    return sorted(path.name for path in folder.iterdir())


class FileSystem:
    """Every change that the files door makes, counted, recorded, and made to fail where asked.

    Args:
        before: called with the number and name of each operation before it is done.
        torn: called with a file and its content in place of each write.
    """

    def __init__(self, patch, before=lambda number, name: None, torn=None):
        self.log: list[tuple[str, str]] = []
        self.before, self.torn = before, torn
        for name in ("rename", "replace", "mkdir", "unlink", "rmdir", "ftruncate"):
            patch.setattr(os, name, self.counted(name, getattr(os, name)))
        patch.setattr(os, "fsync", self.counted("fsync", os.fsync))
        patch.setattr(checkpoint, "open", self.open, raising=False)

    def note(self, name, path):
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        self.log.append((name, Path(path).name))
        self.before(len(self.log) - 1, name)

    def counted(self, name, real):
        def operation(path, *args, **kwargs):
            self.note(name, path)
            return real(path, *args, **kwargs)

        return operation

    def open(self, path, mode):
        self.note("open", path)
        file = builtins.open(path, mode)  # noqa: SIM115
        return Writes(file, self) if "w" in mode else file


class Writes:
    """A file whose writes are counted too."""

    def __init__(self, file, system):
        self.file, self.system = file, system

    def write(self, content):
        self.system.note("write", self.file.name)
        if self.system.torn is not None:
            self.system.torn(len(self.system.log) - 1, self.file, content)
        return self.file.write(content)

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *exception):
        return self.file.__exit__(*exception)

    def __getattr__(self, name):
        return getattr(self.file, name)


def operations(work):
    """What ``work`` does to the disk, in order."""
    with pytest.MonkeyPatch.context() as patch:
        system = FileSystem(patch)
        work()
    return system.log


def crash(in_child, work, at, torn=False):
    """Do ``work`` in a process that dies just before operation ``at``, or in the middle of it."""

    def body():
        def before(number, name):
            if number == at and not torn:
                os._exit(77)

        def tear(number, file, content):
            if number == at:
                file.write(content[: len(content) // 2])
                file.flush()
                os._exit(77)

        with pytest.MonkeyPatch.context() as patch:
            FileSystem(patch, before, tear if torn else None)
            work()

    return in_child(body)


# --- round trip and pruning ---------------------------------------------------------------------------


def test_what_is_saved_is_what_loads(tmp_path):
    save(tmp_path / "c", 7)
    assert_is(load_checkpoint(tmp_path / "c"), 7)
    assert names(tmp_path / "c" / "step-00000007") == ["MANIFEST.json", "state.json", "state.safetensors"]


def test_no_checkpoint_is_none(tmp_path):
    assert load_checkpoint(tmp_path) is None
    assert load_checkpoint(tmp_path / "nowhere") is None


def test_two_are_kept(tmp_path):
    for step in (3, 9, 10, 200):
        save(tmp_path, step)
    assert names(tmp_path) == ["step-00000010", "step-00000200"]


def test_saving_a_step_twice_leaves_it_alone(tmp_path):
    stamp = (save(tmp_path, 3) / "state.json").stat().st_ino
    assert operations(lambda: save(tmp_path, 3)) == []
    assert (tmp_path / "step-00000003" / "state.json").stat().st_ino == stamp


def test_a_new_checkpoint_is_never_the_one_to_go(tmp_path):
    """Two newer ones are damaged, and may not count among the two that are kept."""
    save(tmp_path, 10)
    for step in (20, 30):
        (tmp_path / f"step-{step:08d}").mkdir()
    save(tmp_path, 15)
    assert_is(load_checkpoint(tmp_path), 15)
    save(tmp_path, 16)
    assert_is(load_checkpoint(tmp_path), 16)
    assert "step-00000015" in names(tmp_path)


def test_order_is_by_step_and_not_by_time(tmp_path):
    save(tmp_path, 9), save(tmp_path, 10)
    os.utime(tmp_path / "step-00000010", (0, 0))
    assert_is(load_checkpoint(tmp_path), 10)


def test_non_finite_is_never_written(tmp_path):
    save(tmp_path, 1)
    for bad in (torch.nan, torch.inf, -torch.inf):
        tensors = state(2)
        tensors["objective/w"][1, 2] = bad
        tensors["optimizer/half"][0] = bad
        with pytest.raises(NumericsError) as error:
            save_checkpoint(tmp_path, 2, tensors, {})
        assert "step 2 holds 2 non-finite tensors (objective/w, optimizer/half)" in str(error.value)
        assert "last good checkpoint: step-00000001" in str(error.value)
        assert names(tmp_path) == ["step-00000001"]


# --- killed at any operation --------------------------------------------------------------------------


def prepare(folder, kind):
    """What stands before step 30 is saved; returns the step that must load until then."""
    if kind == "first":
        return None
    save(folder, 10)
    if kind == "full":
        save(folder, 20)
        return 20
    (folder / "step-00000030").mkdir()  # a damaged one, to be replaced by a good one of the same step
    (folder / "step-00000030" / "state.json").write_text("{}")
    return 10


@pytest.mark.parametrize("kind", ["first", "full", "replaced"])
def test_killed_before_any_operation_of_save(tmp_path, in_child, kind):
    model = tmp_path / "model"
    prepare(model, kind)
    log = operations(lambda: save(model, 30))
    committed = log.index(("rename", f".tmp-step-00000030-{os.getpid()}"))
    tears = [number for number, (name, _) in enumerate(log) if name == "write"]
    assert len(tears) == 3
    assert committed > max(tears)
    points = [(at, False) for at in range(len(log) + 1)] + [(at, True) for at in tears]
    for at, torn in points:
        folder = tmp_path / f"{at}-{torn}"
        before = prepare(folder, kind)
        status, output = crash(in_child, lambda folder=folder: save(folder, 30), at, torn)
        assert status == (77 if at < len(log) else 0), output
        check_survived(folder, before, 30, done=at > committed and not torn)


def check_survived(folder, before, after, done):
    """The old state or the new one loads; leftovers can be swept; and the next save goes through."""
    for again in (False, True):
        if before is None and not done:
            loaded = load_checkpoint(folder)
            assert loaded is None or loaded.step == after
        else:
            loaded = load_checkpoint(folder)
            assert_is(loaded, after if done else before)
        if not again and folder.exists():
            sweep(folder)
            assert not [name for name in names(folder) if name.startswith(".")]
    assert_is(load_checkpoint(save(folder, after).parent), after)
    assert not [name for name in names(folder) if name.startswith(".")]


def test_killed_while_a_file_is_replaced(tmp_path, in_child):
    path = tmp_path / "config.yaml"
    write_file(path, "old")
    log = operations(lambda: write_file(path, "new!"))
    write_file(path, "old")
    replaced = log.index(("replace", f".tmp-config.yaml-{os.getpid()}"))
    for at in range(len(log)):
        for torn in {False, log[at][0] == "write"}:
            status, output = crash(in_child, lambda: write_file(path, "new!"), at, torn)
            assert status == 77, output
            assert path.read_text() == ("new!" if at > replaced else "old"), log[at]
            write_file(path, "old")
            sweep(tmp_path)
            assert names(tmp_path) == ["config.yaml"]


def test_a_folder_that_cannot_be_put_in_place_leaves_the_old_one(tmp_path, monkeypatch):
    final = tmp_path / "model"
    with new_folder(final) as scratch:
        (scratch / "a").write_text("old")
    rename = os.rename

    def fails(source, target):
        if Path(source).name.startswith(".tmp-"):
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(OSError, match="Input/output"), new_folder(final) as scratch:
        (scratch / "a").write_text("new")
    assert names(tmp_path) == ["model"]
    assert (final / "a").read_text() == "old"


def test_an_error_inside_leaves_no_scratch(tmp_path):
    def half():
        with new_folder(tmp_path / "model") as scratch:
            (scratch / "a").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        half()
    assert names(tmp_path) == []


def test_everything_is_flushed_before_it_counts(tmp_path):
    """A kill cannot show a missing flush: the operating system still has the bytes. The order can."""
    save(tmp_path, 10), save(tmp_path, 20)
    log = operations(lambda: save(tmp_path, 30))
    scratch = f".tmp-step-00000030-{os.getpid()}"
    committed = log.index(("rename", scratch))
    for name in ("state.safetensors", "state.json", "MANIFEST.json"):
        assert log.index(("write", name)) < log.index(("fsync", name)) < committed
    assert log.index(("write", "MANIFEST.json")) > log.index(("fsync", "state.safetensors"))
    assert log.index(("fsync", scratch)) < committed
    parent = log.index(("fsync", tmp_path.name))
    deleted = [number for number, (name, _) in enumerate(log) if name in ("unlink", "rmdir")]
    assert committed < parent < log.index(("rename", "step-00000010")) < min(deleted)

    log = operations(lambda: write_file(tmp_path / "a.txt", "text"))
    scratch = f".tmp-a.txt-{os.getpid()}"
    assert log[:5] == [
        ("open", scratch),
        ("write", scratch),
        ("fsync", scratch),
        ("replace", scratch),
        ("fsync", tmp_path.name),
    ]


def test_a_checkpoint_written_in_place_would_be_lost(tmp_path, in_child):
    """What the crash test says of a save without the scratch folder."""
    final = save(tmp_path, 10)

    def in_place():
        for name in ("state.json", "MANIFEST.json"):
            checkpoint.write_flushed(final / name, (final / name).read_bytes() + b" ")

    assert crash(in_child, in_place, at=1)[0] == 77
    with pytest.raises(CheckpointError, match="no valid checkpoint"):
        load_checkpoint(tmp_path)


# --- damaged ------------------------------------------------------------------------------------------


@pytest.fixture
def pair(tmp_path):
    save(tmp_path, 10)
    return save(tmp_path, 20)


FILES = ("state.safetensors", "state.json", "MANIFEST.json")


@pytest.mark.parametrize("file", FILES)
def test_every_truncation_is_noticed(pair, file):
    content = (pair / file).read_bytes()
    for length in range(len(content)):
        (pair / file).write_bytes(content[:length])
        saved = load_checkpoint(pair.parent)
        assert saved.step == 10, length
        assert len(saved.damaged) == 1
        assert saved.damaged[0].startswith("step-00000020: ")
    (pair / file).write_bytes(content)
    assert load_checkpoint(pair.parent).step == 20


@pytest.mark.parametrize("file", FILES)
def test_a_flipped_bit_in_any_byte_is_noticed(pair, file):
    content = (pair / file).read_bytes()
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1 << position % 8
        (pair / file).write_bytes(changed)
        assert load_checkpoint(pair.parent).step == 10, position
    (pair / file).write_bytes(content)
    assert_is(load_checkpoint(pair.parent), 20)


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_every_flipped_bit_is_noticed(pair, file):
    content = (pair / file).read_bytes()
    for position in range(8 * len(content)):
        changed = bytearray(content)
        changed[position // 8] ^= 1 << position % 8
        (pair / file).write_bytes(changed)
        assert load_checkpoint(pair.parent).step == 10, position


def test_without_its_manifest_a_flipped_bit_would_go_unnoticed(pair, monkeypatch):
    """What the tests above say of a checkpoint whose digests nobody compares."""
    good = load_checkpoint(pair.parent)
    path = pair / "state.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert load_checkpoint(pair.parent).step == 10
    monkeypatch.setattr(checkpoint, "_damage", lambda folder: None)
    bad = load_checkpoint(pair.parent)
    assert (bad.step, good.step) == (20, 20)
    assert not all(torch.equal(bad.tensors[name], value) for name, value in good.tensors.items())


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_noticed(pair, file):
    (pair / file).unlink()
    saved = load_checkpoint(pair.parent)
    assert_is(saved, 10)
    assert saved.damaged[0].startswith("step-00000020: incomplete")


def test_damage_is_named(pair):
    content = bytearray((pair / "state.safetensors").read_bytes())
    content[-1] ^= 1
    (pair / "state.safetensors").write_bytes(content)
    assert load_checkpoint(pair.parent).damaged == [
        "step-00000020: state.safetensors is damaged (SHA-256 differs)"
    ]
    (pair.parent / "step-00000010" / "MANIFEST.json").unlink()
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(pair.parent)
    assert "no valid checkpoint" in str(error.value)
    assert "step-00000020: state.safetensors is damaged" in str(error.value)
    assert "step-00000010: incomplete" in str(error.value)
    assert "--overwrite" in str(error.value)
    assert str(error.value).count("\n") < 5


@pytest.mark.parametrize("manifest", ["[]", "3", "null", '{"schema": 1, "files": []}', '{"schema": 1}'])
def test_a_manifest_of_another_shape_is_damage(pair, manifest):
    (pair / "MANIFEST.json").write_text(manifest)
    assert load_checkpoint(pair.parent).step == 10


def test_a_run_says_what_it_passed_over_and_ends_the_same(digits, tmp_path, differences):
    from pellucid.training import train

    digits.stopped(tmp_path / "run", 5)
    digits.stopped(tmp_path / "run", 8, resume=True)
    path = tmp_path / "run" / "checkpoints" / "step-00000008" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    said = []
    options = {"model": "crate_digits", "model_args": {"depth": 2}, "batch_size": 128, "epochs": 2}
    train(digits.images, out=str(tmp_path / "run"), resume=True, progress=False, say=said.append, **options)
    assert said[0] == "passed over step-00000008: state.safetensors is damaged (SHA-256 differs)"
    assert said[1].startswith("resuming from step 5 of 22 (saved ")
    assert differences(tmp_path / "run", digits.reference()) == []


# --- full ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
def test_a_full_disk_at_any_operation(tmp_path, code):
    log = operations(lambda: save(tmp_path / "model", 20))
    for at in range(1, log.index(("fsync", "model")) + 1):  # 0 would make the folder that is there
        folder = tmp_path / str(at)
        save(folder, 10)

        def fail(number, name, at=at):
            if number == at:
                raise OSError(code, os.strerror(code))

        with pytest.MonkeyPatch.context() as patch:
            FileSystem(patch, fail)
            with pytest.raises(ResourceError) as error:
                save(folder, 20)
        message = str(error.value)
        whole = log[at] == ("fsync", "model")
        assert f"last good checkpoint: step-000000{20 if whole else 10}" in message
        assert " needs 0.0 MB, " in message
        assert " MB free on " in message
        assert ("run again with --resume" in message) == (code != errno.EIO)
        assert message.count("\n") < 5
        assert not [name for name in names(folder) if name.startswith(".")], log[at]
        assert_is(load_checkpoint(folder), 20 if whole else 10)


def test_the_message_of_a_full_disk(tmp_path, monkeypatch):
    save(tmp_path, 10)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        ResourceError, match=r"^disk full: needs 40\.0 MB, [\d.]+ MB free on .*step-00000010$"
    ):
        save_checkpoint(tmp_path, 20, {"big": torch.zeros(10_000_000)}, {})


@pytest.mark.parametrize(("limit", "refused"), [(150_000, "run/checkpoints"), (100, "run")])
def test_a_run_that_hits_a_size_limit(digits, tmp_path, in_child, train_command, differences, limit, refused):
    """No room in the middle of a run, as the kernel says it: exit code 6 and nothing lost."""
    run = tmp_path / "run"
    digits.stopped(run, 5)
    output, write = os.pipe()

    def limited():
        os.dup2(write, 1)
        os.dup2(write, 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        return train_command(run, "--resume")

    status, _ = in_child(limited)
    os.close(write)
    with open(output) as file:
        said = file.read()
    assert status == 6, said
    assert "error: file too large: needs 0." in said
    assert f" MB free on {tmp_path / refused} " in said
    assert "last good checkpoint: step-00000005" in said
    assert "Traceback" not in said
    assert load_checkpoint(run / "checkpoints").step == 5
    assert train_command(run, "--resume") == 0
    assert differences(run, digits.reference()) == []


def test_a_full_disk_in_a_run_through_the_command_line(digits, tmp_path, train_command, monkeypatch, capsys):
    run = tmp_path / "run"
    digits.stopped(run, 5)

    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(checkpoint, "write_flushed", full)
    assert train_command(run, "--resume") == 6
    error = capsys.readouterr().err
    assert error.startswith("error: disk full: needs ")
    assert "last good checkpoint: step-00000005" in error
    assert error.count("\n") <= 5


# --- locked -------------------------------------------------------------------------------------------


def holding(folder, ready, grandchild=False):
    """For a child: take the lock, say so, and hold it until killed."""

    def body():
        with locked(folder):
            if grandchild and os.fork() == 0:
                ready.write_text(str(os.getpid()))
                time.sleep(60)
                os._exit(0)
            if not grandchild:
                ready.write_text(str(os.getpid()))
            time.sleep(60)

    return body


def wait_for(path):
    for _ in range(1000):
        if path.exists() and path.read_text():
            return path.read_text()
        time.sleep(0.005)
    raise TimeoutError(path)


def test_a_second_process_is_refused_and_told_who_holds_it(tmp_path, fork):
    pid = fork(holding(tmp_path, tmp_path / "ready"))
    try:
        wait_for(tmp_path / "ready")
        with pytest.raises(ConfigError, match=f"in use by pid {pid} on {os.uname().nodename}"):
            locked(tmp_path).__enter__()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    with locked(tmp_path):  # free after kill -9, with the dead one's name still in the file
        assert (
            (tmp_path / "run.lock")
            .read_text()
            .startswith(f"pid {os.getpid()} on {os.uname().nodename} since 2")
        )


def test_the_lock_holds_within_a_process_and_is_given_back(tmp_path):
    with locked(tmp_path):
        for _ in range(2):
            with pytest.raises(ConfigError, match=f"pid {os.getpid()}"), locked(tmp_path):
                pass
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("lets_go", [True, False], ids=["as is", "negative control"])
def test_a_data_worker_that_outlives_the_run_does_not_hold_its_lock(tmp_path, fork, monkeypatch, lets_go):
    if not lets_go:
        monkeypatch.setattr(checkpoint, "_held", type("Blind", (set,), {"__iter__": lambda self: iter(())})())
    pid = fork(holding(tmp_path, tmp_path / "ready", grandchild=True))
    worker = int(wait_for(tmp_path / "ready"))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    try:
        os.kill(worker, 0)  # lives
        if lets_go:
            with locked(tmp_path):
                pass
        else:
            with pytest.raises(ConfigError, match="in use"):
                locked(tmp_path).__enter__()
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_second_run_is_refused_through_the_command_line(digits, tmp_path, fork, train_command, capsys):
    run = tmp_path / "run"
    digits.stopped(run, 1)
    pid = fork(holding(run, tmp_path / "ready"))
    try:
        wait_for(tmp_path / "ready")
        half_written = run / "checkpoints" / ".tmp-step-00000002-1"
        half_written.mkdir()
        for flag in ("--resume", "--overwrite"):
            assert train_command(run, flag) == 2
            assert f"in use by pid {pid}" in capsys.readouterr().err
        assert half_written.exists()  # the other process is writing it
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert json.loads((run / "checkpoints" / "step-00000001" / "state.json").read_text())["step"] == 1
