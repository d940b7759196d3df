"""A small training run for the tests of the loop: a tiny Llama, generated text, and wires that misbehave on cue.

Run as a program it is the edge that gets killed: `python training.py MODEL OUT MOMENT STEP [NAME=VALUE …]`.
"""

from __future__ import annotations

import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from isthmus.common.errors import UnreachableError
from isthmus.common.progress import StepProgress
from isthmus.edge.config.schedule import total_steps
from isthmus.edge.config.training_config import TrainConfig
from isthmus.edge.data.batches import Encoded, TrainingData, fingerprint
from isthmus.edge.run_files.run_identity import ModelIdentity
from isthmus.edge.run_report import WireTotals
from isthmus.edge.training.methods import build_peft, trained
from isthmus.edge.training.trainer import Trainer

IDENTITY = ModelIdentity("tiny", "d1", "whole")


def config(out: Path, **values: Any) -> TrainConfig:
    """Nine steps with dropout, so that the random state matters."""
    defaults = {
        "steps": 9,
        "batch": 3,
        "learning_rate": 1e-2,
        "dropout": 0.2,
        "save_every": 3,
        "threads": 1,
        "warmup_steps": 2,
    }
    return TrainConfig.model_validate(
        {"cloud": "isthmus://h:1#SHA256:x", "data": "unused", "out": out, **defaults, **values}
    )


def data(n: int = 11) -> TrainingData:
    """`n` examples of different lengths, two of them held out."""
    rows = [tuple((7 * i + 3 * j + i * j) % 250 + 5 for j in range(5 + i % 4)) for i in range(n)]
    examples = [Encoded(row, (-100, -100, *row[2:])) for row in rows]
    train, held_out = examples[:-2], examples[-2:]
    return TrainingData(train, held_out, 0, 0, fingerprint(train, held_out))


class Wire:
    """A meter on which nothing crosses, and which calls `act` at the moment and step that the test names.

    The moments: "begin" (before the micro-batches), "applied" (after the optimizer, before the loss log).
    """

    def __init__(self, moment: str = "", step: int = 0, act: Callable[[], None] = lambda: None) -> None:
        self._wanted, self._act = (moment, step), act
        self._step, self._asked = 0, 0
        self.steps: list[int] = []

    def begin_step(self, step: int) -> None:
        self._step, self._asked = step, 0
        self.steps.append(step)
        if self._wanted == ("begin", step):
            self._act()

    def totals(self) -> WireTotals:
        self._asked += 1
        if self._wanted == ("applied", self._step) and self._asked == 1:
            self._act()
        done = len(self.steps)
        return WireTotals(
            bytes_up=1000 * done,
            bytes_down=500 * done,
            calls=2 * done,
            round_trips=2 * done,
            wire_s=1e-6 * done,
            crypto_s=1e-7 * done,
            cloud_s=1e-5 * done,
            retries=done // 3,
        )


def trainer(model_folder: Path, options: TrainConfig, wire: Wire | None = None, **keywords: Any) -> Trainer:
    """A run from scratch: a fresh base model and a fresh adapter, unless `model` is given."""
    training_data = keywords.pop("data", None) or data()
    total = total_steps(options, len(training_data.train))
    model = keywords.pop("model", None)
    if model is None:
        model = build_peft(AutoModelForCausalLM.from_pretrained(model_folder), options, total_steps=total)
    progress = StepProgress("step", total, Console(file=io.StringIO()), every=options.log_every)
    keywords = {"identity": IDENTITY, "progress": progress, "meter": wire, **keywords}
    return Trainer(model, training_data, options, **keywords)


class Turns:
    """An observer whose state changes within a step, and which may fail before one."""

    def __init__(self, fail_before: int = 0) -> None:
        self.begun: list[int] = []
        self.ended: list[int] = []
        self.graded: list[bool] = []
        self.parameters: list[nn.Parameter] = []
        self._fail_before = fail_before

    def before_step(self, step: int) -> None:
        self.begun.append(step)
        if step == self._fail_before:
            raise_unreachable()

    def after_step(self, step: int) -> None:
        self.ended.append(step)
        self.graded.append(all(parameter.grad is not None for parameter in self.parameters))

    def points(self) -> dict[str, float]:
        return {"turns/begun": len(self.begun), "turns/ended": len(self.ended)}

    def state(self) -> dict[str, Any]:
        return {"begun": self.begun, "ended": self.ended}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.begun, self.ended = list(state["begun"]), list(state["ended"])


def raise_unreachable() -> None:
    raise UnreachableError("the cloud stayed away for 600 s.")


def weights(model: Any) -> dict[str, Tensor]:
    """Copies of what is trained."""
    return {name: parameter.detach().clone() for name, parameter in trained(model).items()}


def named_layers(names: Iterable[str]) -> set[int]:
    """Numbers of the layers that modules or parameters of these names are in."""
    return {int(match[1]) for name in names if (match := re.search(r"\.(?:layers|h)\.(\d+)\.", name))}


def kill() -> None:
    """End this process as a power cut would."""
    os.kill(os.getpid(), signal.SIGKILL)


def main(arguments: list[str]) -> None:
    """See the top of the file."""
    model_folder, out, moment, step, *rest = arguments
    wire = Wire(moment, int(step), kill)
    if moment == "save":
        from isthmus.training import run_checkpoint

        write = run_checkpoint.save_file
        run_checkpoint.save_file = lambda tensors, path: (  # type: ignore[assignment]  # the test's own, with the same arguments
            kill() if f"checkpoint-{step}" in str(path) and "optimizer" in str(path) else write(tensors, path)
        )
    trainer(Path(model_folder), config(Path(out), **dict(item.split("=") for item in rest)), wire).fit()


if __name__ == "__main__":
    main(sys.argv[1:])
