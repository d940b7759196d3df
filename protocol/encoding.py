"""Encoding: a message to a header and a body, and back.

Rules
    1. A header is a protobuf message, `Header` in `isthmus.proto`; a body is the bytes of its tensors, or of a file.
    2. There is one encoding of a message, and only that one is accepted: a header is refused unless protobuf writes
       what it has read of it to the same bytes again, and a body unless its padding is zeros and nothing is left over.
    3. A header is parsed after it was authenticated, and within its limit. Nothing is allocated for a number in it
       before that was compared with a limit and with the bytes that are there. Tensors stay views of the body until
       `isthmus.protocol.tensor_codecs.decode`.
    4. A message is checked by the rules of its fields, which `isthmus.protocol.messages` has, on both sides alike.

Theory of operation
    The dataclasses of `isthmus.protocol.messages` have the names of the protobuf messages and of their fields, so one
    function writes all of them and one reads all of them. A `Payload` becomes a `Tensor` in the header, and its buffers
    go to the body, in the header's order, each padded to a 16-byte boundary: a received tensor needs no copy.
"""

from __future__ import annotations

import enum
import re
import typing
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from types import NoneType
from typing import Annotated, Any

from google.protobuf.message import DecodeError

from isthmus.common.errors import LimitError, LocalProtocolError, MessageError, PlanError
from isthmus.protocol import isthmus_pb2 as pb
from isthmus.protocol.limits import DEFAULT_LIMITS, MAX_NAME, Buffer, Limits, Size, Text
from isthmus.protocol.messages import MAX_INFO, Blob, CallId, Message, Put, SessionInfo
from isthmus.protocol.tensor_codecs import CODECS, Payload, Role, check_hidden, checked_sizes, codec_by_id

ALIGNMENT = 16
_UNLIMITED = Limits(max_message_bytes=1 << 62)


def pack(message: Message) -> tuple[bytes, list[Buffer]]:
    """Write a message: its header, and the buffers that make up its body, padding included.

    Raises:
        LocalProtocolError: a field is out of range.
    """
    body: list[Buffer] = []
    try:
        check(message)
        header = pb.Header(**{_NAMES[type(message)]: _written(message, body)})
    except _UNWRITABLE as error:
        raise LocalProtocolError(f"{type(message).__name__} cannot be sent: {error}") from error
    if isinstance(message, Blob | Put) and len(message.data):
        body.append(memoryview(message.data).cast("B"))
    return bytes(header.SerializeToString(deterministic=True)), body


def unpack(header: Buffer, body: Buffer, limits: Limits = DEFAULT_LIMITS) -> Message:
    """Read a message. Its tensors are views of `body`.

    Raises:
        MessageError: the message is not one that `pack` writes.
        LimitError: a size or a rank is over a limit.
    """
    if len(body) > limits.max_message_bytes:
        raise LimitError(f"a message body of {len(body)} bytes is refused: {limits.max_message_bytes} are accepted")
    kind, values = _parse_header(header, limits)
    rest = _Body(body, limits)
    more = {"data": rest.take(len(body))} if kind in (Blob, Put) else {}
    message: Message = _read(kind, values, rest, **more)
    rest.finish()
    check(message)
    return message


def peek(header: Buffer, limits: Limits = DEFAULT_LIMITS) -> tuple[type[Message], CallId | None]:
    """The kind of a message whose body was dropped, and the call that it names, where it names one.

    Raises:
        MessageError, LimitError: the header is none.
    """
    kind, values = _parse_header(header, limits)
    named = any(field.name == "id" for field in _fields_of(kind)) and values.HasField("id")
    return kind, _read(CallId, values.id, _Body(b"", limits)) if named else None


def pack_info(info: SessionInfo) -> bytes:
    """Write a session's information.

    Raises:
        LocalProtocolError: a field is out of range.
    """
    try:
        check(info)
        raw = bytes(pb.SessionInfo(**_written(info, [])).SerializeToString(deterministic=True))
    except _UNWRITABLE as error:
        raise LocalProtocolError(f"the session's information cannot be sent: {error}") from error
    if len(raw) > MAX_INFO:
        raise LocalProtocolError(f"the session's information has {len(raw)} bytes: {MAX_INFO} may be sent")
    return raw


