"""Time and memory against tokens: what is measured and what is left out. No speed is asserted."""

import json
import os
import sys

import pytest
import torch

from pellucid.cli import main
from pellucid.errors import ConfigError
from pellucid.measure.tokens import METHODS, fit_exponent, peak_memory, token_scaling
from pellucid.steps import MSSA, TSSA

MIB = 2**20


@pytest.fixture(scope="module")
def result():
    lines = []
    found = token_scaling(
        (2, 8, 56, 60), 16, 2, limit_gib=0.2, rounds=1, seconds=0.001, progress=lines.append
    )
    return found, lines


def test_every_method_at_every_number_of_tokens(result):
    rows, lines = result[0].rows, result[1]
    assert [(row["tokens"], row["method"]) for row in rows] == [
        (n, method) for n in (4, 64, 3136, 3600) for method in METHODS
    ]
    assert lines == ["4 tokens", "64 tokens", "3136 tokens", "3600 tokens"]
    for row in rows:
        measured = row["skipped"] is None
        assert (row["ms"] is not None and row["ms"] > 0) == measured
        assert (row["peak_mib"] is not None and row["peak_mib"] > 0) == measured


def test_explicit_attention_stops_at_the_limit_and_says_so(result):
    skipped = {(row["method"], row["tokens"]): row["skipped"] for row in result[0].rows if row["skipped"]}
    # 2 heads x 3600^2 weights of 4 bytes, twice: 0.193 GiB is below the limit of 0.2, so none is left out yet
    assert skipped == {}
    less = token_scaling((8, 60), 16, 2, limit_gib=0.19, rounds=1, seconds=0.001)
    assert [row["skipped"] for row in less.rows if row["skipped"]] == ["weights of 0.2 GiB, limit 0.19 GiB"]
    assert "explicit, 3600 tokens: weights of 0.2 GiB, limit 0.19 GiB" in less.table()


def test_memory_is_linear_but_where_weights_are_formed(result):
    memory = {method: fit["memory"] for method, fit in result[0].exponents.items()}
    assert memory["published"] == pytest.approx(1, abs=0.05)
    assert memory["tssa"] == pytest.approx(1, abs=0.05)
    assert 0 < memory["mssa"] < 1.05  # a buffer of one size for its blocks, and what grows
    assert memory["explicit"] == pytest.approx(2, abs=0.05)
    peak = {(row["method"], row["tokens"]): row["peak_mib"] for row in result[0].rows}
    assert peak["tssa", 3136] < peak["published", 3136]
    assert peak["explicit", 3136] > 2 * 2 * 3136**2 * 4 / MIB  # two heads, before and after the softmax


def test_peak_memory_is_the_moment_when_most_is_alive():
    a = torch.zeros(MIB // 4)  # 1 MiB

    def call():
        b = a + 1
        c = b * 2
        del b
        d = c + c
        del c
        return d

    assert peak_memory(call) == pytest.approx(2 * MIB, abs=1000)
    assert peak_memory(lambda: (a + 1, a + 2, a + 3)) == pytest.approx(3 * MIB, abs=1000)
    assert peak_memory(lambda: a.view(2, -1)) == 0


def test_tssa_forms_nothing_that_compares_tokens_with_tokens():
    n, d = 2000, 16
    z = torch.randn(1, n, d)
    with torch.inference_mode():
        linear, squared = TSSA(d, 2), MSSA(d, 2)
        assert peak_memory(lambda: linear(z)) < 12 * n * d * 4
        assert peak_memory(lambda: squared.attention(z)) > 2 * n * n * 4


def test_fit_finds_the_exponent_that_was_planted():
    rows = [{"tokens": n, "ms": 3 * n**1.5} for n in (10, 20, 70)]
    assert fit_exponent(rows, "ms") == pytest.approx(1.5)


def test_table_and_file_say_the_same(result, tmp_path):
    found = result[0]
    found.to_json(tmp_path / "tokens.json")
    read = json.loads((tmp_path / "tokens.json").read_text())
    assert read["rows"] == found.rows
    assert read["exponents"] == found.exponents
    text = found.table()
    for row in found.rows:
        assert f"{row['ms']:.2f}" in text
        assert f"{row['peak_mib']:.1f}" in text
    assert f"time as n^{found.exponents['tssa']['time']:.2f}" in text


def test_the_picture_shows_every_line(result, tmp_path):
    pytest.importorskip("matplotlib")
    result[0].picture(tmp_path / "a.svg", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    svg = (tmp_path / "a.svg").read_text()
    for label in (*METHODS.values(), "tokens", "Time of one step", "Peak memory"):
        assert label in svg  # matplotlib leaves the text beside its outlines
    with pytest.raises(ConfigError, match=r"name a \.png or an \.svg file"):
        result[0].picture(tmp_path / "a.xyz")


def test_without_matplotlib_the_remedy_is_said(result, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install 'pellucid\[pictures\]'"):
        result[0].picture(tmp_path / "a.png")


def test_the_profiler_is_silent_and_errors_are_still_heard(capfd):
    peak_memory(lambda: torch.zeros(3))
    os.write(2, b"heard")
    assert capfd.readouterr().err == "heard"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grids": (0,)}, "must be 1 or larger"),
        ({"grids": ()}, "must be 1 or larger"),
        ({"rounds": 0}, "must be 1 or larger"),
        ({"limit_gib": 0}, "above 0"),
        ({"dim": 10, "num_heads": 3}, "10 is not divisible by 3 heads"),
        ({"threads": 0}, "threads 0"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        token_scaling(**{"grids": (2,), **options})


def test_from_the_command_line(tmp_path, capsys):
    argv = ["bench-tokens", "--grids", "2", "4", "--embed-dim", "8", "--num-heads", "2", "--rounds", "1"]
    assert main([*argv, "-o", str(tmp_path / "t.json"), "--picture", str(tmp_path / "t.svg")]) == 0
    assert len(json.loads((tmp_path / "t.json").read_text())["rows"]) == 8
    assert (tmp_path / "t.svg").exists()
    assert "tssa, ms" in capsys.readouterr().out
    assert main([*argv, "--picture", str(tmp_path / "no" / "t.svg")]) == 2
    assert "is not a folder" in capsys.readouterr().err
