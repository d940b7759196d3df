"""What an edited `authorized_edges`, and their age, do to sessions that are open."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cloud.clouds import Home, ThreadServer
from support.cloud.sessions import call_in_flight, channel, eventually, hidden

from isthmus.cloud.bounds import Bounds
from isthmus.cloud.control import worker_setup
from isthmus.cloud.control.worker_setup import EdgesFile
from isthmus.cloud.gateway import server as server_module
from isthmus.cloud.session.served_model import Served
from isthmus.common.errors import ConnectionLostError, KeyFileError, NotEnrolledError
from isthmus.protocol import messages as m
from isthmus.protocol.enrolment import AuthorizedEdges, revoke
from isthmus.protocol.secure.keys import load_edge


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enrolments are looked at again and again, without a pause worth the name."""
    monkeypatch.setattr(server_module, "REVIEW_SECONDS", 0.02)


@pytest.fixture
def bob(home: Home) -> Path:
    return home.new_edge("bob")


def edit(home: Home, change: Callable[[str], str]) -> None:
    """Replace the line of alice."""
    path = home.folder / "authorized_edges"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(change(line) if " alice" in line else line for line in lines))


def remove(line: str) -> str:
    return ""


def test_a_revoked_key_loses_its_sessions_and_is_told_why(server: ThreadServer, bob: Path) -> None:
    """Its line of `authorized_edges` is still there."""
    with server.link(bob) as other, server.link() as link:
        other.open(60)
        link.open(60)
        idle = channel(server, b"m" * 16)
        assert revoke(server.home.folder, load_edge(server.home.key_file).public_key().public_bytes_raw())
        eventually(lambda: server.server.status()["sessions"] == {"bob": 1}, 60)
        with pytest.raises(ConnectionLostError, match="no longer enrolled"):
            idle.ask(m.Ping(1), 60)
        with pytest.raises(NotEnrolledError, match="was revoked"):
            link.forward_span(hidden(), None, None, keep=False)
        other.forward_span(hidden(), None, None, keep=False)
        assert other.traffic.sessions == 1
        idle.abandon()


def test_a_removed_line_ends_its_sessions_and_no_others(server: ThreadServer, bob: Path) -> None:
    with server.link(bob) as other:
        other.open(5)
        idle, link = channel(server), server.link()
        link.open(5)
        edit(server.home, remove)
        eventually(lambda: server.server.status()["sessions"] == {"bob": 1})
        with pytest.raises(ConnectionLostError, match="no longer enrolled"):
            idle.ask(m.Ping(1), 5)
        with pytest.raises(NotEnrolledError):
            link.forward_span(hidden(), None, None, keep=False)
        other.forward_span(hidden(), None, None, keep=False)
        assert other.traffic.sessions == 1
        idle.abandon()


def test_a_removed_line_cuts_a_session_in_the_middle_of_its_call(
    to_drain: ThreadServer, cloud: Served, log: Callable[[], list[dict[str, Any]]]
) -> None:
    with call_in_flight(to_drain, cloud) as held:
        edit(to_drain.home, remove)
        eventually(lambda: to_drain.server.status()["sessions"] == {})  # while it is still being computed
        assert not held.release.is_set()
        eventually(lambda: to_drain.server.status()["in_flight"] == 0)
    assert "this key is no longer enrolled" in [line.get("ending") for line in log()]
    eventually(lambda: cloud.executor.cache.used == 0)
    to_drain.drain(5)


