"""What each attack may cost a worker, an edge or a daemon, at most: what is bounded gives it, where a bound is known.

`docs/security.md` has the table of what holds each of them back; a test compares the names. The attacks of strangers
are of a fixed size, whatever the seconds for which they are held.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from isthmus.backbone.checkpoints.chat_template import TemplateLimits
from isthmus.cloud.bounds import Bounds
from isthmus.daemon.daemon_settings import DaemonSettings
from isthmus.experiments.rigs.abuse.attacked_edge import EDGE_ATTACKS
from isthmus.experiments.rigs.abuse.attacks import ATTACKS
from isthmus.experiments.rigs.abuse.daemon_attacks import DAEMON_ATTACKS
from isthmus.experiments.rigs.abuse.decode_costs import DECODE_COSTS
from isthmus.protocol.limits import MIB

STASH_BYTES, COMPUTE_BYTES, CACHE_BYTES = 512 * MIB, 2048 * MIB, 256 * MIB
"""What the worker that is attacked is started with: a small machine's budgets, so that a tenant reaches them."""
BOUNDS: Final = Bounds()
DAEMON_SETTINGS: Final = DaemonSettings()
TEMPLATE_LIMITS: Final = TemplateLimits()


@dataclass(frozen=True, slots=True)
class Ceiling:
    """What an attack may cost.

    Attributes:
        memory_mib: Resident size beyond that before the attack, in MiB.
        descriptors: Open descriptors beyond those before the attack.
        processor_s: Seconds of processor time; None where the attack is made of calls, of which the scheduler gives a
            tenant its share for as long as it asks: what counts then is how much slower the others get.
        threads: Threads beyond those before the attack, of the process and of all below it; None where it starts none.
        answers: How many times as long as before another owner's slowest answer may take; None where none are asked.
        health: The same of asking a daemon how it is.
    """

    memory_mib: float
    descriptors: int
    processor_s: float | None
    threads: int | None = None
    answers: float | None = None
    health: float | None = None


STRANGER: Final = Ceiling(192.0, BOUNDS.max_half_open + 32, 30.0)
"""Twice `max_half_open_per_host` windows of a stream (`stream_window`), and half as much again for what gRPC and malloc
keep: most of it is asked for once and used again."""
CONNECTIONS: Final = Ceiling(192.0, BOUNDS.max_connections + 32, 30.0)
"""The same for attacks that hold connections, each of which has a descriptor."""
TENANT: Final = Ceiling((STASH_BYTES + COMPUTE_BYTES) / MIB + 256.0, 160, None)
"""The forward states that are kept, the calls that are computed, and the messages of a tenant's sessions."""
DECODING: Final = Ceiling((CACHE_BYTES + COMPUTE_BYTES) / MIB + 256.0, 160, None)
"""Keys and values, steps that are computed, and the messages of a tenant's sessions."""
NOTHING: Final = Ceiling(64.0, 32, 10.0)
"""What is refused, or ended, before anything is computed."""
ANSWER: Final = Ceiling(64.0, 32, 10.0)
"""Of an answer that is too large, an edge takes no more than two frames of 1 MiB and the window of the stream, in each
of its five attempts."""
OFFER: Final = Ceiling(16.0, 32, 2.0)
"""A list of files is refused before anything is fetched."""
QUESTIONS: Final = Ceiling(128.0, 32, 30.0)
"""An edge answers two questions for each site of a call, in each of its five attempts: that is a step of training."""
TEMPLATE: Final = Ceiling((TEMPLATE_LIMITS.memory_bytes >> 20) + 192.0, 32, TEMPLATE_LIMITS.cpu_seconds + 10.0)
"""What one rendering may take, and the process that renders: it imports transformers, without torch."""
DAEMON: Final = Ceiling(256.0, 2 * DAEMON_SETTINGS.requests_at_once + 64, None, 96, 5.0, 250.0)
"""The bodies that may be in memory (16 of `body_mib`, and half as much for the owners' shares), and the copies by which
one is looked at; connections; the threads of two pools, 40 and 32 of them. An answer beside an attacker's has half of
the processor, and waits for bodies; health takes milliseconds, and waits for eight bodies that are looked at one after
the other, tens of milliseconds each."""
PLANTED_CEILING: Final = Ceiling(128.0, 32, 3.0)
"""For the servers with a planted weakness, of which each breaks one."""

_SPECIAL: Final = {
    "silent_connections": CONNECTIONS,
    "half_prefaces": CONNECTIONS,
    "idle_connections": CONNECTIONS,
    "crowds": CONNECTIONS,
    "rekeys": NOTHING,
    "endless_key": NOTHING,
    "renewals": NOTHING,
    "session_pings": NOTHING,
    "long_call": NOTHING,
    **dict.fromkeys(DECODE_COSTS, DECODING),
}

_OF_EDGE: Final = {
    "large_answer": ANSWER,
    "endless_questions": QUESTIONS,
    "large_file": OFFER,
    "many_bytes": OFFER,
    "endless_template": TEMPLATE,
    "exploding_template": TEMPLATE,
}

CEILINGS: Final[dict[str, Ceiling]] = {
    **{name: _SPECIAL.get(name, STRANGER if attack.by == "stranger" else TENANT) for name, attack in ATTACKS.items()},
    **{name: _OF_EDGE[name] for name in EDGE_ATTACKS},
    **dict.fromkeys(DAEMON_ATTACKS, DAEMON),
}
