"""How the processes of a run notice that one of them is gone, whatever started them and wherever they run.

A collective operation waits for every process, with NCCL for as long as its timeout allows, which must be
long because the first process evaluates alone. So each process holds a connection to the first. The kernel
closes it when a process dies, however it dies; one that fails on its own says why; one that is stopped or
hangs no longer beats; and the first passes on to all others what it has heard first.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import distributed as dist

from pellucid.errors import PellucidError, ProcessLost, Stopped
from pellucid.training.ranks import rank, world

POLL = 0.2
"""Seconds between looks at a child or a parent."""

BEAT = 1.0
"""Seconds between signs of life."""

ALIVE, QUIET = ".", "-"
"""Signs of life. Behind the second, none is to be expected for a while."""

QUIET_FOR = 600
"""Beats that may be missing then."""


class Lifeline:
    """Watches over a block of code that several processes run together.

    Where another process is lost, an error in the block becomes :class:`ProcessLost`; a process that does not
    leave the block within ``grace`` seconds, as it waits for the lost one, is ended. One on this machine that
    has not beaten for ``patience`` seconds is ended too, for it could not end by itself. What is counted are
    beats that this process was there to hear, so that one goes on that was itself stopped for a while.

    Args:
        remedy: what a user reads after the cause.
        patience: seconds.
        grace: seconds.
    """

    def __init__(self, remedy: Callable[[], str], patience: float = 6.0, grace: float = 5.0) -> None:
        self.remedy, self.patience, self.grace = remedy, patience, grace
        self.cause: str | None = None
        self._first_is_alive = True
        self._lost, self._left, self._lock = threading.Event(), threading.Event(), threading.Lock()
        self._peers: dict[int, socket.socket] = {}
        self._local: dict[int, int] = {}  # of peers on this machine, the kernel's number
        self._gone_well: set[int] = set()

    def __enter__(self) -> Lifeline:
        _active.add(self)
        # torchrun ends its processes when one fails, and our own launcher's go with the first: but a parent
        # that is killed ends nobody.
        if "TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("LOCAL_RANK", 0)) > 0:
            self._in_background(self._watch_parent, os.getppid())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ours = isinstance(error, PellucidError)
        if isinstance(error, Exception) and not ours and world() > 1:
            self._lost.wait(2.0)  # what a lost process breaks is noticed before the loss itself
        self._left.set()
        _active.discard(self)
        well = error is None or isinstance(error, Stopped)  # all processes stop together
        self._tell("" if well else self.cause or f"process {rank()} failed: {_in_a_line(error)}")
        for peer in self._peers.values():
            _close(peer)
        if isinstance(error, Exception) and not ours and self.cause is not None:
            if self._speaks:
                raise ProcessLost(self._message()) from error
            raise SystemExit(ProcessLost.exit_code)

    def connect(self, address: str) -> None:
        """Hold on to the first process, which is reached at ``address``. Every process calls it."""
        server, told = None, ["", "", ""]
        if rank() == 0:
            server = socket.create_server(("127.0.0.1" if _is_here(address) else "", 0), backlog=world())
            told = [str(server.getsockname()[1]), secrets.token_hex(16), _whereabouts()]
        dist.broadcast_object_list(told, 0)
        port, key, whereabouts = told
        self._in_background(self._beat)
        if server is not None:
            self._in_background(self._accept, server, key)
            return
        try:
            peer = socket.create_connection((address, int(port)), timeout=20)
            peer.sendall(f"{key} {rank()} {_whereabouts()}\n".encode())
        except OSError as error:
            print(
                f"process {rank()} cannot reach port {port} of {address} ({error.strerror or error}): should "
                f"a process die, the others only notice after the timeout of a collective operation",
                file=sys.stderr,
            )
            return
        self._hold(0, peer, whereabouts)

    def watch_children(self, children: Sequence[subprocess.Popen[Any]]) -> None:
        """Processes 1, 2, ... that this one has started."""
        self._in_background(self._watch_children, children)

    def lose(self, cause: str) -> None:
        """Another process is gone. Only the first cause counts."""
        with self._lock:
            if self.cause is not None or self._left.is_set():
                return
            self.cause = cause
        self._lost.set()
        self._tell(cause)
        if not self._left.wait(self.grace):
            if self._speaks:
                print(f"error: {self._message()}", file=sys.stderr, flush=True)
            os._exit(ProcessLost.exit_code)

    @property
    def _speaks(self) -> bool:
        """One process tells the user: the first, or after its loss the second."""
        return rank() == (0 if self._first_is_alive else 1)

    def _message(self) -> str:
        return f"{self.cause}: the others cannot go on without it\n{self.remedy()}"

    def _tell(self, text: str) -> None:
        for peer in list(self._peers.values()):
            try:
                peer.sendall(f"{text}\n".encode())
            except OSError:
                continue  # it is gone, and whoever watches it knows

    def _beat(self) -> None:
        while not self._left.wait(BEAT):
            self._tell(ALIVE)

    def _hold(self, number: int, peer: socket.socket, whereabouts: str) -> None:
        machine, _, process = whereabouts.rpartition(":")
        if machine and machine == _whereabouts().rpartition(":")[0]:
            self._local[number] = int(process)
        peer.settimeout(BEAT)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # A machine that loses its power closes nothing: ask after 10 s of silence, and again.
        for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, name):
                peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._peers[number] = peer
        _open.add(peer)
        self._in_background(self._listen, number, peer)

    def _accept(self, server: socket.socket, key: str) -> None:
        _open.add(server)
        server.settimeout(1.0)
        while len(self._peers) < world() - 1 and not self._left.is_set():
            try:
                peer, _ = server.accept()
                peer.settimeout(5.0)
                said, number, whereabouts = _line(peer).split(" ", 2)
            except (OSError, ValueError):
                continue
            if secrets.compare_digest(said.encode(), key.encode()):
                self._hold(int(number), peer, whereabouts)
            else:
                peer.close()
        _close(server)

    def _listen(self, number: int, peer: socket.socket) -> None:
        rest, missing, most = b"", 0, self.patience / BEAT
        while True:
            try:
                more = peer.recv(4096)
            except TimeoutError:
                missing += 1
                if missing >= most and not self._left.is_set():
                    self._end_hung(number, missing)
                    return
                continue
            except OSError:
                more = b""
            if not more:
                time.sleep(2 * POLL)  # where it is a child, how it ended is known by then
                self._first_is_alive = number != 0
                self.lose(f"process {number} of {world()} is gone")
                return
            missing = 0
            *lines, rest = (rest + more).split(b"\n")
            for said in [line.decode(errors="replace") for line in lines]:
                if said in (ALIVE, QUIET):
                    most = QUIET_FOR if said == QUIET else self.patience / BEAT
                elif said:
                    self.lose(said)
                    return
                else:
                    self._gone_well.add(number)
                    return

    def _end_hung(self, number: int, missing: int) -> None:
        """It may be stopped, and would keep its memory. Its connection is open, so its number is its own."""
        self._first_is_alive = number != 0
        cause = f"process {number} of {world()} has given no sign of life for {missing * BEAT:.0f} s"
        if number in self._local:
            cause += " and was ended"
            threading.Timer(POLL, _kill, (self._local[number],)).start()  # once the cause is known
        self.lose(cause)

    def _watch_children(self, children: Sequence[subprocess.Popen[Any]]) -> None:
        while not self._left.wait(POLL):
            for number, child in enumerate(children, start=1):
                if child.poll():
                    time.sleep(POLL)  # for what it said in the end
                    if number not in self._gone_well:
                        self.lose(f"process {number} of {len(children) + 1} {_ending(child.returncode)}")
                        return

    def _watch_parent(self, parent: int) -> None:
        while not self._left.wait(POLL):
            if os.getppid() != parent:
                self._first_is_alive = "TORCHELASTIC_RUN_ID" in os.environ
                self.lose("torchrun is gone" if self._first_is_alive else "process 0, the first, is gone")
                return

    @staticmethod
    def _in_background(work: Callable[..., None], *arguments: Any) -> None:
        threading.Thread(target=work, args=arguments, daemon=True).start()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Around what keeps other threads of this process from running, such as a long call that holds Python's
    lock: the other processes are not to take it for hung."""
    for line in list(_active):
        line._tell(QUIET)
    try:
        yield
    finally:
        for line in list(_active):
            line._tell(ALIVE)


