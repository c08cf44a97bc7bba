"""Several processes that train one model: the numbers are those of one process, and none is left alone."""

import contextlib
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from torch import distributed as dist
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import Shard, distribute_tensor

from pellucid.data import Crops
from pellucid.errors import ConfigError, NumericsError, ResourceError
from pellucid.models import create_model
from pellucid.training import lifeline, train
from pellucid.training.checkpoint import load_checkpoint, save_sharded
from pellucid.training.fixed_sum import in_pairs
from pellucid.training.learner import Learner
from pellucid.training.lifeline import Lifeline
from pellucid.training.masked import MAE
from pellucid.training.mcr2 import MCR2, SelfSupervisedMCR2
from pellucid.training.ranks import averaged, gathered, launched, local, rank, whole, world
from pellucid.training.recipe import MuonAdamW
from pellucid.training.self_distillation import DINO, SimDINO
from pellucid.training.sharding import shard
from pellucid.training.supervised import Supervised

PELLUCID = [sys.executable, "-m", "pellucid"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "pellucid"]
TWO = {"devices": 2, "accelerator": "cpu"}
CUT = TWO | {"strategy": "fsdp"}

slow = pytest.mark.slow


# --- one batch, in two forked processes -------------------------------------------------------------------


@pytest.fixture
def together(fork, tmp_path):
    """``together(body)``: body in two processes that have met, and what each of them returns."""

    count = itertools.count()

    def run(body):
        place = tmp_path / f"met-{next(count)}"

        def process(number):
            dist.init_process_group("gloo", f"file://{place}", rank=number, world_size=2)
            torch.set_num_threads(1)
            result = {key: value.detach().clone() for key, value in body().items()}
            torch.save(result, tmp_path / f"{number}.pt")  # noqa: TID251
            dist.barrier()
            dist.destroy_process_group()

        with open(tmp_path / "said", "w") as said:
            children = [fork(lambda number=number: process(number), said.fileno()) for number in range(2)]
            codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        assert codes == [0, 0], (tmp_path / "said").read_text()
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


def views(number=0):
    generator = torch.Generator().manual_seed(number)
    large, small = (torch.randn(16, n, 1, 8, 8, generator=generator) for n in (2, 1))
    hidden = torch.rand(16, 2, 16, generator=generator) < 0.4
    hidden[:4] = False  # the first process hides less than the second
    return Crops(large, small, hidden)


def images(number=0):
    return torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(number))


def half_hidden(number=0):
    hidden = torch.rand(16, 1, 16, generator=torch.Generator().manual_seed(number)).argsort(-1) < 8
    return Crops(images(number)[:, None], torch.empty(16, 0, 1, 8, 8), hidden)


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
    "mae": (lambda: MAE(create_model("crate_mae_digits", depth=1, num_classes=0)), half_hidden),
}


