"""The errors of Isthmus, and the exit code of each.

    IsthmusError                      the base; a command that meets one prints its message and exits with its code
    ├── ConfigError              10   a flag, a configuration file or an option does not make sense
    ├── DataError                11   a data file is missing, empty or malformed (names the file and the line)
    ├── UnknownModelError        20   a model name or path leads to no checkpoint
    ├── UnsupportedFamilyError   21   the architecture is not one that can be cut
    ├── PlanError                22   the split plan does not fit the model
    ├── CheckpointError          23   a checkpoint is damaged, or belongs to another model
    ├── UnsupportedCallError     24   the model is asked for something that a split model cannot do exactly
    ├── PackageError             25   a package is damaged, changed, incomplete, or of another model
    ├── SignerError              26   a package is not signed, or not by the one that was asked for
    ├── AdapterError             27   a returned adapter does not fit the model or the package, or is not finite
    ├── ChatTemplateError        28   a chat template takes more time, memory or room than it may
    ├── ConsentError             29   the owner of a package does not allow what is asked
    ├── KeyFileError             30   a key file is missing, malformed or readable by others
    ├── FingerprintError         31   the server's key is not the pinned one, or its certificate has expired
    ├── NotEnrolledError         32   the cloud does not know this edge's key
    ├── VersionError             33   the two sides speak different versions
    ├── LocalProtocolError       34   this side misused the session: our bug
    ├── RemoteProtocolError      35   the other side broke the protocol
    │   ├── FrameError                a frame is truncated, forged, replayed, reordered, or not of this session
    │   ├── MessageError              a message is malformed
    │   └── LimitError                a size, a rank or a count is over the agreed limit
    ├── UnreachableError         40   the cloud cannot be reached, or stayed away too long
    ├── PortInUseError           41   the address to listen on is taken
    ├── RefusedError             42   the cloud declined: a bad request, or one of
    │   ├── DrainingError             the worker stops; another one, or the same one later, serves the edge
    │   ├── OverQuotaError            the edge has used up its quota
    │   │   └── TooManySessionsError  with sessions that are open
    │   ├── TooLateError              a call could not be computed within its deadline
    │   └── CloudFailedError          the cloud failed at the request, for want of memory say
    ├── ConnectionLostError      43   the stream broke; the edge retries these before anybody sees them
    ├── NonFiniteError           50   a loss, an activation or a gradient is NaN or infinite
    │   └── ReceivedNonFiniteError   36   a tensor from the other side is NaN or infinite
    ├── DiskError                51   the disk is full or cannot be written
    ├── OwnershipError           52   a folder or file is another user's, or others may write to it
    ├── HomeInUseError           61   another `serve`, or another daemon, holds the home
    ├── WorkerDiedError          62   a process of the daemon has ended before it answered
    ├── StateError               63   the daemon's database is damaged, or a newer release made it
    ├── NotRunningError          64   no daemon runs with the home
    ├── TranscriptError          70   a transcript does not verify, or the cloud signs another one than the edge's
    ├── AuditError               71   a cloud's answer, computed again elsewhere, has other bits
    ├── LeakBudgetError          72   attacks recover more of the private texts than a run's leak budget allows
    ├── AttackLimitedError       73   an attack got less than it could, for want of candidates
    └── UnsignedError            75   a cloud has left more of its answers unsigned than it may

Every message names the value that was wrong and says what to do next. Errors take one string, so that they survive
pickling by Ray. The codes are documented in docs/exit-codes.md and never reused for something else.

`LocalProtocolError` is a defect of this side, `RemoteProtocolError` one of the peer (or an attack): the distinction is
h11's.
"""

from __future__ import annotations

from typing import ClassVar


class IsthmusError(Exception):
    """Base of every error that a user can cause or meet. `exit_code` is what the command line returns for it."""

    exit_code: ClassVar[int] = 1


class ConfigError(IsthmusError, ValueError):
    """An option, a flag or a configuration file does not make sense."""

    exit_code = 10


