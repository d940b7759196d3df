"""The command `isthmus bench cluster`: all cases, the adapters compared with a cloud's on one machine, and secrets."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Final

from rich.console import Console, RenderableType
from rich.table import Table

from isthmus.backbone.checkpoints.sources import resolve
from isthmus.common.errors import ConfigError, IsthmusError
from isthmus.experiments.harness.finished_cells import Cells
from isthmus.experiments.harness.launch import LocalCloud
from isthmus.experiments.harness.rig_settings import ClusterSettings
from isthmus.experiments.rigs.cluster.cases import CASES
from isthmus.experiments.rigs.cluster.cluster_canaries import SECRETS, SHAPE, nothing_secret, secrets_kept
from isthmus.experiments.rigs.cluster.cluster_world import Setting, world
from isthmus.experiments.rigs.cluster.edge_runs import EdgeRun, run_options
from isthmus.experiments.rigs.faults.faults import write_texts

CELLS: Final = "cells.jsonl"
BATCH: Final = 2
SPARE: Final = 1.5
"""How many times the steps that a usual run makes in a case's seconds: a step may be shorter than the usual one."""


def run_cluster(settings: ClusterSettings, folder: Path) -> dict[str, Any]:
    """Measure.

    Returns:
        `runs`: for each case `case`, `adapter_identical` (to that of a run over a cloud on one machine),
        `calls_failed` (which got no answer), `calls_repeated`, `recovery_s` (what the edge lost in all, see
        `Finished.lost_after`; of `two nodes`, where nothing breaks, how much steps vary; None where a call failed),
        `at_most_s` (what it may lose; None where nothing is promised), `longest_step_s`, `usual_step_s`,
        `processes_left` (of the cloud, after its own `stop`), `processes_serving` (before it), and figures of the
        case.
        `secrets`: see `look_for`. `identical`, `none_failed`, `none_left`, `in_time` and `nothing_secret` sum them up.

    Raises:
        ConfigError: this machine cannot make namespaces, or there is no such case.
        IsthmusError: a cloud does not start or come back, or what a case is about did not happen.
    """
    wanted = [name.strip() for name in settings.cases.split(",")] if settings.cases else [*CASES, SECRETS]
    if unknown := [name for name in wanted if name not in (*CASES, SECRETS)]:
        raise ConfigError(f"there is no case {unknown[0]!r}: choose among {', '.join((*CASES, SECRETS))}")
    setting = _setting(settings, folder)
    cells = Cells(folder / CELLS, Console(stderr=True))
    cells.expect(len(wanted) + 1 + any(CASES[name].seconds for name in wanted if name != SECRETS))
    about = {name: value for name, value in asdict(settings).items() if name != "cases"}

    @cache
    def reference(steps: int) -> dict[str, Any]:
        make = partial(_reference, replace(setting, steps=steps), folder)
        return cells.get("one machine", {**about, "run_steps": steps}, make)

    usual = reference(settings.steps)
    runs = []
    for name in (each for each in wanted if each != SECRETS):
        steps = max(settings.steps, settings.at + math.ceil(SPARE * CASES[name].seconds / usual["step_s"]))
        make = partial(_case, name, replace(setting, steps=steps), folder, reference(steps)["adapter"])
        runs.append({"case": name, **cells.get(name, {**about, "run_steps": steps}, make)})
    secrets = cells.get(SECRETS, about, partial(_secrets, setting, folder)) if SECRETS in wanted else None
    return {"runs": runs, "secrets": secrets, **summed_up(runs, secrets), **asdict(settings)}


def summed_up(runs: Sequence[Mapping[str, Any]], secrets: Mapping[str, Any] | None) -> dict[str, bool]:
    """Whether all is well: in the runs of all cases, and with the secrets, where these were looked for."""
    lost = [(run["recovery_s"], run["at_most_s"]) for run in runs]
    return {
        "identical": all(run["adapter_identical"] for run in runs),
        "none_failed": not any(run["calls_failed"] for run in runs),
        # A count that sees no process while the cloud serves sees none that is left either.
        "none_left": all(run["processes_left"] == 0 and run["processes_serving"] > 0 for run in runs),
        "in_time": all(most is None or (lost is not None and lost <= most) for lost, most in lost),
        "nothing_secret": secrets is None or nothing_secret(secrets),
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
    if done.failure:
        raise IsthmusError(f"the edge of a cloud on one machine failed: {done.failure}")
    return {"adapter": done.adapter, "step_s": done.usual}


def _case(name: str, setting: Setting, folder: Path, adapter: str) -> dict[str, Any]:
    place, case = _place(folder, name), CASES[name]
    with world(setting, place, case.shape) as made:
        happened = case.happens(made)
        left = made.cloud.processes_left() + made.left
        serving = made.cloud.processes_serving
    shutil.rmtree(place, ignore_errors=True)
    runs = happened.runs
    failures = [run.failure for run in runs if run.failure]
    return {
        "adapter_identical": all(run.adapter == adapter for run in runs),
        "calls_failed": len(failures),  # the first call without an answer ends a run
        "failures": failures,
        "calls_repeated": sum(run.repeated for run in runs),
        "recovery_s": None if failures else round(max(run.lost_after(setting.at) for run in runs), 2),
        "at_most_s": case.at_most,
        "longest_step_s": round(max(max(run.seconds) for run in runs), 3),
        "usual_step_s": round(max(run.usual for run in runs), 3),
        "processes_left": left,
        "processes_serving": serving,
        "steps": setting.steps,
        **happened.more,
    }


def _secrets(setting: Setting, folder: Path) -> dict[str, Any]:
    place = _place(folder, SECRETS)
    with world(setting, place, SHAPE) as made:
        looked = secrets_kept(made)
    shutil.rmtree(place, ignore_errors=True)
    return looked


def _place(folder: Path, name: str) -> Path:
    """A new folder for a case; paths of Ray's sockets have to be short."""
    place = folder / f"c{[*CASES, SECRETS].index(name)}"
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
        lost = "does not go on" if run["recovery_s"] is None else f"{run['recovery_s']:.1f} s"
        table.add_row(run["case"], same, str(run["calls_repeated"]), lost, str(run["processes_left"]))
    secrets = result["secrets"]
    if secrets is not None:
        places = ", ".join(secrets["found_in"]) or "nowhere"
        controls = "found" if all(secrets["controls"].values()) else "NOT FOUND"
        dropped = secrets["packets_dropped"]
        table.caption = (
            f"{secrets['canaries']} canaries found: {places}; controls {controls}; {dropped} packets not captured"
        )
    return table
