"""The command line as a user types it: every command, and every wrong input with its one short message."""

import json
import subprocess
import sys
import time

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
    """Exit code 2, one short message that holds all of ``said``, no traceback."""
    assert main([str(word) for word in argv]) == 2
    err = capsys.readouterr().err
    message = err[err.index("error: ") :]
    assert len(message.strip().splitlines()) <= 6, message
    assert "Traceback" not in err
    for words in said:
        assert words in message, message


def test_help_answers_at_once_and_imports_little():
    code = (
        "import sys; from pellucid.cli import main; main(['--help']);"
        "print('heavy:', [m for m in ('torch', 'lightning', 'timm') if m in sys.modules])"
    )
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        times.append(time.perf_counter() - start)
    assert "heavy: []" in done.stdout
    for command in ("demo", "train", "evaluate", "predict", "audit", "report", "check", "models", "bench"):
        assert command in done.stdout
    assert min(times) < 0.5


def test_version_in_a_real_process():
    done = subprocess.run(
        [sys.executable, "-m", "pellucid", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "pellucid 0.1.0"


def test_demo(tmp_path, capsys):
    assert main(["demo", "--epochs", "0.5", "--out", str(tmp_path / "demo")]) == 0
    said = capsys.readouterr().out
    assert "test accuracy of CRATE" in said
    assert "What to try next" in said
    html = (tmp_path / "demo" / "report.html").read_text()
    assert "CRATE" in html
    assert "ViT" in html
    assert (tmp_path / "demo" / "beside-vit_digits" / "model" / "model.safetensors").is_file()


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
    refused(capsys, ["train", "digits", "--model", "crate_tinny"], "did you mean 'crate_tiny_patch16_224'")
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
    refused(capsys, [*train, tmp_path / "one"], "class")
    picture(photos / "eel" / "1.png")
    refused(capsys, [*train, photos], "eel", "1 image")
    (photos / "eel" / "1.png").unlink()
    (photos / "eel").rmdir()
    (photos / "cat" / "text.jpg").write_text("<html>not found</html>")
    refused(capsys, [*train, photos], "text.jpg", "--max-bad")
    assert not (tmp_path / "runs").exists()


def test_check_lists_what_is_wrong(photos, capsys):
    whole = (photos / "cat" / "00.png").read_bytes()
    (photos / "cat" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (photos / "cat" / "nothing.png").write_bytes(b"")
    (photos / "dog" / "page.jpg").write_text("<html></html>")
    bomb = Image.new("1", (30000, 30000))
    bomb.save(photos / "dog" / "bomb.png")
    assert main(["check", str(photos)]) == 2
    said = capsys.readouterr().out
    assert "4 rejected" in said
    for name in ("cut.png", "nothing.png", "page.jpg", "bomb.png"):
        assert name in said
    assert "900 MP > limit 50 MP" in said


def test_sizes_that_do_not_fit(capsys, tmp_path):
    argv = ["train", "digits", "--out", tmp_path / "x", "--model", "crate_micro_patch4_32"]
    refused(capsys, [*argv, "--img-size", "30"], "30 / 4 is not whole; nearest sizes 28 or 32")
    refused(capsys, [*argv, "--img-size", "2"], "smaller than a patch")
    refused(capsys, [*argv, "--num-heads", "7"], "192 is not divisible by num_heads 7")
    refused(capsys, [*argv, "--batch-size", "10", "--accumulate", "3"], "10")
    assert not (tmp_path / "x").exists()


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
    refused(capsys, ["predict", run, photos / "bad.png", photos / "cat" / "00.png"], "bad.png")
    refused(capsys, ["audit", "crate_tinny", "digits"], "did you mean")
    refused(capsys, ["audit", "resnet18", "digits"], "cannot look inside ResNet")
    refused(capsys, ["audit", run, "digits", "-o", tmp_path / "no" / "a.json"], "is not a folder")


def test_weights_of_another_kind_are_refused(run, tmp_path, capsys):
    canary = tmp_path / "canary"

    class Bomb:
        def __reduce__(self):
            return (open, (str(canary), "w"))

    path = tmp_path / "model.safetensors"
    torch.save({"weights": Bomb()}, path)  # noqa: TID251
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
