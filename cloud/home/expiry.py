"""When the worker's certificate expires, for the operator."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from isthmus.cloud.telemetry.logs import log
from isthmus.common.readable import date

DAY = 86_400
WARNING_DAYS = 14
"""The first warning comes so many days before the certificate expires: time enough to fetch the root key."""


class ExpiryWatch:
    """Warns the operator once a day, from `WARNING_DAYS` before the certificate expires.

    Args:
        not_after: returns when the certificate expires, in Unix seconds; a renewed one has another time.
        say: prints a line for the operator.
        now: returns Unix seconds.
    """

    def __init__(
        self, not_after: Callable[[], int], say: Callable[[str], object], now: Callable[[], float] = time.time
    ) -> None:
        self._not_after, self._say, self._now = not_after, say, now
        self._warned: tuple[int, float] | None = None  # the certificate's time and that of its last warning

    def check(self) -> None:
        """Warn if it is time to; to be called now and then."""
        not_after, now = self._not_after(), self._now()
        warned = self._warned is not None and self._warned[0] == not_after and now - self._warned[1] < DAY
        if warned or not_after - now > WARNING_DAYS * DAY:
            return
        self._warned = not_after, now
        log("certificate_expires", logging.WARNING, not_after=date(not_after))
        self._say(f"the worker's certificate {expiry(not_after, now)}")


def expiry(not_after: float, now: float) -> str:
    """Says when a certificate expires, and how to renew it when it is time. Both arguments are Unix seconds."""
    if now >= not_after:
        return f"expired on {date(not_after)}, edges refuse this cloud: renew it with `isthmus cloud keygen`"
    days = int((not_after - now) // DAY)
    text = f"expires on {date(not_after)}, in {days} day{'' if days == 1 else 's'}"
    return f"{text}: renew it with `isthmus cloud keygen`" if not_after - now <= WARNING_DAYS * DAY else text
