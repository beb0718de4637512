"""How the processes of one job find each other, and hear of each other's end: a connection of each to process 0.

- They meet at HOST:PORT before JAX uses it. Whoever does not come, or comes to another job, is named by all within the
  timeout; JAX alone would wait for minutes and end in a C++ stack.
- The connections stay. A process that fails says its sentence on it; one that dies closes it; one that hangs, or whose
  machine is gone, is silent for the timeout. Process 0 passes that on. The others would wait in a collective for ever:
  they end, each with that sentence, after a moment in which they may hear of it otherwise and say it themselves.

Lines of JSON; an empty line is a sign of life. Nothing here knows of JAX.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from gt_jax.errors import Failed, Refused
from gt_jax.files import parse_json

_HELLO = "gt_jax"
_BEATS = 6  # signs of life in a timeout
_MOMENT = 5.0  # seconds, at most, in which a process may end by itself after it has heard of another's failure
_LINE = 1 << 16

Peers = dict[int, socket.socket]


def split_address(address: str) -> tuple[str, int]:
    """(host, port) of HOST:PORT, [::1]:PORT among them; raises `Refused` where that is something else."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdecimal() or not 0 < int(port) < 65536:
        raise Refused(f"--coordinator {address} is not HOST:PORT, with a port from 1 to 65535, for example node0:8476")
    return host.removeprefix("[").removesuffix("]"), int(port)


def meet(address: str, count: int, index: int, timeout: float) -> Peers:
    """The connections of process `index` of `count`: of process 0 those to all others, of the others that to process 0.

    Raises `Refused` for an address that cannot be and processes that do not belong together, `Failed` where not all
    have come within `timeout` seconds.
    """
    host, port = split_address(address)
    deadline = time.monotonic() + timeout
    return _gather(host, port, count, timeout, deadline) if index == 0 else {
        0: _join(host, port, count, index, timeout, deadline)}  # fmt: skip


