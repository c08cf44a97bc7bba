"""What generation costs: what is measured, checked and left out. No speed is asserted."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from pellucid.cli import main
from pellucid.errors import ConfigError, NumericsError
from pellucid.measure import bench_generation as module
from pellucid.measure.bench_generation import bench_generation, counted_bytes
from pellucid.measure.tokens import _silent_stderr
from pellucid.models import create_model
from pellucid.steps import CausalTSSA, Memory

MODELS = ("crate_gpt_bytes", "crate_alpha_gpt_bytes", "tost_gpt_bytes")
FAST = {"prompt": 5, "new_tokens": 3, "rounds": 2, "seconds": 0.001}
SIZES = {"embed_dim": 24, "depth": 2, "num_heads": 3, "vocab_size": 31}
KEPT = 24 + 3 * 3
"""Of a token: its projections, and its place in every head, since distance counts in the models of bytes."""


@pytest.fixture(autouse=True, scope="module")
def tiny():
    """The same kinds of models, of two layers of 24."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "create_model", lambda name, **o: create_model(name, **{**SIZES, **o}))
        yield


@pytest.fixture(scope="module")
def result(tiny):
    lines = []
    found = bench_generation(MODELS, (40, 8), batch_size=2, budget=600, **FAST, progress=lines.append)
    return found, lines


def test_every_model_with_and_without_a_memory_and_at_every_length(result):
    found, lines = result
    names = [*MODELS, "gpt2_bytes"]
    assert [row["model"] for row in found.writing] == names
    assert [(row["tokens"], row["model"]) for row in found.lengths] == [
        (n, m) for n in (8, 40) for m in names
    ]
    for row in (*found.writing, *found.lengths):
        assert row["ms"] > 0
        assert row["again_ms"] > 0
        assert 0 <= row["difference"] < 1e-5
        for key in ("vs_beside", "gain"):
            middle, low, high = row[key]
            assert 0 < low <= middle <= high
        if row["model"] == "gpt2_bytes":
            assert row["vs_beside"] == [1, 1, 1]
    assert all(row["skipped"] is None and row["fill_s"] > 0 for row in found.lengths)
    assert found.options["beside"] == "gpt2_bytes"
    assert "8 tokens: tost_gpt_bytes reads" in lines
    assert (
        sum(line.startswith("    tost_gpt_bytes: ") for line in lines) == 3
    )  # a run that is stopped has said
    assert f"{found.lengths[-1]['ms']:.2f} ms, 1.00 (1.00-1.00) x gpt2_bytes, " in lines[-1]
    assert lines[-1].endswith(f"; {2 * 2 * KEPT * 41 * 4} bytes")
    for row in found.writing:
        assert row["tokens_per_second"] == pytest.approx(2 / (row["ms"] / 1e3))  # two rows


def test_half_the_memory_of_an_ordinary_cache_and_a_constant_state(result):
    kept = {(row["model"], row["tokens"]): row for row in result[0].lengths}
    for key in ("counted_bytes", "held_bytes"):
        for n in (8, 40):
            ordinary = kept["gpt2_bytes", n][key]
            assert kept["crate_gpt_bytes", n][key] * 2 == ordinary
            assert kept["crate_alpha_gpt_bytes", n][key] * 2 == ordinary
        assert kept["tost_gpt_bytes", 8][key] == kept["tost_gpt_bytes", 40][key] == 2 * 3 * (2 * 8 + 1) * 4
    for n in (8, 40):
        assert kept["gpt2_bytes", n]["counted_bytes"] == 2 * 2 * KEPT * n * 4
        assert (
            kept["gpt2_bytes", n]["held_bytes"] == 2 * 2 * KEPT * (n + 1) * 4
        )  # and the token that is timed


