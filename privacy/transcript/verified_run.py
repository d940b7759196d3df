"""Checks what a run leaves: its transcript, and its certificate where there is one."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from isthmus.common.errors import TranscriptError
from isthmus.common.terminal import printable
from isthmus.privacy.transcript.run_certificate import CERTIFICATE_FILE, check_certificate
from isthmus.privacy.transcript.transcript_file import TRANSCRIPT_FILE, judged, may_be_unsigned, read_transcript
from isthmus.protocol.limits import MAX_UNSIGNED
from isthmus.protocol.secure.keys import Fingerprint


@dataclass(frozen=True, slots=True)
class Verified:
    """What verifies.

    Attributes:
        path: The transcript.
        sessions, exchanges, unsigned: How many there are; `unsigned` exchanges are under no signature.
        may_be_unsigned: How many may be.
        models: Digests of the models.
        root: Fingerprint of the cloud's root key; None where nothing is signed.
        edge: Fingerprint of the key that has signed the certificate; None where there is none.
        adapter: Whether the certificate was compared with the adapter.
        leak: What the certificate says of what the cloud can learn.
        digest: The transcript's root, in hexadecimal.
    """

    path: str
    sessions: int
    exchanges: int
    unsigned: int
    may_be_unsigned: int
    models: tuple[str, ...]
    root: str | None
    edge: str | None
    adapter: bool
    leak: str | None
    digest: str

    def to_json(self) -> dict[str, Any]:
        """A tree of plain values."""
        return asdict(self)

    def lines(self) -> str:
        """For a person, within 80 columns but for the path."""
        found = {
            "model": f"\n{'':15}".join(printable(each) for each in self.models),
            "sessions": str(self.sessions),
            "exchanges": f"{self.exchanges}, of which the cloud has signed {self.exchanges - self.unsigned}",
            "unsigned": judged(self.unsigned, self.may_be_unsigned),
            "cloud": self.root or "has signed nothing",
            "certificate": "none" if self.edge is None else f"of the edge {self.edge}",
            "adapter": "the one of the certificate" if self.adapter else "not compared",
        }
        if self.leak is not None:
            found["leak"] = printable(self.leak)  # whoever has signed the certificate may have written anything
        return "\n".join([f"{self.path} verifies", *(f"  {name:12} {said}" for name, said in found.items())])


def verify_run(path: Path, root: Fingerprint | None = None, max_unsigned: int = MAX_UNSIGNED) -> Verified:
    """Check a transcript, or that of a run's folder, and the certificate beside it.

    Args:
        path: The transcript, or the run's folder.
        root: Fingerprint of the cloud's root key, which must then have signed something; None for any.
        max_unsigned: Exchanges that may be unsigned, beside one for each 32 that are signed. More are no error here.

    Raises:
        ConfigError: There is no transcript.
        TranscriptError, FingerprintError: Something does not verify.
    """
    file = path / TRANSCRIPT_FILE if path.is_dir() else path
    transcript = read_transcript(file, root)
    if root is not None and transcript.root is None:
        raise TranscriptError(
            f"{file} has no signature: nothing in it says that its {transcript.exchanges} exchanges are those of {root}"
        )
    certificate, adapter = file.with_name(CERTIFICATE_FILE), file.with_name("adapter")
    compared = adapter if certificate.is_file() and adapter.is_dir() else None
    said = check_certificate(certificate, transcript, compared) if certificate.is_file() else None
    models = tuple(sorted({each.session.model for each in transcript.sessions}))
    return Verified(
        str(file),
        len(transcript.sessions),
        transcript.exchanges,
        transcript.unsigned,
        may_be_unsigned(transcript.exchanges - transcript.unsigned, max_unsigned),
        models,
        None if transcript.root is None else str(transcript.root),
        None if said is None else str(said.edge),
        compared is not None,
        None if said is None else said.leak,
        transcript.digest.hex(),
    )