def _gather(host: str, port: int, count: int, timeout: float, deadline: float) -> Peers:
    both = socket.has_dualstack_ipv6()
    try:
        listener = socket.create_server(
            ("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both, backlog=count)
    except OSError as error:
        raise Refused(f"port {port} of --coordinator cannot be opened on this machine ({error.strerror}); give all "
                      "processes another one") from error
    peers: Peers = {}
    try:
        with listener:
            while len(peers) < count - 1:
                problem = _take(listener, peers, count, deadline)
                if problem is not None:
                    raise Refused(problem)
        for peer in peers.values():
            _say(peer, {"go": True})
    except TimeoutError as error:
        absent = [str(one) for one in range(1, count) if one not in peers]
        sentence = (f"of {count} processes number {', '.join(absent)} did not come to {host}:{port} within "
                    f"{timeout:g} s; start all of them with the same --coordinator")  # fmt: skip
        raise _told_all(peers, Failed(sentence)) from error
    except Refused as error:
        raise _told_all(peers, error) from error
    return peers


def _take(listener: socket.socket, peers: Peers, count: int, deadline: float) -> str | None:
    """Accept one process; why it does not belong to this job, None where it does. What is no process is let go."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    listener.settimeout(left)
    peer, _ = listener.accept()
    hello = _heard(peer, min(deadline, time.monotonic() + _MOMENT))
    if hello is None or _HELLO not in hello:
        peer.close()
        return None
    index, theirs = hello[_HELLO], hello["count"]
    if theirs != count or index in peers:
        wrong = (f"process {index} is one of {theirs}, process 0 one of {count}" if theirs != count
                 else f"two processes are number {index}")  # fmt: skip
        peers[-1] = peer  # it is told too
        return f"{wrong}; give all the same --processes, and each its own --process"
    peers[index] = peer
    return None


def _told_all(peers: Peers, error: Failed | Refused) -> Failed | Refused:
    for peer in peers.values():
        with contextlib.suppress(OSError):
            _say(peer, {"refused" if isinstance(error, Refused) else "failed": str(error)})
        peer.close()
    return error


def _join(host: str, port: int, count: int, index: int, timeout: float, deadline: float) -> socket.socket:
    try:
        socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise Refused(f"host {host!r} of --coordinator is not known ({error.strerror}); it is the machine of "
                      "process 0") from error
    peer = _connected(host, port, timeout, deadline)
    with contextlib.suppress(OSError):
        _say(peer, {_HELLO: index, "count": count})
    answer = _heard(peer, deadline + 1) or {}
    if answer.get("go"):
        return peer
    peer.close()
    if "refused" in answer:
        raise Refused(answer["refused"])
    raise Failed(answer.get("failed") or f"process 0 did not call at {host}:{port} within {timeout:g} s: it ended, or "
                 "another program listens there; start all processes again, with another port")


def _connected(host: str, port: int, timeout: float, deadline: float) -> socket.socket:
    while True:
        try:
            peer = socket.create_connection((host, port), timeout=max(0.1, min(_MOMENT, deadline - time.monotonic())))
            if peer.getsockname() != peer.getpeername():  # a port that nobody has opened may connect to itself
                return peer
            peer.close()
            reason = "nobody listens there"
        except OSError as error:
            reason = error.strerror or str(error)
        if time.monotonic() >= deadline:
            raise Failed(f"process 0 is not at {host}:{port} within {timeout:g} s ({reason}); start it there, or give "
                         "its address with --coordinator")
        time.sleep(min(0.1, timeout / 10))


def _say(peer: socket.socket, message: dict[str, Any]) -> None:
    peer.settimeout(_MOMENT)
    peer.sendall(json.dumps(message).encode() + b"\n")


def _heard(peer: socket.socket, deadline: float) -> dict[str, Any] | None:
    """One message, byte by byte so that nothing of the next is taken; None where none comes, or it is no message."""
    line = b""
    try:
        while not line.endswith(b"\n") and len(line) < _LINE:
            peer.settimeout(max(0.01, deadline - time.monotonic()))
            byte = peer.recv(1)
            if not byte:
                return None
            line += byte
        message = parse_json(line)
    except (OSError, ValueError):
        return None
    return message if isinstance(message, dict) else None


def end_process(sentence: str, code: int) -> None:
    """Say why, and end this process at once: whatever its main thread waits for does not come."""
    os.write(2, f"failed: {sentence}\n".encode())
    os._exit(code)


class Watch:
    """Looks after the connections of `meet`, in a thread; calls `end(sentence, code)` where another process is gone."""

    def __init__(
        self, peers: Peers, index: int, timeout: float, end: Callable[[str, int], None] = end_process
    ) -> None:
        self._peers, self._index, self._timeout, self._end = dict(peers), index, timeout, end
        self._moment = min(_MOMENT, timeout / 4)
        self._sending, self._leaving, self._alone = threading.Lock(), threading.Event(), threading.Event()
        self._due: tuple[float, str, int] | None = None  # when to end, and with which words
        self._thread = threading.Thread(target=self._run, name="watching the other processes", daemon=True)
        self._thread.start()

    def leave(self) -> None:
        """All is done: the others are not to take this end for a failure."""
        self._part({"bye": True})

    def fail(self, sentence: str, code: int) -> None:
        """Tell the others why this process ends, and wait a moment for them: while it is there, JAX says nothing."""
        self._part({"end": f"process {self._index}: {sentence}", "code": code})

    def _part(self, message: dict[str, Any]) -> None:
        self._leaving.set()
        self._tell(message)
        self._alone.wait(self._moment + 1)

    def _tell(self, message: dict[str, Any] | None, besides: int | None = None) -> None:
        line = b"\n" if message is None else json.dumps(message).encode() + b"\n"
        with self._sending:
            for index, peer in self._peers.items():
                if index == besides:
                    continue
                with contextlib.suppress(OSError):  # its end is seen where it is read
                    peer.settimeout(self._moment)
                    peer.sendall(line)
                    if message is not None and "bye" in message:
                        peer.shutdown(socket.SHUT_WR)

    def _run(self) -> None:
        heard = dict.fromkeys(self._peers, time.monotonic())
        parts = dict.fromkeys(self._peers, b"")
        beat = time.monotonic()
        with selectors.DefaultSelector() as selector:
            for index, peer in self._peers.items():
                selector.register(peer, selectors.EVENT_READ, index)
            while there := [key.data for key in selector.get_map().values()]:
                for key, _ in selector.select(min(0.2, self._timeout / _BEATS / 4)):
                    index = key.data
                    data = self._received(index)
                    heard[index] = time.monotonic()
                    *lines, parts[index] = (parts[index] + data).split(b"\n")
                    done = [self._is_last(index, message) for message in _messages(lines)]
                    if not data and not any(done):
                        self._gone(index, "died: its connection is closed")
                    if not data or any(done):
                        selector.unregister(self._peers[index])
                now = time.monotonic()
                if now - beat > self._timeout / _BEATS and not self._leaving.is_set():
                    beat = now
                    self._tell(None)
                for index in there:
                    if now - heard[index] > self._timeout:
                        heard[index] = now
                        self._gone(index, f"has given no sign of life for {self._timeout:g} s")
                if self._due is not None and now > self._due[0] and not self._leaving.is_set():
                    self._end(*self._due[1:])
                    self._due = None
        self._alone.set()
        for peer in self._peers.values():
            peer.close()

    def _received(self, index: int) -> bytes:
        try:
            return self._peers[index].recv(_LINE)
        except OSError:
            return b""

    def _is_last(self, index: int, message: dict[str, Any]) -> bool:
        """Whether nothing more is awaited from there. Process 0 leaves last: JAX ends whoever misses it, in C++."""
        if "end" not in message:
            return "bye" in message
        if self._due is None:
            moment = 0.0 if message.get("now") else self._moment
            self._due = time.monotonic() + moment, message["end"], message["code"]
            self._pass_on(message, index)
        return self._leaving.is_set() and self._index > 0

    def _gone(self, index: int, how: str) -> None:
        if self._leaving.is_set():
            return
        message = {"end": f"process {index} {how}; the others end too", "code": 1, "now": True}
        self._pass_on(message, index)
        words = self._due[1:] if self._due is not None else (str(message["end"]), 1)
        self._end(*words)

    def _pass_on(self, message: dict[str, Any], origin: int) -> None:
        if self._index == 0:
            self._tell(message, besides=origin)


def _messages(lines: list[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        with contextlib.suppress(ValueError):
            message = parse_json(line) if line else None
            if isinstance(message, dict):
                yield message
