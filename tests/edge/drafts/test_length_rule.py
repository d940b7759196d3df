"""The length of a draft, in simulations whose seconds and acceptances are made up."""

from __future__ import annotations

import random
import statistics
from dataclasses import dataclass, field

import pytest

from isthmus.edge.drafts.calibration import Calibration
from isthmus.edge.drafts.length_rule import (
    ALLOWANCE,
    FIRST_TOKENS,
    LOSS_SHARE,
    MAX_DRAFT,
    AdaptiveLength,
    FixedLength,
    LengthRule,
    VerifiedRound,
)
from isthmus.edge.drafts.round_seconds import RecentMedian, RoundSeconds

GUESSES = [0.25, 0.75]


@dataclass
class World:
    """What generating costs, in seconds, and how often tokens are accepted.

    Attributes:
        rates: What part of the tokens is accepted, by bucket; both buckets are equally frequent.
        noise: Relative deviation of the seconds.
        text_tokens: Of each text; 0 for one text without end.
        prompt: Tokens of each prompt, which the draft takes in when it first drafts for a text.
        behind: Tokens of the text that the draft has not taken in.
        catching_up: Seconds for each of them.
    """

    round_trip: float = 0.05
    compute: float = 0.03
    verify: float = 0.002
    draft: float = 0.005
    rates: tuple[float, float] = (0.8, 0.8)
    noise: float = 0.0
    text_tokens: int = 0
    prompt: int = 0
    behind: int = 0
    catching_up: float = 0.0
    random: random.Random = field(default_factory=lambda: random.Random(3))  # noqa: S311  # a simulation
    lengths: list[int] = field(default_factory=list)

    @property
    def plain(self) -> float:
        """Seconds of a round without a draft."""
        return self.round_trip + self.compute

    def run(self, rule: LengthRule, n_tokens: int) -> float:
        """The seconds that so many tokens take."""
        seconds, tokens, texts = 0.0, 0, 0
        while tokens < n_tokens:
            at_prompt = self.text_tokens > 0 and tokens >= texts * self.text_tokens
            if at_prompt:
                texts += 1
                self.behind = self.prompt
            buckets: list[int] = []
            drafting = 0.0
            while rule.should_draft(buckets, None):
                took = self._noisy(self.draft + self.catching_up * self.behind)
                rule.token_drafted(took)
                self.behind = 0
                drafting += took
                buckets.append(self.random.randrange(2))
            accepted = 0
            while accepted < len(buckets) and self.random.random() < self.rates[buckets[accepted]]:
                accepted += 1
            verifying = self._noisy(self.plain + self.verify * len(buckets))
            timed = None if at_prompt else verifying
            rule.round_over(VerifiedRound(buckets, accepted, accepted + 1, drafting, timed))
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
    """A draft first takes in the prompt of each text."""

    class RecentMean(RecentMedian):
        @property
        def value(self) -> float:
            return statistics.mean(self._recent) if self._recent else 0.0

    def length(durations: RecentMedian) -> float:
        world, rule = World(text_tokens=60, prompt=100, catching_up=0.01), AdaptiveLength(GUESSES)
        rule.draft = durations
        world.run(rule, 1200)
        return statistics.mean(world.lengths[30:])

    assert length(RecentMedian()) > 2
    assert length(RecentMean()) < 0.7 * length(RecentMedian())


def test_a_long_prompt_that_pays_is_caught_up_with() -> None:
    """Catching up takes more than the allowance, and the text is long enough."""
    world = World(text_tokens=60, prompt=100, catching_up=0.01)
    assert world.prompt * world.catching_up > ALLOWANCE * world.plain
    assert world.run(AdaptiveLength(GUESSES), 6000) < 0.7 * 6000 * world.plain


def test_a_probe_is_paid_for_with_what_verifying_it_takes() -> None:
    """A draft that takes nothing itself, and is never right."""
    world = World(draft=0.0, verify=0.02, rates=(0.0, 0.0))
    world.run(AdaptiveLength(GUESSES), 3000)
    settled = world.lengths[1000:]
    assert 0 < sum(settled) * world.verify < 2 * LOSS_SHARE * len(settled) * world.plain


