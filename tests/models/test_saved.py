"""Saved by a run, loaded by us, by timm and by transformers: the same logits."""

import json
import shutil

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import pellucid
from pellucid.data import load_data
from pellucid.errors import CheckpointError
from pellucid.models import load
from pellucid.training import train


@pytest.fixture(scope="module")
def images():
    return load_data("digits")


@pytest.fixture(scope="module", params=["crate_digits", "vit_digits", "crate_digits wide"])
def run(request, images, tmp_path_factory):
    """One epoch of each; the last with sizes of its own, one of them a pair."""
    model, *wide = request.param.split()
    sizes = {"img_size": (10, 8), "embed_dim": 32, "num_heads": 4, "reg_tokens": 2} if wide else {}
    out = tmp_path_factory.mktemp("saved") / "run"
    options = {"model": model, "model_args": {"depth": 2, **sizes}, "epochs": 0.5}
    return train(images, out=str(out), progress=False, average=0.9, **options)


@pytest.fixture(scope="module")
def pictures(run):
    height, width = run.model.pretrained_cfg["input_size"][1:]
    return torch.randn(4, 1, height, width, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def logits(run, pictures):
    with torch.no_grad():
        logits = run.model(pictures)
    assert logits.shape == (4, 10)
    assert logits.std() > 0.01
    return logits


def edit(run, tmp_path, **changes):
    """A copy of the run's model folder with another config."""
    folder = tmp_path / "model"
    shutil.copytree(run.out / "model", folder)
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        config.pop(key) if value is None else config.update({key: value})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("where", ["", "model"])
def test_loads_again(run, pictures, logits, where):
    model = pellucid.load(run.out / where)
    assert not model.training
    with torch.no_grad():
        assert torch.equal(model(pictures), logits)
    assert model.pretrained_cfg["label_names"] == [str(digit) for digit in range(10)]
    assert list(model.pretrained_cfg["mean"]) == pytest.approx(list(run.model.pretrained_cfg["mean"]))
    assert list(model.pretrained_cfg["input_size"]) == [1, *pictures.shape[2:]]
    assert model.architecture == run.config.model


def test_what_was_loaded_can_be_loaded_from_again(run):
    """Its arguments are all there to make the same once more."""
    model = load(run.out)
    again = pellucid.create_model(model.architecture, **model.model_args)
    again.load_state_dict(model.state_dict())


def test_timm_loads_it(run, pictures, logits):
    model = timm.create_model(f"local-dir:{run.out / 'model'}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(model(pictures), logits)
    untrained = timm.create_model(f"local-dir:{run.out / 'model'}", pretrained=False).eval()
    with torch.no_grad():
        assert not torch.equal(untrained(pictures), logits)
    config = timm.data.resolve_model_data_config(model)
    assert config["input_size"] == (1, *pictures.shape[2:]) or list(config["input_size"]) == [
        1,
        *pictures.shape[2:],
    ]


def test_timm_makes_features_of_it(run, pictures):
    model = timm.create_model(f"local-dir:{run.out / 'model'}", pretrained=True, num_classes=0).eval()
    with torch.no_grad():
        features = model(pictures)
        assert torch.equal(
            features, run.model.forward_head(run.model.forward_features(pictures), pre_logits=True)
        )


def test_transformers_loads_it(run, pictures, logits):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForImageClassification.from_pretrained(run.out / "model").eval()
    with torch.no_grad():
        assert torch.equal(model(pictures).logits, logits)
    assert model.config.id2label == {digit: str(digit) for digit in range(10)}
    assert model.config.num_labels == 10


def test_the_config_says_what_there_is(run):
    config = json.loads((run.out / "model" / "config.json").read_text())
    assert config["architecture"] == run.config.model
    assert "num_classes" not in config["model_args"]
    assert config["num_classes"] == config["pretrained_cfg"]["num_classes"] == 10
    assert config["model_args"]["in_chans"] == 1
    assert config["model_args"]["depth"] == 2
    assert config["label_names"] == config["pretrained_cfg"]["label_names"] == [str(d) for d in range(10)]
    weights = load_file(run.out / "model" / "model.safetensors")
    assert config["num_parameters"] == sum(value.numel() for value in weights.values())
    assert not {"url", "hf_hub_id", "custom_load"} & config["pretrained_cfg"].keys()


def test_the_averaged_weights_are_the_ones_saved(run):
    from pellucid.training.checkpoint import load_checkpoint

    tensors = load_checkpoint(run.out / "checkpoints").tensors
    for name, value in load_file(run.out / "model" / "model.safetensors").items():
        assert torch.equal(value, tensors[f"average/{name}"]), name
    assert not torch.equal(tensors["average/head.weight"], tensors["objective/model.head.weight"])


# --- and what is refused ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("small") / "run"
    options = {"model": "crate_digits", "model_args": {"depth": 1}, "epochs": 0.1}
    return train(images, out=str(out), progress=False, **options)


def refused(path, message):
    with pytest.raises(CheckpointError, match=message) as error:
        load(path)
    assert str(error.value).count("\n") < 5


def test_nothing_there(tmp_path):
    refused(tmp_path / "nowhere", r"nowhere does not exist; expected a run's folder")
    refused(tmp_path, r"holds no model; expected a run's folder or a folder with config\.json and model\.saf")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "is a file; expected a run's folder")


def test_an_unfinished_run(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    refused(tmp_path / "run", "holds a run that has not ended - finish it with --resume")


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "null", '{"architecture": "crate_digits"}', "\x00"])
def test_a_config_that_is_none(small, tmp_path, content):
    folder = edit(small, tmp_path)
    (folder / "config.json").write_text(content)
    refused(folder, r"config\.json is not a model's config .* - save the model again")


