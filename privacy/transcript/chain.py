"""The hash chain over a session's exchanges, which both sides keep, and the cloud's signature under it.

docs/protocol.md, section "Transcripts", has the formulas. The edge computes the same chain from what it sent and what
it received. So a signature under another head means that the cloud says of itself that it was sent, or answered,
something else; a signature that is missing leaves the exchanges since the last one without a word of the cloud's.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from hashlib import sha256
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from isthmus.common.errors import TranscriptError
from isthmus.protocol import messages as m
from isthmus.protocol.encoding import pack
from isthmus.protocol.limits import Buffer
from isthmus.protocol.secure.certificates import IssuerCertificate, WorkerCertificate
from isthmus.protocol.secure.keys import Fingerprint, WorkerIdentity

NOTHING = bytes(32)
"""The digest of the adapters of a call without any."""
QUESTIONS = (m.Forward, m.Backward, m.Decode, m.SiteAnswer)
ANSWERS = (m.ForwardReply, m.BackwardReply, m.SiteQuestion)
ADAPTERS = (m.Sites, m.Lease)
_BLANK = {"id": m.CallId(0, 0, 0), "compute_ns": 0, "crypto_ns": 0, "queue_ns": 0, "recomputed": False}
"""Fields that may differ between two computations of one call."""


def digest(message: m.Message) -> bytes:
    """SHA-256 of what a message says: its tensors as they cross, their codecs and shapes, and its options.

    Which call it is of, and how long it took, is left out: equal digests of two answers mean equal bits.
    """
    blank: Any = {each.name: _BLANK[each.name] for each in fields(message) if each.name in _BLANK}
    header, body = pack(replace(message, **blank))
    whole = sha256(_framed(type(message).__name__.encode()) + _framed(header))
    whole.update(struct.pack("!I", sum(map(len, body)) % (1 << 32)))
    for part in body:
        whole.update(part)
    return whole.digest()


@dataclass(frozen=True, slots=True)
class Session:
    """What a transcript says of its session: the model, and how it computes.

    Attributes:
        id: The session's id, 16 bytes.
        model: SHA-256 of the checkpoint, in hexadecimal.
        plan: The split plan.
        span_dtype: What the cloud's layers compute in, with their quantization.
        attention: Their implementation of attention.
        numerics: What else the bits of an answer depend on, as the cloud says before it answers anything.
    """

    id: bytes
    model: str
    plan: str
    span_dtype: str
    attention: str
    numerics: str

    @classmethod
    def of(cls, info: m.SessionInfo) -> Session:
        """That of a session's information."""
        session = bytes.fromhex(info.session_id)
        said = (info.digest, info.plan, info.span_dtype, info.attn_implementation, info.numerics)
        return cls(session, *said)

    @property
    def head(self) -> bytes:
        """The head of its chain before the first exchange."""
        said = (each.encode() for each in (self.model, self.plan, self.span_dtype, self.attention, self.numerics))
        return _hash(b"isthmus v1 transcript begins", self.id, *said)


@dataclass(frozen=True, slots=True)
class Exchange:
    """A question with tensors, and its answer.

    Attributes:
        question: The kind of the message that was sent.
        call: Step, call and attempt.
        sent: Digest of the question.
        answered: Digest of the answer.
        adapters: Digest of the sites and the lease that the call names; zeros for none.
    """

    question: str
    call: m.CallId
    sent: bytes
    answered: bytes
    adapters: bytes

    def after(self, head: bytes) -> bytes:
        """The head of a chain that goes on with this exchange."""
        name = struct.pack("!IQI", self.call.step, self.call.call, self.call.attempt)
        return _hash(head, self.question.encode(), name, self.sent, self.answered, self.adapters)


class Chain:
    """The chain of one session, on either side.

    Attributes:
        session: Whose it is.
        head: The newest.
        exchanges: How many there are.
    """

    def __init__(self, session: Session) -> None:
        self.session, self.head, self.exchanges = session, session.head, 0
        self._lists: dict[int, bytes] = {}  # digests of lists of sites, by number
        self._lease = (0, b"")  # the number and the digest of the newest

    def add(self, question: m.Message, sent: bytes, answer: m.Message | None) -> Exchange | None:
        """Take a question and its answer into account; returns the exchange that they are, None where they are none.

        Args:
            question: What was sent; of `QUESTIONS` or `ADAPTERS`.
            sent: Its digest, which was taken while its tensors were there.
            answer: What came back.
        """
        if isinstance(question, ADAPTERS):
            if isinstance(answer, m.Status) and answer.code == m.StatusCode.OK:
                self._keep(question, sent)
            return None
        if not isinstance(question, QUESTIONS) or not isinstance(answer, ANSWERS):
            return None
        exchange = Exchange(type(question).__name__, question.id, sent, digest(answer), self._adapters(question))
        self.head, self.exchanges = exchange.after(self.head), self.exchanges + 1
        return exchange

    def _keep(self, message: m.Sites | m.Lease, sent: bytes) -> None:
        if isinstance(message, m.Lease):
            self._lease = (message.number, sent)
            return
        if message.number not in self._lists and len(self._lists) >= m.MAX_LISTS:
            del self._lists[next(iter(self._lists))]
        self._lists[message.number] = sent

    def _adapters(self, question: m.Forward | m.Backward | m.Decode | m.SiteAnswer) -> bytes:
        if isinstance(question, m.SiteAnswer) or not question.sites:
            return NOTHING
        number, lease = self._lease
        leased = lease if question.lease and question.lease == number else b""
        return adapters_digest(self._lists.get(question.sites, b""), leased)


