"""The loop of every training run: steps, log, checkpoints, stopping and resuming.

A step is applied whole or not at all. Whatever goes wrong before it is applied, the parameters are those after the last
applied step, and the random state from before the step is at hand. So a checkpoint can be written then, and the step is
made again, the same, after a resume: on one machine and with as many threads, an interrupted and resumed run ends with
the bits of an undisturbed one. The log has one JSON line for each applied step, and starts on a resume as the
checkpoint has it.
"""

from __future__ import annotations

import copy
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.common.errors import DiskError, IsthmusError, NonFiniteError
from isthmus.common.files import disk_errors, write_atomic
from isthmus.common.progress import StepProgress
from isthmus.common.shutdown import Interrupted, StopRequest
from isthmus.training import run_checkpoint as checkpoints
from isthmus.training.gradient_step import StepRule
from isthmus.training.run_checkpoint import RandomState, RunCheckpoint


@dataclass(frozen=True, slots=True)
class LoopOptions:
    """How a run is kept.

    Attributes:
        folder: Of the log and the checkpoints. The caller holds it (`isthmus.common.files.claim`).
        save_every: Steps between checkpoints; one more is written after the last step.
        go_on: What the user does to resume, as a command: "repeat the command".
    """

    folder: Path
    log_name: str
    total: int
    save_every: int
    go_on: str
    start_anew: str
    keep: int = 1


class Task(ABC):
    """What a kind of run trains, and what its steps do.

    Attributes:
        parameters: What is trained, by name.
        rule: What moves the parameters.
        device: Whose random state a step depends on, beside the CPU's.
        settings: What may not change half-way, by its name in messages; plain values, as JSON has them.
    """

    parameters: Mapping[str, nn.Parameter]
    rule: StepRule
    device: torch.device
    settings: Mapping[str, Any]

    @abstractmethod
    def begin(self) -> None:
        """Called before the first step that this process makes."""

    @abstractmethod
    def rate(self, step: int) -> float:
        """The learning rate of the step after `step` applied ones."""

    @abstractmethod
    def measure(self, step: int) -> tuple[dict[str, Any], float]:
        """Find out how step number `step` (from 1) moves the parameters, and leave them as they are.

        Returns:
            Entries of the step's log line, `loss` among them, and the gradient's norm or what stands for it.

        Raises:
            NonFiniteError: A loss or a gradient is NaN or infinite.
        """

    def applied(self, step: int) -> dict[str, Any]:
        """Called when step number `step` has been applied, so it must not raise. Returns further log entries."""
        return {}

    @abstractmethod
    def logged(self, line: Mapping[str, Any], seconds: float) -> str:
        """Called when the step of a log line, which took so long, is in the log. Returns figures for the progress."""

    def between(self, step: int) -> None:  # noqa: B027  # most tasks have nothing to do here
        """Called after `step` steps, and after the checkpoint if one was due."""

    @abstractmethod
    def end(self) -> None:
        """Called after the last step, also where a resumed run has no step to make."""

    def tensors(self) -> Mapping[str, Mapping[str, Tensor]]:
        """What the next step depends on besides parameters and optimizer, by file."""
        return {}

    @abstractmethod
    def entries(self) -> Mapping[str, Any]:
        """Plain values, as JSON has them, that the next step or the report depends on."""

    def check(self, checkpoint: RunCheckpoint, folder: Path) -> None:  # noqa: B027  # the loop compares the settings
        """Refuse a checkpoint of another run by more than `settings`.

        Raises:
            CheckpointError: It is one; the message says how it differs.
        """

    @abstractmethod
    def load(self, checkpoint: RunCheckpoint, folder: Path) -> None:
        """Take `tensors` and `entries` from a checkpoint, whose parameters are already restored.

        Raises:
            CheckpointError: They are not those of this run.
        """


