"""``pellucid view`` and ``audit --bundle`` as they are typed."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pellucid.cli import main
from pellucid.glass import server
from pellucid.glass.opening import Kept, open_target
from pellucid.glass.packed import unpack
from pellucid.glass.server import listening

ADDRESS = re.compile(r"looking inside: (http://127\.0\.0\.1:(\d+)/\?token=([\w-]{43}))\n")


def _view(arguments: list[str], log: Path) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT)
    for number in (1, 2):
        os.dup2(output, number)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w", buffering=1) for number in (1, 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
    code = main(["view", *arguments])
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)


@contextmanager
def viewing(log: Path, *arguments: str) -> Iterator[tuple[Any, re.Match[str]]]:
    """The program in a forked process, from the moment when it has said where it is."""
    process = multiprocessing.get_context("fork").Process(target=_view, args=(list(arguments), log))
    process.start()
    try:
        for _ in range(3000):
            found = ADDRESS.search(log.read_text()) if log.exists() else None
            if found or not process.is_alive():
                break
            time.sleep(0.01)
        assert found, log.read_text() if log.exists() else "nothing was said"
        yield process, found
    finally:
        process.kill()
        process.join()


def get(address: str, token: str = "") -> tuple[int, bytes]:
    request = urllib.request.Request(address, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)], ids=["SIGINT", "SIGTERM"]
)
def test_it_answers_until_it_is_stopped(tmp_path: Path, text_run: Path, number: int, code: int) -> None:
    log = tmp_path / "log"
    with viewing(log, str(text_run), "--port", "0") as (process, said):
        address, port, token = said.groups()
        base = address.partition("?")[0]
        assert get(address)[0] == 200
        assert get(f"{base}api/overview")[0] == 403
        status, answer = get(f"{base}api/overview", token)
        assert status == 200
        assert [model["reads"] for model in unpack(answer)["models"]] == ["text", "text"]
        sent = time.monotonic()
        os.kill(process.pid, number)
        process.join(20)
        assert process.exitcode == code
        assert time.monotonic() - sent < 5
    told = log.read_text()
    assert "for this machine only, and only with this address; Ctrl-C ends it" in told
    assert "Traceback" not in told
    assert told.count(token) == 1  # where its user reads it, and nowhere else
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(port)), timeout=5)


def test_a_port_that_is_taken(monkeypatch, capsys, text_run: Path) -> None:
    with listening(0) as taken:
        port = taken.getsockname()[1]
        assert main(["view", "crate_digits", "--port", str(port)]) == 2
        said = capsys.readouterr().err
        assert said == f"error: port {port} on 127.0.0.1 is taken or may not be used - give another --port\n"
        monkeypatch.setattr(server, "PORT", port)
        with listening(None) as free:  # unless one is asked for, the next that is free
            assert port < free.getsockname()[1] < port + server.PORTS_TRIED
        monkeypatch.setattr(server, "PORTS_TRIED", 1)
        assert main(["view", "crate_digits"]) == 2
        assert f"every port from {port} to {port} on 127.0.0.1 is taken" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["crate_digits", "--host", "0.0.0.0"], "unknown option --host"),
        (["crate_digits", "--allow-remote"], "unknown option --allow-remote"),
        (["crate_digits", "--port", "x"], "port"),
        (["crate_digits", "--port", "70000"], "port 70000 on 127.0.0.1"),
        (["no_such_model"], "no_such_model"),
        (["."], "holds no run and no model - name the folder that train made"),
        (["crate_gpt_small"], "words that are only numbers - name a run"),
        (["crate_digits", "nothing.png"], "nothing.png"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_opened_is_told_in_a_line(
    arguments: list[str], said: str, capsys, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["view", *arguments]) in (2, 3)
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert said in told
    assert len(told.splitlines()) <= 5


def test_a_bundle_of_text_holds_what_the_page_shows(text_run: Path, tmp_path: Path, capsys) -> None:
    path = tmp_path / "stories.pellucid"
    assert main(["audit", str(text_run), "--limit", "3", "--bundle", str(path)]) == 0
    assert f"open it with pellucid view {path}" in capsys.readouterr().out
    kept, live = open_target(str(path)), open_target(str(text_run))
    assert isinstance(kept, Kept)
    assert kept.overview()["models"][0]["reads"] == "text"
    assert kept.audit(0)["audit"]["samples"] == 3
    look, same = kept.look(0, 1), live.look(0, 1)
    assert look["words"] == same["words"]
    assert look["lens"]["words"] == same["lens"]["words"]
    assert (look["lens"]["chances"] == same["lens"]["chances"].numpy()).all()
    assert kept.audit(0)["atoms"].keys() == {"1", "2"}
    assert main(["audit", str(text_run), "--bundle", str(tmp_path)]) == 2


def test_a_bundle_of_pictures_holds_what_the_page_shows(tmp_path: Path) -> None:
    path = tmp_path / "digits.pellucid"
    assert main(["audit", "crate_digits", "digits", "--limit", "4", "--bundle", str(path)]) == 0
    kept = open_target(str(path))
    assert kept.audit(0)["audit"]["samples"] == 4
    assert kept.look(0, 9)["pixels"].shape == (8, 8, 1)
    assert kept.layer(0, 0, 4)["attention"].shape == (8, 17, 17)
