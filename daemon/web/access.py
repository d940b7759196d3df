"""Who gets in: what is checked of every request before a handler sees it.

1. Host: a name of this daemon's. A page elsewhere whose name leads to loopback (DNS rebinding) has another.
2. Origin, which browsers send: the daemon's own. There are no CORS headers.
3. The token, in `Authorization: Bearer` or `X-API-Key`. `/`, `/healthz`, what is under `/static/`, and a POST that
   gives a code for a token need none.
4. How many requests are under way: with a token, and without one. One that asks how things are (`/healthz`,
   `/isthmus/v1/status`) is always answered: it is not counted, and waits for no other one's thread.
5. The body: its length as it is said, and as it comes; how long it takes; and what all of them take together.

Whatever others do, an owner has a share of what 4 and 5 bound (`Shares`).

A refusal reads no body. Tokens that are wrong are written nowhere.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import re
import secrets
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from isthmus.daemon.daemon_settings import DaemonSettings
from isthmus.daemon.serving.fair_turns import Shares
from isthmus.daemon.state.owners import Owners
from isthmus.daemon.state.tables import Owner
from isthmus.daemon.web.api_error import ApiError
from isthmus.daemon.web.refusals import as_api_error, internal, respond

log = logging.getLogger("isthmus.daemon")

OPEN = frozenset({"/", "/healthz", "/favicon.ico"})
SIGN_IN = "/isthmus/v1/sign-in"
"""Where a POST gives the page a token for a code (`isthmus.daemon.tokens.SignInCode`)."""
SIGN_IN_BYTES = 1024
"""Of its body: it needs no token, so that it takes next to nothing of the memory for bodies."""
OPEN_UNDER = "/static/"
"""The page and its files, which anybody may read, and which hold nothing of anybody's."""
HUB_UNDER = "/hub/"
"""Tokenizers, which a token for them alone opens, too."""
ALWAYS = frozenset({"/healthz", "/isthmus/v1/status"})
UPLOADS = frozenset({"/v1/files"})
"""Paths whose bodies are files."""
FRAMING = 64 << 10
"""Bytes that a form's other fields, and its boundaries, may add to a file."""
BODIES = 16
"""Bodies of the largest size that may be in memory at the same time; files are not counted, they go to the disk."""
PIECE_SECONDS = 30.0
"""So long the next piece of a body may take."""
BODY_SECONDS = 60.0
LEAST_RATE = 256 << 10
"""A body has `BODY_SECONDS`, and a second more for so many bytes."""
_HOST = re.compile(r"(?P<name>\[[0-9a-fA-F:.]+\]|[^:\[\]/?#@\s]+)(?::\d{1,5})?", re.ASCII)
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


