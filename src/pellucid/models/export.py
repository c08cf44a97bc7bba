"""Models for other programs: one ONNX or ``torch.export`` file, checked before it gets its name.

A file that stands here has been run: in batches of 1 and 3, and on whatever images were given, its outputs
are the model's. What depends on weights alone is computed once, at export: ISTA is then one product with
``C = eta (D - D^T D)``, so a layer of CRATE holds five matrix products, of which attention is two. A layer
whose compression is untied holds as many.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from pellucid import __version__
from pellucid.errors import CheckpointError, ConfigError, PellucidError
from pellucid.models.embed import image_size

Output = Literal["logits", "features", "tokens"]

OPSET = 18
"""Of the ONNX operators: the one that torch's exporter is written for, known to runtimes since 2023."""

TOLERANCE = 1e-4
"""Largest difference from the model's outputs, relative to the largest of them, that a file may have."""

BATCHES = (1, 3)


@dataclass(frozen=True)
class Exported:
    """What was written, and how near it is to the model.

    Attributes:
        path: the file.
        description: the JSON beside it: input, output, size, mean, std, class names, opset, check.
        difference: largest difference from the model's outputs, relative to the largest of them.
        images: how many given images were among those compared.
        checked_with: the program that ran the file.
    """

    path: Path
    description: dict[str, Any]
    difference: float
    images: int
    checked_with: str


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    output: Output | None = None,
    images: Iterable[Float[Tensor, "b c h w"]] = (),
    overwrite: bool = False,
) -> Exported:
    """:func:`export_onnx` or :func:`export_program`, as the name ends: ``.onnx`` or ``.pt2``."""
    writers = {".onnx": export_onnx, ".pt2": export_program}
    suffix = Path(path).suffix
    if suffix not in writers:
        raise ConfigError(f"cannot tell the format of {path} - name a file that ends in .onnx or .pt2")
    return writers[suffix](model, path, output=output, images=images, overwrite=overwrite)


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    output: Output | None = None,
    images: Iterable[Float[Tensor, "b c h w"]] = (),
    overwrite: bool = False,
) -> Exported:
    """Write a model as ONNX, in float32, with any number of images in a batch.

    The input is called ``images``: pixels in 0..1, then less ``mean`` and over ``std``. These, the size and
    the class names are in the file's metadata and in ``FILE.onnx.json`` beside it. Weights of more than
    1.5 GB go to ``FILE.onnx.data``.

    Args:
        model: ours or any timm model.
        path: of the file.
        output: ``"logits"``, ``"features"`` (pooled, what a model without classes gives), or ``"tokens"`` (of
            the patches, normalised); its name in the file.
        images: batches as the model takes them, to compare the file and the model on besides random ones.
        overwrite: replace a file that stands there.

    Raises:
        ConfigError: a missing package, a file that stands there, a model that has no such output.
        CheckpointError: the written file differs from the model. Nothing is left of it.
    """
    onnx, runtime, _ = (_package(name) for name in ("onnx", "onnxruntime", "onnxscript"))

    def write(program: ExportedProgram, file: Path, description: dict[str, Any]) -> None:
        written = torch.onnx.export(
            program,
            input_names=["images"],
            output_names=[description["output"]],
            dynamic_shapes=({0: "batch"},),
            opset_version=OPSET,
            verbose=False,
        )
        assert written is not None
        written.model.metadata_props.update({key: _text(value) for key, value in description.items()})
        written.save(file)
        onnx.checker.check_model(str(file), full_check=True)

    def read(file: Path) -> Callable[[Tensor], Tensor]:
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        return lambda batch: torch.from_numpy(session.run(None, {"images": batch.numpy()})[0])

    checker = f"onnxruntime {runtime.__version__}"
    return _export(model, Path(path), output, images, overwrite, {"opset": OPSET}, write, read, checker)


def export_program(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    output: Output | None = None,
    images: Iterable[Float[Tensor, "b c h w"]] = (),
    overwrite: bool = False,
) -> Exported:
    """As :func:`export_onnx`, for ``torch.export.load(path).module()``; needs no other package than torch."""

    def write(program: ExportedProgram, file: Path, description: dict[str, Any]) -> None:
        torch.export.save(program, file, extra_files={"description.json": json.dumps(description)})

    def read(file: Path) -> Callable[[Tensor], Tensor]:
        return torch.export.load(file).module()

    checker = f"torch.export {torch.__version__}"
    return _export(model, Path(path), output, images, overwrite, {}, write, read, checker)


