"""Connections whose peer does not take the end of a call are closed, once it has had its time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from ipaddress import ip_address
from typing import Any

import pytest
from support.cloud.clouds import Home, ThreadServer
from support.cloud.sessions import channel, eventually, hidden

from isthmus.cloud.bounds import Bounds
from isthmus.cloud.gateway.hang_up import Address, HangUp, address_of, surplus
from isthmus.cloud.session.served_model import Served
from isthmus.common.errors import NotEnrolledError
from isthmus.protocol import messages as m
from isthmus.protocol.limits import TransferTimeout
from isthmus.protocol.tensor_codecs import Role, codec_id, encode


def test_a_connection_is_closed_after_what_its_session_may_have_in_transit(
    cloud: Served, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[float] = []
    original = HangUp.when_lingering

    def noted(self: HangUp, context: Any, in_transit: float = 0.0) -> None:
        given.append(in_transit)
        original(self, context, in_transit)

    monkeypatch.setattr(HangUp, "when_lingering", noted)
    bounds = Bounds(transfer=TransferTimeout(60, 1), linger_seconds=0.1)
    with ThreadServer(cloud, home, bounds=bounds) as server:
        with pytest.raises(NotEnrolledError):
            channel(server, key=home.new_edge("stranger", enrolled=False))
        eventually(lambda: bool(given))
        assert not any(given)
        given.clear()
        edge = channel(server)
        edge.ask(forward_of_the_model(), 20)
        edge.abandon()
        eventually(lambda: bool(given))
        assert given[-1] > 60


def forward_of_the_model() -> m.Forward:
    payload = encode(hidden(), "fp32", Role.ACTIVATION)
    return m.Forward(m.CallId(1, 1), False, payload, None, None, codec_id("fp32"))


@pytest.mark.parametrize("in_transit", [0.0, 30.0])
def test_a_call_has_to_be_gone_by_then(monkeypatch: pytest.MonkeyPatch, in_transit: float) -> None:
    async def run() -> list[float]:
        loop = asyncio.get_running_loop()
        delays: list[float] = []

        class Context:
            def peer(self) -> str:
                return "ipv4:127.0.0.1:5000"

            def add_done_callback(self, callback: Callable[[Any], None]) -> None:
                callback(self)

        def call_later(delay: float, *_: Any) -> asyncio.TimerHandle:
            delays.append(delay)
            return loop.call_at(loop.time() + 3600, int)

        monkeypatch.setattr(loop, "call_later", call_later)
        HangUp(2.0).when_lingering(Context(), in_transit)
        return delays

    assert asyncio.run(run()) == [2.0 + in_transit]


@pytest.mark.parametrize(
    ("peer", "host", "port"),
    [
        ("ipv4:10.0.0.1:5000", "10.0.0.1", 5000),
        ("ipv6:%5B2001:db8::1%5D:5000", "2001:db8::1", 5000),
        ("ipv6:%5Bfe80::1%25eth0%5D:5000", "fe80::1", 5000),
        ("ipv6:[::ffff:10.0.0.1]:5000", "10.0.0.1", 5000),
    ],
)
def test_a_peers_address(peer: str, host: str, port: int) -> None:
    assert address_of(peer) == (ip_address(host), port)


def test_the_host_with_most_connections_loses_its_oldest() -> None:
    def of(host: str, *ports: int) -> list[Address]:
        return [(ip_address(host), port) for port in ports]

    crowd, few, v6 = of("10.0.0.1", 1, 2, 3, 4), of("10.0.0.2", 5), [*of("2001:db8::1", 6, 7), *of("2001:db8::2", 8)]
    idle = [*few, *crowd, *v6]
    assert surplus(idle, 1) == crowd[:1]
    assert surplus(idle, 4) == [crowd[0], crowd[1], v6[0], crowd[2]]  # an IPv6 network counts as one host
    assert few[0] not in surplus(idle, 5)