def unpack_info(raw: Buffer) -> SessionInfo:
    """Read a session's information.

    Raises:
        MessageError: it is not what `pack_info` writes.
    """
    if len(raw) > MAX_INFO:
        raise MessageError(f"session information of {len(raw)} bytes is refused: {MAX_INFO} are accepted")
    parsed = _parse(pb.SessionInfo, raw, "session information")
    info: SessionInfo = _read(SessionInfo, parsed, _Body(b"", DEFAULT_LIMITS))
    check(info)
    return info


def body_bytes(codec: str, shape: tuple[int, ...]) -> int:
    """Bytes that a tensor of `shape`, coded by the codec of that name, takes in a message's body, padding included."""
    return sum(size + -size % ALIGNMENT for size in CODECS[codec].sizes(shape))


def check(value: Any) -> None:
    """Check what the fields of a message, or of a dataclass in it, may hold, each by itself and all together.

    Raises:
        MessageError: one holds what it may not, or they do not fit each other.
    """
    kind: Any = type(value)
    for field in _fields_of(kind):
        held = getattr(value, field.name)
        if held is None:
            continue
        for rule in field.rules:
            _check_rule(rule, held, f"{kind.__name__}.{field.name}")
        for each in held if field.many else (held,):
            for rule in field.entry_rules:
                _check_rule(rule, each, f"{kind.__name__}.{field.name}")
            if field.nested:
                check(each)
    if hasattr(value, "check"):
        value.check()


def _check_rule(rule: Any, held: Any, where: str) -> None:
    if isinstance(rule, Role):
        check_hidden(held, rule)
    elif isinstance(rule, Text):
        if len(held) > MAX_NAME or not rule.pattern.fullmatch(held):
            raise MessageError(f"{where} {held[:MAX_NAME]!r} is refused: {rule.needed}")
    elif isinstance(rule, Size):
        size = held if isinstance(held, int) else len(held.encode() if isinstance(held, str) else held)
        unit = "" if isinstance(held, int) else " entries" if isinstance(held, tuple) else " bytes"
        if not rule.least <= size <= rule.most:
            raise MessageError(f"{where} of {size}{unit} is refused: {rule.least} to {rule.most} are accepted")


@dataclass(frozen=True, slots=True)
class _Field:
    """A field of a dataclass that is a field of the protobuf message of the same name.

    Attributes:
        name: that of both.
        kind: the type of its value, or of its entries.
        many: whether it has entries.
        optional: whether it may be absent.
        rules: what its value, or the list of its entries, must be.
        entry_rules: what each of its entries must be.
    """

    name: str
    kind: Any
    many: bool
    optional: bool
    rules: tuple[Any, ...]
    entry_rules: tuple[Any, ...]

    @property
    def nested(self) -> bool:
        """Whether a value is a dataclass with fields of its own."""
        return is_dataclass(self.kind) and self.kind is not Payload


@cache
def _fields_of(kind: Any) -> tuple[_Field, ...]:
    hints, found = typing.get_type_hints(kind, include_extras=True), []
    for name in (field.name for field in fields(kind)):
        hint = hints[name]
        if hint == Buffer:  # bytes of a file, which are the body
            continue
        optional = NoneType in typing.get_args(hint)
        if optional:
            hint = next(each for each in typing.get_args(hint) if each is not NoneType)
        hint, rules = _unwrapped(hint)
        many = typing.get_origin(hint) is tuple
        hint, entry_rules = _unwrapped(typing.get_args(hint)[0]) if many else (hint, ())
        found.append(_Field(name, hint, many, optional, rules, entry_rules))
    return tuple(found)


