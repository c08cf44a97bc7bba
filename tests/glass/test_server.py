"""The page's server: what it answers, and what it refuses, asked directly and over raw sockets."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import multiprocessing
import os
import random
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

from pellucid.data import load_data
from pellucid.errors import ConfigError, DataError
from pellucid.glass import server
from pellucid.glass.answers import Answers, Input, Subject, bundle, sample_inputs
from pellucid.glass.guard import Guard
from pellucid.glass.opening import Kept, open_target
from pellucid.glass.packed import pack, unpack
from pellucid.glass.server import application
from pellucid.glass.shelf import Shelf
from pellucid.models import create_model

PORT = 8517
HOST = f"127.0.0.1:{PORT}"
TOKEN = "a-token-of-the-tests"


@pytest.fixture(scope="session")
def digits():
    return load_data("digits")


def subjects(digits) -> list[Subject]:
    torch.manual_seed(0)
    return [Subject(create_model(name).eval(), name, digits) for name in ("crate_digits", "vit_digits")]


@pytest.fixture
def shelf_root(tmp_path: Path) -> Path:
    root = tmp_path / "runs"
    for name, state in (("done", "finished"), ("going", "running"), ("cut", "stopped")):
        run = root / name
        run.mkdir(parents=True)
        (run / "config.yaml").write_text(
            f"model: crate_digits\nepochs: 2\nobjective: supervised\ndata: {name}\n"
        )
        lines = [{"step": s, "epoch": s / 2, "split": "train", "loss": 2.0 / s} for s in (1, 2, 3)]
        lines.append(
            {"step": 3, "epoch": 1.5, "split": "test", "loss": 1.0, "accuracy": 0.5, "verdict": "well"}
        )
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (run / "metrics.jsonl").write_text(text + '{"step": 4, "los')
        if state == "finished":
            (run / "result.json").write_text('{"accuracy": 0.75, "seconds": 3.5}')
        pid = os.getppid() if state == "running" else 2**22 + 1
        (run / "run.lock").write_text(f"pid {pid} on {os.uname().nodename}")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "config.yaml").write_text("model: SECRET\n")
    (root / "link").symlink_to(tmp_path / "secret")
    return root


@pytest.fixture
def answers(digits, shelf_root: Path) -> Answers:
    return Answers(
        "t",
        subjects(digits),
        sample_inputs(digits, 3),
        shelf=Shelf(shelf_root),
        takes_inputs=True,
        audit_limit=20,
    )


@pytest.fixture
def guard(answers: Answers) -> Guard:
    return Guard(application(answers), PORT, TOKEN)


@pytest.fixture
def client(guard: Guard) -> TestClient:
    return TestClient(guard, base_url=f"http://{HOST}", headers={"authorization": f"Bearer {TOKEN}"})


def read(client: TestClient, path: str):
    response = client.get(path)
    assert response.status_code == 200, response.text
    return unpack(response.content)


def png(*shape: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def drop(client: TestClient, data: bytes, name: str = "x.png", **headers: str):
    headers = {"content-type": "application/octet-stream", **headers}
    return client.post("/api/inputs", params={"name": name}, content=data, headers=headers)


# What it answers


def test_every_answer_is_what_was_measured(client, answers):
    overview = read(client, "/api/overview")
    assert [m["name"] for m in overview["models"]] == ["crate_digits", "vit_digits"]
    assert len(overview["inputs"]) == 3
    assert overview["inputs"][0]["thumb"].shape == (8, 8, 1)
    look = read(client, "/api/looks/0/1")
    assert look["grid"] == [4, 4]
    assert look["prefix"] == ["class"]
    np.testing.assert_array_equal(look["norms"], answers.look(0, 1)["norms"].numpy())
    layer = read(client, "/api/looks/0/1/layers/2")
    np.testing.assert_array_equal(layer["attention"], answers.layer(0, 1, 2)["attention"].numpy())
    assert layer["code"] == "after"
    vit = read(client, "/api/looks/1/1/layers/2")
    assert vit["projection"] is None
    assert vit["code"].shape == (17, 256)
    audit = read(client, "/api/models/0/audit")
    assert audit["audit"]["samples"] == 20
    assert audit["atoms"]["1"]["images"].max() < len(audit["gallery"])


def test_every_token_of_every_model_has_a_name(digits):
    names = ("crate_digits", "vit_digits", "tost_digits", "crate_strict_digits", "crate_alpha_digits")
    opened = [Subject(create_model(name).eval(), name, digits) for name in names]
    answers = Answers("t", opened, sample_inputs(digits, 1))
    for m, name in enumerate(names):
        look = answers.look(m, 0)
        assert look["grid"] == [4, 4]
        assert look["prefix"] == ([] if name == "tost_digits" else ["class"])
        assert look["norms"].shape[1] == 16 + len(look["prefix"])


def test_the_gallery_shows_the_images_that_were_looked_at(answers, digits):
    found = answers.audit(0)
    loader_order = [int(i * len(digits.test) // 20) for i in range(20)]
    names = [item["name"] for item in found["gallery"]]
    assert set(names) <= {digits.test.name(i) for i in loader_order}
    item = found["gallery"][0]
    i = next(i for i in loader_order if digits.test.name(i) == item["name"])
    np.testing.assert_array_equal(item["pixels"][..., 0], digits.test.image(i)[0].numpy())


def test_what_is_not_there(client):
    for path in ("/api/looks/2/0", "/api/looks/0/99", "/api/looks/0/0/layers/0", "/api/looks/0/0/layers/5",
                 "/api/models/7/audit", "/api/runs/nothing", "/api/nothing", "/nothing"):  # fmt: skip
        response = client.get(path)
        assert response.status_code == 404, path
        assert response.json()["error"]


def test_a_picture_dropped_in(client, answers):
    response = drop(client, png(20, 30, 3), "<img onerror=x>\n.png")
    assert response.status_code == 201
    number = response.json()["input"]
    shown = next(i for i in read(client, "/api/overview")["inputs"] if i["id"] == number)
    assert shown["dropped"]
    assert shown["name"] == "<img onerror=x>\\n.png"
    assert shown["thumb"].shape == (20, 30, 3)
    assert read(client, f"/api/looks/0/{number}")["pixels"].shape == (8, 8, 1)


def test_the_oldest_dropped_goes_first(answers):
    numbers = [answers.add(Input("x", picture=torch.zeros(1, 8, 8, dtype=torch.uint8))) for _ in range(40)]
    assert list(answers.inputs)[:3] == [0, 1, 2]
    assert list(answers.inputs)[3:] == numbers[-32:]


def bomb(side: int) -> bytes:
    """A valid PNG of side x side gray pixels, all zero, in a few kB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(bytes((side + 1) * 1000), 9)  # 1,000 rows are enough to begin with
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "status", "said"),
    [
        (b"", 422, "empty"),
        (b"<svg onload=alert(1)>", 422, "SVG"),
        (b"<!doctype html>", 422, "HTML"),
        (bomb(20_000), 422, "400 MP > limit 25 MP"),
        (png(8, 8)[:40], 422, "rejected"),
        (b"x" * (server.MAX_UPLOAD + 1), 413, "20 MB"),
    ],
    ids=["empty", "svg", "html", "bomb", "cut", "large"],
)
def test_what_is_no_picture_is_refused(client, answers, data, status, said):
    response = drop(client, data)
    assert response.status_code == status
    assert said in response.json()["error"]
    assert len(answers.inputs) == 3


