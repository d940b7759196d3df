"""Transcripts of workers whom an issuer has certified: they verify under the root, and nothing in them may change."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from support.protocol.wire import NOW, PIN, ROOT, WORKER, identity

from isthmus.common.errors import ConfigError, FingerprintError, MessageError, TranscriptError
from isthmus.privacy.transcript.chain import CloudTranscript, Exchange, Session, certificate_of, statement_of
from isthmus.privacy.transcript.transcript_file import TRANSCRIPT_FILE, TranscriptLog, read_transcript
from isthmus.protocol import messages as m
from isthmus.protocol.encoding import pack, unpack
from isthmus.protocol.secure.certificates import ISSUER_BYTES, IssuerCertificate, WorkerCertificate
from isthmus.protocol.secure.keys import Fingerprint, WorkerIdentity

ISSUER = Ed25519PrivateKey.from_private_bytes(bytes(range(3, 35)))
STRANGER = Ed25519PrivateKey.from_private_bytes(bytes(range(5, 37)))
SESSION = Session(bytes(range(16)), "ab" * 32, "2:2", "fp32", "sdpa", "here")
EXCHANGE = Exchange("Forward", m.CallId(1, 2), b"a" * 32, b"b" * 32, bytes(32))


def raw(key: Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes_raw()


def certified(by: Ed25519PrivateKey = ISSUER, until: int = NOW + 1000) -> WorkerIdentity:
    issuer = IssuerCertificate.issue(ROOT, raw(ISSUER), until)
    return WorkerIdentity(WORKER, WorkerCertificate.issue_by(by, issuer, raw(ROOT), raw(WORKER), NOW + 500))


def signed_by(worker: WorkerIdentity) -> m.SignedTranscript:
    cloud = CloudTranscript(SESSION, lambda: worker)
    cloud._chain.head, cloud._chain.exchanges = EXCHANGE.after(SESSION.head), 1
    signed = cloud.sign(m.SignTranscript(1), NOW)
    assert isinstance(signed, m.SignedTranscript)
    return signed


def verify(signed: m.SignedTranscript) -> None:
    statement_of(SESSION.id, signed).verify(signed.signature, certificate_of(signed), PIN)


def test_a_signature_brings_the_issuers_certificate_along() -> None:
    signed = signed_by(certified())
    assert certificate_of(signed) == certified().certificate
    verify(signed)
    by_root = signed_by(identity())
    assert by_root.issuer == b""
    verify(by_root)


def test_a_signature_survives_the_wire_with_its_issuer_and_a_cut_one_does_not() -> None:
    for signed in (signed_by(certified()), signed_by(identity())):
        assert unpack(pack(signed)[0], b"") == signed
    for length in (1, ISSUER_BYTES - 1):
        with pytest.raises(MessageError, match="no issuer's certificate"):
            dataclasses.replace(signed_by(certified()), issuer=bytes(length)).check()
    with pytest.raises(ConfigError, match=f"{ISSUER_BYTES} bytes"):
        certificate_of(dataclasses.replace(signed_by(certified()), issuer=b"x"))


@pytest.mark.parametrize("worker", [certified(by=STRANGER), certified(until=NOW)], ids=["another issuer", "expired"])
def test_an_issuer_that_is_not_the_roots_signs_nothing(worker: WorkerIdentity) -> None:
    with pytest.raises(FingerprintError):
        verify(signed_by(worker))


def test_an_issuer_can_be_neither_left_out_nor_exchanged() -> None:
    signed = signed_by(certified())
    other = IssuerCertificate.issue(ROOT, raw(STRANGER), NOW + 1000).to_bytes()
    for issuer in (b"", other):
        with pytest.raises(FingerprintError, match="not signed"):
            verify(dataclasses.replace(signed, issuer=issuer))


# The file -------------------------------------------------------------------------------------------------------------


def written(path: Path, worker: WorkerIdentity) -> Path:
    log = TranscriptLog(path)
    log.begin(SESSION)
    log.exchange(SESSION, 1, EXCHANGE)
    log.signature(SESSION, signed_by(worker))
    return path


def change(path: Path, **changes: Any) -> None:
    """Change the certificate in a transcript's last line; None takes a field out."""
    *before, last = path.read_text().splitlines()
    line = json.loads(last)
    line["certificate"] = {k: v for k, v in {**line["certificate"], **changes}.items() if v is not None}
    path.write_text("\n".join([*before, json.dumps(line)]) + "\n")


def test_a_file_keeps_the_issuer_and_one_of_the_root_has_none(tmp_path: Path) -> None:
    path = written(tmp_path / TRANSCRIPT_FILE, certified())
    found = read_transcript(path, PIN)
    assert found.root == PIN
    assert found.unsigned == 0
    assert found.sessions[0].certificate == certified().certificate
    by_root = written(tmp_path / "by-root.jsonl", identity())
    assert "issuer" not in by_root.read_text()
    assert read_transcript(by_root, PIN).root == PIN


def test_a_file_of_an_issuer_under_another_root_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / TRANSCRIPT_FILE, certified())
    with pytest.raises(TranscriptError, match="another cloud's"):
        read_transcript(path, Fingerprint.of(raw(STRANGER)))


def test_a_damaged_issuer_in_a_file_is_refused(tmp_path: Path) -> None:
    packed = certified().certificate.issuer
    assert packed is not None
    flipped = bytearray(packed.to_bytes())
    flipped[35] ^= 1
    for issuer, error in (
        (None, FingerprintError),
        (bytes(flipped).hex(), FingerprintError),
        ("ab", TranscriptError),
        (7, TranscriptError),
    ):
        path = written(tmp_path / TRANSCRIPT_FILE, certified())
        read_transcript(path)
        change(path, issuer=issuer)
        with pytest.raises(error):
            read_transcript(path)
