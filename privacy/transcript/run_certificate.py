"""`certificate.json`, beside a run's adapter: the edge's signed word on which model and which calls it was made with.

The edge signs; what the cloud has signed is in the transcript, whose root the certificate names. So whoever trusts the
edge's key knows which transcript belongs to an adapter, and whoever trusts the cloud's root key knows what the cloud
has answered.
"""

from __future__ import annotations

import base64
import json
import os
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from isthmus.common.errors import TranscriptError
from isthmus.common.files import sha256_of, write_atomic
from isthmus.privacy.transcript.transcript_file import Transcript
from isthmus.protocol.limits import MIB
from isthmus.protocol.secure.keys import Fingerprint

CERTIFICATE_FILE = "certificate.json"
_LABEL = b"isthmus v1 run certificate\0"
_VERSION = 1
_MOST = MIB  # bytes of a file: a certificate has some kB


def write_certificate(
    path: Path, transcript: Transcript, adapter: Path, key: Ed25519PrivateKey, leak: str | None = None
) -> dict[str, Any]:
    """Write a run's certificate; returns what it says.

    Args:
        path: The file.
        transcript: The run's, checked.
        adapter: The adapter's folder.
        key: The edge's key, which signs.
        leak: What was measured of what the cloud can learn, in a line; None where nothing was.

    Raises:
        DiskError: It cannot be written.
    """
    said = {
        "version": _VERSION,
        **_of_transcript(transcript),
        "adapter": folder_digest(adapter).hex(),
        "leak": leak,
        "edge": base64.b64encode(key.public_key().public_bytes_raw()).decode(),
    }
    signed = {**said, "signature": base64.b64encode(key.sign(_signed(said))).decode()}
    write_atomic(path, json.dumps(signed, indent=1).encode() + b"\n")
    return signed


@dataclass(frozen=True, slots=True)
class Certified:
    """What a good certificate says: the fingerprint of the edge's key that has signed it, and what leaks."""

    edge: Fingerprint
    leak: str | None


def check_certificate(path: Path, transcript: Transcript, adapter: Path | None = None) -> Certified:
    """Check a certificate against a transcript and an adapter.

    Args:
        path: The certificate's file.
        transcript: The transcript, checked.
        adapter: The adapter's folder; None where it is not at hand.

    Raises:
        TranscriptError: It is none, was changed, is of another transcript or adapter, or says of its transcript what is
            not there.
    """
    try:
        with path.open("rb") as file:
            text = file.read(_MOST + 1)
        if len(text) > _MOST:
            raise ValueError(f"it has more than {_MOST} bytes")
        said = json.loads(text)
        signature, edge = (base64.b64decode(said.pop(name), validate=True) for name in ("signature", "edge"))
        leak = said.get("leak")
        if not isinstance(leak, str | None):
            raise ValueError(f"leak is {leak!r:.200}")
        if said["version"] != _VERSION:
            raise ValueError(f"version {said['version']}")
        said["edge"] = base64.b64encode(edge).decode()
        Ed25519PublicKey.from_public_bytes(edge).verify(signature, _signed(said))
        wanted, made, exchanges, cloud = (said[name] for name in ("transcript", "adapter", "exchanges", "cloud"))
        found = _of_transcript(transcript)
        other = [name for name, value in found.items() if said[name] != value]
    except InvalidSignature as error:
        raise TranscriptError(f"{path} was changed: the edge's signature under it does not verify") from error
    except KeyError as error:
        raise TranscriptError(f"{path} is no certificate of a run: {error} is missing") from error
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise TranscriptError(f"{path} is no certificate of a run: {error}") from error
    if wanted != transcript.digest.hex():
        raise TranscriptError(
            f"{path} is of the transcript {str(wanted)[:16]}, and this one is {transcript.digest.hex()[:16]} "
            f"({transcript.exchanges} exchanges; the certificate has {exchanges}): one was cut or changed"
        )
    root = None if transcript.root is None else str(transcript.root)
    if cloud != root:
        raise TranscriptError(f"{path} is of a transcript that {cloud} has signed, and {root} has signed this one")
    for name in other:
        raise TranscriptError(f"{path} has {name} {said[name]!r:.200}, and its transcript has {found[name]!r:.200}")
    if adapter is not None and made != folder_digest(adapter).hex():
        raise TranscriptError(f"{path} is of another adapter than {adapter}")
    return Certified(Fingerprint.of(edge), leak)


def _of_transcript(transcript: Transcript) -> dict[str, Any]:
    """What a certificate repeats of its transcript."""
    sessions = [each.session for each in transcript.sessions]
    return {
        "models": sorted({each.model for each in sessions}),
        "plans": sorted({each.plan for each in sessions}),
        "span_dtypes": sorted({each.span_dtype for each in sessions}),
        "numerics": sorted({each.numerics for each in sessions}),
        "cloud": None if transcript.root is None else str(transcript.root),
        "transcript": transcript.digest.hex(),
        "exchanges": transcript.exchanges,
        "unsigned": transcript.unsigned,
    }


def folder_digest(folder: Path) -> bytes:
    """SHA-256 over the names and hashes of the files of a folder."""
    whole = sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = os.fsencode(path.relative_to(folder).as_posix())
            whole.update(len(name).to_bytes(4) + name + sha256_of(path))
    return whole.digest()


def _signed(said: dict[str, Any]) -> bytes:
    return _LABEL + json.dumps(said, sort_keys=True, separators=(",", ":")).encode()
