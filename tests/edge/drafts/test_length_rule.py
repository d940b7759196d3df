"""The length of a draft, in simulations whose seconds and acceptances are made up."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from isthmus.edge.drafts.calibration import Calibration
from isthmus.edge.drafts.length_rule import ALLOWANCE, LOSS_SHARE, MAX_DRAFT, AdaptiveLength, FixedLength, LengthRule
from isthmus.edge.drafts.round_seconds import OUTLIER, MeanSeconds, RoundSeconds

GUESSES = [0.25, 0.75]


@dataclass
class World:
    """What generating costs, in seconds, and how often tokens are accepted.

    Attributes:
        shares: Of accepted tokens, by bucket; both buckets are equally frequent.
        noise: Relative deviation of the seconds.
        behind: Tokens of the text that the draft has not taken in.
        catching_up: Seconds for each of them.
        says_behind: Whether the rule is told that a draft had to catch up.
    """

    round_trip: float = 0.05
    compute: float = 0.03
    verify: float = 0.002
    draft: float = 0.005
    shares: tuple[float, float] = (0.8, 0.8)
    noise: float = 0.0
    behind: int = 0
    catching_up: float = 0.0
    says_behind: bool = True
    random: random.Random = field(default_factory=lambda: random.Random(3))  # noqa: S311  # a simulation
    lengths: list[int] = field(default_factory=list)

    @property
    def plain(self) -> float:
        """Seconds of a round without a draft."""
        return self.round_trip + self.compute

    def run(self, rule: LengthRule, n_tokens: int) -> float:
        """The seconds that so many tokens take."""
        seconds, tokens = 0.0, 0
        while tokens < n_tokens:
            buckets: list[int] = []
            drafting = 0.0
            while rule.wants(buckets, None):
                took = self._noisy(self.draft + self.catching_up * self.behind)
                rule.token_drafted(took, self.behind + 1 if self.says_behind else 1)
                self.behind = 0
                drafting += took
                buckets.append(self.random.randrange(2))
            accepted = 0
            while accepted < len(buckets) and self.random.random() < self.shares[buckets[accepted]]:
                accepted += 1
            verifying = self._noisy(self.plain + self.verify * len(buckets))
            rule.round_over(buckets, accepted, min(len(buckets), accepted + 1), accepted + 1, (drafting, verifying))
            seconds, tokens = seconds + drafting + verifying, tokens + accepted + 1
            self.behind += 0 if buckets else 1
            self.lengths.append(len(buckets))
        return seconds

    def _noisy(self, seconds: float) -> float:
        return seconds * max(0.1, self.random.gauss(1, self.noise)) if self.noise else seconds


def length_after(world: World, n_tokens: int = 4000) -> float:
    """The mean length that the rule comes to."""
    world.run(AdaptiveLength(GUESSES), n_tokens)
    settled = world.lengths[len(world.lengths) // 2 :]
    return sum(settled) / len(settled)


def test_what_catching_up_takes_is_not_what_a_token_takes() -> None:
    """A draft first takes in the prompt, and after a pause what was written meanwhile."""

    def drafted(*, says_behind: bool) -> int:
        world = World(behind=100, catching_up=0.002, says_behind=says_behind)
        world.run(AdaptiveLength(GUESSES), 60)
        return sum(world.lengths)

    assert drafted(says_behind=True) > 30
    assert drafted(says_behind=False) < 5


def test_a_longer_round_trip_makes_longer_drafts() -> None:
    lengths = [length_after(World(round_trip=trip, compute=0.01)) for trip in (0.0, 0.02, 0.08, 0.3)]
    assert lengths == sorted(lengths)
    assert lengths[0] + 3 < lengths[-1] <= MAX_DRAFT


def test_a_better_draft_is_longer_and_a_dearer_one_shorter() -> None:
    assert length_after(World(shares=(0.5, 0.5))) + 2 < length_after(World(shares=(0.9, 0.9)))
    assert length_after(World(draft=0.001)) > length_after(World(draft=0.02)) + 1


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("draft", [0.001, 0.01, 0.05, 0.3])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("round_trip", [0.0, 0.05, 0.2])
def test_never_slower_than_without_beyond_the_bound(
    round_trip: float, share: float, draft: float, noise: float
) -> None:
    n_tokens = 1500
    world = World(round_trip=round_trip, shares=(share, share), draft=draft, noise=noise)
    seconds = world.run(AdaptiveLength(GUESSES), n_tokens)
    without = n_tokens * world.plain
    # The account, its refill, the draft that overdraws it, and the error of what a plain round is taken for.
    last = MAX_DRAFT * draft
    assert seconds <= (1 + 2 * LOSS_SHARE + noise / 10) * without + ALLOWANCE * world.plain + last


def test_a_fixed_length_is_slower_beyond_that_bound() -> None:
    world = World(round_trip=0.0, shares=(0.1, 0.1), draft=0.01)
    seconds = world.run(FixedLength(4), 1500)
    assert seconds > (1 + 2 * LOSS_SHARE) * 1500 * world.plain + ALLOWANCE * world.plain + MAX_DRAFT * world.draft


@pytest.mark.parametrize(
    "world",
    [World(shares=(0.0, 0.0)), World(draft=0.2), World(round_trip=0.0, shares=(0.15, 0.15), draft=0.01)],
    ids=["never right", "dear", "seldom right and nearly as dear"],
)
def test_it_is_off_where_drafts_do_not_pay(world: World) -> None:
    world.run(AdaptiveLength(GUESSES), 3000)
    settled = world.lengths[len(world.lengths) // 2 :]
    wasted = sum(settled) * (world.draft + world.verify)
    assert wasted < 3 * LOSS_SHARE * len(settled) * world.plain


def test_it_comes_back_where_drafts_pay_again() -> None:
    rule = AdaptiveLength(GUESSES)
    bad, good = World(shares=(0.0, 0.0)), World()
    bad.run(rule, 2000)
    assert sum(bad.lengths[-200:]) < 40
    assert sum(bad.lengths[-200:]) > 0  # the probes
    good.run(rule, 1500)
    settled = good.lengths[-100:]
    assert sum(settled) / len(settled) > 2


@pytest.mark.parametrize("round_trip", [0.0, 0.05, 0.15])
@pytest.mark.parametrize("share", [0.4, 0.6, 0.8])
def test_it_is_about_as_fast_as_the_best_fixed_length(round_trip: float, share: float) -> None:
    def seconds(rule: LengthRule) -> float:
        return World(round_trip=round_trip, shares=(share, share), noise=0.1).run(rule, 8000)

    best = min(seconds(FixedLength(length)) for length in (1, 2, 3, 4, 6, 8, 12))
    assert seconds(AdaptiveLength(GUESSES)) < 1.06 * best


def test_tokens_of_which_the_draft_is_sure_make_it_faster_than_any_fixed_length() -> None:
    def seconds(rule: LengthRule) -> float:
        return World(shares=(0.15, 0.97), noise=0.1).run(rule, 4000)

    assert seconds(AdaptiveLength(GUESSES)) < 0.97 * min(seconds(FixedLength(length)) for length in range(MAX_DRAFT))


def test_the_longest_draft_is_bounded() -> None:
    world = World(round_trip=100.0, shares=(1.0, 1.0))
    world.run(AdaptiveLength(GUESSES, max_tokens=3), 500)
    assert max(world.lengths) == 3


def test_a_known_bucket_counts_before_its_token_is_drafted() -> None:
    rule = AdaptiveLength([0.5, 0.5])
    rule.round_over([], 0, 0, 1, (0.0, 1.0))
    rule.token_drafted(0.3)
    for _ in range(100):
        rule.round_over([0, 1], 0, 1, 1, None)
        rule.round_over([1, 1], 2, 2, 3, None)
    assert not rule.wants([], 0)
    assert rule.wants([], 1)
    assert rule.wants([1], 1)
    assert not rule.wants([0], 1)


def test_shares_follow_what_is_seen() -> None:
    calibration = Calibration(GUESSES)
    assert [calibration.share(0), calibration.share(1), calibration.mean] == [0.25, 0.75, 0.5]
    for turn in range(4000):
        calibration.add(turn % 2, turn % 4 != 0)  # the first bucket every second time, the second always
    assert calibration.share(0) == pytest.approx(0.5, abs=0.02)
    assert calibration.share(1) == pytest.approx(1.0, abs=0.02)
    assert calibration.mean == pytest.approx(0.75, abs=0.03)
    for _ in range(400):
        calibration.add(1, False)
    assert calibration.share(1) < 0.1


def test_the_line_of_a_round_s_seconds() -> None:
    line = RoundSeconds()
    assert (line.known, line.at(3), line.slope) == (False, 0.0, 0.0)
    line.add(2, 0.1)
    assert (line.at(0), line.at(5)) == (0.1, 0.1)  # what was not seen is taken for none
    for drafted in [0, 4, 1, 8, 2, 6] * 20:
        line.add(drafted, 0.08 + 0.003 * drafted)
    assert line.at(0) == pytest.approx(0.08, rel=0.02)
    assert line.slope == pytest.approx(0.003, rel=0.05)
    falling = RoundSeconds()
    for drafted in [0, 4] * 20:
        falling.add(drafted, 0.1 - 0.01 * drafted)
    assert falling.slope == 0


def test_a_line_that_reaches_down_to_zero_rises_again() -> None:
    line = RoundSeconds()
    line.add(4, 0.1)
    line.add(8, 0.4)
    line.add(8, 0.9)
    assert line.at(0) == 0
    for _ in range(50):
        line.add(0, 0.08)
    assert line.at(0) == pytest.approx(0.08, rel=0.1)
    mean = MeanSeconds()
    for seconds in (0.0, 0.2):  # a clock may be too coarse for the first one
        mean.add(seconds)
    assert mean.value == pytest.approx(0.1, rel=0.1)


def test_one_long_wait_counts_as_a_bounded_one_and_a_slow_link_is_believed() -> None:
    line, mean = RoundSeconds(), MeanSeconds()
    for each in (0.1, 0.1, 0.1):
        line.add(0, each)
        mean.add(each)
    assert line.add(0, 60.0) == pytest.approx(OUTLIER * 0.1)
    mean.add(60.0)
    assert line.at(0) < 0.2
    assert mean.value is not None
    assert mean.value < 0.2
    for _ in range(200):
        line.add(0, 5.0)
        mean.add(5.0)
    assert line.at(0) == pytest.approx(5.0, rel=0.1)
    assert mean.value == pytest.approx(5.0, rel=0.1)
