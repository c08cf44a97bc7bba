"""What a user sees of each fault of training, by the row of the table in docs/reliability.md.

Each test goes through the command line: the message, with numbers and paths as ``*``, at most five lines of
it and no traceback, the exit code, and that the way on which it names is one.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pellucid.cli import main
from pellucid.data import builtin
from pellucid.data.loaders import ViewedSet
from pellucid.training import checkpoint
from pellucid.training.learner import Learner
from pellucid.training.recorder import Recorder, Spikes
from pellucid.training.run import OBJECTIVES
from pellucid.training.supervised import Supervised

TINY = ["--model", "crate_digits", "--depth", "1", "--batch-size", "128", "--no-report"]
"""22 steps, logged after 11 and 22."""


@pytest.fixture
def cli(capsys):
    """``cli(*words) -> (exit code, stdout, stderr)``."""

    def run(*words):
        capsys.readouterr()
        code = main([str(word) for word in words])
        return (code, *capsys.readouterr())

    return run


@pytest.fixture
def train(cli):
    """``train(run, *words)`` on digits with the options of TINY."""
    return lambda run, *words, epochs=2: cli(
        "train", "digits", *TINY, "--epochs", epochs, "--out", run, *words
    )


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The weights of an undisturbed run."""
    run = tmp_path_factory.mktemp("faults") / "reference"
    assert main(["train", "digits", *TINY, "--epochs", "2", "--out", str(run)]) == 0
    return load_file(run / "model" / "model.safetensors")


def same_bits(run, reference):
    weights = load_file(run / "model" / "model.safetensors")
    return all(torch.equal(weights[name], value) for name, value in reference.items())


def golden(said, expected):
    """The error message in ``said`` is ``expected``, in which ``*`` stands for anything within a line."""
    assert "Traceback" not in said
    message = said[said.index("error: ") :].rstrip("\n")
    assert message.count("\n") < 5, message
    pattern = ".*".join(re.escape(part) for part in expected.split("*"))
    assert re.fullmatch(pattern, message), message


@pytest.fixture
def at_step(monkeypatch):
    """``at_step({step: action})``: run an action when that step has been taken, before it is looked at."""

    def arm(actions):
        before = Recorder.__call__

        def recorder(self, parts):
            actions.get(self.learner.step, lambda: None)()
            before(self, parts)

        monkeypatch.setattr(Recorder, "__call__", recorder)

    return arm


@pytest.fixture
def in_child():
    """``in_child(body) -> exit code``, or minus the signal that ended it."""

    def run(body):
        sys.stdout.flush()
        pid = os.fork()
        if not pid:
            code = 99
            with contextlib.suppress(BaseException):
                code = body()[0]
            os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    return run


def kill(number=signal.SIGKILL):
    return lambda: os.kill(os.getpid(), number)


# --- killed, stopped, full ----------------------------------------------------------------------------


def test_row_01_killed_at_any_moment(tmp_path, train, in_child, reference, monkeypatch, at_step):
    run = tmp_path / "run"
    with monkeypatch.context():
        at_step({15: kill()})
        assert in_child(lambda: train(run, "--save-every", "9")) == -signal.SIGKILL
    monkeypatch.undo()
    code, out, _ = train(run, "--save-every", "9", "--resume")
    assert code == 0
    line = re.search(r"^resuming from step 9 of 22 \(saved (.*)\), at least 2 steps to do again$", out, re.M)
    assert line, out
    assert abs(time.mktime(time.strptime(line[1], "%Y-%m-%d %H:%M:%S")) - time.time()) < 600
    assert same_bits(run, reference)


def test_row_02_killed_in_the_middle_of_a_save(tmp_path, train, in_child, reference, monkeypatch):
    run = tmp_path / "run"
    rename = os.rename

    def last(source, target):
        if Path(target).name == "step-00000018":
            kill()()
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", last)
        assert in_child(lambda: train(run, "--save-every", "9")) == -signal.SIGKILL
    code, out, _ = train(run, "--save-every", "9", "--resume")
    assert code == 0
    assert f"removed what a killed process left half-written in {run / 'checkpoints'} (1)" in out
    assert "resuming from step 9 of 22" in out
    assert same_bits(run, reference)


