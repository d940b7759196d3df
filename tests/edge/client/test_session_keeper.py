"""The session of a link over a transport in memory: faults on the way, repeated calls, waits, and being asked to stop.

Whatever breaks, the answer is that of an undisturbed call, or an error that says why not.
"""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from threading import Event

import pytest
import torch
from support.cloud.memory_cloud import (
    CUT,
    FAULTS,
    Fault,
    FaultyTransport,
    MemoryCloud,
    MemoryTransport,
    StillTime,
    comes_back,
    flip,
    messages,
    new_link,
    truncate,
)
from support.cloud.span_calls import hidden, three_calls
from support.models.tiny import HIDDEN
from support.protocol.wire import EDGE, PIN

from isthmus.common.errors import FingerprintError, RemoteProtocolError, UnreachableError
from isthmus.common.shutdown import Interrupted
from isthmus.edge.client import link as link_module, session_keeper
from isthmus.edge.client.link import Link
from isthmus.edge.client.session_keeper import Wait
from isthmus.protocol import messages as m
from isthmus.rpc.transport import Stream, run

pytestmark = pytest.mark.usefixtures("no_waiting", "cache_folder")


# Faults on the way ----------------------------------------------------------------------------------------------------


# Frames 1-2 (up) and 1-2 (down) are the handshake, 3 is Attach and its answer, 4-7 the four calls.
@pytest.mark.parametrize("place", range(4, 8))
@pytest.mark.parametrize("way", ["send", "receive"])
@pytest.mark.parametrize("kind", [name for name in FAULTS if name != "repeat"])
def test_a_spoilt_frame_changes_no_result(
    cloud: MemoryCloud, undisturbed: list[torch.Tensor], way: str, place: int, kind: str
) -> None:
    transport = FaultyTransport(MemoryTransport(cloud), {(way, place): FAULTS[kind]})
    link = new_link(transport)
    results = three_calls(link)
    assert transport.hit == [(way, place)]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(results, undisturbed, strict=True))
    assert link.traffic.retries == 1
    assert link.traffic.sessions == 2
    assert len(set(cloud.sessions)) == 2  # a new session, hence new keys
    assert link.traffic.calls == 4


@pytest.mark.parametrize("way", ["send", "receive"])
def test_a_repeated_frame_is_never_taken_for_the_next(
    cloud: MemoryCloud, undisturbed: list[torch.Tensor], way: str
) -> None:
    link = new_link(FaultyTransport(MemoryTransport(cloud), {(way, 4): FAULTS["repeat"]}))
    results = three_calls(link)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(results, undisturbed, strict=True))
    assert link.traffic.retries == 1


def change_version(frame: bytes) -> list[bytes]:
    """The version byte of a sealed frame, or of a hello (where it comes first)."""
    place = frame.find(b"ISTH") + 5
    return [frame[:place] + bytes([frame[place] ^ 2]) + frame[place + 1 :]]


@pytest.mark.parametrize("way", ["send", "receive"])
def test_a_changed_version_byte_ends_one_session_only(
    cloud: MemoryCloud, undisturbed: list[torch.Tensor], way: str
) -> None:
    link = new_link(FaultyTransport(MemoryTransport(cloud), {(way, 5): change_version}))
    results = three_calls(link)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(results, undisturbed, strict=True))
    assert link.traffic.sessions == 2


def test_a_changed_hello_of_a_reconnect_is_tried_again_a_few_times(cloud: MemoryCloud) -> None:
    transport = FaultyTransport(MemoryTransport(cloud), {("receive", 4): flip})
    link = new_link(transport)
    link._keeper.drop()
    link.forward_span(hidden(), None, None, keep=False)
    assert transport.hit == [("receive", 4)]  # the hello of the second session
    link._keeper.drop()
    transport.faults = {("receive", place): flip for place in range(1, 99)}
    opened = transport.counts["send"]
    with pytest.raises(FingerprintError):
        link.forward_span(hidden(), None, None, keep=False)
    assert transport.counts["send"] - opened == session_keeper.PROTOCOL_FAULTS


HANDSHAKE = [("send", 1), ("receive", 1), ("send", 2), ("receive", 2), ("send", 3), ("receive", 3)]


