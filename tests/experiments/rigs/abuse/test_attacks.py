"""Every attack of `isthmus bench abuse` against a real server on a tiny model, held to the benchmark's ceilings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.cloud.clouds import Home
from support.models.tiny import tiny_checkpoint

from isthmus.experiments.harness.processes import TaskProcess
from isthmus.experiments.rigs.abuse.abuse_bench import attack_alone, planted_row, rows
from isthmus.experiments.rigs.abuse.attacks import ATTACKS, attacker_process
from isthmus.experiments.rigs.abuse.bare_server import PLANTED, BareServer, Weakness
from isthmus.experiments.rigs.abuse.ceilings import CEILINGS
from isthmus.protocol.enrolment import ConnectionString

pytestmark = [pytest.mark.server, pytest.mark.usefixtures("warm_module")]
SECONDS = (0.3, 1.0, 5.0)
"""Of an attack, which is made again for longer where nothing was computed for it: the machine may be busy."""


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