def test_row_04_disk_full_during_save(tmp_path, train, reference, monkeypatch):
    run = tmp_path / "run"
    flushed = checkpoint.write_flushed

    def full(path, content):
        if "step-00000018" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        flushed(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_flushed", full)
        code, _, err = train(run, "--save-every", "9")
    assert code == 6
    golden(
        err,
        f"error: disk full: needs * MB, * MB free on {run / 'checkpoints'} (No space left on device) - make "
        f"room, then run again with --resume; last good checkpoint: step-00000009",
    )
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000009"]
    assert train(run, "--save-every", "9", "--resume")[0] == 0
    assert same_bits(run, reference)


def test_row_05_a_place_that_cannot_be_written(tmp_path, train):
    (tmp_path / "file").write_text("mine")
    code, _, err = train(tmp_path / "file" / "run")
    assert code == 2
    golden(err, f"error: cannot write {tmp_path / 'file' / 'run'}: Not a directory - take another --out")
    assert (tmp_path / "file").read_text() == "mine"
    assert train(tmp_path / "run", epochs=0.1)[0] == 0


def test_row_05_a_folder_that_may_not_be_written(tmp_path, train, in_child, monkeypatch):
    """Root may write anywhere, so this is done as nobody, who may not be able to read the environment
    that the tests run in: the modules and the data are in memory before."""
    if os.getuid():
        pytest.skip("needs root to become somebody else")
    digits = builtin.load_digits()
    monkeypatch.setattr(builtin, "load_digits", lambda: digits)
    assert train(tmp_path / "open", epochs=0.1)[0] == 0
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o755)
    said = tmp_path / "said"
    said.touch()
    said.chmod(0o666)

    def body():
        os.chdir("/")
        os.setuid(65534)
        code, _, err = train(closed / "run")
        said.write_text(err)
        return (code,)

    for folder in (tmp_path, *list(tmp_path.parents)[:-2]):
        folder.chmod(folder.stat().st_mode | 0o055)
    assert in_child(body) == 2
    expected = f"error: cannot write {closed / 'run'}: Permission denied - take another --out"
    golden(said.read_text(), expected)


def test_row_05_a_folder_that_vanishes(tmp_path, train, at_step):
    run = tmp_path / "run"
    at_step({9: lambda: shutil.rmtree(run)})
    code, _, err = train(run, "--save-every", "9")
    assert code == 6
    golden(
        err,
        f"error: the folder of the run is gone: {run} - nothing of it can be saved; start again, or take "
        f"another --out",
    )
    assert not run.exists()
    at_step({})


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda s: s.name)
def test_row_06_a_signal(tmp_path, train, reference, at_step, monkeypatch, number):
    """Of the real program: tests/training/test_signals.py."""
    run = tmp_path / "run"
    at_step({7: kill(number)})
    code, _, err = train(run)
    assert code == 75
    golden(
        err,
        f"error: stopped by {number.name}: saved step 7 of 22 in {run} - run the same command with --resume "
        f"to go on",
    )
    monkeypatch.undo()
    assert train(run, "--resume")[0] == 0
    assert same_bits(run, reference)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)])
def test_row_06_a_second_signal_ends_at_once(
    tmp_path, train, reference, in_child, at_step, monkeypatch, number, code
):
    run = tmp_path / "run"

    def twice():
        kill(number)()
        kill(number)()

    at_step({13: twice})
    assert in_child(lambda: train(run, "--save-every", "9")) == code
    monkeypatch.undo()
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000009"]
    assert train(run, "--save-every", "9", "--resume")[0] == 0
    assert same_bits(run, reference)


# --- data workers -------------------------------------------------------------------------------------


@pytest.fixture
def at_item(monkeypatch):
    """``at_item(i, action)``: run it in a worker that is about to fetch image ``i``."""

    def arm(wanted, action):
        get = ViewedSet.__getitems__

        def fetched(self, keys):
            if torch.utils.data.get_worker_info() is not None and any(i == wanted for i, _ in keys):
                action()
            return get(self, keys)

        monkeypatch.setattr(ViewedSet, "__getitems__", fetched)

    return arm


