"""The command `isthmus bench cluster`: all cases, the adapters compared with a cloud's on one machine, and secrets."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Final

from rich.console import Console, RenderableType
from rich.table import Table

from isthmus.backbone.checkpoints.sources import resolve
from isthmus.common.errors import ConfigError
from isthmus.experiments.harness.finished_cells import Cells
from isthmus.experiments.harness.launch import LocalCloud
from isthmus.experiments.harness.rig_settings import ClusterSettings
from isthmus.experiments.rigs.cluster.cases import CASES, Setting, processes_left, world
from isthmus.experiments.rigs.cluster.cluster_canaries import WATCHED, secrets_kept
from isthmus.experiments.rigs.cluster.edge_runs import EdgeRun, run_options
from isthmus.experiments.rigs.faults.faults import write_texts

CELLS: Final = "cells.jsonl"
BATCH: Final = 2


def run_cluster(settings: ClusterSettings, folder: Path) -> dict[str, Any]:
    """Measure.

    Returns:
        `runs`: for each case `case`, `adapter_identical` (to that of a run over a cloud on one machine),
        `calls_failed` (which got no answer), `calls_repeated`, `recovery_s`, `processes_left`, and figures of the case.
        `secrets`: see `Looked`. `identical`, `none_failed`, `none_left` and `nothing_secret` sum them up.

    Raises:
        ConfigError: this machine cannot make namespaces, or there is no such case.
        IsthmusError: a cloud does not start, or an edge got no answer.
    """
    wanted = [name.strip() for name in settings.cases.split(",")] if settings.cases else [*CASES, WATCHED]
    if unknown := [name for name in wanted if name not in (*CASES, WATCHED)]:
        raise ConfigError(f"there is no case {unknown[0]!r}: choose among {', '.join((*CASES, WATCHED))}")
    setting = _setting(settings, folder)
    cells = Cells(folder / CELLS, Console(stderr=True))
    cells.expect(len(wanted) + 1)
    about = {name: value for name, value in asdict(settings).items() if name != "cases"}
    reference = cells.get("one machine", about, partial(_reference, setting, folder))
    runs = [
        {"case": name, **cells.get(name, about, partial(_case, name, setting, folder, reference))}
        for name in wanted
        if name != WATCHED
    ]
    secrets = cells.get(WATCHED, about, partial(_secrets, setting, folder)) if WATCHED in wanted else None
    return {
        "runs": runs,
        "secrets": secrets,
        "identical": all(run["adapter_identical"] for run in runs),
        "none_failed": not any(run["calls_failed"] for run in runs),
        "none_left": not any(run["processes_left"] for run in runs),
        "nothing_secret": secrets is None or (not secrets["found"] and all(secrets["controls"].values())),
        **asdict(settings),
    }


def _setting(settings: ClusterSettings, folder: Path) -> Setting:
    """The settings of all cases, with a copy of the model that can be hidden from one of the machines."""
    checkpoint = resolve(settings.model)
    model = folder / "models" / checkpoint.name
    if not model.exists():
        shutil.copytree(checkpoint.folder, model, copy_function=_linked)
    data = folder / "texts.jsonl"
    write_texts(data, BATCH * settings.steps)
    return Setting(model, data, settings.edge_layers, settings.steps, settings.at, settings.threads)


def _linked(source: str, target: str) -> None:
    """A hard link of a file where that is possible, and else a copy."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copy2(source, target)


def _reference(setting: Setting, folder: Path) -> dict[str, Any]:
    """The same run over a cloud on one machine."""
    place = folder / "one-machine"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    options = ("--edge-layers", setting.layers, "--threads", str(setting.threads))
    with LocalCloud(place, str(setting.model), *options) as cloud:
        about = run_options(cloud.connection, cloud.edge_key, setting.data, setting.steps, setting.threads)
        with EdgeRun(None, os.environ, place / "run", about) as run:
            done = run.finish()
    return {"adapter": done.adapter, "step_s": done.usual}


def _case(name: str, setting: Setting, folder: Path, reference: Mapping[str, Any]) -> dict[str, Any]:
    place = _place(folder, name)
    with world(setting, place, name) as made:
        happened = CASES[name](made)
    run = happened.run
    left = processes_left(place)
    shutil.rmtree(place, ignore_errors=True)
    return {
        "adapter_identical": run.adapter == reference["adapter"],
        "calls_failed": int(bool(run.failure)),  # the first call without an answer ends a run
        "failure": run.failure,
        "calls_repeated": run.repeated,
        "recovery_s": round(happened.recovery, 2),
        "processes_left": left,
        "step_s": round(run.usual, 3),
        **happened.more,
    }


def _secrets(setting: Setting, folder: Path) -> dict[str, Any]:
    place = _place(folder, WATCHED)
    with world(setting, place, WATCHED) as made:
        looked = secrets_kept(made)
    shutil.rmtree(place, ignore_errors=True)
    return looked


def _place(folder: Path, name: str) -> Path:
    """A new folder for a case; paths of Ray's sockets have to be short."""
    place = folder / f"c{[*CASES, WATCHED].index(name)}"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    return place


def show(result: Mapping[str, Any]) -> RenderableType:
    """A table for people."""
    table = Table(box=None, pad_edge=False)
    for name in ("case", "adapter", "repeated", "lost", "left"):
        table.add_column(name, justify="left" if name == "case" else "right")
    for run in result["runs"]:
        same = "identical" if run["adapter_identical"] else "DIFFERS"
        lost = f"{run['recovery_s']:.1f} s"
        table.add_row(run["case"], same, str(run["calls_repeated"]), lost, str(run["processes_left"]))
    secrets = result["secrets"]
    if secrets is not None:
        places = ", ".join(secrets["found"]) or "nowhere"
        controls = all(secrets["controls"].values())
        table.caption = (
            f"{secrets['canaries']} canaries found: {places}; controls {'found' if controls else 'NOT FOUND'}"
        )
    return table