def share(batch):
    """This process's part of a batch."""
    own = slice(16 // world() * rank(), 16 // world() * (rank() + 1))
    return Crops(*(part[own] for part in batch)) if isinstance(batch, Crops) else batch[own]


LABELS = torch.arange(16) % 10


def step(make, batch):
    """The loss, the gradient and the buffers of one step; what data parallelism does is done by hand."""
    torch.manual_seed(0)
    objective = make()
    loss = objective(share(batch()), share(LABELS))["loss"]
    loss.backward()
    objective.after_step(0, 10)
    gradients = {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}
    buffers = dict(objective.named_buffers())
    return {"loss": averaged(loss.detach()), **{k: averaged(g) for k, g in gradients.items()}, **buffers}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_two_processes_compute_the_loss_of_the_whole_batch(name, together):
    found = together(lambda: step(*OBJECTIVES[name]))
    expected = step(*OBJECTIVES[name])
    assert len(expected) > 4
    for result in found:
        assert result.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(result[key], value.detach(), rtol=1e-4, atol=1e-6, msg=key)


# --- twenty steps, in two forked processes ----------------------------------------------------------------


def after_steps(make, batch, strategy="alone", *, saved=None, first=0, last=20, clip=0.0, average=0.0):
    """All that a learner holds after the steps from ``first`` to ``last`` of 20, at low rates."""
    torch.manual_seed(0)
    objective = make()
    optimizer = MuonAdamW(objective.model, 1e-4, 1e-4, 0.05, objective.heads)
    learner = Learner(objective, optimizer, 20, clip=clip, average=average)
    if saved is not None:
        learner.load_tensors(saved, first)
    if strategy == "fsdp":
        shard(learner, torch.device("cpu"))
        layers = [module for name, module in objective.named_modules() if re.search(r"layers\.\d+$", name)]
        assert layers
        assert all(isinstance(layer, FSDPModule) for layer in layers)
        held = sum(local(value).numel() for value in objective.parameters())
        assert held < 0.6 * sum(value.numel() for value in objective.parameters())
    learner.any_rank = lambda flag: bool(averaged(torch.tensor([float(flag)])) > 0)
    for number in range(first, last):
        learner.losses((share(batch(number)), share(LABELS)), micro=rank())["loss"].backward()
        for parameter in objective.parameters() if strategy == "ddp" else ():
            if parameter.grad is not None:
                averaged(parameter.grad)
        learner.update()
    with learner.measured() as (_, weights):
        given = {f"given/{name}": value for name, value in weights.items()}
    return {**learner.whole_tensors(), **given}


def of_model(tensors):
    return {name: value for name, value in tensors.items() if not name.startswith("optimizer/")}


def furthest(one, other):
    assert one.keys() == other.keys()
    return max(apart(one[name].float(), other[name].float()) for name in one)


def apart(one, other):
    """Largest difference, relative to the largest number where that is above 1."""
    return ((one - other).abs().max() / other.abs().max().clamp_min(1)).item()


FIRST = ("supervised", "simdino, groups larger than a share", "mae")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", [pytest.param(k, marks=[] if k in FIRST else slow) for k in OBJECTIVES])
def test_two_processes_have_the_weights_of_one_after_twenty_steps(name, strategy, together):
    """Teacher, heads, moments and what is handed over included. AdamW makes steps of the last bits of a
    gradient that is nearly zero, and Muon's iteration is in bfloat16."""
    make, batch = OBJECTIVES[name]
    alone = after_steps(make, batch)
    start = after_steps(make, batch, last=0)
    matrix = "objective/model.embed.stem.proj.weight"
    assert apart(start[matrix], alone[matrix]) > 5e-4
    for found in together(lambda: after_steps(make, batch, strategy)):
        assert furthest(of_model(found), of_model(alone)) <= 3e-5


def test_cut_up_clipping_and_averaging_are_the_same(together):
    make, batch = OBJECTIVES["supervised"]
    options = {"clip": 0.05, "average": 0.9}
    alone = after_steps(make, batch, **options)
    for found in together(lambda: after_steps(make, batch, "fsdp", **options)):
        assert furthest(of_model(found), of_model(alone)) <= 3e-5


WAYS = [("fsdp", "alone"), ("alone", "fsdp"), pytest.param(("fsdp", "fsdp"), marks=slow)]


@pytest.mark.parametrize("way", WAYS, ids=" to ".join)
def test_a_state_goes_from_cut_up_to_whole_and_back(way, together):
    make, batch = OBJECTIVES["simdinov2"]

    def run(strategy, **options):
        if strategy == "alone":
            return after_steps(make, batch, **options)
        return together(lambda: after_steps(make, batch, strategy, **options))[0]

    middle = run(way[0], last=10)
    saved = {name: value for name, value in middle.items() if not name.startswith("given/")}
    found = run(way[1], saved=saved, first=10)
    whole = run(way[1])
    assert furthest(of_model(found), of_model(whole)) <= (5e-5 if way[0] != way[1] else 0)


@pytest.mark.parametrize("fails", [False, True])
def test_each_process_writes_its_rows_of_a_checkpoint(fails, together, tmp_path):
    """One process reads them; where another cannot write, what stood stands."""
    folder = tmp_path / "checkpoints"
    generator = torch.Generator().manual_seed(0)
    state = {f"rows {n}": torch.randn(n, 3, generator=generator) for n in (1, 2, 5, 64)}
    state |= {"plain": torch.randn(4), "count": torch.tensor(7)}

    def cut(value):
        return distribute_tensor(value, init_device_mesh("cpu", (2,)), [Shard(0)], src_data_rank=None)

    def body():
        folder.mkdir(exist_ok=True)
        tensors = {k: cut(v) if k.startswith("rows") else v + rank() for k, v in state.items()}
        for step in (1, 2, 3):
            save_sharded(folder, step, tensors, {"data": f"process {rank()}"})
        tensors["rows 5"].to_local()[-1] = torch.inf if rank() else 0
        with pytest.raises(
            NumericsError, match=r"step 4 holds 1 non-finite tensors \(rows 5\).*step-00000003"
        ):
            save_sharded(folder, 4, tensors, {})
        if fails:
            tensors["rows 5"].to_local().zero_()
            if rank() == 1:
                HuggingFaceStorageWriter.write_data = full
            with pytest.raises(ResourceError, match=r"process 1: OSError: .*No space.*step-00000003"):
                save_sharded(folder, 5, tensors, {})
        return {}

    def full(self, *arguments):
        raise OSError(28, "No space left on device")

    together(body)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002", "step-00000003"]
    assert len(list((folder / "step-00000003").glob("shard-*.safetensors"))) == 2
    found = load_checkpoint(folder)
    assert (found.step, found.meta, found.damaged) == (3, {"data": "process 0"}, [])
    assert found.tensors.keys() == state.keys()
    assert all(torch.equal(found.tensors[name], value) for name, value in state.items())
    part = folder / "step-00000003" / "shard-00002-model-00001-of-00001.safetensors"
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    older = load_checkpoint(folder)
    assert older.step == 2
    assert "shard-00002-model-00001-of-00001.safetensors is damaged" in older.damaged[0]
    part.unlink()
    assert "step-00000003: incomplete" in load_checkpoint(folder).damaged[0]


def test_muon_by_rows_is_muon(together):
    """Given the same gradient, whatever the number of rows, to the last bit but one."""
    shapes = [(64, 16), (16, 64), (7, 16), (1, 8)]
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    gradients = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(3)]

    def moved(cut):
        model = nn.Module()
        model.list = nn.ParameterList([nn.Parameter(cut(matrix.clone())) for matrix in start])
        optimizer = MuonAdamW(model, 1e-3, 1e-1, 0.1)
        assert len(optimizer.parts) == 1
        for step in gradients:
            for parameter, gradient in zip(model.list, step, strict=True):
                parameter.grad = cut(gradient)
            optimizer.step()
        return {str(i): whole(parameter.detach()) for i, parameter in enumerate(model.list)}

    def cut(value):
        return distribute_tensor(value, init_device_mesh("cpu", (2,)), [Shard(0)], src_data_rank=None)

    expected = moved(lambda value: value)
    for found in together(lambda: moved(cut)):
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-6)


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


