"""What each attack may cost a worker at most. Written down before the attacks are run, not after.

`docs/security.md` has a table of what holds each of them back; a test compares the names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Ceiling:
    """What an attack may cost.

    Attributes:
        memory_mib: Resident size beyond that before the attack, in MiB.
        descriptors: Open descriptors beyond those before the attack.
        processor_ms: Milliseconds of processor time for each attempt; None where the attack is made of calls of which
            the scheduler gives a tenant its share, and what counts is how others feel it.
    """

    memory_mib: float
    descriptors: int
    processor_ms: float | None


STRANGER_MEMORY_MIB = 128.0
"""Frames of 4 MiB at most for each of the streams that one peer may have before it has said who it is, and as much
again for what gRPC and malloc keep of them."""
TENANT_MEMORY_MIB = 512.0
"""A tenant's bytes in flight, its forward states within the stash, and a pass over them."""

CEILINGS: Final[dict[str, Ceiling]] = {
    "garbage_streams": Ceiling(STRANGER_MEMORY_MIB, 32, 25.0),
    "health_names": Ceiling(STRANGER_MEMORY_MIB, 64, 50.0),
    "silent_streams": Ceiling(STRANGER_MEMORY_MIB, 64, 20.0),
    "silent_connections": Ceiling(STRANGER_MEMORY_MIB, 288, 20.0),
    "large_headers": Ceiling(STRANGER_MEMORY_MIB, 64, 20.0),
    "garbage": Ceiling(STRANGER_MEMORY_MIB, 64, None),
    "flood": Ceiling(TENANT_MEMORY_MIB, 64, None),
    "held_sessions": Ceiling(STRANGER_MEMORY_MIB, 160, None),
    "slow_reader": Ceiling(TENANT_MEMORY_MIB, 64, None),
    "slow_writer": Ceiling(TENANT_MEMORY_MIB, 64, None),
    "stash_evicted": Ceiling(TENANT_MEMORY_MIB, 64, None),
}
