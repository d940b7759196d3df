"""The ledger of leaks: each row of a grid trained over a real cloud that records, attacked, and scored on its task.

A finished row is a file in the folder of `--out`, with all that it was made of, and is not made again. An unfinished
row is a folder there, with its run and the results so far.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from isthmus.backbone.checkpoints.sources import Checkpoint, check_name, load_tokenizer, resolve
from isthmus.backbone.runtime.numerics import processor_name
from isthmus.common.errors import AttackLimitedError, CheckpointError, DataError
from isthmus.common.figures import plotting
from isthmus.common.files import disk_errors, locked, remove_folder, write_atomic
from isthmus.common.torch_threads import torch_threads
from isthmus.emulator.package.package import open_package
from isthmus.experiments.leak.grid import Row, file_names, read_grid
from isthmus.experiments.leak.leak_settings import LeakSettings
from isthmus.experiments.leak.ledger_json import ledger
from isthmus.experiments.leak.page.leak_page import write_page
from isthmus.experiments.leak.rows.row_run import RowLab

_ROWS = ("grid", "row", "edge_layers", "codec", "defence", "mode", "package", "data", "steps", "quick")
_PLACES = ("data_folder", "out", "page", "record_mib")
_WHERE = (*_ROWS, *_PLACES)
"""Settings that say which rows are made or where, and not what comes of a row."""
_RESULT = {
    "seconds": float | int, "runs": list, "task": dict, "task_without_defence": dict | None, "task_zero_shot": dict,
    "step_seconds": list,
}  # fmt: skip
"""What a row's file holds beside its settings, as `RowLab.make` says."""


QUICK = {"texts": 16, "attacked": 4, "public": 400, "scored": 8, "steps": 10, "inverter_steps": 60}
QUICK_MINUTES = 2
"""Of a quick row with SmolLM2-135M behind 2:2, on two cores that nobody else uses."""


def quick_settings(settings: LeakSettings) -> LeakSettings:
    """The settings of a quick look: smaller where they are the defaults, with one row where nothing names others."""
    plain = LeakSettings()
    values: dict[str, Any] = {
        name: value for name, value in QUICK.items() if getattr(settings, name) == getattr(plain, name)
    }
    if all(getattr(settings, name) is None for name in _ROWS if name not in ("steps", "quick")):
        values["edge_layers"] = "2:2"
    return replace(settings, **values)


