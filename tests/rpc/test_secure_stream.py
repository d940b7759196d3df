"""How slowly a cloud may take an edge's question, and send its answer: on a clock of the test's own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from support.protocol.wire import EDGE, NOW, PIN, identity, session_info

from isthmus.common.errors import ConnectionLostError, FrameError
from isthmus.protocol import messages as m
from isthmus.protocol.enrolment import Tenant
from isthmus.protocol.limits import TransferTimeout
from isthmus.protocol.secure.keys import Fingerprint
from isthmus.protocol.session import CloudSession, Received
from isthmus.protocol.tensor_codecs import Role, codec_id, encode
from isthmus.rpc.secure_stream import SecureStream

TENANT = Tenant("alice", Fingerprint.of(EDGE.public_key().public_bytes_raw()))
PAYLOAD = encode(torch.zeros(8, 512, 512), "fp32", Role.ACTIVATION)  # 8 MiB, in nine frames
QUESTION = m.Forward(m.CallId(1, 1), False, PAYLOAD, None, None, codec_id("fp32"))
OF_A_FRAME = (1 << 20) / TransferTimeout().least_rate  # seconds


@dataclass
class SlowCloud:
    """A stream to a cloud that takes so many seconds for each frame of a question, and sends its answer as slowly."""

    taking: float = 0.0
    sending: float = 0.0
    answers: Callable[[CloudSession], Iterator[bytes]] = lambda cloud: cloud.send(
        m.ForwardReply(QUESTION.id, PAYLOAD, 0, 0, 0)
    )
    now: float = 0.0
    frames: Iterator[bytes] = field(default_factory=lambda: iter(()))
    attached: bool = False

    def __post_init__(self) -> None:
        self.cloud = CloudSession(identity=identity(not_after=NOW * 2), authorize=lambda key: TENANT, info=session_info)

    def clock(self) -> float:
        return self.now

    async def send(self, frame: bytes) -> None:
        if self.attached and self.taking:
            self.now += self.taking
        await asyncio.sleep(0.001)  # long enough for a wait that is overdue to end
        event = self.cloud.receive(frame)
        if isinstance(event, Received):
            attach = isinstance(event.message, m.Attach)
            attached = m.Status(m.StatusCode.OK, None, "attached")
            self.frames = self.cloud.send(attached) if attach else self.answers(self.cloud)
            self.attached = True
        elif event.frames:
            self.frames = iter(event.frames)

    async def receive(self) -> bytes:
        if self.attached and self.sending:
            self.now += self.sending
        await asyncio.sleep(0.001)
        return next(self.frames)

    async def finish(self) -> None: ...

    async def close(self) -> None: ...


def asked(cloud: SlowCloud, timeout: float) -> Any:
    async def ask() -> Any:
        stream = await SecureStream.open(cloud, PIN, EDGE, m.Attach(b"l" * 16), clock=cloud.clock)
        cloud.now = 0.0
        return (await stream.ask(QUESTION, timeout)).message

    return asyncio.run(ask())


def test_an_answer_may_take_the_time_of_its_bytes() -> None:
    assert isinstance(asked(SlowCloud(sending=OF_A_FRAME * 0.9), timeout=100), m.ForwardReply)


def test_an_answer_that_comes_too_slowly_is_not_waited_for() -> None:
    slow = SlowCloud(sending=99.0)  # each frame within the time for one wait
    with pytest.raises(ConnectionLostError):
        asked(slow, timeout=100)
    assert slow.now < 8 * 99.0  # the last frame was not waited for


def test_a_question_that_is_taken_too_slowly_is_given_up() -> None:
    assert isinstance(asked(SlowCloud(taking=OF_A_FRAME * 0.9), timeout=100), m.ForwardReply)
    with pytest.raises(ConnectionLostError):
        asked(SlowCloud(taking=99.0), timeout=100)


def test_a_cloud_that_only_changes_its_key_is_not_waited_for() -> None:
    def changes(cloud: CloudSession) -> Iterator[bytes]:
        while True:
            yield cloud.rekey()

    with pytest.raises(FrameError, match="more than 16 control frames"):
        asked(SlowCloud(sending=1.0, answers=changes), timeout=100)
