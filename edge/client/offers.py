"""What a cloud may offer to fetch: which files, how large each, and how much in all. Checked before they are written.

    configuration, manifest, what an adapter says of itself    1 MiB each
    tokenizer files, chat templates                            64 MiB each
    weights                                                    what the configuration says that they weigh at fp32
    all together                                               `max_bytes`, and what the disk has room for beside 1 GiB
    all that the cache keeps of a cloud's parts                `max_bytes` and 16 folders, and as much of its adapters

The configuration is the cloud's own word as well. So the weights' bound keeps a cloud to what it says of its model, and
`max_bytes` (`--max-fetch-gib`) is the data owner's word on how much that may be.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from isthmus.backbone.adapters.adapter_files import TUNING_INFO
from isthmus.backbone.adapters.custom_adapters import ADAPTER_WEIGHTS
from isthmus.backbone.checkpoints.sources import PARTS_FILE
from isthmus.backbone.checkpoints.tensor_reader import EDGE_FILE, WHOLE_FILE
from isthmus.common.errors import DiskError, LimitError, RemoteProtocolError
from isthmus.emulator.compress.recipe import EMULATOR_FILE, EMULATOR_INFO
from isthmus.emulator.package.manifest import MANIFEST_FILE
from isthmus.emulator.package.offered_files import belongs
from isthmus.protocol import messages as m
from isthmus.protocol.limits import GIB, MIB

DEFAULT_MAX_BYTES = 64 * GIB
"""An embedding and a head of 256,000 tokens by 16,384 take 32 GiB at fp32."""
MAX_FILES = 64
MAX_FOLDERS = 16
"""Of one cloud's parts, or of its adapters, that the cache keeps: a cloud may name another model at each session."""
RESERVE = GIB
"""What a fetch leaves of the disk's free space, for the checkpoints of runs and for the rest of the machine."""
MAX_SETTINGS = MIB
MAX_TOKENIZER = 64 * MIB
"""The largest tokenizers of known models have some 40 MiB."""
WEIGHTS_HEADER = 16 * MIB
"""What a file of weights may have beside its numbers: names, shapes and places of the tensors."""

WEIGHTS = frozenset({EDGE_FILE, EMULATOR_FILE, ADAPTER_WEIGHTS, WHOLE_FILE})
_SETTINGS = frozenset({"config.json", "generation_config.json", PARTS_FILE, EMULATOR_INFO, MANIFEST_FILE, TUNING_INFO})
_NAMES = {
    m.FileSet.PARTS: "an edge's parts",
    m.FileSet.EMULATOR: "a package's files",
    m.FileSet.ADAPTER: "an adapter's files",
}


def check_offer(entries: Iterable[m.FileEntry], file_set: m.FileSet, max_bytes: int) -> None:
    """Look at a list of files before any of them is fetched.

    Args:
        entries: what the cloud offers.
        file_set: where.
        max_bytes: most bytes of all files.

    Raises:
        LimitError: there are too many files, or one of them or all together are too large.
        RemoteProtocolError: a file does not belong there.
    """
    offered = tuple(entries)
    for entry in offered:
        if not belongs(entry.name, file_set):
            raise RemoteProtocolError(
                f"the cloud offers the file {entry.name!r}, which is none of {_NAMES[file_set]}: "
                "ask its owner what it is"
            )
        if entry.name not in WEIGHTS:
            check_size(entry, MAX_SETTINGS if entry.name in _SETTINGS else MAX_TOKENIZER)
    if len(offered) > MAX_FILES:
        raise LimitError(f"the cloud offers {len(offered)} files: at most {MAX_FILES} are taken")
    total = sum(entry.size for entry in offered)
    if total > max_bytes:
        raise LimitError(
            f"the cloud offers {total} bytes of {_NAMES[file_set]}: at most {max_bytes} are taken. "
            "If the model is that large, raise --max-fetch-gib"
        )


def check_size(entry: m.FileEntry, most: int) -> None:
    """Hold a file to its bound. Raises LimitError."""
    if entry.size > most:
        raise LimitError(
            f"the cloud offers {entry.name} of {entry.size} bytes: at most {most} are taken of such a file; ask its "
            "owner what it is"
        )


def check_room(folder: Path, size: int) -> None:
    """See to it that the disk has room for `size` more bytes in `folder`, and for `RESERVE` beside them.

    Raises:
        DiskError: It has not.
        OSError: It cannot be looked at.
    """
    free = shutil.disk_usage(folder).free
    if size and size + RESERVE > free:
        raise DiskError(
            f"{folder} has room for {free} bytes; {size} are to be fetched, and {RESERVE} are to stay free: free some "
            "space or choose another folder (the cache's is ISTHMUS_CACHE)"
        )
