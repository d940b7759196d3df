"""How messages about sites are packed; see `isthmus.protocol.encoding`."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from isthmus.backbone.sites.site_spec import Basis, Placement, SiteSpec
from isthmus.common.errors import LimitError, MessageError, PlanError
from isthmus.protocol.fields import TIMES, U8, U16, U32, U64, Reader, Writer
from isthmus.protocol.messages import MAX_NAME
from isthmus.protocol.site_messages import (
    MAX_GROUP,
    MAX_SITES,
    Lease,
    LentWeights,
    SiteAnswer,
    SitePhase,
    SiteQuestion,
    Sites,
)

_F64 = struct.Struct("!d")
_PLACEMENTS = frozenset(int(placement) for placement in Placement)
_BASES = frozenset(int(basis) for basis in Basis)
_PHASES = frozenset(int(phase) for phase in SitePhase)


def _write_sites(w: Writer, m: Sites) -> None:
    w.number(U32, m.number)
    w.number(U16, len(m.entries))
    for entry in m.entries:
        w.number(U32, entry.layer)
        w.text(entry.part, MAX_NAME)
        w.number(U8, entry.placement)
        w.number(U16, entry.rank)
        w.number(U64, entry.seed)
        w.number(U8, entry.basis)


def _read_sites(r: Reader) -> Sites:
    number, count = r.number(U32), r.number(U16)
    if count > MAX_SITES:
        raise LimitError(f"a list of {count} sites is refused: {MAX_SITES} are accepted")
    return Sites(number, tuple(_read_site(r) for _ in range(count)))


def _read_site(r: Reader) -> SiteSpec:
    layer, part, placement = r.number(U32), r.text(MAX_NAME), r.number(U8)
    rank, seed, basis = r.number(U16), r.number(U64), r.number(U8)
    if placement not in _PLACEMENTS or basis not in _BASES:
        raise MessageError(f"unknown placement {placement} or basis {basis}: the other side may run a newer version")
    try:
        return SiteSpec(layer, part, Placement(placement), rank, seed, Basis(basis))
    except PlanError as error:
        raise MessageError(str(error)) from error


def _write_question(w: Writer, m: SiteQuestion) -> None:
    w.call(m.id)
    w.number(U8, m.phase)
    w.number(TIMES, m.compute_ns, m.crypto_ns, m.queue_ns)
    w.number(U8, len(m.sites))
    for site in m.sites:
        w.number(U16, site)
    w.payloads(m.tensors)


def _read_question(r: Reader) -> SiteQuestion:
    call, phase, (compute, crypto, queue) = r.call(), r.number(U8), r.numbers(TIMES)
    if phase not in _PHASES:
        raise MessageError(f"unknown phase {phase} of a question: the other side may run a newer version")
    sites = tuple(r.number(U16) for _ in range(r.number(U8)))
    return SiteQuestion(call, SitePhase(phase), sites, r.payloads(MAX_GROUP), compute, crypto, queue)


def _write_answer(w: Writer, m: SiteAnswer) -> None:
    w.call(m.id)
    w.payloads(m.tensors)


def _write_lease(w: Writer, m: Lease) -> None:
    w.number(U32, m.number)
    w.number(U32, m.sites)
    w.number(U16, len(m.weights))
    for lent in m.weights:
        w.header += _F64.pack(lent.scale)
        w.payload(lent.down)
        w.payload(lent.up)


def _read_lease(r: Reader) -> Lease:
    number, sites, count = r.number(U32), r.number(U32), r.number(U16)
    if count > MAX_SITES:
        raise LimitError(f"a lease of {count} sites is refused: {MAX_SITES} are accepted")
    return Lease(number, sites, tuple(_read_lent(r) for _ in range(count)))


def _read_lent(r: Reader) -> LentWeights:
    (scale,) = _F64.unpack(r.raw(_F64.size))
    return LentWeights(r.payload(), r.payload(), scale)


# Each function takes the one message class that its operation code stands for; the table's types cannot say so.
SITE_WRITERS: dict[int, Callable[..., None]] = {
    Sites.op: _write_sites,
    SiteQuestion.op: _write_question,
    SiteAnswer.op: _write_answer,
    Lease.op: _write_lease,
}
SITE_READERS: dict[int, Callable[[Reader], Any]] = {
    Sites.op: _read_sites,
    SiteQuestion.op: _read_question,
    SiteAnswer.op: lambda r: SiteAnswer(r.call(), r.payloads(MAX_GROUP)),
    Lease.op: _read_lease,
}
