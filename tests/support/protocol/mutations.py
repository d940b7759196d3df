"""Messages as no side may send them: one value of a good message is replaced by a bad one.

The bad values of a field follow from its type. A field of a type that is not listed here is an error, so that a new one
cannot be forgotten.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass, replace
from typing import Any

from support.protocol.wire import payload

from isthmus.backbone.sites.site_spec import Basis, Placement, SiteSpec
from isthmus.protocol import messages as m
from isthmus.protocol.limits import MAX_WORKERS, Buffer
from isthmus.protocol.tensor_codecs import Payload, Role, codec_by_id, codec_id

Mutation = tuple[str, m.Message]

NAMES = ("", "..", "../a", "a/b", "/a", ".a", "a\\b", "a b", "a\n", "a\0", "ä", "\ud800", "x" * 129)
TEXTS = ("x" * (m.MAX_TEXT + 1), "\ud800")


def mutations(message: m.Message) -> Iterator[Mutation]:
    """Every message that differs from a good one in one value that makes it a bad one, and what was changed."""
    for where, changed in _fields(message):
        yield where, changed
    for number, changed in enumerate(SIBLINGS.get(type(message), lambda message: ())(message)):
        yield f"together {number}", changed


def _fields(owner: Any) -> Iterator[tuple[str, Any]]:
    hints = typing.get_type_hints(type(owner))
    for field in dataclasses.fields(owner):
        value, kind = getattr(owner, field.name), hints[field.name]
        for where, bad in _bad(type(owner), field.name, kind, value):
            yield f"{field.name}{where}", replace(owner, **{field.name: bad})


def _bad(owner: type, name: str, kind: Any, value: Any) -> Iterator[tuple[str, Any]]:
    """Bad values in the place of a good one."""
    if value is None:
        return
    if kind == Buffer:
        yield " too long", bytes(m.MAX_FILE_CHUNK + 1)
        return
    if type(None) in typing.get_args(kind):  # an optional one
        (kind,) = (each for each in typing.get_args(kind) if each is not type(None))
    if typing.get_origin(kind) is tuple:
        (kind, _) = typing.get_args(kind)
        for number, each in enumerate(value):
            for where, bad in _bad(owner, name, kind, each):
                yield f"[{number}]{where}", (*value[:number], bad, *value[number + 1 :])
        return
    if kind is Payload:
        yield from _payloads(value, any_role=owner is m.SiteAnswer)
    elif is_dataclass(kind) and kind is not SiteSpec:
        for where, bad in _fields(value):
            yield f".{where}", bad
    else:
        for number, bad in enumerate(VALUES.get((owner, name)) or VALUES[kind]):
            yield f" {number}", bad


def _payloads(good: Payload, *, any_role: bool) -> Iterator[tuple[str, Payload]]:
    """Another role, codec, rank or number of bytes than the place of a tensor can have."""
    codec = codec_by_id(good.codec)
    other = payload(good.shape, "mask" if codec.activation else "fp32", good.role, 0)
    yield " codec", other
    yield " unknown codec", replace(good, codec=99)
    for role in Role:
        if role != good.role and not (any_role and role != Role.INDEX):
            yield f" {role.name}", replace(good, role=role)
    for shape in ((*good.shape, 1), good.shape[1:], (1,) * 5):
        if shape:
            yield f" {len(shape)} dimensions", payload(shape, codec.name, good.role, 0)
    yield " no dimension", replace(good, shape=())
    yield " an empty dimension", replace(good, shape=(0, *good.shape[1:]), buffers=tuple(b"" for _ in good.buffers))
    yield " far too large", replace(good, shape=tuple((1 << 32) - 1 for _ in good.shape))
    yield " a dimension too large", replace(good, shape=(1 << 32, *good.shape[1:]))
    yield " a byte short", replace(good, buffers=(*good.buffers[:-1], bytes(good.buffers[-1])[:-1]))
    yield " a buffer too many", replace(good, buffers=(*good.buffers, b""))
    yield " no buffers", replace(good, buffers=())


VALUES: dict[Any, tuple[Any, ...]] = {
    int: (-1, 1 << 64),
    bool: (),
    float: (math.nan, math.inf, -math.inf, 10**400),
    str: NAMES,
    bytes: (b"", bytes(15), bytes(31), bytes(33)),
    SiteSpec: (
        SiteSpec(-1, "a"),
        SiteSpec(1 << 32, "a"),
        *(SiteSpec(1, part) for part in ("a..b", ".a", "a.", "../a", "a/b", "a b", "a\n", "é", "\ud800", "x" * 129)),
        SiteSpec(1, "a", Placement.LOW_RANK, 1 << 16),
        SiteSpec(1, "a", Placement.LOW_RANK, 4, -1),
        SiteSpec(1, "a", Placement.LOW_RANK, 4, 1 << 64, Basis.SVD),
    ),
    m.FileSet: (0, 6, 256),
    m.StatusCode: (6, 255, 256),
    m.SitePhase: (0, 5, 256),
    (m.Status, "message"): TEXTS,
    (m.Goodbye, "reason"): TEXTS,
    (m.SignedTranscript, "issuer"): (bytes(1), bytes(103), bytes(105)),
    (m.Sites, "number"): (-1, 0, 1 << 32),
    (m.Decode, "cache"): (-1, m.MAX_CACHES, 1 << 32),
    (m.Decode, "start"): (-1, 1 << 32),
    (m.CacheLost, "have"): (-1, 1 << 32),
    (m.Lease, "number"): (-1, 0, 1 << 32),
    (m.Lease, "sites"): (-1, 0, 1 << 32),
    (m.Account, "weight"): (-1, 0, 1 << 32),
    (m.Account, "tenant"): ("", "-a", "two words", "a\n", "al/ice", "ä", "x" * 65),
    (m.Workers, "addresses"): ("", "a", "a:", "a:b", "a:123456", "a b:1", "[::1:1", "a/b:1", "a:1\n", "x" * 129 + ":1"),
    (m.Workers, "go_to"): ("elsewhere:1", "x" * 129),
}
"""Bad values by a field's type, and for some fields their own. Those that are too large are so for any place."""

