"""Starting from saved weights: what fits is taken, what does not is named, and nothing is ever executed."""

import json
import os
import pickle  # noqa: TID251
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pellucid.errors import CheckpointError
from pellucid.models import create_model
from pellucid.models.saved import copy_weights, read_weights
from pellucid.training import train
from pellucid.training.checkpoint import load_checkpoint

SIZES = {"depth": 2}


@pytest.fixture
def source(digits):
    return digits.reference()


def fresh(**options):
    torch.manual_seed(1)
    return create_model("crate_digits", **{**SIZES, "num_classes": 10, **options})


@pytest.mark.parametrize("where", ["", "model", "model/model.safetensors"])
def test_weights_are_taken_from_a_run_a_folder_or_a_file(source, weights, where):
    model = fresh()
    copy_weights(model, source / where)
    for name, value in weights(source).items():
        assert torch.equal(model.state_dict()[name], value), name
    assert not torch.equal(fresh().head.weight, model.head.weight)


def test_a_run_starts_where_the_other_ended(digits, source, tmp_path):
    digits.train(tmp_path / "run", init_from=str(source), epochs=0.1, lr=1e-30, matrix_lr=1e-30)
    end = load_checkpoint(source / "checkpoints").tensors
    start = load_checkpoint(tmp_path / "run" / "checkpoints").tensors
    for name in end:
        if name.startswith("objective/"):
            torch.testing.assert_close(start[name], end[name], rtol=0, atol=1e-7)


def test_it_may_be_the_very_run_that_is_replaced(digits, tmp_path, weights):
    run = digits.train(tmp_path / "run", epochs=0.3)
    before = weights(run)
    digits.train(run, init_from=str(run), overwrite=True, epochs=0.1, lr=1e-30, matrix_lr=1e-30)
    for name, value in weights(run).items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=1e-7)


def test_another_architecture_is_refused_with_both_names(source):
    model = create_model("vit_digits", **SIZES)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="is crate_digits, the run asks for vit_digits - give --model"):
        copy_weights(model, source)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_another_architecture_in_a_file_is_refused_by_its_keys(source):
    with pytest.raises(
        CheckpointError, match=r"do not fit the model\nmissing \(\d+\): .*\nunexpected \("
    ) as error:
        copy_weights(create_model("vit_digits", **SIZES), source / "model" / "model.safetensors")
    assert str(error.value).count("\n") < 5


def test_another_size_is_refused(source):
    with pytest.raises(CheckpointError, match=r"do not fit the model\n(missing|wrong shape)"):
        copy_weights(fresh(embed_dim=32, num_heads=4), source)
    with pytest.raises(CheckpointError, match=r"missing \(\d+\): layers\.2"):
        copy_weights(fresh(depth=3), source)
    with pytest.raises(CheckpointError, match=r"unexpected \(\d+\): layers\.1"):
        copy_weights(fresh(depth=1), source)


def test_another_class_count_names_both_and_the_way_on(source, weights):
    model = fresh(num_classes=3)
    with pytest.raises(CheckpointError, match="knows 10 classes, the data has 3 - give --new-head"):
        copy_weights(model, source)
    head = model.head.weight.detach().clone()
    copy_weights(model, source, new_head=True)
    assert torch.equal(model.head.weight, head)
    for name, value in weights(source).items():
        if not name.startswith("head."):
            assert torch.equal(model.state_dict()[name], value), name


def test_a_new_head_through_training(digits, source, tmp_path):
    images = digits.images
    x = torch.stack(list(images.train.batch(range(64)))).numpy()[:, 0]
    np.savez(tmp_path / "two.npz", x=x, y=np.arange(64) % 2)
    options = {"model": "crate_digits", "model_args": SIZES, "epochs": 1, "batch_size": 16, "progress": False}
    options |= {"init_from": str(source), "out": str(tmp_path / "run")}
    with pytest.raises(CheckpointError, match="knows 10 classes, the data has 2 - give --new-head"):
        train(tmp_path / "two.npz", **options)
    assert not (tmp_path / "run").exists()
    run = train(tmp_path / "two.npz", new_head=True, **options)
    assert run.model.head.weight.shape == (2, 64)