class TrainingLoop:
    """Makes the steps of a task, and keeps its log and its checkpoints.

    Attributes:
        step: Applied steps.
        log: The lines of the log, with their line breaks.
    """

    def __init__(self, task: Task, options: LoopOptions, progress: StepProgress, stop: StopRequest) -> None:
        self.step = 0
        self.log: list[str] = []
        self._task = task
        self._options = options
        self._progress = progress
        self._stop = stop
        self._random: RandomState  # these two come from `_note_state`
        self._entries: Mapping[str, Any]

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Show progress, and take Ctrl-C and SIGTERM as a request to stop, while the block runs."""
        with self._stop.listen(self._progress.message), self._progress:
            yield

    def resume(self) -> bool:
        """Go on from the newest checkpoint; returns whether there is one. Without one, the log begins empty.

        Raises:
            CheckpointError: The checkpoint is damaged, or belongs to another run.
            DiskError: The log cannot be written.
        """
        options, task = self._options, self._task
        folder = checkpoints.latest(options.folder)
        if folder is None:
            self._note_state()
            write_atomic(options.folder / options.log_name, b"")
            return False
        saved = checkpoints.load(folder)
        task.check(saved, folder)
        checkpoints.check_settings(folder, saved.settings, task.settings, options.start_anew)
        checkpoints.restore_parameters(folder, saved.parameters, task.parameters)
        task.rule.load_state(dict(saved.optimizer))
        task.load(saved, folder)
        if saved.random is not None:
            saved.random.restore(task.device)
        self.step, self.log = saved.step, list(saved.log)
        self._note_state()
        write_atomic(options.folder / options.log_name, "".join(self.log).encode())
        self._progress.message(f"Resumed after step {self.step} of {options.total} from {folder}.")
        return True

    def run(self) -> None:
        """Make the steps that are left.

        Raises:
            KeyboardInterrupt: Ctrl-C or SIGTERM; the message says how to go on. A second signal stops at once, without
                a checkpoint.
            NonFiniteError: A loss or a gradient is NaN or infinite.
            DiskError: The disk is full.
            IsthmusError: Whatever the task raises. Before it rises, the last applied step is saved.
        """
        options = self._options
        try:
            self._run()
        except Interrupted:
            raise KeyboardInterrupt(
                f"Stopped after step {self.step} of {options.total}. {self._rescue()}: {options.go_on}."
            ) from None
        except DiskError:
            raise
        except NonFiniteError as error:
            # The same settings would lead to the same end, and other ones are another run.
            raise type(error)(f"{error} {self._rescue()}. To use other settings, {options.start_anew}.") from error
        except IsthmusError as error:
            raise type(error)(f"{error} {self._rescue()}: {options.go_on}.") from error

    def _run(self) -> None:
        self._task.begin()
        self._note_state()
        self._progress.start(self.step)
        while self.step < self._options.total:
            self._make_step()
            if self.step % self._options.save_every == 0 or self.step == self._options.total:
                self._save()
            self._task.between(self.step)
        self._task.end()

    def _make_step(self) -> None:
        number, task, started = self.step + 1, self._task, time.perf_counter()
        self._note_state()
        rate = task.rate(self.step)
        measured, norm = task.measure(number)
        # The last place to give the step up: from here on it is applied whole.
        self._stop.check()
        task.rule.apply(rate)
        extra = task.applied(number)
        self.step = number
        self._note_state()
        seconds = time.perf_counter() - started
        # Nothing in the line depends on time, so the log of a resumed run equals that of an undisturbed one.
        line = {"step": number, **measured, "learning_rate": rate, "grad_norm": norm, **extra}
        self._write(line)
        self._progress.show(number, task.logged(line, seconds))

    def _note_state(self) -> None:
        """Note what the next step depends on besides tensors, in case a step that has begun is given up."""
        self._random = RandomState.take(self._task.device)
        self._entries = copy.deepcopy(dict(self._task.entries()))

    def _write(self, line: Mapping[str, Any]) -> None:
        self.log.append(json.dumps(line) + "\n")
        path = self._options.folder / self._options.log_name
        with disk_errors(path), path.open("a", encoding="utf-8") as file:
            file.write(self.log[-1])

    def _rescue(self) -> str:
        """Save the last applied step; returns where."""
        return f"The last applied step is saved in {self._save()}"

    def _save(self) -> Path:
        task, options = self._task, self._options
        state = RunCheckpoint(
            step=self.step,
            settings=task.settings,
            parameters=dict(task.parameters),
            optimizer=task.rule.state(),
            log=tuple(self.log),
            random=self._random,
            tensors=task.tensors(),
            entries=self._entries,
        )
        return checkpoints.save(options.folder, state, options.log_name, options.keep)
