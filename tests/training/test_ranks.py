"""Several processes that train one model: the numbers are those of one process, and none is left alone."""

import contextlib
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from torch import distributed as dist

from pellucid.data import Crops
from pellucid.models import create_model
from pellucid.training.checkpoint import load_checkpoint
from pellucid.training.mcr2 import MCR2, SelfSupervisedMCR2
from pellucid.training.ranks import averaged, gathered, rank, world
from pellucid.training.self_distillation import DINO, SimDINO
from pellucid.training.supervised import Supervised

PELLUCID = [sys.executable, "-m", "pellucid"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "pellucid"]
TWO = {"devices": 2, "accelerator": "cpu"}

slow = pytest.mark.slow


# --- one batch, in two forked processes -------------------------------------------------------------------


@pytest.fixture
def together(fork, tmp_path):
    """``together(body)``: body in two processes that have met, and what each of them returns."""

    def run(body):
        def process(number):
            dist.init_process_group("gloo", f"file://{tmp_path}/met", rank=number, world_size=2)
            result = {key: value.detach().clone() for key, value in body().items()}
            torch.save(result, tmp_path / f"{number}.pt")  # noqa: TID251
            dist.barrier()
            dist.destroy_process_group()

        children = [fork(lambda number=number: process(number)) for number in range(2)]
        assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
        return [torch.load(tmp_path / f"{number}.pt") for number in range(2)]  # noqa: TID251

    return run


def test_alone_everything_is_as_it_is():
    value = torch.randn(3, 4)
    assert world() == 1
    assert rank() == 0
    assert gathered(value) is averaged(value) is value


def test_parts_are_gathered_in_order_and_gradients_go_home(together):
    whole = torch.arange(24.0).view(2, 4, 3)
    weights = torch.randn(2, 4, 3)

    def body():
        part = whole.chunk(2, 1)[rank()].clone().requires_grad_()
        found = gathered(part, 1)
        (weights * found.square()).sum().backward()
        mean = averaged(torch.tensor([float(rank())]))
        return {"found": found, "gradient": averaged(part.grad.clone()), "own": part.grad, "mean": mean}

    results = together(body)
    expected = (2 * weights * whole).chunk(2, 1)
    for number, result in enumerate(results):
        assert torch.equal(result["found"], whole)
        torch.testing.assert_close(result["own"] / 2, expected[number])
        assert result["mean"] == 0.5


def views(batch=16):
    generator = torch.Generator().manual_seed(0)
    large, small = (torch.randn(batch, n, 1, 8, 8, generator=generator) for n in (2, 1))
    hidden = torch.rand(batch, 2, 16, generator=generator) < 0.4
    hidden[: batch // 4] = False  # the first process hides less than the second
    return Crops(large, small, hidden)


def images():
    return torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def model(classes):
    torch.manual_seed(0)
    return create_model("crate_digits", depth=1, num_classes=classes, dynamic_img_size=True)


def distilled(group_size, patches=0.0):
    return SimDINO(
        model(0), eps=0.5, gamma=0.1, group_size=group_size, head_dim=16, head_hidden=24, patches=patches
    )


OBJECTIVES = {
    "supervised": (lambda: Supervised(model(10)), images),
    "simdino, groups smaller than a share": (lambda: distilled(4), views),
    "simdino, groups as large as a share": (lambda: distilled(8), views),
    "simdino, groups larger than a share": (lambda: distilled(16), views),
    "simdinov2": (lambda: distilled(16, patches=1.0), views),
    "dino": (lambda: DINO(model(0), prototypes=32, head_dim=16, head_hidden=24), views),
    "mcr2": (lambda: MCR2(model(10)), images),
    "mcr2-views": (lambda: SelfSupervisedMCR2(model(0)), views),
}


def step(make, batch, labels):
    """The loss, the gradient and the buffers of one step; what data parallelism does is done by hand."""
    objective = make()
    loss = objective(batch, labels)["loss"]
    loss.backward()
    objective.after_step(0, 10)
    gradients = {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}
    buffers = dict(objective.named_buffers())
    return {"loss": averaged(loss.detach()), **{k: averaged(g) for k, g in gradients.items()}, **buffers}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_two_processes_compute_the_loss_of_the_whole_batch(name, together):
    make, batch = OBJECTIVES[name]
    labels = torch.arange(16) % 10

    def body():
        x, part = batch(), slice(8 * rank(), 8 * rank() + 8)
        x = Crops(*(views[part] for views in x)) if isinstance(x, Crops) else x[part]
        return step(make, x, labels[part])

    found = together(body)
    expected = step(make, batch(), labels)
    assert len(expected) > 4
    for result in found:
        assert result.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(result[key], value.detach(), rtol=1e-4, atol=1e-6, msg=key)


# --- whole runs -------------------------------------------------------------------------------------------

RUN = {"model": "crate_digits", "model_args": {"depth": 2}, "batch_size": 64, "lr": 1e-4, "matrix_lr": 1e-4}
"""22 steps an epoch, at rates at which Muon's bfloat16 iteration does not magnify last bits."""


def start(run, *arguments, launcher=PELLUCID, environment=None, **options):
    config = run.with_suffix(".yaml")
    config.write_text(yaml.safe_dump({"data": "digits", **RUN, "epochs": 1, **options}))
    return subprocess.Popen(
        [*launcher, "train", "--config", str(config), "--out", str(run), "--no-report", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
    )


def finish(program, timeout=240):
    try:
        output, error = program.communicate(timeout=timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGKILL)
    return program.returncode, output, error


def trained(run, *arguments, **options):
    code, output, error = finish(start(run, *arguments, **options))
    assert code == 0, error
    return output


def state(run):
    """All that the last checkpoint holds: weights, teacher, heads, moments, and the optimiser's state."""
    return load_checkpoint(run / "checkpoints")


def difference(one, other):
    """Of weights, teacher, heads and buffers the largest, relative to a tensor's largest number where that is
    above 1; and of the losses in the log the largest relative one."""
    a, b = state(one), state(other)
    assert a.step == b.step
    assert a.tensors.keys() == b.tensors.keys()
    names = [name for name in a.tensors if name.startswith("objective/")]
    tensors = max(apart(a.tensors[name], b.tensors[name]) for name in names)
    losses = [[line["loss"] for line in log(run) if line["split"] == "train"] for run in (one, other)]
    assert len(losses[0]) == len(losses[1]) > 0
    return tensors, max(abs(x - y) / abs(y) for x, y in zip(*losses, strict=True))


def apart(one, other):
    return ((one - other).abs().max() / other.abs().max().clamp_min(1)).item()


def log(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


SELF = {"head_dim": 32, "head_hidden": 64}
RUNS = {
    "supervised": {},
    "simdino, groups smaller than a share": {"objective": "simdino", "objective_args": {"group_size": 16}},
    "simdino, groups as large as a share": {"objective": "simdino", "objective_args": {"group_size": 32}},
    "simdino, a batch as one group": {"objective": "simdino"},
    "simdinov2": {"objective": "simdinov2", "model_args": {"depth": 2, "reg_tokens": 2}},
    "dino": {"objective": "dino"},
    "mcr2": {"objective": "mcr2"},
    "mcr2-views": {"objective": "mcr2-views"},
}


@slow
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_give_the_run_of_one(name, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    trained(one, **RUNS[name])
    trained(two, **RUNS[name], **TWO)
    tensors, losses = difference(two, one)
    assert tensors <= 1e-5
    assert losses <= 1e-5