def test_a_form_of_another_page_changes_nothing(client, answers):
    for kind in (
        "image/png",
        "text/plain",
        "multipart/form-data; boundary=x",
        "application/x-www-form-urlencoded",
    ):
        assert drop(client, png(8, 8), **{"content-type": kind}).status_code == 415
    assert len(answers.inputs) == 3


def test_decoding_that_does_not_end(client, answers, monkeypatch):
    until = threading.Event()
    monkeypatch.setattr(server, "DECODE_SECONDS", 0.2)
    monkeypatch.setattr(server, "read_image", lambda data, max_pixels: until.wait(10))
    with client:  # one event loop for all requests
        for _ in range(server.DECODERS):
            response = drop(client, png(8, 8))
            assert response.status_code == 422
            assert "more than 0.2 s" in response.json()["error"]
        assert drop(client, png(8, 8)).status_code == 429
        until.set()
        for _ in range(100):
            if drop(client, b"x").status_code != 429:
                break
            time.sleep(0.05)
        else:
            pytest.fail("the places of those that ended are not free again")


def test_a_slow_sender_is_not_waited_for(guard, monkeypatch):
    monkeypatch.setattr(server, "UPLOAD_SECONDS", 0.2)
    sent: list[dict] = []

    async def receive():
        await asyncio.sleep(0.05)
        return {"type": "http.request", "body": b"x", "more_body": True}

    async def send(message):
        sent.append(message)

    headers = {"host": HOST, "authorization": TOKEN, "content-type": "application/octet-stream"}
    scope = {"type": "http", "method": "POST", "path": "/api/inputs", "query_string": b"", "root_path": "",
             "headers": [(k.encode(), v.encode()) for k, v in headers.items()], "http_version": "1.1",
             "scheme": "http", "server": ("127.0.0.1", PORT), "client": ("127.0.0.1", 1)}  # fmt: skip
    asyncio.run(asyncio.wait_for(guard(scope, receive, send), 5))
    assert sent[0]["status"] == 408


