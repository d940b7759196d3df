"""What is wrong with a cloud at present, for its operator."""

from __future__ import annotations

import logging

from isthmus.cloud.telemetry.logs import log


class CurrentFaults:
    """A line for each thing that something is wrong with. What is new goes to the log as well."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}

    def note(self, what: str, text: str) -> None:
        """Note what is wrong with something, or that nothing is: "" then."""
        if text and self._texts.get(what) != text:
            log("fault", logging.ERROR, text=text)
        if text:
            self._texts[what] = text
        else:
            self._texts.pop(what, None)

    def of(self, what: str) -> str:
        """What is wrong with something; "" where nothing is."""
        return self._texts.get(what, "")

    def lines(self) -> list[str]:
        """All that is wrong, the oldest first."""
        return list(self._texts.values())
