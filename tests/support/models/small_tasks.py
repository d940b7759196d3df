"""A small folder of tasks in the form of the real ones, a package, and settings of a table that takes seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support.protocol.wire import NOW, identity

from isthmus.backbone.checkpoints.sources import Checkpoint, load_tokenizer
from isthmus.backbone.plan import SplitPlan
from isthmus.emulator.compress.emulator_model import build_emulator
from isthmus.emulator.compress.public_text import load_blocks
from isthmus.emulator.compress.recipe import Recipe
from isthmus.emulator.package.manifest import Tuning
from isthmus.emulator.package.package import Package, write_package
from isthmus.experiments.harness.emulator_settings import TableSettings

ADVICE = Tuning(learning_rate=1e-2, steps=3, rank=2, warmup_steps=1)
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
    """One seed, one candidate rate."""
    defaults = {
        "model": str(model),
        "tasks": "e2e",
        "out": out,
        "seeds": 1,
        "few_seeds": 1,
        "batch": 4,
        "max_length": 96,
        "adapter_rates": "1e-2",
        "whole_rates": "1e-3",
        "test": 12,
        "validation": 6,
        "text_length": 32,
        "data_folder": data,
        "device": "cpu",
        "threads": 1,
    }
    return TableSettings(**{**defaults, **values})


def task_package(
    folder: Path, model: Path, data: Path, recipe: str = "uniform", keep: float = 0.5, tuning: Tuning | None = ADVICE
) -> Package:
    """A package of the tiny model, split 1:3, with advice of three steps."""
    checkpoint = Checkpoint(model, "tiny")
    plan = SplitPlan.parse("1:3", checkpoint.config.num_hidden_layers)
    blocks = load_blocks(data / "shakespeare" / "input.txt", load_tokenizer(model), 32)
    emulator = build_emulator(checkpoint, plan, Recipe.parse(recipe, keep), blocks)
    return write_package(
        *(folder, checkpoint, plan, emulator),
        signer=identity(),
        licence="for tests",
        tuning=tuning,
        now=lambda: float(NOW),
    )
