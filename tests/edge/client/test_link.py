"""The link over a transport in memory.

Whatever breaks, the answer is that of an undisturbed call, or an error that says why not.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import torch
from support.cloud.clouds import with_info
from support.cloud.memory_cloud import (
    CUT,
    FAULTS,
    Fault,
    FaultyTransport,
    MemoryCloud,
    MemoryTransport,
    flip,
    messages,
    new_link,
    truncate,
)
from support.models.tiny import HIDDEN
from support.protocol.wire import EDGE, PIN

from isthmus.backbone.checkpoints.sources import default_cache
from isthmus.cloud.session.served_model import Served
from isthmus.common.errors import (
    CheckpointError,
    CloudFailedError,
    ConfigError,
    DiskError,
    DrainingError,
    FingerprintError,
    LocalProtocolError,
    NonFiniteError,
    NotEnrolledError,
    OverQuotaError,
    RefusedError,
    RemoteProtocolError,
    UnreachableError,
)
from isthmus.common.shutdown import Interrupted
from isthmus.edge.client import session_keeper
from isthmus.edge.client.link import Link
from isthmus.edge.codecs.wire_codecs import WireCodecs
from isthmus.protocol import messages as m
from isthmus.protocol.enrolment import Tenant
from isthmus.protocol.limits import DEFAULT_LIMITS
from isthmus.protocol.session import edge_limits
from isthmus.protocol.tensor_codecs import Role, decode, encode
from isthmus.rpc.transport import Stream, run

pytestmark = pytest.mark.usefixtures("no_waiting", "own_cache")


def hidden(seed: int = 0, rows: int = 2, length: int = 6) -> torch.Tensor:
    return torch.randn(rows, length, HIDDEN, generator=torch.Generator().manual_seed(seed))


MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
POSITIONS = torch.arange(6)[None]


def three_calls(link: Link) -> list[torch.Tensor]:
    """Two forwards, then their backwards in reverse order: the traffic of two accumulated micro-batches."""
    results, kept = [], []
    for seed in (1, 2):
        output, handle = link.forward_span(hidden(seed), MASK, POSITIONS, keep=True)
        results.append(output.clone())
        kept.append((handle, seed))
    for handle, seed in reversed(kept):
        results.append(link.backward_span(handle, hidden(seed + 10), hidden(seed), MASK, POSITIONS).clone())
    return results


@pytest.fixture
def undisturbed(shared: Served) -> list[torch.Tensor]:
    return three_calls(new_link(MemoryCloud(shared)))


# Faults on the way ----------------------------------------------------------------------------------------------------


def test_an_undisturbed_link_gives_the_spans_results(shared: Served, undisturbed: list[torch.Tensor]) -> None:
    given = hidden(1).requires_grad_(True)
    expected = shared.executor.host.span(given, MASK, POSITIONS)
    assert torch.equal(undisturbed[0], expected)
    (gradient,) = torch.autograd.grad(expected, given, hidden(11))
    assert torch.equal(undisturbed[3], gradient)


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
    transport.up = False
    link._keeper.drop()

    def sleep(seconds: float) -> None:
        no_waiting.append(seconds)
        transport.up = transport.opened == 5  # the first session, and four attempts in vain

    monkeypatch.setattr(session_keeper.time, "sleep", sleep)
    link.forward_span(hidden(), None, None, keep=False)
    assert link.traffic.retries == 4


def test_five_protocol_faults_in_a_row_surface(cloud: MemoryCloud) -> None:
    link = new_link(cloud)
    cloud.answer = lambda message: m.Pong(1, 1) if isinstance(message, m.Forward) else None
    with pytest.raises(RemoteProtocolError, match="answered Forward with Pong"):
        link.forward_span(hidden(), None, None, keep=False)
    assert len(messages(cloud, m.Forward)) == 5


def test_an_answer_to_another_call_is_not_taken(cloud: MemoryCloud) -> None:
    link = new_link(cloud)
    other = encode(hidden(), "fp32", Role.ACTIVATION)
    wrong = [m.ForwardReply(m.CallId(0, 99), other, 0, 0, 0)]
    cloud.answer = lambda message: wrong.pop() if wrong and isinstance(message, m.Forward) else None
    output, _ = link.forward_span(hidden(), None, None, keep=False)
    assert not torch.equal(output, hidden())
    assert link.traffic.retries == 1


def test_an_answer_of_another_shape_is_refused(cloud: MemoryCloud) -> None:
    link = new_link(cloud)

    def answer(message: m.Message) -> m.Message | None:
        if not isinstance(message, m.Forward):
            return None
        return m.ForwardReply(message.id, encode(hidden(rows=1), "fp32", Role.ACTIVATION), 0, 0, 0)

    cloud.answer = answer
    with pytest.raises(RemoteProtocolError, match=r"\[1, 6, 32\] instead of \[2, 6, 32\]"):
        link.forward_span(hidden(), None, None, keep=False)


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


# The activation cache -------------------------------------------------------------------------------------------------


def test_lost_activations_are_replayed(cloud: MemoryCloud, shared: Served, undisturbed: list[torch.Tensor]) -> None:
    link = new_link(cloud)
    output, kept = link.forward_span(hidden(1), MASK, POSITIONS, keep=True)
    assert torch.equal(output, undisturbed[0])
    shared.executor.cache.evict_all()
    result = link.backward_span(kept, hidden(11), hidden(1), MASK, POSITIONS)
    assert torch.equal(result, undisturbed[3])
    first, second = messages(cloud, m.Backward)
    assert first.replay is None
    assert second.replay is not None
    assert torch.equal(decode(second.replay.hidden), hidden(1))
    assert link.traffic.sessions == 1  # no new session for it


def test_after_a_reconnect_the_input_goes_along_at_once(cloud: MemoryCloud, undisturbed: list[torch.Tensor]) -> None:
    link = new_link(cloud)
    _, kept = link.forward_span(hidden(1), MASK, POSITIONS, keep=True)
    link._keeper.drop()
    result = link.backward_span(kept, hidden(11), hidden(1), MASK, POSITIONS)
    assert torch.equal(result, undisturbed[3])
    (sent,) = messages(cloud, m.Backward)
    assert sent.replay is not None


def test_a_cloud_that_loses_what_it_was_just_sent_is_at_fault(cloud: MemoryCloud) -> None:
    link = new_link(cloud)
    _, kept = link.forward_span(hidden(), None, None, keep=True)
    cloud.answer = lambda message: (
        m.Status(m.StatusCode.ACTIVATIONS_LOST, message.id, "lost") if isinstance(message, m.Backward) else None
    )
    with pytest.raises(RemoteProtocolError, match="lost a forward state"):
        link.backward_span(kept, hidden(1), hidden(), None, None)
    assert len(messages(cloud, m.Backward)) == 2


# Numbers that are none, and limits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_no_number_is_not_sent(cloud: MemoryCloud, value: float) -> None:
    link = new_link(cloud)
    bad = hidden()
    bad[1, 2, 3] = value
    with pytest.raises(NonFiniteError, match="hidden states"):
        link.forward_span(bad, None, None, keep=True)
    _, kept = link.forward_span(hidden(), None, None, keep=True)
    with pytest.raises(NonFiniteError, match="gradient"):
        link.backward_span(kept, bad, hidden(), None, None)
    assert len(messages(cloud, m.Forward)) == 1
    assert not messages(cloud, m.Backward)
    link.backward_span(kept, hidden(1), hidden(), None, None)  # the session is unharmed


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (m.StatusCode.NON_FINITE, NonFiniteError),
        (m.StatusCode.BAD_REQUEST, RefusedError),
        (m.StatusCode.OVER_QUOTA, OverQuotaError),
    ],
)
def test_a_refused_call_is_not_repeated(cloud: MemoryCloud, code: m.StatusCode, error: type[Exception]) -> None:
    link = new_link(cloud)
    cloud.answer = lambda message: (
        m.Status(code, message.id, "because\x1b[2J") if isinstance(message, m.Forward) else None
    )
    with pytest.raises(error, match=r"because\?\[2J"):  # a terminal takes nothing from it
        link.forward_span(hidden(), None, None, keep=False)
    assert len(messages(cloud, m.Forward)) == 1


def test_a_cloud_that_fails_is_asked_a_few_times(cloud: MemoryCloud, undisturbed: list[torch.Tensor]) -> None:
    failures = dict.fromkeys((m.Forward, m.Backward), session_keeper.PROTOCOL_FAULTS - 1)

    def failing(message: Any) -> m.Message | None:
        if not failures.get(type(message)):
            return None
        failures[type(message)] -= 1
        return m.Status(m.StatusCode.INTERNAL, message.id, "the span failed")

    link = new_link(cloud)
    cloud.answer = failing
    results = three_calls(link)
    assert not any(failures.values())
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(results, undisturbed, strict=True))
    assert link.traffic.retries == 2 * (session_keeper.PROTOCOL_FAULTS - 1)
    failures[m.Forward] = 99
    with pytest.raises(CloudFailedError, match=r"refused the call \(internal\): the span failed"):
        link.forward_span(hidden(), None, None, keep=False)
    assert 99 - failures[m.Forward] == session_keeper.PROTOCOL_FAULTS
    failures.clear()
    link.forward_span(hidden(), None, None, keep=False)


def test_too_many_tokens_are_refused_before_they_are_sent(cloud: MemoryCloud) -> None:
    link = new_link(cloud)
    with pytest.raises(RefusedError, match="43 x 6 tokens in one call; the cloud takes at most 256"):
        link.forward_span(hidden(rows=43), None, None, keep=False)
    assert not messages(cloud, m.Forward)


@pytest.mark.parametrize(("codec", "tolerance"), [("fp32", 0.0), ("bf16", 0.05), ("fp16", 0.01), ("int8", 0.05)])
def test_a_lossy_codec_differs_and_is_close(
    cloud: MemoryCloud, undisturbed: list[torch.Tensor], codec: str, tolerance: float
) -> None:
    link = new_link(cloud, codecs=WireCodecs.parse(codec))
    results = three_calls(link)
    for mine, exact in zip(results, undisturbed, strict=True):
        assert torch.equal(mine, exact) == (codec == "fp32")
        assert (mine - exact).norm() <= tolerance * exact.norm()


# Who is on the other side ---------------------------------------------------------------------------------------------


def test_a_codec_that_the_cloud_does_not_speak_is_a_mistake_of_the_configuration(cloud: MemoryCloud) -> None:
    cloud.served = with_info(cloud.served, codecs=("fp32",))
    with pytest.raises(ConfigError, match="does not speak the codec 'int8': choose one of fp32"):
        new_link(cloud, codecs=WireCodecs.parse("fp32,int8"))


@pytest.mark.parametrize(
    "changes",
    [{"digest": "ff" * 32}, {"plan": "1:2"}, {"span_dtype": "bf16"}, {"attn_implementation": "eager"}],
)
def test_another_model_behind_the_same_address_stops_the_run(cloud: MemoryCloud, changes: dict[str, Any]) -> None:
    link = new_link(cloud)
    cloud.served = with_info(cloud.served, **changes)
    link._keeper.drop()
    (now,) = changes.values()
    with pytest.raises(CheckpointError, match=rf"{now[:16]}.*another model.*{link.info.digest[:16]}"):
        link.forward_span(hidden(), None, None, keep=False)
    assert not messages(cloud, m.Forward)


def refuse_with(error: Exception) -> Callable[[bytes], Tenant]:
    def authorize(key: bytes) -> Tenant:
        raise error

    return authorize


def test_a_withdrawn_enrolment_stops_the_run(cloud: MemoryCloud) -> None:
    link = new_link(cloud)
    cloud.authorize = refuse_with(NotEnrolledError("not enrolled any more"))
    link._keeper.drop()
    with pytest.raises(NotEnrolledError):
        link.forward_span(hidden(), None, None, keep=False)


def test_a_draining_cloud_is_waited_for_but_not_at_first(cloud: MemoryCloud) -> None:
    link = new_link(cloud, give_up_after=3)
    cloud.authorize = refuse_with(DrainingError("drains"))
    with pytest.raises(DrainingError):
        new_link(cloud)
    link._keeper.drop()
    with pytest.raises(UnreachableError, match="drains"):
        link.forward_span(hidden(), None, None, keep=False)


def test_a_goodbye_from_the_cloud_leads_to_a_new_session(cloud: MemoryCloud) -> None:
    link = new_link(cloud)
    goodbyes = [m.Goodbye("draining")]
    cloud.answer = lambda message: goodbyes.pop() if goodbyes and isinstance(message, m.Forward) else None
    link.forward_span(hidden(), None, None, keep=False)
    assert link.traffic.sessions == 2


# The end --------------------------------------------------------------------------------------------------------------


def test_close_says_goodbye_and_is_final(cloud: MemoryCloud) -> None:
    link = new_link(cloud)
    link.close()
    link.close()
    assert messages(cloud, m.Goodbye) == [m.Goodbye("done")]
    with pytest.raises(LocalProtocolError, match="is closed"):
        link.forward_span(hidden(), None, None, keep=False)


def test_a_link_that_was_never_open_says_so(cloud: MemoryCloud) -> None:
    link = Link(MemoryTransport(cloud), PIN, EDGE, name="cloud:1")
    with pytest.raises(UnreachableError, match="never been open"):
        _ = link.info
    link.close()


def test_totals_count_both_directions(cloud: MemoryCloud) -> None:
    link = new_link(cloud)
    before = link.totals()
    link.forward_span(hidden(), None, None, keep=False)
    spent = link.totals() - before
    assert hidden().nbytes < spent.bytes_up < hidden().nbytes + 1000
    assert hidden().nbytes < spent.bytes_down < hidden().nbytes + 1000
    assert spent.calls == 1
    assert spent.cloud_s > 0
    assert spent.crypto_s > 0


def test_what_is_lost_to_a_fault_is_time_of_the_wire(
    cloud: MemoryCloud, monkeypatch: pytest.MonkeyPatch, no_waiting: list[float]
) -> None:
    transport = MemoryTransport(cloud)
    link = new_link(transport)
    transport.up = False
    link._keeper.drop()
    clock = session_keeper.time.perf_counter_ns

    def sleep(seconds: float) -> None:
        no_waiting.append(seconds)
        transport.up = sum(no_waiting) > 30

    monkeypatch.setattr(session_keeper.time, "sleep", sleep)
    monkeypatch.setattr(session_keeper.time, "perf_counter_ns", lambda: clock() + round(sum(no_waiting) * 1e9))
    before = link.totals()
    link.forward_span(hidden(), None, None, keep=False)
    assert (link.totals() - before).wire_s > 30


def test_the_largest_message_is_what_the_cloud_takes(cloud: MemoryCloud) -> None:
    small = m.SpanLimits(max_tokens_per_call=256, max_message_bytes=1000, activation_cache_bytes=1 << 20)
    cloud.served = with_info(cloud.served, limits=small)
    link = new_link(cloud)
    with pytest.raises(LocalProtocolError, match="1000 may be sent; use a smaller batch"):
        link.forward_span(hidden(), None, None, keep=False)
    assert not messages(cloud, m.Forward)
    assert link.forward_span(hidden(rows=1), None, None, keep=False)[0].shape == (1, 6, HIDDEN)
    large = dataclasses.replace(link.info, limits=dataclasses.replace(small, max_message_bytes=1 << 40))
    assert edge_limits(large).max_message_bytes == 4 << 30
    assert edge_limits(link.info) == DEFAULT_LIMITS  # answers may still be of any usual size


# Fetching -------------------------------------------------------------------------------------------------------------


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_parts_arrive_as_served_and_are_kept(cloud: MemoryCloud) -> None:
    link = new_link(cloud)
    folder = link._parts()
    assert folder.is_relative_to(default_cache())
    expected = {entry.name: entry.sha256 for entry in cloud.served.parts.listing().entries}
    assert {name: hashlib.sha256(data).digest() for name, data in files(folder).items()} == expected
    fetched = len(messages(cloud, m.Fetch))
    assert new_link(cloud)._parts() == folder
    assert len(messages(cloud, m.Fetch)) == fetched  # the cache had them all


def test_a_download_goes_on_where_it_stopped(cloud: MemoryCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.protocol.messages.MAX_FILE_CHUNK", 4096)
    transport = MemoryTransport(cloud)
    link = new_link(transport, give_up_after=1)

    def answer(message: m.Message) -> m.Message | None:
        if isinstance(message, m.Fetch) and message.name == "edge.safetensors" and message.offset >= 3 * 4096:
            transport.up = False
            return m.Goodbye("the power went")
        return None

    cloud.answer = answer
    with pytest.raises(UnreachableError):
        link._parts()
    cloud.answer, transport.up = lambda message: None, True
    cloud.seen.clear()
    folder = new_link(transport)._parts()
    offsets = [message.offset for message in messages(cloud, m.Fetch) if message.name == "edge.safetensors"]
    assert offsets[0] == 3 * 4096
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    entry = next(entry for entry in cloud.served.parts.listing().entries if entry.name == "edge.safetensors")
    assert hashlib.sha256((folder / "edge.safetensors").read_bytes()).digest() == entry.sha256


def test_a_changed_byte_is_refused_and_fetched_anew(cloud: MemoryCloud) -> None:
    link = new_link(cloud)

    def answer(message: m.Message) -> m.Message | None:
        if not isinstance(message, m.Fetch) or message.name != "edge.safetensors":
            return None
        blob = cloud.served.parts.read(message.name, message.offset)
        assert isinstance(blob, m.Blob)
        data = bytearray(blob.data)
        data[len(data) // 2] ^= 1
        return m.Blob(blob.name, blob.offset, blob.total, blob.sha256, bytes(data))

    cloud.answer = answer
    with pytest.raises(RemoteProtocolError, match=r"edge\.safetensors arrived with another hash"):
        link._parts()
    cloud.answer = lambda message: None
    assert (link._parts() / "edge.safetensors").is_file()


def test_a_piece_of_another_place_is_refused(cloud: MemoryCloud) -> None:
    link = new_link(cloud)
    cloud.answer = lambda message: (
        m.Blob(message.name, 1, 10**6, bytes(32), b"x") if isinstance(message, m.Fetch) else None
    )
    with pytest.raises(RemoteProtocolError, match="another chunk"):
        link._parts()


@pytest.mark.parametrize("name", ["authorized_keys", "modeling.py", "model.safetensors", "config.json.part"])
def test_a_file_that_is_no_part_is_refused(cloud: MemoryCloud, name: str) -> None:
    link = new_link(cloud)
    listing = m.FileList((m.FileEntry(name, 1, bytes(32)),))
    cloud.answer = lambda message: listing if isinstance(message, m.FetchList) else None
    with pytest.raises(RemoteProtocolError, match=f"offers the file '{name}'"):
        link._parts()
    assert not messages(cloud, m.Fetch)


def test_two_edges_fetch_one_after_the_other(cloud: MemoryCloud) -> None:
    first, second = new_link(cloud), new_link(MemoryCloud(cloud.served))
    others: list[Thread] = []

    def answer(message: m.Message) -> m.Message | None:
        if isinstance(message, m.Fetch) and not others:
            others.append(Thread(target=second._parts))
            others[0].start()
            others[0].join(0.3)
            assert others[0].is_alive()  # it waits for the first one
        return None

    cloud.answer = answer
    folder = first._parts()
    others[0].join(30)
    assert second._parts() == folder
    assert second.traffic.bytes_down < (folder / "edge.safetensors").stat().st_size  # it found them there


def test_a_damaged_cache_is_repaired(cloud: MemoryCloud) -> None:
    folder = new_link(cloud)._parts()
    good = files(folder)
    (folder / "config.json").write_bytes(b"{}")
    (folder / "edge.safetensors").write_bytes(good["edge.safetensors"][:-1] + b"!")
    assert files(new_link(cloud)._parts()) == good


def test_a_cache_that_cannot_be_written_is_a_disk_error(
    cloud: MemoryCloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "file"))
    with pytest.raises(DiskError, match="file"):
        new_link(cloud)._parts()
