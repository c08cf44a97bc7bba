"""What a run leaves behind, and what it refuses to touch."""

import json

import numpy as np
import pytest
import torch

from pellucid.data import View, eval_loader
from pellucid.errors import CheckpointError, ConfigError, DataError
from pellucid.measure import evaluate
from pellucid.training import open_run, train


def everything(folder):
    """Every file below, by content; what may not be changed. Not who holds or last held the lock."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "run.lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_finished_run_holds_what_is_promised(digits):
    run = digits.reference()
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoints", "config.yaml", "data.jsonl.gz", "metrics.jsonl", "model", "result.json", "run.lock",
    ]  # fmt: skip
    assert sorted(path.name for path in (run / "model").iterdir()) == ["config.json", "model.safetensors"]
    result = json.loads((run / "result.json").read_text())
    assert result["steps"] == 22
    assert (result["train_images"], result["test_images"], result["rejects"]) == (1347, 450, [])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["split"]) for line in lines] == [
        (11, "train"), (11, "test"), (22, "train"), (22, "test"),
    ]  # fmt: skip
    opened = open_run(run)
    assert opened.accuracy == result["accuracy"] == lines[-1]["accuracy"]
    assert opened.metrics == lines


def test_the_accuracy_is_that_of_the_model_handed_over(digits):
    run = open_run(digits.reference(average=0.9))
    images = digits.images
    view = View((8, 8), 1, images.mean, images.std)
    scores = evaluate(run.model, ((x, y) for x, y, _ in eval_loader(images.test, view)), images.class_names)
    assert scores.accuracy == pytest.approx(run.accuracy)


def test_a_run_that_is_there_is_refused_and_left_alone(digits, tmp_path):
    run = digits.train(tmp_path / "run", epochs=0.2)
    before = everything(run)
    with pytest.raises(ConfigError, match=r"holds a run already - give --resume .*--overwrite"):
        digits.train(run, epochs=0.2)
    assert everything(run) == before


def test_overwrite_replaces_it(digits, tmp_path, differences):
    run = digits.train(tmp_path / "run", epochs=0.2, seed=3)
    (run / "notes.txt").write_text("old")
    digits.train(run, overwrite=True)
    assert differences(run, digits.reference()) == []
    assert not (run / "notes.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    "flags", [{}, {"overwrite": True}, {"resume": True}, {"overwrite": True, "resume": True}]
)
def test_a_folder_that_is_not_a_run_is_never_touched(digits, tmp_path, flags):
    folder = tmp_path / "thesis"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / ".tmp-mine").write_text("mine")
    (folder / "draft.txt").write_text("years of work")
    with pytest.raises(ConfigError, match=r"is not a run|holds no run"):
        digits.train(folder, **flags)
    assert everything(folder) == {"checkpoints/.tmp-mine": b"mine", "draft.txt": b"years of work"}
    assert [path.name for path in tmp_path.iterdir()] == ["thesis"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_in_the_way_is_never_touched(digits, tmp_path, overwrite):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(ConfigError, match="is not a run"):
        digits.train(tmp_path / "run", overwrite=overwrite)
    with pytest.raises(ConfigError, match=r"cannot write.*Not a directory") as error:
        digits.train(tmp_path / "run" / "below", overwrite=overwrite)
    assert "make room" not in str(error.value)
    assert (tmp_path / "run").read_text() == "mine"


def test_an_empty_folder_is_taken(digits, tmp_path):
    (tmp_path / "run").mkdir()
    inode = (tmp_path / "run").stat().st_ino
    digits.train(tmp_path / "run", epochs=0.1)
    assert (tmp_path / "run").stat().st_ino == inode  # it may be a mount point


def test_killed_before_there_is_a_config(digits, tmp_path):
    """The folder is there and nothing in it: the same command must go through."""
    run = tmp_path / "run"
    run.mkdir()
    (run / ".tmp-config.yaml-123").write_text("data: dig")
    digits.train(run, epochs=0.1)
    assert not [path for path in run.iterdir() if path.name.startswith(".")]


def test_nothing_to_resume(digits, tmp_path):
    with pytest.raises(ConfigError, match=r"nothing to resume: .* holds no run - leave out --resume"):
        digits.train(tmp_path / "run", resume=True)
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_process_are_swept(digits, tmp_path, differences):
    run = tmp_path / "run"
    digits.stopped(run, 3)
    for left in (".tmp-model-12", "checkpoints/.tmp-step-00000004-12", "checkpoints/.del-step-00000001-12"):
        (run / left).mkdir()
        (run / left / "half").write_text("x")
    digits.train(run, resume=True)
    assert [path.name for path in run.rglob(".*")] == []
    assert differences(run, digits.reference()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "crate_digit"}, "unknown model 'crate_digit' - did you mean 'crate_digits'"),
        ({"model_args": {"dept": 2}}, "unknown model option 'dept' for crate_digits - did you mean 'depth'"),
        ({"model_args": {"num_classes": 3}}, "num_classes 3, the data has 10"),
        ({"model_args": {"embed_dim": 63}}, "crate_digits: "),
        ({"objective": "supervise"}, "unknown objective 'supervise' - did you mean 'supervised'"),
        ({"accumulate": 3}, "batch size 128 does not divide into 3 equal parts .*use 126 or 129"),
        ({"devices": 3, "accelerator": "cpu"}, "batch size 128 does not divide into 3 equal parts"),
        ({"lrr": 1}, "unknown option 'lrr' - did you mean 'lr'"),
        ({"init_from": "nowhere"}, "nowhere does not exist"),
    ],
)
def test_a_refused_option_leaves_nothing_behind(digits, tmp_path, options, message):
    with pytest.raises((ConfigError, CheckpointError), match=message):
        digits.train(tmp_path / "run", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_refused_option_does_not_remove_what_it_would_replace(digits, tmp_path):
    run = digits.train(tmp_path / "run", epochs=0.1)
    before = everything(run)
    with pytest.raises(ConfigError):
        digits.train(run, overwrite=True, model="crate_digit")
    assert everything(run) == before


def data_file(path, change=None):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (200, 8, 8), np.uint8), np.arange(200) % 2
    if change == "pixel":
        x[17, 3, 3] ^= 1
    if change == "label":
        y[17] = 1 - y[17]
    if change == "more":
        x, y = np.concatenate([x, x[:2]]), np.concatenate([y, y[:2]])
    np.savez(path, x=x, y=y)
    return path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("pixel", r"1 edited \(\S+\)"),
        ("label", r"\d+ edited .*"),
        # The split is drawn anew, so that others have moved to the other side and got other numbers.
        ("more", r"\d+ added .*"),
    ],
)
def test_changed_data_is_refused(tmp_path, change, said):
    data = data_file(tmp_path / "data.npz")
    options = {"model": "crate_digits", "model_args": {"depth": 1}, "batch_size": 32, "epochs": 1}
    options |= {"out": str(tmp_path / "run"), "progress": False}
    train(data, **options)
    before = everything(tmp_path / "run")
    data_file(tmp_path / "data.npz", change)
    with pytest.raises(DataError, match=rf"data\.npz has changed since the run began: {said} - restore"):
        train(data, resume=True, **options)
    assert everything(tmp_path / "run") == before
    data_file(tmp_path / "data.npz")  # written again, the same: not a change
    train(data, resume=True, **options)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda run: None, "is not a run"),
        (lambda run: run.mkdir(), "is not a run"),
        (lambda run: run.write_text(""), "is not a run"),
    ],
)
def test_open_run_of_what_is_none(tmp_path, build, message):
    build(tmp_path / "run")
    with pytest.raises(CheckpointError, match=message):
        open_run(tmp_path / "run")


def test_open_run_of_an_unfinished_one(digits, tmp_path):
    digits.stopped(tmp_path / "run", 1)
    with pytest.raises(CheckpointError, match="holds a run that has not ended - finish it with --resume"):
        open_run(tmp_path / "run")


def test_a_small_run_does_not_depend_on_how_many_threads_there_are(digits, differences, tmp_path):
    """Its steps run on one, and so must the making of its first weights."""
    for threads in (1, 2):
        torch.set_num_threads(threads)
        digits.train(tmp_path / str(threads), epochs=0.2)
        assert torch.get_num_threads() == threads
    assert differences(tmp_path / "1", tmp_path / "2") == []
