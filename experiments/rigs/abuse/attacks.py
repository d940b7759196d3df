"""Every attack on a worker in one shape, and the process that makes them.

    python -m isthmus.experiments.rigs.abuse.attacks KEY

Each line of its standard input is `ATTACK SECONDS CONNECTION_STRING`, and is answered by an empty line when the attack
is over. What the cloud does to defend itself (it ends streams, say) is no error here.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from isthmus.common.errors import ConnectionLostError, IsthmusError, RefusedError
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


class Attacker:
    """A process that makes attacks, one after the other; a context manager, which ends it.

    Args:
        key: The private key of an enrolled edge, for attacks by a tenant.
        log: File for the output of the process.
    """

    def __init__(self, key: Path, log: Path) -> None:
        self._log = log
        self._attack = "none"
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "isthmus.experiments.rigs.abuse.attacks", str(key)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                start_new_session=True,
            )

    def attack(self, name: str, seconds: float, connection: str) -> None:
        """Make an attack, a name of `ATTACKS`, for so long, on the worker of a connection string; wait for its end.

        Raises:
            IsthmusError: It ended with an error of its own.
        """
        self._attack = name
        if self._process.stdin is not None:
            self._process.stdin.write(f"{name} {seconds} {connection}\n".encode())
            self._process.stdin.flush()
        self._wait()

    def __enter__(self) -> Attacker:
        try:
            self._wait()  # it has imported what it needs
        except IsthmusError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def _wait(self) -> None:
        if self._process.stdout is None or not self._process.stdout.readline():
            raise IsthmusError(f"the attack {self._attack!r} ended with an error; its output is in {self._log}")


def _main(key: Path) -> None:
    yield_to_all()  # an attacker elsewhere would take none of these cores: what the server does is what counts
    print(flush=True)
    for line in sys.stdin:
        attack, seconds, connection = line.split()
        with contextlib.suppress(ConnectionLostError, RefusedError):
            ATTACKS[attack].run(Aim(ConnectionString.parse(connection), key, float(seconds)))
        print(flush=True)


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
