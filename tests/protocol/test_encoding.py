"""The protobuf form: one encoding, every field there, and the dataclasses as the contract has them."""

from __future__ import annotations

import enum
import re
import typing
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor
from support.protocol.example_messages import MESSAGES
from support.protocol.wire import TENANT, session_info

from isthmus.backbone.sites.site_spec import SiteSpec
from isthmus.common.errors import LimitError, LocalProtocolError, MessageError
from isthmus.protocol import encoding, isthmus_pb2 as pb, messages as m
from isthmus.protocol.encoding import pack, pack_info, peek, unpack, unpack_info
from isthmus.protocol.limits import Buffer, Limits
from isthmus.protocol.tensor_codecs import CODECS, Payload, Role

PROTO = (Path(encoding.__file__).parent / "isthmus.proto").read_text()
KINDS: dict[str, Any] = {
    **{kind.__name__: kind for kind in (*typing.get_args(m.Message), m.CallId, m.SpanInputs, m.FileEntry)},
    **{kind.__name__: kind for kind in (m.LeasedWeights, m.Account, m.SessionInfo, m.SpanLimits)},
    "Site": SiteSpec,
    "Tensor": Payload,
}
INFO = session_info(TENANT, bytes(16))


# The contract ---------------------------------------------------------------------------------------------------------


def differences(kind: Any, descriptor: Any) -> list[str]:
    """Where a dataclass and a protobuf message differ in their fields or the fields' order."""
    hints = typing.get_type_hints(kind)
    own = [field.name for field in fields(kind) if hints[field.name] not in (Buffer, tuple[Buffer, ...])]
    theirs = [field.name for field in sorted(descriptor.fields, key=lambda field: field.number)]
    found = [f"{own} is not {theirs}"] if own != theirs else []
    for field in descriptor.fields if not found else ():
        many = typing.get_origin(hints[field.name]) is tuple
        if field.is_repeated != many or (not many and not field.has_presence):
            found.append(f"{field.name} is of another number, or cannot be absent")
        found += _kind_differs(field, hints[field.name])
        if kind is not Payload and (type(None) in typing.get_args(hints[field.name])) != _may_be_absent(
            descriptor, field.name
        ):
            found.append(f"{field.name} may be absent in one of the two")
    return found


def _kind_differs(field: Any, hint: Any) -> list[str]:
    while typing.get_args(hint):
        hint = typing.get_args(hint)[0]
    name = {"SiteSpec": "Site", "Payload": "Tensor"}.get(hint.__name__, hint.__name__)
    if is_dataclass(hint) and (field.message_type is None or field.message_type.name != name):
        return [f"{field.name} is no {name}"]
    if issubclass(hint, enum.Enum) and (field.enum_type is None or field.enum_type.name != name):
        return [f"{field.name} is no {name}"]
    return []


def _may_be_absent(descriptor: Any, name: str) -> bool:
    (body,) = re.findall(rf"^message {descriptor.name} {{\n(.*?)^}}", PROTO, re.MULTILINE | re.DOTALL)
    (line,) = re.findall(rf"^.*\b{name} = \d+;.*$", body, re.MULTILINE)
    return "absent" in line


@pytest.mark.parametrize("name", sorted(set(pb.DESCRIPTOR.message_types_by_name) - {"Frame", "Header"}))
def test_the_dataclasses_are_the_protobuf_messages(name: str) -> None:
    assert differences(KINDS[name], pb.DESCRIPTOR.message_types_by_name[name]) == []


def test_a_dataclass_that_differs_is_noticed() -> None:
    assert differences(m.Ping, pb.Pong.DESCRIPTOR)
    assert differences(m.Status, pb.Goodbye.DESCRIPTOR)


def test_the_enumerations_have_the_same_numbers() -> None:
    for kind in (Role, m.StatusCode, m.FileSet, m.SitePhase, *ENUMS_OF_SITES):
        theirs = pb.DESCRIPTOR.enum_types_by_name[kind.__name__].values
        assert {each.number for each in theirs if not each.name.endswith("_UNSPECIFIED")} == {
            int(each) for each in kind
        }
    codecs = {each.name: each.number for each in pb.Codec.DESCRIPTOR.values}
    names = {f"CODEC_{name.upper().replace('-', '_')}": codec.id for name, codec in CODECS.items()}
    assert codecs == {"CODEC_UNSPECIFIED": 0, **names}


