"""A file of texts: each mistake is named by its line. A file of answers: gone on with for the same texts alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from isthmus.common.errors import ConfigError, DataError, DiskError
from isthmus.edge.generation.batch_file import Answers, BatchText, read_texts

LINES = (
    '{"prompt": "a", "id": 7}',
    "",
    '{"messages": [{"role": "user", "content": "b"}]}',
    '{"prompt": "c", "completion": "ignored"}',
)


def file(folder: Path, *lines: str) -> Path:
    path = folder / "texts.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def texts(tmp_path: Path) -> list[BatchText]:
    return read_texts(file(tmp_path, *LINES))


def test_prompts_and_messages_are_read(texts: list[BatchText]) -> None:
    assert [(text.index, text.prompt, text.messages, text.id) for text in texts] == [
        (0, "a", (), 7),
        (1, "", (("user", "b"),), None),
        (2, "c", (), None),
    ]
    assert texts[1].where.endswith("texts.jsonl, line 3")
    assert len({text.sha256 for text in texts}) == 3


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("nonsense", "not JSON"),
        ("[1]", "an object {...} is expected"),
        ("{}", "it needs 'prompt' (text) or 'messages' (a chat)"),
        ('{"prompt": "a", "messages": []}', "one of the two"),
        ('{"prompt": 3}', "'prompt' is a number, not a string"),
        ('{"prompt": ""}', "the prompt is empty"),
        ('{"prompt": "\\ud800"}', "half of a surrogate pair"),
        ('{"messages": "hi"}', "is not a list of messages"),
        ('{"messages": [{"role": "user"}]}', "message 0 is not an object with 'role' and 'content'"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, reason: str) -> None:
    with pytest.raises(DataError) as error:
        read_texts(file(tmp_path, LINES[0], line))
    assert "texts.jsonl, line 2" in str(error.value)
    assert reason in str(error.value)


def test_a_file_without_texts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no prompts"):
        read_texts(file(tmp_path, ""))
    with pytest.raises(DataError, match="cannot be read"):
        read_texts(tmp_path / "nowhere")


def test_answers_are_gone_on_with(tmp_path: Path, texts: list[BatchText]) -> None:
    path = tmp_path / "answers.jsonl"
    answers = Answers.find(path, texts)
    assert answers.done == 0
    answers.begin()
    answers.append(texts[0].line("x", 1))
    answers.append(texts[1].line("y", 2))
    whole = path.read_text()
    assert json.loads(whole.splitlines()[0])["id"] == 7
    assert "id" not in json.loads(whole.splitlines()[1])
    for half in ("", '{"ind', '{"index": 2, "prompt_sha'):
        path.write_text(whole + half)
        answers = Answers.find(path, texts)
        assert answers.done == 2
        answers.begin()
        assert path.read_text() == whole
    answers.append(texts[2].line("z", 3))
    assert [json.loads(line)["text"] for line in path.read_text().splitlines()] == ["x", "y", "z"]
    assert Answers.find(path, texts).done == 3


def test_answers_to_other_prompts_are_refused_and_left_alone(tmp_path: Path, texts: list[BatchText]) -> None:
    others = read_texts(file(tmp_path, LINES[0], '{"prompt": "other"}'))
    path = tmp_path / "answers.jsonl"
    good = texts[0].line("x", 1) + "\n"
    strange = {
        good + texts[1].line("y", 1) + "\n": 2,  # of the first file
        good + others[1].line("y", 1) + "\n" + texts[2].line("z", 1) + "\n": 3,  # too many
        good + "notes": 2,
        "notes": 1,
        '{"index": 1, "prom': 1,
        "[]\n": 1,
        "\n": 1,
    }
    for content, line in strange.items():
        path.write_text(content)
        with pytest.raises(ConfigError, match=rf"answers\.jsonl, line {line}, is no answer to prompt {line}"):
            Answers.find(path, others)
        assert path.read_text() == content
    path.write_text(good)
    assert Answers.find(path, others).done == 1


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path, texts: list[BatchText]) -> None:
    with pytest.raises(DiskError, match="nowhere"):
        Answers.find(tmp_path / "nowhere" / "answers", texts).begin()
    with pytest.raises(DiskError, match="cannot be"):
        Answers.find(tmp_path, texts)
