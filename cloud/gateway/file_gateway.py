"""A gateway that answers for files alone: what other workers of a cloud fetch where no span is served."""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import grpc
import grpc.aio

from isthmus.cloud.bounds import REVIEW_SECONDS, Bounds
from isthmus.cloud.gateway.admission import Admission
from isthmus.cloud.gateway.bounded_server import bind, bounded_server, stream_handler
from isthmus.cloud.gateway.half_open import HalfOpen
from isthmus.cloud.gateway.hang_up import HangUp
from isthmus.cloud.gateway.open_sessions import OpenSession, Sessions
from isthmus.cloud.gateway.stream import SealedStream
from isthmus.cloud.session.file_store import FileStore
from isthmus.cloud.telemetry.logs import log
from isthmus.cloud.telemetry.metrics import Metrics
from isthmus.common.errors import IsthmusError, MessageError, RemoteProtocolError, VersionError
from isthmus.protocol import messages as m
from isthmus.protocol.enrolment import AuthorizedEdges
from isthmus.protocol.limits import MIB, Limits
from isthmus.protocol.secure.keys import WorkerIdentity
from isthmus.protocol.service import METHOD, SERVER_CODING
from isthmus.protocol.session import Oversized
from isthmus.protocol.tensor_codecs import ACTIVATION_CODECS

MESSAGE_BYTES = m.MAX_FILE_CHUNK + MIB


class FileGateway:
    """Serves file sets to enrolled workers.

    Args:
        model: the model's name.
        digest: SHA-256 (hex) of the model.
        stores: make the files, by set.
        identity: returns a key and its certificate; called at every handshake.
        edges: returns who is enrolled; called at every handshake and every review.
        bounds: limits on what others can make it hold.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        model: str,
        digest: str,
        stores: Mapping[m.FileSet, Callable[[], FileStore | m.Status]],
        identity: Callable[[], WorkerIdentity],
        edges: Callable[[], AuthorizedEdges],
        *,
        bounds: Bounds | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stores, self._bounds, self._edges, self._clock = stores, bounds or Bounds(), edges, clock
        limits = m.SpanLimits(1, MESSAGE_BYTES, 0)
        version = importlib.metadata.version("isthmus")
        info = m.SessionInfo(
            "", model, digest, "files", 1, "0:1", 1, "none", "fp32", ACTIVATION_CODECS, limits, version, ""
        )
        self._metrics = Metrics()
        self._sessions = Sessions(self._metrics)
        half_open = HalfOpen(self._bounds)
        self._admission = Admission(info, identity, edges, self._sessions, self._metrics, half_open, clock)
        self._hang_up = HangUp(self._bounds.linger_seconds)

    async def start(self, listen: str) -> int:
        """Listen on `host:port` and return the port. Raises PortInUseError."""
        server = bounded_server(self._bounds)
        _, service, method = METHOD.split("/")
        session = stream_handler(self._session, **SERVER_CODING)
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, {method: session})])
        port = bind(server, listen)
        await server.start()
        self._server = server  # grpc.aio ends a server that nobody holds
        self._reviewing = asyncio.create_task(self._review(), name="review of sessions")
        return port

    async def _session(self, frames: AsyncIterator[bytes], context: Any) -> None:
        """One stream: the handshake, then questions until the worker ends it."""
        try:
            protocol = self._admission.protocol(Limits(max_message_bytes=MESSAGE_BYTES))
        except IsthmusError as error:  # gRPC would send its text, which has a path of this machine
            log("no_certificate", logging.ERROR, error=str(error))
            await self._hang_up.abort(context, grpc.StatusCode.UNAVAILABLE, "there is no certificate to show")
            return
        stream = SealedStream(protocol, frames, context, self._metrics, self._bounds.transfer, self._clock)
        try:
            session = await self._admission.admit(protocol, stream, context)
            if session is not None:
                try:
                    await self._converse(stream, session)
                finally:
                    self._sessions.leave(session)
        except (RemoteProtocolError, VersionError) as error:
            self._admission.offended(protocol)
            log("protocol_error", error=str(error))
            await self._hang_up.abort(context, grpc.StatusCode.INVALID_ARGUMENT, "the session's rules were broken")
        except grpc.aio.BaseError as error:  # the stream broke while it was written to
            log("stream_broke", error=type(error).__name__)
        except Exception as error:  # noqa: BLE001  # whatever it is, gRPC would send its text in the clear
            log("session_failed", logging.ERROR, error=type(error).__name__)
            await self._hang_up.abort(context, grpc.StatusCode.INTERNAL, "the session failed")
        finally:
            protocol.close()

    async def _review(self) -> None:
        """End the sessions of keys that are not enrolled any more, and those that are too old, again and again.

        Another name alone ends none: the controller numbers the keys anew whenever one comes or goes.
        """
        while True:
            await asyncio.sleep(REVIEW_SECONDS)
            edges, max_age = self._edges(), self._bounds.max_session_age
            self._sessions.review(edges, self._clock(), max_age, names_matter=False)

    async def _converse(self, stream: SealedStream, session: OpenSession) -> None:
        while True:
            received = await stream.receive(session.ending)
            if received is None:
                if session.notice is not None:
                    await stream.send(session.notice)
                return
            if isinstance(received, Oversized):
                raise MessageError("a question that is longer than a file's chunk came")
            message = received.message
            if isinstance(message, m.Goodbye):
                return
            await stream.send(await asyncio.to_thread(self._answer, message))

    def _answer(self, message: m.Message) -> m.Message:
        if not isinstance(message, m.FetchList | m.Fetch):
            return m.Status(m.StatusCode.BAD_REQUEST, None, "only files are to be had here")
        make = self._stores.get(message.file_set)
        if make is None:
            return m.Status(m.StatusCode.BAD_REQUEST, None, "there are no such files here")
        store = make()
        if isinstance(store, m.Status):
            return store
        return store.listing() if isinstance(message, m.FetchList) else store.read(message.name, message.offset)
