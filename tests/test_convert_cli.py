"""``pellucid convert``: a published file becomes a model/ folder that everything else reads."""

import argparse
import json
import os
import re

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import pellucid
from pellucid.cli import main
from pellucid.training import checkpoint

DIGITS = [str(digit) for digit in range(10)]


@pytest.fixture(scope="module")
def data(recorded):
    return recorded("crate")


@pytest.fixture(scope="module")
def file(data, tmp_path_factory):
    """The recorded CRATE in the layout of its authors' files, options and schedule included."""
    folder = tmp_path_factory.mktemp("published")
    state = {f"module.{key[6:]}": value for key, value in data.items() if key.startswith("state/")}
    content = {"state_dict": state, "epoch": np.float64(3), "args": argparse.Namespace(lr=0.1)}
    torch.save(content, folder / "crate.pth")  # noqa: TID251
    (folder / "names.txt").write_text("\n".join(DIGITS) + "\n")
    return folder / "crate.pth"


@pytest.fixture(scope="module")
def converted(file, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "crate"
    names = file.parent / "names.txt"
    argv = ["convert", file, "-o", out, "--model-arg", "num_heads=4", "--class-names", names]
    assert main([str(word) for word in argv]) == 0
    return out


def run(capsys, *argv):
    capsys.readouterr()
    code = main([str(word) for word in argv])
    out, err = capsys.readouterr()
    return code, out, err


def refused(capsys, argv, message):
    code, _, err = run(capsys, *argv)
    assert code in (2, 4, 6)
    assert err.startswith("error: ")
    assert len(err.splitlines()) <= 5
    assert re.search(message, err), err


def close(actual, expected):
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * scale)


# --- what it writes ----------------------------------------------------------------------------------------


def test_it_says_what_it_found_and_how_to_go_on(file, tmp_path, capsys):
    out = tmp_path / "deep" / "crate"
    code, said, _ = run(capsys, "convert", file, "-o", out, "--model-arg", "num_heads=4")
    assert code == 0
    assert f"read: {file}, part 'state_dict'\n" in said
    assert "recognised: CRATE, as crate_base_patch16_224 with img_size=32, patch_size=8" in said
    assert "num_heads=4" in said
    assert f"written: {out}, 0.033 M parameters, 10 classes" in said
    assert f"pellucid audit {out} digits" in said
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    assert [path.name for path in out.parent.iterdir()] == ["crate"]
    config = json.loads((out / "config.json").read_text())
    assert config["label_names"] == [f"class {i}" for i in range(10)]
    assert config["pretrained_cfg"]["mean"] == pytest.approx([0.485, 0.456, 0.406])
    assert config["pretrained_cfg"]["std"] == pytest.approx([0.229, 0.224, 0.225])
    assert "license" not in config["pretrained_cfg"]


@torch.no_grad()
def test_everything_reads_it(converted, data):
    close(pellucid.load(converted)(data["input"]), data["logits"])
    timms = timm.create_model(f"local-dir:{converted}", pretrained=True).eval()
    close(timms(data["input"]), data["logits"])
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForImageClassification.from_pretrained(converted).eval()
    close(model(data["input"]).logits, data["logits"])
    assert model.config.id2label == dict(enumerate(DIGITS))


def test_the_other_commands_take_it(converted, tmp_path, capsys):
    argv = ["audit", converted, "digits", "--limit", "9", "-o", tmp_path / "audit.json"]
    code, said, _ = run(capsys, *argv)
    assert code == 0
    assert len(json.loads((tmp_path / "audit.json").read_text())["rows"]) == 6
    code, said, _ = run(capsys, "evaluate", converted, "digits")
    assert code == 0
    assert "450 images" in said
    Image.new("RGB", (40, 50), (200, 30, 30)).save(tmp_path / "red.png")
    code, said, _ = run(capsys, "predict", converted, tmp_path / "red.png", "--top", "10")
    assert code == 0
    assert sorted(re.findall(r"(\d) [\d.]+%", said)) == DIGITS


# --- a backbone of SimDINOv2 ------------------------------------------------------------------------------


def teacher_state():
    """Zeros in the published names and shapes, chunks and registers and heads and all."""
    shapes = {"cls_token": (1, 1, 64), "pos_embed": (1, 17, 64), "register_tokens": (1, 4, 64)}
    shapes |= {
        "patch_embed.proj.weight": (64, 3, 8, 8),
        "patch_embed.proj.bias": (64,),
        "mask_token": (1, 64),
    }
    for block in ("blocks.0.0.", "blocks.1.1."):
        shapes |= {f"{block}attn.qkv.weight": (192, 64), f"{block}attn.qkv.bias": (192,)}
        shapes |= {f"{block}attn.proj.weight": (64, 64), f"{block}attn.proj.bias": (64,)}
        shapes |= {f"{block}mlp.fc1.weight": (256, 64), f"{block}mlp.fc1.bias": (256,)}
        shapes |= {f"{block}mlp.fc2.weight": (64, 256), f"{block}mlp.fc2.bias": (64,)}
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma"):
            shapes[block + name] = (64,)
    shapes |= {"norm.weight": (64,), "norm.bias": (64,)}
    state = {f"backbone.{name}": torch.randn(shape) for name, shape in shapes.items()}
    return {**state, "dino_head.mlp.0.weight": torch.zeros(8, 64), "dino_head.mlp.0.bias": torch.zeros(8)}


