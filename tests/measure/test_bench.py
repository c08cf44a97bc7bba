"""The benchmark: equal before it is timed, in turns, counting what is executed. No speed is asserted."""

import json
import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pellucid.errors import ConfigError, NumericsError
from pellucid.measure import bench as bench_module
from pellucid.measure.bench import bench, executed_flop, machine_facts
from pellucid.models import create_model
from pellucid.steps import ISTA


def quick(**options):
    """The smallest model, two rounds of a hundredth of a second, a small product."""
    small = {"models": ("crate_digits",), "batch_sizes": (4,), "rounds": 2, "seconds": 0.01}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(bench_module.PRODUCT_SIDE, "cpu", 256)
        return bench(**{**small, **options})


class Altered(nn.Module):
    """A model whose scores are changed."""

    def __init__(self, model, change):
        super().__init__()
        self.model, self.change = model, change

    def forward(self, images):
        return self.change(self.model(images))


@pytest.fixture(scope="module")
def result():
    lines = []
    return quick(threads=1, dtypes=("float32", "bfloat16"), progress=lines.append), lines


def test_every_case_once(result):
    rows, lines = result[0].rows, result[1]
    cases = [(row["mode"], row["dtype"], row["batch_size"]) for row in rows]
    assert sorted(cases) == sorted((m, d, 4) for m in bench_module.MODES for d in bench_module.DTYPES)
    assert len(lines) == 2 * len(rows)
    for index, (row, before, behind) in enumerate(zip(rows, lines[::2], lines[1::2], strict=True), 1):
        assert before == f"{index} of 4: crate_digits, {row['mode']}, {row['dtype']}, 4 images"
        assert f"{row['vs_published'][0]:.2f} (" in behind
        assert behind.count(" x ") == 2  # published, ViT; nothing was compiled
        assert f"{row['ours_ms']:.1f} ms" in behind


def test_numbers_agree_with_each_other(result):
    for row in result[0].rows:
        assert tuple(row) == bench_module.ROW_KEYS
        assert row["images_per_second"] == pytest.approx(row["batch_size"] / row["ours_ms"] * 1e3)
        assert row["gflops"] == pytest.approx(row["gflop"] / row["ours_ms"] * 1e3)
        for key in ("vs_published", "vs_vit"):
            middle, low, high = row[key]
            assert 0 < low <= middle <= high < math.inf
        assert 0 < row["share_of_product"] < math.inf
        # A layer has 2 matrices of width x width here, one of ViT 4 and as many as 8 in its MLP.
        assert 5 < row["vit_parameters"] / row["parameters"] < 6
        assert min(row["published_ms"], row["vit_ms"], row["product_gflops"]) > 0


def test_table_and_file_say_the_same(result, tmp_path):
    result[0].to_json(tmp_path / "bench.json")
    read = json.loads((tmp_path / "bench.json").read_text())
    assert read == {"machine": result[0].machine, "rows": result[0].rows}
    text = result[0].table()
    assert "ours, ms" in text
    assert "GFLOP/s" in text
    for row in read["rows"]:
        assert f"{row['vs_vit'][0]:.2f} (" in text
        assert f"{row['ours_ms']:.1f}" in text
    assert torch.__version__ in text
    assert len(text.splitlines()) == 4 + len(read["rows"]) + 1 + len(bench_module.NOTES)
    assert "no optimiser" in text
    assert "autocast" in text


@pytest.mark.parametrize("name", ["crate_alpha_digits", "crate_mae_digits", "tost_digits"])
def test_the_family_is_timed(name):
    result = quick(models=(name,), dtypes=("float32", "bfloat16"), rounds=1)
    for row in result.rows:
        assert (row["vs_vit"] is None) == (row["vit_parameters"] is None) == name.startswith("crate_mae")
        assert min(row["ours_ms"], row["published_ms"], row["gflop"]) > 0
    assert result.table().count(name) == 4


@pytest.mark.parametrize("name", ["tost_digits", "crate_alpha_digits"])
def test_operations_are_counted_as_torch_counts_them(name):
    """On what torch's own counter knows: all but attention on a CPU."""
    model, images = create_model(name).train(), torch.randn(2, 1, 8, 8)

    def call():
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            model(images).square().sum().backward()

    with FlopCounterMode(display=False) as counter:
        call()
    assert executed_flop(call) == counter.get_total_flops() > 0


@pytest.mark.slow
def test_compiled_forms_are_timed_besides():
    row = quick(models=("tost_digits",), modes=("inference",), rounds=1, compile=True).rows[0]
    assert min(row["compiled_ms"], row["published_compiled_ms"]) > 0
    assert row["compiled_vs_published"][0] == pytest.approx(row["published_ms"] / row["compiled_ms"])


def test_a_missing_compiler_is_said(monkeypatch):
    monkeypatch.setattr(bench_module.shutil, "which", lambda _: None)
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler"):
        bench(compile=True)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("tokens_per_batch", ["more than the width", "fewer"])
