"""Every attack of `isthmus bench abuse` against a real server or daemon on a tiny model, held to its ceilings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.cloud.clouds import Home
from support.models.tiny import tiny_checkpoint

from isthmus.experiments.daemon.local_daemon import LocalDaemon
from isthmus.experiments.harness.processes import TaskProcess
from isthmus.experiments.rigs.abuse.abuse_bench import UNIT_OF, attack_alone, daemon_rows, planted_row, rows
from isthmus.experiments.rigs.abuse.attacks import ATTACKS, attacker_process
from isthmus.experiments.rigs.abuse.bare_server import PLANTED, BareServer, Weakness
from isthmus.experiments.rigs.abuse.ceilings import CEILINGS
from isthmus.experiments.rigs.abuse.daemon_attacks import DAEMON_ATTACKS
from isthmus.protocol.enrolment import ConnectionString

pytestmark = [pytest.mark.server, pytest.mark.usefixtures("warm_module")]
SECONDS = (0.3, 1.0, 5.0)
"""Of an attack, which is made again for longer where nothing was computed for it, or sent: the machine may be busy."""


class Place:
    """Where servers find their model and keys, and attackers theirs."""

    def __init__(self, folder: Path) -> None:
        self.model = tiny_checkpoint("llama", folder / "model")
        self.parts, self.log = folder / "parts", folder / "log"
        self.home = Home(folder)
        self.key = self.home.new_edge("mallory")

    def server(self) -> BareServer:
        return BareServer(self.model, self.parts, self.home.folder, self.log)

    def address(self, server: BareServer) -> str:
        return str(ConnectionString("127.0.0.1", server.port, self.home.pin))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("abuse"))


@pytest.fixture(scope="module")
def attacker(place: Place) -> Iterator[TaskProcess]:
    with attacker_process(place.key, place.log) as attacker:
        yield attacker


@pytest.fixture(scope="module")
def server(place: Place) -> Iterator[BareServer]:
    with place.server() as server:
        yield server


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_costs_no_more_than_its_ceilings(
    place: Place, attacker: TaskProcess, server: BareServer, attack: str
) -> None:
    for seconds in SECONDS:
        taken, found = attack_alone(attacker, attack, server.pid, place.address(server), seconds)
        if found or not ATTACKS[attack].is_computed:
            break
    computed = found if ATTACKS[attack].is_computed else None
    assert [row for row in rows(taken, CEILINGS[attack], computed) if not row["held"]] == []


@pytest.mark.parametrize("weakness", PLANTED)
def test_a_planted_weakness_is_caught(server: BareServer, weakness: Weakness) -> None:
    assert planted_row(server, weakness)["caught"]
    server.plant("none")


@pytest.mark.long
def test_a_daemon_that_is_attacked_takes_no_more_than_its_ceilings(
    place: Place, attacker: TaskProcess, server: BareServer, tmp_path: Path
) -> None:
    connection = tmp_path / "connection"
    connection.write_text(place.address(server))
    cloud: Any = SimpleNamespace(connection_file=connection, edge_key=place.home.key_file)
    latencies = {UNIT_OF["answers"], UNIT_OF["health"]}  # how long something takes is the benchmark's to judge
    with LocalDaemon(tmp_path, cloud) as daemon:
        for name in DAEMON_ATTACKS:
            tries = (daemon_rows(name, attacker, daemon, seconds) for seconds in SECONDS)
            found = next((each for each in tries if each[0]["computed"]), [])
            assert {row["unit"] for row in found} == set(UNIT_OF.values()) - {UNIT_OF["processor"]}
            assert [row for row in found if not row["held"] and row["unit"] not in latencies] == []
