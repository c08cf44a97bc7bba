"""ISTA's step is watched beside what its dictionary allows."""

import json

import pytest
import torch
from safetensors.torch import load_file

from pellucid.cli import main
from pellucid.models import create_model
from pellucid.training.step_lengths import step_lengths

TINY = ["--model", "crate_digits", "--batch-size", "128", "--epochs", "2", "--no-report", "--eval-every", "1"]


@pytest.fixture
def train(capsys):
    """``train(run, step_size, *words) -> (exit code, stdout, stderr)`` of 22 steps on digits."""

    def run(out, step_size, *words):
        capsys.readouterr()
        args = ["--depth", "2", "--model-arg", f"step_size={step_size}"]
        code = main(["train", "digits", *TINY, *args, "--out", str(out), *words])
        return (code, *capsys.readouterr())

    return run


def log(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == "test"]


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("crate_digits", ["layers.0.sparsify", "layers.1.sparsify"]),
        ("crate_alpha_digits", ["layers.0.sparsify", "layers.1.sparsify"]),
        ("crate_strict_digits", []),  # chooses its length
        ("vit_digits", []),
    ],
)
def test_lengths_of_every_step_that_has_one(name, layers):
    model = create_model(name, depth=2, num_classes=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    found = step_lengths(model, dict(model.named_parameters()))
    assert list(found) == layers
    for layer, length in found.items():
        step = model.get_submodule(layer)
        gram = step.dictionary.detach().double() @ step.dictionary.detach().double().T
        assert length == pytest.approx(step.step_size * torch.linalg.eigvalsh(gram)[-1].item(), rel=1e-5)
        assert length == pytest.approx(2 * step.step_size / step.max_step_size(), rel=1e-5)


def test_the_weights_that_count_are_those_handed_over():
    model = create_model("crate_digits", depth=1)
    doubled = {name: 2 * value for name, value in model.named_parameters()}
    assert step_lengths(model, doubled)["layers.0.sparsify"] == pytest.approx(4 * 0.3, rel=1e-4)


def test_a_short_step_is_logged_and_nothing_is_said(tmp_path, train):
    code, out, err = train(tmp_path / "run", 0.1)
    assert code == 0
    assert "||D||" not in out + err
    lines = log(tmp_path / "run")
    assert len(lines) == 2
    for line in lines:
        assert 0.1 < line["ISTA step, layers.0.sparsify"] < 1
        assert 0.1 < line["ISTA step, layers.1.sparsify"] < 1
        both = (line["ISTA step, layers.0.sparsify"], line["ISTA step, layers.1.sparsify"])
        assert line["longest ISTA step"] == max(both)


def test_past_one_it_is_told_once(tmp_path, train):
    code, out, err = train(tmp_path / "run", 1.05)
    assert code == 0
    told = [line for line in (out + err).splitlines() if "||D||" in line]
    assert len(told) == 1
    assert ": its step of ISTA is at 1." in told[0]
    assert told[0].endswith("/||D||^2 (1 more past 1); below 2 it lowers its LASSO from any feasible start")


def test_at_two_the_run_stops_and_can_go_on(tmp_path, train):
    run = tmp_path / "run"
    code, _, err = train(run, 2.5, "--ista-bound", "stop")
    assert code == 5
    message = err[err.index("error: ") :]
    assert "Traceback" not in message
    assert ": its step of ISTA is at 3." in message
    assert (
        "/||D||^2 (1 more past 2): nothing says that such a step lowers its LASSO - stopped after " in message
    )
    assert f"step 11, which is saved in {run}\n" in message
    assert "go on all the same with --resume --ista-bound warn, or start again" in message
    code, out, _ = train(run, 2.5, "--resume", "--ista-bound", "warn")
    assert code == 0
    assert "ista_bound stop -> warn (allowed)" in out
    assert train(tmp_path / "whole", 2.5)[0] == 0
    one, other = (load_file(path / "model" / "model.safetensors") for path in (run, tmp_path / "whole"))
    assert all(torch.equal(one[name], value) for name, value in other.items())
    assert log(run) == log(tmp_path / "whole")


def test_a_dictionary_that_is_not_finite_has_no_length():
    model = create_model("crate_digits", depth=2)
    weights = dict(model.named_parameters())
    weights["layers.0.sparsify.dictionary"] = torch.full((64, 64), torch.nan)
    assert list(step_lengths(model, weights)) == ["layers.1.sparsify"]
