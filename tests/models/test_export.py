"""What is exported gives the model's outputs, says how to be fed, and holds no product too many."""

import json
import sys
from collections import Counter
from operator import attrgetter

import jaxtyping
import onnx
import onnxruntime
import pytest
import timm
import torch
from onnx import numpy_helper
from torch import nn

from pellucid.errors import CheckpointError, ConfigError
from pellucid.models import create_model, export

WIDTH = 128  # a dictionary above the size that the ONNX optimiser would fold by itself

pytestmark = pytest.mark.usefixtures("unchecked_shapes")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = create_model("crate_digits", embed_dim=WIDTH, depth=2, num_classes=3)
    names = {"label_names": ["one", "zwei", "três"], "mean": (0.25,), "std": (0.5,)}
    made.pretrained_cfg = {**made.pretrained_cfg, **names}
    return made.eval()


@pytest.fixture(scope="module")
def onnx_file(folder, model):
    jaxtyping.config.update("jaxtyping_disable", True)
    return export.export_onnx(model, folder / "crate.onnx")


def pictures(batch, channels=1, side=8):
    return torch.randn(batch, channels, side, side)


def run_onnx(path, images):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {"images": images.numpy()})
    return torch.from_numpy(output)


def relative(actual, expected):
    assert actual.shape == expected.shape
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def products(graph):
    """Matrix products, and of these the ones that need no image."""
    moving = {value.name for value in graph.input}
    found, still = [], []
    for node in graph.node:
        if moving & {*node.input}:
            moving |= {*node.output}
        if node.op_type in ("MatMul", "Gemm"):
            found.append(node)
            if not moving & {*node.input}:
                still.append(node)
    return found, still


def test_onnx_gives_the_same_for_any_number_of_images(onnx_file, model):
    for batch in (1, 2, 7):
        images = pictures(batch)
        with torch.no_grad():
            assert relative(run_onnx(onnx_file.path, images), model(images)) < 1e-5
    assert 0 < onnx_file.difference < 1e-5
    assert onnx_file.checked_with == f"onnxruntime {onnxruntime.__version__}"


def test_onnx_says_what_it_takes_and_gives(onnx_file, folder):
    file = onnx.load(onnx_file.path)
    onnx.checker.check_model(file, full_check=True)
    assert [(entry.domain, entry.version) for entry in file.opset_import] == [("", 18)]
    ((images,), (logits,)) = file.graph.input, file.graph.output
    assert (images.name, logits.name) == ("images", "logits")
    shapes = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in (images, logits)]
    assert shapes == [["batch", 1, 8, 8], ["batch", 3]]
    beside = json.loads((folder / "crate.onnx.json").read_text(encoding="utf-8"))
    expected = {
        "model": "crate_digits",
        "input": "images",
        "input_shape": ["batch", 1, 8, 8],
        "output": "logits",
        "output_shape": ["batch", 3],
        "size": [8, 8],
        "mean": [0.25],
        "std": [0.5],
        "class_names": ["one", "zwei", "três"],
        "opset": 18,
    }
    assert {key: beside[key] for key in expected} == expected
    assert beside["check"] == {
        "with": onnx_file.checked_with,
        "difference": onnx_file.difference,
        "images": 0,
    }
    kept = {entry.key: entry.value for entry in file.metadata_props}
    for key, value in expected.items():
        assert (kept[key] if isinstance(value, str) else json.loads(kept[key])) == value
    assert sorted(path.name for path in folder.glob("crate.onnx*")) == ["crate.onnx", "crate.onnx.json"]


def test_a_layer_of_crate_is_five_products_and_the_head_one(onnx_file, model):
    graph = onnx.load(onnx_file.path).graph
    found, still = products(graph)
    assert Counter(node.op_type for node in found) == {"MatMul": 5 * 2, "Gemm": 1}
    assert not still
    kept = {entry.name: torch.tensor(numpy_helper.to_array(entry)) for entry in graph.initializer}
    for layer in model.layers:
        ista = layer["sparsify"]
        D = ista.dictionary.detach()
        C = ista.step_size * (D - D.T @ D)
        same = [value for value in kept.values() if value.shape == C.shape and torch.equal(value, C)]
        assert len(same) == 1
        assert not any(value.shape == D.shape and torch.equal(value, D) for value in kept.values())


def test_an_exported_program_gives_the_same_and_holds_no_dictionary(folder, model):
    written = export.export_program(model, folder / "crate.pt2")
    facts = {"description.json": ""}
    program = torch.export.load(written.path, extra_files=facts)
    run = program.module()
    with torch.no_grad():
        for batch in (1, 2, 7):
            images = pictures(batch)
            assert relative(run(images), model(images)) < 1e-5
    operators = Counter(str(node.target) for node in program.graph.nodes if node.op == "call_function")
    assert operators["aten.linear.default"] + operators["aten.matmul.default"] == 3 * 2 + 1
    assert operators["aten.scaled_dot_product_attention.default"] == 2
    assert not any("dictionary" in key for key in program.state_dict)
    assert sum(value.numel() for value in program.state_dict.values()) == sum(
        p.numel() for p in model.parameters()
    )
    beside = json.loads((folder / "crate.pt2.json").read_text(encoding="utf-8"))
    assert beside.items() >= json.loads(facts["description.json"]).items()
    assert (beside["class_names"], "opset" in beside) == (["one", "zwei", "três"], False)


