"""Every message that a side may send: generated, written and read, and refused on either side with any bad value."""

from __future__ import annotations

import contextlib
import typing
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from support.protocol.mutations import mutations
from support.protocol.wire import GENERATORS

from isthmus.common.errors import LimitError, LocalProtocolError, MessageError
from isthmus.protocol import encoding, isthmus_pb2 as pb, messages as m
from isthmus.protocol.encoding import check, pack, unpack

FEW = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
MESSAGES: tuple[type[m.Message], ...] = typing.get_args(m.Message)
ENUMERATIONS = ("file_set", "code", "phase")
"""Fields whose type alone keeps the sender's values right; the reader has to look."""
by_type = pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Nobody checks what the fields of a message say together."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "check", lambda message: None)
        yield


def packed(message: m.Message) -> tuple[bytes, bytearray]:
    header, buffers = pack(message)
    return header, bytearray(b"".join(buffers))


def test_every_message_has_a_generator_a_sender_and_a_number_of_its_own() -> None:
    assert set(GENERATORS) == set(MESSAGES)
    assert {*m.EDGE_SENDS, *m.CLOUD_SENDS} == set(MESSAGES)
    fields = pb.Header.DESCRIPTOR.oneofs_by_name["message"].fields
    assert {field.message_type.name for field in fields} == {kind.__name__ for kind in MESSAGES}


@by_type
def test_a_generator_gives_its_message_and_all_of_its_fields(kind: type[m.Message]) -> None:
    """No field has the same value in every message, so that none is left out."""
    seen: dict[str, list[object]] = {name: [] for name in typing.get_type_hints(kind)}

    @FEW
    @given(GENERATORS[kind])
    def collect(message: m.Message) -> None:
        assert type(message) is kind
        for name, values in seen.items():
            values.append(getattr(message, name))

    collect()
    assert not [name for name, values in seen.items() if all(value == values[0] for value in values)]


@by_type
@FEW
@given(st.data())
def test_a_message_is_read_as_it_was_written(kind: type[m.Message], data: st.DataObject) -> None:
    message = data.draw(GENERATORS[kind])
    check(message)
    assert unpack(*packed(message)) == message


@by_type
def test_a_bad_value_is_neither_sent_nor_taken(kind: type[m.Message]) -> None:
    tried = read = 0

    @FEW
    @given(GENERATORS[kind])
    def refuse(message: m.Message) -> None:
        nonlocal tried, read
        for where, bad in mutations(message):
            tried += 1
            if not where.startswith(ENUMERATIONS):
                with pytest.raises(LocalProtocolError, match=f"{kind.__name__} cannot be sent"):
                    pack(bad)
            with unchecked():
                try:
                    written = packed(bad)
                except LocalProtocolError:  # there are no bytes that would say it
                    continue
            read += 1
            with pytest.raises((MessageError, LimitError)):
                pytest.fail(f"{where}: {unpack(*written)}")

    refuse()
    assert tried
    unwritable = (m.Ping, m.Pong, m.Goodbye, m.CacheLost, m.SignTranscript)  # whose bad values cannot be written at all
    assert read or kind in unwritable


def test_without_the_check_bad_values_pass() -> None:
    """The control: what refuses most of them is `check`, and the tests above see where it is missing."""
    passed = set()

    @FEW
    @given(st.sampled_from([m.Lease, m.ForwardReply, m.BackwardReply]).flatmap(lambda kind: GENERATORS[kind]))
    def look(message: m.Message) -> None:
        for where, bad in mutations(message):
            with unchecked(), contextlib.suppress(LocalProtocolError, MessageError, LimitError):
                unpack(*packed(bad))
                passed.add((type(message), where))

    look()
    assert (m.Lease, "weights[0].scale 0") in passed  # NaN
    assert (m.Lease, "number 1") in passed  # zero
    assert (m.Lease, "together 2") in passed  # ranks that do not match
    assert {kind for kind, _ in passed} == {m.Lease, m.ForwardReply, m.BackwardReply}