@pytest.mark.parametrize("fault", [CUT, flip, truncate])
@pytest.mark.parametrize("place", HANDSHAKE)
def test_a_handshake_that_breaks_is_made_again(cloud: MemoryCloud, place: tuple[str, int], fault: Fault) -> None:
    transport = FaultyTransport(MemoryTransport(cloud), {place: fault})
    if fault is flip and place in {("send", 1), ("receive", 1)}:
        # A hello that was changed cannot be told from another server's: nothing is tried again.
        with pytest.raises(FingerprintError):
            new_link(transport)
        return
    link = new_link(transport)
    assert transport.hit == [place]
    assert link.traffic.sessions == 1
    assert link.forward_span(hidden(), None, None, keep=False)[0].shape == (2, 6, HIDDEN)


def test_many_faults_in_one_run_change_no_result(cloud: MemoryCloud, undisturbed: list[torch.Tensor]) -> None:
    places = {("send", n): FAULTS[name] for n, name in zip(range(4, 26, 4), ["cut", "flip", "lose"] * 2, strict=True)}
    transport = FaultyTransport(MemoryTransport(cloud), places)
    results = three_calls(new_link(transport))
    assert len(transport.hit) >= 3
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(results, undisturbed, strict=True))


def test_calls_keep_their_numbers_and_attempts_grow(cloud: MemoryCloud) -> None:
    transport = FaultyTransport(MemoryTransport(cloud), {("receive", 4): CUT, ("receive", 9): CUT})
    link = new_link(transport)
    link.begin_step(17)
    link.forward_span(hidden(), None, None, keep=False)
    link.forward_span(hidden(), None, None, keep=False)
    ids = [message.id for message in messages(cloud, m.Forward)]
    assert ids == [m.CallId(17, 1, 0), m.CallId(17, 1, 1), m.CallId(17, 2, 0), m.CallId(17, 2, 1)]
    links = {message.link for message in messages(cloud, m.Attach)}
    assert len(links) == 1  # so that the cloud ends the broken session


def test_pauses_grow_and_the_link_gives_up_in_time(cloud: MemoryCloud, no_waiting: list[float]) -> None:
    transport = MemoryTransport(cloud)
    link = new_link(transport, give_up_after=30)
    transport.up = False
    link._keeper.drop()
    with pytest.raises(UnreachableError, match=r"cloud:1 stayed away for 30 s \(the cloud is down\)"):
        link.forward_span(hidden(), None, None, keep=False)
    assert sum(no_waiting) == pytest.approx(30)
    assert 0.05 <= no_waiting[0] <= 0.1
    assert 10 < transport.opened < 20
    assert max(no_waiting) <= 0.25  # between two looks at whether the wait is still wanted
    transport.up = True
    assert link.forward_span(hidden(), None, None, keep=False)[0].shape == (2, 6, HIDDEN)  # a later call may succeed


def test_a_first_connection_counts_its_time_from_the_start(cloud: MemoryCloud, no_waiting: list[float]) -> None:
    transport = MemoryTransport(cloud)
    transport.up = False
    with pytest.raises(UnreachableError, match="for 5 s"):
        new_link(transport)
    assert sum(no_waiting) == pytest.approx(5)


def test_a_cloud_that_comes_back_is_found_again(
    cloud: MemoryCloud, monkeypatch: pytest.MonkeyPatch, no_waiting: list[float]
) -> None:
    transport = MemoryTransport(cloud)
    link = new_link(transport)
    # The first session, and four attempts in vain.
    comes_back(transport, lambda: transport.opened == 5, no_waiting, monkeypatch)
    link._keeper.drop()
    link.forward_span(hidden(), None, None, keep=False)
    assert link.traffic.retries == 4