@pytest.mark.parametrize(
    ("action", "how"),
    [
        (kill(), "was killed by SIGKILL (likely for want of memory)"),
        (kill(signal.SIGSEGV), "was killed by SIGSEGV (likely a crash in what reads files)"),
        (lambda: os._exit(0), "ended with exit code 0"),
    ],
    ids=["killed", "crashed", "left"],
)
def test_row_07_a_data_worker_dies(tmp_path, train, at_item, caplog, monkeypatch, reference, action, how):
    run = tmp_path / "run"
    at_item(1000, action)
    code, _, err = train(run, "--workers", "2")
    assert code == 3, err
    golden(
        err,
        f"error: data worker * of 2 {how} near digits[*], digits[*], ...: it died there twice\n"
        f"look at those files, take fewer --workers for more memory, or --workers 0 to see its own error",
    )
    (told,) = caplog.records
    assert how in told.getMessage()
    assert told.getMessage().endswith(" - trying once more with new ones")
    monkeypatch.undo()
    assert train(run, "--resume")[0] == 0
    assert same_bits(run, reference)


def test_row_07_a_data_worker_that_dies_once_is_replaced(tmp_path, train, at_item, caplog, reference):
    def once():
        with contextlib.suppress(FileExistsError):
            (tmp_path / "died").touch(exist_ok=False)
            kill()()

    at_item(1000, once)
    code, _, err = train(tmp_path / "run", "--workers", "2")
    assert code == 0, err
    assert re.fullmatch(
        r"data worker \d of 2 was killed by SIGKILL \(likely for want of memory\) near digits\[\d+\], "
        r"digits\[\d+\], \.\.\. - trying once more with new ones",
        caplog.records[0].getMessage(),
    )
    assert same_bits(tmp_path / "run", reference)


def test_row_08_a_data_worker_hangs(tmp_path, train, at_item, monkeypatch, reference):
    run = tmp_path / "run"
    at_item(1000, lambda: time.sleep(60))
    code, _, err = train(run, "--workers", "1", "--data-timeout", "1")
    assert code == 3
    golden(
        err,
        "error: data worker 0 of 1 has not answered for 1 s near digits[*], digits[*], ..., at File "
        '"*test_faults.py", line * in <lambda> - a slow disk? give a longer --data-timeout, or fewer '
        "--workers",
    )
    monkeypatch.undo()
    assert train(run, "--resume")[0] == 0
    assert same_bits(run, reference)


# --- numbers ------------------------------------------------------------------------------------------


@pytest.fixture
def spoil(monkeypatch):
    """``spoil(steps, how)``: spoil the loss of those steps, counted from 1."""

    def arm(steps, how):
        forward, losses = Supervised.forward, Learner.losses
        now = []

        def noted(self, batch, micro):
            now[:] = [self.step + 1]
            return losses(self, batch, micro)

        def spoilt(self, images, labels):
            parts = forward(self, images, labels)
            if self.training and now[0] in steps:
                parts["loss"] = how(parts["loss"])
            return parts

        monkeypatch.setattr(Learner, "losses", noted)
        monkeypatch.setattr(Supervised, "forward", spoilt)

    return arm


def test_row_09_a_batch_that_is_not_finite_is_left_out(tmp_path, train, spoil):
    """That nothing moves, of any engine and at any place: tests/training/test_numerics.py."""
    run = tmp_path / "run"
    spoil({8}, lambda loss: loss * torch.nan)
    code, _, err = train(run)
    assert code == 0
    listed = run / "bad" / "step-00000008.json"
    assert f"non-finite loss at step 8: left out, 1 of 3 allowed; its batch is listed in {listed}\n" in err
    told = json.loads(listed.read_text())
    assert (told["step"], told["parts"], len(told["items"])) == (8, 1, 128)
    assert re.fullmatch(r"digits\[\d+\]", told["items"][0]["name"])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert all(bool(v.isfinite().all()) for v in load_file(run / "model" / "model.safetensors").values())
    before = checkpoint.read_checkpoint(run / "bad" / "step-00000007")
    assert before.step == 7