def test_a_backbone_gives_features(tmp_path, capsys):
    path, out = tmp_path / "v2.pth", tmp_path / "v2"
    teacher = teacher_state()
    student = {key: torch.zeros_like(value) for key, value in teacher.items()}
    torch.save({"student": student, "teacher": teacher}, path)  # noqa: TID251
    code, said, _ = run(capsys, "convert", path, "-o", out)
    assert code == 0
    assert "part 'teacher' (--key takes another: student)" in said
    assert "recognised: DINOv2 / SimDINOv2 ViT, as vit_base_patch16_224 with" in said
    keys = "backbone.mask_token, dino_head.mlp.0.bias, dino_head.mlp.0.weight"
    assert f"left out, 3 keys that the model has no use for: {keys}" in said
    assert "features only" in said
    assert "predict" not in said
    model = pellucid.load(out)
    images = torch.randn(2, 3, 32, 32)
    expected = pellucid.from_published(teacher).eval()
    with torch.no_grad():
        assert torch.equal(model(images), expected(images))
        timms = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
        assert torch.equal(timms(images), expected(images))
        transformers = pytest.importorskip("transformers")
        hub = transformers.AutoModel.from_pretrained(out).eval()
        tokens = expected.forward_features(images)
        assert torch.equal(hub(images).last_hidden_state, tokens)
    code, said, _ = run(capsys, "audit", out, "digits", "--limit", "8")
    assert code == 0
    Image.new("RGB", (32, 32)).save(tmp_path / "black.png")
    for command in (["predict", out, tmp_path / "black.png"], ["evaluate", out, "digits"]):
        refused(capsys, command, "has no classifier, it gives features")
    code, said, _ = run(capsys, "convert", path, "-o", tmp_path / "student", "--key", "student")
    assert code == 0
    assert not any(value.any() for value in pellucid.load(tmp_path / "student").state_dict().values())


# --- what it refuses ---------------------------------------------------------------------------------------


def test_a_folder_is_only_replaced_when_asked(file, tmp_path, capsys):
    out = tmp_path / "crate"
    argv = ["convert", file, "-o", out, "--model-arg", "num_heads=4"]
    out.mkdir()
    assert run(capsys, *argv)[0] == 0
    before = (out / "config.json").read_bytes()
    refused(capsys, argv, "holds a model already - give --overwrite")
    argv[-1] = "num_heads=2"
    assert run(capsys, *argv, "--overwrite")[0] == 0
    assert (out / "config.json").read_bytes() != before
    (out / "notes.txt").write_text("mine")
    refused(
        capsys, [*argv, "--overwrite"], "is not a model/ folder - take another --out; it is left as it is"
    )
    assert (out / "notes.txt").read_text() == "mine"
    refused(capsys, ["convert", file, "-o", file, "--overwrite"], "is not a model/ folder")


@pytest.mark.slow
def test_a_failed_write_leaves_the_old_model(file, tmp_path, capsys, monkeypatch):
    out = tmp_path / "crate"
    argv = ["convert", file, "-o", out, "--model-arg", "num_heads=4"]
    assert run(capsys, *argv)[0] == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    write = checkpoint.write_flushed

    def full(path, content):
        write(path, content[: len(content) // 2])
        raise OSError(28, os.strerror(28), str(path))

    monkeypatch.setattr(checkpoint, "write_flushed", full)
    refused(
        capsys, [*argv, "--overwrite"], r"cannot write .*crate: No space left on device, it needs 0\.1 MB"
    )
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    refused(capsys, [*argv[:3], tmp_path / "new", *argv[4:]], "cannot write")
    assert [path.name for path in tmp_path.iterdir()] == ["crate"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\nb\n", "has 2 lines; expected 10 different class names"),
        ("a\n" * 10, "expected 10 different class names"),
        ("a\n\nb\nc\nd\ne\nf\ng\nh\ni\n", "expected 10 different class names"),
        (b"\xff\xfe" * 10, "is not text in UTF-8"),
    ],
)
def test_class_names_that_do_not_fit(file, tmp_path, capsys, content, message):
    names = tmp_path / "names.txt"
    names.write_bytes(content if isinstance(content, bytes) else content.encode())
    argv = ["convert", file, "-o", tmp_path / "out", "--model-arg", "num_heads=4", "--class-names", names]
    refused(capsys, argv, message)
    assert not (tmp_path / "out").exists()


class Bomb:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (self.canary,)


@pytest.mark.slow
def test_wrong_input(file, tmp_path, capsys):
    out = ["-o", tmp_path / "out"]
    refused(capsys, ["convert", tmp_path / "nowhere.pth", *out], r"nowhere\.pth does not exist")
    refused(
        capsys, ["convert", file, *out, "--key", "model"], "no part 'model' with tensors - known here: state"
    )
    refused(capsys, ["convert", file, *out, "--model-arg", "num_head=4"], "did you mean 'num_heads'")
    refused(capsys, ["convert", file, *out, "--model-arg", "num_heads"], "expected NAME=VALUE")
    refused(
        capsys, ["convert", file, *out, "--model-arg", "depth=2"], r"do not fit the model\nunexpected \(8\)"
    )
    refused(capsys, ["convert", file], r"--out|-o")
    torch.save({"a": Bomb(str(tmp_path / "canary"))}, tmp_path / "bomb.pth")  # noqa: TID251
    refused(capsys, ["convert", tmp_path / "bomb.pth", *out], r"refused: .*bomb\.pth needs posix\.mkdir")
    torch.save({"layer.weight": torch.zeros(2)}, tmp_path / "other.pth")  # noqa: TID251
    refused(
        capsys, ["convert", tmp_path / "other.pth", *out], r"not a known published layout \(first keys: layer"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bomb.pth", "other.pth"]