def adapters_digest(sites: bytes, lease: bytes) -> bytes:
    """Of the digests of a list of sites and of a lease of it, either empty where there is none."""
    return _hash(sites, lease)


class CloudTranscript:
    """A session's transcript as the cloud keeps it.

    Args:
        session: Whose.
        identity: Returns the worker's key and its certificate; called for each signature, as a session may outlive a
            certificate.
    """

    def __init__(self, session: Session, identity: Callable[[], WorkerIdentity]) -> None:
        self._chain, self._identity = Chain(session), identity
        self._signed: m.SignedTranscript | None = None

    def answered(self, question: m.Message, sent: bytes, answer: m.Message | None) -> None:
        """Take an answer into account, before it is sent; see `Chain.add`."""
        self._chain.add(question, sent, answer)

    def sign(self, asked: m.SignTranscript, now: float) -> m.SignedTranscript | m.Status:
        """The signature under what there is so far; a refusal where the edge counts other exchanges.

        Args:
            asked: The edge's question.
            now: Unix seconds.
        """
        chain = self._chain
        if asked.exchanges != chain.exchanges:
            text = f"the edge counts {asked.exchanges} exchanges in this session, and the cloud {chain.exchanges}"
            return m.Status(m.StatusCode.BAD_REQUEST, None, text)
        if self._signed is None or self._signed.exchanges != chain.exchanges:  # so an exchange pays for each signature
            worker = self._identity()
            certificate = worker.certificate
            statement = Statement(chain.session.id, chain.exchanges, chain.head, int(now))
            self._signed = m.SignedTranscript(
                statement.exchanges,
                statement.head,
                statement.signed_at,
                worker.key.sign(statement.signed()),
                certificate.root,
                certificate.worker,
                certificate.not_after,
                certificate.signature,
                b"" if certificate.issuer is None else certificate.issuer.to_bytes(),
            )
        return self._signed


@dataclass(frozen=True, slots=True)
class Statement:
    """What a worker signs: a session's head after so many exchanges, and when (Unix seconds)."""

    session: bytes
    exchanges: int
    head: bytes
    signed_at: int

    def signed(self) -> bytes:
        """The bytes under the signature."""
        exchanges, signed_at = (struct.pack("!Q", number) for number in (self.exchanges, self.signed_at))
        return _hash(b"isthmus v1 transcript", self.session, exchanges, self.head, signed_at)

    def verify(self, signature: bytes, certificate: WorkerCertificate, root: Fingerprint | None) -> None:
        """Check who has signed this.

        Args:
            signature: The worker's.
            certificate: The worker's; it must have been good when this was signed.
            root: Fingerprint of the root key; None for any.

        Raises:
            TranscriptError: The signature does not verify, or the key is not one of the pinned root's.
            FingerprintError: The certificate does not verify, or had expired.
        """
        if root is not None and not Fingerprint.of(certificate.root).matches(root):
            raise TranscriptError(
                f"the transcript of session {self.session.hex()} is signed under the root key "
                f"{Fingerprint.of(certificate.root)}, not under the pinned {root}: it is another cloud's"
            )
        certificate.verify(self.signed_at)
        try:
            Ed25519PublicKey.from_public_bytes(certificate.worker).verify(signature, self.signed())
        except (InvalidSignature, ValueError) as error:
            raise TranscriptError(
                f"the signature under {self.exchanges} exchanges of session {self.session.hex()} does not verify: the "
                "transcript was changed, or the cloud never signed it"
            ) from error


def certificate_of(signed: m.SignedTranscript) -> WorkerCertificate:
    """The worker's certificate that comes with a signature.

    Raises:
        ConfigError: Its issuer's certificate is malformed.
    """
    issuer = IssuerCertificate.from_bytes(signed.issuer) if signed.issuer else None
    return WorkerCertificate(signed.root, signed.worker, signed.not_after, signed.root_signature, issuer)


def statement_of(session: bytes, signed: m.SignedTranscript) -> Statement:
    """What a cloud has signed, as it says."""
    return Statement(session, signed.exchanges, signed.head, signed.signed_at)


def _framed(part: Buffer) -> bytes:
    return struct.pack("!I", len(part)) + bytes(part)


def _hash(*parts: Buffer) -> bytes:
    """SHA-256 over each part behind its length."""
    return sha256(b"".join(map(_framed, parts))).digest()
