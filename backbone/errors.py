"""The errors of Isthmus, and the exit code of each.

    IsthmusError                      the base; a command that meets one prints its message and exits with its code
    ├── ConfigError              10   a flag, a configuration file or an option does not make sense
    ├── DataError                11   a data file is missing, empty or malformed (names the file and the line)
    ├── UnknownModelError        20   a model name or path leads to no checkpoint
    ├── UnsupportedFamilyError   21   the architecture is not one that can be cut
    ├── PlanError                22   the split plan does not fit the model
    ├── CheckpointError          23   a checkpoint is damaged, or belongs to another model
    ├── UnsupportedCallError     24   the model is asked for something that a split model cannot do exactly
    ├── ChatTemplateError        28   a chat template takes more time, memory or room than it may
    ├── NonFiniteError           50   a loss, an activation or a gradient is NaN or infinite
    ├── DiskError                51   the disk is full or cannot be written
    ├── OwnershipError           52   a folder or file is another user's, or others may write to it
    ├── isthmus.emulator.errors  25-27  packages of the emulator path, and the adapters that come back
    └── isthmus.protocol.errors  30-49  keys, the handshake, frames, the connection; 61, the cloud's home

Every message names the value that was wrong and says what to do next. Errors take one string, so that they survive
pickling by Ray. The codes are documented in docs/exit-codes.md and never reused for something else.
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


class ChatTemplateError(IsthmusError, ValueError):
    """A chat template takes more time, memory or room for a conversation than it may."""

    exit_code = 28


class NonFiniteError(IsthmusError, ArithmeticError):
    """A loss, an activation or a gradient is NaN or infinite."""

    exit_code = 50


class DiskError(IsthmusError, OSError):
    """The disk is full or cannot be written."""

    exit_code = 51


class OwnershipError(IsthmusError, PermissionError):
    """A folder or a file that would be trusted is another user's, or others may write to it."""

    exit_code = 52