def test_a_malformed_file_and_one_that_is_gone_for_a_moment_end_nothing(
    server: ThreadServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[AuthorizedEdges] = []
    nobody, edges = AuthorizedEdges.parse(""), server.server._edges

    def flickering() -> AuthorizedEdges:
        looks.append(nobody if len(looks) % 2 else edges())
        return looks[-1]

    def counted() -> AuthorizedEdges:
        looks.append(edges())
        return looks[-1]

    with server.link() as link:
        link.open(5)
        monkeypatch.setattr(server.server, "_edges", flickering)
        eventually(lambda: len(looks) > 6)
        monkeypatch.setattr(server.server, "_edges", counted)
        edit(server.home, lambda line: "max-sesions=2 " + line)
        seen = len(looks)
        eventually(lambda: len(looks) >= seen + 4)  # one may have begun before the edit
        link.forward_span(hidden(), None, None, keep=False)
        assert link.traffic.sessions == 1


def test_a_line_that_was_removed_while_others_could_write_the_file_is_removed_once_they_cannot(tmp_path: Path) -> None:
    home = Home(tmp_path)
    file = home.folder / "authorized_edges"
    edges = EdgesFile(home.folder)
    assert len(edges()) == 1
    file.write_text("")
    file.chmod(0o666)
    assert len(edges()) == 1  # the last good list
    file.chmod(0o644)
    assert len(edges()) == 0


def test_a_file_that_could_not_be_read_for_a_moment_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Home(tmp_path)
    edges = EdgesFile(home.folder)
    assert len(edges()) == 1
    (home.folder / "authorized_edges").write_text("")
    said: list[str] = []
    monkeypatch.setattr(worker_setup, "log", lambda event, **_: said.append(event))

    def no_descriptor(path: Path) -> AuthorizedEdges:
        raise KeyFileError(f"cannot read {path}: too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(AuthorizedEdges, "load", no_descriptor)
        assert [len(edges()) for _ in range(3)] == [1, 1, 1]
    assert said == ["authorized_edges_unreadable"]  # once
    assert len(edges()) == 0


def test_another_quota_holds_for_open_sessions_and_changes_no_result(server: ThreadServer, cloud: Served) -> None:
    with server.link() as link:
        link.open(5)
        given = hidden().requires_grad_(True)
        expected = cloud.executor.host.span(given)
        output, kept = link.forward_span(hidden(), None, None, keep=True)
        options = "max-sessions=1,max-bytes-in-flight=64MiB,weight=3,max-tokens-per-second=5000 "
        edit(server.home, lambda line: options + line)
        eventually(lambda: server.server.status()["sessions"] == {})
        gradient = link.backward_span(kept, torch.ones_like(output), hidden(), None, None)
        assert torch.equal(output, expected)
        assert torch.equal(gradient, torch.autograd.grad(expected, given, torch.ones_like(expected))[0])
        assert link.traffic.sessions == 2
        (session,) = server.server.sessions._open.values()
        quota = session.tenant.quota
        assert (quota.max_sessions, quota.max_inflight_bytes) == (1, 64 << 20)
        account = server.server._calls.engine._scheduler._tenants["alice"]
        assert (account.share.weight, account.share.positions_per_second) == (3, 5000)


@pytest.fixture
def ageing(cloud: Served, home: Home) -> Iterator[tuple[ThreadServer, list[float]]]:
    """A server whose sessions last for a minute, and what its clock shows."""
    now = [0.0]
    with ThreadServer(cloud, home, bounds=Bounds(max_session_age=60), clock=lambda: now[0]) as running:
        yield running, now


def test_a_session_ends_at_its_greatest_age_between_two_calls(
    ageing: tuple[ThreadServer, list[float]], cloud: Served
) -> None:
    server, now = ageing
    with server.link() as link:
        link.open(5)
        given = hidden().requires_grad_(True)
        expected = cloud.executor.host.span(given)
        output, kept = link.forward_span(hidden(), None, None, keep=True)
        now[0] = 59.0
        again = link.forward_span(hidden(), None, None, keep=False)[0]
        assert link.traffic.sessions == 1
        now[0] = 61.0
        eventually(lambda: server.server.status()["sessions"] == {})
        gradient = link.backward_span(kept, torch.ones_like(output), hidden(), None, None)
        assert torch.equal(output, expected)
        assert torch.equal(again, expected)
        assert torch.equal(gradient, torch.autograd.grad(expected, given, torch.ones_like(expected))[0])
        assert link.traffic.sessions == 2


def test_a_call_in_flight_at_that_age_is_answered(cloud: Served, home: Home) -> None:
    now = [0.0]
    with (
        ThreadServer(cloud, home, bounds=Bounds(max_session_age=60), clock=lambda: now[0]) as server,
        call_in_flight(server, cloud) as held,
    ):
        now[0] = 61.0
        (session,) = server.server.sessions._open.values()
        eventually(session.ending.is_set)
        held.release.set()
        held.thread.join(10)
        assert torch.equal(held.result[0], cloud.executor.host.span(hidden()))
        eventually(lambda: server.server.status()["sessions"] == {})
