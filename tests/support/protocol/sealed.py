"""Both ends of a sealed session, and frames of a message."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from support.protocol.wire import SMALL

from isthmus.common.errors import LocalProtocolError, RemoteProtocolError
from isthmus.protocol import messages as m
from isthmus.protocol.limits import Limits
from isthmus.protocol.secure.framing import Direction
from isthmus.protocol.secure.record import Opener, Sealer
from isthmus.protocol.session import CloudSession, EdgeSession, Incomplete, Received

SESSION = bytes(range(16))
SECRET = bytes(range(32))


def both_ends(limits: Limits = SMALL, clock: Callable[[], float] = lambda: 0.0) -> tuple[Sealer, Opener]:
    up = Direction.EDGE_TO_CLOUD
    return Sealer(bytearray(SECRET), SESSION, up, limits, clock), Opener(bytearray(SECRET), SESSION, up, limits)


def deliver(frames: list[bytes], receiver: EdgeSession | CloudSession) -> list[m.Message]:
    events = [receiver.receive(frame) for frame in frames]
    assert all(isinstance(event, Received | Incomplete) for event in events)
    return [event.message for event in events if isinstance(event, Received)]


def assert_refused(frames: list[bytes], error: type[Exception] = RemoteProtocolError) -> None:
    """Nothing is delivered, the fault is typed, and the session is dead afterwards."""
    _, opener = both_ends()
    for frame in frames[:-1]:
        try:
            assert opener.open(frame) is None
        except error:
            break
    else:
        with pytest.raises(error):
            opener.open(frames[-1])
    with pytest.raises(LocalProtocolError):
        opener.open(frames[0])


def message_frames(body: int = 200) -> list[bytes]:
    return list(both_ends()[0].seal(b"some header", [bytes(range(256))[:body]]))