FILE = m.FileEntry("a", 1, bytes(32))
HIDDEN = payload((1, 1, 1), "fp32", Role.ACTIVATION, 0)
GRADIENT = payload((1, 1, 1), "fp32", Role.GRADIENT, 0)
MATRIX = payload((1, 1), "fp32", Role.GRADIENT, 0)


def _taller(good: Payload, rows: int = 1) -> Payload:
    """One of more rows."""
    return payload((good.shape[0] + rows, *good.shape[1:]), codec_by_id(good.codec).name, good.role, 0)


def _call(good: m.Forward | m.Backward | m.Decode) -> Iterator[m.Message]:
    yield replace(good, sites=0, lease=1)
    yield replace(good, reply_codec=codec_id("fp32") + 100)
    yield replace(good, reply_codec=5)  # masks'
    yield replace(good, sites=1 << 32)
    yield replace(good, sites=1, lease=1 << 32)


def _inputs(inputs: m.SpanInputs) -> Iterator[m.SpanInputs]:
    batch, length, _ = inputs.hidden.shape
    for shape in ((batch + 1, length), (batch, length + 1)):
        yield replace(inputs, attention_mask=payload(shape, "mask", Role.INDEX, 0))
    for shape in ((batch + 2, length), (1, length + 1)):
        yield replace(inputs, position_ids=payload(shape, "int32", Role.INDEX, 0))
    yield replace(inputs, attention_mask=payload((batch, length), "int32", Role.INDEX, 0))
    yield replace(inputs, position_ids=payload((batch, length), "mask", Role.INDEX, 0))


def _forward(good: m.Forward) -> Iterator[m.Message]:
    yield from _call(good)
    for each in _inputs(good.inputs):
        yield replace(good, attention_mask=each.attention_mask, position_ids=each.position_ids)


def _decode(good: m.Decode) -> Iterator[m.Message]:
    yield from _call(good)
    batch, length, _ = good.hidden.shape
    yield replace(good, rows=(0,) * (batch + 1))
    yield replace(good, rows=(-1,) * batch)
    yield replace(good, rows=(1 << 32,) * batch)
    yield replace(good, blocks=(length + 1,))
    yield replace(good, blocks=(0, length))
    yield replace(good, cache=m.MAX_CACHES)
    for rows, blocks in (((0,) * (m.MAX_ROWS + 1), ()), ((), (m.MAX_BLOCK + 1,)), ((), (1,) * (m.MAX_BLOCKS + 1))):
        hidden = payload((len(rows) or 1, sum(blocks) or 1, 1), "fp32", Role.ACTIVATION, 0)  # which they fit
        yield replace(good, rows=rows, blocks=blocks, hidden=hidden, attention_mask=None, position_ids=None)
    for shape in ((batch + 1, good.start + length), (batch, good.start + length + 1)):
        yield replace(good, attention_mask=payload(shape, "mask", Role.INDEX, 0))
    yield replace(good, position_ids=payload((1, length + 1), "int32", Role.INDEX, 0))