class Doubled(nn.Module):
    """A map whose matrix is made from weights at every call, and a bias that is used as it is."""

    def __init__(self):
        super().__init__()
        self.a, self.bias = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(3))
        self.unused = nn.Parameter(torch.randn(3))

    def forward(self, x):
        matrix = self.a @ self.a.mT + 1
        return x @ (2 * matrix) + x @ self.a.mT + self.bias


def test_constants_are_folded_and_views_are_not():
    module, x = Doubled(), torch.randn(2, 3)
    with torch.no_grad():
        expected = module(x)
        graph = torch.export.export(module, (x,)).module(check_guards=False)
        folded = export.fold_constants(graph)
        assert folded is graph
        torch.testing.assert_close(folded(x), expected)
        state = folded.state_dict()
        (key,) = state.keys() - {"a", "bias"}
        torch.testing.assert_close(state[key], 2 * (module.a @ module.a.mT + 1))
    operators = Counter(str(node.target) for node in folded.graph.nodes if node.op == "call_function")
    assert operators == {"aten.matmul.default": 2, "aten.mT.default": 1, "aten.add.Tensor": 2}
    assert all(
        isinstance(attrgetter(node.target)(folded), torch.Tensor)
        for node in folded.graph.nodes
        if node.op == "get_attr"
    )


@pytest.mark.parametrize("name", ["crate_digits", "vit_digits"])
def test_features_and_tokens(name, tmp_path):
    model = create_model(name, depth=1, reg_tokens=2, num_classes=3).eval()
    images = pictures(3)
    with torch.no_grad():
        tokens = model.forward_features(images)
        expected = {
            "features": model.forward_head(tokens, pre_logits=True),
            "tokens": tokens[:, 3:],
        }
        for output, value in expected.items():
            written = export.export(model, tmp_path / f"{output}.pt2", output=output)
            assert relative(torch.export.load(written.path).module()(images), value) < 1e-5
            assert written.description["output_shape"] == ["batch", *value.shape[1:]]
            assert written.description["class_names"] == []


def test_a_model_without_classes_gives_features(tmp_path):
    model = create_model("crate_digits", depth=1, num_classes=0).eval()
    written = export.export(model, tmp_path / "x.onnx")
    images = pictures(2)
    with torch.no_grad():
        assert relative(run_onnx(written.path, images), model(images)) < 1e-5
    graph = onnx.load(written.path).graph
    assert graph.output[0].name == written.description["output"] == "features"
    assert written.description["output_shape"] == ["batch", 64]