@pytest.fixture
def forked(fork, command, between_steps, tmp_path):
    """As ``trained``, in forked processes numbered as torchrun numbers them: seconds less than new ones."""

    def run_in_forks(run, *arguments, devices=1, until=None, **options):
        code = 0 if until is None else 75
        config = run.with_suffix(".yaml")
        config.write_text(
            yaml.safe_dump({"data": "digits", **RUN, "epochs": 1, "devices": devices, **options})
        )
        with socket.socket() as place:
            place.bind(("127.0.0.1", 0))
            port = place.getsockname()[1]
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "forked"}
        meeting |= {"WORLD_SIZE": devices, "LOCAL_WORLD_SIZE": devices}
        meeting |= {"GROUP_RANK": 0, "GROUP_WORLD_SIZE": 1}

        def process(number):
            if devices > 1:
                numbers = {"RANK": number, "LOCAL_RANK": number}
                os.environ |= {name: str(value) for name, value in (meeting | numbers).items()}
            stops = {until: lambda: os.kill(os.getpid(), signal.SIGTERM)}
            with between_steps(stops):
                return command("train", "--config", config, "--out", run, "--no-report", *arguments)

        with open(tmp_path / "said", "w+") as said:
            children = [
                fork(lambda number=number: process(number), said.fileno()) for number in range(devices)
            ]
            codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
            said.seek(0)
            assert codes == [code] * devices, said.read()

    return run_in_forks


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
    "mae": {"objective": "mae", "model": "crate_mae_digits"},
}


