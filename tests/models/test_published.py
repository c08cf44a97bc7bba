"""The published CRATE, number for number, in every way that a model is run; and what its door refuses."""

import pytest
import torch

from pellucid.errors import CheckpointError
from pellucid.models import from_published

RTOL = 1e-5


@pytest.fixture(scope="module")
def data(recorded):
    return recorded("crate")


def published_state(data):
    return {key.removeprefix("state/"): value for key, value in data.items() if key.startswith("state/")}


@pytest.fixture
def model(data):
    return from_published(published_state(data), num_heads=data["meta"]["config"]["heads"])


def close(actual, expected):
    scale = expected.abs().max().item()
    assert scale > 0
    torch.testing.assert_close(actual, expected, rtol=RTOL, atol=RTOL * scale)


def test_sizes_are_read_from_shapes(model, data):
    config = data["meta"]["config"]
    assert model.embed.img_size == (config["image_size"],) * 2
    assert model.embed.patch_size == (config["patch_size"],) * 2
    assert (model.embed_dim, len(model.layers)) == (config["dim"], config["depth"])
    assert model.num_classes == config["num_classes"]


@pytest.mark.parametrize("training", [True, False])
def test_logits(model, data, training):
    model.train(training)
    close(model(data["input"]).detach(), data["logits"])
    with torch.no_grad():
        for _ in range(2):  # the second time from kept folds
            close(model(data["input"]), data["logits"])
    folds = [layer["sparsify"]._fold.made for layer in model.layers]
    assert all((fold is None) == training for fold in folds)


def test_tokens_after_every_step(model, data):
    seen = {}

    def keep(record):
        part = {"compress": "half", "sparsify": "out"}[record.name]
        seen[f"tokens/{record.layer - 1}/{part}"] = record.z_next

    with torch.no_grad():
        model.eval()(data["input"], on_step=keep)
    expected = {key for key in data if key.startswith("tokens/")}
    assert seen.keys() == expected
    assert len(expected) == 2 * data["meta"]["config"]["depth"]
    for key in expected:
        close(seen[key], data[key])


def check_gradients(model, data):
    """Every recorded gradient, mapped to our names by the same door that maps weights."""
    grads = {key.removeprefix("grad/"): value for key, value in data.items() if key.startswith("grad/")}
    close(grads_input := data["input"].grad, grads.pop("input"))
    assert grads_input.any()
    carrier = from_published(grads, num_heads=data["meta"]["config"]["heads"])
    ours = dict(model.named_parameters())
    expected = dict(carrier.named_parameters())
    assert ours.keys() == expected.keys()
    assert len(expected) == len(grads) == 36
    for name, gradient in expected.items():
        close(ours[name].grad, gradient.detach())


@pytest.fixture
def with_input_gradient(data):
    data["input"].requires_grad_()
    yield data
    data["input"].grad = None
    data["input"].requires_grad_(False)


@pytest.mark.parametrize("training", [True, False])
def test_every_gradient(model, with_input_gradient, training):
    model.train(training)(with_input_gradient["input"]).square().sum().backward()
    check_gradients(model, with_input_gradient)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled(model, with_input_gradient, backend):
    data = with_input_gradient
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    model.train()
    compiled(data["input"]).square().sum().backward()
    check_gradients(model, data)
    model.eval()
    with torch.no_grad():
        close(compiled(data["input"]), data["logits"])


@pytest.mark.usefixtures("unchecked_shapes")
def test_exported_with_any_batch(model, data):
    batch = torch.export.Dim("batch", min=1, max=64)
    images = torch.cat([data["input"], data["input"].flip(0)])
    program = torch.export.export(model.eval(), (images,), dynamic_shapes=({0: batch},))
    for n in (1, 2, 4):
        close(program.module()(images[:n]), torch.cat([data["logits"], data["logits"].flip(0)])[:n])


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.filterwarnings("ignore")  # the exporter's own deprecations
def test_onnx(model, data, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = tmp_path / "crate.onnx"
    torch.onnx.export(
        model.eval(), (data["input"],), path, dynamo=True, verbose=False, input_names=["images"]
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": data["input"].numpy()})
    close(torch.from_numpy(logits), data["logits"])


# --- the door ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrappers_are_stripped(data, prefix):
    state = {prefix + key: value for key, value in published_state(data).items()}
    with torch.no_grad():
        close(from_published(state, num_heads=4).eval()(data["input"]), data["logits"])


def test_hints_are_what_keys_cannot_tell(data):
    state = published_state(data)
    model = from_published(state, num_heads=2, step_size=0.2, sparsity=0.5)
    assert (model.layers[0]["sparsify"].step_size, model.layers[0]["sparsify"].sparsity) == (0.2, 0.5)
    assert model.layers[0]["compress"].num_heads == 2
    with torch.no_grad():
        assert not torch.allclose(model.eval()(data["input"]), data["logits"], rtol=1e-2)


def test_headless_checkpoints_give_features(data):
    state = {key: value for key, value in published_state(data).items() if not key.startswith("mlp_head.1")}
    model = from_published(state, num_heads=4)
    assert model.num_classes == 0
    assert model(data["input"]).shape == (2, 48)


def test_all_that_does_not_fit_is_listed_at_once(data):
    state = published_state(data)
    del state["transformer.layers.1.0.norm.weight"]
    state["something.else"] = torch.ones(1)
    state["mlp_head.1.bias"] = torch.ones(3)
    with pytest.raises(CheckpointError) as error:
        from_published(state, num_heads=4)
    message = str(error.value)
    assert "missing (1): layers.1.compress.norm.weight" in message
    assert "unexpected (1): something.else" in message
    assert "wrong shape (1): head.bias is (3,), expected (10,)" in message


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"blocks.0.attn.qkv.weight": torch.ones(1)},
        {"pos_embedding": torch.ones(1, 5, 4), "to_patch_embedding.2.weight": torch.ones(4, 12)},
    ],
    ids=["empty", "a ViT", "no layers"],
)
def test_unknown_layouts_are_refused(state):
    with pytest.raises(CheckpointError, match="not a known published layout"):
        from_published(state)


def test_long_lists_are_cut(data):
    state = {
        key: value
        for key, value in published_state(data).items()
        if not key.startswith("transformer.layers.1")
    }
    with pytest.raises(CheckpointError, match=r"missing \(8\): .*, \.\.\.$"):
        from_published(state, num_heads=4)
