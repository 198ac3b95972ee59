"""A failure in one of several processes ends them all, with its message."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

#: Seconds to come to the first process after it has said where.
_CONNECTING = 60.0
#: Seconds that a process has to fail by itself, then to end when it was interrupted.
_GRACE, _LAST = 2.0, 15.0


class Watch:
    """What each of several processes knows of the end of the others.

    Every process is connected with the first. One that fails says why, and a connection that
    ends without a word is that of a process that was killed; the first tells all others. A
    process that does not fail by itself then is interrupted, and one that waits where it can't be
    is ended. `peers` are the connections: of the first process to all others by rank, of the
    others to the first.
    """

    def __init__(self, rank: int, peers: Mapping[int, socket.socket]) -> None:
        self.reason = ""
        self._rank = rank
        self._peers = peers
        self._lock = threading.Lock()
        self._known, self._left = threading.Event(), threading.Event()
        self._is_main = threading.current_thread() is threading.main_thread()
        self._threads = [
            threading.Thread(target=self._listen, args=one, name="stofm-watch", daemon=True)
            for one in peers.items()
        ]
        for thread in self._threads:
            thread.start()

    def failed_elsewhere(self, error: BaseException) -> bool:
        """Whether an error is but what another process's end does to this one."""
        if isinstance(error, RuntimeError):
            # A broken connection of a collective; the reason may be on its way.
            self._known.wait(_GRACE)
        return bool(self.reason) and isinstance(error, RuntimeError | KeyboardInterrupt)

    def leave(self, reason: str = "") -> None:
        """Tell the others that this process has done its part, or why it has failed."""
        self._left.set()
        self._tell(reason)
        if not reason and not self.reason:
            for thread in self._threads:
                thread.join(_GRACE)
        for connection in self._peers.values():
            # What was sent still arrives.
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_WR)
            connection.close()

    def _tell(self, reason: str) -> None:
        for connection in self._peers.values():
            with contextlib.suppress(OSError):
                connection.sendall(json.dumps(reason).encode() + b"\n")

    def _listen(self, peer: int, connection: socket.socket) -> None:
        line = b""
        with contextlib.suppress(OSError, ValueError), connection.makefile("rb") as file:
            line = file.readline()
        if not line.endswith(b"\n"):
            self._learn(
                f"Process {peer} ended without a message: it was killed, or its machine had no "
                "memory left."
            )
        elif reason := json.loads(line):
            self._learn(reason)

    def _learn(self, reason: str) -> None:
        """End this process, now that another has."""
        with self._lock:
            if self.reason or self._left.is_set():
                return
            self.reason = reason
        if self._rank == 0:
            self._tell(reason)
        self._known.set()
        if self._left.wait(_GRACE):
            return
        if self._is_main:
            _interrupt_main()
        if self._left.wait(_LAST):
            return
        sys.stderr.write(f"stofm: {reason} This process ends with it.\n")
        sys.stderr.flush()
        os._exit(1)


def _interrupt_main() -> None:
    if hasattr(signal, "pthread_kill"):
        # Wakes it also from sleeping and from waiting for a thread.
        ident: Any = threading.main_thread().ident
        signal.pthread_kill(ident, signal.SIGINT)
    else:
        import _thread

        _thread.interrupt_main()


def open_server() -> tuple[socket.socket, tuple[list[str], int]]:
    """Open a port for the other processes; returns it with names of this machine and its number."""
    if socket.has_dualstack_ipv6():
        server = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    else:
        server = socket.create_server(("", 0))
    names = [os.environ.get("MASTER_ADDR", ""), socket.gethostname()]
    return server, ([name for name in names if name], server.getsockname()[1])


def accept_all(server: socket.socket, n_others: int) -> dict[int, socket.socket]:
    """Connections of all other processes to this one, by rank."""
    found: dict[int, socket.socket] = {}
    until = time.monotonic() + _CONNECTING
    with server:
        while len(found) < n_others:
            server.settimeout(max(0.1, until - time.monotonic()))
            connection, _ = server.accept()
            connection.settimeout(_GRACE)
            found[int.from_bytes(connection.recv(4), "big")] = connection
            connection.settimeout(None)
    return found


def connect(rank: int, names: list[str], port: int) -> dict[int, socket.socket]:
    """Connection of this process to the first."""
    for name in names:
        try:
            connection = socket.create_connection((name, port), timeout=_CONNECTING / 3)
        except OSError as error:
            failure = error
            continue
        connection.settimeout(None)
        connection.sendall(rank.to_bytes(4, "big"))
        return {0: connection}
    msg = f"Process {rank} can't reach the first one at port {port} of {names}: {failure}."
    raise OSError(msg)
