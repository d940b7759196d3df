"""A span cut into stages, one worker each: what a stage does with a call that goes on to the next one.

Theory of operation
    edge   Forward   -> stage 0: its layers, Forward  -> stage 1: its layers, ... ; replies come back the same way
    edge   Backward  -> stage 0: Backward -> stage 1: ... its layers' gradient -> stage 0: its layers' gradient

    A stage is a client of the next one, in a session of its own for each session that it serves, over the protocol that
    edges speak. Calls keep their numbers, so each stage has a stash entry for each call. Between stages hidden states
    and gradients cross as they are computed: the result has the bits of one worker with the whole span. The gradient
    from the edge, and the last stage's output, are passed on in the edge's own codecs.

    A session with the next stage carries the edge's tenant and weight, so that turns are shared out among tenants in
    every stage. A stage believes that of the key that it has enrolled as a stage's, and of no other.

    A stage that has lost the forward says so, and so does every stage before it: the edge sends the input again, and
    each stage computes its output anew for the next one. That is also what happens when a stage was killed: a new
    session begins with an empty stash.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from isthmus.cloud.telemetry.logs import log
from isthmus.common.errors import (
    ConnectionLostError,
    FingerprintError,
    NotEnrolledError,
    RefusedError,
    RemoteProtocolError,
    VersionError,
)
from isthmus.protocol import messages as m
from isthmus.protocol.limits import MIB
from isthmus.protocol.secure.keys import Fingerprint
from isthmus.protocol.secure.record import wipe
from isthmus.protocol.service import CLIENT_CODING, METHOD, stream_options
from isthmus.protocol.session import EdgeSession, Established, NeedSend, Received
from isthmus.protocol.tensor_codecs import codec_id

HANDSHAKE_SECONDS = 15.0
PATIENCE_SECONDS = 120.0
"""For a next stage that does not answer; then the session ends, and the edge makes the call again."""
PAUSE_FIRST, PAUSE_FACTOR, PAUSE_MOST = 0.1, 1.7, 2.0  # seconds
GOODBYE_SECONDS = 1.0

Run = Callable[[m.Message], Awaitable[m.Message | None]]
"""Has a message answered by this worker's own layers."""
Ask = Callable[[m.Message], Awaitable[m.Message]]
"""Has a message answered by the next stage."""

_FAULTS = (
    grpc.aio.BaseError, asyncio.InvalidStateError, TimeoutError, ConnectionLostError, RemoteProtocolError,
    FingerprintError, VersionError, RefusedError, NotEnrolledError,
)  # fmt: skip
_NO_SITES = (
    "this cloud runs its layers in several stages (`serve --pipeline`), which take no adapters inside them: adapt the "
    "edge's own layers, or ask the cloud's owner to serve without --pipeline"
)
_NO_ADAPTERS = (
    "this cloud runs its layers in several stages (`serve --pipeline`) and plugs no adapter in: ask its owner to serve "
    "without --pipeline"
)


async def answer(message: m.Message, run: Run, ask: Ask, codec: str) -> m.Message | None:
    """Answer a message by this worker's layers and the stages behind it.

    Args:
        message: from the edge, or from the stage before.
        run: this worker's own layers.
        ask: the next stage.
        codec: how hidden states cross between stages; one that changes nothing.
    """
    match message:
        case m.Forward():
            return await _forward(message, run, ask, codec)
        case m.Backward():
            return await _backward(message, run, ask, codec)
        case m.Sites() | m.Lease():
            return m.Status(m.StatusCode.BAD_REQUEST, None, _NO_SITES)
        case m.Put() | m.PlugIn():
            return m.Status(m.StatusCode.BAD_REQUEST, None, _NO_ADAPTERS)
        case _:
            return await run(message)


async def _forward(message: m.Forward, run: Run, ask: Ask, codec: str) -> m.Message | None:
    own = await run(dataclasses.replace(message, reply_codec=codec_id(codec)))
    if not isinstance(own, m.ForwardReply):
        return own
    reply = await ask(dataclasses.replace(message, hidden=own.hidden))
    return _with_time(reply, own)


async def _backward(message: m.Backward, run: Run, ask: Ask, codec: str) -> m.Message | None:
    onward = message
    if message.replay is not None:  # somebody has lost the forward: the next stage gets its input again as well
        again = message.replay
        forward = m.Forward(
            message.id, True, again.hidden, again.attention_mask, again.position_ids, codec_id(codec), message.sites
        )
        own = await run(forward)
        if not isinstance(own, m.ForwardReply):
            return own
        onward = dataclasses.replace(message, replay=dataclasses.replace(again, hidden=own.hidden))
    reply = await ask(dataclasses.replace(onward, reply_codec=codec_id(codec)))
    if not isinstance(reply, m.BackwardReply) or reply.gradient is None:
        return reply
    mine = await run(dataclasses.replace(message, gradient=reply.gradient))
    return _with_time(mine, reply)


def _with_time(reply: m.Message | None, other: m.ForwardReply | m.BackwardReply) -> m.Message | None:
    """A reply with the computing time of both halves."""
    if isinstance(reply, m.ForwardReply | m.BackwardReply):
        return dataclasses.replace(reply, compute_ns=reply.compute_ns + other.compute_ns)
    return reply


