"""A small folder of tasks in the form of the real ones, generated, and settings of a table that takes seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from isthmus.experiments.harness.emulator_settings import TableSettings

_WORDS = ("red", "blue", "green", "black", "white", "pink")


def task_folder(folder: Path, n: int = 40) -> Path:
    """E2E, OpenBookQA and SST-2 of `n` examples each in either file, and a text."""
    for name in ("e2e", "openbookqa", "sst2", "shakespeare"):
        (folder / name).mkdir(parents=True)
    for part, first in (("train", 0), ("test", 1000)):
        numbers = range(first, first + n)
        rows = ["mr,ref", *(f'"name[{_WORDS[i % 6]} {i}]","{_WORDS[i % 6]} {i} is here"' for i in numbers)]
        (folder / "e2e" / f"{part}.csv").write_text("\ufeff" + "\n".join(rows) + "\n", encoding="utf-8")
        questions = [
            {
                "instruction": "Please choose the correct answer to the question: "
                f"{i} is\n\nAnswer1: {_WORDS[i % 6]} Answer2: {_WORDS[(i + 1) % 6]} Answer3: {_WORDS[(i + 2) % 6]}"
                "\n\nAnswer format: answer1/answer2/answer3",
                "output": f"the correct answer is answer{i % 3 + 1}",
                "answer": f"answer{i % 3 + 1}",
            }
            for i in numbers
        ]
        (folder / "openbookqa" / f"{part}.json").write_text(json.dumps(questions))
        (folder / "sst2" / f"{part}.tsv").write_text("".join(f"a {_WORDS[i % 6]} film {i}\t{i % 2}\n" for i in numbers))
    text = "".join(f"{_WORDS[i % 6]} and {_WORDS[i % 5]} make {i}.\n" for i in range(120))
    (folder / "shakespeare" / "input.txt").write_text(text)
    return folder


def table_settings(model: Path, data: Path, out: Path, **values: Any) -> TableSettings:
    """Three steps, two seeds, two candidate rates."""
    defaults = {
        "model": str(model),
        "tasks": "e2e",
        "out": out,
        "methods": "uniform",
        "adapter_layers": "1:1",
        "seeds": 2,
        "steps": 3,
        "batch": 4,
        "max_length": 96,
        "learning_rates": "1e-3,3e-3",
        "adapter_rates": "1e-2",
        "whole_rates": "1e-3,3e-3",
        "test": 12,
        "validation": 6,
        "text_length": 32,
        "data_folder": data,
        "device": "cpu",
        "threads": 1,
    }
    return TableSettings(**{**defaults, **values})