def test_counted_operations_are_the_executed_ones(tokens_per_batch):
    """Against arithmetic by hand: t tokens of width d, and the inner width, which is d here.

    Compress takes 2 t d^2 into the subspaces and as much out of them, and 4 t n d in attention; sparsify
    2 t d^2 folded, with 2 d^3 more for a fresh fold, and 4 t d^2 unfolded. A backward pass takes twice that,
    attention 2.5 times where it is fused; the images want no gradient.
    """
    model = create_model("crate_digits", depth=3, compression="untied")
    batch = 9 if tokens_per_batch.startswith("more") else 2
    assert (batch * 17 > 64) == tokens_per_batch.startswith("more")
    images = torch.randn(batch, 1, 8, 8)
    t, n, d, layers = batch * 17, 17, 64, 3
    stem, head = 2 * batch * 16 * 4 * d, 2 * batch * d * 10
    products, attention = layers * 4 * t * d * d, layers * 4 * t * n * d
    ista = layers * (2 * t * d * d + 2 * d**3 if t > d else 4 * t * d * d)

    def infer():
        with torch.inference_mode():
            model(images)

    def train():
        model(images).sum().backward()

    def train_low():
        with torch.autocast("cpu", torch.bfloat16):
            model(images).sum().backward()

    model.eval()
    kept = layers * 2 * t * d * d
    assert executed_flop(infer) == stem + products + attention + kept + head + layers * 2 * d**3  # folds made
    assert executed_flop(infer) == stem + products + attention + kept + head
    model.train()
    assert executed_flop(train) == 2 * stem + 3 * (head + products + ista) + 3.5 * attention
    assert executed_flop(train_low) == 2 * stem + 3 * (head + products + ista + attention)  # nothing is fused


def test_contenders_take_turns(monkeypatch):
    order, clock = [], iter(range(10**6))
    monkeypatch.setattr(bench_module, "perf_counter", lambda: next(clock) * 0.5)
    contenders = {name: (lambda name=name: order.append(name)) for name in "abc"}
    times = bench_module._interleaved(contenders, 3, 0.5, torch.device("cpu"))
    assert "".join(order[6:]) == "abc" + "bca" + "cab"  # after two calls of each to warm up
    assert times == {name: [0.5] * 3 for name in "abc"}


def test_nothing_is_timed_that_is_not_equal(monkeypatch):
    monkeypatch.setattr(bench_module, "published_twin", lambda model: Altered(model, lambda y: y * 1.01))
    monkeypatch.setattr(bench_module, "_interleaved", lambda *_: pytest.fail("timed"))
    with pytest.raises(NumericsError, match=r"differ: error 9\.9e-03.*would not compare"):
        quick(modes=("inference",), dtypes=("float32",))


def test_a_form_that_loses_more_bits_than_the_published_one_is_noticed(monkeypatch):
    """Equal in float32, but with the identity inside the product: bfloat16 rounds the tokens themselves."""

    def fold_all(self, z, x=None):
        return self.shrink(z @ (torch.eye(z.shape[-1]) + self._make_fold()))

    monkeypatch.setattr(ISTA, "forward", fold_all)
    with pytest.raises(NumericsError, match="in inference, bfloat16"):
        bench(
            models=("crate_tiny_patch16_224",), batch_sizes=(2,), modes=("inference",), dtypes=("bfloat16",)
        )


def test_the_callers_random_numbers_are_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    quick(modes=("inference",), dtypes=("float32",))
    assert torch.equal(torch.rand(1), expected)


def test_a_wrong_gradient_is_noticed_too(monkeypatch):
    def twin(model):
        extra = model.norm.weight[:10]
        return Altered(model, lambda y: y + 0.1 * (extra - extra.detach()))

    monkeypatch.setattr(bench_module, "published_twin", twin)
    with pytest.raises(NumericsError, match="in training, float32"):
        quick(modes=("training",), dtypes=("float32",))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": ("vit_digits",)}, "vit_digits has no published arithmetic"),
        ({"models": ("crate_digit",)}, "did you mean 'crate_digits'"),
        ({"modes": ("inferense",)}, "unknown 'inferense' - did you mean 'inference'"),
        ({"dtypes": ("float16",)}, "unknown 'float16' - did you mean 'bfloat16'|'float32'"),
        ({"rounds": 0}, "rounds 0 and batch sizes"),
        ({"batch_sizes": (0,)}, r"batch sizes \(0,\) must be 1 or larger"),
        ({"threads": 0}, "threads 0 must be 1 or larger"),
        ({"device": "cud"}, "unknown device 'cud' - did you mean 'cuda'"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        bench(**options)


def test_a_missing_gpu_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="sees no GPU"):
        bench(device="cuda:1")


def test_no_minutes_are_lost_before_a_model_is_refused(monkeypatch):
    monkeypatch.setattr(bench_module, "_measure", lambda *_: pytest.fail("timed"))
    with pytest.raises(ConfigError, match="vit_digits"):
        bench(models=("crate_digits", "vit_digits"))


def test_threads_are_put_back():
    before = torch.get_num_threads()
    result = quick(threads=before + 1, modes=("inference",), dtypes=("float32",))
    assert result.machine["threads"] == before + 1
    assert torch.get_num_threads() == before
    assert machine_facts()["threads"] == before