# Runs


def test_runs_and_their_states(client):
    runs = {run["name"]: run for run in read(client, "/api/runs")["runs"]}
    assert {name: run["state"] for name, run in runs.items()} == {
        "done": "finished", "going": "running", "cut": "stopped",
    }  # fmt: skip
    assert runs["done"]["accuracy"] == 0.75
    assert runs["going"]["accuracy"] == 0.5
    assert runs["going"]["verdict"] == "well"
    curves = read(client, f"/api/runs/{runs['going']['id']}")
    np.testing.assert_allclose(curves["train"]["loss"], [2, 1, 2 / 3], rtol=1e-6)
    assert curves["test"]["step"].tolist() == [3]


def test_nothing_outside_the_folder_is_read(client, shelf_root):
    body = client.get("/api/runs").content
    assert b"SECRET" not in body
    assert b"link" not in body
    names = [
        "..",
        "../secret",
        "..%2fsecret",
        "%2e%2e%2fsecret",
        "link",
        "done",
        "/etc/passwd",
        "\x00",
        "a" * 1500,
    ]
    for name in names:
        response = client.get("/api/runs/" + name.replace("\x00", "%00"))
        assert response.status_code == 404, name
        assert b"SECRET" not in response.content


def test_of_istas_steps_the_longest_is_drawn(shelf_root):
    line = {"step": 1, "split": "test", "longest ISTA step": 1.5, "ISTA step, layers.0.sparsify": 1.5}
    (shelf_root / "done" / "metrics.jsonl").write_text(json.dumps(line))
    shelf = Shelf(shelf_root)
    done = next(run["id"] for run in shelf.list()["runs"] if run["name"] == "done")
    assert list(shelf.curves(done)["test"]) == ["step", "longest ISTA step"]


def test_a_long_log_is_thinned_to_its_ends(shelf_root):
    lines = [json.dumps({"step": s, "split": "train", "loss": float(s)}) for s in range(1, 10_001)]
    (shelf_root / "done" / "metrics.jsonl").write_text("\n".join(lines))
    shelf = Shelf(shelf_root)
    done = next(run["id"] for run in shelf.list()["runs"] if run["name"] == "done")
    steps = shelf.curves(done)["train"]["step"]
    assert len(steps) == 1500
    assert (steps[0], steps[-1]) == (1, 10_000)


@pytest.mark.parametrize(
    "text", ["[1, 2]", "3", '"x"', '{"step": 1e999, "split": "train"}', "[" * 10_000, "\xff\x00"]
)
def test_a_log_of_anything(shelf_root, text):
    for name in ("metrics.jsonl", "result.json"):
        (shelf_root / "done" / name).write_bytes(text.encode("latin-1"))
    shelf = Shelf(shelf_root)
    for name in shelf.names():
        pack(shelf.curves(name))


@pytest.mark.parametrize(
    "text",
    [
        "- 1",
        "model: [" * 3000,
        "a: &a [x, x, x, x, x, x, x, x, x]\n"
        + "".join(
            f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}]\n"
            for a, b in zip("abcdefghi", "bcdefghij", strict=True)
        ),
        "model: !!python/object/apply:os.system [id]",
        "model: {1: {2: {3: 4}}}\nlr: .nan\nseed: " + "9" * 400,
        "x: " + "y" * 2**21,
    ],
    ids=["list", "deep", "laughs", "tag", "nested", "large"],
)
def test_options_of_anything(shelf_root, text):
    (shelf_root / "done" / "config.yaml").write_text(text)
    assert len(pack(Shelf(shelf_root).list())) < 20_000


# Who may ask


