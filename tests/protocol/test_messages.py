"""Messages: everything round-trips, and only what can be written is read."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from support.wire import TENANT, cloud_messages, edge_messages, forward, session_info

from isthmus.backbone.sites.site_spec import SiteSpec
from isthmus.common.errors import LimitError, LocalProtocolError, MessageError, RemoteProtocolError
from isthmus.protocol import messages as m
from isthmus.protocol.encoding import pack, peek, unpack
from isthmus.protocol.limits import Limits
from isthmus.protocol.tensor_codecs import Payload, Role, decode, encode, encode_mask

QUICK = settings(max_examples=150, deadline=None, derandomize=True)


def packed(message: m.Message) -> tuple[bytes, bytearray]:
    header, buffers = pack(message)
    return header, bytearray(b"".join(buffers))


@QUICK
@given(st.one_of(edge_messages, cloud_messages))
def test_any_message_round_trips(message: m.Message) -> None:
    header, body = packed(message)
    assert unpack(header, body) == message


@QUICK
@given(edge_messages)
def test_what_an_edge_asks_for_is_read_without_a_body(message: m.Message) -> None:
    assert peek(pack(message)[0]) == (message.op, getattr(message, "id", None))


@QUICK
@given(st.one_of(edge_messages, cloud_messages), st.data())
def test_no_cut_or_longer_message_is_read(message: m.Message, data: st.DataObject) -> None:
    header, body = packed(message)
    with pytest.raises(RemoteProtocolError):
        unpack(header[: data.draw(st.integers(0, len(header) - 1))], body)
    with pytest.raises(RemoteProtocolError):
        unpack(header + b"\0", body)
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
    position = header.index(bytes((1, Role.ACTIVATION, 3)))
    claims = bytearray(header)
    claims[position + 3 : position + 15] = b"\xff" * 12
    with pytest.raises(LimitError, match="4294967295"):
        unpack(claims, body)
    claims = bytearray(header)
    claims[position + 2] = 200
    with pytest.raises(LimitError, match="rank 200"):
        unpack(claims, body)
    empty = bytearray(header)
    empty[position + 3 : position + 7] = bytes(4)
    with pytest.raises(MessageError, match="empty"):
        unpack(empty, body)


@pytest.mark.parametrize(
    "name", ["", "..", "../x", "a/b", "/etc/passwd", ".hidden", "a\\b", "x" * 129, "a b", "ä", "a\0"]
)
def test_file_names_that_could_leave_a_folder_are_refused(name: str) -> None:
    with pytest.raises(LocalProtocolError):
        pack(m.Fetch(m.Shelf.PARTS, name))
    raw = len(name.encode()).to_bytes(2, "big") + name.encode()
    for header in (
        bytes((m.Fetch.op, m.Shelf.PARTS)) + raw + bytes(8),
        bytes((m.Put.op,)) + raw + bytes(8 + 8 + 32),
        bytes((m.PlugIn.op, 0, 1)) + raw + bytes(8 + 32),
    ):
        with pytest.raises(RemoteProtocolError):
            unpack(header, b"")


def test_file_names_that_are_needed_are_taken() -> None:
    for name in ("config.json", "edge.safetensors", "chat_template.jinja", "tokenizer.model", "a..b"):
        fetch = m.Fetch(m.Shelf.PARTS, name)
        assert unpack(*packed(fetch)) == fetch


def test_a_shelf_that_there_is_not_is_refused() -> None:
    for shelf in (0, 4, 255):
        with pytest.raises(MessageError, match=f"unknown shelf {shelf}"):
            unpack(bytes((m.FetchList.op, shelf)), b"")


def test_an_adapter_of_too_many_files_is_refused_by_their_count_alone() -> None:
    with pytest.raises(LimitError, match="list of 9 files"):
        unpack(bytes((m.PlugIn.op, 0, 9)), b"")
    with pytest.raises(MessageError, match="0 files"):
        unpack(bytes((m.PlugIn.op, 0, 0)), b"")


def test_a_piece_of_a_file_is_bounded() -> None:
    piece = m.Put("a", 0, 1 << 40, bytes(32), bytes(m.MAX_PIECE + 1))
    with pytest.raises(LocalProtocolError, match=str(m.MAX_PIECE)):
        pack(piece)
    header, body = packed(m.Put("a", 0, 1 << 40, bytes(32), bytes(m.MAX_PIECE)))
    with pytest.raises(MessageError, match=str(m.MAX_PIECE)):
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
        m.Forward(m.CallId(1, 1, 1 << 16), True, HIDDEN, None, None, 1),
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
    place = 1 + 14  # behind the operation and the call
    assert header[place] == m.SitePhase.AGAIN
    for phase in (0, 5, 255):
        with pytest.raises(MessageError, match=f"unknown phase {phase}"):
            unpack(header[:place] + bytes((phase,)) + header[place + 1 :], body)
    header, body = packed(m.Sites(1, (SiteSpec(2, "self_attn.q_proj"),)))
    for placement in (0, 200):
        with pytest.raises(MessageError, match=f"unknown placement {placement}"):
            unpack(header[:-12] + bytes((placement,)) + header[-11:], body)


def test_more_sites_or_tensors_than_are_accepted_are_refused_by_their_count_alone() -> None:
    with pytest.raises(LimitError, match=f"list of {m.MAX_SITES + 1} sites"):
        unpack(bytes((m.Sites.op,)) + bytes(4) + (m.MAX_SITES + 1).to_bytes(2, "big"), b"")
    header, _ = packed(m.SiteAnswer(CALL, ()))
    assert header[-2:] == bytes(2)  # the count
    with pytest.raises(LimitError, match=f"{m.MAX_GROUP + 1} tensors"):
        unpack(header[:-1] + bytes((m.MAX_GROUP + 1,)), b"")


def test_as_many_sites_as_are_accepted_fit_into_a_message() -> None:
    entry = SiteSpec(1000, "self_attn.some_longer_projection")
    largest = m.Sites(1, tuple(replace(entry, layer=layer) for layer in range(m.MAX_SITES)))
    assert unpack(*packed(largest)) == largest


def test_calls_without_sites_want_the_gradient_of_their_input() -> None:
    read = unpack(*packed(m.Forward(CALL, True, HIDDEN, None, None, 1)))
    assert isinstance(read, m.Forward)
    assert (read.sites, read.wanted) == (0, True)


def test_an_account_comes_behind_the_rest_of_attach_and_is_checked() -> None:
    plain, _ = packed(m.Attach(b"l" * 16, interactive=True))
    assert plain == bytes((m.Attach.op, 1)) + bytes(4) + b"l" * 16
    header, _ = packed(m.Attach(b"l" * 16, account=m.Account("alice", 3)))
    assert header == bytes((m.Attach.op, 4)) + bytes(4) + b"l" * 16 + b"\0\5alice" + bytes((0, 0, 0, 3))
    for bad in (header[:-1] + b"\0", header.replace(b"alice", b"al/ce")):
        with pytest.raises(MessageError, match="account"):
            unpack(bad, b"")


def test_a_status_is_cut_by_bytes_and_not_within_a_character() -> None:
    status = m.Status.saying(m.StatusCode.INTERNAL, None, "x" + "ä" * 1000)
    assert status.message == "x" + "ä" * 511
    assert unpack(*packed(status)) == status


def test_session_information_round_trips_and_is_strict() -> None:
    info = session_info(TENANT, bytes(16))
    assert m.SessionInfo.from_json(info.to_json()) == info
    data = json.loads(info.to_json())
    for change in (
        {"n_layers": "4"},
        {"n_layers": -4},
        {"n_layers": True},
        {"codecs": "fp32"},
        {"codecs": [1]},
        {"limits": {}},
        {"limits": {**data["limits"], "stash_bytes": 1.5}},
        {"extra": 1},
    ):
        with pytest.raises(MessageError, match="session information"):
            m.SessionInfo.from_json(json.dumps({**data, **change}).encode())
    for change in (
        {"digest": "../../../../tmp/x"},
        {"digest": "A" * 64},
        {"plan": "../x"},
        {"plan": "2:2\n"},
        {"session_id": "00"},
        {"model": "a\x1b[2J"},
        {"model": "x" * 257},
        {"codecs": ["fp32\n"]},
    ):
        with pytest.raises(MessageError, match="session information"):
            m.SessionInfo.from_json(json.dumps({**data, **change}).encode())
    del data["plan"]
    for raw in (json.dumps(data).encode(), b"[]", b"{", b"\xff", b"[" * 9000, b" " * (m.MAX_INFO + 1)):
        with pytest.raises(MessageError, match="session information"):
            m.SessionInfo.from_json(raw)
    with pytest.raises(MessageError):
        m.SessionInfo.from_json(replace(info, model="x" * m.MAX_INFO).to_json())
