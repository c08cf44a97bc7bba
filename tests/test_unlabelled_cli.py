"""Commands on a run without labels: each works, or says what to do in its place."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from pellucid.cli import main

TINY = ["--model", "crate_micro_patch4_32", "--embed-dim", "24", "--depth", "1", "--num-heads", "2"]
TINY += ["--img-size", "16"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(20):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")
    return folder


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    options = ["--objective", "simdino", "--epochs", "1", "--batch-size", "9", "--out", str(out)]
    assert main(["train", str(photos), *TINY, *options, "--beside", "vit_micro_patch4_32"]) == 0
    return out


def refused(capsys, argv, *said):
    capsys.readouterr()
    assert main([str(word) for word in argv]) in (2, 3, 4)  # tests/test_faults.py: which
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    for words in said:
        assert words in message, message


def test_training_ends_with_a_report_on_both(run):
    html = (run / "report.html").read_text(encoding="utf-8")
    assert 'id="views"' in html
    assert 'id="neighbours"' in html
    assert "The same for ViT" in html
    assert (run / "beside-vit_micro_patch4_32" / "result.json").is_file()
    config = (run / "beside-vit_micro_patch4_32" / "config.yaml").read_text(encoding="utf-8")
    assert "objective: simdino" in config


def test_training_says_what_it_is_worth(photos, tmp_path, capsys):
    options = ["--objective", "simdino", "--epochs", "1", "--no-report", "--seed", "1"]
    assert (
        main(["train", str(photos), *TINY, *options, "--batch-size", "9", "--out", str(tmp_path / "a")]) == 0
    )
    lines = capsys.readouterr().out.splitlines()
    last = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()][-1]
    assert lines[-1] == f"crate_micro_patch4_32: {last['verdict']}"
    assert "accuracy" not in lines[-2]
    tiny = ["--model", "crate_digits", "--embed-dim", "16", "--depth", "1", "--num-heads", "2"]
    assert main(["train", "digits", *tiny, *options, "--out", str(tmp_path / "b")]) == 0
    lines = capsys.readouterr().out.splitlines()
    measured = json.loads((tmp_path / "b" / "result.json").read_text())["measures"]["knn accuracy"]
    assert f"test knn accuracy {measured:.2%}, in {tmp_path / 'b'}" in lines[-2]


def test_report_again(run, tmp_path):
    """The same but for the command at its end, and for seconds rounded in its header and the page's data."""
    again = tmp_path / "again.html"
    assert main(["report", str(run), "-o", str(again)]) == 0
    texts = [path.read_text(encoding="utf-8") for path in (run / "report.html", again)]
    first, second = (
        re.search(
            '<section id="views".*<section id="reproduce"',
            re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL),
            re.DOTALL,
        )
        for text in texts
    )
    assert first
    assert second
    assert first[0] == second[0]


def test_predict_and_evaluate_name_what_to_do(run, photos, capsys):
    remedy = ("the model has no classifier", "--probe knn", "pellucid neighbours")
    refused(capsys, ["predict", run, photos / "00.png"], *remedy)
    refused(capsys, ["evaluate", run, photos], *remedy)
    refused(capsys, ["evaluate", run, photos, "--probe", "knn"], "put each class in a folder of its own")


@pytest.mark.parametrize("data", [[], ["photos"], ["other"]])
def test_audit(run, photos, tmp_path, data, capsys):
    other = tmp_path / "other"
    other.mkdir()
    for i in range(3):
        (other / f"{i}.png").write_bytes((photos / f"{i:02d}.png").read_bytes())
    named = {"photos": str(photos), "other": str(other)}
    out = tmp_path / "audit.json"
    assert main(["audit", str(run), *(named[name] for name in data), "-o", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["samples"] == (3 if data == ["other"] else 2)
    assert [row["step"] for row in found["rows"]] == ["compress", "sparsify"]


def test_export_gives_features(run, tmp_path, capsys):
    out = tmp_path / "features.pt2"
    assert main(["export", str(run), "-o", str(out)]) == 0
    said = capsys.readouterr().out
    assert "-> features (batch, 24)" in said
    assert "on 2 of the run's test images" in said


def test_a_model_without_decoder_is_refused_before_the_first_has_trained(photos, tmp_path, capsys):
    out = tmp_path / "run"
    options = ["--objective", "mae", "--beside", "vit_micro_patch4_32", "--out", out]
    refused(capsys, ["train", photos, *options], "mae needs a model with a decoder", "vit_mae_")
    assert not out.exists()