@slow
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_give_the_run_of_one(name, forked, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    forked(one, **RUNS[name])
    forked(two, **RUNS[name], **TWO)
    tensors, losses = difference(two, one)
    assert tensors <= 5e-5
    assert losses <= 2e-5


@slow
@pytest.mark.parametrize(
    "way",
    [({}, TWO), (TWO, {}), (TWO, TWO), (CUT, {}), (TWO, CUT), (CUT | {"checkpoint_format": "sharded"}, {})],
    ids=["1 to 2", "2 to 1", "2 to 2", "2 cut up to 1", "2 to 2 cut up", "2 cut up in parts to 1"],
)
def test_a_stopped_run_goes_on_with_another_number_of_processes(way, forked, tmp_path):
    """To the same bits with the same number, else within what the numbers of processes differ by."""
    before, after = way
    options = RUNS["simdino, a batch as one group"] | {"save_every": 11}
    forked(tmp_path / "whole", **options, **after)
    program = start(tmp_path / "run", **options, **before)
    wait_for(tmp_path / "run" / "checkpoints" / "step-00000011", program)
    program.send_signal(signal.SIGTERM)
    code, _, error = finish(program)
    assert code == 75, error
    assert error.count("error: stopped by SIGTERM: saved step ") == 1
    assert 11 <= state(tmp_path / "run").step < 22
    forked(tmp_path / "run", "--resume", **options, **after)
    tensors, losses = difference(tmp_path / "run", tmp_path / "whole")
    assert tensors <= (0 if before == after else 5e-5)
    assert losses <= (0 if before == after else 2e-5)


EXACT = {"supervised": RUNS["supervised"], "mae": RUNS["mae"]}
JOURNEYS = [[1, 2, 1], [2, 1, 2], [1, 4, 2]]


@slow
@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("journey", JOURNEYS, ids=str)
def test_exact_runs_end_in_the_same_bits_whatever_their_processes(
    name, journey, forked, digits, differences, tmp_path
):
    run = tmp_path / "run"
    options = {**EXACT[name], "exact": 4, "average": 0.9, "lr": 3e-3, "matrix_lr": 1e-2}
    for turn, (devices, until) in enumerate(zip(journey, [5, 13, None], strict=True)):
        again = ["--resume"] if turn else []
        forked(run, *again, devices=devices, until=until, accelerator="cpu", **options)
    alone = {"epochs": 1, "engine": "plain", "batch_size": 64, **options}
    assert differences(run, digits.reference(**alone)) == []


def test_two_processes_end_in_the_bits_of_one_when_exact(forked, digits, differences, tmp_path):
    options = {"epochs": 0.25, "exact": 2}
    forked(tmp_path / "two", devices=2, accelerator="cpu", **options)
    alone = {**RUN, "engine": "plain", **options}
    assert differences(tmp_path / "two", digits.reference(**alone)) == []


def test_without_exact_the_last_bits_may_differ(forked, digits, differences, tmp_path):
    """What the tests above would see if the sums were left to the processes."""
    forked(tmp_path / "two", devices=4, accelerator="cpu", epochs=0.25)
    alone = {**RUN, "engine": "plain", "epochs": 0.25, "accumulate": 4}
    assert differences(tmp_path / "two", digits.reference(**alone)) != []


@pytest.mark.parametrize("count", [1, 2, 4, 8, 16])
def test_the_order_of_a_fixed_sum_does_not_depend_on_who_adds(count):
    parts = torch.randn(16, 1000).mul(torch.logspace(-4, 4, 16)[:, None]).unbind()
    branches = [in_pairs(parts[number::count]) for number in range(count)]
    assert torch.equal(in_pairs(branches), in_pairs(parts))
    assert not torch.equal(sum(parts), in_pairs(parts))  # the order is of consequence


@slow
def test_torchrun(forked, tmp_path):
    output = trained(tmp_path / "run", launcher=TORCHRUN, **TWO)
    assert output.count("trained in") == 1
    forked(tmp_path / "ours", **TWO)
    assert difference(tmp_path / "run", tmp_path / "ours") == (0, 0)


def slurm(number, tasks=2):
    names = {"NTASKS": tasks, "NTASKS_PER_NODE": tasks, "NNODES": 1, "NODEID": 0, "JOB_ID": 4711}
    names |= {"PROCID": number, "LOCALID": number, "NODELIST": "127.0.0.1", "JOB_NAME": "train"}
    return {f"SLURM_{name}": str(value) for name, value in names.items()}


@slow
def test_slurm(forked, tmp_path):
    """As srun starts two tasks: each with its number in the environment."""
    programs = [start(tmp_path / "run", environment=slurm(number), **TWO) for number in range(2)]
    ends = [finish(program) for program in programs]
    assert [code for code, *_ in ends] == [0, 0], ends
    assert "trained in" in ends[0][1]
    assert ends[1][1] == ""
    forked(tmp_path / "ours", **TWO)
    assert difference(tmp_path / "run", tmp_path / "ours") == (0, 0)


# --- what goes wrong --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "options", "message"),
    [
        (
            slurm(0),
            {},
            "torchrun or srun has started 2 processes, and the run is to have 1 on each of 1 nodes",
        ),
        ({"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "4"}, TWO, "has started 4 processes"),
        ({}, {"strategy": "fsdp"}, "fsdp cuts a run up over several processes"),
        ({}, {**CUT, "incoherence": 0.1}, "incoherence looks into layers"),
        ({}, {"exact": 3}, "exact 3 on 1 processes - give powers of two"),
        ({}, {"exact": 2, **TWO, "devices": 4}, "exact 2 on 4 processes"),
        ({}, {"exact": 2, "accumulate": 2}, "leave out --accumulate"),
        ({}, {"exact": 2, **CUT}, "fsdp in its own - take --strategy ddp"),
        ({}, {"exact": 2, "objective": "mcr2"}, "looks at it as a whole - possible with supervised, mae"),
        ({}, {"exact": 2, "model": "resnet10t", "model_args": {}}, r"keeps moments of .* \(BatchNorm\)"),
        ({}, {**TWO, "checkpoint_format": "sharded"}, "add --strategy fsdp"),
        ({}, {**CUT, "model": "crate_strict_digits"}, "compress.share is a single number"),
    ],
)
def test_refused_before_anything_is_written(environment, options, message, monkeypatch, tmp_path):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        train("digits", out=str(tmp_path / "run"), **{**RUN, **options})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("environment", "number", "launched_by"),
    [
        ({}, 0, None),
        ({"LOCAL_RANK": "1"}, 1, None),
        ({"LOCAL_RANK": "0", "NODE_RANK": "1"}, 1, None),
        ({"LOCAL_RANK": "1", "RANK": "9", "WORLD_SIZE": "16", "TORCHELASTIC_RUN_ID": "x"}, 9, 16),
        (slurm(1), 1, 2),
        ({**slurm(0), "SLURM_JOB_NAME": "bash", "LOCAL_RANK": "1"}, 1, None),  # our launcher inside a session
    ],
)
def test_a_process_knows_its_number_before_they_meet(environment, number, launched_by, monkeypatch):
    for name in [name for name in os.environ if name.startswith("SLURM_") or name.endswith("RANK")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert rank() == number
    assert launched() == launched_by


def wait_for(path, program, seconds=120):
    for _ in range(20 * seconds):
        if path.exists() or program.poll() is not None:
            break
        time.sleep(0.05)
    assert path.exists(), finish(program)


def children(pid):
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return sorted(found)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@slow
@pytest.mark.parametrize("launcher", [PELLUCID, TORCHRUN], ids=["ours", "torchrun"])
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda number: number.name)
def test_a_killed_or_hung_process_ends_the_job(number, victim, launcher, tmp_path):
    run = tmp_path / "run"
    options = {"epochs": 2000, "save_every": 10, "eval_every": 1000, **TWO}
    program = start(run, launcher=launcher, **options)
    wait_for(run / "checkpoints" / "step-00000010", program)
    started = children(program.pid)
    processes = started if launcher is TORCHRUN else [program.pid, *started]
    assert len(processes) == 2
    os.kill(processes[victim], number)
    began = time.monotonic()
    while any(alive(pid) for pid in processes) and time.monotonic() < began + 30:
        time.sleep(0.05)
    assert time.monotonic() - began < 10
    code, _, error = finish(program)
    assert code == (1 if launcher is TORCHRUN else 70 if victim == 1 else -signal.SIGKILL)
    assert error.count("error: ") == 1, error
    said = r"is gone|was killed by SIGKILL"
    if number == signal.SIGSTOP:
        said = r"has given no sign of life for 6 s and was ended"
    assert re.search(rf"error: process {victim}\b.* ({said})", error), error
    assert re.search(r"last good checkpoint: step-\d{8} in \S+ - run the same command with --resume", error)
    assert state(run).step >= 10


@slow
def test_a_job_that_was_stopped_as_a_whole_goes_on(tmp_path):
    """As by Ctrl-Z, or a machine that slept: what a process was not there to hear, it does not miss."""
    run = tmp_path / "run"
    program = start(run, epochs=8, save_every=10, **TWO)
    wait_for(run / "checkpoints" / "step-00000010", program)
    processes = [program.pid, *children(program.pid)]
    for number, pause in ((signal.SIGSTOP, 9), (signal.SIGCONT, 0)):
        for pid in processes:
            os.kill(pid, number)
        time.sleep(pause)
    code, _, error = finish(program)
    assert code == 0, error
    assert state(run).step == 169


@pytest.mark.parametrize("says", [True, False])
def test_a_process_that_says_it_will_be_quiet_is_not_missed(says, together, monkeypatch):
    monkeypatch.setattr(lifeline, "BEAT", 0.2)

    def body():
        with Lifeline(lambda: "remedy", patience=2.0, grace=20) as line:
            if rank() == 1:
                line._beat = lambda: None
            line.connect("127.0.0.1")
            dist.barrier()
            if rank() == 1:
                with lifeline.quiet() if says else contextlib.nullcontext():
                    time.sleep(3.5)
            dist.barrier()
        return {}

    if says:
        together(body)
    else:
        with pytest.raises(AssertionError, match="process 1 of 2 has given no sign of life for 2 s and was"):
            together(body)