@pytest.mark.parametrize("name", [*MODELS, "gpt2_bytes"])
@torch.inference_mode()
def test_bytes_held_are_those_that_torch_has_allocated(name):
    """From its record of every allocation: what is alive when the text has been read is the memory."""
    model = create_model(name, **SIZES, context=1200).eval()
    text = torch.randint(0, 31, (1, 1100))
    model.resume(text, Memory(1))  # first touch
    for room in (1200, 0):
        memory = Memory(1, room=room)
        with _silent_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            for part in text.split(400, 1):
                model.resume(part, memory)
            part = None
        events = record.profiler.kineto_results.events()
        alive = sum(event.nbytes() for event in events if event.name() == "[memory]")
        bookkeeping = sum(t.untyped_storage().nbytes() for t in (memory.lengths, memory.places, memory._real))
        assert memory.nbytes() == pytest.approx(alive - bookkeeping, abs=1000)
        counted = counted_bytes(model, 1100)
        assert memory.nbytes() >= counted
        if name == "tost_gpt_bytes":
            assert memory.nbytes() == counted
        elif room:
            assert memory.nbytes() * 1100 == counted * 1200
        else:
            assert memory.nbytes() * 1100 == counted * 1600  # 400, 800, doubled


def test_what_is_timed_stands_at_its_length():
    """A token that has been timed is taken back, of a cache as of sums."""
    for name in ("crate_gpt_bytes", "tost_gpt_bytes"):
        writer = module._Writer(name, 40)
        text = torch.randint(0, 31, (1, 12))
        memory = writer.read(text[:, :11], 600.0)
        first = writer.add(text[:, 11:], memory)
        for _ in range(5):
            writer.add(torch.randint(0, 31, (1, 1)), memory)
        assert memory.longest == memory.lengths.item() == 11
        torch.testing.assert_close(writer.add(text[:, 11:], memory), first, rtol=0, atol=0)
        torch.testing.assert_close(writer.again(text), first, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["crate_gpt_bytes", "tost_gpt_bytes"])
def test_a_memory_that_is_wrong_is_not_timed(name, monkeypatch):
    if name == "tost_gpt_bytes":
        inner = CausalTSSA.resume
        monkeypatch.setattr(CausalTSSA, "resume", lambda self, z, state, memory: inner(self, z, None, memory))
    else:
        inner = Memory.keep

        def forgetful(self, kept, arriving):
            kept, seen = inner(self, kept, arriving)
            return kept, torch.cat([torch.zeros_like(seen[..., :1, :]), seen[..., 1:, :]], -2)

        monkeypatch.setattr(Memory, "keep", forgetful)
    with pytest.raises(NumericsError, match=f"{name}: scores by the memory differ from a full forward pass"):
        bench_generation((name,), (8,), **FAST)