def _unwrapped(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type without its annotations, and these."""
    return (hint.__origin__, hint.__metadata__) if typing.get_origin(hint) is Annotated else (hint, ())


_NAMES = {kind: re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).lower() for kind in typing.get_args(Message)}
_KINDS = {name: kind for kind, name in _NAMES.items()}
for _kind in _NAMES:
    _fields_of(_kind)  # now, so that the bounds are those of the source, whoever changes a constant later
_SCALARS = (bool, int, float, str, bytes)
_UNWRITABLE = (MessageError, LimitError, ValueError, TypeError, OverflowError)
"""What the checks raise, and protobuf where a value does not fit its field."""


def _written(value: Any, body: list[Buffer]) -> Any:
    """What a protobuf message is made of in the place of a value. Buffers of tensors are appended to the body."""
    if isinstance(value, Payload):
        body.extend(_buffers(value))
        return {"codec": value.codec, "role": value.role, "shape": value.shape}
    if isinstance(value, tuple):
        return [_written(each, body) for each in value]
    if is_dataclass(value):
        kind: Any = type(value)
        found = {field.name: getattr(value, field.name) for field in _fields_of(kind)}
        return {name: _written(each, body) for name, each in found.items() if each is not None}
    return value


def _buffers(payload: Payload) -> typing.Iterator[Buffer]:
    sizes = checked_sizes(codec_by_id(payload.codec), payload.shape, _UNLIMITED)
    if sizes != tuple(len(buffer) for buffer in payload.buffers):
        raise MessageError(f"the buffers of a payload of shape {list(payload.shape)} do not have {sizes} bytes")
    for buffer in payload.buffers:
        yield buffer
        if len(buffer) % ALIGNMENT:
            yield bytes(-len(buffer) % ALIGNMENT)


def _parse_header(header: Buffer, limits: Limits) -> tuple[Any, Any]:
    """The kind of a message, and its fields."""
    if len(header) > limits.max_header_bytes:
        raise LimitError(f"a message header of {len(header)} bytes is refused: {limits.max_header_bytes} are accepted")
    parsed = _parse(pb.Header, header, "a message header")
    name = parsed.WhichOneof("message")
    if name is None:
        raise MessageError("a message header has no message: the other side may run a newer version")
    return _KINDS[name], getattr(parsed, name)


def _parse(kind: Any, raw: Buffer, what: str) -> Any:
    """Parse a protobuf message of which there is one encoding."""
    try:
        parsed = kind.FromString(bytes(raw))
    except DecodeError as error:
        raise MessageError(f"{what} is not a protobuf message: {error}") from error
    parsed.DiscardUnknownFields()
    if parsed.SerializeToString(deterministic=True) != raw:
        raise MessageError(
            f"{what} has an unknown field or is not in the canonical form: the other side may run another version"
        )
    return parsed


def _read(kind: Any, value: Any, body: _Body, **more: Any) -> Any:
    """The value of a Python type that protobuf's value stands for; `more`: further fields of a dataclass."""
    if kind is Payload:
        return body.payload(value.codec, _read(Role, value.role, body), tuple(value.shape))
    if kind in _SCALARS:
        return value
    if issubclass(kind, enum.Enum):
        try:
            return kind(value)
        except ValueError:
            raise MessageError(f"{value} is no {kind.__name__}: the other side may run a newer version") from None
    for field in _fields_of(kind):
        if field.many:
            more[field.name] = tuple(_read(field.kind, each, body) for each in getattr(value, field.name))
        elif value.HasField(field.name):
            more[field.name] = _read(field.kind, getattr(value, field.name), body)
        elif field.optional:
            more[field.name] = None
        else:
            raise MessageError(f"{kind.__name__} came without its field {field.name}")
    try:
        return kind(**more)
    except PlanError as error:
        raise MessageError(str(error)) from error


class _Body:
    """Takes buffers from a body; every take is checked against what is left."""

    def __init__(self, body: Buffer, limits: Limits) -> None:
        self._left = memoryview(body)
        self._limits = limits

    def take(self, count: int) -> memoryview:
        """Take so many bytes."""
        if count > len(self._left):
            raise MessageError(f"a message body ends {count - len(self._left)} bytes early")
        taken, self._left = self._left[:count], self._left[count:]
        return taken

    def payload(self, codec: int, role: Role, shape: tuple[int, ...]) -> Payload:
        """Take a tensor."""
        buffers = []
        for size in checked_sizes(codec_by_id(codec), shape, self._limits):
            buffers.append(self.take(size))
            if any(self.take(-size % ALIGNMENT)):
                raise MessageError("the padding of a message body is not zero")
        return Payload(codec, role, shape, tuple(buffers))

    def finish(self) -> None:
        """Make sure that nothing is left over."""
        if len(self._left):
            raise MessageError(f"a message has {len(self._left)} body bytes too many")
