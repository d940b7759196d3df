"""gRPC's health service: few bytes, no watching, and a peer that goes away is no failure."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2
from support.cloud.clouds import ThreadServer
from support.cloud.sessions import status_of_call

from isthmus.cloud.bounds import Bounds
from isthmus.cloud.gateway.half_open import HalfOpen
from isthmus.cloud.gateway.hang_up import HangUp, IdleConnections
from isthmus.cloud.gateway.health import MAX_QUESTION_BYTES, Health
from isthmus.experiments.rigs.abuse.stranger import CHECK, WATCH
from isthmus.protocol.service import SERVICE

QUESTION = health_pb2.HealthCheckRequest(service=SERVICE).SerializeToString()


def test_health_is_asked_in_few_bytes_and_is_not_watched(server: ThreadServer) -> None:
    def question(name: str) -> bytes:
        return health_pb2.HealthCheckRequest(service=name).SerializeToString()

    assert status_of_call(server, CHECK, question(SERVICE))[0] == "OK"
    assert status_of_call(server, CHECK, question("a" * (MAX_QUESTION_BYTES - 3)))[0] == "NOT_FOUND"
    assert status_of_call(server, CHECK, question("a" * MAX_QUESTION_BYTES))[0] == "INVALID_ARGUMENT"
    assert status_of_call(server, CHECK, b"\xff" * 9)[0] == "INVALID_ARGUMENT"
    assert status_of_call(server, WATCH, question(""))[0] == "UNIMPLEMENTED"


class ResetContext:
    """A grpc.aio context whose peer resets the stream while the answer is written."""

    def peer(self) -> str:
        return "ipv4:127.0.0.1:5000"

    def add_done_callback(self, _: Callable[[Any], None]) -> None:
        pass

    async def send_initial_metadata(self, _: Any) -> None:
        pass

    async def write(self, _: bytes) -> None:
        raise grpc.aio.InternalError("Failed grpc_call_start_batch")


def test_who_resets_a_stream_while_health_is_answered_is_no_failure(
    log: Callable[[], list[dict[str, Any]]],
) -> None:
    connections = IdleConnections(1)

    async def question() -> AsyncIterator[bytes]:
        assert list(connections._used.values()) == [1]  # a check is a call: its connection is not idle
        yield QUESTION

    async def run() -> None:
        half_open = HalfOpen(Bounds())
        health = Health(half_open, HangUp(3600), connections)
        await health.serving()
        await health._check(question(), ResetContext())
        assert len(half_open) == 0
        assert not connections._used

    asyncio.run(run())
    assert [line["error"] for line in log() if line["event"] == "stream_broke"] == ["InternalError"]
