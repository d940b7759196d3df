"""Which files belong to which file set of a session. The cloud offers no others, and the edge takes no others."""

from __future__ import annotations

from isthmus.backbone.checkpoints.sources import is_part
from isthmus.emulator.compress.recipe import EMULATOR_FILE, EMULATOR_INFO
from isthmus.emulator.package.intake import ADAPTER_FILES
from isthmus.emulator.package.manifest import MANIFEST_FILE
from isthmus.protocol.messages import FileSet


def belongs(name: str, file_set: FileSet) -> bool:
    """Whether a file of this name may be in the file set."""
    match file_set:
        case FileSet.PARTS:
            return is_part(name)
        case FileSet.EMULATOR:
            return is_part(name) or name in (EMULATOR_FILE, EMULATOR_INFO, MANIFEST_FILE)
        case FileSet.ADAPTER:
            return name in ADAPTER_FILES
