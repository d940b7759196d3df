"""Every attack of a hostile cloud of `isthmus bench abuse` on an edge, held to the benchmark's ceilings."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.cloud.clouds import PLAN, Home
from support.models.tiny import tiny_checkpoint

from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.backbone.plan import SplitPlan
from isthmus.cloud.control.worker_setup import make_parts
from isthmus.common.errors import IsthmusError
from isthmus.experiments.rigs.abuse.abuse_bench import lifted_row, rows
from isthmus.experiments.rigs.abuse.attacked_edge import EDGE_ATTACKS, LIFTED, Edge
from isthmus.experiments.rigs.abuse.ceilings import CEILINGS
from isthmus.experiments.rigs.abuse.hostile_cloud import TRICKS, HostileCloud

pytestmark = [pytest.mark.server, pytest.mark.usefixtures("warm_module")]
Pair = tuple[HostileCloud, Edge]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """A hostile cloud, and the edge that has pinned it."""
    folder = tmp_path_factory.mktemp("edge")
    checkpoint = Checkpoint(tiny_checkpoint("llama", folder / "model"), "tiny")
    make_parts(checkpoint, SplitPlan.parse(PLAN, checkpoint.config.num_hidden_layers), folder / "parts")
    home = Home(folder)
    with (
        HostileCloud(home.folder, folder / "parts", PLAN) as cloud,
        Edge(home.key_file, folder, folder / "log") as edge,
    ):
        yield cloud, edge


@pytest.mark.parametrize("attack", EDGE_ATTACKS)
def test_an_attack_costs_an_edge_no_more_than_its_ceilings(pair: Pair, attack: str) -> None:
    cloud, edge = pair
    assert [row for row in rows(edge.attacked(attack, cloud), CEILINGS[attack]) if not row["held"]] == []


@pytest.mark.parametrize("attack", LIFTED)
def test_without_its_bound_the_ceiling_is_broken(pair: Pair, attack: str) -> None:
    cloud, edge = pair
    assert lifted_row(edge, cloud, attack)["caught"]


def test_an_attack_that_the_edge_does_not_refuse_is_an_error(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    cloud, edge = pair
    monkeypatch.setitem(TRICKS, "many_bytes", lambda *_: None)
    with pytest.raises(IsthmusError, match="answers the attack 'many_bytes' with no error"):
        edge.attacked("many_bytes", cloud)
