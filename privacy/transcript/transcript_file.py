"""`transcript.jsonl`: a run's exchanges and the signatures under them, without a tensor; written line by line.

    {"session", "model", "plan", "span_dtype", "attention", "numerics"}                     a session begins
    {"session", "n", "question", "step", "call", "attempt", "sent", "answered", "adapters"}  its exchange n, from 1
    {"session", "exchanges", "head", "signed_at", "signature", "certificate"}               a signature of the cloud

Sessions that are open at a time have their lines among each other's. Digests and signatures are in hexadecimal.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from isthmus.common.errors import ConfigError, TranscriptError, UnsignedError
from isthmus.common.files import disk_errors, write_atomic
from isthmus.privacy.transcript.chain import Exchange, Session, Statement, certificate_of, statement_of
from isthmus.protocol import messages as m
from isthmus.protocol.limits import KIB, MAX_UNSIGNED, SIGN_EVERY, SIGNED_FOR_ONE
from isthmus.protocol.secure.certificates import ISSUER_BYTES, IssuerCertificate, WorkerCertificate
from isthmus.protocol.secure.keys import Fingerprint

TRANSCRIPT_FILE = "transcript.jsonl"
LINE_BYTES = 16 * KIB
"""Of a line at most: those that are written have less than 4 KiB."""
_OF_SESSION = ("model", "plan", "span_dtype", "attention", "numerics")


class TranscriptLog:
    """Appends to a transcript. Several threads may.

    Args:
        path: The file; only its user may read it.
        resume: Whether to go on behind what is there, which is of the same run; a line that a crash has cut is dropped.
        max_unsigned: Exchanges that the cloud may leave unsigned, see `may_be_unsigned`.

    Attributes:
        links: How many links note their sessions here. It never falls: what a link leaves unsigned as it closes is in
            no `lose` until the file is read again.

    Raises:
        DiskError: It cannot be written.
        TranscriptError, FingerprintError: What is there does not verify.
        UnsignedError: Too much of what is there is unsigned.
    """

    def __init__(self, path: Path, *, resume: bool = False, max_unsigned: int = MAX_UNSIGNED) -> None:
        self._path, self._lock, self._max_unsigned = path, threading.Lock(), max_unsigned
        self._signed = self._lost = self.links = 0
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        kept = path.read_bytes() if resume and path.exists() else b""
        write_atomic(path, kept[: kept.rfind(b"\n") + 1], 0o600)
        if kept:
            before = read_transcript(path)
            self._signed = before.exchanges - before.unsigned
            self.lose(before.unsigned)

    @property
    def sign_every(self) -> int:
        """Exchanges of a session after which a signature is due: half of what all links together may still lose."""
        with self._lock:
            left = may_be_unsigned(self._signed, self._max_unsigned) - self._lost
        return min(SIGN_EVERY, max(1, left // (2 * max(1, self.links))))

    def gain(self, exchanges: int) -> None:
        """So many exchanges more are signed."""
        with self._lock:
            self._signed += exchanges

    def lose(self, exchanges: int) -> None:
        """A session has ended that leaves so many exchanges unsigned.

        Raises:
            UnsignedError: They are too many, with those of earlier sessions.
        """
        with self._lock:
            self._lost += exchanges
            check_unsigned(self._path, self._signed, self._lost, self._max_unsigned)

    def begin(self, session: Session) -> None:
        """A session begins."""
        said = {name: getattr(session, name) for name in _OF_SESSION}
        self._add({"session": session.id.hex(), **said})

    def exchange(self, session: Session, number: int, exchange: Exchange) -> None:
        """Exchange number `number` of a session, from 1."""
        digests = {name: getattr(exchange, name).hex() for name in ("sent", "answered", "adapters")}
        named = {"session": session.id.hex(), "n": number, "question": exchange.question}
        self._add({**named, **asdict(exchange.call), **digests})

    def signature(self, session: Session, signed: m.SignedTranscript) -> None:
        """A signature of the cloud, whatever it is worth."""
        certificate = certificate_of(signed)
        said = {name: getattr(signed, name) for name in ("exchanges", "signed_at")}
        shown = {name: getattr(certificate, name).hex() for name in ("root", "worker", "signature")}
        bits = {"head": signed.head.hex(), "signature": signed.signature.hex()}
        shown_with: dict[str, Any] = {**shown, "not_after": certificate.not_after}
        if certificate.issuer is not None:
            shown_with["issuer"] = certificate.issuer.to_bytes().hex()
        self._add({"session": session.id.hex(), **said, **bits, "certificate": shown_with})

    def _add(self, line: dict[str, Any]) -> None:
        data = json.dumps(line, separators=(",", ":")).encode() + b"\n"
        with self._lock, disk_errors(self._path), self._path.open("ab") as file:
            file.write(data)


@dataclass(slots=True)
class SessionTranscript:
    """What a transcript has of one session.

    Attributes:
        session: Which.
        exchanges: In their order.
        head: Of the chain after all of them.
        signed: How many of them the cloud has signed.
        statement: The newest that it has signed; None for none.
        certificate: That of the worker that has signed.
    """

    session: Session
    head: bytes
    exchanges: list[Exchange] = field(default_factory=list)
    signed: int = 0
    statement: Statement | None = None
    certificate: WorkerCertificate | None = None


@dataclass(frozen=True, slots=True)
class Transcript:
    """A transcript whose chains and signatures are good.

    Attributes:
        sessions: In the order in which they began.
        root: Fingerprint of the cloud's root key; None where nothing is signed.
    """

    sessions: tuple[SessionTranscript, ...]
    root: Fingerprint | None

    @property
    def exchanges(self) -> int:
        """Of all sessions."""
        return sum(len(each.exchanges) for each in self.sessions)

    @property
    def unsigned(self) -> int:
        """Exchanges under which there is no signature: those at the end of sessions that broke."""
        return self.exchanges - sum(each.signed for each in self.sessions)

    @property
    def digest(self) -> bytes:
        """The root of the transcript: SHA-256 over each session's id, signed exchanges, exchanges and head."""
        whole = sha256(b"isthmus v1 transcript root")
        for each in self.sessions:
            whole.update(each.session.id + each.signed.to_bytes(8) + len(each.exchanges).to_bytes(8) + each.head)
        return whole.digest()


