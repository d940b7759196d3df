"""The uses of `isthmus edge generate`: one answer, a conversation, and a file of texts, whatever cuts it off."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.cloud.clouds import ThreadServer
from support.commands import in_process, refused
from support.models.tiny import CHAT_TEMPLATE
from support.models.writing_model import LONGEST

from isthmus.cloud.decoding.cache_pool import CachePool
from isthmus.common.errors import ConfigError, DataError
from isthmus.common.progress import StepProgress
from isthmus.edge.generation.batch_file import Answers, BatchText, read_texts
from isthmus.edge.generation.generation_run import answer_all, converse
from isthmus.edge.generation.text_generator import TextGenerator

from .conftest import Opener

NEW = 12
Said = pytest.CaptureFixture[str]


def edge(server: ThreadServer, *words: object) -> tuple[object, ...]:
    own = ("--cloud", server.address, "--key", server.home.key_file, "--max-new-tokens", NEW)
    return ("edge", "generate", *own, *words)


def test_one_answer(capsys: Said, server: ThreadServer, generator: TextGenerator) -> None:
    done = in_process(capsys, *edge(server, "Once"))
    assert done.returncode == 0, done.stderr
    (ids,) = generator.generate([generator.ids("Once", templated=False)])
    assert done.stdout == generator.text(ids) + "\n"
    result = json.loads(in_process(capsys, *edge(server, "Once", "--json")).stdout)
    assert list(result) == ["text", "bytes_up", "bytes_down", "tokens", "seconds", "tokens_per_s"]
    assert (result["text"] + "\n", result["tokens"]) == (done.stdout, NEW)
    assert result["tokens_per_s"] == NEW / result["seconds"]
    chat = json.loads(in_process(capsys, *edge(server, "Once", "--chat", "--json")).stdout)
    prompt = generator.ids("<s>user\nOnce</s>\n<s>assistant\n", templated=True)
    assert chat["text"] == generator.text(generator.generate([prompt])[0]) != result["text"]


def test_a_model_without_a_chat_template_says_so(generator: TextGenerator, tmp_path: Path) -> None:
    generator.tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="has no chat template: leave out"):
        converse(generator, io.StringIO())
    with pytest.raises(DataError, match=r"line 1: .*has no chat template"):
        answer_all(generator, texts_of(tmp_path, {"messages": [{"role": "user", "content": "a"}]}), None, io.StringIO())
    generator.tokenizer.chat_template = CHAT_TEMPLATE
    answer_all(generator, texts_of(tmp_path, {"messages": [{"role": "user", "content": "a"}]}), None, io.StringIO())


# A conversation -------------------------------------------------------------------------------------------------------


class Typing(io.StringIO):
    """Standard input, where a line `^C` is Ctrl-C."""

    def readline(self, *limits: Any) -> str:  # type: ignore[override]
        line = super().readline(*limits)
        if line == "^C\n":
            raise KeyboardInterrupt
        return line


def test_lines_are_turns_and_ctrl_c_at_the_prompt_says_how_to_leave(
    generator: TextGenerator, monkeypatch: pytest.MonkeyPatch, capsys: Said, sent: list[int]
) -> None:
    answers = []
    for typed in ("hi\n\nagain\n", "hi\n^C\nagain\n", "again\n"):
        monkeypatch.setattr(sys, "stdin", Typing(typed))
        out = io.StringIO()
        converse(generator, out)
        answers.append(out.getvalue().splitlines())
        assert ("Ctrl-D ends the conversation" in capsys.readouterr().err) == ("^C" in typed)
    assert [len(each) for each in answers] == [2, 2, 1]
    assert answers[0] == answers[1]
    assert answers[2][0] not in answers[0]  # what was said before counts


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    ours, theirs = pty.openpty()
    yield ours, theirs
    os.close(ours)


@pytest.mark.server
@pytest.mark.usefixtures("warm_children")
@pytest.mark.long
def test_ctrl_c_at_a_terminal_ends_the_answer_and_ctrl_d_the_program(
    server: ThreadServer, terminal: tuple[int, int], parts_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = terminal
    words = edge(server, "--chat", "--max-new-tokens", LONGEST)
    finish, calls, interrupted = CachePool.finish, iter(range(10**6)), threading.Event()

    def held(self: CachePool, *args: Any, **more: Any) -> Any:
        if next(calls) == 9:
            interrupted.wait(60)
        return finish(self, *args, **more)

    monkeypatch.setattr(CachePool, "finish", held)
    process = subprocess.Popen(
        [sys.executable, "-m", "isthmus.cli.main", *map(str, words)],
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb", "ISTHMUS_CACHE": str(parts_cache)},
    )  # fmt: skip
    os.close(theirs)
    shown = ""

    def until(text: str, times: int = 1) -> None:
        nonlocal shown
        while shown.count(text) < times:
            shown += os.read(ours, 1 << 16).decode()

    until("> ")
    os.write(ours, b"hello\n")
    until("hello\r\n")
    at = len(shown)
    while len(shown) < at + 3:  # the answer has begun
        shown += os.read(ours, 1 << 16).decode()
    os.killpg(process.pid, signal.SIGINT)  # as the terminal does it: to all its processes
    interrupted.set()
    until("> ", 2)
    cut = shown[at:].splitlines()[0]
    assert 3 <= len(cut) <= 10
    while "Ctrl-D ends the conversation" not in shown:
        # A signal that comes between readline's prompt and its wait for a key is seen at the next one.
        os.kill(process.pid, signal.SIGINT)
        if select.select([ours], [], [], 1)[0]:
            shown += os.read(ours, 1 << 16).decode()
    until("> ", 3)
    os.write(ours, b"more\n")
    until("more\r\n")
    until("> ", 4)
    os.write(ours, b"\x04")
    assert process.wait(60) == 0


# A file of texts ------------------------------------------------------------------------------------------------------


def texts_of(folder: Path, *lines: object) -> list[BatchText]:
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_texts(path)


@pytest.fixture
def texts(tmp_path: Path) -> list[BatchText]:
    prompts = ("Once upon a time", "a", "The cloud and", "edge", "Why")
    return texts_of(tmp_path, *({"prompt": prompt} for prompt in prompts), {"prompt": "hello", "id": "the last"})


def test_a_file_of_texts(capsys: Said, server: ThreadServer, texts: list[BatchText], tmp_path: Path) -> None:
    words = edge(server, "--batch", tmp_path / "texts.jsonl", "--batch-size", 4)
    printed = in_process(capsys, *words)
    assert printed.returncode == 0, printed.stderr
    answers = [json.loads(line) for line in printed.stdout.splitlines()]
    assert [each["index"] for each in answers] == list(range(6))
    assert [each.get("id") for each in answers] == [None] * 5 + ["the last"]
    assert {each["tokens"] for each in answers} == {NEW}
    assert "text 4/6" in printed.stderr
    alone = json.loads(in_process(capsys, *edge(server, texts[0].prompt, "--json")).stdout)
    assert answers[0]["text"] == alone["text"] != answers[1]["text"]
    done = in_process(capsys, *words, "--out", tmp_path / "answers")
    assert (done.returncode, done.stdout) == (0, "")
    assert (tmp_path / "answers").read_text() == printed.stdout
    assert in_process(capsys, *words, "--out", tmp_path / "answers").returncode == 0
    assert (tmp_path / "answers").read_text() == printed.stdout
    (tmp_path / "answers").write_text(printed.stdout[:-20])  # cut off in the middle of a line
    assert in_process(capsys, *words, "--out", tmp_path / "answers").returncode == 0
    assert (tmp_path / "answers").read_text() == printed.stdout
    texts_of(tmp_path, {"prompt": "other"})
    refused(in_process(capsys, *words, "--out", tmp_path / "answers"), 10, "is no answer to prompt 1")


def test_prompts_and_chats_in_one_file(generator: TextGenerator, tmp_path: Path) -> None:
    chat, out = [{"role": "user", "content": "hello"}], io.StringIO()
    answer_all(generator, texts_of(tmp_path, {"prompt": "hello"}, {"messages": chat}), None, out)
    answers = [json.loads(line)["text"] for line in out.getvalue().splitlines()]
    prompts = ["hello", "<s>user\nhello</s>\n<s>assistant\n"]
    ids = generator.generate([generator.ids(prompt, templated=True) for prompt in prompts])
    assert answers == [generator.text(each) for each in ids]
    assert answers[0] != answers[1]


@pytest.mark.parametrize("written", [0, 1, 3, 4])
def test_a_run_that_was_cut_off_is_gone_on_with(
    opener: Opener,
    texts: list[BatchText],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    written: int,
    sent: list[int],
) -> None:
    options = {"temperature": 1.5, "seed": 3, "batch_size": 2}
    whole, half = tmp_path / "whole", tmp_path / "half"
    with opener(**options) as generator:
        answer_all(generator, texts, Answers.find(whole, texts), io.StringIO())
        calls = len(sent)
        append, count = Answers.append, iter(range(written + 1))

        def interrupted(self: Answers, line: str) -> None:
            if next(count) == written:
                raise KeyboardInterrupt
            append(self, line)

        monkeypatch.setattr(Answers, "append", interrupted)
        with pytest.raises(KeyboardInterrupt, match=f"stopped after {written} of 6 texts; the same command goes on"):
            answer_all(generator, texts, Answers.find(half, texts), io.StringIO())
        assert half.read_text().splitlines() == whole.read_text().splitlines()[:written]
        monkeypatch.setattr(Answers, "append", append)
        before = len(sent)
        answer_all(generator, texts, Answers.find(half, texts), io.StringIO())
        assert half.read_text() == whole.read_text()
        assert len(sent) - before == calls * (3 - written // 2) / 3  # groups that are whole are not computed again
        before = len(sent)
        answer_all(generator, texts, Answers.find(half, texts), io.StringIO())
        assert len(sent) == before
    with opener(**{**options, "seed": 4}) as generator:
        answer_all(generator, texts, Answers.find(tmp_path / "other", texts), io.StringIO())
    assert (tmp_path / "other").read_text() != whole.read_text()


def test_texts_that_are_too_long_are_named_before_anything_is_generated(
    generator: TextGenerator, tmp_path: Path, sent: list[int]
) -> None:
    fits, out = "x" * (LONGEST - NEW), io.StringIO()
    with pytest.raises(DataError, match=rf"line 2: {LONGEST - NEW + 1} tokens and {NEW} new ones.*--max-new-tokens"):
        answer_all(generator, texts_of(tmp_path, {"prompt": "a"}, {"prompt": fits + "x"}), None, out)
    assert (sent, out.getvalue()) == ([], "")
    answer_all(generator, texts_of(tmp_path, {"prompt": "a"}, {"prompt": fits}), None, out)
    assert len(out.getvalue().splitlines()) == 2


def test_a_bar_on_a_terminal_does_not_take_the_answers(
    generator: TextGenerator, texts: list[BatchText], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, terminal = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    console = Console(file=terminal, force_terminal=True)
    answer_all(generator, texts, None, sys.stdout, StepProgress("text", len(texts), console))
    assert [json.loads(line)["index"] for line in out.getvalue().splitlines()] == list(range(6))
    assert "prompt_sha256" not in terminal.getvalue()
    assert "text" in terminal.getvalue()