def test_any_timm_vit_and_other_images_than_square(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", img_size=(32, 48), depth=1, num_classes=2).train()
    written = export.export_onnx(model, tmp_path / "vit.onnx")
    assert written.description["model"] == "vit_tiny_patch16_224"
    assert written.description["size"] == [32, 48]
    assert written.description["input_shape"] == ["batch", 3, 32, 48]
    images = torch.randn(2, 3, 32, 48)
    assert model.training
    with torch.no_grad():
        assert relative(run_onnx(written.path, images), model.eval()(images)) < 1e-5


def test_low_precision_is_exported_in_full_and_the_model_is_left_as_it_was(tmp_path, model):
    low = create_model("crate_digits", embed_dim=WIDTH, depth=2, num_classes=3).bfloat16().train()
    low.load_state_dict(model.state_dict())
    low.set_grad_checkpointing()
    before = {key: value.clone() for key, value in low.state_dict().items()}
    written = export.export_program(low, tmp_path / "x.pt2")
    assert low.training
    assert low.grad_checkpointing
    assert all(p.dtype == torch.bfloat16 and p.requires_grad for p in low.parameters())
    assert all(torch.equal(value, before[key]) for key, value in low.state_dict().items())
    with torch.no_grad():
        images = pictures(2)
        output = torch.export.load(written.path).module()(images)
        assert output.dtype == torch.float32
        assert relative(output, low.eval().float()(images)) < 1e-5


# --- the check ---------------------------------------------------------------------------------------------


def refused(error, message, model, path, **options):
    """The message, and a folder that is as it was."""
    before = {p: p.read_bytes() for p in path.parent.iterdir()} if path.parent.is_dir() else {}
    with pytest.raises(error, match=message) as raised:
        export.export(model, path, **options)
    assert len(str(raised.value).splitlines()) == 1
    assert len(str(raised.value)) < 400
    after = {p: p.read_bytes() for p in path.parent.iterdir()} if path.parent.is_dir() else {}
    assert after == before


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_a_file_that_differs_is_not_left_behind(suffix, tmp_path, model, monkeypatch):
    fold = export.fold_constants

    def fold_badly(graph):
        fold(graph)
        for name, value in graph.state_dict().items():
            if name.startswith("folded"):
                value.mul_(1.01)
        return graph

    monkeypatch.setattr(export, "fold_constants", fold_badly)
    path = tmp_path / f"x{suffix}"
    said = r"x\.\w+ was not written: .* outputs that differ from the model's by 0\.0\d+ of the largest"
    path.write_text("an earlier one")
    refused(CheckpointError, said, model, path, overwrite=True)


def test_outputs_that_are_not_numbers_are_refused(tmp_path, model):
    broken = create_model("crate_digits", depth=1, num_classes=3)
    with torch.no_grad():
        broken.head.bias[0] = torch.nan
    refused(CheckpointError, "differ from the model's by nan", broken, tmp_path / "x.pt2")


def test_given_images_are_compared_too(tmp_path, model):
    seen = []

    def batches():
        for size in (4, 2):
            seen.append(size)
            yield pictures(size)

    written = export.export(model, tmp_path / "x.pt2", images=batches())
    assert seen == [4, 2]
    assert written.images == written.description["check"]["images"] == 6
    odd = [pictures(2), torch.full((1, 1, 8, 8), torch.nan)]
    refused(CheckpointError, "by nan of the largest", model, tmp_path / "y.pt2", images=odd)


# --- what is refused before -------------------------------------------------------------------------------


def test_nothing_is_overwritten_unasked(tmp_path, model):
    path = tmp_path / "x.pt2"
    (tmp_path / "x.pt2.json").write_text("someone's")
    refused(ConfigError, r"x\.pt2\.json stands there already - give --overwrite to replace it", model, path)
    path.write_text("someone's")
    refused(ConfigError, r"x\.pt2 stands there already", model, path)
    export.export(model, path, overwrite=True)
    assert json.loads((tmp_path / "x.pt2.json").read_text())["model"] == "crate_digits"
    assert torch.export.load(path) is not None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.pt2", "x.pt2.json"]


def test_wrong_names(tmp_path, model):
    refused(
        ConfigError, r"format of .*x\.tflite - name a file that ends in \.onnx", model, tmp_path / "x.tflite"
    )
    refused(ConfigError, "nowhere is not a folder - make it first", model, tmp_path / "nowhere" / "x.pt2")
    (tmp_path / "d.pt2").mkdir()
    with pytest.raises(ConfigError, match=r"d\.pt2: it is a folder - name a file in it"):
        export.export(model, tmp_path / "d.pt2", overwrite=True)
    (tmp_path / "d.pt2").rmdir()
    said = "output is 'boxes'; known: logits, features, tokens"
    refused(ConfigError, said, model, tmp_path / "x.pt2", output="boxes")


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_one_line_with_the_remedy(missing, tmp_path, model, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    said = rf"ONNX needs the package {missing} - pip install 'pellucid\[export\]'"
    refused(ConfigError, said, model, tmp_path / "x.onnx")


def test_a_program_needs_no_other_package(tmp_path, model, monkeypatch):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)
    assert export.export(model, tmp_path / "x.pt2").path.exists()


def test_models_that_do_not_have_what_is_asked_for(tmp_path):
    headless = create_model("crate_digits", depth=1, num_classes=0)
    refused(ConfigError, "no classes, so it has no logits", headless, tmp_path / "x.pt2", output="logits")
    resnet = timm.create_model("test_resnet", pretrained=False)
    refused(ConfigError, "ResNet has no tokens", resnet, tmp_path / "x.pt2", output="tokens")
    gray = create_model("crate_tiny_patch16_224", depth=1, in_chans=1)
    refused(
        ConfigError, "takes 1 channels and its mean has 3 - set 'mean' and 'std'", gray, tmp_path / "x.pt2"
    )


def test_what_onnx_cannot_hold_a_program_can(tmp_path):
    model = create_model("crate_digits", depth=1, compression="exact")
    said = r"crate_digits cannot be exported: No ONNX function .*cholesky.* - a file that ends in \.pt2"
    refused(ConfigError, said, model, tmp_path / "x.onnx")
    assert export.export(model, tmp_path / "x.pt2").difference < 1e-5


class Branching(nn.Module):
    """What no graph can follow."""

    num_classes = 2
    pretrained_cfg = {"input_size": (1, 8, 8), "mean": (0.5,), "std": (0.5,)}  # noqa: RUF012

    def forward(self, images):
        return images.flatten(1)[:, :2] * (1 if images.sum() > 0 else 2)


def test_a_model_that_is_no_graph_says_so_in_a_line(tmp_path):
    refused(ConfigError, "Branching cannot be exported: ", Branching(), tmp_path / "x.pt2")
