"""Decode calls over a real server: what one that waits for room costs its tenant, and eviction beside it."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cloud.clouds import Home, ThreadServer
from support.cloud.sessions import Channel, channel, eventually
from support.models.tiny import HIDDEN

from isthmus.backbone.decoding.decode_pass import DecodePass
from isthmus.backbone.decoding.key_values import KeyValues
from isthmus.cloud.bounds import Bounds, EngineOptions
from isthmus.cloud.decoding.cache_pool import CacheEntry, CachePool, Key
from isthmus.cloud.decoding.decode_calls import CachePoolFull, DecodeStep, run_step
from isthmus.cloud.gateway import decode_requests
from isthmus.cloud.session.served_model import Served
from isthmus.common.errors import LocalProtocolError, MessageError, TooLateError
from isthmus.protocol import encoding, messages as m
from isthmus.protocol.encoding import pack, unpack
from isthmus.protocol.enrolment import Quota
from isthmus.protocol.tensor_codecs import Role, codec_id, encode, encode_positions

RATE, LENGTH, REFUSED = 100, 40, 5


@pytest.fixture
def place(cloud: Served, tmp_path: Path) -> Iterator[tuple[ThreadServer, Channel]]:
    home = Home(tmp_path, quota=Quota(max_tokens_per_second=RATE))
    with ThreadServer(cloud, home) as server, contextlib.closing(channel(server)) as session:
        yield server, session


def packed(message: m.Decode) -> tuple[bytes, bytearray]:
    header, buffers = pack(message)
    return header, bytearray(b"".join(buffers))


def call(number: int, start: int, length: int, *, batch: int = 1, **changes: Any) -> m.Decode:
    hidden = torch.randn(batch, length, HIDDEN, generator=torch.Generator().manual_seed(number))
    sent = encode(hidden, "fp32", Role.ACTIVATION)
    made = m.Decode(m.CallId(1, number), 0, start, (), (), sent, None, None, codec_id("fp32"))
    return dataclasses.replace(made, **changes)


def test_a_call_that_waits_for_room_is_counted_once(
    place: tuple[ThreadServer, Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, session = place
    tries, acquire = iter(range(10**6)), CachePool.acquire

    def full(self: CachePool, wanted: Any) -> list[int]:
        return [] if next(tries) < REFUSED else acquire(self, wanted)

    monkeypatch.setattr(CachePool, "acquire", full)
    assert isinstance(session.ask(call(1, 0, LENGTH), 20), m.ForwardReply)
    assert next(tries) == REFUSED + 1
    # Counted at every try, it would be far below 0 by now.
    account = server.server._calls.engine._scheduler._tenants["alice"]
    assert RATE - LENGTH <= account.budget <= RATE


class BusyPool:
    """A call that is computed has all of a server's pool, until it is over."""

    def __init__(self, server: ThreadServer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pool: CachePool = server.server._calls.caches
        self.refused, self._key = 0, (b"busy", 0)
        entry = CacheEntry("busy", KeyValues(server.served.executor.host.span), (0, 0))
        assert self.pool.acquire([(self._key, entry, self.pool.budget)]) == [0]
        acquire = CachePool.acquire

        def counting(pool: CachePool, wanted: Sequence[tuple[Key, CacheEntry, int]]) -> list[int]:
            admitted = acquire(pool, wanted)
            self.refused += len(wanted) - len(admitted)
            return admitted

        monkeypatch.setattr(CachePool, "acquire", counting)

    def end(self) -> None:
        self.pool.finish(self._key, call=1, failed=True)


@contextlib.contextmanager
def waiting_call(session: Channel, busy: BusyPool) -> Iterator[list[m.Message]]:
    """A call that finds no room; gets its answer once it is computed."""
    answers: list[m.Message] = []
    thread = threading.Thread(target=lambda: answers.append(session.ask(call(1, 0, LENGTH), 20)))
    thread.start()
    try:
        eventually(lambda: busy.refused > 0)
        yield answers
    finally:
        busy.end()
        thread.join(20)


def forward_of_another(server: ThreadServer, timeout: float) -> m.Message:
    """The answer to a forward of another session."""
    sent = call(1, 0, 4).hidden
    with contextlib.closing(channel(server, b"o" * 16)) as other:
        return other.ask(m.Forward(m.CallId(1, 1), False, sent, None, None, codec_id("fp32")), timeout)


def test_a_call_that_waits_for_room_holds_no_thread_and_no_keys_and_values(
    place: tuple[ThreadServer, Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, session = place
    busy = BusyPool(server, monkeypatch)
    with waiting_call(session, busy) as answers:
        # The server has one compute thread.
        assert isinstance(forward_of_another(server, 20), m.ForwardReply)
        assert not answers
        assert busy.pool.used == busy.pool.budget  # nothing beside the one that is computed
    assert isinstance(answers[0], m.ForwardReply)


def test_a_call_that_waited_on_a_compute_thread_would_keep_others_from_it(
    place: tuple[ThreadServer, Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, session = place
    computed: list[str] = []

    def stubborn(step: DecodeStep) -> m.Message | None:
        while True:
            with contextlib.suppress(CachePoolFull):
                answer = run_step(step)
                computed.append("waited for room")
                return answer
            time.sleep(0.01)

    def ask() -> None:
        forward_of_another(server, 20)
        computed.append("another's")

    monkeypatch.setattr(decode_requests, "run_step", stubborn)
    other = threading.Thread(target=ask)
    with waiting_call(session, BusyPool(server, monkeypatch)):
        other.start()
        eventually(lambda: server.server._calls.engine.waiting())
    other.join(20)
    assert computed == ["waited for room", "another's"]


def test_a_cache_that_goes_while_a_call_looks_at_it_is_lost_and_no_error(
    place: tuple[ThreadServer, Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, session = place
    assert isinstance(session.ask(call(1, 0, LENGTH), 20), m.ForwardReply)
    whole = KeyValues.length.fget

    def evicted(self: KeyValues) -> int:
        found: int = whole(self)  # type: ignore[misc]  # it is a property
        self.clear()  # as another compute thread does it just now
        return found

    monkeypatch.setattr(KeyValues, "length", property(evicted))
    answer = session.ask(call(2, LENGTH, 1), 20)
    assert answer == m.CacheLost(m.CallId(1, 2), 0)


def test_a_call_that_finds_no_room_ends_at_its_deadline(
    place: tuple[ThreadServer, Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, _ = place
    monkeypatch.setattr(CachePool, "acquire", lambda *_: [])
    with server.link(deadline=0.2) as link:
        link.open(5)
        with pytest.raises(TooLateError, match=r"within 0\.2 s"):
            link._keeper.ask(m.ForwardReply, call(1, 0, 4), answer_bytes=1 << 20)
        monkeypatch.undo()
        assert isinstance(link._keeper.ask(m.ForwardReply, call(1, 0, 4), answer_bytes=1 << 20), m.ForwardReply)


BEYOND = [
    (call(2, 120, 20), "a sequence of 140 tokens is longer than the 128"),
    (call(2, 1 << 31, 1), "longer than the 128"),
    (call(2, 0, 32, batch=129), "129 x 32 tokens in one call; this cloud takes at most 4096"),
    (call(2, LENGTH, 1, rows=(1,)), "row 1 of a cache that has 1"),
    (call(2, LENGTH, 1, batch=2), "2 sequences do not fit a cache of 1"),
    (call(2, LENGTH, 1, sites=3, lease=1), "there is no list 3 of sites"),
    (call(2, LENGTH, 1, hidden=encode(torch.zeros(1, 1, 33), "fp32", Role.ACTIVATION)), "[1, 1, 33] do not fit"),
    (call(2, LENGTH, 1, position_ids=encode_positions(torch.tensor([[128]]))), "position ids from 128 to 128"),
]


@pytest.mark.parametrize(("message", "said"), BEYOND, ids=[said[:20] for _, said in BEYOND])
def test_a_decode_call_beyond_a_limit_is_refused_in_one_line(
    place: tuple[ThreadServer, Channel], message: m.Decode, said: str
) -> None:
    _, session = place
    assert isinstance(session.ask(call(1, 0, LENGTH), 20), m.ForwardReply)
    answer = session.ask(message, 20)
    assert isinstance(answer, m.Status)
    assert answer.code == m.StatusCode.BAD_REQUEST
    assert said in answer.message
    assert "\n" not in answer.message
    assert isinstance(session.ask(call(3, LENGTH, 1), 20), m.ForwardReply)  # which has changed nothing


AT_THE_LIMIT = [
    call(1, 0, 1, cache=63),
    call(1, 0, 1, batch=4096, rows=(0,) * 4096),
    call(1, 0, 512, blocks=(512,)),
    call(1, 0, 8192, blocks=(1,) * 8192),
]
NO_MESSAGES = [
    (call(1, 0, 1, cache=64), "Decode.cache of 64 is refused"),
    (call(1, 0, 1, batch=4097, rows=(0,) * 4097), "Decode.rows of 4097 entries is refused"),
    (call(1, 0, 513, blocks=(513,)), "Decode.blocks of 513 is refused"),
    (call(1, 0, 8193, blocks=(1,) * 8193), "Decode.blocks of 8193 entries is refused"),
    (call(1, 0, 1, blocks=(1, 1)), "blocks of 2 tokens do not fit hidden states of 1"),
    (call(1, 0, 1, rows=(0, 0)), "2 rows of a cache do not fit hidden states of 1 sequences"),
]


@pytest.mark.parametrize("message", AT_THE_LIMIT, ids=["caches", "rows", "block", "blocks"])
def test_numbers_at_the_protocol_s_limits_are_taken(message: m.Decode) -> None:
    assert unpack(*packed(message)) == message


@pytest.mark.parametrize(("message", "said"), NO_MESSAGES, ids=[said[:25] for _, said in NO_MESSAGES])
def test_numbers_beyond_the_protocol_s_are_no_message(
    message: m.Decode, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(LocalProtocolError, match=re.escape(said)):
        pack(message)
    with monkeypatch.context() as patch:  # a sender that does not check
        patch.setattr(encoding, "check", lambda _: None)
        written = packed(message)
    with pytest.raises(MessageError, match=re.escape(said)):
        unpack(*written)


def test_a_long_prompt_lets_others_steps_in_between(
    cloud: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Home(tmp_path)
    bob, steps = home.new_edge("bob"), list[tuple[str, int]]()
    asked, run = threading.Event(), DecodePass.__call__

    def noting(self: DecodePass, calls: Any) -> Any:
        steps.append(("token" if calls[0].inputs.hidden.shape[1] == 1 else "prompt", len(calls)))
        if len(steps) == 2:
            asked.set()
            eventually(lambda: server.server._calls.engine.waiting().get("bob", 0) > 0)
        return run(self, calls)

    bounds = Bounds(engine=EngineOptions(prefill_tokens=8, compute_threads=1))
    with (
        ThreadServer(cloud, home, bounds=bounds) as server,
        contextlib.closing(channel(server)) as long,
        contextlib.closing(channel(server, b"m" * 16, bob)) as short,
    ):
        assert isinstance(short.ask(call(1, 0, 1), 20), m.ForwardReply)
        steps.clear()
        monkeypatch.setattr(DecodePass, "__call__", noting)
        prompt = threading.Thread(target=long.ask, args=(call(1, 0, 48), 20))
        prompt.start()
        assert asked.wait(10)
        assert isinstance(short.ask(call(2, 1, 1), 20), m.ForwardReply)
        prompt.join(20)
    assert len(steps) >= 6
    # It shares a pass with the next step of the prompt, or has one of its own: in any case before the last.
    place = next(at for at, (kind, calls) in enumerate(steps) if kind == "token" or calls == 2)
    assert place < len(steps) - 1
