"""What a training run keeps for an audit: transcript, sample, and at its end the certificate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from isthmus.common.files import disk_errors
from isthmus.edge.client.link import Link
from isthmus.edge.config.client_config import DEFAULT_KEY
from isthmus.edge.config.training_config import TrainConfig
from isthmus.edge.witness.audit_sample import AUDIT_FOLDER, AuditSample
from isthmus.privacy.transcript.run_certificate import CERTIFICATE_FILE, write_certificate
from isthmus.privacy.transcript.transcript_file import (
    TRANSCRIPT_FILE,
    TranscriptLog,
    check_unsigned,
    judged,
    may_be_unsigned,
    read_transcript,
)
from isthmus.protocol.limits import MIB
from isthmus.protocol.secure.keys import load_edge


class RunEvidence:
    """An `isthmus.edge.training.trainer.Evidence` over the links of a run.

    Args:
        links: All of them.
        config: The run's.
        tell: Is told what there is in the end, in a line.

    Raises:
        KeyFileError: The edge's key cannot be used. It is loaded now: at the end its passphrase may be gone.
    """

    def __init__(self, links: Sequence[Link], config: TrainConfig, tell: Callable[[str], None]) -> None:
        self._links, self._config, self._tell = links, config, tell
        self._key = load_edge((config.key or DEFAULT_KEY).expanduser()) if config.transcript else None

    def begin(self) -> None:
        """Note what crosses from now on. A certificate of what there was before is removed: it is not of the whole."""
        config = self._config
        if not config.transcript:
            return
        with disk_errors(config.out / CERTIFICATE_FILE):
            (config.out / CERTIFICATE_FILE).unlink(missing_ok=True)
        log = TranscriptLog(config.out / TRANSCRIPT_FILE, resume=config.resume, max_unsigned=config.max_unsigned)
        sample = None
        if config.audit_sample is not None:
            sample = AuditSample(config.out / AUDIT_FOLDER, config.audit_sample * MIB, resume=config.resume)
        for link in self._links:
            link.keep_transcript(log, sample)

    def finish(self, adapter: Path, leak: str | None = None) -> None:
        """Have the cloud sign all that has crossed, and write the certificate.

        Args:
            leak: What was measured of what the cloud can learn, in a line.

        Raises:
            TranscriptError: The cloud signs something else.
            UnsignedError: It has left too much unsigned. The certificate is there all the same.
        """
        config = self._config
        if self._key is None:
            return
        self.close()
        transcript = read_transcript(config.out / TRANSCRIPT_FILE, self._links[0].pin)
        write_certificate(config.out / CERTIFICATE_FILE, transcript, adapter, self._key, leak)
        signed, unsigned = transcript.exchanges - transcript.unsigned, transcript.unsigned
        verdict = judged(unsigned, may_be_unsigned(signed, config.max_unsigned))
        self._tell(
            f"the cloud has signed {signed} of {transcript.exchanges} exchanges (unsigned: {verdict}): "
            f"{TRANSCRIPT_FILE} and {CERTIFICATE_FILE} in {config.out}"
        )
        check_unsigned(config.out / TRANSCRIPT_FILE, signed, unsigned, config.max_unsigned)

    def close(self) -> None:
        """Have the cloud sign, and note nothing any more. Raises TranscriptError as `finish` does."""
        for link in self._links:
            link.end_transcript()
