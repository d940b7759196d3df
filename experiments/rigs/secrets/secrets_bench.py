"""The parts of `isthmus bench secrets`, and what `--wipe-freed` costs."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch

from isthmus.backbone.checkpoints.sources import Checkpoint, resolve
from isthmus.edge.client.link import connect
from isthmus.edge.config.training_config import TrainConfig
from isthmus.edge.training.methods import build_peft
from isthmus.experiments.harness.launch import LocalCloud, stderr_progress
from isthmus.experiments.harness.rig_settings import SecretsSettings
from isthmus.experiments.harness.single_process import random_batch, stepper
from isthmus.experiments.rigs.secrets.looked_at import looked_at
from isthmus.experiments.rigs.secrets.machines import crashed_machines, restored_sealer
from isthmus.experiments.rigs.secrets.remains import look
from isthmus.experiments.rigs.secrets.restarts import Restarts

CONTROL_SESSIONS: Final = 1000
"""Of a broken build, at most: it has used a pair again after two."""
OPTIONS: Final = {"plain": (), "wiping": ("--wipe-freed",)}
"""What the two clouds are started with."""
WARM_UP: Final = 2
"""Pairs of steps that are not timed: caches fill in the first one, and each cloud has gone first once."""


def run_secrets(settings: SecretsSettings, folder: Path) -> dict[str, Any]:
    """Measure.

    Returns:
        `nonces`: see `nonces`. `clouds`: of a cloud without and one with `--wipe-freed`, what `look` says. `step`: the
        time of a training step with the option, over that without. `no_reuse`, `nothing_elsewhere`, `freed_wiped` and
        `controls_found` sum them up.
    """
    torch.set_num_threads(settings.threads)
    checkpoint = resolve(settings.model)
    with stderr_progress("crashes and clouds", settings.restarts + 4) as advance:
        found = nonces(settings, checkpoint, folder, advance)
        with ExitStack() as stack:
            shared = ("--edge-layers", settings.edge_layers, "--threads", str(settings.threads))
            clouds = {
                name: stack.enter_context(_cloud(folder / name, str(checkpoint.folder), *shared, *options))
                for name, options in OPTIONS.items()
            }
            looks = {}
            for name, cloud in clouds.items():
                with looked_at(cloud) as place:
                    looks[name] = look(place, settings.tokens)
                advance()
            ratio = _cost(settings, clouds)
            advance()
    return {
        "no_reuse": not found["processes"]["reuses"] and not found["machines"]["reuses"],
        "nothing_elsewhere": not any(each["elsewhere"] for each in looks.values()),
        "freed_wiped": not looks["wiping"]["after"],
        "controls_found": all(each["found"] for each in found["controls"])
        and all(each["held_found"] and each["controls_found"] for each in looks.values()),
        "nonces": found,
        "clouds": looks,
        "step": ratio,
        **asdict(settings),
    }


def nonces(
    settings: SecretsSettings, checkpoint: Checkpoint, folder: Path, advance: Callable[[], None]
) -> dict[str, Any]:
    """What was sealed over crashes.

    Returns:
        `processes` and `machines`: `records`, `keys` and `reuses`. `controls`: builds that must be found, with `reuses`
        and `found`. `own_source_constant`: what happens where the project's own random bytes are constant, and the
        library's are not; a cloud and an edge still have other keys each time.
    """
    restarts = Restarts(folder / "restarts", checkpoint, settings.edge_layers, settings.seed)
    processes = restarts.crash(settings.restarts, advance)
    broken = {"processes, all random bytes constant": restarts.broken()}
    machines = crashed_machines(folder / "good", settings.sessions, "good", settings.seed)
    count = min(settings.sessions, CONTROL_SESSIONS)
    broken["state machines, all random bytes constant"] = crashed_machines(
        folder / "all", count, "all_constant", settings.seed
    )
    broken["a session restored from a saved state"] = restored_sealer()
    advance()
    own = crashed_machines(folder / "own", count, "own_constant", settings.seed)
    controls = [{"build": name, **asdict(sealed), "found": sealed.reuses > 0} for name, sealed in broken.items()]
    return {
        "processes": processes,
        "machines": {"sessions": settings.sessions, **asdict(machines)},
        "own_source_constant": {"sessions": count, **asdict(own)},
        "controls": controls,
    }


def show(result: dict[str, Any]) -> None:
    """Print a result for people."""
    for name in ("processes", "machines", "own_source_constant"):
        row = result["nonces"][name]
        print(f"{name:20} {row['reuses']} reuses in {row['records']} records of {row['keys']} keys")
    for row in result["nonces"]["controls"]:
        print(f"{'control':20} {row['reuses']} reuses in {row['records']} records: {row['build']}")
    for name, cloud in result["clouds"].items():
        print(f"{name:20} memory: {cloud['during']} copies in sessions, {cloud['after']} after them")
        for place, found in cloud["places"].items():
            print(f"{'':20} {place}: {found['copies']} copies, {found['control_copies']} of {found['control']}")
    print(f"{'step':20} {result['step']['ratio']:.3f} with --wipe-freed, over that without")


def _cloud(folder: Path, model: str, *options: str) -> LocalCloud:
    folder.mkdir()
    return LocalCloud(folder, model, *options)


def _cost(settings: SecretsSettings, clouds: dict[str, LocalCloud]) -> dict[str, Any]:
    """The median of the steps' ratios, wiping over plain, of pairs in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in clouds}
    config = TrainConfig(cloud="-", data="-", method="lora")
    with ExitStack() as stack:
        steps: dict[str, Callable[[], float]] = {}
        for name, cloud in clouds.items():
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
