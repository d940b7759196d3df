"""The worker's key and certificate, read again when they change, and a warning before the certificate expires."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from isthmus.cloud.logs import log
from isthmus.protocol.errors import KeyFileError
from isthmus.protocol.keys import DAY, WORKER_CERT, WORKER_KEY, WorkerIdentity, load_worker

WARNING_DAYS = 14
"""Before the certificate expires: time enough to bring the root key from where it is kept."""


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
        """Who the worker is now; the last good pair where a file is damaged, or they do not belong together.

        While one of two new files is there and the other is not yet, they do not. A certificate of another root is no
        good one either: edges have pinned the root. May be called from any thread.
        """
        stamp = self._stamps()
        if stamp == self._stamp:
            return self._identity
        self._stamp = stamp  # what cannot be used is said once, and not at every handshake
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
        log("worker_identity_renewed", certificate_expires=day(identity.certificate.not_after))
        return identity

    def _stamps(self) -> list[tuple[int, int, int] | None]:
        return [_stamp(self._home / name) for name in (WORKER_KEY, WORKER_CERT)]


class ExpiryWatch:
    """Says in time that a certificate expires: once a day, from `WARNING_DAYS` before on.

    Args:
        identity: who the worker is now.
        say: tells the operator a line.
        now: Unix seconds.
    """

    def __init__(
        self, identity: Callable[[], WorkerIdentity], say: Callable[[str], object], now: Callable[[], float] = time.time
    ) -> None:
        self._identity, self._say, self._now = identity, say, now
        self._warned: tuple[int, float] | None = None  # of which certificate, and when

    def look(self) -> None:
        """To be called now and then."""
        not_after, now = self._identity().certificate.not_after, self._now()
        warned = self._warned is not None and self._warned[0] == not_after and now - self._warned[1] < DAY
        if warned or not_after - now > WARNING_DAYS * DAY:
            return
        self._warned = not_after, now
        log("certificate_expires", logging.WARNING, certificate_expires=day(not_after))
        self._say(f"the worker's certificate {expiry(not_after, now)}")


def expiry(not_after: float, now: float) -> str:
    """When a certificate expires, for people, and what to do about it when the time has come. Both in Unix seconds."""
    left = int((not_after - now) // DAY)
    if now >= not_after:
        return f"expired on {day(not_after)}, and edges refuse this cloud: renew it with `isthmus cloud keygen`"
    text = f"expires on {day(not_after)}, in {left} day{'' if left == 1 else 's'}"
    return text if left >= WARNING_DAYS else f"{text}: renew it with `isthmus cloud keygen`"


def day(when: float) -> str:
    """A date and a time of Unix seconds, in UTC."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(when))


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