def test_what_catching_up_takes_is_lost_time() -> None:
    class Uncharged(AdaptiveLength):
        def round_over(self, verified: VerifiedRound) -> None:
            if verified.verifying_s is not None:
                super().round_over(verified)

    def seconds(rule: LengthRule) -> float:
        return World(text_tokens=6, prompt=100, catching_up=0.004).run(rule, 1500)

    without, bound = 1500 * 0.08, 1500 * 0.08 * (1 + 2 * LOSS_SHARE) + (ALLOWANCE + 1) * 0.08 + 0.4
    assert without < seconds(AdaptiveLength(GUESSES)) < bound
    assert seconds(Uncharged(GUESSES)) > 1.1 * bound


def test_a_longer_round_trip_makes_longer_drafts() -> None:
    lengths = [length_after(World(round_trip=trip, compute=0.01)) for trip in (0.0, 0.02, 0.08, 0.3)]
    assert lengths == sorted(lengths)
    assert lengths[0] + 3 < lengths[-1] <= MAX_DRAFT


def test_a_better_draft_is_longer_and_a_dearer_one_shorter() -> None:
    assert length_after(World(rates=(0.5, 0.5))) + 2 < length_after(World(rates=(0.9, 0.9)))
    assert length_after(World(draft=0.001)) > length_after(World(draft=0.02)) + 1


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("draft", [0.001, 0.01, 0.05, 0.3])
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("round_trip", [0.0, 0.05, 0.2])
@pytest.mark.long
def test_never_slower_than_without_beyond_the_bound(round_trip: float, rate: float, draft: float, noise: float) -> None:
    n_tokens = 1500
    world = World(round_trip=round_trip, rates=(rate, rate), draft=draft, noise=noise)
    seconds = world.run(AdaptiveLength(GUESSES), n_tokens)
    without = n_tokens * world.plain
    # The account, its refill, the draft that overdraws it, and the error of what a plain round is taken for.
    last = MAX_DRAFT * draft
    assert seconds <= (1 + 2 * LOSS_SHARE + noise / 10) * without + ALLOWANCE * world.plain + last


def test_a_fixed_length_is_slower_beyond_that_bound() -> None:
    world = World(round_trip=0.0, rates=(0.1, 0.1), draft=0.01)
    seconds = world.run(FixedLength(4), 1500)
    assert seconds > (1 + 2 * LOSS_SHARE) * 1500 * world.plain + ALLOWANCE * world.plain + MAX_DRAFT * world.draft


