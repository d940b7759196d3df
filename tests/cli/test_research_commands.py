"""The researcher's commands: what they print is JSON and nothing else, and what they refuse they refuse in words."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.models.small_tasks import task_folder, task_package
from support.models.tiny import tiny_checkpoint
from typer.testing import CliRunner

from isthmus.cli.research_commands import emulator_scores as app
from isthmus.common.errors import ConfigError
from isthmus.common.shutdown import INTERRUPTED
from isthmus.experiments.offsite import table_lab

RUNNER = CliRunner()


def arguments(folder: Path) -> list[str]:
    model, data = tiny_checkpoint("llama", folder / "model"), task_folder(folder / "data")
    package = task_package(folder / "near", model, data).folder
    return [
        *("--model", str(model), "--data-folder", str(data), "--tasks", "e2e", "--preset", str(package)),
        *("--adapter-layers", "1:3", "--split-layers", "1:1", "--batch", "2", "--max-length", "96", "--test", "6"),
        *("--validation", "2", "--seeds", "1", "--adapter-rates", "1e-3", "--whole-rates", "1e-3"),
        *("--public", "100", "--private", "10", "--text", str(data / "shakespeare" / "input.txt")),
        *("--text-length", "32", "--threads", "1", "--out", str(folder / "out"), "--json"),
    ]


def test_the_table_prints_json_alone_and_draws_without_training_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = arguments(tmp_path)
    done = RUNNER.invoke(app, ["table", *given], catch_exceptions=False)
    result = json.loads(done.stdout)
    assert [row["metric"] for row in result["runs"]] == ["completion_loss"]
    assert (result["settings"]["text"], result["settings"]["preset"]) == ("input.txt", ["near"])
    monkeypatch.setattr(table_lab.Lab, "_train", None)  # nothing is trained again
    figure = tmp_path / "table.png"
    again = RUNNER.invoke(app, ["table", *given, "--figure", str(figure)], catch_exceptions=False)
    assert json.loads(again.stdout)["runs"] == result["runs"]
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_command_ends_with_130_and_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(table_lab.Lab, "run", stop)
    done = RUNNER.invoke(app, ["table", *arguments(tmp_path)])
    assert done.exit_code == INTERRUPTED
    assert "repeat the command to go on" in done.stderr


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("--adapter-rates", "1e-3,fast", "list of positive numbers"),
        ("--whole-rates", "much", "list of positive numbers"),
        ("--precision", "fp8", "use fp32 or bf16"),
        ("--preset", "near", "no preset"),
        ("--tasks", "e2e,e2e", "twice"),
    ],
)
def test_a_bad_flag_is_named(flag: str, value: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        RUNNER.invoke(app, ["table", flag, value], catch_exceptions=False)


def test_the_commands_load_no_torch() -> None:
    code = "import sys, isthmus.cli.research_commands; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
