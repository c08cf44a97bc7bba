"""The command line as a user types it: every command, and every wrong input with its one short message."""

import errno
import html
import json
import os
import pickle  # noqa: TID251
import resource
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from pellucid.cli import main

TINY = ["--model", "crate_digits", "--embed-dim", "16", "--depth", "2", "--num-heads", "2"]


def picture(path, seed=0, size=(20, 24), mode="RGB"):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    for kind in ("cat", "dog"):
        for i in range(12):
            mode = ["RGB", "L", "P", "RGBA"][i % 4]
            picture(folder / kind / f"{i:02d}.png", i + 100 * (kind == "dog"), (20 + i, 24), mode)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "run"
    assert main(["train", "digits", *TINY, "--epochs", "1", "--out", str(out)]) == 0
    return out


def refused(capsys, argv, *said):
    """Refused, with one short message on stderr that holds all of ``said``, nothing else."""
    capsys.readouterr()
    assert main([str(word) for word in argv]) in (2, 3, 4, 6)  # tests/test_faults.py: which
    message = capsys.readouterr().err
    assert message.startswith("error: "), message
    assert message.count("error: ") == 1, message
    assert len(message.splitlines()) <= 5, message
    assert len(message) < 1000, message
    for words in said:
        assert words in message, message


def contents(folder):
    """Every file below a folder, byte by byte."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def real(*argv, **options):
    """A process of its own."""
    argv = [sys.executable, "-m", "pellucid", *map(str, argv)]
    return subprocess.run(argv, capture_output=True, text=True, check=False, **options)


def test_help_answers_at_once_and_imports_little():
    code = (
        "import sys; from pellucid.cli import main; main(['--help']);"
        "print('heavy:', [m for m in ('torch', 'lightning', 'timm') if m in sys.modules])"
    )
    # As an installed program: what was compiled once is kept.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    times = []
    for _ in range(6):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # Of the processor: the machine may have other tests to run.
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert "heavy: []" in done.stdout
    for command in ("demo", "train", "evaluate", "predict", "audit", "report", "check", "models", "bench"):
        assert command in done.stdout
    assert min(times) < 0.5


def test_version_in_a_real_process():
    done = real("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, "pellucid 0.1.0\n", "")


def test_a_mistake_in_a_real_process(tmp_path):
    done = real("train", tmp_path / "nowhere", cwd=tmp_path)
    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr.startswith("error: no folder and no data set is called")
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_training_in_a_real_process(tmp_path):
    done = real("train", "digits", *TINY, "--epochs", "0.2", "--out", "my run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "trained in" in done.stdout
    assert "error" not in done.stderr
    report = html.unescape((tmp_path / "my run" / "report.html").read_text())
    assert f"pellucid train digits {' '.join(TINY)} --epochs 0.2 --out 'my run'" in report


def test_demo(tmp_path, capsys):
    assert main(["demo", "--epochs", "0.5", "--out", str(tmp_path / "demo")]) == 0
    said = capsys.readouterr().out
    assert "test accuracy of CRATE" in said
    assert "What to try next" in said
    report = (tmp_path / "demo" / "report.html").read_text()
    assert "CRATE" in report
    assert "ViT" in report
    assert (tmp_path / "demo" / "beside-vit_digits" / "model" / "model.safetensors").is_file()
    assert "pellucid demo --seed 0 --epochs 0.5" in report
    before = contents(tmp_path / "demo")
    again = ["demo", "--epochs", "0.5", "--out", str(tmp_path / "demo")]
    refused(capsys, again, "holds a run already", "--resume", "--overwrite")
    assert contents(tmp_path / "demo") == before
    assert main([*again, "--resume"]) == 0
    for name in ("model", "beside-vit_digits/model"):
        weights = tmp_path / "demo" / name / "model.safetensors"
        assert weights.read_bytes() == before[weights]


def test_a_folder_of_mixed_pictures_from_check_to_report(photos, tmp_path, capsys):
    assert main(["check", str(photos)]) == 0
    assert "24 images in 2 classes" in capsys.readouterr().out
    out = tmp_path / "run"
    sizes = ["--img-size", "16", "--patch-size", "4", "--embed-dim", "24", "--depth", "2", "--num-heads", "4"]
    train = ["train", str(photos), "--model", "crate_micro_patch4_32", *sizes, "--objective", "supervised"]
    assert main([*train, "--epochs", "2", "--batch-size", "8", "--out", str(out)]) == 0
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["model_args"] == {
        "img_size": 16,
        "patch_size": 4,
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 4,
    }
    assert (out / "report.html").is_file()
    capsys.readouterr()

    assert main(["evaluate", str(out), "-o", str(tmp_path / "scores.json")]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["count"] == 4  # a fifth of twelve, of each class
    assert [row["name"] for row in scores["classes"]] == ["cat", "dog"]
    assert main(["evaluate", str(out), str(photos)]) == 0
    assert "4 images" in capsys.readouterr().out

    assert main(["predict", str(out), str(photos / "cat" / "00.png"), str(photos / "dog" / "03.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all("cat" in line and "dog" in line and "%" in line for line in lines)


def test_audit_and_report_of_a_run(run, tmp_path, capsys):
    assert main(["audit", str(run), "digits", "-o", str(tmp_path / "audit.json"), "--limit", "40"]) == 0
    said = capsys.readouterr().out
    read = json.loads((tmp_path / "audit.json").read_text())
    assert read["samples"] == 40
    assert read["data"] == "digits"
    assert [row["step"] for row in read["rows"]] == ["compress", "sparsify"] * 2
    assert read["verdict"]["text"] in said
    assert main(["report", str(run), "-o", str(tmp_path / "report.html")]) == 0
    assert read["verdict"]["text"][:8] in (tmp_path / "report.html").read_text()


def test_audit_of_a_model_by_its_name(capsys):
    assert main(["audit", "vit_digits", "digits", "--limit", "8"]) == 0
    assert "states no objective" in capsys.readouterr().out
    assert main(["audit", "crate_digits", "digits", "--limit", "8"]) == 0
    assert "of the images" in capsys.readouterr().out


def test_audit_of_a_gray_model_on_colour_and_the_reverse(photos, capsys):
    for model, data in (("crate_digits", photos), ("crate_micro_patch4_32", "digits")):
        assert main(["audit", model, str(data), "--limit", "4"]) == 0
        assert "R^c(Z | U)" in capsys.readouterr().out


def test_labels_are_matched_by_the_name_of_their_class(tmp_path, capsys):
    for kind, level in (("ant", 0), ("bee", 120), ("cow", 250)):
        for i in range(10):
            (tmp_path / "three" / kind).mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), level + i % 3).save(tmp_path / "three" / kind / f"{i}.png")
    shutil.copytree(tmp_path / "three" / "cow", tmp_path / "some" / "cow")
    shutil.copytree(tmp_path / "three" / "bee", tmp_path / "some" / "bee")
    out = tmp_path / "run"
    argv = ["train", str(tmp_path / "three"), *TINY, "--epochs", "60", "--batch-size", "24", "--no-report"]
    assert main([*argv, "--augment", "none", "--out", str(out)]) == 0
    assert main(["evaluate", str(out), str(tmp_path / "some"), "-o", str(tmp_path / "s.json")]) == 0
    scores = json.loads((tmp_path / "s.json").read_text())
    assert [(row["name"], row["count"]) for row in scores["classes"]] == [
        ("ant", 0),
        ("bee", 10),
        ("cow", 10),
    ]
    assert scores["accuracy"] == 1
    capsys.readouterr()
    assert main(["predict", str(out), str(tmp_path / "some" / "cow" / "3.png"), "--top", "1"]) == 0
    assert "cow/3.png: cow " in capsys.readouterr().out


def test_names_that_would_confuse_a_terminal(tmp_path, capsys):
    names = ["\x1b[31mred", os.fsdecode(b"caf\xe9"), "語"]
    for seed, name in enumerate(names):
        for i in range(5):
            picture(tmp_path / "data" / name / f"{i}.png", 10 * seed + i, (8, 8))
    out = tmp_path / "run"
    argv = ["train", str(tmp_path / "data"), *TINY, "--epochs", "1", "--batch-size", "4", "--out", str(out)]
    assert main(argv) == 0
    assert main(["evaluate", str(out)]) == 0
    assert main(["predict", str(out), str(tmp_path / "data" / names[0] / "0.png")]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said
    for shown in ("\\x1b[31mred", "caf\\udce9", "語"):
        assert shown in said


def test_a_run_remembers_how_many_images_may_be_bad(photos, tmp_path, capsys):
    (photos / "cat" / "cut.png").write_bytes(b"")
    out = tmp_path / "run"
    argv = ["train", photos, *TINY, "--epochs", "1", "--batch-size", "8", "--no-report", "--out", out]
    refused(capsys, argv, "cat/cut.png: empty file", "--max-bad")
    assert main([*map(str, argv), "--max-bad", "0.1"]) == 0
    assert main(["evaluate", str(out)]) == 0
    assert main(["audit", str(out), "--limit", "2"]) == 0
    other = tmp_path / "other"
    shutil.copytree(photos, other)
    refused(capsys, ["evaluate", out, other, "--max-bad", "0.01"], "--max-bad")
    assert main(["evaluate", str(out), str(other)]) == 0


def test_known_data_that_is_not_there(run, tmp_path, capsys):
    for command in ("evaluate", "audit", "train"):
        words = [run, "cifar10"] if command != "train" else ["cifar10"]
        refused(capsys, [command, *words, "--data-root", tmp_path], "cifar10 is missing", "--download")
    refused(capsys, ["check", "digit"], "problems")


def test_npz(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (60, 9, 9, 3), dtype=np.uint8), np.arange(60) % 3
    np.savez(tmp_path / "small.npz", x=x, y=y)
    out = tmp_path / "run"
    argv = ["train", str(tmp_path / "small.npz"), "--epochs", "1", "--batch-size", "16", "--out", str(out)]
    assert main([*argv, "--no-report"]) == 0
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["model"] == "crate_digits"
    assert config["model_args"] == {"img_size": 10}
    assert json.loads((out / "model" / "config.json").read_text())["pretrained_cfg"]["input_size"] == [
        3,
        10,
        10,
    ]


@pytest.mark.slow
def test_bench_of_the_analytic_methods(tmp_path, capsys):
    out = tmp_path / "analytic.json"
    assert main(["bench-analytic", "--signals", "60", "--rounds", "1", "-o", str(out)]) == 0
    rows = json.loads(out.read_text())
    assert len(rows["sparse_coding"]) == 6
    assert all(row["gap"] <= 1.01 * row["scikit_learn_gap"] for row in rows["sparse_coding"])
    assert all(row["vs_loop"][0] > 0 for row in rows["redunet"])
    assert "times scikit-learn's speed" in capsys.readouterr().out
    refused(capsys, ["bench-analytic", "--rounds", "0"], "--rounds 0")


def test_models_and_bench(tmp_path, capsys):
    assert main(["models", "large"]) == 0
    assert "77.641 M" in capsys.readouterr().out
    argv = ["bench", "--models", "crate_digits", "--batch-sizes", "4", "--dtypes", "float32", "--rounds", "1"]
    assert main([*argv, "-o", str(tmp_path / "bench.json")]) == 0
    assert len(json.loads((tmp_path / "bench.json").read_text())["rows"]) == 2


def test_the_command_line_goes_before_the_file(tmp_path):
    (tmp_path / "options.yaml").write_text("data: digits\nepochs: 0.2\nseed: 3\nmodel_args: {depth: 2}\n")
    out = tmp_path / "run"
    argv = ["train", "--config", str(tmp_path / "options.yaml"), "--seed", "5", "--embed-dim", "16"]
    assert main([*argv, "--num-heads", "2", "--out", str(out), "--no-report"]) == 0
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert (config["seed"], config["epochs"]) == (5, 0.2)
    assert config["model_args"] == {"img_size": 8, "depth": 2, "embed_dim": 16, "num_heads": 2}


def test_a_runs_config_repeats_it_bit_for_bit(run, tmp_path):
    again = tmp_path / "again"
    assert main(["train", "--config", str(run / "config.yaml"), "--out", str(again), "--no-report"]) == 0
    one, other = ((folder / "model" / "model.safetensors").read_bytes() for folder in (run, again))
    assert one == other


def test_misspelt_words_are_set_right(tmp_path, capsys):
    refused(capsys, ["train", "digits", "--epoch", "3"], "--epoch", "did you mean '--epochs'")
    refused(capsys, ["train", "digits", "--model", "crate_tinny"], "did you mean 'crate_tiny_patch14_224'")
    refused(capsys, ["train", "digits", "--objective", "supervized"], "did you mean 'supervised'")
    refused(capsys, ["train", "digit"], "did you mean 'digits'")
    refused(capsys, ["train", "digits", "--model-arg", "embed_dims=3"], "did you mean 'embed_dim'")
    refused(capsys, ["train", "digits", "--model-arg", "embed_dim"], "NAME=VALUE")
    (tmp_path / "options.yaml").write_text("data: digits\nepoch: 3\n")
    refused(capsys, ["train", "--config", tmp_path / "options.yaml"], "'epoch'", "did you mean 'epochs'")
    refused(capsys, ["train", "--config", tmp_path / "none.yaml"], "cannot read config")
    refused(capsys, ["train", "digits", "--epochs", "many"], "--epochs", "many")
    refused(capsys, ["train"], "no data given")


def test_data_that_cannot_be_used(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train = ["train", "--epochs", "1", "--batch-size", "8", "--no-report"]
    refused(capsys, [*train, tmp_path / "nowhere"], "nowhere")
    (tmp_path / "empty").mkdir()
    refused(capsys, [*train, tmp_path / "empty"], "no images under")
    picture(tmp_path / "one" / "cat" / "1.png")
    picture(tmp_path / "one" / "cat" / "2.png", 1)
    refused(capsys, [*train, tmp_path / "one"], 'only one class, "cat"', "at least two")
    (tmp_path / "loose").mkdir()
    picture(tmp_path / "loose" / "1.png")
    refused(capsys, [*train, tmp_path / "loose"], "side by side", "a folder of its own")
    refused(capsys, [*train, tmp_path / "loose" / "1.png"], "neither a folder nor a .npz file")
    shutil.copytree(photos, tmp_path / "deep" / "set" / "train")
    shutil.copytree(photos, tmp_path / "deep" / "set" / "val")
    refused(capsys, [*train, tmp_path / "deep"], f"did you mean {tmp_path / 'deep' / 'set'}?")
    picture(photos / "eel" / "1.png")
    refused(capsys, [*train, photos], "eel", "1 image")
    (photos / "eel" / "1.png").unlink()
    (photos / "eel").rmdir()
    (photos / "cat" / "text.jpg").write_text("<html>not found</html>")
    refused(capsys, [*train, photos], "text.jpg: an HTML page", "1 of 25", "--max-bad")
    Image.new("1", (30000, 30000)).save(photos / "cat" / "text.jpg", "PNG")
    refused(capsys, [*train, photos], "text.jpg: 900 MP > limit 50 MP")
    assert not (tmp_path / "runs").exists()


def test_arrays_that_cannot_be_used(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (8, 8, 8), dtype=np.uint8), np.arange(8) % 2
    train = ["train", "a.npz", "--epochs", "1"]
    for arrays, said in (
        ({"x": x}, "no array 'y'"),
        ({"x": x / 255, "y": y}, "x is float64"),
        ({"x": x, "y": y[:5]}, "8 images and y 5 labels"),
        ({"x": x, "y": y * 0}, "only one class"),
        ({"x": x, "y": y.astype(object)}, "pickled objects"),
    ):
        np.savez(tmp_path / "a.npz", **arrays)
        refused(capsys, train, said)
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 half of it")
    refused(capsys, train, "cannot read")
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_a_good_data_set_is_called_good(photos, capsys):
    for data in (photos, "digits"):
        assert main(["check", str(data)]) == 0
        assert capsys.readouterr().out.endswith("ok\n")


def test_check_lists_what_is_wrong(photos, capsys):
    whole = (photos / "cat" / "00.png").read_bytes()
    (photos / "cat" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (photos / "cat" / "nothing.png").write_bytes(b"")
    (photos / "dog" / "page.jpg").write_text("<html></html>")
    bomb = Image.new("1", (30000, 30000))
    bomb.save(photos / "dog" / "bomb.png")
    before = contents(photos)
    assert main(["check", str(photos)]) == 3
    out, err = capsys.readouterr()
    assert "4 rejected" in out
    for line in (
        "cut.png: truncated",
        "nothing.png: empty file (0 bytes)",
        "page.jpg: an HTML page, not an image",
        "bomb.png: 900 MP > limit 50 MP",
    ):
        assert line in out
    assert err.startswith("error: photos has problems")
    assert contents(photos) == before


def test_sizes_that_do_not_fit(capsys, tmp_path):
    argv = ["train", "digits", "--out", tmp_path / "x", "--model", "crate_micro_patch4_32"]
    refused(capsys, [*argv, "--img-size", "30"], "30 / 4 is not whole; nearest sizes 28 or 32")
    refused(capsys, [*argv, "--img-size", "2"], "smaller than a patch")
    refused(capsys, [*argv, "--num-heads", "7"], "192 is not divisible by num_heads 7")
    refused(capsys, [*argv, "--batch-size", "10", "--accumulate", "3"], "10")
    refused(capsys, [*argv, "--model-arg", "depth=[1"], "depth", "'[1'")
    refused(capsys, [*argv, "--model-arg", "num_classes=3"], "num_classes 3, the data has 10", "leave it out")
    assert not (tmp_path / "x").exists()


def test_values_that_cannot_be(capsys, tmp_path):
    argv = ["train", "digits", "--out", tmp_path / "x"]
    for option, value in (
        ("--epochs", "0"),
        ("--epochs", "nan"),
        ("--batch-size", "0"),
        ("--lr", "-1"),
        ("--warmup", "2"),
        ("--precision", "16"),
        ("--augment", "mirrors"),
        ("--engine", "steam"),
        ("--seed", "-1"),
    ):
        refused(capsys, [*argv, option, value], option.strip("-").replace("-", "_").split("_")[0], value)
    refused(capsys, ["audit", "crate_digits", "digits", "--limit", "0"], "limit 0", "at least 1")
    refused(capsys, ["audit", "crate_digits"], "name the data to look at")
    refused(capsys, ["bench", "--models", "crate_digits", "--rounds", "0"], "rounds 0")
    refused(capsys, ["models", "llama"], "llama", "crate_digits")
    refused(capsys, ["trian", "digits"], "trian")
    assert not (tmp_path / "x").exists()


def test_configs_that_cannot_be(capsys, tmp_path):
    path = tmp_path / "options.yaml"
    for text, said in (
        ("epochs: [", "is not YAML"),
        ("just words", "holds no options"),
        ("data: digits\nepochs: many", "epochs is 'many'; expected float"),
        ("data: digits\nmodel_args: 3", "model_args is 3"),
        ("data: digits\nobjective: supervized", "did you mean 'supervised'"),
        ("data: !!python/object/apply:os.getcwd []", "is not YAML"),
    ):
        path.write_text(text)
        refused(capsys, ["train", "--config", path, "--out", tmp_path / "x", "--depth", "1"], said)
    path.write_bytes(b"\x89PNG\r\n")
    refused(capsys, ["train", "--config", path], "is not YAML")
    refused(capsys, ["train", "--config", tmp_path], "cannot read config")
    assert not (tmp_path / "x").exists()


def test_what_cannot_be_built_costs_no_earlier_run(run, tmp_path, capsys):
    before = contents(run)
    argv = ["train", "digits", "--epochs", "1", "--overwrite", "--out", run]
    refused(capsys, [*argv, "--model", "crate_tinny"], "did you mean")
    refused(capsys, [*argv, "--model", "crate_digits", "--patch-size", "3"], "8 / 3 is not whole")
    refused(capsys, [*argv, "--init-from", tmp_path], "holds no model")
    refused(capsys, [*argv, "--beside", "vit_digit"], "did you mean 'vit_digits'")
    refused(capsys, [*argv, "--beside", "vit_digits", "--no-report"], "--no-report")
    assert contents(run) == before


def test_any_timm_model_is_trained_and_reported(photos, tmp_path, capsys):
    argv = ["train", photos, "--model", "test_resnet", "--epochs", "1", "--batch-size", "12"]
    assert main([str(word) for word in [*argv, "--out", tmp_path / "run"]]) == 0
    assert "ResNet" in (tmp_path / "run" / "report.html").read_text()


def test_a_device_that_is_not_there(tmp_path, capsys):
    argv = ["train", "digits", *TINY, "--epochs", "1", "--out", tmp_path / "x"]
    refused(capsys, [*argv, "--accelerator", "banana"], "banana")


def test_a_name_like_no_other_gets_a_short_answer(capsys):
    refused(capsys, ["audit", "nomodel", "digits"], "unknown model 'nomodel'", "crate_digits")


def test_a_run_is_not_overwritten_unasked(run, tmp_path, capsys):
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    argv = ["train", "digits", *TINY, "--epochs", "1", "--out", run]
    refused(capsys, argv, "holds a run already", "--resume", "--overwrite")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words")
    refused(capsys, [*argv[:-1], tmp_path / "mine", "--overwrite"], "is not a run")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "words"
    refused(capsys, [*argv[:-1], tmp_path / "other", "--resume"], "nothing to resume")
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_what_is_no_run_or_no_image(run, photos, tmp_path, capsys):
    refused(capsys, ["evaluate", tmp_path / "none"], "does not exist")
    refused(capsys, ["report", photos], "is not a run")
    refused(capsys, ["evaluate", run, photos], "classes that the model does not know", "cat")
    refused(capsys, ["predict", run], "no images given")
    (photos / "bad.png").write_bytes(b"no picture")
    several = ["predict", run, photos / "bad.png", photos / "cat" / "00.png", photos / "none.png"]
    assert main(list(map(str, several))) == 3
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    assert out.startswith(f"{photos / 'cat' / '00.png'}: ")
    assert "error: 2 of 3 images could not be read" in err
    assert f"{photos / 'bad.png'}: text, not an image" in err
    assert f"{photos / 'none.png'}: no such file" in err
    refused(capsys, ["predict", run, *[photos / f"{i}.jpg" for i in range(30)]], "30 of 30", "and 27 more")
    refused(capsys, ["predict", run, photos / "cat" / "00.png", "--top", "0"], "--top is 0")
    refused(capsys, ["audit", "crate_tinny", "digits"], "did you mean")
    refused(capsys, ["audit", "resnet18", "digits"], "cannot look inside ResNet")


def test_an_output_that_cannot_be_is_told_before_the_work(run, tmp_path, capsys):
    for words in (["evaluate", run], ["audit", run], ["report", run], ["bench", "--models", "crate_digits"]):
        refused(capsys, [*words, "-o", tmp_path / "no" / "a.json"], "is not a folder - make it first")
        refused(capsys, [*words, "-o", run / "config.yaml" / "a.json"], "is not a folder")
        refused(capsys, [*words, "-o", tmp_path], "it is a folder - name a file in it")
        assert capsys.readouterr().out == ""
    argv = ["train", "digits", *TINY, "--epochs", "1", "--out"]
    for out in (run / "config.yaml", run / "config.yaml" / "x"):
        before = contents(run)
        refused(capsys, [*argv, out], str(run / "config.yaml"))
        assert contents(run) == before


def test_a_disk_that_fills_up_costs_no_earlier_output(run, tmp_path, capsys, monkeypatch):
    earlier = tmp_path / "audit.json"
    earlier.write_text("{}")

    def full(path, content):
        path.write_bytes(content[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("pellucid.training.checkpoint.write_flushed", full)
    argv = ["audit", run, "--limit", "2", "-o", earlier]
    refused(capsys, argv, f"cannot write {earlier}: No space left on device - make room")
    assert earlier.read_text() == "{}"
    assert list(tmp_path.iterdir()) == [earlier]


def test_a_run_beside_one_on_other_data(run, photos, tmp_path, capsys):
    out = tmp_path / "other"
    argv = ["train", photos, *TINY, "--epochs", "1", "--batch-size", "8", "--no-report", "--out", out]
    assert main([str(word) for word in argv]) == 0
    target = tmp_path / "both.html"
    refused(capsys, ["report", run, "--beside", out, "-o", target], "learnt other classes", str(out))
    assert not target.exists()


@pytest.mark.parametrize("command", ["evaluate", "predict", "audit", "report"])
def test_a_pickle_in_place_of_the_weights_is_never_opened(command, run, photos, tmp_path, capsys):
    copy, canary = tmp_path / "copy", tmp_path / "canary"
    shutil.copytree(run, copy)
    words = [copy, photos / "cat" / "00.png"] if command == "predict" else [copy]
    for protocol in (2, 4):
        pickled(copy / "model" / "model.safetensors", canary, protocol)
        refused(capsys, [command, *words], "refused", "pickle", "safetensors")
    pickled(copy / "model" / "model.safetensors", canary, None)
    refused(capsys, [command, *words], "refused", "pickle", "safetensors")
    (copy / "model" / "model.safetensors").write_bytes(b"\xff" * 64)
    refused(capsys, [command, *words], "damaged")
    shutil.rmtree(copy / "model")
    refused(capsys, [command, *words], "has not ended", "--resume")
    assert not canary.exists()


def pickled(path, canary, protocol):
    """A file that makes ``canary`` when it is unpickled: plain, or as torch saves it."""

    class Bomb:
        def __reduce__(self):
            return (open, (str(canary), "w"))

    if protocol is None:
        torch.save({"weights": Bomb()}, path)  # noqa: TID251
    else:
        path.write_bytes(pickle.dumps({"weights": Bomb()}, protocol))


def test_weights_of_another_kind_are_refused(run, tmp_path, capsys):
    canary, path = tmp_path / "canary", tmp_path / "model.safetensors"
    pickled(path, canary, None)
    argv = ["train", "digits", *TINY, "--epochs", "1", "--no-report", "--out", tmp_path / "x"]
    refused(capsys, [*argv, "--init-from", path], "is a pickle")
    assert not canary.exists()
    other = ["train", "digits", "--model", "vit_digits", "--epochs", "1", "--out", tmp_path / "x"]
    refused(capsys, [*other, "--init-from", run], "is crate_digits, the run asks for vit_digits")
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (40, 8, 8), dtype=np.uint8), np.arange(40) % 2
    np.savez(tmp_path / "two.npz", x=x, y=y)
    two = ["train", tmp_path / "two.npz", *TINY, "--epochs", "1", "--batch-size", "8", "--no-report"]
    two += ["--out", tmp_path / "x", "--init-from", run]
    refused(capsys, two, "knows 10 classes, the data has 2", "--new-head")
    assert main([str(word) for word in [*two, "--new-head"]]) == 0


def test_debug_shows_where(tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        main(["check", str(tmp_path / "nowhere"), "--debug"])