ENUMS_OF_SITES = tuple(typing.get_type_hints(SiteSpec)[name] for name in ("placement", "basis"))


# One encoding ---------------------------------------------------------------------------------------------------------


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes((*out, value))


def raw_field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


CALL = b"\x0d\1\0\0\0" + b"\x11\2" + bytes(7) + b"\x1d\3\0\0\0"
STATUS = b"\x08\3" + raw_field(2, CALL) + raw_field(3, b"why")


def header(content: bytes, number: int = 9) -> bytes:
    return raw_field(number, content)


def test_a_header_is_what_its_bytes_say() -> None:
    said = m.Status(m.StatusCode.BAD_REQUEST, m.CallId(1, 2, 3), "why")
    assert pack(said) == (header(STATUS), [])
    assert unpack(header(STATUS), b"") == said


@pytest.mark.parametrize(
    ("case", "raw"),
    {
        "an unknown field": header(STATUS + b"\x20\1"),
        "an unknown field inside": header(b"\x08\3" + raw_field(2, CALL + b"\x20\1") + raw_field(3, b"why")),
        "an unknown field beside": header(STATUS) + b"\xfa\x07\0",
        "a field twice": header(b"\x08\3" + STATUS),
        "a message in two parts": header(b"\x08\3" + raw_field(2, CALL[:5]) + raw_field(2, CALL[5:]) + STATUS[-5:]),
        "two messages": header(b"\x0a\1x", 12) + header(STATUS),
        "fields in another order": header(raw_field(3, b"why") + STATUS[:-5]),
        "a number in a longer form": header(b"\x08\x83\0" + STATUS[2:]),
        "a length in a longer form": b"\x4a" + bytes((len(STATUS) | 128, 0)) + STATUS,
        "a field's number in a longer form": header(b"\x88\0\3" + STATUS[2:]),
        "a group": header(STATUS) + b"\x0b\x0c",
        "shapes that are not packed": header(
            raw_field(1, CALL) + raw_field(2, b"\x08\1\x10\1" + b"\x1d\1\0\0\0" * 3), 19
        ),
        "nothing": b"",
        "an unknown message": header(b"", 99),
        "a text that is not UTF-8": header(b"\x0a\1\xff", 12),
        "cut": header(STATUS)[:-1],
    }.items(),
)
def test_another_form_of_a_header_is_refused(case: str, raw: bytes) -> None:
    with pytest.raises(MessageError, match=r"canonical|not a protobuf|no message"):
        unpack(raw, bytes(16))


def test_without_the_comparison_other_forms_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: protobuf takes them."""
    monkeypatch.setattr(encoding, "_parse", lambda kind, raw, what: kind.FromString(bytes(raw)))
    for raw in (header(STATUS + b"\x20\1"), header(b"\x08\3" + STATUS), header(STATUS) + b"\xfa\x07\0"):
        assert unpack(raw, b"") == unpack(header(STATUS), b"")


def _absences(parsed: Any, clear: Callable[[], bytes]) -> Iterator[tuple[str, bytes]]:
    """Every header that lacks one field, by the field's name."""
    for field in parsed.DESCRIPTOR.fields:
        if field.is_repeated or (field.containing_oneof is not None and field.containing_oneof.name == "message"):
            continue
        if parsed.HasField(field.name):
            kept = type(parsed)()
            kept.CopyFrom(parsed)
            parsed.ClearField(field.name)
            yield f"{parsed.DESCRIPTOR.name}.{field.name}", clear()
            parsed.CopyFrom(kept)
            if field.type == FieldDescriptor.TYPE_MESSAGE:
                yield from _absences(getattr(parsed, field.name), clear)


