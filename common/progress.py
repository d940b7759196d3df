"""Progress of work that takes a while, on standard error: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType
from typing import Self, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress as RichProgress, TextColumn, TimeRemainingColumn

_T = TypeVar("_T")
LINES = 20
"""Of a whole run, where nobody looks at a terminal."""

SILENCE = 30.0
"""Seconds without a line, after which there is one where there is no terminal, once an item of the work is done."""

Progress = Callable[[str, int], AbstractContextManager[Callable[[], None]]]
"""Shows work of that name and so many items, as `bar` does: the yielded function is called after each item."""


@contextmanager
def bar(
    console: Console | None, what: str, total: int, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[], None]]:
    """Show work while the block runs, which calls the yielded function after each of `total` items.

    On a terminal it is a live bar that goes when the block ends; elsewhere it is one line at the beginning, and one
    after each `SILENCE`.
    """
    with StepProgress(what, total, console, clock=clock, few=True) as shown:
        done = itertools.count(1)
        yield lambda: shown.show(next(done), "")


def note(message: str) -> None:
    """Print a line on standard error, broken by nobody but the terminal."""
    Console(stderr=True, highlight=False).print(message, soft_wrap=True, markup=False)


def unseen(_what: str, _total: int) -> AbstractContextManager[Callable[[], None]]:
    """A `Progress` that shows nothing."""
    return nullcontext(lambda: None)


def watched(progress: Progress, what: str, items: Sequence[_T]) -> Iterator[_T]:
    """The items, one after another, while their progress is shown."""
    with progress(what, len(items)) as advance:
        for item in items:
            yield item
            advance()


class StepProgress:
    """The steps of a run, with figures and the time left.

    Args:
        what: Opens each line: "step", or "distilling: step".
        total: Steps of the run.
        console: Where to show; None for standard error.
        every: Steps between lines where the output is not a terminal; None for some twenty lines in all, and one after
            each `SILENCE`.
        few: Whether there are only a first line, and those after a silence.
        clock: Seconds, for the time left of plain lines.
    """

    def __init__(
        self,
        what: str,
        total: int,
        console: Console | None = None,
        *,
        every: int | None = None,
        few: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._what, self._total, self._few = what, total, few
        self._every = every or max(1, total // LINES)
        self._silence = SILENCE if every is None else math.inf
        self._console = console or Console(stderr=True, highlight=False)
        self._clock = clock
        self._start_step, self._start_time = 0, clock()
        self._spoken = clock()
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[figures]}"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            transient=few,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(what, total=total, figures="")

    def __enter__(self) -> Self:
        self._bar.start()
        if self._few and not self._console.is_terminal:
            self.message(f"{self._what}: {self._total} to do")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def start(self, step: int) -> None:
        """The run goes on from `step` applied steps."""
        self._start_step, self._start_time = step, self._clock()
        self._bar.update(self._task, completed=step)

    def show(self, step: int, figures: str) -> None:
        """Step `step` has been applied."""
        self._bar.update(self._task, completed=step, figures=figures)
        due = not self._few and (step % self._every == 0 or step == self._total)
        due = due or self._clock() - self._spoken >= self._silence
        if not self._console.is_terminal and due:
            parts = (f"{self._what} {step}/{self._total}", figures, f"left {duration(self._left(step))}")
            self.message("  ".join(part for part in parts if part))

    def message(self, text: str) -> None:
        """One line above the bar."""
        self._spoken = self._clock()
        self._console.print(text, markup=False, soft_wrap=True)

    def _left(self, step: int) -> float:
        done = step - self._start_step
        return (self._clock() - self._start_time) / done * (self._total - step) if done else 0.0


def duration(seconds: float) -> str:
    """Seconds for people: 1:02:03, or 02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"