def _export(
    model: Any,
    path: Path,
    output: Output | None,
    images: Iterable[Tensor],
    overwrite: bool,
    format_facts: dict[str, Any],
    write: Callable[[ExportedProgram, Path, dict[str, Any]], None],
    read: Callable[[Path], Callable[[Tensor], Tensor]],
    checker: str,
) -> Exported:
    """Write into a folder of its own, compare there, and only then move to where it was asked for."""
    beside = path.with_name(path.name + ".json")
    _refuse(path, beside, overwrite)
    network = _Network(model, output or ("logits" if model.num_classes else "features"))
    shape = _image_shape(model)
    description = {**_describe(model, network, shape), **format_facts}
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=path.parent) as scratch:
        file = Path(scratch) / path.name
        with _as_a_graph(description["model"], path.suffix):
            write(_program(network, shape), file, description)
            run = read(file)
        difference, count = _difference(network, run, shape, images)
        if not difference <= TOLERANCE:  # NaN as well
            raise CheckpointError(
                f"{path} was not written: {checker} gives outputs that differ from the model's by "
                f"{difference:.2g} of the largest, more than {TOLERANCE:g} - look at the model's weights and "
                f"the images, or take other versions of torch and onnxruntime"
            )
        description["check"] = {"with": checker, "difference": difference, "images": count}
        (Path(scratch) / beside.name).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
        for part in sorted(Path(scratch).iterdir(), key=lambda part: part == file):  # the file itself last
            with part.open("rb") as handle:
                os.fsync(handle.fileno())
            part.replace(path.parent / part.name)
    return Exported(path, description, difference, count, checker)


class _Network(nn.Module):
    """A float32 copy of a model on the CPU, from ``images`` to one output of a name."""

    def __init__(self, model: nn.Module, output: str) -> None:
        super().__init__()
        self.model: Any = copy.deepcopy(model).cpu().float()
        self.output = output
        if output not in ("logits", "features", "tokens"):
            raise ConfigError(f"output is '{output}'; known: logits, features, tokens")
        if output == "logits" and not self.model.num_classes:
            raise ConfigError("the model has no classes, so it has no logits - take features or tokens")
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        if self.output == "logits":
            return self.model(images)
        features = self.model.forward_features(images)
        if self.output == "features":
            return self.model.forward_head(features, pre_logits=True)
        return features[:, getattr(self.model, "num_prefix_tokens", 0) :]


def _refuse(path: Path, beside: Path, overwrite: bool) -> None:
    """What can be told before the work is done."""
    if not path.parent.is_dir():
        raise ConfigError(f"cannot write {path}: {path.parent} is not a folder - make it first")
    for target in (path, beside):
        if target.is_dir():
            raise ConfigError(f"cannot write {target}: it is a folder - name a file in it")
        if target.exists() and not overwrite:
            raise ConfigError(
                f"{target} stands there already - give --overwrite to replace it, or name another file"
            )


def _image_shape(model: Any) -> tuple[int, int, int]:
    """Channels, height and width of the images that the model was built for."""
    channels = getattr(model, "model_args", {}).get("in_chans", model.pretrained_cfg["input_size"][0])
    return (channels, *image_size(model))


def _describe(model: Any, network: _Network, shape: tuple[int, int, int]) -> dict[str, Any]:
    """What someone needs to know to use the file."""
    cfg = model.pretrained_cfg
    mean, std = list(cfg["mean"]), list(cfg["std"])
    if not len(mean) == len(std) == shape[0]:
        raise ConfigError(
            f"the model takes {shape[0]} channels and its mean has {len(mean)} - "
            f"set 'mean' and 'std' in model.pretrained_cfg"
        )
    with torch.no_grad():
        example = network(torch.zeros(1, *shape))
    if network.output == "tokens" and example.dim() != 3:
        raise ConfigError(f"{type(model).__name__} has no tokens - take logits or features")
    return {
        "model": getattr(model, "architecture", None) or cfg.get("architecture") or type(model).__name__,
        "input": "images",
        "input_shape": ["batch", *shape],
        "output": network.output,
        "output_shape": ["batch", *example.shape[1:]],
        "pixels": "0..1, then (pixel - mean) / std",
        "size": list(shape[1:]),
        "mean": mean,
        "std": std,
        "crop_pct": cfg.get("crop_pct"),
        "interpolation": cfg.get("interpolation"),
        "class_names": list(cfg.get("label_names") or []) if network.output == "logits" else [],
        "written_by": f"pellucid {__version__}, torch {torch.__version__}",
    }


