"""The smallest cloud of several machines: one of them dies, and Ray's control store is silent, while an edge trains."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from support.models.tiny import tiny_checkpoint

from isthmus.common.errors import ConfigError, IsthmusError
from isthmus.edge.config.training_config import load_config
from isthmus.experiments.harness.rig_settings import RIGS, ClusterSettings
from isthmus.experiments.harness.single_process import train_in_one_process
from isthmus.experiments.network.net_space import missing
from isthmus.experiments.rigs.cluster.cases import check_apart
from isthmus.experiments.rigs.cluster.cluster_bench import run_cluster, show, summed_up
from isthmus.experiments.rigs.cluster.cluster_world import Setting, World, world
from isthmus.experiments.rigs.cluster.edge_runs import EdgeRun, Finished, run_options, weights_digest
from isthmus.experiments.rigs.cluster.machine_processes import processes_of
from isthmus.experiments.rigs.faults.faults import write_texts

STEPS, MEANWHILE = 120, 20
RUN: dict[str, Any] = {
    "case": "worker's machine killed",
    "adapter_identical": True,
    "calls_failed": 0,
    "calls_repeated": 1,
    "recovery_s": 2.14,
    "at_most_s": 3.0,
    "processes_left": 0,
    "processes_serving": 4,
}
SECRETS: dict[str, Any] = {
    "canaries": 9,
    "found": {},
    "found_in": [],
    "controls": {"network": True, "environments": True},
    "packets_dropped": 0,
}


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder = tmp_path_factory.mktemp("cluster")
    model = tiny_checkpoint("llama", folder / "models" / "tiny")
    data = folder / "texts.jsonl"
    write_texts(data, 2 * STEPS)
    return Setting(model, data, "1:1", STEPS, 10, 1)


def silent_store(made: World, run: EdgeRun) -> int:
    """Steps that the edge makes while Ray's control store answers nobody."""
    (store,) = [each for each in processes_of(made.ray.head) if each.name() == "gcs_server"]
    store.send_signal(signal.SIGSTOP)
    try:
        before = run.steps()
        run.wait_for_step(before + MEANWHILE)
        assert store.status() == psutil.STATUS_STOPPED
        return run.steps() - before
    finally:
        store.send_signal(signal.SIGCONT)


def in_one_process(setting: Setting, out: Path, steps: int) -> str:
    """The digest of the adapter that one process with the whole model trains."""
    about = run_options("-", Path(), setting.data, steps, setting.threads)
    options = {**about, "data": str(setting.data), "out": out}
    train_in_one_process(str(setting.model), setting.layers, load_config(None, options))
    return weights_digest(out)


@pytest.mark.root
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
@pytest.mark.timeout(300)
def test_an_edge_outlives_a_machine_and_a_silent_control_store(setting: Setting, tmp_path: Path) -> None:
    root = tmp_path / "c"
    root.mkdir()
    with world(setting, root) as made:
        cloud = made.cloud
        with cloud.serving("--workers", "2"), made.edge() as run:
            run.wait_for_step(setting.at)
            assert silent_store(made, run) >= MEANWHILE
            made.session_machine().cut_power()
            run.check_trains("the machine lost its power")
            done = run.finish()
        assert cloud.processes_serving >= 2  # the controller and a worker; the other one may be about to start
        assert cloud.processes_left() == 0
        cloud.owner.start(["sleep", "60"], {}, tmp_path / "sleep.txt")
        made.wait("the control of that", lambda: cloud.processes() == 1)
    assert not done.failure
    assert done.repeated >= 1
    assert done.adapter == in_one_process(setting, tmp_path / "whole", STEPS)
    assert done.adapter != in_one_process(setting, tmp_path / "shorter", STEPS // 2)  # the control of that


def test_what_a_run_lost_is_the_sum_of_all_its_pauses() -> None:
    steps = (9.0, 1.0, 1.0, 3.0, 1.0, 4.0, 1.0, 0.9, 1.1)
    assert Finished("", 2, steps).lost_after(1) == pytest.approx(5.0)
    assert Finished("", 2, steps).lost_after(4) == pytest.approx(3.0)
    assert Finished("", 0, (2.0, 1.0, 1.0, 0.5)).lost_after(1) == 0.0


def test_a_case_that_there_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no case 'flood': choose among two nodes"):
        run_cluster(ClusterSettings(cases="two nodes, flood"), tmp_path)


def test_all_is_well_where_nothing_was_seen() -> None:
    assert all(summed_up([RUN, {**RUN, "at_most_s": None, "recovery_s": 99.0}], SECRETS).values())
    assert summed_up([RUN], None)["nothing_secret"]
    assert set(summed_up([RUN], None)) == set(RIGS["cluster"].passed)  # each of them decides the command's exit code


def test_workers_that_are_to_be_apart_and_are_not_end_the_case() -> None:
    first, second = (SimpleNamespace(name=name) for name in ("first", "second"))
    for places, apart in (((first, second), True), ((first, first), False)):
        cloud = SimpleNamespace(machine_of=places.__getitem__)
        with contextlib.nullcontext() if apart else pytest.raises(IsthmusError, match="both workers are on first"):
            check_apart(SimpleNamespace(cloud=cloud))


@pytest.mark.parametrize(
    ("name", "differs"),
    [
        ("identical", {"adapter_identical": False}),
        ("none_failed", {"calls_failed": 1}),
        ("none_left", {"processes_left": 1}),
        ("none_left", {"processes_serving": 0}),
        ("in_time", {"recovery_s": 3.01}),
        ("in_time", {"recovery_s": None}),
    ],
)
def test_one_case_that_goes_wrong_is_seen(name: str, differs: dict[str, Any]) -> None:
    sums = summed_up([RUN, {**RUN, **differs}], SECRETS)
    assert [each for each, holds in sums.items() if not holds] == [name]


@pytest.mark.parametrize(
    "differs",
    [
        {"found": {"network": {"token": 1}}},
        {"controls": {"network": True, "environments": False}},
        {"packets_dropped": 1},
    ],
)
def test_secrets_are_kept_only_where_all_was_looked_at(differs: dict[str, Any]) -> None:
    sums = summed_up([RUN], {**SECRETS, **differs})
    assert [each for each, holds in sums.items() if not holds] == ["nothing_secret"]


def test_the_table_says_what_differs_and_what_was_found() -> None:
    found: dict[str, Any] = {"found": {"network": {"token": 1}}, "found_in": ["packets"]}
    secrets = {**SECRETS, **found, "controls": {"network": False}, "packets_dropped": 3}
    failed = {**RUN, "adapter_identical": False, "recovery_s": None}
    table = show({"runs": [RUN, failed], "secrets": secrets})
    cells = [list(column.cells) for column in table.columns]  # type: ignore[union-attr]
    assert cells[1] == ["identical", "DIFFERS"]
    assert cells[3] == ["2.1 s", "does not go on"]
    assert table.caption == "9 canaries found: packets; controls NOT FOUND; 3 packets not captured"  # type: ignore[union-attr]