def test_row_09_left_out_steps_are_counted_over_an_interruption(tmp_path, train, spoil, at_step, monkeypatch):
    spoil({4, 5, 9}, lambda loss: loss * torch.inf)
    whole = tmp_path / "whole"
    assert train(whole)[0] == 0
    run = tmp_path / "run"
    with monkeypatch.context():
        at_step({6: kill(signal.SIGTERM)})
        assert train(run)[0] == 75
    at_step({6: lambda: None})
    code, _, err = train(run, "--resume")
    assert code == 0
    assert "non-finite loss at step 9: left out, 3 of 3 allowed" in err
    assert same_bits(run, load_file(whole / "model" / "model.safetensors"))


def test_row_09_too_many_end_the_run_and_can_be_replayed(tmp_path, cli, train, spoil, monkeypatch):
    run = tmp_path / "run"
    spoil(range(5, 20), lambda loss: loss * torch.nan)
    code, _, err = train(run)
    assert code == 5
    listed = run / "bad" / "step-00000008.json"
    golden(
        err,
        "error: non-finite loss at step 8: the step was not applied, the state after step 7 is saved, after "
        f"3 were left out\nits 128 images are listed in {listed}\n"
        f"see where it begins with: pellucid replay {listed}\n"
        "then leave it out with --resume --max-skipped 4, or start again with a lower --lr and --matrix-lr",
    )
    before = contents(run)
    code, out, _ = cli("replay", listed)
    assert code == 0
    assert out.splitlines()[0] == "step 8 again, from the state after step 7: 128 images"
    assert "  first not finite: the loss itself, 1 of 1 numbers" in out
    assert contents(run) == before
    monkeypatch.undo()
    assert "everything is finite here" in cli("replay", listed)[1]
    code, out, _ = train(run, "--resume", "--max-skipped", "4")
    assert code == 0
    assert "max_skipped 3 -> 4 (allowed)" in out


@pytest.mark.parametrize("way", ["forward", "backward"])
def test_row_09_replay_names_the_module_and_the_image(tmp_path, cli, train, monkeypatch, way):
    """One image of the batch comes out of one layer as NaN; or one parameter has a gradient that is."""
    from pellucid.steps import ISTA

    run = tmp_path / "run"
    forward = ISTA.forward

    def spoilt(self, z, x=None):
        out = forward(self, z, x)
        if not self.training:
            return out
        if way == "forward":
            mask = torch.zeros_like(out)
            mask[3] = torch.nan
            return out + mask
        return out + (self.dictionary * 0).abs().sqrt().sum()  # the slope of the root at 0 is infinite

    monkeypatch.setattr(ISTA, "forward", spoilt)
    assert train(run, "--max-skipped", "0")[0] == 5
    listed = run / "bad" / "step-00000001.json"
    code, out, _ = cli("replay", listed)
    assert code == 0
    if way == "forward":
        name = json.loads(listed.read_text())["items"][3]["name"]
        assert re.search(
            rf"first not finite: output of model\.layers\.0\.sparsify, .*; of {re.escape(name)}$", out, re.M
        )
    else:
        assert re.search(r"first not finite: gradient of model\.layers\.0\.sparsify\.dictionary, ", out)


def test_row_09_replay_of_what_is_none(tmp_path, cli, train, spoil):
    golden(
        cli("replay", tmp_path / "x.json")[2],
        f"error: cannot read {tmp_path / 'x.json'} (No such file or directory) - give a run's "
        f"bad/step-N.json",
    )
    run = tmp_path / "run"
    spoil({8}, lambda loss: loss * torch.nan)
    train(run)
    shutil.rmtree(run / "bad" / "step-00000007")
    code, _, err = cli("replay", run / "bad" / "step-00000008.json")
    assert code == 4
    golden(
        err,
        f"error: the state after step 7 of {run} is gone, the newest that is kept is step 22 - replay a "
        f"later file",
    )


def test_row_10_a_spike_is_told(tmp_path, train, spoil):
    run = tmp_path / "run"
    spoil({40}, lambda loss: loss + 30)
    code, _, err = train(run, epochs=4)
    assert code == 0
    listed = run / "bad" / "step-00000040.json"
    found = re.findall(
        r"a spike at step (\d+): loss 3\d\.\d+, (\d+) deviations above the last steps'; its batch is listed "
        r"in (\S+)",
        err,
    )
    assert [(step, path) for step, _, path in found] == [("40", str(listed))]
    assert int(found[0][1]) > 10
    assert len(json.loads(listed.read_text())["items"]) == 128