def run_leak(settings: LeakSettings, console: Console | None = None) -> dict[str, Any]:
    """Make the rows that are not finished, and put the ledger together.

    Returns:
        What `ledger_json.ledger` says.

    Raises:
        ConfigError: The grid or a setting makes no sense.
        PlanError: A row's plan does not fit the model.
        CheckpointError: A finished row's file is damaged, or was made with other settings; or what is stored of an
            unfinished one, or of the base model, is damaged.
        DataError: There are too few texts, or a row's recording is not whole; the rows before it are finished.
        DiskError: The folder cannot be written.
        OwnershipError: An unfinished row's folder is another user's.
        AttackLimitedError: An undefended row was limited by its attack's lists; the other rows are finished.
        IsthmusError: What cloud and edge raise.
    """
    console = console or Console(stderr=True)
    if settings.page is not None:
        plotting()  # matplotlib is missed now, and not after hours
    if settings.quick:
        settings = quick_settings(settings)
    rows = read_grid(settings)
    check_name(settings.model)
    if settings.quick:
        console.print(
            f"A quick look at {len(rows)} row(s), {settings.attacked} texts and two attacks: about "
            f"{QUICK_MINUTES * len(rows)} minutes on two free cores with smollm2-135m and its own numbers. "
            "Its intervals are wide.",
            highlight=False,
            soft_wrap=True,
        )
    checkpoint = resolve(settings.model)
    for row in rows:
        row.plan(checkpoint.config.num_hidden_layers)
    with disk_errors(settings.out):
        settings.out.mkdir(parents=True, exist_ok=True)
    paths = [settings.out / name for name in file_names(rows)]
    about = [_about(row, settings, checkpoint) for row in rows]
    finished = [_read(path, each) for path, each in zip(paths, about, strict=True)]
    lab = RowLab(checkpoint, load_tokenizer(checkpoint.folder), settings)
    limited: list[AttackLimitedError] = []
    with torch_threads(settings.threads):
        for number, (row, path) in enumerate(zip(rows, paths, strict=True)):
            unfinished = _checkpoint_folder(path, about[number])
            if finished[number] is not None and not unfinished.exists():
                continue

            started = time.monotonic()

            def say(what: str, number: int = number, row: Row = row, started: float = started) -> None:
                after = f"{time.monotonic() - started:.0f} s"
                console.print(
                    f"[{number + 1}/{len(rows)}] {row.name}, {after}: {what}",
                    markup=False,
                    highlight=False,
                    soft_wrap=True,
                )

            with locked(path):  # another process may make the same row
                finished[number] = _read(path, about[number])
                try:
                    if finished[number] is None:
                        made = {"settings": about[number], **lab.make(row, unfinished, say)}
                        write_atomic(path, f"{json.dumps(made)}\n".encode())
                        finished[number] = made
                        say("finished")
                except DataError:
                    _remove(unfinished)  # its recording is of no use: the remedy is another run
                    raise
                except AttackLimitedError as error:
                    say(str(error))
                    limited.append(error)  # the remedy is other settings, so the run is of no use either
                _remove(unfinished)
    if limited:
        raise limited[0]
    result = ledger([each for each in finished if each is not None], _circumstances(settings, checkpoint))
    if settings.page is not None:
        write_page(result, settings.page)
    return result


def _checkpoint_folder(path: Path, about: Mapping[str, Any]) -> Path:
    """Where an unfinished row is kept: other settings have another folder."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    return path.with_name(f"{path.stem}-{digest[:8]}.unfinished")


def _remove(folder: Path) -> None:
    if folder.exists():
        remove_folder(folder)


def _about(row: Row, settings: LeakSettings, checkpoint: Checkpoint) -> dict[str, Any]:
    """All that a row's result depends on, as JSON has it."""
    shared = {name: value for name, value in dataclasses.asdict(settings).items() if name not in _WHERE}
    if settings.quick:
        shared["quick"] = True  # some attacks are left out
    own = row.model_dump(mode="json")
    if row.package is not None:
        own["package"] = open_package(row.package).id  # the path says nothing of it
    about = {**shared, "model": checkpoint.digest(), "row": own}
    plain: dict[str, Any] = json.loads(json.dumps(about))
    return plain


def _circumstances(settings: LeakSettings, checkpoint: Checkpoint) -> dict[str, Any]:
    shared = {name: value for name, value in dataclasses.asdict(settings).items() if name not in _WHERE}
    return {
        "model": checkpoint.name,
        "sequences": settings.attacked,
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": settings.threads,
        "settings": shared | {"model": checkpoint.name},
    }


def _read(path: Path, about: Mapping[str, Any]) -> dict[str, Any] | None:
    """A finished row; None where there is none yet."""
    if not path.exists():
        return None
    try:
        made = json.loads(path.read_bytes())
        settings = made["settings"]
        for name, kind in _RESULT.items():
            if not isinstance(made[name], kind):
                raise TypeError(name)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is no finished row of a ledger: remove it, and the row is made again") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): remove it, or give another --out") from error
    if settings != about:
        other = _first_other(settings, about)
        raise CheckpointError(
            f"{path} was made with another {other}: remove it, or give another --out, and the row is made again"
        )
    return dict(made)


def _first_other(settings: Any, about: Mapping[str, Any]) -> str:
    if not isinstance(settings, Mapping):
        return "form"
    names: Sequence[str] = sorted({*settings, *about})
    name = next(name for name in names if settings.get(name) != about.get(name))
    if name == "row" and isinstance(settings.get("row"), Mapping):
        return _first_other(settings["row"], about["row"])
    return name
