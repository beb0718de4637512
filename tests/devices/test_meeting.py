"""Processes that do not meet, or lose one: each is told within the timeout, in one sentence. Threads stand for them.

No port is opened by others between its choice and its use here; where a test needs one that is taken, it takes it.
"""

import argparse
import contextlib
import queue
import socket
import threading
import time

import pytest

from gt_jax.devices.flags import add_process_flags, wrong_process_flags
from gt_jax.devices.meeting import Watch, meet, split_address
from gt_jax.errors import Failed, Refused

TIMEOUT = 1.0


def free_port():
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


def met(calls, timeout=TIMEOUT):
    """What `meet` gave, or raised, in each (address, count, index)."""
    found = [None] * len(calls)

    def come(place, call):
        try:
            found[place] = meet(*call, timeout)
        except (Refused, Failed) as error:
            found[place] = error

    threads = [threading.Thread(target=come, args=one) for one in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20 * timeout)
        assert not thread.is_alive()
    return found


def close(found):
    """The connections of those that met."""
    for peers in found:
        for peer in peers.values() if isinstance(peers, dict) else ():
            peer.close()


def part(watches):
    """All leave; their threads end."""
    parting = [threading.Thread(target=watch.leave) for watch in watches]
    for one in parting:
        one.start()
    for one, watch in zip(parting, watches, strict=True):
        one.join(10)
        watch._thread.join(10)
        assert not watch._thread.is_alive()


@contextlib.contextmanager
def watched(timeout=TIMEOUT, count=3):
    """Watches of processes that have met, and the queues of what ends each."""
    address = f"localhost:{free_port()}"
    found = met([(address, count, index) for index in range(count)], 20.0)
    ends = [queue.Queue() for _ in found]
    watches = [Watch(peers, index, timeout, lambda *words, to=ends[index]: to.put(words))
               for index, peers in enumerate(found)]  # fmt: skip
    try:
        yield found, watches, ends
    finally:
        part(watches)


def test_they_meet_and_part():
    with watched() as (found, _, ends):
        assert [sorted(peers) for peers in found] == [[1, 2], [0], [0]]
    assert all(one.empty() for one in ends)


def test_one_that_dies_ends_the_others():
    with watched(20.0) as (found, _, ends):
        found[2][0].shutdown(socket.SHUT_RDWR)  # what a kill does
        words = [ends[index].get(timeout=5) for index in (0, 1)]
    assert words == [("process 2 died: its connection is closed; the others end too", 1)] * 2


def test_one_that_fails_ends_the_others_with_its_sentence():
    with watched() as (_, watches, ends):
        watches[1].fail("the disk is full", 2)
        assert [ends[index].get(timeout=5) for index in (0, 2)] == [("process 1: the disk is full", 2)] * 2
        assert ends[1].empty()


def test_one_that_is_silent_ends_the_others():
    address = f"localhost:{free_port()}"
    found = met([(address, 2, index) for index in range(2)], 20.0)
    ended = queue.Queue()
    watch = Watch(found[0], 0, 0.4, lambda *words: ended.put(words))
    assert ended.get(timeout=5) == ("process 1 has given no sign of life for 0.4 s; the others end too", 1)
    close(found[1:])
    part([watch])


def test_one_too_few():
    address = f"localhost:{free_port()}"
    started = time.monotonic()
    found = met([(address, 3, 0), (address, 3, 1)])
    assert [type(one) for one in found] == [Failed, Failed] and time.monotonic() - started < 4 * TIMEOUT
    assert all("of 3 processes number 2 did not come" in str(one) for one in found)
    (alone,) = met([(f"localhost:{free_port()}", 3, 2)])
    assert isinstance(alone, Failed) and "process 0 is not at localhost" in str(alone)


def test_two_jobs_and_two_of_one_number():
    for (count, index), words in (((3, 1), "process 1 is one of 3, process 0 one of 2"), ((2, 1), None)):
        address = f"localhost:{free_port()}"
        found = met([(address, 2, 0), (address, count, index)], 5.0)
        assert words is None or all(isinstance(one, Refused) and words in str(one) for one in found)
        close(found)
    address = f"localhost:{free_port()}"
    found = met([(address, 3, 0), (address, 3, 1), (address, 3, 1)], 5.0)
    assert all(isinstance(one, Refused) and "two processes are number 1" in str(one) for one in found)


def test_a_port_in_use_and_a_host_that_nobody_knows(monkeypatch):
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        taken, turned_away = met([(f"localhost:{port}", 2, 0), (f"localhost:{port}", 2, 1)])
    assert isinstance(taken, Refused) and f"port {port} of --coordinator cannot be opened" in str(taken)
    assert isinstance(turned_away, Failed) and "another program listens there" in str(turned_away)

    def unknown(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    (lost,) = met([("no-such-host:1234", 2, 1)])
    assert isinstance(lost, Refused) and "host 'no-such-host' of --coordinator is not known" in str(lost)


def test_what_is_no_process_is_let_go():
    """A port scanner, a browser, a health check."""
    port = free_port()
    found = []
    first = threading.Thread(target=lambda: found.append(meet(f"localhost:{port}", 2, 0, 10.0)))
    first.start()
    while True:
        try:
            visitor = socket.create_connection(("localhost", port))
            break
        except OSError:
            time.sleep(0.05)
    visitor.sendall(b"GET / HTTP/1.1\r\n\r\n")
    found.append(meet(f"localhost:{port}", 2, 1, 10.0))
    first.join(10)
    visitor.close()
    assert sorted(map(list, found)) == [[0], [1]]
    close(found)


@pytest.mark.parametrize("address", ["node0", "node0:", ":8476", "node0:http", "node0:0", "node0:65536", "node0:-1"])
def test_an_address_that_cannot_be_is_refused_with_the_flags(address):
    parser = argparse.ArgumentParser()
    add_process_flags(parser)
    given = parser.parse_args(["--coordinator", address, "--processes", "2", "--process", "0"])
    assert any("is not HOST:PORT" in line for line in wrong_process_flags(given))
    assert split_address("[::1]:8476") == ("::1", 8476) and split_address("node0:8476") == ("node0", 8476)
    given.coordinator, given.process_timeout = "node0:8476", 0.0
    assert any("--process-timeout is 0" in line for line in wrong_process_flags(given))
    given.processes = 2**40  # to listen for as many is an OverflowError
    assert any(f"--processes is {2**40}; at most 65535" in line for line in wrong_process_flags(given))
