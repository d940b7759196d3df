"""The relay breaks connections where it is told to, and nowhere else."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from isthmus.experiments.rigs.network.relay import Relay

TIMEOUT = 20.0


class Peer:
    """A listening socket; `accept` gives the other end of a connection that came through the relay."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.settimeout(TIMEOUT)

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.listener.getsockname()
        return host, port

    def accept(self) -> socket.socket:
        connection, _ = self.listener.accept()
        connection.settimeout(TIMEOUT)
        return connection


@pytest.fixture
def peer() -> Iterator[Peer]:
    peer = Peer()
    with peer.listener:
        yield peer


@pytest.fixture
def relay(peer: Peer) -> Iterator[Relay]:
    with Relay(*peer.address) as relay:
        yield relay


@contextmanager
def connected(relay: Relay, peer: Peer) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of one connection through the relay."""
    with socket.create_connection(("127.0.0.1", relay.port), TIMEOUT) as edge, peer.accept() as cloud:
        yield edge, cloud


def read(end: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        chunk = end.recv(count - len(data))
        if not chunk:
            break
        data += chunk
    return data


def read_until_reset(end: socket.socket) -> bytes:
    """What arrives before the reset. A graceful end fails the test."""
    data = b""
    try:
        while chunk := end.recv(1 << 16):
            data += chunk
    except ConnectionResetError:
        return data
    pytest.fail(f"a graceful end after {len(data)} bytes, and no reset")


def knock(relay: Relay) -> None:
    """Connect and be reset, at once or a moment later."""
    with socket.socket() as edge:
        edge.settimeout(TIMEOUT)
        with pytest.raises(ConnectionResetError):
            (edge.connect(("127.0.0.1", relay.port)), edge.recv(1))


def test_bytes_pass_both_ways_and_are_counted(relay: Relay, peer: Peer) -> None:
    sent = bytes(range(256)) * 4096  # 1 MiB: more than the relay copies at once
    with connected(relay, peer) as (edge, cloud):
        writer = threading.Thread(target=edge.sendall, args=(sent,))
        writer.start()
        assert read(cloud, len(sent)) == sent
        writer.join()
        cloud.sendall(b"answer")
        assert read(edge, 6) == b"answer"
        assert relay.wait_passed("up", len(sent), TIMEOUT)
        assert relay.wait_passed("down", 6, TIMEOUT)
        assert not relay.wait_passed("down", 7, 0.0)
    assert (relay.bytes_passed("up"), relay.bytes_passed("down")) == (len(sent), 6)


def test_an_end_is_passed_on_and_the_other_direction_stays_open(relay: Relay, peer: Peer) -> None:
    with connected(relay, peer) as (edge, cloud):
        edge.sendall(b"question")
        edge.shutdown(socket.SHUT_WR)
        assert read(cloud, 100) == b"question"
        cloud.sendall(b"answer")
        cloud.shutdown(socket.SHUT_WR)
        assert read(edge, 100) == b"answer"


def test_a_cut_resets_both_ends(relay: Relay, peer: Peer) -> None:
    with connected(relay, peer) as (edge, cloud):
        edge.sendall(b"hello")
        assert read(cloud, 5) == b"hello"
        relay.cut()
        assert read_until_reset(edge) == b""
        assert read_until_reset(cloud) == b""
    with connected(relay, peer) as (edge, cloud):  # new connections are welcome
        edge.sendall(b"again")
        assert read(cloud, 5) == b"again"


@pytest.mark.parametrize("count", [1, 10, 65_536, 100_000])
def test_a_cut_after_some_bytes_up_lets_no_byte_more_through(relay: Relay, peer: Peer, count: int) -> None:
    sent = bytes(200_000)
    with connected(relay, peer) as (edge, cloud):
        relay.cut_after(count, "up")
        writer = threading.Thread(target=_send_what_goes, args=(edge, sent))
        writer.start()
        arrived = read_until_reset(cloud)
        writer.join()
        # A reset throws away what the sending socket still holds, so fewer may arrive; never more.
        assert len(arrived) <= count
        assert relay.bytes_passed("up") == count


def test_a_cut_after_some_bytes_down_leaves_the_other_direction_alone(relay: Relay, peer: Peer) -> None:
    with connected(relay, peer) as (edge, cloud):
        relay.cut_after(5, "down")
        edge.sendall(b"a question of more than five bytes")
        assert read(cloud, 34) == b"a question of more than five bytes"
        cloud.sendall(b"answer")
        assert read_until_reset(edge) in {b"answe"[:n] for n in range(6)}
    assert relay.bytes_passed("down") == 5


def test_a_disarmed_cut_does_not_come(relay: Relay, peer: Peer) -> None:
    with connected(relay, peer) as (edge, cloud):
        relay.cut_after(3, "up")
        relay.disarm()
        edge.sendall(b"whole")
        assert read(cloud, 5) == b"whole"


def test_what_is_held_back_comes_in_order_once_it_is_released(relay: Relay, peer: Peer) -> None:
    sent = bytes(range(256)) * 1024
    with connected(relay, peer) as (edge, cloud):
        relay.hold_after(10, "down")
        writer = threading.Thread(target=cloud.sendall, args=(sent,))
        writer.start()
        assert read(edge, 10) == sent[:10]
        edge.sendall(b"the other direction")
        assert read(cloud, 19) == b"the other direction"
        assert not relay.wait_passed("down", 11, 0.2)
        relay.release()
        assert read(edge, len(sent) - 10) == sent[10:]
        writer.join()


def test_a_cut_loses_what_is_held_back_and_holds_no_longer(relay: Relay, peer: Peer) -> None:
    with connected(relay, peer) as (edge, cloud):
        relay.hold_after(0, "down")
        cloud.sendall(b"answer")
        edge.sendall(b"question")
        assert read(cloud, 8) == b"question"
        relay.cut()
        assert read_until_reset(edge) == b""
    with connected(relay, peer) as (edge, cloud):
        cloud.sendall(b"answer")
        assert read(edge, 6) == b"answer"
    assert relay.wait_passed("down", 6, TIMEOUT)
    assert relay.bytes_passed("down") == 6


def test_a_cut_falls_into_what_was_held_back(relay: Relay, peer: Peer) -> None:
    with connected(relay, peer) as (edge, cloud):
        relay.hold_after(2, "down")
        cloud.sendall(b"answer")
        assert read(edge, 2) == b"an"
        relay.cut_after(3, "down")
        relay.release()
        assert read_until_reset(edge) in {b"swe"[:n] for n in range(4)}
    assert relay.bytes_passed("down") == 5


def test_connections_are_refused_until_disarmed(relay: Relay, peer: Peer) -> None:
    relay.refuse_for(3600)
    knock(relay)
    relay.disarm()
    with connected(relay, peer) as (edge, cloud):
        edge.sendall(b"hello")
        assert read(cloud, 5) == b"hello"


def test_a_target_that_is_not_there_resets_and_another_one_takes_over(peer: Peer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        host, port = gone.getsockname()
    with Relay(host, port) as relay:
        knock(relay)
        relay.point_at(*peer.address)
        with connected(relay, peer) as (edge, cloud):
            cloud.sendall(b"welcome")
            assert read(edge, 7) == b"welcome"


def test_it_listens_where_it_is_told_to(peer: Peer) -> None:
    with (
        Relay(*peer.address, ("127.0.0.2", peer.address[1])) as relay,
        socket.create_connection(("127.0.0.2", peer.address[1]), TIMEOUT) as edge,
        peer.accept() as cloud,
    ):
        assert relay.port == peer.address[1]
        cloud.sendall(b"welcome")
        assert read(edge, 7) == b"welcome"


def test_leaving_the_relay_breaks_what_is_open(peer: Peer) -> None:
    with Relay(*peer.address) as relay:
        edge = socket.create_connection(("127.0.0.1", relay.port), TIMEOUT)
        cloud = peer.accept()
        edge.sendall(b"hello")
        assert read(cloud, 5) == b"hello"
    with edge, cloud:
        assert read_until_reset(edge) == b""
        assert read_until_reset(cloud) == b""


def _send_what_goes(end: socket.socket, data: bytes) -> None:
    with suppress(ConnectionResetError, BrokenPipeError):  # that is what the test waits for
        end.sendall(data)
