"""Progress of work where nobody looks at a terminal."""

from __future__ import annotations

import io
from functools import partial

from rich.console import Console

from isthmus.common.progress import SILENCE, StepProgress, bar, unseen, watched


class Shown:
    """A console that is no terminal, and a clock."""

    def __init__(self) -> None:
        self.now, self.file = 0.0, io.StringIO()
        self.console = Console(file=self.file, width=200)

    def clock(self) -> float:
        return self.now

    @property
    def lines(self) -> list[str]:
        return self.file.getvalue().splitlines()


def test_a_bar_says_what_is_begun_and_is_never_silent_for_long() -> None:
    shown = Shown()
    for item in watched(partial(bar, shown.console, clock=shown.clock), "matching texts", "abcde"):
        shown.now += SILENCE if item in "bd" else 1
    assert shown.lines == [
        "matching texts: 5 to do",
        "matching texts 2/5  left 00:46",
        "matching texts 4/5  left 00:16",
    ]


def test_what_nobody_wants_to_see_is_worked_through_alike() -> None:
    assert list(watched(unseen, "matching texts", "abc")) == ["a", "b", "c"]


def test_slow_steps_are_shown_between_the_twentieths_unless_a_rhythm_is_asked_for() -> None:
    for every, expected in ((None, ["step 1/400", "step 2/400"]), (20, [])):
        shown = Shown()
        with StepProgress("step", 400, shown.console, every=every, clock=shown.clock) as progress:
            for step in (1, 2):
                shown.now += SILENCE
                progress.show(step, "loss 1")
        assert [line.partition("  ")[0] for line in shown.lines] == expected
