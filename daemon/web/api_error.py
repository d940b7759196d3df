"""The errors that a client is told, in OpenAI's form, which the other APIs use, too."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """A request that is not done, and why.

    Args:
        status: HTTP's status code.
        message: One line that names the value and the remedy.
        param: The field that is wrong; None for none.
        code: A word for programs.
        kind: OpenAI's `type`; by default what fits the status.
        headers: Further ones of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers or {}
        self.kind = kind or _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")

    def body(self) -> dict[str, Any]:
        """What the answer's JSON is."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
