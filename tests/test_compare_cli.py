"""`pellucid compare` as a user types it: trained, stopped, resumed, refused."""

import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from functools import partial

import numpy as np
import pytest
import yaml

from pellucid import comparison
from pellucid.cli import main
from pellucid.comparison import Spec, match_parameters, short_labels
from pellucid.data import load_data
from pellucid.errors import ConfigError

SMALL = "embed_dim=16,depth=2,num_heads=2"
CRATE, UNTIED, VIT = (
    f"crate_digits:{SMALL}",
    f"crate_digits:{SMALL},compression=untied",
    f"vit_digits:{SMALL}",
)
FOLDER = {
    CRATE: "crate_digits-embed_dim-16-depth-2-num_heads-2",
    UNTIED: "crate_digits-embed_dim-16-depth-2-num_heads-2-compression-untied",
    VIT: "vit_digits-embed_dim-16-depth-2-num_heads-2",
}


@pytest.fixture(autouse=True)
def _short_rounds(monkeypatch):
    """Speed is not what is tested here."""
    speed = partial(comparison.inference_speed, rounds=1, seconds=0.001)
    monkeypatch.setattr(comparison, "inference_speed", speed)


def command(out, *more, models=(CRATE, VIT), seeds=(0, 1), epochs=0.5):
    words = [
        "compare",
        "digits",
        "--models",
        *models,
        "--seeds",
        *seeds,
        "--epochs",
        epochs,
        "--out",
        out,
        *more,
    ]
    return [str(word) for word in words]


