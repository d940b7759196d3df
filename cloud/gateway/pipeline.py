"""A span cut into stages, one worker each: what a stage does with a call that goes on to the next one.

Theory of operation
    edge   Forward   -> stage 0: its layers, Forward  -> stage 1: its layers, ... ; replies come back the same way
    edge   Backward  -> stage 0: Backward -> stage 1: ... its layers' gradient -> stage 0: its layers' gradient

    A stage is a client of the next one, in a session of its own for each session that it serves, over the protocol that
    edges speak. Calls keep their numbers, so each stage has a cache entry for each call. Between stages hidden states
    and gradients cross as they are computed: the result has the bits of one worker with the whole span. The gradient
    from the edge, and the last stage's output, are passed on in the edge's own codecs.

    A session with the next stage carries the edge's tenant and weight, so that turns are shared out among tenants in
    every stage. A stage believes that of the key that it has enrolled as a stage's, and of no other.

    A stage that has lost the forward says so, and so does every stage before it: the edge sends the input again, and
    each stage computes its output anew for the next one. That is also what happens when a stage was killed: a new
    session begins with an empty activation cache.
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
from isthmus.protocol.secure.framing import wipe
from isthmus.protocol.secure.keys import Fingerprint
from isthmus.protocol.tensor_codecs import codec_id
from isthmus.rpc.secure_stream import SecureStream
from isthmus.rpc.transport import GrpcTransport, pauses

PATIENCE_SECONDS = 120.0
"""For a next stage that does not answer: a killed worker has loaded its model again by then.

Then the session ends, and the edge makes the call again.
"""
LONGEST_PAUSE = 2.0
"""Seconds between two attempts to reach the next stage, at most: little beside what loading a model takes."""
LOOK_SECONDS = 0.1
"""Between two looks at where the next stage is, while it does not answer."""
KEEPALIVE_SECONDS = 2.0
"""Without a sign of the next stage until it is asked for one: stages are on one network."""

Run = Callable[[m.Message], Awaitable[m.Message | None]]
"""Has a message answered by this worker's own layers."""
Ask = Callable[[m.Message], Awaitable[m.Message]]
"""Has a message answered by the next stage."""

_FAULTS = (
    ConnectionLostError, RemoteProtocolError, FingerprintError, VersionError, RefusedError, NotEnrolledError,
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
        case m.Forward() | m.Decode():
            return await _forward(message, run, ask, codec)
        case m.Backward():
            return await _backward(message, run, ask, codec)
        case m.Sites() | m.Lease():
            return m.Status(m.StatusCode.BAD_REQUEST, None, _NO_SITES)
        case m.Put() | m.PlugIn():
            return m.Status(m.StatusCode.BAD_REQUEST, None, _NO_ADAPTERS)
        case _:
            return await run(message)


async def _forward(message: m.Forward | m.Decode, run: Run, ask: Ask, codec: str) -> m.Message | None:
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
        target: tells its `host:port`, which may change when it was killed; empty while nobody knows.
        pin: fingerprint of the cloud's root key.
        key: the key that the next one has enrolled as a stage's.
        codec: how hidden states cross; one that changes nothing.
    """

    target: Callable[[], str]
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
        self._at = ""
        self._transport: GrpcTransport | None = None
        self._stream: SecureStream | None = None
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
        deadline = None
        for pause in pauses(LONGEST_PAUSE):
            try:
                received = await (await self._open()).ask(message)
                self._body = received.body
                return received.message
            except _FAULTS as error:
                await self._drop()
                reason = type(error).__name__
            now = time.monotonic()
            deadline = deadline or now + PATIENCE_SECONDS
            if now >= deadline:
                break
            log("stage_broke", logging.WARNING, stage=self._at, error=reason)
            await self._moved(pause)
        log("stage_stayed_away", logging.ERROR, stage=self._at, error=reason)
        raise ConnectionLostError(f"the stage at {self._at} stayed away ({reason})")

    async def _moved(self, seconds: float) -> None:
        """Wait so long, or until the stage is somewhere else."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and self._stage.target() == self._at:
            await asyncio.sleep(min(left, LOOK_SECONDS))

    async def close(self) -> None:
        """Say goodbye, and overwrite what was received last."""
        wipe(self._body)
        if self._stream is not None:
            await self._stream.close()
        await self._drop()

    async def _open(self) -> SecureStream:
        """The open stream, or a new one."""
        if self._stream is None:
            self._at = self._stage.target()
            if not self._at:
                raise ConnectionLostError("the next stage is being started")
            self._transport = GrpcTransport(self._at, keepalive=KEEPALIVE_SECONDS)  # no TLS: the session is sealed
            stream = await self._transport.open()
            self._stream = await SecureStream.open(stream, self._stage.pin, self._stage.key, self._attach)
        return self._stream

    async def _drop(self) -> None:
        """Abandon the stream, and the connection below it."""
        stream, self._stream = self._stream, None
        if stream is not None:
            await stream.abandon()
        transport, self._transport = self._transport, None
        if transport is not None:
            await transport.close()
