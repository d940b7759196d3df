"""When the worker's certificate expires, for the operator."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from isthmus.cloud.telemetry.logs import log
from isthmus.common.readable import date

DAY = 86_400
WARNING_DAYS = 14
"""Before the certificate expires: time enough to bring the root key from where it is kept."""


class ExpiryWatch:
    """Says in time that a certificate expires: once a day, from `WARNING_DAYS` before on.

    Args:
        not_after: returns when it does, in Unix seconds; a renewed one has another time.
        say: tells the operator a line.
        now: Unix seconds.
    """

    def __init__(
        self, not_after: Callable[[], int], say: Callable[[str], object], now: Callable[[], float] = time.time
    ) -> None:
        self._not_after, self._say, self._now = not_after, say, now
        self._warned: tuple[int, float] | None = None  # of which certificate, and when

    def look(self) -> None:
        """To be called now and then."""
        not_after, now = self._not_after(), self._now()
        warned = self._warned is not None and self._warned[0] == not_after and now - self._warned[1] < DAY
        if warned or not_after - now > WARNING_DAYS * DAY:
            return
        self._warned = not_after, now
        log("certificate_expires", logging.WARNING, not_after=date(not_after))
        self._say(f"the worker's certificate {expiry(not_after, now)}")


def expiry(not_after: float, now: float) -> str:
    """When a certificate expires, for people, and what to do about it when it is time. Both in Unix seconds."""
    if now >= not_after:
        return f"expired on {date(not_after)}, edges refuse this cloud: renew it with `isthmus cloud keygen`"
    days = int((not_after - now) // DAY)
    text = f"expires on {date(not_after)}, in {days} day{'' if days == 1 else 's'}"
    return f"{text}: renew it with `isthmus cloud keygen`" if not_after - now <= WARNING_DAYS * DAY else text