ASKED = {"host": HOST, "authorization": f"Bearer {TOKEN}"}
COOKIE = {"host": HOST, "cookie": f"pellucid-{PORT}={TOKEN}"}
OWN = f"http://{HOST}"

HOSTS = [
    "", "evil.example", f"evil.example:{PORT}", "127.0.0.1:80", "127.0.0.1", "localhost",
    f"{HOST}.evil.example", f"x@{HOST}", f"{HOST}@evil.example", f"{HOST}/", f"{HOST}#x", f"{HOST}?x",
    f"{HOST},evil.example", f" {HOST}", f"{HOST} ", f"{HOST}\t", f"{HOST}\x00", f"0.0.0.0:{PORT}",
    f"LOCALHOST:{PORT}", f"localhost.:{PORT}", f"evil.localhost:{PORT}", f"[::1]:{PORT}", f"127.1:{PORT}",
    f"2130706433:{PORT}", f"0x7f.0.0.1:{PORT}", f"127.0.0.1:0{PORT}", f"127.0.0.1:{PORT}0",
    f"http://{HOST}", "\xff\xfe",
]  # fmt: skip
ORIGINS = [
    "", "null", "http://evil.example", f"{OWN}.evil.example", f"https://{HOST}", f"ws://{HOST}", "file://",
    "http://127.0.0.1", "http://127.0.0.1:9999", f"http://localhost:{PORT}", f"{OWN}/", f"{OWN} ", f"HTTP://{HOST}",
    f"http://x@{HOST}", f"{OWN}, http://evil.example", f"http://evil.example, {OWN}", "chrome-extension://x",
    f"{OWN}\x00", "\xff",
]  # fmt: skip
SITES = ["", "cross-site", "same-site", "SAME-ORIGIN", "same-origin, cross-site", "none,cross-site", "\xff"]
TOKENS = [
    "", "Bearer", "Bearer ", "Bearer x", f"Bearer {TOKEN[:-1]}", f"Bearer {TOKEN}x", f"Bearer  {TOKEN}",
    f"Bearer {TOKEN.upper()}", f"Bearer {TOKEN}\x00", f"bearer {TOKEN}", f"Basic {TOKEN}", f"Token {TOKEN}",
    f"Bearer {TOKEN}, Bearer x", "Bearer \xff\xfe", "Bearer *", "Bearer " + "x" * 50_000,
]  # fmt: skip
COOKIES = [
    "", f"pellucid-1={TOKEN}", f"pellucid={TOKEN}", f"Pellucid-{PORT}={TOKEN}", f"token={TOKEN}",
    f"pellucid-{PORT}=", f"pellucid-{PORT}={TOKEN[:-1]}", f"pellucid-{PORT}={TOKEN}x", f"pellucid-{PORT}",
    f"a[b]=c; pellucid-{PORT}=; =;;", "x=y; " * 2000, "\xff=\xfe",
]  # fmt: skip
FIELD = f"token={TOKEN}".encode()
NOBODY = {"host": HOST}
POST = {"method": "POST", "path": "/api/inputs"}

REFUSED: dict[str, tuple[dict, int]] = {
    **{f"host {each!r}": ({"headers": {**ASKED, "host": each}}, 421) for each in HOSTS},
    "no host": ({"headers": {"authorization": ASKED["authorization"]}}, 421),
    **{f"origin {each!r}": ({"headers": {**ASKED, "origin": each}}, 403) for each in ORIGINS},
    **{f"site {each!r}": ({"headers": {**ASKED, "sec-fetch-site": each}}, 403) for each in SITES},
    "no token": ({"headers": {"host": HOST}}, 403),
    **{f"token {each[:40]!r}": ({"headers": {"host": HOST, "authorization": each}}, 403) for each in TOKENS},
    **{f"cookie {each[:40]!r}": ({"headers": {"host": HOST, "cookie": each}}, 403) for each in COOKIES},
    "a token in another header": ({"headers": {**NOBODY, "proxy-authorization": f"Bearer {TOKEN}"}}, 403),
    "a cookie alone that posts": ({"headers": COOKIE, **POST}, 403),
    "a cookie that posts from elsewhere": ({"headers": {**COOKIE, "origin": "http://evil"}, **POST}, 403),
    "a form of another page": (
        {"headers": {**COOKIE, "origin": "null", "content-type": "text/plain"}, **POST}, 403,
    ),
    "the address's token for an answer": ({"headers": NOBODY, "query": FIELD}, 403),
    "the address's token that posts": ({"headers": NOBODY, "query": FIELD, **POST}, 403),
    "the address's token that posts to the page": (
        {"headers": NOBODY, "query": FIELD, "method": "POST", "path": "/"}, 403,
    ),
    "two tokens in the address": ({"headers": NOBODY, "path": "/", "query": FIELD + b"&token=x"}, 403),
    "many fields in the address": ({"headers": NOBODY, "path": "/", "query": FIELD + b"&a=b" * 400}, 403),
    "an address of no text": ({"headers": NOBODY, "path": "/", "query": b"token=\xff"}, 403),
    "a token behind a slash": ({"headers": NOBODY, "path": "//", "query": FIELD}, 403),
    "a long path": ({"headers": ASKED, "path": "/" + "a" * 60_000}, 414),
    "a long query": ({"headers": ASKED, "query": b"a" * 60_000}, 414),
    **{
        f"method {each}": ({"headers": ASKED, "method": each}, 405)
        for each in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "PROPFIND", "get", "X" * 5000)
    },
}  # fmt: skip


