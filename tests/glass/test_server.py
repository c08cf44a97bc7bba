"""The page's server: what it answers, and what it refuses, asked directly and over raw sockets."""

from __future__ import annotations

import asyncio
import io
import json
import os
import random
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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
REFUSED = {
    "another host": ({**ASKED, "host": "evil.example"}, 421),
    "a name that was pointed here": ({**ASKED, "host": f"evil.example:{PORT}"}, 421),
    "another port": ({**ASKED, "host": "127.0.0.1:80"}, 421),
    "a host that begins so": ({**ASKED, "host": f"127.0.0.1:{PORT}.evil.example"}, 421),
    "a host with a user": ({**ASKED, "host": f"x@127.0.0.1:{PORT}"}, 421),
    "all interfaces": ({**ASKED, "host": f"0.0.0.0:{PORT}"}, 421),
    "the host in capitals": ({**ASKED, "host": f"LOCALHOST:{PORT}"}, 421),
    "no host": ({**ASKED, "host": ""}, 421),
    "another origin": ({**ASKED, "origin": "http://evil.example"}, 403),
    "no origin to speak of": ({**ASKED, "origin": "null"}, 403),
    "an origin that begins so": ({**ASKED, "origin": f"http://{HOST}.evil.example"}, 403),
    "another scheme": ({**ASKED, "origin": f"https://{HOST}"}, 403),
    "another local server": ({**ASKED, "origin": "http://127.0.0.1:9999"}, 403),
    "a page elsewhere": ({**ASKED, "sec-fetch-site": "cross-site"}, 403),
    "a page on another port": ({**ASKED, "sec-fetch-site": "same-site"}, 403),
    "no token": ({"host": HOST}, 403),
    "another token": ({"host": HOST, "authorization": "Bearer x"}, 403),
    "an empty token": ({"host": HOST, "authorization": "Bearer "}, 403),
    "half a token": ({"host": HOST, "authorization": f"Bearer {TOKEN[:-1]}"}, 403),
    "a token that is no text": ({"host": HOST, "authorization": "Bearer \xff\xfe"}, 403),
    "another server's cookie": ({"host": HOST, "cookie": f"pellucid-1={TOKEN}"}, 403),
    "a broken cookie": ({"host": HOST, "cookie": f"a[b]=c; pellucid-{PORT}=; =;;"}, 403),
}


def status_of(guard: Guard, headers: dict[str, str], method: str = "GET", path: str = "/api/overview",
              query: bytes = b"") -> int:  # fmt: skip
    scope = {"type": "http", "method": method, "path": path, "query_string": query,
             "headers": [(k.encode(), v.encode("latin-1")) for k, v in headers.items()]}  # fmt: skip
    refused = guard.refusal(scope)
    return 200 if refused is None else refused[0]


@pytest.mark.parametrize("case", REFUSED)
def test_refused(guard, case):
    headers, status = REFUSED[case]
    assert status_of(guard, headers) == status


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


def test_the_token_in_the_address_opens_the_page_and_nothing_else(guard):
    query = f"token={TOKEN}".encode()
    assert status_of(guard, {"host": HOST}, path="/", query=query) == 200
    assert status_of(guard, {"host": HOST}, path="/api/overview", query=query) == 403
    assert status_of(guard, {"host": HOST}, method="POST", path="/", query=query) == 403
    assert status_of(guard, {"host": HOST}, path="/", query=query + b"&token=x") == 403
    assert status_of(guard, {"host": HOST}, path="/", query=b"token=" + b"&a=b" * 400) == 403


def test_a_cookie_alone_changes_nothing(guard):
    assert status_of(guard, COOKIE, method="POST") == 403
    assert status_of(guard, {**COOKIE, "origin": f"http://{HOST}"}, method="POST") == 200
    for method in ("PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT", "PATCH"):
        assert status_of(guard, ASKED, method=method) == 405
    assert status_of(guard, ASKED, path="/" + "a" * 60_000) == 414


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


# On a real socket