def test_a_wait_is_told_while_it_lasts(cloud: MemoryCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    still = StillTime()
    for module in (session_keeper, link_module):
        monkeypatch.setattr(module, "time", still)
    transport = MemoryTransport(cloud)
    link = new_link(transport, give_up_after=30)
    told: list[Wait | None] = []
    asked: list[Wait | None] = []

    def observe(question: str, phase: str) -> None:
        if question == "forward":
            asked.append(link.wait)

    def sleep(seconds: float) -> None:
        still.pauses.append(seconds)
        told.append(link.wait)
        transport.up = still.time() > 1008

    monkeypatch.setattr(still, "sleep", sleep)
    link.observer = observe
    transport.up = False
    link._keeper.drop()
    link.forward_span(hidden(), None, None, keep=False)
    early = told.index(next(wait for wait in told if wait is not None))
    assert sum(still.pauses[:early]) < 2 <= sum(still.pauses[: early + 1])  # it may be mended before
    late = [wait for wait in told[early:] if wait is not None]
    assert len(late) == len(told) - early
    assert {(wait.since, round(wait.until), wait.reason) for wait in late} == {(1000, 1030, "the cloud is down")}
    assert link.wait is None
    assert set(asked) == {None}  # from the session on, however long the call takes
    transport.up = False
    link._keeper.drop()
    monkeypatch.setattr(still, "sleep", still.pauses.append)
    with pytest.raises(UnreachableError):
        link.forward_span(hidden(), None, None, keep=False)
    assert link.wait is not None  # it was given up, and nothing has answered since


def test_five_protocol_faults_in_a_row_surface(cloud: MemoryCloud) -> None:
    link = new_link(cloud)
    cloud.answer = lambda message: m.Pong(1, 1) if isinstance(message, m.Forward) else None
    with pytest.raises(RemoteProtocolError, match="answered Forward with Pong"):
        link.forward_span(hidden(), None, None, keep=False)
    assert len(messages(cloud, m.Forward)) == 5


# Being asked to stop --------------------------------------------------------------------------------------------------


def test_a_wait_for_a_cloud_that_is_away_ends_when_nobody_wants_it(cloud: MemoryCloud, no_waiting: list[float]) -> None:
    transport = MemoryTransport(cloud)
    link = new_link(transport, give_up_after=600)
    transport.up = False
    link._keeper.drop()

    def check() -> None:
        if sum(no_waiting) > 20:
            raise Interrupted

    link.watch(check)
    with pytest.raises(Interrupted):
        link.forward_span(hidden(), None, None, keep=False)
    assert 20 < sum(no_waiting) < 21
    link.watch(lambda: None)
    transport.up = True
    assert link.forward_span(hidden(), None, None, keep=False)[0].shape == (2, 6, HIDDEN)


@pytest.mark.parametrize("interrupts", [True, False])
def test_an_interrupt_just_as_a_session_opens_leaves_none_at_the_cloud(cloud: MemoryCloud, interrupts: bool) -> None:
    link = Link(MemoryTransport(cloud), PIN, EDGE, name="cloud:1")
    attached = Event()

    def attaches(question: str, phase: str) -> None:
        if (question, phase) == ("attach", "idle"):
            attached.set()

    def check() -> None:
        assert attached.wait(10)
        run(asyncio.sleep(0))  # the opening is over, and the thread that waits for it does not know yet
        if interrupts:
            raise KeyboardInterrupt

    link.observer = attaches
    link.watch(check)
    with pytest.raises(KeyboardInterrupt) if interrupts else nullcontext():
        link.open(5)
    assert [stream.is_open for stream in cloud.streams] == [not interrupts]
    link.watch(lambda: None)
    link.forward_span(hidden(), None, None, keep=False)  # a later call opens another
    assert len(cloud.streams) == 1 + interrupts
    link.close()
    assert not any(stream.is_open for stream in cloud.streams)


def test_a_wait_for_an_answer_ends_when_nobody_wants_it(cloud: MemoryCloud) -> None:
    waiting, given_up = Event(), Event()

    class Slow(MemoryTransport):
        """A cloud that never sends what is asked for once a test says so."""

        async def open(self) -> Stream:
            stream = await super().open()
            receive = stream.receive

            async def wait() -> bytes:
                if not slow:
                    return await receive()
                waiting.set()
                try:
                    await asyncio.Event().wait()
                finally:
                    given_up.set()
                raise AssertionError("nobody sets it")

            stream.receive = wait  # type: ignore[method-assign]  # the test's own
            return stream

    slow = False
    link = new_link(Slow(cloud), call_timeout=60)

    def check() -> None:
        if waiting.is_set():
            raise Interrupted

    slow = True
    link.watch(check)
    with pytest.raises(Interrupted):
        link.forward_span(hidden(), None, None, keep=False)
    assert given_up.wait(10)
    link.close()  # the question is half answered: there is nothing to say goodbye to
    assert not messages(cloud, m.Goodbye)


def test_the_clouds_peak_memory_is_not_waited_for(cloud: MemoryCloud, no_waiting: list[float]) -> None:
    transport = MemoryTransport(cloud)
    link = new_link(transport, give_up_after=600)
    assert link.cloud_peak_bytes() is not None
    transport.up = False
    link._keeper.drop()
    assert link.cloud_peak_bytes() is None
    assert sum(no_waiting) == pytest.approx(5)
    transport.up = True
    cloud.answer = lambda message: m.Status(m.StatusCode.INTERNAL, None, "no") if isinstance(message, m.Ping) else None
    assert link.cloud_peak_bytes() is None
