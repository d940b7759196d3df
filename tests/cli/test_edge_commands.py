"""`isthmus edge …`: each command has the flags that mean something for it, under headings."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.commands import in_process, refused
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
        (("edge", "train"), "Connection Data Adapter Sites Optimization Computation Draft Privacy Audit Output"),
        (("edge", "eval"), "Connection Data Adapter Computation Privacy"),
        (("edge", "audit"), "Connection Audit"),
        (("edge", "generate"), "Connection Adapter Generation"),
        (("emulator", "tune"), "Package Data Adapter Optimization Computation Privacy Output"),
        (("emulator", "fetch"), "Connection"),
        (("emulator", "return"), "Connection"),
    ],
)
def test_help_is_in_groups_and_80_columns(words: tuple[str, ...], wanted: str) -> None:
    text = help_of(*words)
    found = headings(text)
    groups = [heading for heading in found if heading not in ("Arguments", "Options")]
    assert groups == wanted.split()
    assert found.index("Options") < found.index(groups[0])
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "Example: isthmus" in text


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        (
            ("edge", "eval", "--data", "d.jsonl"),
            ["--learning-rate", "--rank", "--out", "--sites", "--validation-split"],
        ),
        (("edge", "generate", "hello"), ["--data", "--rank", "--learning-rate"]),
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


@pytest.mark.parametrize("command", ["edge train", "edge eval", "edge generate", "emulator tune"])
def test_a_missing_setting_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str) -> None:
    (tmp_path / "d.jsonl").touch()
    words = ["hello"] if command == "edge generate" else ["--data", tmp_path / "d.jsonl"]
    done = in_process(capsys, *command.split(), *words)
    missing = "package" if command == "emulator tune" else "cloud"
    assert f"'{missing}' is missing: give --{missing}" in done.stderr
    assert done.returncode == 2


@pytest.mark.parametrize("words", [(), ("--cloud", f"isthmus://nowhere:1#SHA256:{'A' * 43}")])
def test_a_file_of_texts_that_is_not_there_is_named_before_the_cloud(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, words: tuple[str, ...]
) -> None:
    (tmp_path / "d.jsonl").touch()
    train = ("edge", "train", *words, "--out", tmp_path / "run", "--data")
    refused(in_process(capsys, *train, "missing.jsonl"), 11, "data = 'missing.jsonl' is no file here")
    refused(in_process(capsys, *train, tmp_path / "d.jsonl", "--validation", "no.csv"), 11, "validation = 'no.csv'")
    evaluate = in_process(capsys, "edge", "eval", *words, "--data", "missing.jsonl")
    refused(evaluate, 11, "data = 'missing.jsonl' is no file here")
    (tmp_path / "run.toml").write_text('data = "missing.jsonl"\n')
    if words:
        refused(in_process(capsys, "edge", "eval", *words, "--config", tmp_path / "run.toml"), 11, "missing.jsonl")
    else:  # what a hub has is no file
        done = in_process(capsys, *train, "hub:somebody/texts")
        assert (done.returncode, "'cloud' is missing" in done.stderr) == (2, True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "give a PROMPT to continue, --chat for a conversation, or --batch FILE"),
        (("--chat", "--json"), "--json prints one answer"),
        (("hello", "--out", "x"), "--out is for the answers to --batch FILE"),
        (("hello", "--batch", "x"), "leave out PROMPT, --chat and --json"),
        (("--chat", "--batch", "x"), "leave out PROMPT, --chat and --json"),
        (("--json", "--batch", "x"), "leave out PROMPT, --chat and --json"),
    ],
)
def test_uses_of_generate_that_do_not_go_together(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    done = in_process(capsys, "edge", "generate", "--cloud", "cloud.txt", *words)
    assert done.returncode == 2
    assert [said in line for line in done.stderr.splitlines() if line][-1:] == [True]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--temperature", "-1"), "temperature = -1.0"),
        (("--top-p", "0"), "top_p = 0.0"),
        (("--exact", "--no-cache"), "exact = true needs the cache"),
        (("--leased", "some"), "leased = 'some'"),
        (("--batch-size", "0"), "batch_size = 0"),
    ],
)
def test_settings_of_generate_that_make_no_sense(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    refused(in_process(capsys, "edge", "generate", "hello", "--cloud", "cloud.txt", *words), 10, said)
    done = in_process(capsys, "edge", "generate", "hello", "--cloud", "cloud.txt", "--seed", "1", "--leased", "all")
    assert "cloud = 'cloud.txt' is neither a connection string" in done.stderr


def test_a_bad_line_of_a_batch_is_named_before_the_cloud_is_asked(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "texts.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    words = (
        "edge",
        "generate",
        "--cloud",
        f"isthmus://nowhere:1#SHA256:{'A' * 43}",
        "--batch",
        tmp_path / "texts.jsonl",
    )
    refused(in_process(capsys, *words), 11, "texts.jsonl, line 2", "'prompt' (text) or 'messages'")
    (tmp_path / "texts.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "answers").write_text("something else\n")
    refused(in_process(capsys, *words, "--out", tmp_path / "answers"), 10, "answers, line 1", "give another --out")
