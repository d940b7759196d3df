"""A frame as a gRPC message: the bytes that protobuf writes, and no others are taken."""

from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies as st
from support.protocol.wire import new_pair

from isthmus.protocol import isthmus_pb2 as pb, messages as m
from isthmus.protocol.secure.framing import read_frame, write_frame
from isthmus.protocol.secure.handshake import version_refusal
from isthmus.protocol.service import METHOD, OLD_METHOD, SERVICE

FRAMES = [
    *new_pair()[0].send(m.Put("a", 0, 3 << 20, bytes(32), bytes((1 << 20) + 5))),
    b"ISTH\x10\6" + bytes(28) + b"s" * 127,
    b"ISTH\x11\6" + bytes(28) + b"s" * 128,
    b"ISTH\1\6" + bytes(34),
    b"ISTH\2\6" + bytes(1448),
    version_refusal(),
]
by_frame = pytest.mark.parametrize("frame", FRAMES, ids=lambda frame: f"{frame[4]}-{len(frame)}")


def split(frame: bytes) -> tuple[bytes, bytes]:
    size = 34 if frame[4] >= 16 else 6
    return frame[:size], frame[size:]


def test_the_service_is_the_one_of_the_contract() -> None:
    service = pb.DESCRIPTOR.services_by_name["Isthmus"]
    (method,) = service.methods
    assert (service.full_name, f"/{service.full_name}/{method.name}") == (SERVICE, METHOD)
    assert (method.input_type.name, method.output_type.name) == ("Frame", "Frame")
    assert OLD_METHOD != METHOD


@by_frame
def test_a_frame_is_written_as_protobuf_writes_it(frame: bytes) -> None:
    prefix, sealed = split(frame)
    message = write_frame(frame)
    assert message == pb.Frame(prefix=prefix, sealed=sealed).SerializeToString()
    assert read_frame(message) == frame


@by_frame
def test_another_form_of_a_frame_is_none(frame: bytes) -> None:
    prefix, sealed = split(frame)
    bad = [
        write_frame(frame) + b"\0",
        write_frame(frame) + b"\x12\0",
        write_frame(frame) + b"\x18\1",
        b"\x12" + write_frame(frame)[1:],
        pb.Frame(sealed=frame).SerializeToString(),
        pb.Frame(prefix=prefix + b"x", sealed=sealed[1:]).SerializeToString(),
        b"\x0a" + bytes((len(prefix) | 128, 0)) + prefix,
        frame,
    ]
    if sealed:
        bad.append(write_frame(frame)[:-1])
        bad.append(pb.Frame(prefix=prefix[:-1], sealed=prefix[-1:] + sealed).SerializeToString())
        bad.append(pb.Frame(sealed=sealed).SerializeToString() + pb.Frame(prefix=prefix).SerializeToString())
    assert [read_frame(message) for message in bad] == [b""] * len(bad)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.binary(max_size=80) | st.binary(max_size=80).map(lambda raw: b"\x0a\6ISTH\1\6\x12" + raw))
def test_arbitrary_bytes_are_a_frame_that_is_written_so_or_none(raw: bytes) -> None:
    frame = read_frame(raw)
    assert frame == b"" or write_frame(frame) == raw