def status_of(guard: Guard, headers: dict[str, str], method: str = "GET", path: str = "/api/overview",
              query: bytes = b"") -> int:  # fmt: skip
    scope = {"type": "http", "method": method, "path": path, "query_string": query,
             "headers": [(k.encode(), v.encode("latin-1")) for k, v in headers.items()]}  # fmt: skip
    refused = guard.refusal(scope)
    return 200 if refused is None else refused[0]


@pytest.mark.parametrize("case", REFUSED)
def test_refused(guard, case):
    request, status = REFUSED[case]
    assert status_of(guard, **request) == status


@pytest.mark.parametrize(
    "headers",
    [
        ASKED,
        COOKIE,
        {**COOKIE, "host": f"localhost:{PORT}"},
        {**ASKED, "origin": f"http://{HOST}", "sec-fetch-site": "same-origin"},
    ],
)
def test_allowed(guard, headers):
    assert status_of(guard, headers) == 200


def test_two_hosts_are_none(guard):
    headers = [(b"host", HOST.encode()), (b"host", b"evil"), (b"authorization", TOKEN.encode())]
    scope = {"type": "http", "method": "GET", "path": "/", "query_string": b"", "headers": headers}
    assert guard.refusal(scope)[0] == 421


def test_the_token_in_the_address_opens_the_page(guard):
    assert status_of(guard, {"host": HOST}, path="/", query=FIELD) == 200


def test_a_cookie_posts_from_its_own_page_alone(guard):
    assert status_of(guard, {**COOKIE, "origin": OWN}, method="POST") == 200


def test_the_page_and_its_policy(guard):
    client = TestClient(guard, base_url=f"http://{HOST}")
    page = client.get("/", params={"token": TOKEN})
    assert page.status_code == 200
    cookie = page.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert client.get("/api/overview").status_code == 200  # by the cookie
    fresh = TestClient(guard, base_url=f"http://{HOST}")
    assert fresh.get("/").status_code == 403
    for response in (page, client.get("/api/runs"), client.get("/nothing"), fresh.get("/")):
        policy = response.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
        assert "unsafe" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["cache-control"] == "no-store"
        assert "access-control-allow-origin" not in response.headers
    assert TOKEN not in page.text
    assert "set-cookie" not in fresh.get("/").headers


def test_a_writer_that_is_killed_in_the_middle_of_a_line(client, shelf_root):
    """Whoever reads meanwhile gets whole lines, all of them in order, and never a fault."""
    run = shelf_root / "going"
    (run / "metrics.jsonl").write_text("")

    def write() -> None:
        (run / "run.lock").write_text(f"pid {os.getpid()} on {os.uname().nodename}")
        log = os.open(run / "metrics.jsonl", os.O_WRONLY | os.O_APPEND)
        for step in itertools.count(1):
            line = json.dumps({"step": step, "epoch": step / 10, "split": "train", "loss": 1 / step}) + "\n"
            for at in range(0, len(line), 7):
                os.write(log, line[at : at + 7].encode())
                time.sleep(1e-4)

    writer = multiprocessing.get_context("fork").Process(target=write)
    writer.start()
    states, seen = set(), 0
    name = next(row["id"] for row in read(client, "/api/runs")["runs"] if row["name"] == "going")

    def look() -> int:
        found = read(client, f"/api/runs/{name}")
        states.add(found["state"])
        steps = found["train"].get("step", np.zeros(0)).tolist()
        assert steps == list(range(1, len(steps) + 1))
        np.testing.assert_allclose(found["train"].get("loss", np.zeros(0)), 1 / np.array(steps), rtol=1e-6)
        return len(steps)

    try:
        for _ in range(3000):
            assert look() >= seen
            seen = look()
            if seen >= 40:
                break
    finally:
        writer.kill()
        writer.join()
    assert seen >= 40
    log = run / "metrics.jsonl"
    if log.read_bytes().endswith(b"\n"):  # killed between two lines: half of the next one, then
        log.write_bytes(log.read_bytes() + b'{"step": 99999, "los')
    assert look() == log.read_bytes().count(b"\n") >= seen
    assert "running" in states
    assert read(client, f"/api/runs/{name}")["state"] == "stopped"