def read_transcript(path: Path, root: Fingerprint | None = None) -> Transcript:
    """Read a transcript and check it: chains, signatures and certificates.

    Args:
        path: The file.
        root: Fingerprint of the root key that must have certified the workers; None for any, but one for all.

    Raises:
        ConfigError: The file cannot be read.
        TranscriptError: It is cut, changed, or not signed by who it says; the message names the line.
        FingerprintError: A worker's certificate does not verify, or had expired.
    """
    sessions: dict[str, SessionTranscript] = {}
    for number, line in _lines(path):
        try:
            root = _take(sessions, line, root)
        except TranscriptError as error:
            raise TranscriptError(f"{path}, line {number}: {error}") from error
        except KeyError as error:
            raise TranscriptError(f"{path}, line {number} is no line of a transcript: {error} is missing") from error
        except (TypeError, ValueError) as error:
            raise TranscriptError(f"{path}, line {number} is no line of a transcript: {error}") from error
    return Transcript(tuple(sessions.values()), root if any(each.signed for each in sessions.values()) else None)


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The lines of a transcript with their numbers, one after another: a file may be larger than memory."""
    number = 0
    try:
        with path.open("rb") as file:
            while line := file.readline(LINE_BYTES + 1):
                number += 1
                yield number, _object(path, number, line)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}): give a transcript, RUN/{TRANSCRIPT_FILE}"
        ) from error


def _object(path: Path, number: int, line: bytes) -> dict[str, Any]:
    if len(line) > LINE_BYTES:
        raise TranscriptError(f"{path}, line {number} is no line of a transcript: it has more than {LINE_BYTES} bytes")
    if not line.endswith(b"\n"):
        raise TranscriptError(f"{path} ends in the middle of a line: it was cut")
    try:
        said = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TranscriptError(f"{path}, line {number} is no JSON: {error}") from error
    if not isinstance(said, dict):
        raise TranscriptError(f"{path}, line {number} is no line of a transcript: it is a {type(said).__name__}")
    return said


def _take(sessions: dict[str, SessionTranscript], line: dict[str, Any], root: Fingerprint | None) -> Fingerprint | None:
    """Take one line into account; returns the root key that counts from now on."""
    name = _bits(line, "session", 16).hex()
    if "model" in line:
        if name in sessions:
            raise TranscriptError(f"session {name} begins twice")
        said = (_text(line, each) for each in _OF_SESSION)
        session = Session(bytes.fromhex(name), *said)
        sessions[name] = SessionTranscript(session, session.head)
        return root
    if name not in sessions:
        raise TranscriptError(f"session {name} has not begun: lines are missing before")
    known = sessions[name]
    if "n" in line:
        number = _number(line, "n")
        if number != len(known.exchanges) + 1:
            raise TranscriptError(f"exchange {number} of session {name} comes where {len(known.exchanges) + 1} is next")
        call = m.CallId(_number(line, "step", 32), _number(line, "call"), _number(line, "attempt", 32))
        digests = (_bits(line, each) for each in ("sent", "answered", "adapters"))
        exchange = Exchange(_text(line, "question"), call, *digests)
        known.exchanges.append(exchange)
        known.head = exchange.after(known.head)
        return root
    return _signature(known, line, root)


def _signature(known: SessionTranscript, line: dict[str, Any], root: Fingerprint | None) -> Fingerprint:
    shown = line["certificate"]
    issuer = IssuerCertificate.from_bytes(_bits(shown, "issuer", ISSUER_BYTES)) if "issuer" in shown else None
    keys, signed = (_bits(shown, "root"), _bits(shown, "worker")), _bits(shown, "signature", 64)
    certificate = WorkerCertificate(*keys, _number(shown, "not_after", 63), signed, issuer)
    said = (_number(line, "exchanges"), _bits(line, "head"), _number(line, "signed_at"))
    statement = Statement(known.session.id, *said)
    statement.verify(_bits(line, "signature", 64), certificate, root)
    check_head(statement, len(known.exchanges), known.head)
    known.signed, known.statement, known.certificate = statement.exchanges, statement, certificate
    return Fingerprint.of(certificate.root)


def _bits(line: dict[str, Any], name: str, size: int = 32) -> bytes:
    found = bytes.fromhex(line[name])
    if len(found) != size:
        raise ValueError(f"{name} has {len(found)} bytes, not {size}")
    return found


def _number(line: dict[str, Any], name: str, bits: int = 64) -> int:
    found = line[name]
    if type(found) is not int or not 0 <= found < 1 << bits:
        raise ValueError(f"{name} is no whole number of {bits} bits")
    return found


def _text(line: dict[str, Any], name: str) -> str:
    found = line[name]
    if not isinstance(found, str):
        raise TypeError(f"{name} is no text")
    return found


def check_head(statement: Statement, exchanges: int, head: bytes) -> None:
    """Compare what a cloud has signed with the edge's own chain.

    Raises:
        TranscriptError: They differ.
    """
    if (statement.exchanges, statement.head) != (exchanges, head):
        raise TranscriptError(
            f"the cloud has signed head {statement.head.hex()[:16]} after {statement.exchanges} exchanges of session "
            f"{statement.session.hex()}, and what crossed gives {head.hex()[:16]} after {exchanges}: one of the two is "
            "not what was sent or answered"
        )


def check_signature(session: Session, signed: m.SignedTranscript, root: Fingerprint) -> Statement:
    """Check who has signed; returns what was signed. Raises what `Statement.verify` raises."""
    statement = statement_of(session.id, signed)
    statement.verify(signed.signature, certificate_of(signed), root)
    return statement


def may_be_unsigned(signed: int, max_unsigned: int = MAX_UNSIGNED) -> int:
    """How many exchanges of a run may be unsigned, where so many are signed."""
    return max_unsigned + signed // SIGNED_FOR_ONE


def judged(unsigned: int, allowed: int) -> str:
    """What is unsigned of a transcript, and whether it may be, in words."""
    if not unsigned:
        return "none"
    fits = "within" if unsigned <= allowed else "beyond"
    return f"{unsigned} after the last signatures of sessions, {fits} the {allowed} allowed"


def check_unsigned(path: Path, signed: int, unsigned: int, max_unsigned: int) -> None:
    """Raises UnsignedError where more of a transcript's exchanges are unsigned than may be."""
    allowed = may_be_unsigned(signed, max_unsigned)
    if unsigned > allowed:
        raise UnsignedError(
            f"{path}: the cloud has left {unsigned} exchanges unsigned and signed {signed}, where {allowed} may be "
            "unsigned: ask its owner why sessions end before it signs; if the network is to blame, give a larger "
            "--max-unsigned"
        )
