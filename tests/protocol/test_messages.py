"""Messages: everything round-trips, and only what can be written is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from support.protocol.wire import cloud_messages, edge_messages, forward

from isthmus.backbone.sites.site_spec import SiteSpec
from isthmus.common.errors import LimitError, LocalProtocolError, MessageError, RemoteProtocolError
from isthmus.protocol import isthmus_pb2 as pb, messages as m
from isthmus.protocol.encoding import pack, peek, unpack
from isthmus.protocol.limits import Limits
from isthmus.protocol.tensor_codecs import Payload, Role, decode, encode, encode_mask

QUICK = settings(max_examples=150, deadline=None, derandomize=True)


def packed(message: m.Message) -> tuple[bytes, bytearray]:
    header, buffers = pack(message)
    return header, bytearray(b"".join(buffers))


def changed(header: bytes, change: Callable[[Any], object]) -> bytes:
    """The header with other fields, in the canonical form."""
    parsed = pb.Header.FromString(header)
    change(getattr(parsed, parsed.WhichOneof("message")))
    return bytes(parsed.SerializeToString(deterministic=True))


@QUICK
@given(st.one_of(edge_messages, cloud_messages))
def test_any_message_round_trips(message: m.Message) -> None:
    header, body = packed(message)
    assert unpack(header, body) == message


@QUICK
@given(edge_messages)
def test_what_an_edge_asks_for_is_read_without_a_body(message: m.Message) -> None:
    assert peek(pack(message)[0]) == (type(message), getattr(message, "id", None))


@QUICK
@given(st.one_of(edge_messages, cloud_messages), st.data())
def test_no_cut_or_longer_message_is_read(message: m.Message, data: st.DataObject) -> None:
    header, body = packed(message)
    with pytest.raises(RemoteProtocolError):
        unpack(header[: data.draw(st.integers(0, len(header) - 1))], body)
    for more in (b"\0", b"\x62\0", b"\xba\x06\0"):  # no field, Goodbye beside it or again, a field that there is not
        with pytest.raises(RemoteProtocolError):
            unpack(header + more, body)
    if not isinstance(message, m.Blob | m.Put):  # the body is their data, whatever its length
        with pytest.raises(RemoteProtocolError):
            unpack(header, body + b"\0")
        if body:
            with pytest.raises(RemoteProtocolError):
                unpack(header, body[: data.draw(st.integers(0, len(body) - 1))])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.binary(max_size=200), st.binary(max_size=200))
def test_arbitrary_bytes_give_a_message_or_a_typed_error(header: bytes, body: bytes) -> None:
    try:
        message = unpack(header, body)
    except RemoteProtocolError:
        return
    assert packed(message) == (header, body)  # one encoding per message


@QUICK
@given(st.one_of(edge_messages, cloud_messages), st.data())
def test_a_changed_header_is_another_message_or_refused(message: m.Message, data: st.DataObject) -> None:
    header, body = packed(message)
    changed = bytearray(header)
    changed[data.draw(st.integers(0, len(header) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        other = unpack(changed, body)
    except RemoteProtocolError:
        return
    assert other != message
    assert packed(other) == (bytes(changed), body)


def test_tensors_are_views_of_the_body_on_16_byte_boundaries() -> None:
    hidden = encode(torch.randn(1, 3, 65), "int8", Role.ACTIVATION)
    message = m.Forward(m.CallId(1, 2), False, hidden, encode_mask(torch.ones(1, 3)), None, 1)
    header, body = packed(message)
    read = unpack(header, body)
    assert isinstance(read, m.Forward)
    assert len(body) % 16 == 0
    starts = []
    assert read.attention_mask is not None
    base = np.frombuffer(body, np.uint8).ctypes.data
    for buffer in (*read.hidden.buffers, *read.attention_mask.buffers):
        assert isinstance(buffer, memoryview)
        assert buffer.obj is body
        starts.append(np.frombuffer(buffer, np.uint8).ctypes.data - base)
    assert starts == [0, 32, 32 + 208]
    assert torch.equal(decode(read.hidden), decode(hidden))


def test_padding_must_be_zero() -> None:
    header, body = packed(forward((1, 1, 3)))
    body[13] = 1
    with pytest.raises(MessageError, match="padding"):
        unpack(header, body)


def test_limits_are_checked_before_anything_is_allocated() -> None:
    header, body = packed(forward((2, 3, 8)))
    with pytest.raises(LimitError, match="body"):
        unpack(header, body, Limits(max_message_bytes=len(body) - 1))
    with pytest.raises(LimitError, match="header"):
        unpack(header, body, Limits(max_header_bytes=len(header) - 1))
    claims = changed(header, lambda forward: forward.hidden.shape.__setitem__(slice(0, 3), [(1 << 32) - 1] * 3))
    with pytest.raises(LimitError, match="4294967295"):
        unpack(claims, body)
    with pytest.raises(LimitError, match="rank 200"):
        unpack(changed(header, lambda forward: forward.hidden.shape.extend([1] * 197)), body)
    with pytest.raises(MessageError, match="empty"):
        unpack(changed(header, lambda forward: forward.hidden.shape.__setitem__(0, 0)), body)


@pytest.mark.parametrize(
    "name", ["", "..", "../x", "a/b", "/etc/passwd", ".hidden", "a\\b", "x" * 129, "a b", "ä", "a\0"]
)
def test_file_names_that_could_leave_a_folder_are_refused(name: str) -> None:
    with pytest.raises(LocalProtocolError):
        pack(m.Fetch(m.FileSet.PARTS, name))
    for good in (
        m.Fetch(m.FileSet.PARTS, "good"),
        m.Put("good", 0, 0, bytes(32), b""),
        m.PutReply("good", bytes(32), 0),
    ):
        with pytest.raises(MessageError, match="file name"):
            unpack(changed(pack(good)[0], lambda fields: setattr(fields, "name", name)), b"")
    listed = pack(m.PlugIn((m.FileEntry("good", 1, bytes(32)),)))[0]
    with pytest.raises(MessageError, match="file name"):
        unpack(changed(listed, lambda fields: setattr(fields.entries[0], "name", name)), b"")


def test_file_names_that_are_needed_are_taken() -> None:
    for name in ("config.json", "edge.safetensors", "chat_template.jinja", "tokenizer.model", "a..b"):
        fetch = m.Fetch(m.FileSet.PARTS, name)
        assert unpack(*packed(fetch)) == fetch


def test_a_forward_of_a_part_of_the_span_keeps_nothing_and_visits_no_sites() -> None:
    part = replace(forward((1, 2, 8)), keep=False, plan="2:6")
    assert unpack(*packed(part)) == part
    for wrong in (replace(part, keep=True), replace(part, sites=1)):
        with pytest.raises(LocalProtocolError, match="keeps nothing and visits no sites"):
            pack(wrong)
    for plan in ("", "2", "2:6:1", "-1:2", "1234567:2"):
        with pytest.raises(MessageError, match="two numbers"):
            unpack(changed(pack(part)[0], lambda fields, value=plan: setattr(fields, "plan", value)), packed(part)[1])


@pytest.mark.parametrize("name", ["", ".", "-a", "a/b", "x" * 33, "a b", "ä"])
def test_a_name_that_no_package_has_is_refused(name: str) -> None:
    for question in (m.FetchList(m.FileSet.EMULATOR, "a"), m.Fetch(m.FileSet.EMULATOR, "config.json", 0, "a")):
        assert unpack(*packed(question)) == question
        with pytest.raises(MessageError, match="package's name"):
            unpack(changed(pack(question)[0], lambda fields: setattr(fields, "package", name)), b"")
        with pytest.raises(LocalProtocolError, match="file set PARTS"):
            pack(replace(question, file_set=m.FileSet.PARTS))


def test_a_file_set_that_there_is_not_is_refused() -> None:
    header = pack(m.FetchList(m.FileSet.PARTS))[0]
    for file_set in (0, 6, 255, -1):
        with pytest.raises(MessageError, match=f"{file_set} is no FileSet"):
            unpack(changed(header, lambda fields, value=file_set: setattr(fields, "file_set", value)), b"")


def test_an_adapter_of_too_many_files_is_refused() -> None:
    header = pack(m.PlugIn((m.FileEntry("a", 1, bytes(32)),)))[0]
    with pytest.raises(MessageError, match="of 9 entries"):
        unpack(changed(header, lambda fields: fields.entries.extend([fields.entries[0]] * 8)), b"")
    with pytest.raises(MessageError, match="of 0 entries"):
        unpack(changed(header, lambda fields: fields.ClearField("entries")), b"")


def test_a_chunk_of_a_file_is_bounded() -> None:
    chunk = m.Put("a", 0, 1 << 40, bytes(32), bytes(m.MAX_FILE_CHUNK + 1))
    with pytest.raises(LocalProtocolError, match=str(m.MAX_FILE_CHUNK)):
        pack(chunk)
    header, body = packed(m.Put("a", 0, 1 << 40, bytes(32), bytes(m.MAX_FILE_CHUNK)))
    with pytest.raises(MessageError, match=str(m.MAX_FILE_CHUNK)):
        unpack(header, body + b"x")


HIDDEN = encode(torch.ones(2, 3, 4), "fp32", Role.ACTIVATION)
GRADIENT = encode(torch.ones(2, 3, 4), "fp32", Role.GRADIENT)
MASK = encode_mask(torch.ones(2, 3))
CALL = m.CallId(1, 1)


@pytest.mark.parametrize(
    "message",
    [
        m.Forward(CALL, True, GRADIENT, None, None, 1),
        m.Forward(CALL, True, encode(torch.ones(2, 3), "fp32", Role.ACTIVATION), None, None, 1),
        m.Forward(CALL, True, HIDDEN, encode_mask(torch.ones(3, 3)), None, 1),
        m.Forward(CALL, True, HIDDEN, encode(torch.ones(2, 3), "fp32", Role.INDEX), None, 1),
        m.Forward(CALL, True, HIDDEN, None, MASK, 1),
        m.Forward(CALL, True, HIDDEN, None, None, 5),
        m.Forward(CALL, True, HIDDEN, None, None, 77),
        m.Forward(m.CallId(1 << 32, 1), True, HIDDEN, None, None, 1),
        m.Forward(m.CallId(1, -1), True, HIDDEN, None, None, 1),
        m.Forward(m.CallId(1, 1, 1 << 32), True, HIDDEN, None, None, 1),
        m.Forward(CALL, True, Payload(1, Role.ACTIVATION, (2, 3, 4), (b"short",)), None, None, 1),
        m.Backward(CALL, HIDDEN, None, 1),
        m.Backward(CALL, GRADIENT, m.SpanInputs(encode(torch.ones(2, 2, 4), "fp32", Role.ACTIVATION)), 1),
        m.ForwardReply(CALL, GRADIENT, 0, 0, 0),
        m.BackwardReply(CALL, HIDDEN, 0, 0, 0, False),
        m.BackwardReply(CALL, GRADIENT, -1, 0, 0, False),
        m.Blob("a", 5, 6, bytes(32), b"ab"),
        m.Blob("a", 0, 2, bytes(31), b"ab"),
        m.Put("a", 5, 6, bytes(32), b"ab"),
        m.Put("a", 0, 2, bytes(31), b"ab"),
        m.PutReply("../a", bytes(32), 1),
        m.PlugIn(()),
        m.PlugIn(tuple(m.FileEntry(f"f{n}", 1, bytes(32)) for n in range(9))),
        m.PlugIn((m.FileEntry("a", 1, bytes(32)), m.FileEntry("a", 2, bytes(32)))),
        m.FileList((m.FileEntry("a", 1, bytes(32)), m.FileEntry("a", 2, bytes(32)))),
        m.Status(m.StatusCode.INTERNAL, None, "x" * 1025),
        m.Attach(b"short"),
        *(m.Attach(b"l" * 16, account=m.Account(name, 1)) for name in ("", "-a", "two words", "a\n", "ä", "x" * 65)),
        *(m.Attach(b"l" * 16, account=m.Account("alice", weight)) for weight in (-1, 0, 1 << 32)),
        m.Forward(CALL, True, HIDDEN, None, None, 1, sites=-1),
        m.Forward(CALL, True, HIDDEN, None, None, 1, sites=1 << 32),
        m.Backward(CALL, GRADIENT, None, 1, sites=1 << 32),
        m.Sites(0, (SiteSpec(2, "q_proj"),)),
        m.Sites(1, ()),
        m.Sites(1, (SiteSpec(2, "q_proj"),) * (m.MAX_SITES + 1)),
        m.Sites(1, (SiteSpec(-1, "q_proj"),)),
        m.Sites(1, (SiteSpec(2, "x" * (m.MAX_NAME + 1)),)),
        *(m.Sites(1, (SiteSpec(2, part),)) for part in ("a..b", ".a", "a.", "../a", "a/b", "a b", "a\n", "é")),
        m.SiteQuestion(CALL, m.SitePhase.FORWARD, (), (HIDDEN,), 0, 0, 0),
        m.SiteQuestion(CALL, m.SitePhase.FORWARD, (1, 1), (HIDDEN,), 0, 0, 0),
        m.SiteQuestion(CALL, m.SitePhase.FORWARD, tuple(range(m.MAX_GROUP + 1)), (HIDDEN,), 0, 0, 0),
        m.SiteQuestion(CALL, m.SitePhase.FORWARD, (1 << 16,), (HIDDEN,), 0, 0, 0),
        m.SiteQuestion(CALL, m.SitePhase.FORWARD, (0, 1), (HIDDEN,) * 3, 0, 0, 0),
        m.SiteQuestion(CALL, m.SitePhase.FORWARD, (0, 1), (), 0, 0, 0),
        m.SiteQuestion(CALL, m.SitePhase.FORWARD, (0,), (GRADIENT,), 0, 0, 0),
        m.SiteQuestion(CALL, m.SitePhase.FORWARD, (0,), (MASK,), 0, 0, 0),
        m.SiteQuestion(CALL, m.SitePhase.AGAIN, (0,), (HIDDEN,), 0, 0, 0),
        m.SiteQuestion(CALL, m.SitePhase.BACKWARD, (0, 1), (GRADIENT,), 0, 0, 0),
        m.SiteQuestion(CALL, m.SitePhase.BACKWARD_ONLY, (0,), (HIDDEN,), 0, 0, 0),
        m.SiteQuestion(CALL, m.SitePhase.BACKWARD, (0,), (GRADIENT,), 0, -1, 0),
        m.SiteAnswer(CALL, (MASK,)),
        m.SiteAnswer(CALL, (encode(torch.ones(2, 3), "fp32", Role.ACTIVATION),)),
        m.SiteAnswer(CALL, (HIDDEN,) * (m.MAX_GROUP + 1)),
    ],
    ids=lambda message: type(message).__name__,
)
def test_malformed_messages_are_not_sent(message: m.Message) -> None:
    with pytest.raises(LocalProtocolError, match="cannot be sent"):
        pack(message)


def test_a_question_is_about_a_known_phase_and_a_site_has_a_known_placement() -> None:
    header, body = packed(m.SiteQuestion(CALL, m.SitePhase.AGAIN, (3,), (), 1, 2, 3))
    for phase in (0, 5, 255):
        with pytest.raises(MessageError, match=f"{phase} is no SitePhase"):
            unpack(changed(header, lambda fields, value=phase: setattr(fields, "phase", value)), body)
    header, body = packed(m.Sites(1, (SiteSpec(2, "self_attn.q_proj"),)))
    for name, value, kind in (("placement", 0, "Placement"), ("placement", 200, "Placement"), ("basis", 2, "Basis")):
        with pytest.raises(MessageError, match=f"{value} is no {kind}"):
            unpack(
                changed(header, lambda fields, name=name, value=value: setattr(fields.entries[0], name, value)), body
            )
    with pytest.raises(MessageError, match="makes no sense"):
        unpack(changed(header, lambda fields: setattr(fields.entries[0], "rank", 3)), body)


def test_more_sites_or_tensors_than_are_accepted_are_refused() -> None:
    header = pack(m.Sites(1, (SiteSpec(2, "q_proj"),)))[0]
    with pytest.raises(MessageError, match=f"of {m.MAX_SITES + 1} entries"):
        unpack(changed(header, lambda fields: fields.entries.extend([fields.entries[0]] * m.MAX_SITES)), b"")
    header, body = packed(m.SiteAnswer(CALL, (encode(torch.ones(1, 1, 1), "fp32", Role.ACTIVATION),)))
    with pytest.raises(MessageError, match=rf"SiteAnswer\.tensors of {m.MAX_GROUP + 1}"):
        unpack(
            changed(header, lambda fields: fields.tensors.extend([fields.tensors[0]] * m.MAX_GROUP)),
            body * (m.MAX_GROUP + 1),
        )


def test_as_many_sites_as_are_accepted_fit_into_a_message() -> None:
    entry = SiteSpec(1000, "self_attn.some_longer_projection")
    largest = m.Sites(1, tuple(replace(entry, layer=layer) for layer in range(m.MAX_SITES)))
    assert unpack(*packed(largest)) == largest


def test_calls_without_sites_want_the_gradient_of_their_input() -> None:
    read = unpack(*packed(m.Forward(CALL, True, HIDDEN, None, None, 1)))
    assert isinstance(read, m.Forward)
    assert (read.sites, read.wanted) == (0, True)


def test_an_account_may_be_absent_and_is_checked() -> None:
    header, _ = packed(m.Attach(b"l" * 16, account=m.Account("alice", 3)))
    assert unpack(changed(header, lambda fields: fields.ClearField("account")), b"") == m.Attach(b"l" * 16)
    for name, value in (("weight", 0), ("tenant", "al/ce")):
        with pytest.raises(MessageError, match=rf"Account\.{name} "):
            unpack(changed(header, lambda fields, name=name, value=value: setattr(fields.account, name, value)), b"")


def test_a_status_is_cut_by_bytes_and_not_within_a_character() -> None:
    status = m.Status.saying(m.StatusCode.INTERNAL, None, "x" + "ä" * 1000)
    assert status.message == "x" + "ä" * 511
    assert unpack(*packed(status)) == status