class DataError(IsthmusError, ValueError):
    """A data file is missing, empty or malformed. The message names the file and, where there is one, the line."""

    exit_code = 11


class UnknownModelError(IsthmusError, LookupError):
    """A model name or path leads to no checkpoint."""

    exit_code = 20


class UnsupportedFamilyError(IsthmusError, ValueError):
    """The architecture is not one that Isthmus can cut. The message lists those that it can."""

    exit_code = 21


class PlanError(IsthmusError, ValueError):
    """The split plan does not fit the model."""

    exit_code = 22


class CheckpointError(IsthmusError, ValueError):
    """A checkpoint is damaged, incomplete, or belongs to another model."""

    exit_code = 23


class UnsupportedCallError(IsthmusError, ValueError):
    """The split model is asked for something that it cannot do exactly; refusing is better than a wrong answer."""

    exit_code = 24


class PackageError(IsthmusError, ValueError):
    """A package is damaged, changed, incomplete, or made of another model."""

    exit_code = 25


class SignerError(IsthmusError, PermissionError):
    """A package has no valid signature, or that of somebody else than the one that was asked for."""

    exit_code = 26


class AdapterError(IsthmusError, ValueError):
    """A returned adapter does not fit: its names, shapes, size, values, or the package that it was tuned on."""

    exit_code = 27


class ChatTemplateError(IsthmusError, ValueError):
    """A chat template takes more time, memory or room for a conversation than it may."""

    exit_code = 28


class ConsentError(IsthmusError, PermissionError):
    """The owner of a package does not allow what is asked of it."""

    exit_code = 29


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


class TooManySessionsError(OverQuotaError):
    """The edge has as many sessions open as its quota allows; when one ends, another may be opened."""


class TooLateError(RefusedError):
    """The cloud could not compute a call within the deadline that was asked for, and did not begin it."""


class CloudFailedError(RefusedError):
    """The cloud failed at the request. Another moment or worker may have what this one lacked: memory, say."""


class ConnectionLostError(IsthmusError, ConnectionError):
    """The stream broke. The edge reconnects and repeats the call."""

    exit_code = 43


class NonFiniteError(IsthmusError, ArithmeticError):
    """A loss, an activation or a gradient is NaN or infinite."""

    exit_code = 50


class ReceivedNonFiniteError(NonFiniteError):
    """A tensor from the other side holds NaN or infinity. Asking again would give the same numbers."""

    exit_code = 36


class DiskError(IsthmusError, OSError):
    """The disk is full or cannot be written."""

    exit_code = 51


class OwnershipError(IsthmusError, PermissionError):
    """A folder or a file that would be trusted is another user's, or others may write to it."""

    exit_code = 52


class HomeInUseError(IsthmusError, OSError):
    """Another process serves with the home."""

    exit_code = 61


class WorkerDiedError(IsthmusError, RuntimeError):
    """The process that was to answer has ended; a question that is repeated starts another one."""

    exit_code = 62


class StateError(IsthmusError, ValueError):
    """The daemon's database is damaged, or a newer release made it."""

    exit_code = 63


class NotRunningError(IsthmusError, ConnectionError):
    """No daemon runs with the home, or it does not answer."""

    exit_code = 64


class TranscriptError(IsthmusError, ValueError):
    """A transcript is cut, changed or not signed by who it says; or the cloud signs another one than the edge has."""

    exit_code = 70


class AuditError(IsthmusError, ArithmeticError):
    """An answer of the cloud, computed again elsewhere, is another one."""

    exit_code = 71


class LeakBudgetError(IsthmusError, PermissionError):
    """Attacks recover more of what a run sends than its leak budget allows."""

    exit_code = 72


class AttackLimitedError(IsthmusError, ArithmeticError):
    """An attack on an undefended run missed tokens that were not among its candidates, so it shows nothing."""

    exit_code = 73


class UnsignedError(IsthmusError, PermissionError):
    """A cloud has left more of its answers unsigned than it may."""

    exit_code = 75