@pytest.mark.parametrize(
    "world",
    [World(rates=(0.0, 0.0)), World(draft=0.2), World(round_trip=0.0, rates=(0.15, 0.15), draft=0.01)],
    ids=["never right", "dear", "seldom right and nearly as dear"],
)
def test_it_is_off_where_drafts_do_not_pay(world: World) -> None:
    world.run(AdaptiveLength(GUESSES), 3000)
    settled = world.lengths[len(world.lengths) // 2 :]
    wasted = sum(settled) * (world.draft + world.verify)
    assert wasted < 3 * LOSS_SHARE * len(settled) * world.plain


def test_it_comes_back_where_drafts_pay_again() -> None:
    rule = AdaptiveLength(GUESSES)
    bad, good = World(rates=(0.0, 0.0)), World()
    bad.run(rule, 2000)
    assert sum(bad.lengths[-200:]) < 40
    assert sum(bad.lengths[-200:]) > 0  # the probes
    good.run(rule, 1500)
    settled = good.lengths[-100:]
    assert sum(settled) / len(settled) > 2


@pytest.mark.parametrize("round_trip", [0.0, 0.05, 0.15])
@pytest.mark.parametrize("rate", [0.4, 0.6, 0.8])
@pytest.mark.long
def test_it_is_about_as_fast_as_the_best_fixed_length(round_trip: float, rate: float) -> None:
    def seconds(rule: LengthRule) -> float:
        return World(round_trip=round_trip, rates=(rate, rate), noise=0.1).run(rule, 8000)

    best = min(seconds(FixedLength(length)) for length in (1, 2, 3, 4, 6, 8, 12))
    assert seconds(AdaptiveLength(GUESSES)) < 1.06 * best


def test_tokens_of_which_the_draft_is_sure_make_it_faster_than_any_fixed_length() -> None:
    def seconds(rule: LengthRule) -> float:
        return World(rates=(0.15, 0.97), noise=0.1).run(rule, 4000)

    assert seconds(AdaptiveLength(GUESSES)) < 0.97 * min(seconds(FixedLength(length)) for length in range(MAX_DRAFT))


def test_the_longest_draft_is_bounded() -> None:
    world = World(round_trip=100.0, rates=(1.0, 1.0))
    world.run(AdaptiveLength(GUESSES, max_tokens=3), 500)
    assert max(world.lengths) == 3


def test_a_known_bucket_counts_before_its_token_is_drafted() -> None:
    rule = AdaptiveLength([0.5, 0.5])
    rule.round_over(VerifiedRound([], 0, 1, 0.0, 1.0))
    for _ in range(FIRST_TOKENS):
        rule.token_drafted(0.3)
    for _ in range(100):
        rule.round_over(VerifiedRound([0, 1], 0, 1, 0.6, None))
        rule.round_over(VerifiedRound([1, 1], 2, 3, 0.6, None))
    assert not rule.should_draft([], 0)
    assert rule.should_draft([], 1)
    assert rule.should_draft([1], 1)
    assert not rule.should_draft([0], 1)


def test_rates_follow_what_is_seen() -> None:
    calibration = Calibration(GUESSES)
    assert [calibration.rate(0), calibration.rate(1), calibration.mean_rate] == [0.25, 0.75, 0.5]
    for turn in range(4000):
        calibration.add(turn % 2, turn % 4 != 0)  # the first bucket every second time, the second always
    assert calibration.rate(0) == pytest.approx(0.5, abs=0.02)
    assert calibration.rate(1) == pytest.approx(1.0, abs=0.02)
    assert calibration.mean_rate == pytest.approx(0.75, abs=0.03)
    for _ in range(400):
        calibration.add(1, False)
    assert calibration.rate(1) < 0.1


def test_the_line_of_a_round_s_seconds() -> None:
    line = RoundSeconds()
    assert (len(line), line.at(3), line.slope) == (0, 0.0, 0.0)
    line.add(2, 0.1)
    assert (line.at(0), line.at(5)) == (0.1, 0.1)  # what was not seen is taken for none
    for drafted in [0, 4, 1, 8, 2, 6] * 20:
        line.add(drafted, 0.08 + 0.003 * drafted)
    assert line.at(0) == pytest.approx(0.08)
    assert line.slope == pytest.approx(0.003)
    falling = RoundSeconds()
    for drafted in [0, 4] * 20:
        falling.add(drafted, 0.1 - 0.01 * drafted)
    assert falling.slope == 0


def test_long_waits_move_neither_line_nor_median_and_a_slow_link_is_believed() -> None:
    line, draft = RoundSeconds(), RecentMedian()
    assert (draft.value, draft.least) == (0.0, 0.0)
    for number in range(60):
        waits = 60.0 if number % 6 == 0 else 0.0
        line.add(number % 5, 0.1 + 0.002 * (number % 5) + waits)
        draft.add(0.01 + waits)
    assert line.at(0) == pytest.approx(0.1, rel=0.05)
    assert line.slope == pytest.approx(0.002, rel=0.2)
    assert (draft.value, draft.least) == (0.01, 0.01)
    for number in range(64):
        line.add(number % 5, 5.0 + 0.002 * (number % 5))
        draft.add(0.02)
    assert line.at(0) == pytest.approx(5.0)
    assert draft.value == 0.02
