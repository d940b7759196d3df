"""A ledger that takes seconds: a tiny model, texts of random letters, and commands and clouds in this process."""

from __future__ import annotations

import json
import random
import sys
from contextlib import ExitStack, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, Self

import pytest
from support.cloud.clouds import Home, ThreadServer, served
from support.models.tiny import tiny_checkpoint

from isthmus.cli.main import main
from isthmus.experiments.leak.leak_settings import LeakSettings
from isthmus.experiments.leak.rows import recorded_run, row_run
from isthmus.privacy.recording.recorder import Recorder

_MIB = 1 << 20


def letters(folder: Path, n: int = 70) -> Path:
    """An E2E and an SST-2 of `n` texts each in either file, all different."""
    source = random.Random(0)  # noqa: S311  # texts, no secrets

    def word() -> str:
        return "".join(source.choices("abcdefghijklmnop", k=6))

    for name in ("e2e", "sst2"):
        (folder / name).mkdir(parents=True)
    for part in ("train", "test"):
        rows = "".join(f"{word()},{word()}\n" for _ in range(n))
        (folder / "e2e" / f"{part}.csv").write_text(f"mr,ref\n{rows}", encoding="utf-8")
        reviews = "".join(f"{word()}\t{number % 2}\n" for number in range(n))
        (folder / "sst2" / f"{part}.tsv").write_text(reviews, encoding="utf-8")
    return folder


def small_settings(folder: Path, **values: Any) -> LeakSettings:
    """Settings of a ledger in a folder, whose model and data are made where they are missing."""
    if not (folder / "model").exists():
        tiny_checkpoint("llama", folder / "model", num_hidden_layers=4)
        letters(folder / "data")
    defaults: dict[str, Any] = {
        "model": str(folder / "model"),
        "data_folder": folder / "data",
        "out": folder / "out",
        "texts": 8,
        "attacked": 4,
        "public": 32,
        "scored": 6,
        "max_length": 60,
        "batch": 2,
        "inverter_steps": 20,
        "threads": 1,
    }
    return LeakSettings(**{**defaults, **values})


def grid_file(path: Path, *rows: dict[str, Any]) -> Path:
    """A grid of these rows."""
    tables = ("".join(f"{name} = {json.dumps(value)}\n" for name, value in row.items()) for row in rows)
    path.write_text("".join(f"[[rows]]\n{table}" for table in tables))
    return path


class _CloudHere:
    """In the place of `LocalCloud`: a cloud in this process, with the options that the ledger gives."""

    def __init__(self, folder: Path, model: str, *options: str) -> None:
        given = dict(zip(options[::2], options[1::2], strict=True))
        recording = Path(given["--record"])
        recording.mkdir(parents=True)
        recorder = Recorder(recording, int(given["--record-mib"]) * _MIB)
        home = Home(folder / "cloud-here")
        cloud = served(Path(model), folder / "parts", plan=given["--edge-layers"])
        self._server = ThreadServer(cloud, home, recorder=recorder)
        self.connection_file, self.edge_key, self.home = folder / "connection", home.key_file, home.folder

    def __enter__(self) -> Self:
        self._server.__enter__()
        self.connection_file.write_text(self._server.address)
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.__exit__(None, None, None)


def _isthmus_here(*words: str) -> dict[str, Any]:
    """In the place of `run_isthmus`: the command in this process."""
    said = StringIO()
    with pytest.MonkeyPatch.context() as patch, ExitStack() as until_then:
        patch.setattr(sys, "argv", ["isthmus", *words, "--json"])
        until_then.enter_context(redirect_stdout(said))
        with pytest.raises(SystemExit) as end:
            main()
    assert not end.value.code, words
    result: dict[str, Any] = json.loads(said.getvalue())
    return result


def all_here(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Let rows be made in this process. Returns the commands, which grow as they come."""
    commands: list[tuple[str, ...]] = []

    def noted(*words: str) -> dict[str, Any]:
        commands.append(words)
        return _isthmus_here(*words)

    monkeypatch.setattr(recorded_run, "LocalCloud", _CloudHere)
    monkeypatch.setattr(recorded_run, "run_isthmus", noted)
    monkeypatch.setattr(row_run, "run_isthmus", noted)
    return commands