# On a real socket


Where = tuple[str, int, str]
"""Host, port and token."""


def asked(
    answers: Answers, requests: Callable[[Where], list[bytes]], patience: float, at_once: int = 200
) -> list[tuple[bytes, bytes]]:
    """Each request with what comes back until the other side closes, or nothing more comes; a good one last.

    The server runs in the same loop as who asks: nothing is waited for but what does not come.
    """
    import uvicorn

    async def one(where: Where, raw: bytes, places: asyncio.Semaphore) -> tuple[bytes, bytes]:
        received = b""
        async with places:
            reader, writer = await asyncio.open_connection(*where[:2])
            try:
                writer.write(raw)
                while piece := await asyncio.wait_for(reader.read(65536), patience):
                    received += piece
            except (TimeoutError, ConnectionError):
                pass
            finally:
                writer.close()
        return raw, received

    async def each() -> list[tuple[bytes, bytes]]:
        opened = server.listening(0)
        guard = Guard(application(answers), opened.getsockname()[1])
        config = uvicorn.Config(guard, log_level="critical", lifespan="off", ws="none", timeout_keep_alive=2)
        running = uvicorn.Server(config)
        serving = asyncio.ensure_future(running.serve(sockets=[opened]))
        while not running.started:
            await asyncio.sleep(0.01)
        where = (*opened.getsockname(), guard.token)
        places = asyncio.Semaphore(at_once)
        found = await asyncio.gather(*(one(where, raw, places) for raw in requests(where)))
        auth = f"Host: {where[0]}:{where[1]}\r\nAuthorization: Bearer {where[2]}\r\nConnection: close\r\n\r\n"
        healthy = await one(where, b"GET /api/overview HTTP/1.1\r\n" + auth.encode(), places)
        running.should_exit = running.force_exit = True
        await serving
        return [*found, healthy]

    return asyncio.run(each())


