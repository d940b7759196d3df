"""What each attack may cost a worker at most: written down before the attacks are run, not after.

`docs/security.md` has the table of what holds each of them back; a test compares the names. The attacks of strangers
are of a fixed size, whatever the seconds for which they are held.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from isthmus.cloud.bounds import Bounds
from isthmus.experiments.abuse.attacks import ATTACKS

BOUNDS: Final = Bounds()


@dataclass(frozen=True, slots=True)
class Ceiling:
    """What an attack may cost.

    Attributes:
        memory_mib: Resident size beyond that before the attack, in MiB.
        descriptors: Open descriptors beyond those before the attack.
        processor_s: Seconds of processor time; None where the attack is made of calls, of which the scheduler gives a
            tenant its share for as long as it asks: what counts then is how the others feel it.
    """

    memory_mib: float
    descriptors: int
    processor_s: float | None


STRANGER: Final = Ceiling(192.0, BOUNDS.max_half_open + 32, 30.0)
"""Twice `max_half_open_per_host` windows of a stream (`stream_window`), and half as much again for what gRPC and malloc
keep: most of it is asked for once and used again."""
CONNECTIONS: Final = Ceiling(192.0, BOUNDS.max_connections + 32, 30.0)
"""The same for attacks that hold connections, each of which has a descriptor."""
TENANT: Final = Ceiling(512.0, 160, None)
"""A tenant's messages in flight, its forward states within the stash, and a pass over them."""
NOTHING: Final = Ceiling(64.0, 32, 10.0)
"""What is refused, or ended, before anything is computed."""
PLANTED_CEILING: Final = Ceiling(128.0, 32, 3.0)
"""For the servers with a planted weakness, of which each breaks one."""

_SPECIAL: Final = {
    "silent_connections": CONNECTIONS,
    "half_prefaces": CONNECTIONS,
    "idle_connections": CONNECTIONS,
    "rekeys": NOTHING,
    "session_pings": NOTHING,
    "long_call": NOTHING,
}

CEILINGS: Final[dict[str, Ceiling]] = {
    name: _SPECIAL.get(name, STRANGER if attack.by == "stranger" else TENANT) for name, attack in ATTACKS.items()
}
