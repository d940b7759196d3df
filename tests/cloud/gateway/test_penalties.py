"""Pauses for those who break the rules: a few offences cost nothing, many a little time, and all are forgiven."""

from __future__ import annotations

from isthmus.cloud.gateway.penalties import FORGIVEN_PER_SECOND, FREE, LONGEST_SECONDS, MAX_OFFENDERS, Penalties


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_few_offences_cost_nothing_and_more_cost_more_up_to_a_limit() -> None:
    penalties = Penalties(Clock())
    pauses = []
    for _ in range(int(FREE + LONGEST_SECONDS) + 3):
        penalties.offended("mallory")
        pauses.append(penalties.pause("mallory"))
    assert pauses == [0.0] * int(FREE) + [1.0, 2.0, 3.0] + [LONGEST_SECONDS] * 3
    assert penalties.pause("alice") == 0.0


def test_offences_are_forgiven_in_time() -> None:
    clock = Clock()
    penalties = Penalties(clock)
    for _ in range(20):
        penalties.offended("mallory")
    clock.now += 1 / FORGIVEN_PER_SECOND
    assert penalties.pause("mallory") == LONGEST_SECONDS - 1
    clock.now += LONGEST_SECONDS / FORGIVEN_PER_SECOND
    assert penalties.pause("mallory") == 0.0
    penalties.offended("mallory")
    assert penalties.pause("mallory") == 0.0


def test_those_that_have_been_quiet_for_longest_are_forgotten_first() -> None:
    penalties = Penalties(Clock())
    for name in ("first", "second"):
        for _ in range(10):
            penalties.offended(name)
    penalties.offended("first")
    for number in range(MAX_OFFENDERS - 1):
        penalties.offended(f"stranger {number}")
    assert penalties.pause("second") == 0.0
    assert penalties.pause("first") > 0.0
