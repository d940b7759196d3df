"""The loop, with a task of a few numbers: what it calls, what it logs, and that a stop loses nothing."""

from __future__ import annotations

import io
import json
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from isthmus.common.errors import CheckpointError, DataError, DiskError, NonFiniteError
from isthmus.common.progress import StepProgress
from isthmus.common.shutdown import StopRequest
from isthmus.training.gradient_step import GradientStep, require_finite
from isthmus.training.run_checkpoint import RunCheckpoint
from isthmus.training.training_loop import LoopOptions, Task, TrainingLoop

TOTAL = 7


class Numbers(Task):
    """Moves three numbers towards random targets, and counts; `act` is called in the step that the test names."""

    rule: GradientStep
    device = torch.device("cpu")

    def __init__(self, act_at: int = 0, act: Callable[[], None] = lambda: None, rate: float = 0.1) -> None:
        self.parameters: Mapping[str, nn.Parameter] = {"w": nn.Parameter(torch.zeros(3))}
        optimizer = torch.optim.AdamW(self.parameters.values(), lr=rate, foreach=False)
        self.rule = GradientStep(optimizer, self.parameters, peak_rate=rate, max_norm=1.0, remedy="lower it.")
        self.settings: Mapping[str, Any] = {"rate": rate}
        self.calls: list[str] = []
        self.count = 0
        self.scale = 1.0
        self._act_at, self._act, self._rate = act_at, act, rate

    def begin(self) -> None:
        self.calls.append("begin")

    def rate(self, step: int) -> float:
        return self._rate / (step + 1)

    def measure(self, step: int) -> tuple[dict[str, Any], float]:
        self.count += 1  # in the state that a step given up must not leave behind
        target = torch.randn(3)
        if step == self._act_at:
            self._act()

        def backward() -> float:
            loss = (self.parameters["w"] - target).square().sum() * self.scale
            torch.autograd.backward(loss)
            return require_finite(f"the loss of step {step} is", loss.item(), "lower it.")

        loss, norm = self.rule.gradients(step, backward)
        return {"loss": loss}, norm

    def applied(self, step: int) -> dict[str, Any]:
        self.calls.append(f"applied {step}")
        return {"count": self.count}

    def logged(self, line: Mapping[str, Any], seconds: float) -> str:
        assert seconds > 0
        return f"loss {line['loss']:.3f}"

    def between(self, step: int) -> None:
        self.calls.append(f"between {step}")

    def end(self) -> None:
        self.calls.append("end")

    def entries(self) -> Mapping[str, Any]:
        return {"count": self.count}

    def load(self, checkpoint: RunCheckpoint, folder: Path) -> None:
        self.count = checkpoint.entries["count"]


def run(folder: Path, task: Numbers, **values: Any) -> TrainingLoop:
    folder.mkdir(exist_ok=True)
    stop = StopRequest()
    options = LoopOptions(
        folder, "log.jsonl", **{"total": TOTAL, "save_every": 3, "go_on": "again", "start_anew": "remove it", **values}
    )
    loop = TrainingLoop(task, options, StepProgress("step", TOTAL, Console(file=io.StringIO())), stop)
    torch.manual_seed(0)
    with loop.listening():
        loop.resume()
        loop.run()
    return loop


def checkpoint_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def assert_same(folder: Path, task: Numbers, other: Path, reference: Numbers) -> None:
    assert torch.equal(task.parameters["w"], reference.parameters["w"])
    assert (folder / "log.jsonl").read_bytes() == (other / "log.jsonl").read_bytes()
    assert task.count == reference.count


@pytest.fixture
def straight(tmp_path: Path) -> tuple[Path, Numbers]:
    task = Numbers()
    run(tmp_path / "straight", task)
    return tmp_path / "straight", task


def test_what_is_called_and_logged(straight: tuple[Path, Numbers]) -> None:
    folder, task = straight
    steps = [call for step in range(1, TOTAL + 1) for call in (f"applied {step}", f"between {step}")]
    assert task.calls == ["begin", *steps, "end"]
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [list(line) for line in lines] == [["step", "loss", "learning_rate", "grad_norm", "count"]] * TOTAL
    assert [line["step"] for line in lines] == list(range(1, TOTAL + 1))
    assert [line["learning_rate"] for line in lines] == [0.1 / (step + 1) for step in range(TOTAL)]
    assert any(line["grad_norm"] > 1 for line in lines)  # as it was before it was clipped
    assert checkpoint_names(folder) == ["checkpoint-7"]


@pytest.mark.parametrize("step", [1, 4, TOTAL])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_last_applied_step(
    straight: tuple[Path, Numbers], tmp_path: Path, step: int, number: signal.Signals
) -> None:
    with pytest.raises(KeyboardInterrupt, match=rf"after step {step - 1} of 7\..*checkpoint-{step - 1}: again"):
        run(tmp_path / "run", Numbers(step, lambda: signal.raise_signal(number)))
    assert checkpoint_names(tmp_path / "run") == [f"checkpoint-{step - 1}"]
    task = Numbers()
    run(tmp_path / "run", task)
    assert_same(tmp_path / "run", task, *straight)


def test_an_error_saves_the_last_applied_step(straight: tuple[Path, Numbers], tmp_path: Path) -> None:
    def fail() -> None:
        raise DataError("the data are gone.")

    with pytest.raises(DataError, match=r"the data are gone\. The last applied step.*checkpoint-3: again"):
        run(tmp_path / "run", Numbers(4, fail))
    task = Numbers()
    run(tmp_path / "run", task)
    assert_same(tmp_path / "run", task, *straight)


def test_a_full_disk_writes_no_more(tmp_path: Path) -> None:
    def fail() -> None:
        raise DiskError("full")

    with pytest.raises(DiskError, match=r"^full$"):
        run(tmp_path / "run", Numbers(3, fail))
    assert checkpoint_names(tmp_path / "run") == []


@pytest.mark.parametrize(("scale", "says"), [(float("nan"), "the loss of step 4 is nan"), (1e38, "norm inf")])
def test_what_is_not_finite_stops_the_run(tmp_path: Path, scale: float, says: str) -> None:
    task = Numbers(4, lambda: setattr(task, "scale", scale))
    with pytest.raises(NonFiniteError, match=rf"{says}: lower it\..*checkpoint-3\. To use other settings, remove it"):
        run(tmp_path / "run", task)
    assert task.parameters["w"].isfinite().all()


def test_a_finished_run_makes_no_step(straight: tuple[Path, Numbers]) -> None:
    folder, reference = straight
    task = Numbers()
    assert run(folder, task).step == TOTAL
    assert task.calls == ["begin", "end"]
    assert_same(folder, task, folder, reference)


def test_as_many_checkpoints_as_wanted_are_kept(tmp_path: Path) -> None:
    run(tmp_path / "run", Numbers(), save_every=2, keep=2)
    assert checkpoint_names(tmp_path / "run") == ["checkpoint-6", "checkpoint-7"]


def test_a_checkpoint_of_another_run_is_refused(straight: tuple[Path, Numbers]) -> None:
    with pytest.raises(CheckpointError, match=r"rate was 0\.1 and is now 0\.2"):
        run(straight[0], Numbers(rate=0.2))