@dataclass(frozen=True, slots=True)
class NextStage:
    """Where the next stage is, and how to speak with it.

    Args:
        target: its `host:port`.
        pin: fingerprint of the cloud's root key.
        key: this worker's key, which the next one has enrolled.
        codec: how hidden states cross; one that changes nothing.
    """

    target: str
    pin: Fingerprint
    key: Ed25519PrivateKey
    codec: str

    @asynccontextmanager
    async def session(self, account: m.Account, *, interactive: bool) -> AsyncIterator[StageSession]:
        """A session with it for a tenant, opened when it is needed and again when it has broken."""
        session = StageSession(self, account, interactive=interactive)
        try:
            yield session
        finally:
            await session.close()


class StageSession:
    """One session with the next stage. One question at a time."""

    def __init__(self, stage: NextStage, account: m.Account, *, interactive: bool) -> None:
        self._stage = stage
        self._attach = m.Attach(os.urandom(m.LINK_BYTES), interactive, account=account)
        self._stream: _Stream | None = None
        self._body = bytearray()  # of the last answer, whose tensors are views of it

    async def answer(self, message: m.Message, run: Run) -> m.Message | None:
        """See the function `answer`."""
        return await answer(message, run, self.ask, self._stage.codec)

    async def ask(self, message: m.Message) -> m.Message:
        """Ask until there is an answer; its tensors are good until the next question.

        Raises:
            ConnectionLostError: the next stage has stayed away for too long.
        """
        wipe(self._body)
        deadline, pause = None, PAUSE_FIRST
        while True:
            try:
                if self._stream is None:
                    self._stream = await _Stream.open(self._stage, self._attach)
                received = await self._stream.ask(message)
                self._body = received.body
                return received.message
            except _FAULTS as error:
                await self._drop()
                reason = type(error).__name__
            now = time.monotonic()
            deadline = deadline or now + PATIENCE_SECONDS
            if now >= deadline:
                log("stage_stayed_away", logging.ERROR, stage=self._stage.target, error=reason)
                raise ConnectionLostError(f"the stage at {self._stage.target} stayed away ({reason})")
            log("stage_broke", logging.WARNING, stage=self._stage.target, error=reason)
            await asyncio.sleep(pause)
            pause = min(pause * PAUSE_FACTOR, PAUSE_MOST)

    async def close(self) -> None:
        """Say goodbye, and overwrite what was received last."""
        wipe(self._body)
        if self._stream is not None:
            await self._stream.leave()
            await self._drop()

    async def _drop(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            await stream.close()


class _Stream:
    """A sealed session over one gRPC stream, seen from the client, on an event loop."""

    def __init__(self, stage: NextStage) -> None:
        options = [
            *stream_options(MIB),
            ("grpc.enable_retries", 0),
            ("grpc.use_local_subchannel_pool", 1),
        ]
        self._channel = grpc.aio.insecure_channel(stage.target, options)  # the session is sealed
        self._call: Any = self._channel.stream_stream(METHOD, **CLIENT_CODING)()
        self._session = EdgeSession(pin=stage.pin, edge_key=stage.key)

    @classmethod
    async def open(cls, stage: NextStage, attach: m.Attach) -> _Stream:
        """Handshake and `Attach`, in limited time. Raises one of `_FAULTS`."""
        stream = cls(stage)
        try:
            async with asyncio.timeout(HANDSHAKE_SECONDS):
                await stream._call.write(stream._session.start())
                while not isinstance(event := stream._session.receive(await stream._read()), Established):
                    if not isinstance(event, NeedSend):
                        raise RemoteProtocolError("the next stage left the handshake's order")
                    for frame in event.frames:
                        await stream._call.write(frame)
                attached = (await stream.ask(attach)).message
                if not isinstance(attached, m.Status) or attached.code != m.StatusCode.OK:
                    raise RefusedError("the next stage takes no session")
        except BaseException:
            await stream.close()
            raise
        return stream

    async def ask(self, message: m.Message) -> Received:
        """Send a message and wait for the answer. Raises one of `_FAULTS`."""
        for frame in self._session.send(message):
            await self._call.write(frame)
        while True:
            event = self._session.receive(await self._read())
            if isinstance(event, Received):
                if isinstance(event.message, m.Goodbye):
                    raise ConnectionLostError("the next stage ended the session")
                return event

    async def leave(self) -> None:
        """Say goodbye, where that is still possible."""
        try:
            async with asyncio.timeout(GOODBYE_SECONDS):
                for frame in self._session.send(m.Goodbye("done")):
                    await self._call.write(frame)
                await self._call.done_writing()
        except _FAULTS:
            pass  # it is over either way

    async def close(self) -> None:
        """End it and overwrite its keys."""
        self._session.close()
        self._call.cancel()
        await self._channel.close()

    async def _read(self) -> bytes:
        frame = await self._call.read()
        if frame is grpc.aio.EOF:
            raise ConnectionLostError("the next stage closed the stream")
        return bytes(frame)
