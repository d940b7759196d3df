"""`isthmus edge …`: each command has the flags that mean something for it, under headings."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.commands import in_process
from typer.testing import CliRunner

from isthmus.cli.main import app

WIDTH = 80


def help_of(*words: str) -> str:
    result = CliRunner().invoke(app, [*words, "--help"], terminal_width=WIDTH)
    assert result.exit_code == 0, result.output
    return result.output


def headings(text: str) -> list[str]:
    return [line[:-1] for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (("edge", "train"), ["Connection", "Data", "Adapter", "Sites", "Optimization", "Computation", "Output"]),
        (("edge", "eval"), ["Connection", "Data", "Adapter", "Computation"]),
        (("edge", "generate"), ["Connection", "Adapter"]),
        (("emulator", "tune"), ["Package", "Data", "Adapter", "Optimization", "Computation", "Output"]),
        (("emulator", "fetch"), ["Connection"]),
        (("emulator", "return"), ["Connection"]),
    ],
)
def test_help_is_in_groups_and_80_columns(words: tuple[str, ...], wanted: list[str]) -> None:
    text = help_of(*words)
    found = headings(text)
    assert [heading for heading in found if heading not in ("Arguments", "Options")] == wanted
    assert found.index("Options") < found.index(wanted[0])
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "Example: isthmus" in text


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        (
            ("edge", "eval", "--data", "d.jsonl"),
            ["--learning-rate", "--rank", "--out", "--sites", "--validation-split"],
        ),
        (("edge", "generate", "hello"), ["--data", "--batch", "--seed"]),
        (("emulator", "fetch", "--out", "x"), ["--codec", "--data"]),
        (("emulator", "return", "--adapter", "x"), ["--codec", "--max-fetch-gib"]),
    ],
)
def test_a_flag_of_another_command_is_refused_by_its_name(words: tuple[str, ...], flags: list[str]) -> None:
    for flag in flags:
        assert f"  {flag} " not in help_of(*words[:2])
        result = CliRunner().invoke(app, [*words, "--cloud", "cloud.txt", flag, "1"])
        assert result.exit_code == 2
        assert f"No such option: {flag}" in result.output


@pytest.mark.parametrize(
    ("command", "code"), [("edge train", 10), ("edge eval", 10), ("edge generate", 2), ("emulator tune", 10)]
)
def test_a_missing_setting_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str, code: int
) -> None:
    words = ["hello"] if command == "edge generate" else ["--data", tmp_path / "d.jsonl"]
    done = in_process(capsys, *command.split(), *words)
    missing = "package" if command == "emulator tune" else "cloud"
    assert f"'{missing}' is missing: give --{missing}" in done.stderr
    assert done.returncode == code
