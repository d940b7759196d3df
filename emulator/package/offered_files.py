"""Which files belong to which file set of a session. The cloud offers no others, and the edge takes no others."""

from __future__ import annotations

import re

from isthmus.backbone.checkpoints.sources import is_model_file, is_part
from isthmus.emulator.compress.recipe import EMULATOR_FILE, EMULATOR_INFO
from isthmus.emulator.package.intake import ADAPTER_FILES
from isthmus.emulator.package.manifest import MANIFEST_FILE
from isthmus.protocol.messages import FileSet

_ADAPTER_FILE = re.compile(r"([0-9a-f]{64})-([0-9]{13})-(.+)")


def adapter_prefix(fingerprint: str, plugged_at: int) -> str:
    """What the names of an adapter's files begin with in the file set of all tenants' adapters.

    Args:
        fingerprint: digest (hex) of the fingerprint of the tenant's key.
        plugged_at: when it was plugged in, in Unix milliseconds.
    """
    return f"{fingerprint}-{plugged_at:013d}-"


def belongs(name: str, file_set: FileSet) -> bool:
    """Whether a file of this name may be in the file set."""
    match file_set:
        case FileSet.PARTS:
            return is_part(name)
        case FileSet.EMULATOR:
            return is_part(name) or name in (EMULATOR_FILE, EMULATOR_INFO, MANIFEST_FILE)
        case FileSet.ADAPTER:
            return name in ADAPTER_FILES
        case FileSet.MODEL:
            return is_model_file(name)
        case FileSet.ADAPTERS:
            found = _ADAPTER_FILE.fullmatch(name)
            return found is not None and found[3] in ADAPTER_FILES
