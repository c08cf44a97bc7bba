"""What the README shows in Python, as it stands there."""

import json

import pytest
import timm
import torch

import pellucid


def test_every_public_name_resolves():
    for name in pellucid.__all__:
        assert getattr(pellucid, name) is not None
    assert set(pellucid.__all__) <= set(dir(pellucid))
    with pytest.raises(AttributeError, match="nonsense"):
        _ = pellucid.nonsense


def test_from_training_to_audit(tmp_path):
    out = tmp_path / "x"
    options = {"objective": "supervised", "seed": 0, "epochs": 2, "batch_size": 128}
    run = pellucid.train(
        "digits", model="crate_digits", out=out, progress=False, model_args={"patch_size": 2}, **options
    )
    assert run.accuracy == pytest.approx(run.metrics[-1]["accuracy"])
    model = pellucid.load(out)
    images = pellucid.load_data("digits")
    batches = pellucid.batches(model, images.test, limit=64)
    scores = pellucid.evaluate(model, pellucid.batches(model, images.test))
    assert scores.accuracy == pytest.approx(run.accuracy)
    audit = pellucid.audit(model, batches)
    assert audit.samples == 64
    assert audit.rows[0]["layer"] == 1
    assert audit.rows[0]["step"] == "compress"
    assert audit.rows[0]["objective"] == "R^c(Z | U)"
    assert [row["layer"] for row in audit.rows] == [1, 1, 2, 2, 3, 3, 4, 4]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    again = pellucid.audit(model, pellucid.batches(model, images.test, limit=64))
    assert again.rows == audit.rows
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    audit.to_json(tmp_path / "audit.json")
    assert json.loads((tmp_path / "audit.json").read_text())["rows"] == audit.rows


def test_the_same_names_work_in_timm():
    model = pellucid.create_model("crate_tiny_patch16_224", num_classes=10)
    other = timm.create_model("crate_tiny_patch16_224", num_classes=10)
    other.load_state_dict(model.state_dict())
    images = torch.randn(1, 3, 224, 224)
    assert sum(p.numel() for p in timm.create_model("crate_tiny_patch16_224").parameters()) == 6_090_856
    with torch.no_grad():
        assert model(images).shape == (1, 10)
        torch.testing.assert_close(model.eval()(images), other.eval()(images))


def test_a_solver_is_a_network_whose_layers_are_the_same():
    from pellucid.steps import ISTA, unroll

    ista = ISTA(dim=16, num_atoms=32, step_size=0.2)
    signal, start = torch.randn(1, 8, 16), torch.zeros(1, 8, 32)
    with torch.no_grad():
        code = unroll([ista] * 100, start, signal)
        assert ista.objective(code, start, signal) < ista.objective(start, start, signal)
