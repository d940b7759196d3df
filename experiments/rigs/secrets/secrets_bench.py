"""The parts of `isthmus bench secrets`, and what `--wipe-freed` costs."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from isthmus.backbone.checkpoints.sources import resolve
from isthmus.common.torch_threads import set_torch_threads
from isthmus.edge.client.link import connect
from isthmus.edge.config.training_config import TrainConfig
from isthmus.edge.training.methods import build_peft
from isthmus.experiments.harness.finished_cells import Cells
from isthmus.experiments.harness.launch import LocalCloud, stderr_progress
from isthmus.experiments.harness.rig_settings import SecretsSettings
from isthmus.experiments.harness.single_process import random_batch, stepper
from isthmus.experiments.rigs.secrets.looked_at import looked_at, own_surroundings
from isthmus.experiments.rigs.secrets.machines import crashed_machines, restored_sealer
from isthmus.experiments.rigs.secrets.nonce_log import Sealed
from isthmus.experiments.rigs.secrets.remains import look
from isthmus.experiments.rigs.secrets.restarts import Restarts

CELLS: Final = "cells.jsonl"
CONTROL_SESSIONS: Final = 1000
"""Of a broken build, at most: it has used a pair again after two."""
OPTIONS: Final = {"plain": (), "wiping": ("--wipe-freed",)}
"""What the two clouds are started with."""
WARM_UP: Final = 2
"""Pairs of steps that are not timed: caches fill in the first one, and each cloud has gone first once."""


def run_secrets(settings: SecretsSettings, folder: Path) -> dict[str, Any]:
    """Measure.

    Returns:
        `nonces`: see `Parts.processes` and `Parts.machines`. `clouds`: of a cloud without and one with `--wipe-freed`,
        what `look` says. `step`: the time of a training step with the option, over that without. `no_reuse`,
        `nothing_elsewhere`, `freed_wiped` (see there) and `controls_found` sum them up.
    """
    set_torch_threads(settings.threads)
    cells, parts = Cells(folder / CELLS, Console(stderr=True)), Parts(settings, folder)
    cells.expect(3 + len(OPTIONS))

    def cell(name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        return cells.get(name, asdict(settings), make)

    processes, machines = cell("processes", parts.processes), cell("machines", parts.machines)
    looks = {name: cell(f"cloud {name}", partial(parts.cloud, name)) for name in OPTIONS}
    step = cell("step", parts.step)
    controls = [*processes["controls"], *machines["controls"]]
    return {
        "no_reuse": not processes["reuses"] and not machines["reuses"],
        "nothing_elsewhere": not any(each["elsewhere"] for each in looks.values()),
        "freed_wiped": freed_wiped(**looks),
        "controls_found": all(each["found"] for each in controls)
        and all(each["held_found"] and each["controls_found"] for each in looks.values()),
        "nonces": {"processes": processes, "machines": machines},
        "clouds": looks,
        "step": step,
        **asdict(settings),
    }


def freed_wiped(plain: Mapping[str, Any], wiping: Mapping[str, Any]) -> bool | None:
    """Whether the worker that wipes has no copy left, neither at once after the sessions nor later.

    Args:
        plain, wiping: What `look` says of a cloud without and one with `--wipe-freed`.

    Returns:
        None where nothing is shown, as the worker that does not wipe had no copy left at once either.
    """
    return not wiping["at_once"] and not wiping["after"] if plain["at_once"] else None


class Parts:
    """The parts of the measurement, each by itself.

    Args:
        settings: The measurement's.
        folder: For keys, logs and clouds.
    """

    def __init__(self, settings: SecretsSettings, folder: Path) -> None:
        self._settings, self._folder = settings, folder
        self._checkpoint = resolve(settings.model)

    def processes(self) -> dict[str, Any]:
        """What real processes have sealed over crashes.

        Returns:
            `records`, `keys` and `reuses`, who was killed where, and `controls`: builds whose reuses must be `found`.
        """
        settings = self._settings
        restarts = Restarts(self._new("restarts"), self._checkpoint, settings.edge_layers, settings.seed)
        with stderr_progress("crashes", settings.restarts) as advance:
            found = restarts.crash(settings.restarts, advance)
        return {**found, "controls": [_control("processes, all random bytes constant", restarts.broken())]}

    def machines(self) -> dict[str, Any]:
        """What the state machines have sealed over crashes.

        Returns:
            As `processes`, and `own_source_constant`: what happens where the project's own random bytes are constant,
            and the library's are not; a cloud and an edge still have other keys each time.
        """
        settings, folder = self._settings, self._new("machines")
        folder.mkdir()
        count = min(settings.sessions, CONTROL_SESSIONS)
        with stderr_progress("sessions", settings.sessions) as advance:
            found = crashed_machines(folder / "good", settings.sessions, "good", settings.seed, advance)
        broken = crashed_machines(folder / "all", count, "all_constant", settings.seed)
        own = crashed_machines(folder / "own", count, "own_constant", settings.seed)
        return {
            "sessions": settings.sessions,
            **asdict(found),
            "controls": [
                _control("state machines, all random bytes constant", broken),
                _control("a session restored from a saved state", restored_sealer()),
            ],
            "own_source_constant": {"sessions": count, **asdict(own)},
        }

    def cloud(self, name: str) -> dict[str, Any]:
        """What is found in and around a cloud with the options of a name; see `look`."""
        folder = self._new(name)
        with (
            own_surroundings(folder) as around,
            self._serving(name, folder / "c") as cloud,
            looked_at(cloud, around) as place,
        ):
            return look(place, self._settings.tokens)

    def step(self) -> dict[str, Any]:
        """The median of the steps' ratios, wiping over plain, of pairs in turns; `ratios`, and `seconds` by cloud."""
        settings, config = self._settings, TrainConfig(cloud="-", data="-", method="lora")
        seconds: dict[str, list[float]] = {name: [] for name in OPTIONS}
        with ExitStack() as stack:
            steps: dict[str, Callable[[], float]] = {}
            for name in OPTIONS:
                cloud = stack.enter_context(self._serving(name, self._new(name)))
                link = stack.enter_context(connect(cloud.connection, key=cloud.edge_key))
                model = build_peft(link.load_model(), config, layers=link.plan.edge_layers)
                steps[name] = stepper(model, random_batch(model.config.vocab_size, settings.batch, settings.seq))
            for pair in range(WARM_UP + settings.steps):
                for name in (list(steps), list(reversed(steps)))[pair % 2]:
                    taken = steps[name]()
                    if pair >= WARM_UP:
                        seconds[name].append(taken)
        ratios = [wiping / plain for plain, wiping in zip(seconds["plain"], seconds["wiping"], strict=True)]
        return {"ratio": statistics.median(ratios), "ratios": ratios, "seconds": seconds}

    def _serving(self, name: str, folder: Path) -> LocalCloud:
        settings = self._settings
        folder.mkdir()
        shared = ("--edge-layers", settings.edge_layers, "--threads", str(settings.threads))
        return LocalCloud(folder, str(self._checkpoint.folder), *shared, *OPTIONS[name])

    def _new(self, name: str) -> Path:
        """A folder that is not there, also after an interrupted run."""
        folder = self._folder / name
        shutil.rmtree(folder, ignore_errors=True)
        return folder