def directed(where: Where) -> list[bytes]:
    """Requests that each try something, as bytes; those with the token are let in by the guard."""
    host = f"Host: 127.0.0.1:{where[1]}\r\n".encode()
    auth = host + f"Authorization: Bearer {where[2]}\r\n".encode()
    kind, last = b"Content-Type: application/octet-stream\r\n", b"Connection: close\r\n\r\n"
    paths = [
        "/../../../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "//etc/passwd", "/%252e%252e/etc/passwd", "/..%c0%af..%c0%afetc/passwd", "/..%5c..%5cetc/passwd",
        "/etc/passwd%00.css",
        "/glass.js/../../cli.py", "/glass.js%00", "/glass.css/", "/static/..\\..\\cli.py", "/index.html",
        "/static/glass.js", "/.git/config", "/~root/", "/file:///etc/passwd", "/api/runs/../../secret",
        "/api/runs/..%2f..%2fsecret", "/api/runs/%2e%2e", "/api/runs/link", "/api/runs/%00", "/api/runs/\x00",
        "/api/runs/" + "%2e" * 600, "/api/looks/-1/0", "/api/looks/0/0/layers/-1", "/api/looks/1e9/0",
        "/api/looks/%30/0x0", "/api/looks/" + "9" * 1500 + "/0", "/api/looks/0/" + "9" * 400,
        "/api/models/99999999999999999999/audit", "/api/models/;id/audit", "/api/inputs", "/api/", "/a" * 900,
        "/" + "a" * 60_000, "/?token=" + "x" * 3000, "/api/runs/{{7*7}}", "/api/runs/$(id)", "/api/runs/'--",
        "http://evil.example/", "*", "?", "",
    ]  # fmt: skip
    smuggled = b"0\r\n\r\nGET /api/runs HTTP/1.1\r\n\r\n"
    post = b"POST /api/inputs HTTP/1.1\r\n" + auth + kind
    return [
        *(b"GET " + path.encode("latin-1") + b" HTTP/1.1\r\n" + auth + last for path in paths),
        b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n",
        b"GET / HTTP/1.0\r\n\r\n",
        b"GET / HTTP/9.9\r\n" + auth + b"\r\n",
        b"GET / HTTP/1.1\r\n" + auth + host + b"\r\n",
        b"GET / HTTP/1.1\r\n" + auth + b" folded: x\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + auth + b"No colon\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + auth + b"X\x00: y\r\n\r\n",
        b"GET / HTTP/1.1\n" + auth.replace(b"\r", b"") + b"\n",
        b"GET / HTTP/1.1\r\n" + auth + b"X: " + b"y" * 200_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + auth + b"X: y\r\n" * 2000 + b"\r\n",
        b"GET / HTTP/1.1\r\n" + auth + b"Range: bytes=0-99999999999\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + auth + b"Expect: 100-continue\r\nContent-Length: 9\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + auth + b"Accept-Encoding: " + b"gzip," * 9000 + b"\r\n\r\n",
        b"POST /api/inputs HTTP/1.1\r\n" + host + kind + b"Content-Length: 1\r\n\r\nx",
        post + b"Content-Length: -1\r\n\r\n",
        post + b"Content-Length: +4\r\n\r\nabcd",
        post + b"Content-Length: 0x4\r\n\r\nabcd",
        post + b"Content-Length: 4\r\nContent-Length: 40\r\n\r\nabcd",
        post + b"Content-Length: 99999999999999999999\r\n\r\n",
        post + b"Content-Length: 99999999999\r\n\r\nabcd",
        post + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n" + smuggled,
        post + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n" + smuggled,
        post + b"Transfer-Encoding: \x0bchunked\r\n\r\n" + smuggled,
        post + b"Transfer-Encoding: chunked, identity\r\n\r\n" + smuggled,
        post + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\nx",
        post + b"Transfer-Encoding: chunked\r\n\r\n-1\r\nx",
        post + b"Transfer-Encoding: chunked\r\n\r\n4;" + b"x" * 20_000 + b"\r\nabcd\r\n0\r\n\r\n",
        post + b"Transfer-Encoding: chunked\r\n\r\n0\r\nHost: evil.example\r\n\r\n",
        post + b"Content-Encoding: gzip\r\nContent-Length: 4\r\n\r\n\x1f\x8b\x08\x00",
        post.replace(b"octet-stream", b"json") + b"Content-Length: 20000\r\n\r\n" + b"[" * 20_000,
        post + b"Content-Length: 27\r\n\r\n<svg onload=alert(1)></svg>",
        b"GET / HTTP/1.1\r\n" + auth + b"Upgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: eA==\r\nSec-WebSocket-Version: 13\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + auth + b"Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\n"
        b"HTTP2-Settings: AA\r\n\r\n",
        b"CONNECT evil.example:443 HTTP/1.1\r\n" + auth + b"\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\r\n" * 5000,
        b"\x00" * 70_000,
        b"GET",
        b"",
    ]  # fmt: skip


def mutants(where: Where, count: int) -> list[bytes]:
    """Requests with some bytes changed. Those that would change something have no token."""
    host = f"Host: 127.0.0.1:{where[1]}\r\n".encode()
    auth = host + f"Authorization: Bearer {where[2]}\r\n".encode()
    last = b"Connection: close\r\n\r\n"
    kind = b"Content-Type: application/octet-stream\r\nContent-Length: 8\r\nOrigin: http://"
    seeds = [
        b"GET /api/openapi.json HTTP/1.1\r\n" + auth + last,
        b"GET /api/runs/0123456789ab HTTP/1.1\r\n" + auth + last,
        b"GET /../secret HTTP/1.1\r\n" + auth + last,
        b"HEAD /?token=" + where[2].encode() + b" HTTP/1.1\r\n" + host + last,
        b"POST /api/inputs HTTP/1.1\r\n" + host + kind + host[6:] + b"Cookie: pellucid-" + host[-7:-2]
        + b"=x\r\n" + last + png(1, 1)[:8],
    ]  # fmt: skip
    generator = random.Random(0)
    made = []
    for i in range(count):
        changed = bytearray(seeds[i % len(seeds)])
        for _ in range(generator.choice([1, 1, 2, 3, 6])):
            at = generator.randrange(len(changed) or 1)
            change = generator.choice(["set", "cut", "add", "again"])
            if change == "set":
                changed[at : at + 1] = generator.randbytes(1)
            elif change == "cut":
                del changed[at : at + generator.randint(1, 9)]
            elif change == "add":
                changed[at:at] = generator.randbytes(generator.randint(1, 9))
            else:
                changed[at:at] = changed[at : at + generator.randint(1, 99)]
        made.append(bytes(changed))
    return made


