"""From one worker to another: the addresses alone, and a link over two real servers that know of each other."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.cloud.clouds import Home, ThreadServer, served
from support.cloud.sessions import call_in_flight, eventually
from support.models.tiny import HIDDEN, tiny_checkpoint

from isthmus.cloud.directory import Peer
from isthmus.cloud.gateway.open_sessions import REPORTS
from isthmus.common.errors import ConnectionLostError, OverQuotaError, TooManySessionsError
from isthmus.edge.client.endpoints import Endpoints
from isthmus.edge.client.link import Link, connect
from isthmus.edge.client.questions import Question
from isthmus.experiments.rigs.network.relay import Relay
from isthmus.protocol import messages as m
from isthmus.protocol.enrolment import ConnectionString, Quota
from isthmus.rpc.transport import Stream, run


class Named:
    """A transport that tells where it leads."""

    def __init__(self, address: str, log: list[str]) -> None:
        self.address, self.log = address, log

    async def open(self) -> Stream:
        self.log.append(self.address)
        raise ConnectionLostError("nobody is there")

    async def close(self) -> None:
        self.log.append(f"-{self.address}")


def endpoints(log: list[str], *, fixed: bool = False) -> Endpoints:
    return Endpoints(Named("a:1", log), "a:1", None if fixed else lambda address: Named(address, log))


def tried(one: Endpoints, log: list[str], times: int) -> list[str]:
    log.clear()
    for _ in range(times):
        with pytest.raises(ConnectionLostError):
            run(one.open())
        run(one.failed())
    return [entry for entry in log if not entry.startswith("-")]


def test_an_edge_tries_the_first_address_and_all_that_it_has_learned() -> None:
    log: list[str] = []
    one = endpoints(log)
    assert tried(one, log, 2) == ["a:1", "a:1"]
    one.learn(["b:1", "c:1"])
    assert tried(one, log, 4) == ["a:1", "b:1", "c:1", "a:1"]
    one.learn(["d:1"])
    assert tried(one, log, 3) == ["b:1", "d:1", "a:1"]


def test_an_edge_that_reaches_nobody_tries_each_port_on_each_machine() -> None:
    log: list[str] = []
    one = Endpoints(Named("a:1", log), "a:1", lambda address: Named(address, log), ["b:1"])
    assert tried(one, log, 3) == ["a:1", "b:1", "a:1"]
    one.learn(["a:1", "b:2"])
    assert tried(one, log, 5) == ["b:1", "a:2", "a:1", "b:2", "b:1"]
    one.learn([f"m{number}:{number}" for number in range(100)])
    assert len(set(tried(one, log, 120))) == 103  # the one that it was at, too


def test_an_edge_that_cannot_reach_where_it_was_sent_settles_elsewhere() -> None:
    log: list[str] = []
    one = endpoints(log)
    one.learn(["a:1", "b:1"])
    run(one.send_to("b:1"))
    assert tried(one, log, 1) == ["b:1"]
    assert one.settled
    one.attached()
    assert not one.settled
    assert tried(one, log, 1) == ["a:1"]


def test_an_edge_that_cannot_go_elsewhere_stays_and_settles() -> None:
    log: list[str] = []
    one = endpoints(log, fixed=True)
    one.learn(["b:1"])
    run(one.send_to("b:1"))
    assert one.settled
    assert tried(one, log, 2) == ["a:1", "a:1"]


@pytest.mark.parametrize("fixed", [True, False])
def test_an_edge_with_one_address_gives_its_connection_up_where_it_gets_no_session(fixed: bool) -> None:
    log: list[str] = []
    one = endpoints(log, fixed=fixed)
    run(one.failed())
    assert log == ["-a:1"]
    one.learn(["a:1", "a:1"])
    assert tried(one, log, 2) == ["a:1", "a:1"]
    assert log == ["a:1", "-a:1"] * 2


# Two servers ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("endpoints")
    return tiny_checkpoint("llama", folder / "model"), folder / "parts"


class Pair:
    """Two servers of one home, told of each other as the controller would.

    Attributes:
        shared: the port of the relay through which edges reach both; None where each has its own address.
    """

    def __init__(self, first: ThreadServer, second: ThreadServer) -> None:
        self.both = (first, second)
        self.shared: int | None = None

    def address(self, which: int) -> str:
        return f"127.0.0.1:{self.shared or self.both[which].port}"

    def introduce(self) -> None:
        for me, other in ((0, 1), (1, 0)):
            server = self.both[other].server
            peer = Peer(self.address(other), server.status()["state"], server.sessions.entries())
            self.both[me].run(self.call(me, peer))

    async def call(self, which: int, *peers: Peer) -> None:
        self.both[which].server.sessions.take_report(self.address(which), peers)

    def sessions(self) -> list[int]:
        return [len(server.server.sessions.entries()) for server in self.both]

    def link(self) -> Link:
        first = self.both[0]
        where = ConnectionString("127.0.0.1", self.shared or first.port, first.home.pin)
        return connect(str(where), key=first.home.key_file)


@contextlib.contextmanager
def two_servers(model: tuple[Path, Path], folder: Path, max_sessions: int) -> Iterator[Pair]:
    home = Home(folder, quota=Quota(max_sessions))
    with ThreadServer(served(*model), home) as first, ThreadServer(served(*model), home) as second:
        yield Pair(first, second)


@pytest.fixture
def pair(model: tuple[Path, Path], tmp_path: Path) -> Iterator[Pair]:
    with two_servers(model, tmp_path, 2) as two:
        two.introduce()
        yield two


@pytest.fixture
def strangers(model: tuple[Path, Path], tmp_path: Path) -> Iterator[Pair]:
    """Two servers that have not heard of each other, of a tenant that may have one session."""
    with two_servers(model, tmp_path, 1) as two:
        yield two


def hidden() -> torch.Tensor:
    return torch.randn(2, 6, HIDDEN, generator=torch.Generator().manual_seed(1))


def test_the_second_session_is_sent_to_the_second_worker(pair: Pair) -> None:
    with pair.link() as first:
        pair.introduce()
        with pair.link() as second:
            assert pair.sessions() == [1, 1]
            outputs = [link.forward_span(hidden(), None, None, keep=False)[0] for link in (first, second)]
            assert torch.equal(*outputs)


def test_a_tenants_sessions_count_wherever_they_are(pair: Pair) -> None:
    with pair.link() as first, pair.link():
        pair.introduce()
        with pytest.raises(TooManySessionsError, match="2 sessions of alice are open"):
            pair.link()
        first.close()
        eventually(lambda: sum(pair.sessions()) == 1)
        pair.introduce()
        with pair.link():
            assert sum(pair.sessions()) == 2


def test_a_step_goes_on_at_the_other_worker_when_its_own_drains(pair: Pair) -> None:
    given, gradient = hidden().requires_grad_(), hidden() / 2
    span = pair.both[0].served.executor.host.span
    (expected,) = torch.autograd.grad(span(given), given, gradient)
    with pair.link() as link:
        _, kept = link.forward_span(given, None, None, keep=True)
        assert pair.sessions() == [1, 0]
        assert pair.both[0].drain()
        found = link.backward_span(kept, gradient, given, None, None)
        assert pair.sessions() == [0, 1]
        assert found is not None
        assert torch.equal(found, expected)


def test_a_session_behind_a_load_balancer_leaves_a_worker_that_still_drains(pair: Pair) -> None:
    first, second = pair.both
    with Relay("127.0.0.1", first.port) as relay, call_in_flight(first, first.served) as held:
        pair.shared = relay.port
        pair.introduce()
        with pair.link() as link:
            assert pair.sessions() == [2, 0]
            relay.point_at("127.0.0.1", second.port)
            draining = threading.Thread(target=first.drain)
            draining.start()
            eventually(lambda: pair.sessions() == [0, 0])  # they are ending
            link._keeper.call(Question(m.Pong, lambda attempt: m.Ping(attempt.number), patience=5))
            assert (draining.is_alive(), held.release.is_set()) == (True, False)  # its listener has not closed yet
            assert len(second.server.sessions.entries()) == 1
            held.release.set()
            draining.join(10)


def test_a_session_that_its_worker_ends_goes_on_over_the_same_connection(pair: Pair) -> None:
    first, second = pair.both

    async def end() -> None:
        first.server.sessions.end_all("the session has reached its greatest age")

    with Relay("127.0.0.1", first.port) as relay:
        pair.shared = relay.port
        pair.introduce()
        with pair.link() as link:
            relay.point_at("127.0.0.1", second.port)
            first.run(end())
            link._keeper.ask(m.Pong, m.Ping(1))
            assert pair.sessions() == [1, 0]


def test_a_worker_that_sheds_a_session_sees_it_go_to_the_other(pair: Pair) -> None:
    sessions = pair.both[0].server.sessions

    async def shed() -> None:
        sessions.end_newest(1)

    pair.both[0].run(pair.call(0))  # alone, it keeps whoever comes
    with pair.link() as link, pair.link() as other:
        assert pair.sessions() == [2, 0]
        pair.introduce()
        pair.both[0].run(shed())
        for each in (link, other):
            each.forward_span(hidden(), None, None, keep=False)
        assert pair.sessions() == [1, 1]


def test_a_link_that_was_opened_anew_elsewhere_fences_the_older_session(pair: Pair) -> None:
    with pair.link() as link:
        twin = pair.both[1].link()
        twin._keeper._link_id = link._keeper._link_id
        with twin:
            twin.open(5)
            assert pair.sessions() == [1, 1]
            pair.introduce()
            eventually(lambda: pair.sessions() == [0, 1])


@pytest.mark.parametrize("first", [0, 1])
def test_of_the_sessions_that_two_workers_took_at_once_the_oldest_stay(strangers: Pair, first: int) -> None:
    with strangers.both[first].link() as older, strangers.both[1 - first].link() as newer:
        for link in (older, newer):
            link.open(5)
        assert strangers.sessions() == [1, 1]
        for _ in range(REPORTS):
            strangers.introduce()
        assert strangers.sessions() == [1 - first, first]
        with pytest.raises(OverQuotaError, match="1 sessions of alice are open, 1 are allowed: close one"):
            newer.forward_span(hidden(), None, None, keep=False)
        older.forward_span(hidden(), None, None, keep=False)
        assert older.traffic.sessions == 1


def test_a_link_that_moves_is_not_over_the_quota_beside_itself(strangers: Pair) -> None:
    with strangers.both[0].link() as link, strangers.both[1].link() as moved:
        link.open(5)
        moved._keeper._link_id = link._keeper._link_id
        moved.open(5)
        before = Peer(strangers.address(0), "serving", strangers.both[0].server.sessions.entries())
        for _ in range(2 * REPORTS):  # the worker that it has left says for long that it is there
            strangers.both[1].run(strangers.call(1, before))
        assert strangers.sessions() == [1, 1]
        strangers.introduce()
        assert strangers.sessions() == [0, 1]
        moved.forward_span(hidden(), None, None, keep=False)


def test_a_session_is_not_ended_for_one_that_had_left_before_it_came(strangers: Pair) -> None:
    with strangers.both[0].link() as gone, strangers.both[1].link() as link:
        gone.open(5)
        before = Peer(strangers.address(0), "serving", strangers.both[0].server.sessions.entries())
        gone.close()
        link.open(5)
        for _ in range(REPORTS - 1):  # two words may tell of the time before
            strangers.both[1].run(strangers.call(1, before))
        eventually(lambda: strangers.sessions() == [0, 1])
        for _ in range(REPORTS):
            strangers.introduce()
        assert strangers.sessions() == [0, 1]
        link.forward_span(hidden(), None, None, keep=False)