def _control(build: str, sealed: Sealed) -> dict[str, Any]:
    return {"build": build, **asdict(sealed), "found": sealed.reuses > 0}


def show(result: dict[str, Any]) -> None:
    """Print a result for people."""
    nonces = result["nonces"]
    for name, row in (*nonces.items(), ("own source constant", nonces["machines"]["own_source_constant"])):
        print(f"{name:20} {row['reuses']} reuses in {row['records']} records of {row['keys']} keys")
    for row in (control for part in nonces.values() for control in part["controls"]):
        print(f"{'control':20} {row['reuses']} reuses in {row['records']} records: {row['build']}")
    for name, cloud in result["clouds"].items():
        copies = f"{cloud['during']} copies in sessions, {cloud['at_once']} at their end, {cloud['after']} later"
        print(f"{name:20} memory: {copies}")
        for place, found in cloud["places"].items():
            own = f", {found['control_copies']} of {found['control']}" if found["control"] else ""
            forms = found["forms"]
            planted = f", {sum(map(bool, forms.values()))} of {len(forms)} planted forms" if forms else ""
            print(f"{'':20} {place}: {found['copies']} copies{own}{planted}")
    wiped = {True: "nothing is left", False: "something is left", None: "nothing shown, as nothing is without it"}
    print(f"{'--wipe-freed':20} {wiped[result['freed_wiped']]}")
    print(f"{'step':20} {result['step']['ratio']:.3f} with --wipe-freed, over that without")