@pytest.mark.parametrize("kind", ["falling", "noisy", "heavy tails", "flat", "drop"])
def test_row_10_no_false_alarm(kind):
    for seed in range(10):
        rng = np.random.default_rng(seed)
        t = np.arange(1500)
        curve = 2.3 * np.exp(-t / 200) + 0.4 + 0.05 * rng.normal(size=1500) * np.exp(-t / 800)
        if kind == "noisy":
            curve = curve * rng.lognormal(0, 0.25, 1500)
        elif kind == "heavy tails":
            curve = curve + 0.03 * rng.standard_t(3, 1500).clip(-8, 8)
        elif kind == "flat":
            curve = np.full(1500, 0.7) + 1e-9 * rng.normal(size=1500)
        elif kind == "drop":
            curve = curve - 0.3 * (t > 700)
        spikes = Spikes()
        assert [i for i, loss in enumerate(curve) if spikes.score(loss)] == []
        hit = curve.copy()
        hit[[600, 900]] += 12 * curve.max()
        spikes = Spikes()
        assert next(i for i, loss in enumerate(hit) if spikes.score(loss)) == 600


def test_row_11_a_checkpoint_with_nan_is_passed_over(tmp_path, train, at_step, monkeypatch, reference):
    """None is written: tests/training/test_checkpoint.py, test_non_finite_is_never_written."""
    run = tmp_path / "run"
    at_step({13: kill(signal.SIGTERM)})
    assert train(run, "--save-every", "9")[0] == 75
    monkeypatch.undo()
    newest = run / "checkpoints" / "step-00000013"
    tensors = load_file(newest / "state.safetensors")
    tensors["objective/model.head.bias"][2] = torch.nan
    save_file(tensors, newest / "state.safetensors")
    manifest = json.loads((newest / "MANIFEST.json").read_text())
    manifest["files"]["state.safetensors"] = digest(newest / "state.safetensors")
    (newest / "MANIFEST.json").write_text(json.dumps(manifest))
    code, out, _ = train(run, "--save-every", "9", "--resume")
    assert code == 0
    assert "passed over step-00000013: holds 1 non-finite tensors (objective/model.head.bias)" in out
    assert "resuming from step 9 of 22" in out
    assert same_bits(run, reference)


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def contents(run):
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


# --- checkpoints and configs --------------------------------------------------------------------------