def test_what_would_take_too_long_is_left_out_and_said(monkeypatch):
    """A clock that goes on by a second whenever it is asked."""
    clock = iter(range(10**6))
    monkeypatch.setattr(module, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(module, "PART", 4)
    writer = module._Writer("crate_gpt_bytes", 400)
    text = torch.randint(0, 31, (1, 400))
    assert isinstance(writer.read(text[:, :8], 10.0), Memory)  # two parts, 5 s by this clock
    assert writer.reading == (8, 5.0)
    assert writer.read(text[:, :24], 10.0) == "reading takes over 15 s, budget 10 s"  # not begun
    assert writer.reading == (8, 5.0)
    fresh = module._Writer("crate_gpt_bytes", 400)
    begun = next(clock)
    assert fresh.read(text, 10.0) == "reading takes over 101 s, budget 10 s"  # after a part of a hundred
    assert next(clock) - begun == 4


def test_long_texts_and_full_passes_stay_in_the_budget(monkeypatch):
    inner = module._Writer.read

    def slow(self, text, budget):
        memory = inner(self, text, 1e9)
        self.reading = (text.shape[1], float(text.shape[1]))  # a second for each token
        return memory if text.shape[1] <= budget else f"reading takes over {text.shape[1]} s"

    monkeypatch.setattr(module._Writer, "read", slow)
    found = bench_generation(("crate_gpt_bytes",), (4, 8, 32), **FAST, budget=24)
    assert [(row["again_ms"] is None, row["ms"] is None, row["skipped"]) for row in found.lengths[::2]] == [
        (False, False, None),  # 2 rounds, first touches and a comparison: 20 s
        (True, False, None),
        (True, True, "reading takes over 32 s"),
    ]
    text = found.table()
    assert "32 tokens, crate_gpt_bytes: reading takes over 32 s" in text
    assert "32 tokens, gpt2_bytes: reading takes over 32 s" in text


def test_memories_that_are_too_large_are_not_made():
    found = bench_generation(("crate_gpt_bytes",), (8, 40), **FAST, limit_gib=1e-5)
    assert [row["skipped"] for row in found.lengths] == [None] * 2 + [
        "memories of 3e-05 GiB together, limit 1e-05 GiB"
    ] * 2
    assert all(row["ms"] is None for row in found.lengths[2:])


def test_where_the_model_beside_is_left_out_others_are_still_timed(monkeypatch):
    inner = module._Writer.read

    def read(self, text, budget):
        ordinary = counted_bytes(self.model, 1) == 2 * 2 * KEPT * 4
        return "too long" if ordinary and text.shape[1] > 8 else inner(self, text, budget)

    monkeypatch.setattr(module._Writer, "read", read)
    found = bench_generation(("tost_gpt_bytes",), (8, 9), **FAST)
    last = found.lengths[2]
    assert last["ms"] > 0
    assert last["vs_beside"] is None
    assert found.table().count("too long") == 1


def test_table_and_file_say_the_same(result):
    found = result[0]
    text = found.table()
    for row in found.writing:
        assert f"{row['tokens_per_second']:.2f}" in text
        assert f"{row['gain'][0]:.2f} (" in text
    for row in found.lengths:
        assert f"{row['ms']:.2f}" in text
    assert json.loads(json.dumps(found.to_dict()))["lengths"] == found.lengths
    lines = [line.split() for line in text.splitlines() if line.startswith("40 ")]
    shares = {line[1]: line[-2] for line in lines}
    assert shares["crate_gpt_bytes"] == "0.5"
    assert shares["gpt2_bytes"] == "1"


def test_kept_of_a_step_that_is_not_known_is_not_guessed():
    step = SimpleNamespace(sees="past")
    model = SimpleNamespace(
        layers=[{"compress": step}], embed=SimpleNamespace(words=SimpleNamespace(weight=torch.zeros(1)))
    )
    with pytest.raises(TypeError, match="what SimpleNamespace keeps of a token is not known"):
        counted_bytes(model, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": ()}, "must be 1 or larger"),
        ({"lengths": (0, 4)}, "must be 1 or larger"),
        ({"models": ()}, "must be 1 or larger"),
        ({"prompt": 0}, "must be 1 or larger"),
        ({"depth": 0}, "must be 1 or larger"),
        ({"budget": 0.0}, "above 0"),
        ({"threads": 0}, "threads 0"),
        ({"models": ("crate_bert_bytes",)}, "'crate_bert_bytes' is no causal language model"),
        ({"models": ("crate_digits",)}, "'crate_digits' is no causal language model"),
        ({"models": ("crate_gpt_byte",)}, "did you mean 'crate_gpt_bytes'"),
        ({"beside": "nothing"}, "'nothing' is no causal language model"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        bench_generation(**{"models": ("crate_gpt_bytes",), "lengths": (4,), **FAST, **options})


def test_from_the_command_line(tmp_path, capsys):
    argv = ["bench-generation", "--models", "tost_gpt_bytes", "--lengths", "4", "6", "--prompt", "4"]
    argv += ["--new-tokens", "2", "--batch-size", "2", "--depth", "1"]
    argv += ["--rounds", "1", "--threads", "1", "--budget", "600"]
    before = torch.get_num_threads()
    assert main([*argv, "-o", str(tmp_path / "g.json")]) == 0
    assert torch.get_num_threads() == before
    read = json.loads((tmp_path / "g.json").read_text())
    assert [row["tokens"] for row in read["lengths"]] == [4, 4, 6, 6]
    assert read["machine"]["threads"] == 1
    assert (read["options"]["batch_size"], read["options"]["depth"]) == (2, 1)
    assert read["lengths"][0]["held_bytes"] == 3 * (2 * 8 + 1) * 4  # of one layer
    shown = capsys.readouterr()
    assert "x gpt2_bytes (min-max)" in shown.out
    assert "6 tokens: tost_gpt_bytes reads" in shown.err
    assert main([*argv, "-o", str(tmp_path / "no" / "g.json")]) == 2
    assert "is not a folder" in capsys.readouterr().err
