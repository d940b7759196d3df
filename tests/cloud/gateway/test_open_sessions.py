"""The open sessions of a worker: quotas, fences, and why a session ends."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from support.cloud.clouds import Home, ThreadServer
from support.cloud.sessions import channel, eventually
from support.protocol.wire import TENANT

from isthmus.cloud.directory import Peer
from isthmus.cloud.gateway.open_sessions import FENCED, OpenSession, Sessions
from isthmus.cloud.session.served_model import Served
from isthmus.cloud.telemetry.metrics import Metrics
from isthmus.common.errors import ConnectionLostError, OverQuotaError
from isthmus.protocol import messages as m
from isthmus.protocol.enrolment import Quota


def test_the_session_quota_counts_links_and_a_closed_one_is_free_again(cloud: Served, tmp_path: Path) -> None:
    home = Home(tmp_path, quota=Quota(max_sessions=2))
    with ThreadServer(cloud, home) as server, server.link() as first, server.link() as second, server.link() as third:
        first.open(5)
        second.open(5)
        with pytest.raises(OverQuotaError, match="2 sessions of alice are open, 2 are allowed"):
            third.open(5)
        second.close()
        eventually(lambda: server.server.status()["sessions"] == {"alice": 1})
        third.open(5)


def test_a_reconnect_of_the_same_link_fences_the_older_session(cloud: Served, tmp_path: Path) -> None:
    home = Home(tmp_path, quota=Quota(max_sessions=1))
    with ThreadServer(cloud, home) as server:
        older = channel(server)
        newer = channel(server)  # within a quota of one, because it takes the older one's place
        with pytest.raises(ConnectionLostError):
            older.ask(m.Ping(1), 5)
        assert isinstance(newer.ask(m.Ping(2), 5), m.Pong)
        eventually(lambda: server.server.status()["sessions"] == {"alice": 1})
        newer.close()
        older.abandon()


def test_the_same_link_id_of_another_edge_fences_nobody(server: ThreadServer) -> None:
    bob = server.home.new_edge("bob")
    mine, other = channel(server), channel(server, key=bob)
    assert isinstance(mine.ask(m.Ping(1), 5), m.Pong)
    mine.close()
    other.close()


@pytest.mark.parametrize(("address", "sent_to"), [("other:1", "other:1"), ("balancer:1", None)])
def test_an_edge_is_not_sent_to_the_address_at_which_it_is(address: str, sent_to: str | None) -> None:
    sessions = Sessions(Metrics())

    def session(name: bytes) -> OpenSession:
        link = name * m.LINK_BYTES
        return OpenSession(name * 16, TENANT, link, interactive=False, deadline=None, enrolled=TENANT)

    async def in_a_loop() -> str | None:
        sessions.take_report("balancer:1", [Peer(address, "serving")])
        assert await sessions.enter(session(b"a")) is None
        return sessions.less_loaded(session(b"b"))

    assert asyncio.run(in_a_loop()) == sent_to
    assert not sessions.alone
    m.Workers(sessions.addresses, sent_to or "").check()  # names no address twice
    assert set(sessions.addresses) == {"balancer:1", address}


def test_a_session_is_told_the_first_reason_for_which_it_ends() -> None:
    session = OpenSession(b"s" * 16, TENANT, b"l" * m.LINK_BYTES, interactive=False, deadline=None, enrolled=TENANT)
    status = m.Status(m.StatusCode.OVER_QUOTA, None, "close one")
    session.end("over quota", status)
    session.end("draining")
    session.end(FENCED)
    assert (session.why, session.notice, session.fenced) == ("over quota", status, False)
