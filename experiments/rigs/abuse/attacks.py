"""Every attack on a worker in one shape, and the process that makes them.

Each question is an attack, seconds and a connection string, and is answered when the attack is over. What the cloud
does to defend itself (it ends streams, say) is no error here.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, Self

from isthmus.common.errors import ConnectionLostError, IsthmusError, RefusedError
from isthmus.experiments.harness.processes import Parent, TaskProcess, serve
from isthmus.experiments.rigs.abuse import costs, stranger
from isthmus.experiments.rigs.hostile_tenants import DEEDS, ENDED, Hostile, yield_to_all
from isthmus.protocol.enrolment import ConnectionString

BATCH, SEQUENCE = 2, 64
"""Of a hostile tenant's calls."""


@dataclass(frozen=True, slots=True)
class Aim:
    """What is attacked.

    Attributes:
        where: The worker.
        key: The private key of an enrolled edge, for attacks by a tenant.
        seconds: How long the attack goes on.
    """

    where: ConnectionString
    key: Path
    seconds: float


@dataclass(frozen=True, slots=True)
class Attack:
    """An attack on a worker.

    Attributes:
        by: Who makes it: somebody without a key, or an enrolled tenant.
        run: Makes it, and returns when it is over.
    """

    by: Literal["stranger", "tenant"]
    run: Callable[[Aim], None]


def _held(name: str) -> Attack:
    """An attack by somebody without a key, which is done and then held."""

    def run(aim: Aim) -> None:
        with stranger.ATTACKS[name](aim.where.host, aim.where.port):
            time.sleep(aim.seconds)

    return Attack("stranger", run)


def _deed(name: str) -> Attack:
    """What a hostile tenant goes on doing."""
    return Attack("tenant", lambda aim: getattr(Hostile(str(aim.where), aim.key, BATCH, SEQUENCE), name)(aim.seconds))


def _cost(name: str) -> Attack:
    """One expensive thing that a tenant asks for."""

    def run(aim: Aim) -> None:
        costs.run(name, str(aim.where), aim.key, aim.seconds)

    return Attack("tenant", run)


ATTACKS: Final[dict[str, Attack]] = {
    **{name: _held(name) for name in stranger.ATTACKS},
    **{name: _deed(name) for name in (*DEEDS, *ENDED)},
    **{name: _cost(name) for name in costs.COSTS},
}


class Attacker(TaskProcess):
    """A process that makes attacks, one after the other; a context manager, which ends it.

    Args:
        key: The private key of an enrolled edge, for attacks by a tenant.
        log: File for the output of the process.
    """

    def __init__(self, key: Path, log: Path) -> None:
        super().__init__("the attacker", "isthmus.experiments.rigs.abuse.attacks", {"key": str(key)}, log=log)

    def attack(self, name: str, seconds: float, connection: str) -> None:
        """Make an attack, a name of `ATTACKS`, for so long, on the worker of a connection string; wait for its end.

        Raises:
            IsthmusError: It ended with an error of its own.
        """
        self.ask([name, seconds, connection])

    def __enter__(self) -> Self:
        try:
            self.answer()  # it has imported what it needs
        except IsthmusError:
            self.__exit__()
            raise
        return self


def _main(parent: Parent) -> None:
    yield_to_all()  # an attacker elsewhere would take none of these cores: what the server does is what counts
    parent.say("ready")
    for attack, seconds, connection in parent.questions():
        aim = Aim(ConnectionString.parse(connection), Path(parent.task["key"]), seconds)
        with contextlib.suppress(ConnectionLostError, RefusedError):
            ATTACKS[attack].run(aim)
        parent.say()


if __name__ == "__main__":
    serve(_main)
