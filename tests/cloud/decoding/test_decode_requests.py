"""Decode calls over a real server: what one that waits for room costs its tenant, and eviction beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cloud.clouds import Home, ThreadServer
from support.cloud.sessions import Channel, channel
from support.models.tiny import HIDDEN

from isthmus.backbone.decoding.key_values import KeyValues
from isthmus.cloud.decoding.cache_pool import CachePool
from isthmus.cloud.session.served_model import Served
from isthmus.protocol import messages as m
from isthmus.protocol.enrolment import Quota
from isthmus.protocol.tensor_codecs import Role, codec_id, encode

RATE, LENGTH, REFUSED = 100, 40, 5


@pytest.fixture
def place(cloud: Served, tmp_path: Path) -> Iterator[tuple[ThreadServer, Channel]]:
    home = Home(tmp_path, quota=Quota(max_tokens_per_second=RATE))
    with ThreadServer(cloud, home) as server, contextlib.closing(channel(server)) as session:
        yield server, session


def call(number: int, start: int, length: int) -> m.Decode:
    hidden = torch.randn(1, length, HIDDEN, generator=torch.Generator().manual_seed(number))
    sent = encode(hidden, "fp32", Role.ACTIVATION)
    return m.Decode(m.CallId(1, number), 0, start, (), (), sent, None, None, codec_id("fp32"))


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
