"""How an edge's process is set up before it holds texts, adapters and keys."""

from __future__ import annotations

import resource


def no_core_files() -> None:
    """Write no core files from now on: one would hold texts, adapters and keys."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
