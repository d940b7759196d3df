"""Runs of `isthmus edge train` against a cloud in this process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cloud.clouds import Home, ThreadServer, served
from support.models.tiny import tiny_checkpoint

from isthmus.common.errors import UnreachableError
from isthmus.edge.cloud_link import open_link
from isthmus.edge.config.training_config import TrainConfig, load_config
from isthmus.edge.run_report import Report
from isthmus.edge.split_run import run_training, train_over
from isthmus.privacy.recording.recorder import Recorder


@dataclass(frozen=True)
class Runs:
    """A cloud with a tiny model, texts to train on, and one enrolled edge."""

    server: ThreadServer
    model: Path
    texts: Path

    def config(self, out: Path, **values: Any) -> TrainConfig:
        """Three steps of four micro-batches, none of which is as long as another."""
        defaults = {
            "cloud": self.server.address,
            "key": self.server.home.key_file,
            "data": str(self.texts),
            "validation_split": 0.1,
            "out": out,
            "steps": 3,
            "batch": 2,
            "accumulate": 4,
            "learning_rate": 1e-2,
            "rank": 2,
            "threads": 1,
            "save_every": 1000,
            "give_up_after": 20.0,
        }
        return load_config(None, {**defaults, **values})

    def train(self, out: Path, **values: Any) -> Report:
        """Train to the end."""
        return run_training(self.config(out, **values))


@contextmanager
def cloud_for_runs(
    folder: Path, plan: str = "1:1", layers: int = 4, recorder: Recorder | None = None, family: str = "llama"
) -> Iterator[Runs]:
    """Start a cloud that holds the middle of a tiny model; torch has one thread meanwhile, as the cloud has."""
    model = tiny_checkpoint(family, folder / "model", num_hidden_layers=layers)
    texts = folder / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"case {n}: " + "ab" * (n % 7)}) + "\n" for n in range(20)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadServer(served(model, folder / "parts", plan=plan), Home(folder), recorder=recorder) as server:
            yield Runs(server, model, texts)
    finally:
        torch.set_num_threads(threads)


def interrupted(
    runs: Runs, out: Path, step: int, question: str = "backward", phase: str | None = None, **values: Any
) -> None:
    """A run whose cloud goes away in a step, for good: at a question's phase, or at its first one."""

    def away(asked: str, at: str) -> None:
        if link.step == step and asked == question and phase in (None, at):
            raise UnreachableError("away.")

    config = runs.config(out, **values)
    with open_link(config) as link:
        link.observer = away
        with pytest.raises(UnreachableError, match=f"checkpoint-{step - 1}"):
            train_over(link, config)
