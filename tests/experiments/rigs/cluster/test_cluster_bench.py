"""The smallest cloud of several machines: one of them dies, and Ray's control store is silent, while an edge trains."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest
from support.models.tiny import tiny_checkpoint

from isthmus.common.errors import ConfigError
from isthmus.experiments.harness.launch import LocalCloud
from isthmus.experiments.harness.rig_settings import ClusterSettings
from isthmus.experiments.network.net_space import missing
from isthmus.experiments.rigs.cluster.cases import Setting, World, processes_left, processes_of, world
from isthmus.experiments.rigs.cluster.cluster_bench import run_cluster, show
from isthmus.experiments.rigs.cluster.edge_runs import EdgeRun, Finished, run_options
from isthmus.experiments.rigs.faults.faults import write_texts

STEPS, MEANWHILE = 300, 30
CASE = "worker's machine killed"


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder = tmp_path_factory.mktemp("cluster")
    model = tiny_checkpoint("llama", folder / "models" / "tiny")
    data = folder / "texts.jsonl"
    write_texts(data, 2 * STEPS)
    return Setting(model, data, "1:1", STEPS, 10, 1)


def over_one_machine(setting: Setting, folder: Path, steps: int = STEPS) -> Finished:
    (folder / f"{steps}").mkdir()
    with LocalCloud(
        folder / f"{steps}", str(setting.model), "--edge-layers", setting.layers, "--threads", "1"
    ) as cloud:
        options = run_options(cloud.connection, cloud.edge_key, setting.data, steps, setting.threads)
        with EdgeRun(None, os.environ, folder / f"run-{steps}", options) as run:
            return run.finish()


def silent_store(made: World, run: EdgeRun) -> int:
    """Steps that the edge makes while Ray's control store answers nobody."""
    (store,) = [each for each in processes_of(made.cloud.ray.head) if each.name() == "gcs_server"]
    store.send_signal(signal.SIGSTOP)
    try:
        before = run.steps()
        run.wait_for_step(before + MEANWHILE)
        assert store.status() == psutil.STATUS_STOPPED
        return run.steps() - before
    finally:
        store.send_signal(signal.SIGCONT)


@pytest.mark.root
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
@pytest.mark.timeout(300)
def test_an_edge_outlives_a_machine_and_a_silent_control_store(setting: Setting, tmp_path: Path) -> None:
    root = tmp_path / "c"
    root.mkdir()
    with (
        world(setting, root, CASE) as made,
        made.cloud.serving("--workers", "2"),
        made.edge() as run,
    ):
        run.wait_for_step(setting.at)
        assert silent_store(made, run) >= MEANWHILE
        made.session_machine().cut_power()
        done = run.finish()
    assert done.repeated >= 1
    assert done.adapter == over_one_machine(setting, tmp_path).adapter
    assert done.adapter != over_one_machine(setting, tmp_path, STEPS // 2).adapter  # the control of that comparison
    assert processes_left(root) == 0


def test_a_case_that_there_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no case 'flood': choose among two nodes"):
        run_cluster(ClusterSettings(cases="two nodes, flood"), tmp_path)


def test_the_table_says_what_differs_and_what_was_found() -> None:
    run = {"case": CASE, "adapter_identical": True, "calls_repeated": 1, "recovery_s": 2.14, "processes_left": 0}
    secrets = {"canaries": 9, "found": {"network": {"token": 1}}, "controls": {"network": True, "environments": False}}
    table = show({"runs": [run, {**run, "adapter_identical": False}], "secrets": secrets})
    cells = [list(column.cells) for column in table.columns]  # type: ignore[union-attr]
    assert cells[1] == ["identical", "DIFFERS"]
    assert cells[3] == ["2.1 s", "2.1 s"]
    assert table.caption == "9 canaries found: network; controls NOT FOUND"  # type: ignore[union-attr]
