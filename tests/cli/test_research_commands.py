"""The researcher's commands: what they print is JSON and nothing else, and what they refuse they refuse in words."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.models.small_tasks import task_folder
from support.models.tiny import tiny_checkpoint
from typer.testing import CliRunner

from isthmus.cli.research_commands import emulator_scores as app
from isthmus.common.errors import ConfigError
from isthmus.common.shutdown import INTERRUPTED
from isthmus.experiments.offsite import table_lab

RUNNER = CliRunner()


def arguments(folder: Path) -> list[str]:
    model, data = tiny_checkpoint("llama", folder / "model"), task_folder(folder / "data")
    return [
        *("--model", str(model), "--data-folder", str(data), "--tasks", "sst2", "--methods", "uniform"),
        *("--adapter-layers", "1:1", "--steps", "2", "--batch", "2", "--max-length", "96", "--test", "6"),
        *("--validation", "2", "--seeds", "1", "--learning-rates", "1e-3", "--whole-rates", "1e-3"),
        *("--adapter-rates", "1e-3", "--threads", "1", "--out", str(folder / "out"), "--json"),
    ]


def test_the_table_prints_json_alone_and_a_frontier_is_a_table_with_a_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = arguments(tmp_path)
    done = RUNNER.invoke(app, ["table", *given], catch_exceptions=False)
    result = json.loads(done.stdout)
    assert [row["metric"] for row in result["runs"]] == ["accuracy", "completion_loss"]
    assert str(tmp_path) not in json.dumps(result["settings"]["text"])
    monkeypatch.setattr(table_lab.Lab, "_train", None)  # nothing is trained again
    figure = tmp_path / "frontier.png"
    again = RUNNER.invoke(app, ["table", *given, "--no-whole-runs", "--figure", str(figure)], catch_exceptions=False)
    row = json.loads(again.stdout)["runs"][0]
    assert row["plug_in"] == result["runs"][0]["plug_in"]
    assert (row["full_fine_tuned"], row["lora_full"]) == (None, None)
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
        ("--learning-rates", "1e-3,fast", "list of positive numbers"),
        ("--keep", "half", "list of positive numbers"),
        ("--precision", "fp8", "use fp32 or bf16"),
        ("--methods", "uniform,,crash", "empty name"),
        ("--tasks", "e2e,e2e", "twice"),
    ],
)
def test_a_bad_flag_is_named(flag: str, value: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        RUNNER.invoke(app, ["table", flag, value], catch_exceptions=False)


def test_the_commands_load_no_torch() -> None:
    code = "import sys, isthmus.cli.research_commands; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
