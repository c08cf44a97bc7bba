"""The page's server: answers of :mod:`pellucid.glass.answers` over HTTP, on this machine alone."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pellucid import __version__
from pellucid.data import ImageRejected, read_image, show_name
from pellucid.errors import ConfigError, PellucidError
from pellucid.glass.answers import Answers, Input, NotThere
from pellucid.glass.guard import Guard
from pellucid.glass.opening import Kept
from pellucid.glass.packed import MEDIA_TYPE, pack
from pellucid.glass.worded import MOST_BYTES

MAX_UPLOAD = 20 * 2**20
"""Bytes of a picture that is dropped in."""

MAX_TYPED = 4 * MOST_BYTES
"""The same of a text that is typed: JSON may write a byte of it as six."""

MAX_ASKED = 2**10
"""The same of a request that says all in its address."""

MAX_UPLOAD_PIXELS = 25_000_000
UPLOAD_SECONDS = 15.0
DECODE_SECONDS = 10.0
DECODERS = 2
"""Pictures decoded at the same time; what takes too long keeps its place until it is done."""

PORT = 8517
PORTS_TRIED = 20

STATIC = Path(__file__).with_name("static")
FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/glass.js": ("glass.js", "text/javascript; charset=utf-8"),
    "/glass.css": ("glass.css", "text/css; charset=utf-8"),
}
"""All the files that there are, by address. No address ever becomes part of a path."""


def application(answers: Answers | Kept) -> Starlette:
    """What stands behind the guard."""
    decoding = asyncio.Semaphore(DECODERS)

    def given(ask: Callable[[Request], Any]) -> Callable[[Request], Any]:
        async def endpoint(request: Request) -> Response:
            try:
                return Response(await run_in_threadpool(lambda: pack(ask(request))), media_type=MEDIA_TYPE)
            except NotThere as error:
                raise HTTPException(404, str(error)) from error
            except PellucidError as error:
                raise HTTPException(422, str(error)) from error

        return endpoint

    def number(request: Request, name: str) -> int:
        return int(request.path_params[name])

    async def drop(request: Request) -> Response:
        if answers.takes is None:
            raise HTTPException(404, "no model is open that could look at it")
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if answers.takes == "text":
            return await typed(request, kind)
        if kind != "application/octet-stream":
            raise HTTPException(415, "a picture is sent as application/octet-stream")
        data = await _body(request, MAX_UPLOAD)
        if decoding.locked():
            raise HTTPException(429, "other pictures are still being decoded - try again in a moment")
        await decoding.acquire()

        def done(decoded: asyncio.Future[Any]) -> None:
            decoding.release()
            if not decoded.cancelled():
                decoded.exception()  # seen: it may come when nobody waits any more

        task = asyncio.ensure_future(run_in_threadpool(read_image, data, max_pixels=MAX_UPLOAD_PIXELS))
        task.add_done_callback(done)
        try:
            picture = await asyncio.wait_for(asyncio.shield(task), DECODE_SECONDS)
        except TimeoutError:
            raise HTTPException(422, f"rejected: decoding took more than {DECODE_SECONDS:g} s") from None
        except ImageRejected as error:
            raise HTTPException(422, f"rejected: {error.reason}") from None
        name = show_name(request.query_params.get("name", ""))[:100] or "picture"
        return JSONResponse({"input": answers.add(Input(name, picture=picture))}, status_code=201)

    async def typed(request: Request, kind: str) -> Response:
        if kind != "application/json":
            raise HTTPException(415, "this model reads text, which is sent as application/json")
        try:
            found = json.loads(await _body(request, MAX_TYPED))
        except (ValueError, RecursionError):
            raise HTTPException(422, "rejected: this is no JSON") from None
        if not isinstance(found, dict) or found.keys() != {"text"} or not isinstance(found["text"], str):
            raise HTTPException(422, 'rejected: expected {"text": "..."} and nothing else')
        try:
            number = await run_in_threadpool(answers.type, found["text"])
        except PellucidError as error:
            raise HTTPException(422, f"rejected: {error}") from None
        return JSONResponse({"input": number}, status_code=201)

    async def opened(request: Request) -> Response:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise HTTPException(415, "a request to open a run is sent as application/json")
        await _body(request, MAX_ASKED)
        try:
            return JSONResponse({"model": await run_in_threadpool(answers.open, request.path_params["run"])})
        except NotThere as error:
            raise HTTPException(404, str(error)) from error
        except PellucidError as error:
            raise HTTPException(422, str(error)) from error

    def static(name: str, media_type: str) -> Callable[[Request], Any]:
        content = (STATIC / name).read_bytes()

        async def endpoint(request: Request) -> Response:
            return Response(content, headers={"content-type": media_type})

        return endpoint

    look = "/api/looks/{model:int}/{input:int}"
    asked: dict[str, Callable[[Request], Any]] = {
        "/api/overview": lambda r: answers.overview(),
        "/api/models/{model:int}/audit": lambda r: answers.audit(number(r, "model")),
        look: lambda r: answers.look(number(r, "model"), number(r, "input")),
        look + "/layers/{layer:int}": lambda r: answers.layer(
            number(r, "model"), number(r, "input"), number(r, "layer")
        ),
        "/api/runs": lambda r: answers.runs(),
        "/api/runs/{run}": lambda r: answers.curves(r.path_params["run"]),
    }
    routes = [Route(path, static(*file)) for path, file in FILES.items()]
    routes += [Route(path, given(ask)) for path, ask in asked.items()]
    routes.append(Route("/api/runs/{run}", opened, methods=["POST"]))
    routes.append(Route("/api/inputs", drop, methods=["POST"]))

    async def described(request: Request) -> Response:
        return JSONResponse(DESCRIPTION)

    routes.append(Route("/api/openapi.json", described))
    return Starlette(routes=routes, exception_handlers={HTTPException: _in_words, Exception: _fault})


async def _body(request: Request, most: int) -> bytes:
    """At most so many bytes in at most UPLOAD_SECONDS, whatever the request says of itself."""
    too_large = f"larger than {most // 2**20} MB" if most >= 2**20 else f"larger than {most // 2**10} kB"
    told = request.headers.get("content-length", "0")
    if not told.isdecimal():
        raise HTTPException(400, "content-length is no number")
    if len(told) > 12 or int(told) > most:
        raise HTTPException(413, too_large)
    pieces, size = [], 0
    try:
        async with asyncio.timeout(UPLOAD_SECONDS):
            async for piece in request.stream():
                size += len(piece)
                if size > most:
                    raise HTTPException(413, too_large)
                pieces.append(piece)
    except TimeoutError:
        raise HTTPException(408, f"not all there after {UPLOAD_SECONDS:g} s") from None
    except ClientDisconnect:
        raise HTTPException(400, "the sender went away") from None
    return b"".join(pieces)


async def _in_words(request: Request, error: Any) -> Response:
    return JSONResponse({"error": error.detail}, status_code=error.status_code, headers=error.headers)


async def _fault(request: Request, error: Exception) -> Response:
    """A fault of ours: its kind, and nothing of what it was about."""
    return JSONResponse({"error": f"this is a fault of pellucid ({type(error).__name__})"}, status_code=500)


def listening(port: int | None) -> socket.socket:
    """A socket on this machine's own address, at ``port`` or, where none is asked for, the first free one.

    Raises:
        ConfigError: the port is taken, or none is free.
    """
    tried = range(PORT, PORT + PORTS_TRIED) if port is None else [port]
    for each in tried:
        opened = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            opened.bind(("127.0.0.1", each))
            opened.listen(64)
        except (OSError, OverflowError):
            opened.close()
            continue
        return opened
    asked = f"port {port}" if port is not None else f"every port from {PORT} to {PORT + PORTS_TRIED - 1}"
    raise ConfigError(f"{asked} on 127.0.0.1 is taken or may not be used - give another --port")


def serve(
    answers: Answers | Kept,
    port: int | None = None,
    *,
    say: Callable[[str], None] = print,
    open_browser: bool = False,
) -> None:
    """Answer until interrupted.

    Args:
        answers: what to answer from.
        port: see :func:`listening`.
        say: gets the address.
        open_browser: open it too.

    Raises:
        ConfigError: the port is taken.
    """
    import uvicorn

    opened = listening(port)
    guard = Guard(application(answers), opened.getsockname()[1])
    say(f"looking inside: {guard.address}")
    say("for this machine only, and only with this address; Ctrl-C ends it")
    if open_browser:
        import webbrowser

        webbrowser.open(guard.address)
    config = uvicorn.Config(
        guard,
        log_level="error",
        access_log=False,  # it would hold the token
        lifespan="off",
        server_header=False,
        limit_concurrency=64,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=2,
        ws="none",
    )
    uvicorn.Server(config).run(sockets=[opened])


def _described() -> dict[str, Any]:
    """The server in OpenAPI's words."""

    def whole(name: str, meaning: str) -> dict[str, Any]:
        schema = {"type": "integer", "minimum": 0}
        return {"name": name, "in": "path", "required": True, "description": meaning, "schema": schema}

    refusals = {
        "403": {"description": "no token, or asked for by another page"},
        "404": {"description": "no such thing"},
        "414": {"description": "an address that is too long"},
        "421": {"description": "another host name"},
        "422": {"description": "cannot be looked at, and why"},
    }

    def get(summary: str, *parameters: dict[str, Any], media_type: str = MEDIA_TYPE) -> dict[str, Any]:
        answer = {"description": summary, "content": {media_type: {"schema": {}}}}
        return {
            "get": {
                "summary": summary,
                "parameters": list(parameters),
                "responses": {"200": answer, **refusals},
            }
        }

    model, one = whole("model", "number of a model"), whole("input", "number of an input")
    run = {"name": "run", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    name = {"name": "name", "in": "query", "schema": {"type": "string"}}
    text = {
        "type": "object",
        "properties": {"text": {"type": "string", "minLength": 1, "maxLength": MOST_BYTES}},
        "required": ["text"],
        "additionalProperties": False,
    }
    sent = {
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        "application/json": {"schema": text},
    }
    drop: dict[str, Any] = {
        "summary": "Drop in a picture, or type a text: what the first model reads",
        "parameters": [name],
        "requestBody": {"required": True, "content": sent},
        "responses": {
            "201": {
                "description": "its number",
                "content": {"application/json": {"schema": {"type": "object"}}},
            },
            "400": {"description": "the sender went away"},
            "408": {"description": "too slow"},
            "413": {"description": "too large"},
            "415": {"description": "not sent as bytes, or of a text not as JSON"},
            "429": {"description": "too many at once"},
            **refusals,
        },
    }
    opens = {
        "summary": "Open a run of the folder, to stand beside the others",
        "parameters": [run],
        "requestBody": {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}},
        "responses": {
            "200": {
                "description": "the number of its model",
                "content": {"application/json": {"schema": {"type": "object"}}},
            },
            **{code: told for code, told in drop["responses"].items() if code != "201"},
        },
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "pellucid view", "version": __version__},
        "security": [{"token": []}],
        "components": {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
        "paths": {
            "/api/overview": get("What is open"),
            "/api/models/{model}/audit": get("The audit of a model, and what its atoms stand for", model),
            "/api/looks/{model}/{input}": get("An input's way through a model", model, one),
            "/api/looks/{model}/{input}/layers/{layer}": get(
                "What one layer does with it", model, one, whole("layer", "from 1")
            ),
            "/api/runs": get("Runs in the folder"),
            "/api/runs/{run}": {**get("What a run has logged", run), "post": opens},
            "/api/inputs": {"post": drop},
            "/api/openapi.json": get("This description", media_type="application/json"),
        },
    }


DESCRIPTION: dict[str, Any] = json.loads(json.dumps(_described()))


__all__ = ["DESCRIPTION", "application", "listening", "serve"]