def _kill(process: int) -> None:
    with contextlib.suppress(OSError):
        os.kill(process, signal.SIGKILL)


def _whereabouts() -> str:
    """``machine:process``: where a process may be ended by its number. Without a machine where it may not."""
    try:
        booted = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{booted}/{os.readlink('/proc/self/ns/pid')}:{os.getpid()}"
    except OSError:
        return f":{os.getpid()}"


def _line(peer: socket.socket) -> str:
    """One line; OSError where the connection ends before it does."""
    said = b""
    while not said.endswith(b"\n"):
        more = peer.recv(4096)
        if not more:
            raise ConnectionResetError
        said += more
    return said.decode(errors="replace").rstrip("\n")


def _in_a_line(error: BaseException | None) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    return f"was killed by {name}" + (" (by hand, or for want of memory)" if name == "SIGKILL" else "")


def _is_here(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


_active: set[Lifeline] = set()
"""Those around what this process does now."""

_open: set[socket.socket] = set()
"""Connections that this process holds."""


def _close(connection: socket.socket) -> None:
    _open.discard(connection)
    connection.close()


def _let_go() -> None:
    """In a forked process, such as a data worker: it may outlive the run, and must not seem to be it."""
    for connection in _open:
        connection.close()
    _open.clear()


os.register_at_fork(after_in_child=_let_go)