def stays_up(
    answers: Answers, requests: Callable[[Where], list[bytes]], patience: float
) -> list[tuple[bytes, bytes]]:
    """Ask all of it; no fault, nothing from outside of the folder, nothing changed, and it still answers."""
    before = list(answers.inputs)
    *found, healthy = asked(answers, requests, patience)
    for request, received in found:
        status = received.split(b" ", 2)[1:2]
        assert status == [] or status[0] < b"500", (request[:80], received[:80])
        assert b"root:" not in received
        assert b"SECRET" not in received
    assert list(answers.inputs) == before
    assert healthy[1].startswith(b"HTTP/1.1 200")
    return found


def test_a_hundred_attacks_and_more(answers):
    assert len(REFUSED) >= 100
    found = stays_up(answers, directed, 0.5)
    assert len(found) >= 80
    assert sum(received.startswith(b"HTTP/1.1 4") for _, received in found) > 60
    # What is let in is the page itself, asked for in an odd way.
    let_in = [raw.split(b" ")[:2] for raw, received in found if received.startswith(b"HTTP/1.1 2")]
    assert all(method == b"GET" and target.split(b"?")[0] in (b"", b"/") for method, target in let_in), let_in


@pytest.mark.parametrize("count", [3000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_raw_requests_never_bring_it_down(answers, count):
    found = stays_up(answers, lambda where: mutants(where, count), 0.2)
    statuses = Counter(received[9:12] for _, received in found)
    assert statuses[b"200"] > count / 50
    assert sum(number for status, number in statuses.items() if status[:1] == b"4") > count / 2


def test_it_listens_on_this_machine_alone():
    opened = server.listening(0)
    assert opened.getsockname()[0] == "127.0.0.1"
    taken = opened.getsockname()[1]
    with pytest.raises(ConfigError, match=f"port {taken}"):
        server.listening(taken)
    with pytest.raises(ConfigError, match="70000"):
        server.listening(70000)
    opened.close()


# Files of answers


def test_a_bundle_holds_the_very_answers(answers, tmp_path):
    path = tmp_path / "t.pellucid"
    path.write_bytes(bundle(answers))
    kept = open_target(str(path))
    assert isinstance(kept, Kept)
    client = TestClient(Guard(application(kept), PORT, TOKEN), base_url=f"http://{HOST}",
                        headers={"authorization": TOKEN})  # fmt: skip
    for question in ("looks/0/1", "looks/1/2/layers/3", "models/1/audit", "runs"):
        live = TestClient(Guard(application(answers), PORT, TOKEN), base_url=f"http://{HOST}",
                          headers={"authorization": TOKEN})  # fmt: skip
        assert client.get(f"/api/{question}").content == live.get(f"/api/{question}").content
    assert client.get("/api/looks/0/77").status_code == 404
    assert drop(client, png(8, 8)).status_code == 404


def test_a_small_budget_thins_layers_and_inputs(answers):
    whole, small = bundle(answers), bundle(answers, budget=300_000)
    assert len(small) < len(whole)
    kept = unpack(small)["answers"]
    assert [shown["id"] for shown in kept["overview"]["inputs"]] == [0]
    layers = [name for name in kept if name.startswith("looks/0/0/layers/")]
    assert 1 <= len(layers) <= 4
    assert kept["overview"]["takes_inputs"] is False


def test_other_files_are_refused(tmp_path):
    wrong = tmp_path / "x.pellucid"
    wrong.write_bytes(b"PK\x03\x04")
    with pytest.raises(DataError, match="no bundle"):
        open_target(str(wrong))
    wrong.write_bytes(pack({"format": "other", "answers": {}}))
    with pytest.raises(DataError, match="no answers"):
        open_target(str(wrong))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ConfigError, match="no run and no model"):
        open_target(str(empty))
