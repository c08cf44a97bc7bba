"""The commands about features as a user types them, and every wrong input with its one short message."""

import json
import re
import shutil

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from pellucid.cli import main
from pellucid.models import load

SIZES = ["--model", "crate_digits", "--embed-dim", "32", "--depth", "2", "--num-heads", "4"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("features") / "run"
    assert main(["train", "digits", *SIZES, "--epochs", "8", "--no-report", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def bare(run, tmp_path_factory):
    """A model/ folder without a classifier, as learning without labels leaves one."""
    folder = tmp_path_factory.mktemp("bare") / "model"
    shutil.copytree(run / "model", folder)
    config = json.loads((folder / "config.json").read_text()) | {"num_classes": 0, "label_names": []}
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not name.startswith("head.")}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def loose(tmp_path_factory):
    """Forty pictures in one folder, without classes."""
    folder = tmp_path_factory.mktemp("loose") / "pictures"
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(40):
        Image.fromarray(random.integers(0, 256, (9, 12, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")
    return folder


def refused(capsys, argv, *said):
    """Refused, with one short message on stderr that holds all of ``said``, nothing else."""
    capsys.readouterr()
    assert main([str(word) for word in argv]) in (2, 3, 4)  # tests/test_faults.py: which
    message = capsys.readouterr().err
    assert message.startswith("error: "), message
    assert len(message.splitlines()) <= 5, message
    for words in said:
        assert words in message, message


def accuracy(text, title):
    return float(re.search(rf"{title} (\d+\.\d+)%", text)[1]) / 100


def test_knn(run, bare, tmp_path, capsys):
    out = tmp_path / "knn.json"
    assert (
        main(["evaluate", str(run), "--probe", "knn", "--k", "20", "5", "--untrained", "-o", str(out)]) == 0
    )
    said = capsys.readouterr().out
    for words in (
        "class  images",
        "95% interval",
        "by k 20, temperature 0.07, from 1347",
        "k 5: ",
        "always '",
    ):
        assert words in said
    written = json.loads(out.read_text())
    assert written["data"] == "digits"
    assert written["probe"]["scores"]["accuracy"] == pytest.approx(accuracy(said, "knn accuracy"), abs=1e-4)
    assert [row["k"] for row in written["probe"]["tried"]] == [20, 5]
    assert accuracy(said, "fresh weights:") < accuracy(said, "knn accuracy")
    assert main(["evaluate", str(bare), "digits", "--probe", "knn"]) == 0
    assert accuracy(capsys.readouterr().out, "knn accuracy") == accuracy(said, "knn accuracy")


def test_linear(bare, tmp_path, capsys):
    out = tmp_path / "linear.json"
    argv = ["evaluate", str(bare), "digits", "--probe", "linear", "--tokens", "avg", "-o", str(out)]
    assert main(argv) == 0
    said = capsys.readouterr().out
    written = json.loads(out.read_text())["probe"]
    assert written["tokens"] == "avg"
    assert written["scores"]["accuracy"] == pytest.approx(accuracy(said, "linear accuracy"), abs=1e-4)
    assert written["scores"]["accuracy"] > 0.8
    assert written["settings"]["C"] in [row["C"] for row in written["tried"]]


def test_finetune(bare, tmp_path, capsys):
    out = tmp_path / "scores.json"
    ask = ["evaluate", str(bare), "digits", "--probe", "finetune"]
    argv = [*ask, "--epochs", "3", "-o", str(out)]
    assert main(argv) == 0
    folder = bare.parent / "model-finetune-digits"
    said = capsys.readouterr().out
    assert f"the run: {folder}" in said
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert (config["init_from"], config["new_head"], config["epochs"]) == (str(bare), True, 3)
    assert load(folder).num_classes == 10
    assert accuracy(said, "finetune accuracy") > 0.6
    assert json.loads(out.read_text())["probe"]["run"] == str(folder)
    refused(capsys, argv, "holds a run already", "--resume", "--overwrite")
    assert main([*argv, "--resume"]) == 0
    assert accuracy(capsys.readouterr().out, "finetune accuracy") == accuracy(said, "finetune accuracy")
    other = tmp_path / "other"
    assert main([*ask, "--run-out", str(other), "--seed", "4", "--epochs", "0.1"]) == 0
    assert yaml.safe_load((other / "config.yaml").read_text())["seed"] == 4


def test_a_model_without_a_classifier_names_the_probes(bare, capsys):
    refused(capsys, ["evaluate", bare, "digits"], "no classifier", "--probe knn, linear or finetune")
    refused(capsys, ["evaluate", bare, "--probe", "knn"], "name the data")


def test_probe_options_that_do_not_go_together(run, capsys):
    for argv, said in (
        (["--k", "5"], "--k goes with --probe knn"),
        (["--probe", "linear", "--k", "5"], "--k goes with --probe knn"),
        (["--probe", "linear", "--temperature", "0"], "--temperature goes with --probe knn"),
        (["--probe", "knn", "--epochs", "3"], "--epochs goes with --probe finetune"),
        (["--probe", "knn", "--seed", "0"], "--seed goes with --probe linear or finetune"),
        (["--probe", "finetune", "--tokens", "cls"], "--tokens goes with --probe knn or linear"),
        (["--probe", "knn", "--k", "0"], "k is 0; expected 1 to 1347"),
        (["--probe", "knn", "--k", "9999"], "k is 9999; expected 1 to 1347"),
        (["--probe", "knn", "--temperature", "0"], "temperature is 0"),
        (["--probe", "nearest"], "nearest"),
    ):
        refused(capsys, ["evaluate", run, *argv], said)


def test_a_probe_of_data_without_labels(bare, loose, capsys):
    for probe in ("knn", "linear", "finetune"):
        refused(capsys, ["evaluate", bare, loose, "--probe", probe], "folder")


@pytest.mark.parametrize(("suffix", "tokens"), [("npz", "cls"), ("safetensors", "patch"), ("parquet", "all")])
def test_embed(run, tmp_path, capsys, suffix, tokens):
    out = tmp_path / f"f.{suffix}"
    assert main(["embed", str(run), "--tokens", tokens, "-o", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"{tokens} features of 1797 images, 1797 x" in said
    refused(capsys, ["embed", run, "-o", out], "stands there already", "--overwrite")
    assert main(["embed", str(run), "-o", str(out), "--overwrite"]) == 0
    assert "1797 x 32," in capsys.readouterr().out


def test_embed_and_neighbours_without_labels(bare, loose, tmp_path, capsys):
    out = tmp_path / "f.npz"
    assert main(["embed", str(bare), str(loose), "-o", str(out)]) == 0
    with np.load(out) as file:
        assert file["features"].shape == (40, 32)
        assert set(file["label"].tolist()) == {-1}
        assert set(file["class_name"].tolist()) == {""}
        assert {name.rsplit("/", 1)[-1] for name in file["path"]} == {f"{i:02d}.png" for i in range(40)}
    sheet = tmp_path / "sheet.png"
    query = loose / "07.png"
    assert main(["neighbours", str(bare), str(loose), str(query), "--k", "3", "-o", str(sheet)]) == 0
    lines = capsys.readouterr().out.splitlines()
    hits = [line.split() for line in lines if line.startswith("  ")]
    assert len(hits) == 3
    assert all(-1 <= float(cosine) <= 1 and path != str(query) for cosine, path in hits)
    with Image.open(sheet) as picture:
        assert picture.size[0] > 4 * 112


def test_embed_refuses(run, tmp_path, capsys):
    refused(capsys, ["embed", run, "-o", tmp_path / "f.csv"], "ends in .parquet, .npz, .safetensors")
    refused(capsys, ["embed", run, "-o", tmp_path / "no" / "f.npz"], "is not a folder")
    refused(capsys, ["embed", tmp_path / "none", "digits", "-o", tmp_path / "f.npz"], "does not exist")
    refused(capsys, ["embed", run, "-o", tmp_path / "f.npz", "--tokens", "some"], "some")
    assert list(tmp_path.iterdir()) == []


def test_neighbours(run, tmp_path, capsys):
    from pellucid.data import load_data

    images = load_data("digits")
    for i in (5, 900):
        Image.fromarray(images.train.image(i)[0].numpy()).save(tmp_path / f"{i}.png")
    page = tmp_path / "sheet.html"
    queries = [str(tmp_path / f"{i}.png") for i in (5, 900)]
    assert main(["neighbours", str(run), "digits", *queries, "--k", "4", "-o", str(page)]) == 0
    said = capsys.readouterr().out
    for i, path in zip((5, 900), queries, strict=True):
        name = images.class_names[int(images.train.labels[i])]
        assert f"{path}\n   1.000  {name}  {images.train.name(i)}\n" in said
    assert page.read_text().count("data:image/png") == 2 * (1 + 4)


def test_neighbours_refuses(run, tmp_path, capsys):
    Image.new("L", (8, 8)).save(tmp_path / "q.png")
    ask = ["neighbours", run, "digits"]
    refused(capsys, ask, "no images given")
    refused(capsys, [*ask, tmp_path / "none.png"], "none.png cannot be read", "name another picture")
    refused(capsys, [*ask, tmp_path / "q.png", "--k", "0"], "k is 0")
    refused(capsys, [*ask, tmp_path / "q.png", "-o", tmp_path / "s.jpg"], "ends in .png or .html")


def test_tokens_that_the_model_does_not_have(tmp_path, capsys):
    out = tmp_path / "run"
    argv = ["train", "digits", *SIZES, "--model-arg", "class_token=false", "--model-arg", "global_pool=avg"]
    assert main([*argv, "--epochs", "0.1", "--no-report", "--out", str(out)]) == 0
    refused(capsys, ["embed", out, "--tokens", "cls", "-o", tmp_path / "f.npz"], "no class token - take avg")
    refused(capsys, ["evaluate", out, "--probe", "knn", "--tokens", "cls"], "no class token - take avg")
    assert main(["evaluate", str(out), "--probe", "knn", "--tokens", "avg"]) == 0


def test_nothing_of_it_changes_the_run(run, tmp_path):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(["evaluate", str(run), "--probe", "knn", "--untrained"]) == 0
    assert main(["embed", str(run), "-o", str(tmp_path / "f.npz")]) == 0
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
