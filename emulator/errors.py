"""Errors of emulators and their packages (see `isthmus.backbone.errors` for the others).

IsthmusError
├── PackageError             25   a package is damaged, changed, incomplete, or of another model
├── SignerError              26   a package is not signed, or not by the one that was asked for
└── AdapterError             27   a returned adapter does not fit the model or the package, or is not finite
"""

from __future__ import annotations

from isthmus.backbone.errors import IsthmusError


class PackageError(IsthmusError, ValueError):
    """A package is damaged, changed, incomplete, or made of another model."""

    exit_code = 25


class SignerError(IsthmusError, PermissionError):
    """A package has no valid signature, or that of somebody else than the one that was asked for."""

    exit_code = 26


class AdapterError(IsthmusError, ValueError):
    """A returned adapter does not fit: its names, shapes, size, values, or the package that it was tuned on."""

    exit_code = 27
