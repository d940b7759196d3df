"""The benchmark of chaos: real processes, a few faults, and nothing that stays behind."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from pathlib import Path

import pytest
from support.commands import Shell, ended, wait_for
from support.models.tiny import tiny_checkpoint

from isthmus.common.errors import ConfigError
from isthmus.experiments.harness.launch import _of_session
from isthmus.experiments.harness.rig_settings import ChaosSettings
from isthmus.experiments.rigs.chaos import chaos_bench
from isthmus.experiments.rigs.chaos.chaos_bench import run_chaos

KINDS = ("controller_killed", "garbage", "worker_killed_queued", "connection_cut")
STEPS = 30
SEED = 27  # the first two fall in this order; the others where there is time


@pytest.mark.long
@pytest.mark.server
@pytest.mark.usefixtures("warm_children")
def test_what_breaks_changes_no_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    model = tiny_checkpoint("llama", tmp_path / "model")
    folder = tmp_path / "run"
    folder.mkdir()
    settings = ChaosSettings(
        model=str(model), tenants=1, seconds=8.0, steps=STEPS, kinds=",".join(KINDS), seed=SEED, bad_s=0.2,
        stash_bytes="8MiB", warm_up_s=0.0,
    )  # fmt: skip
    figures = run_chaos(settings, folder)
    assert figures["faults"] == sum(figures["faults_by_kind"].values()) == len(_lines(folder / "faults.jsonl"))
    assert {"controller_killed", "garbage"} <= set(figures["faults_by_kind"])
    assert list(figures["felt"]) == ["garbage"]
    assert "garbage" not in figures["recovery_s_by_kind"]
    assert (figures["steps_lost"], figures["steps_doubled"]) == (0, 0)
    assert figures["adapters_identical"]
    assert figures["losses_identical"]
    assert figures["trainings"] >= 1
    assert figures["steps_finished"] >= 2 * STEPS  # in peace and disturbed
    assert figures["rss_most_bytes"] > 1 << 24
    assert figures["rss_lives"] >= figures["workers"] == 2
    assert (figures["network"], figures["seed"]) == ("not broken", SEED)


@pytest.mark.server
def test_it_ends_when_it_is_told_to_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    model = tiny_checkpoint("llama", tmp_path / "model")
    process = Shell(tmp_path).start(
        "bench", "chaos", "--model", model, "--tenants", 1, "--keep", tmp_path / "run", "--soak"
    )
    wait_for(lambda: bool(_serving(tmp_path)), process)
    (cloud,) = _serving(tmp_path)
    done = ended(process, signal.SIGTERM)
    assert done.returncode == 130, done.stderr
    assert done.stderr.splitlines()[-1].startswith("isthmus: ")
    deadline = time.monotonic() + 60
    while alive := _of_session(cloud):
        assert time.monotonic() < deadline, alive
        time.sleep(0.1)


def test_what_cannot_be_done_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chaos_bench, "missing", lambda: "network namespaces need root: run as root")
    with pytest.raises(ConfigError, match=r"can be made here: network namespaces need root"):
        run_chaos(ChaosSettings(model="unused", kinds="silence,packets_lost"), tmp_path)
    with pytest.raises(ConfigError, match="'meteor' is not known"):
        run_chaos(ChaosSettings(model="unused", kinds="meteor"), tmp_path)


def _lines(path: Path) -> list[object]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _serving(folder: Path) -> list[int]:
    """Processes of clouds whose files are in a folder."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # it is gone, or no process
            line = (entry / "cmdline").read_bytes().decode(errors="replace")
            if "\0serve\0" in line and f"{folder}/run" in line:
                found.append(int(entry.name))
    return found
