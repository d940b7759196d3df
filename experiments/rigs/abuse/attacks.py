"""Every attack on a worker in one shape, and the process that makes them and those on a daemon.

Each question is an attack, seconds and a connection string, or the fields of `Asked` for an attack on a daemon. It is
answered when the attack is over, with the calls that the cloud has computed for it, or the requests that were sent.
What the cloud does to defend itself (it ends streams, say) is no error here.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, Literal

from isthmus.common.errors import ConnectionLostError, RefusedError
from isthmus.experiments.harness.processes import Parent, TaskProcess, serve
from isthmus.experiments.rigs.abuse import costs, stranger
from isthmus.experiments.rigs.abuse.daemon_attacks import DAEMON_ATTACKS, Asked, attack_daemon
from isthmus.experiments.rigs.hostile_tenants import COMPUTED, DEEDS, ENDED, Hostile, yield_to_all
from isthmus.protocol.enrolment import ConnectionString

BATCH, SEQUENCE = 2, 64
"""Of a hostile tenant's calls."""
DEFENDED: Final = (ConnectionLostError, RefusedError)
"""What comes of a cloud that defends itself."""


@dataclass(frozen=True, slots=True)
class Attack:
    """An attack on a worker.

    Attributes:
        by: Who makes it: somebody without a key, or an enrolled tenant.
        run: Makes it, given a connection string, the private key of an enrolled edge, and seconds; returns when it is
            over, with the calls that the cloud has computed for it.
        is_computed: Whether the cloud has to compute calls for it: where it has computed none, the attack was not made.
    """

    by: Literal["stranger", "tenant"]
    run: Callable[[str, Path, float], int]
    is_computed: bool = False


def _held(name: str, connection: str, _key: Path, seconds: float) -> int:
    where = ConnectionString.parse(connection)
    with stranger.ATTACKS[name](where.host, where.port):
        time.sleep(seconds)
    return 0


def _deed(name: str, connection: str, key: Path, seconds: float) -> int:
    hostile = Hostile(connection, key, BATCH, SEQUENCE)
    with contextlib.suppress(*DEFENDED):
        getattr(hostile, name)(seconds)
    return sum(hostile.computed)


def _cost(name: str, connection: str, key: Path, seconds: float) -> int:
    with costs.opened(connection, key) as session:
        with contextlib.suppress(*DEFENDED):
            costs.COSTS[name](session, seconds)
        return session.computed


ATTACKS: Final[dict[str, Attack]] = {
    **{name: Attack("stranger", partial(_held, name)) for name in stranger.ATTACKS},
    **{name: Attack("tenant", partial(_deed, name), name in COMPUTED) for name in (*DEEDS, *ENDED)},
    **{name: Attack("tenant", partial(_cost, name), name in costs.COMPUTED) for name in costs.COSTS},
}


@contextlib.contextmanager
def attacker_process(key: Path, log: Path) -> Iterator[TaskProcess]:
    """A process that makes attacks, one after the other: ask it for `[attack, seconds, connection string]`."""
    with TaskProcess("the attacker", "isthmus.experiments.rigs.abuse.attacks", {"key": str(key)}, log=log) as process:
        process.answer()  # it has imported what it needs
        yield process


def _main(parent: Parent) -> None:
    yield_to_all()  # an attacker elsewhere would take none of these cores: what the server does is what counts
    parent.say("ready")
    for attack, seconds, where in parent.questions():
        computed = 0
        with contextlib.suppress(*DEFENDED):
            if attack in DAEMON_ATTACKS:
                computed = attack_daemon(attack, Asked(**where), seconds)
            else:
                computed = ATTACKS[attack].run(where, Path(parent.task["key"]), seconds)
        parent.say(computed)


if __name__ == "__main__":
    serve(_main)
