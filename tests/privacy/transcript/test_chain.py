"""Digests, heads and signatures, each with something that they must not take for the same."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
from support.protocol.example_messages import MESSAGES
from support.protocol.wire import NOW, PIN, identity

from isthmus.common.errors import FingerprintError, TranscriptError
from isthmus.privacy.transcript.chain import (
    NOTHING,
    Chain,
    CloudTranscript,
    Session,
    Statement,
    certificate_of,
    digest,
    statement_of,
)
from isthmus.protocol import messages as m
from isthmus.protocol.secure.keys import Fingerprint

SESSION = Session(bytes(range(16)), "ab" * 32, "2:2", "fp32", "sdpa", "here")
FORWARD, REPLY = (next(each for each in MESSAGES if isinstance(each, kind)) for kind in (m.Forward, m.ForwardReply))
SITES, LEASE = (next(each for each in MESSAGES if isinstance(each, kind)) for kind in (m.Sites, m.Lease))
TAKEN = m.Status(m.StatusCode.OK, None, "")
ELSEWHERE = Fingerprint(bytes(32))


def test_a_digest_is_of_what_is_said_and_not_of_when() -> None:
    assert isinstance(REPLY, m.ForwardReply)
    assert digest(REPLY) == digest(
        dataclasses.replace(REPLY, id=m.CallId(9, 9, 9), compute_ns=7, crypto_ns=7, queue_ns=7)
    )
    changed = bytearray(REPLY.hidden.buffers[0])
    changed[0] ^= 1
    hidden = dataclasses.replace(REPLY.hidden, buffers=(bytes(changed),))
    assert digest(REPLY) != digest(dataclasses.replace(REPLY, hidden=hidden))
    assert digest(REPLY) != digest(dataclasses.replace(REPLY, taps=()))


def test_messages_that_differ_have_digests_that_differ() -> None:
    assert len({digest(each) for each in MESSAGES}) == len(MESSAGES)


def test_a_head_depends_on_each_part_of_an_exchange_and_on_the_session() -> None:
    chain = Chain(SESSION)
    exchange = chain.add(FORWARD, digest(FORWARD), REPLY)
    assert exchange is not None
    assert chain.head == exchange.after(SESSION.head) != SESSION.head
    heads = {chain.head}
    for name, value in (
        ("question", "Backward"),
        ("call", m.CallId(1, 2, 4)),
        ("sent", bytes(32)),
        ("answered", bytes(32)),
        ("adapters", bytes(range(32))),
    ):
        heads.add(dataclasses.replace(exchange, **{name: value}).after(SESSION.head))
    assert len(heads) == 6
    others = {dataclasses.replace(SESSION, **{each.name: "x"}).head for each in dataclasses.fields(SESSION)[1:]}
    assert len({*others, SESSION.head, dataclasses.replace(SESSION, id=bytes(16)).head}) == 7


def test_statuses_are_no_exchanges_and_adapters_count_once_they_are_taken() -> None:
    assert isinstance(FORWARD, m.Forward)
    assert isinstance(LEASE, m.Lease)
    chain = Chain(SESSION)
    assert chain.add(FORWARD, bytes(32), TAKEN) is None
    assert chain.add(m.Ping(1), bytes(32), m.Pong(1, 0)) is None
    plain = dataclasses.replace(FORWARD, sites=0, lease=0)
    found = [chain.add(plain, digest(plain), REPLY)]
    for message, answer in ((SITES, TAKEN), (LEASE, dataclasses.replace(TAKEN, code=m.StatusCode.BAD_REQUEST))):
        chain.add(message, digest(message), answer)
        found.append(chain.add(FORWARD, digest(FORWARD), REPLY))
    chain.add(LEASE, digest(LEASE), TAKEN)
    found.append(chain.add(FORWARD, digest(FORWARD), REPLY))
    adapters = [None if each is None else each.adapters for each in found]
    assert adapters[0] == NOTHING
    assert adapters[1] == adapters[2] != adapters[3]
    assert chain.exchanges == 4


def signed(exchanges: int = 1) -> m.SignedTranscript:
    transcript = CloudTranscript(SESSION, partial(identity, not_after=NOW * 2))
    transcript.answered(FORWARD, digest(FORWARD), REPLY)
    found = transcript.sign(m.SignTranscript(exchanges), NOW)
    assert isinstance(found, m.SignedTranscript), found
    return found


def test_a_signature_verifies_and_nothing_in_it_may_change() -> None:
    found = signed()
    statement = statement_of(SESSION.id, found)
    statement.verify(found.signature, certificate_of(found), PIN)
    statement.verify(found.signature, certificate_of(found), None)
    for name, value in (
        ("session", bytes(16)),
        ("exchanges", 2),
        ("head", bytes(32)),
        ("signed_at", NOW + 1),
    ):
        other: Statement = dataclasses.replace(statement, **{name: value})
        with pytest.raises(TranscriptError, match="does not verify"):
            other.verify(found.signature, certificate_of(found), PIN)


def test_another_root_and_a_certificate_that_had_expired_are_refused() -> None:
    found = signed()
    statement = statement_of(SESSION.id, found)
    with pytest.raises(TranscriptError, match="another cloud's"):
        statement.verify(found.signature, certificate_of(found), ELSEWHERE)
    late = dataclasses.replace(statement, signed_at=NOW * 3)
    with pytest.raises(FingerprintError, match="expired"):
        late.verify(found.signature, certificate_of(found), PIN)


def test_a_session_that_outlives_a_certificate_is_signed_under_the_renewed_one() -> None:
    shown = [identity(not_after=NOW + 10)]
    transcript = CloudTranscript(SESSION, lambda: shown[-1])

    def verified_at(now: int) -> int:
        transcript.answered(FORWARD, digest(FORWARD), REPLY)
        found = transcript.sign(m.SignTranscript(transcript._chain.exchanges), now)
        assert isinstance(found, m.SignedTranscript)
        statement_of(SESSION.id, found).verify(found.signature, certificate_of(found), PIN)
        return found.not_after

    assert verified_at(NOW) == NOW + 10
    with pytest.raises(FingerprintError, match="expired"):
        verified_at(NOW + 20)
    shown.append(identity(not_after=NOW + 40))
    assert verified_at(NOW + 20) == NOW + 40


def test_a_cloud_signs_for_its_own_count_alone() -> None:
    with pytest.raises(AssertionError, match="counts 2 exchanges"):
        signed(exchanges=2)


def test_what_a_side_holds_of_a_session_does_not_grow_with_it() -> None:
    """A chain has its head and the digests of as many lists as the cloud keeps; a signature is made once for a head."""
    assert isinstance(SITES, m.Sites)
    cloud = CloudTranscript(SESSION, identity)
    for number in range(3 * m.MAX_LISTS):
        cloud.answered(dataclasses.replace(SITES, number=number + 1), bytes(32), TAKEN)
        cloud.answered(FORWARD, bytes(32), REPLY)
    assert len(cloud._chain._lists) == m.MAX_LISTS
    assert max(cloud._chain._lists) == 3 * m.MAX_LISTS
    assert {name: type(value) for name, value in vars(cloud._chain).items() if isinstance(value, list)} == {}
    asked = m.SignTranscript(cloud._chain.exchanges)
    assert cloud.sign(asked, NOW) is cloud.sign(asked, NOW)
