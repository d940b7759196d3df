"""What a file for fine-tuning may hold, and what its size decides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from isthmus.common.errors import DataError
from isthmus.daemon.openai.training_files import hyperparameters_of, read_training_file, settings_of

AUTO = {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"}


def written(path: Path, *records: object) -> Path:
    file = path / "data.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return file


def chat(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


ASKED, ANSWERED = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


def test_the_three_forms(tmp_path: Path) -> None:
    for record, chats in (
        (chat(ASKED, ANSWERED), True),
        ({"prompt": "a", "completion": "b"}, False),
        ({"text": "a"}, False),
    ):
        known = read_training_file(written(tmp_path, record, record), "data.jsonl")
        assert (known.examples, known.chats) == (2, chats)


def test_weights_that_say_what_is_learned_anyway(tmp_path: Path) -> None:
    earlier, last = {**ANSWERED, "weight": 0}, {**ANSWERED, "weight": 1}
    assert read_training_file(written(tmp_path, chat(ASKED, earlier, ASKED, last)), "n").examples == 1
    for messages in ((ASKED, last, ASKED, last), (ASKED, earlier)):
        with pytest.raises(DataError, match=r"line 1: message 1: weight = . cannot be followed"):
            read_training_file(written(tmp_path, chat(*messages)), "n")


@pytest.mark.parametrize(
    ("record", "error"),
    [
        (chat(ASKED, ANSWERED, tools=[]), "'tools' is not understood beside"),
        (chat(ASKED, {**ANSWERED, "tool_calls": []}), "message 1: 'tool_calls' is not understood"),
        (chat({**ASKED, "name": "x"}, ANSWERED), "message 0: 'name' is not understood"),
        (chat(ASKED), "no assistant message"),
        (chat("a", "b"), "message 0 is not an object"),
        ({"messages": 3}, "is not a list of messages"),
        ({"prompt": "a", "completion": ""}, "nothing to train on"),
        ({"question": "a"}, "none of the keys"),
    ],
)
def test_a_mistake_names_its_line(tmp_path: Path, record: object, error: str) -> None:
    good = {"prompt": "a", "completion": "b"} if "prompt" in str(record) else chat(ASKED, ANSWERED)
    first = [] if "none of" in error else [good]
    with pytest.raises(
        DataError, match=rf"^mine, line {len(first) + 1}: .*{error}|^mine, line {len(first) + 1}: {error}"
    ):
        read_training_file(written(tmp_path, *first, record), "mine")


@pytest.mark.parametrize(
    ("examples", "epochs", "batch"),
    [(1, 25, 1), (10, 10, 4), (33, 3, 4), (34, 3, 4), (499, 3, 4), (500, 3, 8), (5_000, 3, 16), (8_334, 2, 16),
     (30_000, 1, 16)],
)  # fmt: skip
def test_what_auto_means(examples: int, epochs: int, batch: int) -> None:
    settings = settings_of(AUTO, examples)
    assert hyperparameters_of(settings) == {"n_epochs": epochs, "batch_size": batch, "learning_rate_multiplier": 1.0}
    assert settings["learning_rate"] == 1e-3


@pytest.mark.parametrize("batch", [1, 7, 8, 12, 13, 96, 251, 256])
def test_numbers_are_followed_exactly(batch: int) -> None:
    numbers = {"n_epochs": 7, "batch_size": batch, "learning_rate_multiplier": 0.3}
    settings = settings_of(numbers, 10)
    assert settings["batch"] * settings["accumulate"] == batch
    assert settings["batch"] <= 8
    assert hyperparameters_of(settings) == numbers


def test_a_job_of_steps_tells_no_epochs_and_the_rate_of_edge_train() -> None:
    assert hyperparameters_of({"steps": 20}) == {"batch_size": 4, "learning_rate_multiplier": 1.0}