@contextmanager
def _as_a_graph(name: str, suffix: str) -> Iterator[None]:
    """Whatever a model may do that a graph or its format cannot hold, in one line."""
    try:
        yield
    except (PellucidError, OSError):
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # exporters tell what it was last
            cause = cause.__cause__
        reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        remedy = " - a file that ends in .pt2 can hold more" if suffix == ".onnx" else ""
        raise ConfigError(f"{name} cannot be exported: {reason}{remedy}") from error


@torch.no_grad()
def _program(network: _Network, shape: tuple[int, int, int]) -> ExportedProgram:
    """The network as a graph for any number of images, with what depends on weights alone computed."""
    example = (torch.zeros(2, *shape),)  # of one image torch would take the size for a constant
    batches = ({0: Dim("batch")},)
    program = torch.export.export(network, example, dynamic_shapes=batches)
    folded = fold_constants(program.module(check_guards=False))
    return torch.export.export(folded, example, dynamic_shapes=batches)


@torch.no_grad()
def fold_constants(module: GraphModule) -> GraphModule:
    """Compute now, in place, what the graph would compute from its weights alone at every call.

    Views of a weight, such as a transposed one, stay: they cost nothing and would be kept twice. Weights that
    nothing asks for any more are dropped.
    """
    known: dict[Node, Any] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            known[node] = attrgetter(node.target)(module)
        elif node.op == "call_function" and node.all_input_nodes and known.keys() >= {*node.all_input_nodes}:
            args, kwargs = (map_arg(given, known.__getitem__) for given in (node.args, node.kwargs))
            known[node] = node.target(*args, **kwargs)
    kept = {weight.untyped_storage().data_ptr() for weight in module.state_dict().values()}
    for node, value in known.items():
        wanted = isinstance(value, Tensor) and any(user not in known for user in node.users)
        if wanted and value.untyped_storage().data_ptr() not in kept:
            name = f"folded_{node.name}"
            module.register_buffer(name, value.contiguous())
            with module.graph.inserting_before(node):
                node.replace_all_uses_with(module.graph.get_attr(name))
    for node in reversed(known):  # assertions on what is known have passed, and would keep it in the graph
        if not node.users:
            module.graph.erase_node(node)
    used = {node.target for node in module.graph.nodes if node.op == "get_attr"}
    for name in module.state_dict().keys() - used:
        owner, _, leaf = name.rpartition(".")
        delattr(module.get_submodule(owner), leaf)
    module.recompile()
    return module


def _difference(
    network: _Network, run: Callable[[Tensor], Tensor], shape: tuple[int, int, int], images: Iterable[Tensor]
) -> tuple[float, int]:
    """Largest relative difference over random and given images, and the number of the latter."""
    generator = torch.Generator().manual_seed(0)
    worst, count = 0.0, 0
    with torch.no_grad():
        for size in BATCHES:
            worst = _larger(worst, network, run, torch.randn(size, *shape, generator=generator))
        for batch in images:
            worst = _larger(worst, network, run, batch.cpu().float())
            count += len(batch)
    return worst, count


def _larger(worst: float, network: _Network, run: Callable[[Tensor], Tensor], images: Tensor) -> float:
    expected, actual = network(images), run(images)
    if expected.shape != actual.shape:
        return float("inf")
    difference = (actual - expected).abs().max() / expected.abs().max().clamp_min(1e-12)
    return float(torch.maximum(torch.tensor(worst), difference))  # NaN stays NaN


def _text(value: Any) -> str:
    """As ONNX keeps metadata: strings as they are, everything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value)


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise ConfigError(f"ONNX needs the package {name} - pip install 'pellucid[export]'") from error
