"""Asking the daemon of this machine, over its Unix socket: what the command line does. It imports no web framework."""

from __future__ import annotations

import json
import shutil
import socket
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlencode

from isthmus.common.errors import ConfigError, NotRunningError
from isthmus.daemon.home import Home
from isthmus.daemon.tokens import read_token

MOST = 64 << 20
"""Bytes of an answer at most."""


class RefusedRequestError(ConfigError):
    """The daemon does not do what it was asked; the message is its own."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class DaemonClient:
    """The daemon of a home.

    Args:
        home: Its folder.
        timeout: Seconds that an answer may take.
    """

    def __init__(self, home: Home, timeout: float = 30.0) -> None:
        self._home, self._timeout = home, timeout

    def get(self, path: str, **query: Any) -> Any:
        """What a GET answers; arguments that are None are left out.

        Raises:
            NotRunningError: No daemon runs with the home, or it does not answer.
            RefusedRequestError: It says why not.
            KeyFileError: The home has no token, or others may read it.
        """
        given = {name: value for name, value in query.items() if value is not None}
        return self._ask("GET", f"{path}?{urlencode(given, doseq=True)}" if given else path)

    def post(self, path: str, body: Any = None) -> Any:
        """What a POST of a JSON body answers. Raises what `get` does."""
        return self._ask("POST", path, {} if body is None else body)

    def delete(self, path: str) -> Any:
        """What a DELETE answers. Raises what `get` does."""
        return self._ask("DELETE", path)

    def download(self, path: str, out: IO[bytes]) -> None:
        """Write the bytes that a GET answers to `out`, however many there are.

        Raises what `get` does; NotRunningError where they end too early, too.
        """
        self._ask("GET", path, out=out)

    def _ask(self, method: str, path: str, body: Any = None, out: IO[bytes] | None = None) -> Any:
        if not self._home.socket.exists():
            raise self._not_running()
        headers = {"Authorization": f"Bearer {read_token(self._home.token)}"}
        data = None if body is None else json.dumps(body).encode()
        if data is not None:
            headers["Content-Type"] = "application/json"
        connection = _UnixConnection(self._home.socket, self._timeout)
        try:
            connection.request(method, path, data, headers)
            response = connection.getresponse()
            if out is not None and response.status < 400:
                shutil.copyfileobj(response, out)
                if response.length:  # reading a part tells of no end that comes too early
                    raise HTTPException(f"the answer ends {response.length} bytes too early")
                return None
            answer = response.read(MOST + 1)
            told = json.loads(answer) if answer else None
        except ConnectionRefusedError as error:  # the socket was left by a daemon that was killed
            raise self._not_running() from error
        except (OSError, HTTPException, ValueError) as error:
            raise NotRunningError(
                f"the daemon of {self._home.path} does not answer ({error}): see `isthmus edge daemon logs`"
            ) from error
        finally:
            connection.close()
        if response.status >= 400:
            said = told.get("error", {}) if isinstance(told, dict) else {}
            raise RefusedRequestError(str(said.get("message", f"HTTP {response.status}")), response.status)
        return told

    def _not_running(self) -> NotRunningError:
        return NotRunningError(
            f"no daemon runs with the home {self._home.path}: start one with `isthmus edge daemon start`, or give its "
            "--home"
        )


class _UnixConnection(HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        """Connect."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))
