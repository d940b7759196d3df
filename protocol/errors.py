"""Errors of keys, the handshake, frames and the connection (see `isthmus.backbone.errors` for the others).

    IsthmusError
    ├── KeyFileError             30   a key file is missing, malformed or readable by others
    ├── FingerprintError         31   the server's key is not the pinned one, or its certificate has expired
    ├── NotEnrolledError         32   the cloud does not know this edge's key
    ├── VersionError             33   the two sides speak different versions
    ├── LocalProtocolError       34   this side misused the session: our bug
    ├── RemoteProtocolError      35   the other side broke the protocol
    │   ├── FrameError                a frame is truncated, forged, replayed, reordered, or not of this session
    │   ├── MessageError              a message is malformed
    │   └── LimitError                a size, a rank or a count is over the agreed limit
    ├── ReceivedNonFiniteError   36   a tensor from the other side is NaN or infinite; also a NonFiniteError
    ├── UnreachableError         40   the cloud cannot be reached, or stayed away too long
    ├── PortInUseError           41   the address to listen on is taken
    ├── RefusedError             42   the cloud declined: a bad request, or one of
    │   ├── DrainingError             the worker stops; another one, or the same one later, serves the edge
    │   ├── OverQuotaError            the edge has used up its quota
    │   └── CloudFailedError          the cloud failed at the request, for want of memory say
    ├── ConnectionLostError      43   the stream broke; the edge retries these before anybody sees them
    └── HomeInUseError           61   another `serve` holds the cloud's home

`LocalProtocolError` is a defect of this side, `RemoteProtocolError` one of the peer (or an attack): the
distinction is h11's.
"""

from __future__ import annotations

from isthmus.backbone.errors import IsthmusError, NonFiniteError
from isthmus.backbone.terminal import printable as printable  # noqa: PLC0414  # exported again


class KeyFileError(IsthmusError, OSError):
    """A key file is missing, malformed, or readable by others."""

    exit_code = 30


class FingerprintError(IsthmusError, PermissionError):
    """The server's root key is not the pinned one, its signature does not verify, or its certificate has expired."""

    exit_code = 31


class NotEnrolledError(IsthmusError, PermissionError):
    """The cloud's `authorized_edges` does not contain this edge's key."""

    exit_code = 32


class VersionError(IsthmusError, ConnectionError):
    """The peer speaks a version or a cipher suite that this side does not."""

    exit_code = 33


class LocalProtocolError(IsthmusError, RuntimeError):
    """This side used the session in a way that the protocol does not allow."""

    exit_code = 34


class RemoteProtocolError(IsthmusError, ConnectionError):
    """The peer broke the protocol. The session cannot continue."""

    exit_code = 35


class FrameError(RemoteProtocolError):
    """A frame is truncated, forged, replayed, reordered, reflected, or belongs to another session."""


class MessageError(RemoteProtocolError):
    """A message is malformed: unknown operation, wrong fields, a dtype or a shape that does not fit."""


class LimitError(RemoteProtocolError):
    """A size, a rank or a count is over the agreed limit. Raised before anything is allocated for it."""


class ReceivedNonFiniteError(NonFiniteError):
    """A tensor from the other side holds NaN or infinity. Asking again would give the same numbers."""

    exit_code = 36


class UnreachableError(IsthmusError, ConnectionError):
    """The cloud cannot be reached, or stayed away for longer than the edge was told to wait."""

    exit_code = 40


class PortInUseError(IsthmusError, OSError):
    """The address to listen on is taken."""

    exit_code = 41


class RefusedError(IsthmusError, ConnectionError):
    """The cloud declined: it drains, a quota is used up, or the request does not make sense."""

    exit_code = 42


class DrainingError(RefusedError):
    """The worker finishes its calls and takes no new session. The edge may try again."""


class OverQuotaError(RefusedError):
    """The edge has as many sessions, or bytes in flight, as its quota allows."""


class TooLateError(RefusedError):
    """The cloud could not compute a call within the deadline that was asked for, and did not begin it."""


class CloudFailedError(RefusedError):
    """The cloud failed at the request. Another moment or worker may have what this one lacked: memory, say."""


class ConnectionLostError(IsthmusError, ConnectionError):
    """The stream broke. The edge reconnects and repeats the call."""

    exit_code = 43


class HomeInUseError(IsthmusError, OSError):
    """Another process serves with the cloud's home."""

    exit_code = 61
