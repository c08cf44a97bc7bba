"""Probing whole models: on features that are known, and against training from scratch."""

import json

import pytest
import torch
import yaml

from pellucid.data import ArrayImages, load_data
from pellucid.data.dataset import from_arrays
from pellucid.errors import ConfigError, DataError
from pellucid.glass.feed import batches
from pellucid.measure import evaluate
from pellucid.measure.features import features
from pellucid.measure.probes import knn_probe, linear_probe
from pellucid.models import load
from pellucid.probing import finetune, finetuned_folder, frozen, untrained
from pellucid.training import train

TINY = {"img_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}


@pytest.fixture(scope="module")
def digits():
    return load_data("digits")


@pytest.fixture(scope="module")
def run(tmp_path_factory, digits):
    out = tmp_path_factory.mktemp("probing") / "run"
    return train(
        digits, model="crate_digits", model_args=TINY, epochs=20, out=str(out), engine="plain", progress=False
    )


def test_probes_read_the_features_of_both_parts(run, digits):
    told = []
    found = frozen(run.model, digits, progress=told.append)
    assert sum(told) == len(digits.train) + len(digits.test)
    train_, test = (features(run.model, batches(run.model, p)) for p in (digits.train, digits.test))
    assert found.knn((5, 20)) == knn_probe(train_, test, digits.class_names, k=(5, 20))
    assert found.linear() == linear_probe(train_, test, digits.class_names)
    assert found.linear().scores.accuracy > 0.85


def test_training_is_worth_more_than_no_training(run, digits):
    before = untrained(run.model)
    assert before.pretrained_cfg == run.model.pretrained_cfg
    assert frozen(before, digits).knn().scores.accuracy < frozen(run.model, digits).knn().scores.accuracy
    state = torch.random.get_rng_state()
    again = untrained(run.model)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(a.equal(b) for a, b in zip(again.parameters(), before.parameters(), strict=True))


def test_finetuning_begins_at_the_weights_with_a_fresh_classifier(run, digits, tmp_path):
    out = tmp_path / "tuned"
    options = {"epochs": 3, "batch_size": 128, "engine": "plain", "progress": False, "seed": 1}
    tuned, scores = finetune(run.out, digits, digits, out=out, **options)
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["init_from"] == str(run.out)
    assert config["new_head"] is True
    assert config["objective"] == "supervised"
    assert scores == evaluate(tuned.model, batches(tuned.model, digits.test), digits.class_names)
    scratch = train(digits, model="crate_digits", model_args=TINY, out=str(tmp_path / "scratch"), **options)
    assert scores.accuracy > scratch.accuracy + 0.1
    with pytest.raises(ConfigError, match="holds a run already"):
        finetune(run.out, digits, digits, out=out, **options)


def test_finetuning_a_model_without_a_classifier(run, digits, tmp_path):
    """As learning without labels leaves one."""
    folder = tmp_path / "bare"
    folder.mkdir()
    from safetensors.torch import load_file, save_file

    source = run.out / "model"
    config = json.loads((source / "config.json").read_text())
    config |= {"num_classes": 0, "label_names": []}
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(source / "model.safetensors")
    save_file(
        {name: value for name, value in weights.items() if not name.startswith("head.")},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    bare = load(folder)
    assert bare.num_classes == 0
    assert frozen(bare, digits).knn() == frozen(run.model, digits).knn()
    tuned, scores = finetune(
        folder, digits, digits, out=tmp_path / "tuned", epochs=3, engine="plain", progress=False
    )
    assert tuned.model.num_classes == 10
    assert scores.accuracy > 0.5


def test_a_run_that_learnt_without_labels(digits, tmp_path):
    options = {"epochs": 1, "batch_size": 128, "engine": "plain", "progress": False}
    run = train(
        digits, objective="simdino", model="crate_digits", model_args=TINY, out=str(tmp_path / "x"), **options
    )
    model = load(run.out)
    assert model.num_classes == 0
    # The same classifier that watched over the run, on the same images.
    found = frozen(model, digits).knn()
    assert found.scores.accuracy == pytest.approx(run.measures["knn accuracy"], abs=1.5 / 450)
    tuned, scores = finetune(run.out, digits, digits, out=tmp_path / "tuned", **options)
    assert tuned.model.num_classes == 10
    assert scores.accuracy == pytest.approx(tuned.accuracy)


def test_what_cannot_be_probed(run, digits):
    pictures = digits.train.images[:20]
    bare = ArrayImages(pictures, torch.full((20,), -1), "bare")
    unlabelled = from_arrays("bare", bare, bare, [])
    for probe in (
        lambda: frozen(run.model, unlabelled),
        lambda: finetune(run.out, unlabelled, unlabelled, out="x"),
    ):
        with pytest.raises(DataError, match=r"bare has no labels, .*one sub-folder for each class"):
            probe()
    colour = ArrayImages(pictures.expand(-1, 3, -1, -1), digits.train.labels[:20], "colour")
    with pytest.raises(ConfigError, match="sees 1 channels, colour has 3"):
        finetune(run.out, "x", from_arrays("colour", colour, colour, digits.class_names), out="x")


def test_where_a_finetuned_run_goes(tmp_path, digits, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert finetuned_folder(tmp_path / "runs" / "a", digits) == tmp_path / "runs" / "a-finetune-digits"