def _backward(good: m.Backward) -> Iterator[m.Message]:
    yield from _call(good)
    same = payload(good.gradient.shape, "fp32", Role.ACTIVATION, 0)
    for each in _inputs(m.SpanInputs(same)):
        yield replace(good, replay=each)
    yield replace(good, replay=m.SpanInputs(_taller(same)))


def _forward_reply(good: m.ForwardReply) -> Iterator[m.Message]:
    tap = payload((*good.hidden.shape[:2], 1), "fp32", Role.ACTIVATION, 0)
    yield replace(good, taps=(_taller(tap),))
    yield replace(good, taps=(tap,) * (m.MAX_SITES + 1))
    for shape in (good.hidden.shape[:2], (*good.hidden.shape, 1)):
        yield replace(good, taps=(payload(shape, "fp32", Role.ACTIVATION, 0),))
    yield replace(good, taps=(replace(tap, role=Role.GRADIENT),))
    yield replace(good, taps=(replace(tap, role=Role.INDEX),))


def _backward_reply(good: m.BackwardReply) -> Iterator[m.Message]:
    yield replace(good, leased=(*good.leased, MATRIX))
    yield replace(good, leased=(MATRIX,) * (2 * m.MAX_SITES + 2))
    yield replace(good, leased=(MATRIX, payload((1, 2), "fp32", Role.GRADIENT, 0)))
    yield replace(good, leased=(MATRIX, payload((1, 1), "bf16", Role.GRADIENT, 0)))
    yield replace(good, leased=(MATRIX, replace(MATRIX, role=Role.ACTIVATION)))


def _lease(good: m.Lease) -> Iterator[m.Message]:
    leased = good.weights[0]
    yield replace(good, weights=())
    small = replace(MATRIX, role=Role.ACTIVATION)
    yield replace(good, weights=(m.LeasedWeights(small, small, 1.0),) * (m.MAX_SITES + 1))
    yield replace(good, weights=(replace(leased, down=_taller(leased.down)),))
    for codec in ("bf16", "int8"):
        yield replace(good, weights=(replace(leased, up=payload(leased.up.shape, codec, Role.ACTIVATION, 0)),))


def _sites(good: m.Sites) -> Iterator[m.Message]:
    yield replace(good, entries=())
    yield replace(good, entries=(SiteSpec(1, "a"),) * (m.MAX_SITES + 1))


def _question(good: m.SiteQuestion) -> Iterator[m.Message]:
    yield replace(good, sites=())
    yield replace(good, sites=(1, 1))
    yield replace(good, sites=tuple(range(m.MAX_GROUP + 1)))
    yield replace(good, sites=(1 << 16,))
    yield replace(good, tensors=(HIDDEN,) * (len(good.sites) + 1))
    yield replace(good, tensors=(GRADIENT,) * (m.MAX_GROUP + 1))
    if good.phase != m.SitePhase.AGAIN:
        yield replace(good, tensors=())


def _answer(good: m.SiteAnswer) -> Iterator[m.Message]:
    yield replace(good, tensors=(HIDDEN,) * (m.MAX_GROUP + 1))
    yield replace(good, tensors=(HIDDEN, GRADIENT))


def _chunk(good: m.Blob | m.Put) -> Iterator[m.Message]:
    yield replace(good, total=good.offset + len(good.data) - 1)


def _workers(good: m.Workers) -> Iterator[m.Message]:
    yield m.Workers(())
    yield m.Workers(("a:1", "a:1"))
    yield m.Workers(tuple(f"a:{port}" for port in range(MAX_WORKERS + 1)))


SIBLINGS: dict[type[m.Message], Callable[[Any], Iterator[m.Message]]] = {
    m.Forward: _forward,
    m.Backward: _backward,
    m.Decode: _decode,
    m.ForwardReply: _forward_reply,
    m.BackwardReply: _backward_reply,
    m.Lease: _lease,
    m.Sites: _sites,
    m.SiteQuestion: _question,
    m.SiteAnswer: _answer,
    m.Blob: _chunk,
    m.Put: _chunk,
    m.Workers: _workers,
    m.FileList: lambda good: iter((m.FileList((FILE, FILE)), m.FileList((FILE,) * (1 << 16)))),
    m.PlugIn: lambda good: iter(
        (m.PlugIn(()), m.PlugIn((FILE, FILE)), m.PlugIn(tuple(replace(FILE, name=f"f{n}") for n in range(9))))
    ),
}
"""Values that are good by themselves and bad together."""