MAY_BE_ABSENT = {
    *("Forward.attention_mask", "Forward.position_ids", "SpanInputs.attention_mask", "SpanInputs.position_ids"),
    *("Backward.replay", "BackwardReply.gradient", "Status.id", "Attach.account"),
    *("Forward.plan", "FetchList.package", "Fetch.package"),
}


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_no_field_may_be_missing(message: m.Message) -> None:
    raw, buffers = pack(message)
    parsed = pb.Header.FromString(raw)
    inner = getattr(parsed, parsed.WhichOneof("message"))
    for name, lacking in _absences(inner, lambda: bytes(parsed.SerializeToString(deterministic=True))):
        if name not in MAY_BE_ABSENT:
            with pytest.raises((MessageError, LimitError)):
                pytest.fail(f"{name}: {unpack(lacking, b''.join(buffers))}")


def test_a_headers_length_does_not_depend_on_what_changes_from_call_to_call() -> None:
    def sizes(step: int, call: int, attempt: int, ns: int, nonce: int) -> list[int]:
        name = m.CallId(step, call, attempt)
        found = [pack(m.Ping(nonce)), pack(m.Pong(nonce, ns))]
        for message in MESSAGES:
            changes: dict[str, Any] = {"id": name} if isinstance(getattr(message, "id", None), m.CallId) else {}
            if isinstance(message, m.Timed):
                changes |= dict.fromkeys(("compute_ns", "crypto_ns", "queue_ns"), ns)
            found.append(pack(replace(message, **changes)))
        return [len(header) for header, _ in found]

    assert sizes(0, 0, 0, 0, 0) == sizes((1 << 32) - 1, (1 << 64) - 1, 9, (1 << 64) - 1, (1 << 64) - 1)


def test_a_header_over_its_limit_is_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits(max_header_bytes=8)
    monkeypatch.setattr(encoding, "_parse", lambda *_: pytest.fail("parsed"))
    for read in (lambda raw: unpack(raw, b"", limits), lambda raw: peek(raw, limits)):
        with pytest.raises(LimitError, match="header of 9 bytes"):
            read(b"\0" * 9)
    with pytest.raises(MessageError, match="session information of 16385 bytes"):
        unpack_info(bytes(m.MAX_INFO + 1))


# The session's information --------------------------------------------------------------------------------------------


def test_session_information_round_trips() -> None:
    assert unpack_info(pack_info(INFO)) == INFO


@pytest.mark.parametrize(
    "change",
    [
        {"digest": "../../tmp/x"}, {"digest": "A" * 64}, {"plan": "../x"}, {"plan": "2:2\n"}, {"session_id": "00"},
        {"model": "a\x1b[2J"}, {"model": "x" * 257}, {"codecs": ("fp32\n",)}, {"server_version": "\u200b"},
    ],
    ids=str,
)  # fmt: skip
def test_malformed_session_information_is_neither_sent_nor_taken(
    change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = replace(INFO, **change)
    with pytest.raises(LocalProtocolError, match="session's information"):
        pack_info(bad)
    with monkeypatch.context() as patch:
        patch.setattr(encoding, "check", lambda info: None)
        raw = pack_info(bad)
    with pytest.raises(MessageError, match=r"^SessionInfo\.|^session information has the text"):
        unpack_info(raw)


@pytest.mark.parametrize("change", [{"n_layers": -4}, {"n_layers": "4"}, {"codecs": (1,)}, {"hidden_size": 1 << 32}])
def test_session_information_of_other_types_is_not_sent(change: dict[str, Any]) -> None:
    with pytest.raises(LocalProtocolError, match="session's information"):
        pack_info(replace(INFO, **change))


def test_session_information_that_is_too_long_is_not_sent() -> None:
    with pytest.raises(LocalProtocolError, match="may be sent"):
        pack_info(replace(INFO, codecs=("x" * 256,) * 80))


def test_session_information_has_all_its_fields_and_no_others() -> None:
    raw = pack_info(INFO)
    for bad in (raw + b"\xfa\x07\0", raw[:-1], b"", b"{}", raw + raw):
        with pytest.raises(MessageError, match=r"session information|came without"):
            unpack_info(bad)
    parsed = pb.SessionInfo.FromString(raw)
    for name, lacking in _absences(parsed, lambda: bytes(parsed.SerializeToString(deterministic=True))):
        with pytest.raises(MessageError, match=f"without its field {name.split('.')[1]}"):
            unpack_info(lacking)