# --- what is in the file ------------------------------------------------------------------------------


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


def zip_file(path, canary):
    torch.save({"head.weight": Payload(canary)}, path)  # noqa: TID251


def legacy_file(path, canary):
    torch.save({"a": Payload(canary)}, path, _use_new_zipfile_serialization=False)  # noqa: TID251


def plain_pickle(protocol):
    return lambda path, canary: path.write_bytes(pickle.dumps(Payload(canary), protocol))


BOMBS = {
    "torch.save": zip_file,
    "torch.save of old": legacy_file,
    **{f"pickle protocol {n}": plain_pickle(n) for n in (0, 1, 2, 4, 5)},
}


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("name", ["weights.pth", "model.safetensors"])
def test_a_pickle_is_refused_and_never_executed(digits, tmp_path, command, capsys, bomb, name):
    canary = tmp_path / "canary"
    BOMBS[bomb](tmp_path / name, canary)
    with pytest.raises(CheckpointError) as error:
        read_weights(tmp_path / name)
    protocol = bomb.removeprefix("pickle protocol ")
    if protocol not in ("0", "1"):  # those have no mark to know them by
        assert str(error.value) == (
            f"refused: {tmp_path / name} is a pickle, which can run code when loaded - use a safetensors file"
        )
    with pytest.raises(CheckpointError):
        digits.train(tmp_path / "run", init_from=str(tmp_path / name))
    assert not canary.exists()
    assert not (tmp_path / "run").exists()


def test_the_bomb_would_have_worked(tmp_path):
    """Loaded as others load, it goes off: or the test above would prove nothing."""
    zip_file(tmp_path / "weights.pth", tmp_path / "canary")
    torch.load(tmp_path / "weights.pth", weights_only=False)  # noqa: TID251
    assert (tmp_path / "canary").is_dir()


def test_a_pickle_in_place_of_a_models_weights(source, tmp_path):
    shutil.copytree(source / "model", tmp_path / "model")
    zip_file(tmp_path / "model" / "model.safetensors", tmp_path / "canary")
    with pytest.raises(CheckpointError, match=r"refused: .* is a pickle"):
        copy_weights(fresh(), tmp_path)
    assert not (tmp_path / "canary").exists()


def test_a_truncated_file_is_refused_at_any_length(source, tmp_path):
    content = (source / "model" / "model.safetensors").read_bytes()
    path = tmp_path / "w.safetensors"
    lengths = [*range(20), *range(20, len(content), len(content) // 50), len(content) - 1]
    for length in lengths:
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="is damaged or not a safetensors file"):
            read_weights(path)
    path.write_bytes(content)
    assert read_weights(path).keys() == load_file(path).keys()


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot read weights: .*no\.safetensors \(No such file"):
        read_weights(tmp_path / "no.safetensors")
    with pytest.raises(CheckpointError, match="cannot read weights"):
        read_weights(tmp_path)
    with pytest.raises(CheckpointError, match=r"no\.safetensors does not exist"):
        copy_weights(fresh(), tmp_path / "no.safetensors")


def test_whole_numbers_are_not_weights(source, tmp_path):
    weights = load_file(source / "model" / "model.safetensors")
    weights["head.weight"] = torch.ones(10, 64, dtype=torch.int8)
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"head\.weight is int8"):
        copy_weights(fresh(), tmp_path / "w.safetensors")


def test_half_precision_weights_are_weights(source, tmp_path):
    weights = load_file(source / "model" / "model.safetensors")
    save_file({name: value.half() for name, value in weights.items()}, tmp_path / "w.safetensors")
    model = fresh()
    copy_weights(model, tmp_path / "w.safetensors")
    assert model.head.weight.dtype == torch.float32
    torch.testing.assert_close(model.head.weight.detach(), weights["head.weight"], atol=1e-3, rtol=1e-3)


def test_a_config_that_is_not_json(source, tmp_path):
    shutil.copytree(source / "model", tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not a model's config"):
        copy_weights(fresh(), tmp_path)
    (tmp_path / "model" / "config.json").write_text(json.dumps([1]))
    with pytest.raises(CheckpointError, match=r"config\.json is not a model's config"):
        copy_weights(fresh(), tmp_path)