def refused(capsys, argv, *said):
    capsys.readouterr()
    assert main(argv) in (2, 3, 4)  # tests/test_faults.py: which
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert len(message.splitlines()) <= 5
    for words in said:
        assert words in message, message


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def result_of(out):
    return json.loads((out / "compare.json").read_text())["comparison"]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished comparison and what was printed."""
    out = tmp_path_factory.mktemp("compare") / "done"
    speed = partial(comparison.inference_speed, rounds=3, seconds=0.01)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        patch.setattr(comparison, "inference_speed", speed)
        assert main(command(out, models=(CRATE, UNTIED, VIT))) == 0
    return out, printed.getvalue()


def test_every_model_is_trained_from_every_seed_by_the_same_recipe(done):
    out, _ = done
    runs = {
        path.name: yaml.safe_load((path / "config.yaml").read_text())
        for path in out.iterdir()
        if path.is_dir()
    }
    assert runs.keys() == {f"{folder}-s{seed}" for folder in FOLDER.values() for seed in (0, 1)}
    own = {"out", "model", "model_args", "seed"}
    recipes = [{k: v for k, v in config.items() if k not in own} for config in runs.values()]
    assert all(recipe == recipes[0] for recipe in recipes)
    assert recipes[0]["epochs"] == 0.5
    assert {(c["model"], c["seed"]) for c in runs.values()} == {
        (name, seed) for name in ("crate_digits", "vit_digits") for seed in (0, 1)
    }


def test_what_is_measured_is_what_the_runs_hold(done):
    out, _ = done
    found = result_of(out)
    assert (found["data"], found["match"], found["epochs"], found["seeds"]) == (
        "digits",
        "width",
        0.5,
        [0, 1],
    )
    for model, spec in zip(found["models"], (CRATE, UNTIED, VIT), strict=True):
        for outcome in model["outcomes"]:
            run = json.loads((out / f"{FOLDER[spec]}-s{outcome['seed']}" / "result.json").read_text())
            assert outcome["accuracy"] == pytest.approx(run["accuracy"], abs=1e-6)
            assert outcome["seconds"] == pytest.approx(run["seconds"], abs=1e-3)
            assert outcome["images_per_second"] == pytest.approx(0.5 * 1347 / outcome["seconds"])
            assert outcome["count"] == 450
        saved = json.loads((out / f"{FOLDER[spec]}-s0" / "model" / "config.json").read_text())
        assert model["parameters"] == saved["num_parameters"]
        assert model["flop"] > 2 * 16 * 16
        assert model["images_per_second"] > 0
    crate, untied, vit = found["models"]
    assert [len(model["outcomes"][0]["steps"]) for model in (crate, untied, vit)] == [4, 4, 0]
    assert 0 < crate["nonzero"] < 1
    assert vit["nonzero"] is None
    gaps = [b["accuracy"] - a["accuracy"] for a, b in zip(crate["outcomes"], vit["outcomes"], strict=True)]
    assert vit["difference"]["mean"] == pytest.approx(sum(gaps) / 2)
    assert crate["speed"] == [1.0, 1.0, 1.0]


def test_what_is_printed_and_drawn(done):
    out, printed = done
    lines = printed.splitlines()
    crate = result_of(out)["models"][0]
    row = next(line for line in lines if line.startswith("crate "))
    assert f"{100 * crate['accuracy']:.2f} +- {100 * crate['deviation']:.2f} %" in row
    assert any("no objective" in line and line.startswith("vit") for line in lines)
    differences = [line for line in lines if " points (95% interval " in line]
    assert len(differences) == 2
    assert all(line.endswith(("cannot tell.", "worse.", "better.")) for line in differences)
    page = (out / "report.html").read_text()
    assert "crate, untied" in page


def test_a_finished_comparison_is_not_trained_again(done, capsys):
    out, _ = done
    kept = {path: data for path, data in contents(out).items() if path.parent != out}
    assert len(kept) > 20
    assert main(command(out, "--resume", models=(CRATE, UNTIED, VIT))) == 0
    assert contents(out).items() >= kept.items()
    assert "of 6" not in capsys.readouterr().out  # no step of training


def test_a_model_and_a_seed_can_be_added(tmp_path):
    assert main(command(tmp_path / "c", models=(CRATE,), seeds=(0,))) == 0
    first = contents(tmp_path / "c" / f"{FOLDER[CRATE]}-s0")
    alone = result_of(tmp_path / "c")["models"][0]
    assert (alone["difference"], alone["deviation"]) == (None, None)
    assert main(command(tmp_path / "c", "--resume")) == 0
    assert contents(tmp_path / "c" / f"{FOLDER[CRATE]}-s0") == first
    assert [len(m["outcomes"]) for m in result_of(tmp_path / "c")["models"]] == [2, 2]


def accuracies(out):
    return [[o["accuracy"] for o in model["outcomes"]] for model in result_of(out)["models"]]


@pytest.mark.slow
def test_a_signal_in_training_leaves_all_resumable(tmp_path):
    """A real process, stopped in its second model, goes on to the numbers of one that was not stopped."""
    out, whole = tmp_path / "stopped", tmp_path / "whole"
    argv = [sys.executable, "-m", "pellucid", *command(out, epochs=3)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    second = out / f"{FOLDER[VIT]}-s0" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not second.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert "run the same command with --resume to go on" in said
    assert (out / f"{FOLDER[CRATE]}-s0" / "result.json").exists()
    assert not (out / f"{FOLDER[VIT]}-s0" / "result.json").exists()
    assert not (out / "compare.json").exists()

    assert subprocess.run([*argv, "--resume"], capture_output=True, check=False).returncode == 0
    assert "pellucid compare digits --models" in (out / "report.html").read_text()
    assert main(command(whole, epochs=3)) == 0
    assert accuracies(out) == accuracies(whole)
    weights = [
        (folder / f"{FOLDER[VIT]}-s0" / "model" / "model.safetensors").read_bytes() for folder in (out, whole)
    ]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("where", ["_measured", "_time"])
def test_a_signal_while_measuring_leaves_all_resumable(where, tmp_path, monkeypatch, capsys):
    real = getattr(comparison, where)

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments)

    argv = command(tmp_path / "c", models=(CRATE,), seeds=(0,), epochs=0.2)
    with monkeypatch.context() as patch:
        patch.setattr(comparison, where, interrupted)
        assert main(argv) == 75
    assert "stopped by SIGINT: all that was trained is kept" in capsys.readouterr().err
    assert not (tmp_path / "c" / "compare.json").exists()
    assert main([*argv, "--resume"]) == 0
    assert (tmp_path / "c" / "report.html").exists()


def test_what_stands_is_left_alone(done, tmp_path, capsys):
    before = contents(done[0])
    refused(capsys, command(done[0]), "is not empty", "--resume")
    assert contents(done[0]) == before
    (tmp_path / "file").write_text("mine")
    refused(capsys, command(tmp_path / "file"), "is not empty")
    refused(capsys, command(tmp_path / "new", "--resume"), "nothing to resume")
    assert not (tmp_path / "new").exists()


def test_another_recipe_is_refused_on_resume(done, capsys):
    before = contents(done[0])
    other = command(done[0], "--resume", epochs=2)
    refused(capsys, other, "cannot resume with other options", "epochs 0.5 -> 2.0 (in a new run only)")
    refused(capsys, command(done[0], "--resume", "--lr", 0.1), "lr 0.003 -> 0.1 (in a new run only)")
    assert contents(done[0]) == before


def test_other_images_are_refused_on_resume(tmp_path, capsys):
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 2
    argv = ["compare", str(tmp_path / "d.npz"), *command(tmp_path / "c", models=(CRATE,), seeds=(0,))[2:]]

    def save():
        np.savez(tmp_path / "d.npz", x=rng.integers(0, 256, (40, 8, 8), dtype=np.uint8), y=labels)

    save()
    assert main(argv) == 0
    save()
    refused(capsys, [*argv, "--resume"], "has changed since", "compare again in another --out")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"models": (CRATE, "crate_dgits")}, "did you mean 'crate_digits'"),
        ({"models": (CRATE, "crate_digits:compresion=tied")}, "did you mean 'compression'"),
        ({"models": (CRATE, "crate_digits:embed_dim")}, "'embed_dim' is not OPTION=VALUE"),
        ({"models": (CRATE, "crate_digits:depth=[")}, "is not OPTION=VALUE"),
        ({"models": (CRATE, "crate_digits:embed_dim=15,num_heads=2")}, "crate_digits: "),
        ({"models": (CRATE, CRATE)}, "is named twice"),
        ({"seeds": (0, 0)}, "seed 0 is named twice"),
        ({"seeds": (-1,)}, "none below 0"),
        ({"epochs": 0}, "epochs is 0"),
    ],
)
def test_mistakes_are_told_before_anything_is_made(more, said, tmp_path, capsys):
    refused(capsys, command(tmp_path / "c", **more), said)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["model", "seed", "out", "data", "model_args", "init_from"])
def test_a_recipe_holds_no_model(key, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(f"lr: 0.01\n{key}: 1\n")
    refused(
        capsys, command(tmp_path / "c", "--config", tmp_path / "recipe.yaml"), f"{key} is no part of a recipe"
    )
    assert not (tmp_path / "c").exists()


def test_a_recipe_from_a_file(tmp_path):
    (tmp_path / "recipe.yaml").write_text("lr: 0.01\nepochs: 9\naugment: none\n")
    argv = command(
        tmp_path / "c", "--config", tmp_path / "recipe.yaml", models=(CRATE,), seeds=(5,), epochs=0.2
    )
    assert main(argv) == 0
    config = yaml.safe_load((tmp_path / "c" / f"{FOLDER[CRATE]}-s5" / "config.yaml").read_text())
    assert (config["lr"], config["epochs"], config["augment"], config["seed"]) == (0.01, 0.2, "none", 5)
    assert main([*argv, "--resume"]) == 0


def sizes(specs, images):
    return [sum(p.numel() for p in spec.build(images).parameters()) for spec in specs]


def test_widths_are_matched_to_the_nearest_number_of_parameters():
    images = load_data("digits")
    texts = ["crate_digits", "crate_digits:compression=untied", "vit_digits", "vit_digits:depth=8", CRATE]
    specs = [Spec.parse(text) for text in texts]
    matched = match_parameters(specs, images)
    target, *others = sizes(matched, images)
    assert matched[0] == specs[0]
    assert matched[-1] == specs[-1]  # its width was given
    for spec, heads, size in zip(matched[1:-1], (8, 4, 4), others[:-1], strict=True):
        width = spec.model_args["embed_dim"]
        assert width % heads == 0
        for neighbour in (width - heads, width + heads):
            args = {**spec.model_args, "embed_dim": neighbour}
            [other] = sizes([Spec(spec.text, spec.name, args)], images)
            assert abs(size - target) <= abs(other - target), (spec, neighbour)
    assert max(abs(math.log(size / target)) for size in others[:-1]) < 0.2


def test_matched_widths_are_trained_and_printed(tmp_path, capsys):
    models = ("crate_digits:depth=1,embed_dim=16,num_heads=2", "vit_digits:depth=1")
    argv = command(tmp_path / "c", "--match", "params", models=models, seeds=(0,), epochs=0.2)
    assert main(argv) == 0
    crate, vit = result_of(tmp_path / "c")["models"]
    width = vit["model_args"]["embed_dim"]
    assert (
        f"vit_digits:depth=1: width {width}, {vit['parameters']:,} parameters (was "
        in capsys.readouterr().out
    )
    assert abs(vit["parameters"] / crate["parameters"] - 1) < 0.35
    [run] = (tmp_path / "c").glob("vit*")
    assert yaml.safe_load((run / "config.yaml").read_text())["model_args"]["embed_dim"] == width


def test_a_specification_in_parts():
    spec = Spec.parse("crate_digits:img_size=[8,8],compression=untied,step_size=0.1")
    assert (spec.name, spec.folder) == (
        "crate_digits",
        "crate_digits-img_size-8-8-compression-untied-step_size-0.1",
    )
    assert spec.model_args == {"img_size": [8, 8], "compression": "untied", "step_size": 0.1}
    with pytest.raises(ConfigError, match="'=3' is not OPTION=VALUE"):
        Spec.parse("crate_digits:=3")


@pytest.mark.parametrize(
    ("texts", "labels"),
    [
        (["crate_digits", "crate_alpha_digits", "vit_digits"], ["crate", "crate alpha", "vit"]),
        (["crate_micro_patch4_32", "vit_micro_patch4_32"], ["crate", "vit"]),
        (["crate_digits:compression=untied,depth=2", "vit_digits"], ["crate, untied, depth 2", "vit"]),
        (["crate_digits", "vit_micro_patch4_32"], ["crate digits", "vit micro patch4 32"]),
        (["crate_digits", "crate_digits:stem=conv"], ["crate", "crate, conv"]),
        (["crate_digits:stem=x", "crate_digits:init=x"], ["crate, stem x", "crate, init x"]),
        (["crate_digits:compression=untied,depth=2", "vit_digits:depth=2"], ["crate, untied", "vit"]),
        (["crate_digits:depth=2", "vit_digits:depth=3"], ["crate, depth 2", "vit, depth 3"]),
        (["vit_digits"], ["vit"]),
        (["vit_digits:depth=3"], ["vit, depth 3"]),
    ],
)
def test_short_labels(texts, labels):
    assert short_labels([Spec.parse(text) for text in texts]) == labels