def arrays(path, classes=(0, 1), n=24, size=8):
    """A data set of so many gray pictures."""
    rng = np.random.default_rng(0)
    y = np.array(classes)[np.arange(n) % len(classes)]
    np.savez(path, x=rng.integers(0, 256, (n, size, size), np.uint8), y=y)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run on two classes of pictures."""
    place = tmp_path_factory.mktemp("trained")
    data = arrays(place / "data.npz")
    run = place / "run"
    assert main(["train", str(data), *map(str, ON_TWO), "--out", str(run)]) == 0
    return run, data


ON_TWO = ["--model", "crate_digits", "--depth", "1", "--epochs", "1", "--batch-size", "8", "--no-report"]


def test_row_22_another_architecture(trained, tmp_path, cli):
    run, data = trained
    words = [
        "--epochs",
        "1",
        "--batch-size",
        "8",
        "--no-report",
        "--init-from",
        run,
        "--out",
        tmp_path / "run",
    ]
    code, _, err = cli("train", data, "--model", "vit_digits", *words)
    assert code == 4
    golden(err, f"error: {run} is crate_digits, the run asks for vit_digits - give --model crate_digits")
    code, _, err = cli("train", data, "--model", "crate_digits", "--embed-dim", "32", *words)
    assert code == 4
    golden(
        err,
        f"error: {run} (embed_dim as named, depth 1; the run asks for embed_dim 32, depth as named - give "
        "--model-arg depth=1): do not fit the model\nmissing (*): layers.1.*\nwrong shape (*): *",
    )
    assert not (tmp_path / "run").exists()
    assert cli("train", data, "--model", "crate_digits", "--model-arg", "depth=1", *words)[0] == 0


def test_row_22_resumed_as_another_architecture(trained, cli):
    run, data = trained
    before = contents(run)
    code, _, err = cli("train", data, *ON_TWO, "--embed-dim", "32", "--out", run, "--resume")
    assert code == 2
    golden(
        err,
        "error: cannot resume with other options - leave them as they were\n"
        "  model_args {'depth': 1} -> {*} (never, it settles what weights there are)",
    )
    assert contents(run) == before


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        ((0, 1, 2), "knows 2 classes, the data has 3 - give --new-head to learn a fresh classifier, or "),
        ((5, 6), "knows 2 classes (0, 1), the data has 2 classes (5, 6) - give --new-head to learn a fresh "),
    ],
    ids=["another count", "other names"],
)
def test_row_23_other_classes(trained, tmp_path, cli, classes, said):
    run, _ = trained
    other = arrays(tmp_path / "other.npz", classes)
    words = ["train", other, *ON_TWO, "--init-from", run, "--out", tmp_path / "run"]
    code, _, err = cli(*words)
    assert code == 4
    golden(err, f"error: {run} {said}*train on data with the same classes")
    assert not (tmp_path / "run").exists()
    assert cli(*words, "--new-head")[0] == 0


def test_row_24_weights_that_do_not_match(trained, tmp_path, cli):
    """Names are dropped, made up, or renamed; shapes and kinds changed: nothing loads in part."""
    run, data = trained
    right = load_file(run / "model" / "model.safetensors")
    rng = np.random.default_rng(0)
    changes = {
        "missing (1): {0}": lambda w, name: w.pop(name),
        "unexpected (1): {0}x": lambda w, name: w.update({f"{name}x": w[name].clone()}),
        "missing (1): {0}\nunexpected (1): {0}x": lambda w, name: w.update({f"{name}x": w.pop(name)}),
        "wrong shape (1): {0} is *, expected *": lambda w, name: w.update({name: w[name].flatten()[:1]}),
        "wrong type (1): {0} is int8, expected real numbers": lambda w, name: w.update(
            {name: w[name].char()}
        ),
    }
    file = tmp_path / "weights.safetensors"
    words = ["train", data, *ON_TWO, "--init-from", file, "--out", tmp_path / "run"]
    names = sorted(name for name in right if not name.startswith("head.") and right[name].numel() > 1)
    for said, change in changes.items():
        for name in rng.choice(names, 3, replace=False):
            weights = dict(right)
            change(weights, str(name))
            save_file(weights, file)
            code, _, err = cli(*words)
            assert code == 4
            golden(err, f"error: {file}: do not fit the model\n{said.format(name)}")
    assert not (tmp_path / "run").exists()
    save_file({"x": torch.ones(1)}, file)
    golden(
        cli(*words)[2],
        f"error: {file}: do not fit the model\nmissing ({len(right)}): *, ...\nunexpected (1): x",
    )
    save_file(right, file)
    assert cli(*words)[0] == 0


def test_row_26_a_damaged_checkpoint(tmp_path, train, at_step, monkeypatch, reference):
    """Every truncation and every flipped byte: tests/training/test_checkpoint.py."""
    run = tmp_path / "run"
    at_step({13: kill(signal.SIGTERM)})
    assert train(run, "--save-every", "9")[0] == 75
    monkeypatch.undo()
    state = run / "checkpoints" / "step-00000013" / "state.safetensors"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    code, out, _ = train(run, "--save-every", "9", "--resume")
    assert code == 0
    assert "passed over step-00000013: state.safetensors is damaged (SHA-256 differs)" in out
    assert "resuming from step 9 of 22" in out
    assert same_bits(run, reference)


def test_row_26_every_checkpoint_damaged(tmp_path, train, at_step, monkeypatch):
    run = tmp_path / "run"
    at_step({7: kill(signal.SIGTERM)})
    train(run)
    monkeypatch.undo()
    (run / "checkpoints" / "step-00000007" / "state.json").write_text("{")
    code, _, err = train(run, "--resume")
    assert code == 4
    golden(
        err,
        f"error: no valid checkpoint in {run / 'checkpoints'} - start again with --overwrite\n"
        "step-00000007: state.json is damaged (SHA-256 differs)",
    )
    assert train(run, "--overwrite", epochs=0.1)[0] == 0


def test_row_27_other_options(tmp_path, train, at_step, monkeypatch):
    """That every option is free, for a new run, or fixed: tests/training/test_config.py."""
    run = tmp_path / "run"
    at_step({7: kill(signal.SIGTERM)})
    train(run)
    monkeypatch.undo()
    code, _, err = train(run, "--resume", "--lr", "0.1", "--seed", "1", "--clip", "1", "--augment", "none")
    assert code == 2
    golden(
        err,
        f"error: cannot resume with other options - leave them as they were, or start a new run with "
        f"--init-from {run}\n  seed 0 -> 1 (in a new run only)\n  lr 0.003 -> 0.1 (in a new run only)\n"
        "  clip 0.0 -> 1* (in a new run only), and 1 more",
    )
    code, out, _ = train(run, "--resume", "--engine", "plain", "--save-every", "5")
    assert code == 0
    assert "engine lightning -> plain (allowed)" in out
    assert "save_every: 5" in (run / "config.yaml").read_text()
    begun_at = ["--init-from", run, "--lr", "0.1", "--seed", "1"]
    assert train(tmp_path / "new", *begun_at, epochs=0.1)[0] == 0


def test_row_28_a_batch_that_does_not_divide(tmp_path, train):
    """That any number of processes goes on with the same bits: tests/training/test_ranks.py."""
    code, _, err = train(tmp_path / "run", "--accumulate", "3")
    assert code == 2
    golden(
        err,
        "error: batch size 128 does not divide into 3 equal parts (accumulate 3 x world 1) - use 126 or 129",
    )
    assert train(tmp_path / "run", "--accumulate", "4", epochs=0.1)[0] == 0


def test_row_28_other_threads_are_told(tmp_path, train, at_step, monkeypatch):
    run = tmp_path / "run"
    at_step({7: kill(signal.SIGTERM)})
    train(run, "--threads", "1")
    monkeypatch.undo()
    code, out, _ = train(run, "--threads", "2", "--resume")
    assert code == 0
    assert "threads 1 -> 2: results may differ in their last bits" in out


# --- the machine --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: 9 bytes"
        ),
        MemoryError(),
    ],
    ids=["device", "allocator", "python"],
)
@pytest.mark.parametrize("where", ["forward", pytest.param("step", marks=pytest.mark.slow)])
def test_row_29_out_of_memory(tmp_path, train, monkeypatch, reference, error, where):
    run = tmp_path / "run"
    losses, update = Learner.losses, Learner.update

    def too_large(self, *words):
        if self.step == 12:
            raise error
        return (losses if where == "forward" else update)(self, *words)

    name = "losses" if where == "forward" else "update"
    with monkeypatch.context() as patch:
        patch.setattr(
            Learner,
            name,
            too_large if where == "forward" else lambda self, apply=None: too_large(self, apply),
        )
        code, _, err = train(run, "--save-every", "9")
    assert code == 6
    golden(
        err,
        "error: out of memory at step 13, with a batch of 128 in 1 part - start again with --overwrite and "
        "--accumulate 2 (the same batch in smaller parts), or --batch-size 64\n"
        "or free some memory and go on with --resume; last good checkpoint: step-00000009",
    )
    if where == "forward":
        assert train(run, "--save-every", "9", "--resume")[0] == 0
        assert same_bits(run, reference)
    else:
        assert train(run, "--overwrite", "--accumulate", "2", epochs=0.1)[0] == 0


def test_row_31_clocks_that_jump(tmp_path, train, at_step, monkeypatch, reference):
    run = tmp_path / "run"
    at_step({13: kill(signal.SIGTERM)})
    now = iter(range(10**9, 0, -(10**5)))
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: float(next(now)))
        assert train(run, "--save-every", "9")[0] == 75
    at_step({13: lambda: None})
    os.utime(run / "checkpoints" / "step-00000013", (0, 0))
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: 0.0)
        code, out, _ = train(run, "--save-every", "9", "--resume")
    assert code == 0
    assert "resuming from step 13 of 22" in out
    assert same_bits(run, reference)
    seconds = json.loads((run / "result.json").read_text())["seconds"]
    assert 0 < seconds < 600


def test_row_32_two_runs_in_one_folder(tmp_path, train, reference):
    """The first is a process of its own, which is killed."""
    run = tmp_path / "run"
    words = ["train", "digits", *TINY, "--epochs", "400", "--out", str(run), "--save-every", "20"]
    first = subprocess.Popen(
        [sys.executable, "-m", "pellucid", *words], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    try:
        for _ in range(6000):
            if (run / "checkpoints" / "step-00000020").exists() or first.poll() is not None:
                break
            time.sleep(0.01)
        code, _, err = train(run, "--resume", epochs=400)
        assert code == 2
        golden(
            err,
            f"error: {run} is in use by pid {first.pid} on {os.uname().nodename} since *-*-* *:*:* - wait, "
            f"or take another --out",
        )
    finally:
        first.kill()
        first.wait()
    assert train(run, "--overwrite")[0] == 0  # free at once, though nobody took the lock away
    assert same_bits(run, reference)


def photos(folder, n=12):
    rng = np.random.default_rng(0)
    for kind in ("cat", "dog"):
        (folder / kind).mkdir(parents=True)
        for i in range(n):
            Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(folder / kind / f"{i:02}.png")
    return folder


def test_row_33_changed_data(tmp_path, cli, at_step, monkeypatch):
    data, run = photos(tmp_path / "photos"), tmp_path / "run"
    words = ["train", data, *ON_TWO, "--out", run]
    at_step({2: kill(signal.SIGTERM)})
    assert cli(*words)[0] == 75
    monkeypatch.undo()
    old = (data / "cat" / "03.png").read_bytes()
    os.utime(data / "dog" / "01.png", (0, 0))  # no change
    os.rename(data / "cat" / "03.png", data / "cat" / "new.png")
    kept = (data / "dog" / "05.png").read_bytes()
    (data / "dog" / "05.png").write_bytes(kept + b"more")
    code, _, err = cli(*words, "--resume")
    assert code == 3
    golden(
        err,
        f"error: {data} has changed since the run began: 1 added (cat/new.png), 1 removed (cat/03.png), 1 "
        f"edited (dog/05.png) - restore its files, or start a new run with --init-from {run}",
    )
    (data / "cat" / "new.png").unlink()
    (data / "cat" / "03.png").write_bytes(old)
    (data / "dog" / "05.png").write_bytes(kept)
    assert cli(*words, "--resume")[0] == 0


# --- sizes --------------------------------------------------------------------------------------------


def texts(folder):
    for kind in ("one", "two"):
        (folder / kind).mkdir(parents=True)
        for i in range(8):
            (folder / kind / f"{i}.txt").write_text(f"{kind} is {i} times a text of some words. " * 3)
    return folder


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("size", [1, *(pytest.param(size, marks=pytest.mark.slow) for size in (2, 3))])
def test_row_34_small_batches(tmp_path, cli, objective, size):
    """Finite, or a word on how many it takes; never a number that is none."""
    if OBJECTIVES[objective].reads == "text":
        data = texts(tmp_path / "texts")
    else:
        data = arrays(tmp_path / "data.npz")
    run = tmp_path / "run"
    words = ["--depth", "1", "--epochs", f"{2 * size / 20:g}", "--batch-size", size, "--no-report"]
    words += ["--objective", objective, "--out", run, "--max-skipped", "0"]
    code, _, err = cli("train", data, *words)
    if code == 2:
        golden(err, f"error: *{size}* - *")
        assert not run.exists()
        return
    assert code == 0, err
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    numbers = [v for line in lines for v in line.values() if isinstance(v, float)]
    assert numbers
    assert np.isfinite(numbers).all()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--patch-size", "3"], "error: crate_digits: 8 / 3 is not whole; nearest sizes 6 or 9"),
        (["--img-size", "9"], "error: crate_digits: 9 / 2 is not whole; nearest sizes 8 or 10"),
        (
            ["--embed-dim", "63"],
            "error: crate_digits: dim 63 is not divisible by num_heads 8 - give head_dim, or take one of "
            "[1, 3, 7, 9, 21, 63] heads",
        ),
    ],
)
def test_row_35_sizes_that_do_not_go_together(tmp_path, train, words, said):
    code, _, err = train(tmp_path / "run", *words)
    assert code == 2
    golden(err, said)
    assert not (tmp_path / "run").exists()
    nearest = {"--patch-size": "4", "--img-size": "8", "--embed-dim": "64"}[words[0]]
    assert train(tmp_path / "run", words[0], nearest, epochs=0.1)[0] == 0
