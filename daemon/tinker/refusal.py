"""What Tinker's API does not do, or not now. A promise's answer says so, and its client raises an error of it."""

from __future__ import annotations


class RefusalError(Exception):
    """Why something is not done: one line that names the value and the remedy.

    Args:
        message: The line.
        category: "user" for what the client can mend, "server" for the rest.
    """

    def __init__(self, message: str, category: str = "user") -> None:
        super().__init__(message)
        self.category = category