def test_a_config_that_is_not_text(small, tmp_path):
    folder = edit(small, tmp_path)
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")
    refused(folder, r"config\.json is not a model's config")


@pytest.mark.parametrize("key", ["architecture", "num_classes", "model_args", "pretrained_cfg"])
def test_a_config_that_lacks_something(small, tmp_path, key):
    refused(edit(small, tmp_path, **{key: None}), rf"config\.json is not a model's config \('{key}'\)")


@pytest.mark.parametrize(
    "name", ["crate_digit", "os.system", "hf-hub:someone/something", "local-dir:elsewhere", 3, ["a"]]
)
def test_an_unknown_architecture(small, tmp_path, name):
    refused(edit(small, tmp_path, architecture=name), "unknown architecture '")


def test_an_unknown_architecture_suggests(small, tmp_path):
    refused(edit(small, tmp_path, architecture="crate_digit"), "did you mean 'crate_digits'")


@pytest.mark.parametrize(
    "arguments",
    [
        {"checkpoint_path": "evil.pth"},
        {"pretrained": True},
        {"pretrained_cfg": {"file": "evil.pth"}},
        {"pretrained_cfg_overlay": {"file": "evil.pth"}},
        {"cache_dir": "elsewhere"},
        {"name": "vit_tiny_patch16_224"},
    ],
)
@pytest.mark.parametrize("name", ["crate_digits", "vit_tiny_patch16_224"])
def test_a_config_may_not_name_other_files(small, tmp_path, name, arguments):
    (key,) = arguments
    folder = edit(small, tmp_path, architecture=name, model_args=arguments)
    refused(folder, rf"refused: .*config\.json sets {key} in model_args - remove it")


def test_other_sizes_than_the_weights(small, tmp_path):
    refused(
        edit(small, tmp_path, model_args={"depth": 2}), r"do not fit the model\nmissing \(\d+\): layers\.1"
    )
    shutil.rmtree(tmp_path / "model")
    refused(
        edit(small, tmp_path, num_classes=7),
        r"do not fit the model\nwrong shape \(2\): head\.bias is \(10,\), expected \(7,\), head\.weight is ",
    )


def test_weights_are_missing_damaged_or_foreign(small, tmp_path):
    folder = edit(small, tmp_path)
    weights = load_file(folder / "model.safetensors")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    refused(folder, r"model\.safetensors is damaged or not a safetensors file")
    path.unlink()
    refused(folder, r"cannot read weights: .*model\.safetensors \(No such file")
    save_file({**weights, "extra": torch.zeros(1)}, path)
    refused(folder, r"unexpected \(1\): extra")
    save_file({k: v for k, v in weights.items() if k != "norm.weight"}, path)
    refused(folder, r"missing \(1\): norm\.weight")
    save_file({}, path)
    refused(folder, r"missing \(\d+\): embed")