@pytest.fixture
def running(answers) -> Iterator[tuple[str, int, str]]:
    import uvicorn

    opened = server.listening(0)
    port = opened.getsockname()[1]
    guard = Guard(application(answers), port)
    config = uvicorn.Config(guard, log_level="error", lifespan="off", ws="none", timeout_keep_alive=2)
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [opened]}, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    yield "127.0.0.1", port, guard.token
    running.should_exit = True
    thread.join(10)


def ask(where, raw: bytes, seconds: float = 0.5) -> bytes:
    """What comes back until the other side closes, or nothing more comes."""
    received = b""
    with socket.create_connection(where[:2], timeout=seconds) as connection:
        try:
            connection.sendall(raw)
            while piece := connection.recv(65536):
                received += piece
        except (TimeoutError, ConnectionError):
            pass
    return received


def test_raw_requests_never_bring_it_down(running):
    host = f"Host: 127.0.0.1:{running[1]}\r\n".encode()
    auth = host + f"Authorization: Bearer {running[2]}\r\n".encode()
    attacks = [
        b"GET /../../../../etc/passwd HTTP/1.1\r\n" + auth + b"\r\n",
        b"GET /%2e%2e/%2e%2e/etc/passwd HTTP/1.1\r\n" + auth + b"\r\n",
        b"GET //etc/passwd HTTP/1.1\r\n" + auth + b"\r\n",
        b"GET /glass.js/../../cli.py HTTP/1.1\r\n" + auth + b"\r\n",
        b"GET /static/..\\..\\cli.py HTTP/1.1\r\n" + auth + b"\r\n",
        b"GET http://evil.example/ HTTP/1.1\r\n" + auth + b"\r\n",
        b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n",
        b"GET / HTTP/1.0\r\n\r\n",
        b"GET /" + b"a" * 60_000 + b" HTTP/1.1\r\n" + auth + b"\r\n",
        b"GET / HTTP/1.1\r\n" + auth + b"X: " + b"y" * 200_000 + b"\r\n\r\n",
        b"POST /api/inputs HTTP/1.1\r\n" + auth + b"Content-Length: -1\r\n\r\n",
        b"POST /api/inputs HTTP/1.1\r\n" + auth + b"Content-Length: 99999999999999999999\r\n\r\n",
        b"POST /api/inputs HTTP/1.1\r\n" + auth
        + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /api/runs HTTP/1.1\r\n\r\n",
        b"POST /api/inputs HTTP/1.1\r\n" + auth + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\nx",
        b"GET /api/runs/\x00 HTTP/1.1\r\n" + auth + b"\r\n",
        b"GET /api/looks/" + b"9" * 1500 + b"/0 HTTP/1.1\r\n" + auth + b"\r\n",
        b"GET / HTTP/1.1\r\n" + auth + b"Upgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: eA==\r\nSec-WebSocket-Version: 13\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"",
    ]  # fmt: skip
    generator = random.Random(0)
    seed = b"GET /api/overview HTTP/1.1\r\n" + auth + b"\r\n"
    for _ in range(300):
        changed = bytearray(seed)
        for _ in range(generator.randint(1, 6)):
            at = generator.randrange(len(changed))
            change = generator.choice(["set", "cut", "add"])
            if change == "set":
                changed[at] = generator.randrange(256)
            elif change == "cut":
                del changed[at : at + generator.randint(1, 9)]
            else:
                changed[at:at] = generator.randbytes(generator.randint(1, 9))
            if not changed:
                break
        attacks.append(bytes(changed))
    with ThreadPoolExecutor(16) as pool:
        answered = list(pool.map(lambda attack: ask(running, attack), attacks))
    assert sum(received.startswith(b"HTTP/1.1 4") for received in answered) > 100
    for attack, received in zip(attacks, answered, strict=True):
        status = received.split(b" ", 2)[1:2]
        assert status == [] or status[0] < b"500", (attack[:80], received[:80])
        assert b"root:" not in received
    healthy = ask(running, b"GET /api/overview HTTP/1.1\r\n" + auth + b"Connection: close\r\n\r\n", 5)
    assert healthy.startswith(b"HTTP/1.1 200")


def test_it_listens_on_this_machine_alone(running):
    assert running[0] == "127.0.0.1"
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
