"""The worker's key and certificate, read again when they change."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from isthmus.cloud.telemetry.logs import log
from isthmus.common.errors import KeyFileError
from isthmus.common.readable import date
from isthmus.protocol.secure.keys import WORKER_CERT, WORKER_KEY, WorkerIdentity, load_worker


class IdentityFiles:
    """`worker_key` and `worker_cert` of a home, read again whenever one of them has changed.

    Args:
        home: the cloud's folder.
        now: Unix seconds.

    Raises:
        KeyFileError: they cannot be used at the start, when there is no good pair to fall back on.
    """

    def __init__(self, home: Path, now: Callable[[], float] = time.time) -> None:
        self._home, self._now = home, now
        self._stamp = self._stamps()
        self._identity = load_worker(home, now)

    def __call__(self) -> WorkerIdentity:
        """The key and certificate on the disk, or the last good ones where those cannot be used.

        They cannot be used where a file is damaged, where the two do not belong together (one was renewed and the other
        is yet to be), or where another root signed the certificate: edges have pinned the root. May be called from any
        thread.
        """
        stamp = self._stamps()
        if stamp == self._stamp:
            return self._identity
        self._stamp = stamp  # files that cannot be used are logged once, and not at every handshake
        try:
            identity = load_worker(self._home, self._now)
            if not identity.pin.matches(self._identity.pin):
                raise KeyFileError(
                    f"{self._home / WORKER_CERT} is signed by the root key {identity.pin}, and edges have pinned "
                    f"{self._identity.pin}: restart `serve` if that is meant, and give every edge the new string"
                )
        except KeyFileError as error:
            log("worker_identity_unusable", logging.WARNING, error=str(error))
            return self._identity
        self._identity = identity
        log("worker_identity_renewed", not_after=date(identity.certificate.not_after))
        return identity

    def _stamps(self) -> list[tuple[int, int, int] | None]:
        return [_stamp(self._home / name) for name in (WORKER_KEY, WORKER_CERT)]


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_ctime_ns  # the last one is of owner and mode too