class Access:
    """The middleware (ASGI) that lets requests in. Every answer that passes it has an `x-request-id`.

    Args:
        app: What is protected.
        settings: What the daemon's owner allows.
        owners: Whose tokens there are.
    """

    def __init__(self, app: ASGIApp, settings: DaemonSettings, owners: Owners) -> None:
        self._app, self._settings, self._owners = app, settings, owners
        host, _ = settings.address
        self._names = _LOOPBACK | {_name(host), *(_name(name) for name in settings.hosts)}
        self._any_address = _is_wildcard(host)
        self._under_way = {is_open: Shares(settings.requests_at_once) for is_open in (False, True)}
        self._memory = Shares(BODIES * (settings.body_mib << 20))  # bytes of bodies; files are not counted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or let it through."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        request_id = f"req_{secrets.token_hex(16)}"
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        answer = _Answer(send, request_id)
        body = _Body(receive, answer, self._memory)
        is_open, counted, owner = _is_open(scope), False, ""
        try:
            self._let_in(scope)
            body.bound(self._settings, scope)
            if not is_open:
                state["owner"] = self._owner(Headers(scope=scope), hub=scope["path"].startswith(HUB_UNDER))
                owner = body.owner = state["owner"].id
            if scope["path"] not in ALWAYS:
                if not self._under_way[is_open].take(owner):
                    raise overloaded("as many requests are under way as may be")
                counted = True
            await self._app(scope, body.receive, answer.send)
        except asyncio.CancelledError:  # the daemon stops, and this answer has had its while
            await answer.cut(ApiError(503, "the daemon stops: ask again once it runs", code="stopping"))
        except ClientDisconnect:  # by itself, or as its body was refused, which it was told
            await answer.refuse(ApiError(400, "the client has closed its connection", code="client_gone"))
        except Exception as error:  # a defect is told with its number, and logged
            told = as_api_error(error)
            if told is None:
                log.exception("request %s (%s %r) failed", request_id, scope["method"], scope["path"])
                told = internal(request_id)
            if answer.started:
                raise
            await answer.refuse(told)
        finally:
            self._under_way[is_open].give_back(owner, counted)
            body.free()

    def _let_in(self, scope: Scope) -> None:
        """Check who is asked, and by which page."""
        headers = Headers(scope=scope)
        host = _only(headers, "host")
        match = _HOST.fullmatch(host or "")
        if host is None or match is None:
            raise ApiError(400, "the Host header is missing, or is no name and port", code="bad_host")
        name = _name(match["name"])
        if name not in self._names and not (self._any_address and _is_address(name)):
            raise ApiError(
                403,
                f"the daemon is not called {name!r}: use 127.0.0.1, or add the name to `hosts` in daemon.toml",
                code="unknown_host",
            )
        if "origin" in headers and _only(headers, "origin") != f"{scope['scheme']}://{host}":
            raise ApiError(403, "requests from pages of other origins are refused", code="other_origin")

    def _owner(self, headers: Headers, *, hub: bool) -> Owner:
        token = headers.get("x-api-key", "").strip()
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            token = bearer.strip()
        owner = self._owners.find(token, hub=hub) if token else None
        if owner is None:
            wrong = "the token is not one of this daemon's" if token else "a token is missing"
            raise ApiError(
                401,
                f"{wrong}: send the one in the file `token` of the daemon's home as `Authorization: Bearer`",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        return owner


class _Answer:
    """What a request is answered. Where it was refused, nothing else is sent any more."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send, self._request_id = send, request_id
        self.started = self._refused = self._has_events = False

    async def send(self, message: Message) -> None:
        if self._refused:
            return
        if message["type"] == "http.response.start":
            self.started = True
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self._request_id
            headers.setdefault("x-content-type-options", "nosniff")
            self._has_events = headers.get("content-type", "").startswith("text/event-stream")
        await self._send(message)

    async def cut(self, error: ApiError) -> None:
        """End an answer with an error, where it has not begun or is a stream of events; others just break off."""
        await self.refuse(error)
        if self._has_events and not self._refused:
            event = f"data: {json.dumps(error.body())}\n\n".encode()
            await self._send({"type": "http.response.body", "body": event})

    async def refuse(self, error: ApiError) -> None:
        """Say an error, where nothing was answered yet."""
        if self.started or self._refused:
            return
        self._refused = True
        response = respond(error, self._request_id)
        await response({"type": "http"}, _nothing, self._send)


class _Body:
    """A request's body, within its bounds.

    Attributes:
        owner: Whose it is.
    """

    def __init__(self, receive: Receive, answer: _Answer, memory: Shares) -> None:
        self.owner = ""
        self._receive, self._answer, self._memory = receive, answer, memory
        self._most = self._got = self._counted = 0
        self._is_file = self._whole = self._gone = False
        self._until = 0.0

    def bound(self, settings: DaemonSettings, scope: Scope) -> None:
        """Set the bounds of a request. Raises ApiError where its body is said to be larger."""
        self._is_file = scope["method"] == "POST" and scope["path"] in UPLOADS
        self._most = (settings.upload_mib << 20) + FRAMING if self._is_file else settings.body_mib << 20
        if _is_open(scope):
            self._most = SIGN_IN_BYTES
        self._until = asyncio.get_running_loop().time() + BODY_SECONDS + self._most / LEAST_RATE
        said = Headers(scope=scope).get("content-length", "0")
        if said.isdecimal() and int(said) > self._most:
            raise too_large(self._most)

    def free(self) -> None:
        """Count the body no longer."""
        self._memory.give_back(self.owner, self._counted)

    async def receive(self) -> Message:
        """The next piece; a disconnection where the request was refused."""
        if self._whole:
            return await self._receive()  # waits for the client to go
        if self._gone:
            return {"type": "http.disconnect"}
        left = min(PIECE_SECONDS, self._until - asyncio.get_running_loop().time())
        try:
            message = await asyncio.wait_for(self._receive(), max(left, 0))
        except TimeoutError:
            return await self._refuse(ApiError(408, "the body came too slowly", code="slow_body"))
        size = len(message.get("body", b""))
        self._got += size
        if not self._is_file:
            if not self._memory.take(self.owner, size):
                return await self._refuse(overloaded("the bodies of requests take as much memory as they may"))
            self._counted += size
        if self._got > self._most:
            return await self._refuse(too_large(self._most))
        self._whole = not message.get("more_body", False)
        return message

    async def _refuse(self, error: ApiError) -> Message:
        self._gone = True
        await self._answer.refuse(error)
        return {"type": "http.disconnect"}


def too_large(most: int) -> ApiError:
    """Says that a body has more than `most` bytes."""
    return ApiError(413, f"the body is larger than the {most} bytes that it may have", code="body_too_large")


def overloaded(why: str) -> ApiError:
    """Says that a moment later there may be room."""
    return ApiError(503, f"{why}: ask again in a moment", code="overloaded", headers={"retry-after": "1"})


async def _nothing() -> Message:
    return {"type": "http.disconnect"}


def _is_open(scope: Scope) -> bool:
    if scope["path"] == SIGN_IN:
        return bool(scope["method"] == "POST")
    reads = scope["method"] in {"GET", "HEAD"}
    return reads and (scope["path"] in OPEN or scope["path"].startswith(OPEN_UNDER))


def _only(headers: Headers, name: str) -> str | None:
    values = headers.getlist(name)
    return values[0] if len(values) == 1 else None


def _name(host: str) -> str:
    """A host as it is compared: without brackets, a final dot and capitals."""
    return host.strip("[]").rstrip(".").lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_wildcard(host: str) -> bool:
    return _is_address(_name(host)) and ipaddress.ip_address(_name(host)).is_unspecified


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to an address."""
    name = _name(host)
    return name == "localhost" or (_is_address(name) and ipaddress.ip_address(name).is_loopback)


def urls(addresses: Iterable[tuple[str, int]], *, tls: bool) -> list[str]:
    """What clients call the daemon by."""
    scheme = "https" if tls else "http"
    return [f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}" for host, port in addresses]
