"""gRPC's health service on the data port, as far as a load balancer needs it: `Check`.

Whoever asks has no key, so a health check counts among the calls that are not authenticated, which are limited in time,
in number, and in number from one host. `Watch` is not served: it would hold a stream for as long as a stranger likes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2

from isthmus.cloud.gateway.bounded_server import stream_handler
from isthmus.cloud.gateway.half_open import HalfOpen, accept_call, host_of
from isthmus.cloud.gateway.hang_up import HangUp, IdleConnections
from isthmus.cloud.telemetry.logs import log
from isthmus.protocol.service import SERVICE

MAX_QUESTION_BYTES = 1024
"""Largest question; it names one of two services."""


class Health:
    """Answers `Check`.

    Args:
        half_open: limits calls that are not authenticated.
        hang_up: closes the connections of those who do not take the answer.
        connections: is told which have a call.
    """

    def __init__(self, half_open: HalfOpen, hang_up: HangUp, connections: IdleConnections) -> None:
        self._half_open = half_open
        self._hang_up = hang_up
        self._connections = connections
        self._states = health.aio.HealthServicer()

    def handlers(self) -> grpc.GenericRpcHandler:
        """gRPC's handlers. `Check` is served as a stream, so that the wait for the question has a limit as well."""
        check = stream_handler(self._check)
        handlers: grpc.GenericRpcHandler = grpc.method_handlers_generic_handler(health.SERVICE_NAME, {"Check": check})
        return handlers

    async def serving(self) -> None:
        """Answer from now on that the worker serves."""
        for name in ("", SERVICE):
            await self._states.set(name, health_pb2.HealthCheckResponse.SERVING)

    async def draining(self) -> None:
        """Answer from now on that nobody should connect to this worker."""
        await self._states.enter_graceful_shutdown()

    async def _check(self, questions: AsyncIterator[bytes], context: Any) -> None:
        with self._connections.in_use(context.peer()):
            await self._answer(questions, context)

    async def _answer(self, questions: AsyncIterator[bytes], context: Any) -> None:
        try:
            async with self._half_open.place(host_of(context.peer())):
                await accept_call(context)
                raw = await anext(aiter(questions), b"")
                if len(raw) > MAX_QUESTION_BYTES:
                    await self._hang_up.abort(
                        context,
                        grpc.StatusCode.INVALID_ARGUMENT,
                        f"a question of more than {MAX_QUESTION_BYTES} bytes is refused",
                    )
                question = health_pb2.HealthCheckRequest.FromString(raw)
                answer = await self._states.Check(question, context)
                await context.write(answer.SerializeToString())
        except DecodeError:
            await self._hang_up.abort(
                context, grpc.StatusCode.INVALID_ARGUMENT, "the question is no HealthCheckRequest"
            )
        except TimeoutError:
            await self._hang_up.abort(
                context, grpc.StatusCode.DEADLINE_EXCEEDED, "the question did not come in time, or too many came"
            )
        except grpc.aio.AbortError:
            raise  # the question was refused
        except grpc.aio.BaseError as error:  # the stream broke while it was written to
            log("stream_broke", error=type(error).__name__)
        finally:
            self._hang_up.when_lingering(context)
