"""The number of workers by the calls that wait, with a clock of the test's own."""

from __future__ import annotations

from isthmus.cloud.control.autoscaler import GROW_SECONDS, PAUSE_SECONDS, SHRINK_SECONDS, Change, Load, Scaler

BUSY, CALM, COMPANY = Load(4, 3, 2), Load(0, 0, 1), Load(4, 0, 4)


class Run:
    """A scaler whose clock stands until `after` moves it."""

    def __init__(self, least: int, most: int) -> None:
        self.now = 0.0
        self.scaler = Scaler(least, most, lambda: self.now)

    def after(self, seconds: float, loads: dict[int, Load]) -> Change | None:
        self.now += seconds
        return self.scaler.decide(loads)


def test_a_queue_that_stays_brings_a_worker_and_then_a_pause() -> None:
    run = Run(1, 3)
    assert run.after(0, {0: BUSY}) is None
    assert run.after(GROW_SECONDS - 1, {0: BUSY}) is None
    assert run.after(1, {0: BUSY}) == Change(1, start=True)
    assert run.after(1, {0: BUSY, 1: BUSY}) is None
    assert run.after(PAUSE_SECONDS - 2, {0: BUSY, 1: BUSY}) is None
    assert run.after(1, {0: BUSY, 1: BUSY}) == Change(2, start=True)
    assert run.after(10 * PAUSE_SECONDS, {0: BUSY, 1: BUSY, 2: BUSY}) is None


def test_a_queue_that_empties_in_between_brings_none() -> None:
    run = Run(1, 2)
    run.after(0, {0: BUSY})
    run.after(GROW_SECONDS - 1, {0: CALM})
    assert run.after(2, {0: BUSY}) is None
    assert run.after(GROW_SECONDS - 1, {0: BUSY}) is None


def test_calls_that_wait_for_partners_bring_no_worker_and_end_none() -> None:
    run = Run(1, 3)
    run.after(0, {0: COMPANY, 1: COMPANY})
    assert run.after(10 * SHRINK_SECONDS, {0: COMPANY, 1: COMPANY}) is None


def test_a_long_calm_ends_the_spare_worker_with_the_fewest_sessions() -> None:
    run = Run(1, 4)
    loads = {0: Load(0, 0, 0), 1: Load(0, 0, 5), 2: Load(0, 0, 1), 3: Load(0, 0, 1)}
    assert run.after(0, loads) is None
    assert run.after(SHRINK_SECONDS - 1, loads) is None
    assert run.after(1, loads) == Change(3, start=False)
    del loads[3]
    assert run.after(SHRINK_SECONDS, loads) is None
    assert run.after(SHRINK_SECONDS, loads) == Change(2, start=False)


def test_the_first_workers_stay_and_a_fixed_number_is_fixed() -> None:
    run = Run(1, 2)
    run.after(0, {0: CALM})
    assert run.after(10 * SHRINK_SECONDS, {0: CALM}) is None
    fixed = Run(2, 2)
    fixed.after(0, {0: BUSY, 1: BUSY})
    assert fixed.after(10 * SHRINK_SECONDS, {0: BUSY, 1: BUSY}) is None


def test_the_number_that_is_free_is_taken() -> None:
    run = Run(1, 3)
    run.after(0, {0: BUSY, 2: BUSY})
    assert run.after(GROW_SECONDS, {0: BUSY, 2: BUSY}) == Change(1, start=True)
