"""Who may speak to the page's server: this machine's user, from the page that it gave, and nobody else.

Any web page that is open in the same browser can send requests to a server on this machine. So every request
must name this server as its host (a foreign name that was pointed here does not), must not come from another
page, and must carry a token that is made when the server starts and printed where only its user reads.
"""

from __future__ import annotations

import hmac
import secrets
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs

HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
"""Of every response."""

METHODS = ("GET", "HEAD", "POST")
MAX_TARGET = 2000
"""Characters of a path with its query."""


class Guard:
    """An ASGI application in front of another one.

    Args:
        app: asked only what is allowed.
        port: on which the server listens; host names are compared with it.
        token: made afresh unless given.
    """

    def __init__(self, app: Any, port: int, token: str | None = None) -> None:
        self.app, self.port = app, port
        self.token = secrets.token_urlsafe(32) if token is None else token
        self.hosts = {f"{name}:{port}" for name in ("127.0.0.1", "localhost")}
        if port == 80:
            self.hosts |= {"127.0.0.1", "localhost"}
        self.cookie = f"pellucid-{port}"  # a cookie does not know ports: two servers must not share one

    @property
    def address(self) -> str:
        """Where the page is, with its token."""
        return f"http://127.0.0.1:{self.port}/?token={self.token}"

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        refused = self.refusal(scope)
        enters = scope["path"] == "/" and refused is None

        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                own = {key.encode(): value.encode() for key, value in HEADERS.items()}
                kept = [(k, v) for k, v in message.get("headers", []) if k.lower() not in own]
                cookie = f"{self.cookie}={self.token}; HttpOnly; SameSite=Strict; Path=/"
                kept += [(b"set-cookie", cookie.encode())] if enters else []
                message = {**message, "headers": [*kept, *own.items()]}
            await send(message)

        if refused is None:
            await self.app(scope, receive, guarded)
            return
        status, reason = refused
        body = (reason + "\n").encode()
        headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", b"%d" % len(body))]
        if status == 405:
            headers.append((b"allow", ", ".join(METHODS).encode()))
        await guarded({"type": "http.response.start", "status": status, "headers": headers})
        await guarded({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})

    def refusal(self, scope: Any) -> tuple[int, str] | None:
        """Status and reason where a request is not allowed, None where it is."""
        headers: dict[bytes, list[bytes]] = {}
        for key, value in scope["headers"]:
            headers.setdefault(key.lower(), []).append(value)
        host = headers.get(b"host", [])
        if len(host) != 1 or host[0].decode("latin-1") not in self.hosts:
            return 421, "this server is not called so - open the address that pellucid view printed"
        if scope["method"] not in METHODS:
            return 405, "only GET, HEAD and POST are answered"
        if len(scope["path"]) + len(scope["query_string"]) > MAX_TARGET:
            return 414, "the address is too long"
        origin = headers.get(b"origin", [])
        if any(one.decode("latin-1") != f"http://{host[0].decode('latin-1')}" for one in origin):
            return 403, "asked for by another page"
        if any(site not in (b"same-origin", b"none") for site in headers.get(b"sec-fetch-site", [])):
            return 403, "asked for by another page"
        spoken = self._in_header(headers)
        if not (spoken or self._in_cookie(headers) or self._in_address(scope)):
            return 403, "no token, or an old one - open the address that pellucid view printed"
        if scope["method"] == "POST" and not (origin or spoken):
            return 403, "a request that changes something must say which page it comes from"
        return None

    def _is(self, given: str) -> bool:
        return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), self.token.encode())

    def _in_header(self, headers: dict[bytes, list[bytes]]) -> bool:
        given = headers.get(b"authorization", [])
        return len(given) == 1 and self._is(given[0].decode("latin-1").removeprefix("Bearer "))

    def _in_cookie(self, headers: dict[bytes, list[bytes]]) -> bool:
        for line in headers.get(b"cookie", []):
            jar: SimpleCookie = SimpleCookie()
            try:
                jar.load(line.decode("latin-1"))
            except CookieError:
                continue
            if self.cookie in jar and self._is(jar[self.cookie].value):
                return True
        return False

    def _in_address(self, scope: Any) -> bool:
        """Only of the page itself, which takes it out of the address at once."""
        if scope["path"] != "/" or scope["method"] == "POST":
            return False
        try:
            given = parse_qs(scope["query_string"].decode("ascii"), max_num_fields=10).get("token", [])
        except ValueError:
            return False
        return len(given) == 1 and self._is(given[0])


__all__ = ["HEADERS", "Guard"]
