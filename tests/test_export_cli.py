"""``pellucid export`` as a user types it."""

import json
import shutil
import sys

import onnxruntime
import pytest
import torch

import pellucid
from pellucid.cli import main

TINY = ["--model", "crate_digits", "--embed-dim", "16", "--depth", "1", "--num-heads", "2"]

pytestmark = pytest.mark.usefixtures("unchecked_shapes")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "run"
    assert main(["train", "digits", *TINY, "--epochs", "0.5", "--out", str(out), "--no-report"]) == 0
    return out


def said(capsys, *argv, code=0):
    """What the command prints, to stdout where it succeeds and in one line to stderr where it does not."""
    capsys.readouterr()
    assert main(["export", *map(str, argv)]) == code
    out, err = capsys.readouterr()
    if code:
        assert out == ""
        assert len(err.splitlines()) == 1
        assert err.startswith("error: ")
        return err
    assert "error" not in err
    return out


def test_a_run_becomes_onnx_checked_on_its_own_test_images(run, tmp_path, capsys):
    file = tmp_path / "digits.onnx"
    lines = said(capsys, run, "-o", file).splitlines()
    assert lines[0].startswith(f"{file}: 0.")
    assert lines[0].endswith("opset 18, images (batch, 1, 8, 8) -> logits (batch, 10)")
    assert lines[1].startswith(
        f"checked with onnxruntime {onnxruntime.__version__} on random images, 1 and 3"
    )
    assert "on 64 of the run's test images: largest relative difference " in lines[1]
    assert 0 <= float(lines[1].rpartition(" ")[2]) < 1e-5
    assert lines[2] == f"how to feed it: {file}.json"
    about = json.loads((tmp_path / "digits.onnx.json").read_text())
    model = pellucid.load(run)
    assert about["class_names"] == [str(digit) for digit in range(10)]
    assert about["mean"] == pytest.approx(list(model.pretrained_cfg["mean"]))
    images, _, _ = next(iter(pellucid.batches(model, pellucid.load_data("digits").test)))
    session = onnxruntime.InferenceSession(str(file))
    (logits,) = session.run(["logits"], {"images": images.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), model(images), rtol=1e-4, atol=1e-5)


def test_tokens_as_a_program_and_nothing_replaced_unasked(run, tmp_path, capsys):
    file = tmp_path / "digits.pt2"
    out = said(capsys, run, "-o", file, "--output", "tokens")
    assert "images (batch, 1, 8, 8) -> tokens (batch, 16, 16)" in out
    before = file.read_bytes()
    err = said(capsys, run, "-o", file, code=2)
    assert f"{file} stands there already - give --overwrite to replace it, or name another file" in err
    assert file.read_bytes() == before
    assert "-> logits (batch, 10)" in said(capsys, run, "-o", file, "--overwrite")
    assert file.read_bytes() != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digits.pt2", "digits.pt2.json"]


def test_a_run_whose_data_are_gone_is_checked_on_random_images(run, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace("data: digits", f"data: {tmp_path / 'gone'}"))
    out = said(capsys, copy, "-o", tmp_path / "x.pt2")
    assert out.startswith("not checked on the run's test images: ")
    assert "gone" in out.splitlines()[0]
    assert "1 and 3 at once: largest relative difference" in out


def test_a_models_name_and_a_model_folder(run, tmp_path, capsys):
    assert "-> logits (batch, 10)" in said(capsys, "vit_digits", "-o", tmp_path / "vit.pt2")
    assert "-> logits (batch, 10)" in said(capsys, run / "model", "-o", tmp_path / "folder.pt2")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["RUN", "-o", "x.tflite"], "cannot tell the format of x.tflite"),
        (["RUN", "-o", "nowhere/x.onnx"], "nowhere is not a folder - make it first"),
        (["nothing_here", "-o", "x.onnx"], "unknown model 'nothing_here'"),
        (["RUN", "-o", "x.onnx", "--output", "boxes"], "boxes"),
        (["RUN"], "-o"),
    ],
)
def test_wrong_words(run, argv, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = [str(run) if word == "RUN" else word for word in argv]
    assert message in said(capsys, *argv, code=2)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named_with_its_remedy(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    err = said(capsys, run, "-o", tmp_path / "x.onnx", code=2)
    assert err == "error: ONNX needs the package onnxruntime - pip install 'pellucid[export]'\n"
    assert list(tmp_path.iterdir()) == []
