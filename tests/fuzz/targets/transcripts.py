"""What a run leaves for an audit, as whoever verifies it is handed it: transcript, certificate, sampled calls."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

from fuzz.target import Cursor, Target, scratch
from support.protocol.example_messages import MESSAGES
from support.protocol.wire import EDGE, NOW, PIN, identity

from isthmus.common.errors import ConfigError, FingerprintError, TranscriptError
from isthmus.edge.witness import audit_sample
from isthmus.edge.witness.audit_sample import packed, read_sample
from isthmus.privacy.transcript import run_certificate, transcript_file
from isthmus.privacy.transcript.chain import CloudTranscript, Exchange, Session, Statement
from isthmus.privacy.transcript.run_certificate import CERTIFICATE_FILE, check_certificate, write_certificate
from isthmus.privacy.transcript.transcript_file import TRANSCRIPT_FILE, TranscriptLog, read_transcript
from isthmus.protocol import messages as m

_SESSION = Session(bytes(range(16)), "ab" * 32, "2:2", "fp32", "sdpa", "here")
_FORWARD, _REPLY = (next(each for each in MESSAGES if isinstance(each, kind)) for kind in (m.Forward, m.ForwardReply))
_LEASE = next(each for each in MESSAGES if isinstance(each, m.Lease))
_ROOT = identity().certificate.root.hex().encode()
_CALL = f"{'0' * 16}-{_SESSION.id.hex()}-1.call"


@functools.cache
def _folder() -> Path:
    """A run with one exchange, signed, and its certificate."""
    folder = scratch()
    (folder / "adapter").mkdir()
    (folder / "audit").mkdir()
    log, cloud = TranscriptLog(folder / TRANSCRIPT_FILE), CloudTranscript(_SESSION, identity)
    exchange = Exchange("Forward", m.CallId(1, 2), b"a" * 32, b"b" * 32, bytes(32))
    cloud._chain.head, cloud._chain.exchanges = exchange.after(_SESSION.head), 1
    signed = cloud.sign(m.SignTranscript(1), NOW)
    if isinstance(signed, m.Status):
        raise TypeError(signed.message)
    log.begin(_SESSION)
    log.exchange(_SESSION, 1, exchange)
    log.signature(_SESSION, signed)
    transcript = read_transcript(folder / TRANSCRIPT_FILE, PIN)
    write_certificate(folder / CERTIFICATE_FILE, transcript, folder / "adapter", EDGE, "labels 0.5")
    return folder


def _run(data: bytes) -> None:
    script, folder = Cursor(data), _folder()
    which, content = script.number() % 3, script.rest()
    try:
        if which == 0:
            _transcript(folder / "other.jsonl", content)
        elif which == 1:
            (folder / "other.json").write_bytes(content)
            check_certificate(folder / "other.json", read_transcript(folder / TRANSCRIPT_FILE), folder / "adapter")
        else:
            (folder / "audit" / _CALL).write_bytes(content)
            for call in read_sample(folder / "audit"):
                packed(call.question), packed(call.answer)
    except (TranscriptError, FingerprintError, ConfigError) as error:
        str(error).encode(errors="backslashreplace")


def _transcript(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    found = read_transcript(path, PIN)
    if any(each.signed > len(each.exchanges) for each in found.sessions) or len(found.digest) != 32:
        raise AssertionError("more is signed than there is")
    if found.unsigned < found.exchanges and found.root != PIN:
        raise AssertionError("another cloud's signature was taken")


def _seeds() -> Iterator[bytes]:
    lines = (_folder() / TRANSCRIPT_FILE).read_bytes().splitlines(keepends=True)
    yield b"\0" + b"".join(lines)
    yield b"\0" + b"".join(lines[:2])
    yield b"\0" + b"".join(lines[1:])
    yield b"\0" + b"".join(lines)[:-9]
    yield b"\0" + lines[0] * 2
    yield b"\0" + lines[0] + lines[2]
    yield b"\0" + lines[0] + lines[1].replace(b'"n":1', b'"n":2')
    yield b"\0" + lines[0] + lines[1].replace(b'"step":1', b'"step":-1')
    yield b"\0" + lines[0] + lines[1].replace(b'"sent":"', b'"sent":"00')
    yield b"\0" + lines[0].replace(b'"2:2"', b"2")
    yield b"\0" + b"".join(lines).replace(b'"signed_at":17', b'"signed_at":16')
    yield b"\0" + b"".join(lines).replace(b'"root":"', b'"root":"00')
    yield b"\0" + b"".join(lines).replace(_ROOT, b"00" * 32)
    yield b"\0[]\n"
    yield b"\0" + b"[" * 9000 + b"\n"
    certificate = (_folder() / CERTIFICATE_FILE).read_bytes()
    yield b"\1" + certificate
    yield b"\1" + certificate.replace(b"0.5", b"0.6")
    yield b"\1" + b"[" * 9000
    yield b"\1{}"
    yield b"\2" + packed(_FORWARD) + packed(_REPLY)
    yield b"\2" + packed(_LEASE) + packed(_FORWARD) + packed(_REPLY)
    yield b"\2" + packed(_REPLY) + packed(_FORWARD)
    yield b"\2" + packed(_REPLY) + packed(_FORWARD) + packed(_REPLY)
    yield b"\2" + packed(_FORWARD)


TARGET = Target(
    _run,
    _seeds,
    [
        transcript_file._lines,
        transcript_file._take,
        transcript_file._signature,
        transcript_file._bits,
        transcript_file._number,
        transcript_file._text,
        transcript_file.check_head,
        Statement.verify,
        run_certificate.check_certificate,
        audit_sample.read_sample,
        audit_sample._call,
        audit_sample._unpacked,
    ],
    floor=0.75,
    max_len=4096,
    words=[b'"session":', b'"n":', b'"model":', b'"exchanges":', b'"certificate":', b'"signature":', b"\n", b'"step":'],
)
