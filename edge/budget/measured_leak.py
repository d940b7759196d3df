"""What the attacks got of a rehearsal, in numbers and in a line."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from isthmus.privacy.attacks.attack import Attack, Guess, Knowledge
from isthmus.privacy.attacks.averaging import AveragedMatching
from isthmus.privacy.ledger.judged_attacks import (
    LABEL_ATTACKS,
    TOKEN_ATTACKS,
    Judged,
    Truth,
    judge_labels,
    judge_tokens,
)
from isthmus.privacy.measures.bootstrap import Interval
from isthmus.privacy.recording.traffic import Traffic

NO_GRADIENTS = "no gradients"

Between = Callable[[str, int, int], None]
"""Called with an attack's name, the calls that it has attacked, and all of them."""


@dataclass(frozen=True, slots=True)
class Leak:
    """What a run gives up in one channel.

    Attributes:
        channel: `tokens` or `labels`.
        attack: The one with the largest upper bound; where nothing is sent, why.
        measured: The share that it got of what is attacked.
        bound: Its upper 95 % bound.
        share: Of private texts that the run sends.
        recovered: Secrets that any attack got, and all that were looked for.
    """

    channel: str
    attack: str
    measured: float
    bound: float
    share: float
    recovered: tuple[int, int] = (0, 0)

    @property
    def value(self) -> float:
        """What a budget limits."""
        return self.bound * self.share

    def text(self) -> str:
        """For a person."""
        if self.attack == NO_GRADIENTS:
            return f"{self.channel} 0 ({self.attack})"
        text = f"{self.channel} ≤ {self.value:.2f} ({self.attack})"
        found, of = self.recovered
        return f"{text}, {found} of {of} secrets" if of else text


def token_leak(
    knowledge: Knowledge, passes: Sequence[Traffic], truth: Truth, share: float, limit: float, between: Between
) -> Leak:
    """Attack the texts, the quick attacks first, until one breaks the limit.

    Args:
        passes: What goes up of the same texts in each pass of the run; of several passes, attacks take the first one
            alone, or the mean.
        limit: What the budget allows.
        between: Called between the parts of the work; what it raises ends it.
    """
    judged: list[Judged] = []
    for name, make in TOKEN_ATTACKS.items():
        guess = _guess(make(), name, knowledge, passes[0], between)
        judged.append(judge_tokens(name, "known", guess, knowledge, truth))
        if (found := _worst("tokens", judged, share, truth)).value > limit:
            return found
    if len(passes) > 1:
        averaged, together = AveragedMatching(), passes[0]
        between(averaged.name, 0, 1)
        averaged.prepare(knowledge)
        for each in passes[1:]:
            together = replace(together, forwards=together.forwards + each.forwards)
        guess = averaged.run(together)
        first = Guess(guess.tokens[: len(truth.tokens)], guess.coarse_recall)
        judged.append(judge_tokens(averaged.name, "known", first, knowledge, truth))
    return _worst("tokens", judged, share, truth)


def label_leak(
    knowledge: Knowledge, traffic: Traffic, truth: Truth, share: float, limit: float, between: Between
) -> Leak:
    """Attack the labels. Arguments as of `token_leak`; the traffic has gradients."""
    judged: list[Judged] = []
    for name, make in LABEL_ATTACKS.items():
        judged.append(judge_labels(name, "known", _guess(make(), name, knowledge, traffic, between), truth))
        if _worst("labels", judged, share, truth).value > limit:
            break
    return _worst("labels", judged, share, truth)


def _worst(channel: str, judged: Sequence[Judged], share: float, truth: Truth) -> Leak:
    def got(each: Judged) -> Interval:
        interval = each.token_accuracy if channel == "tokens" else each.label_accuracy
        return interval or Interval(0, 0, 0)

    most = max(judged, key=lambda each: (got(each).high, got(each).value))
    planted = sum(map(len, truth.secrets))
    found = max((round(each.secret_recall.value * planted) for each in judged if each.secret_recall), default=0)
    return Leak(channel, most.attack, got(most).value, got(most).high, share, (found, planted))


def _guess(attack: Attack, name: str, knowledge: Knowledge, traffic: Traffic, between: Between) -> Guess:
    """One call after the other, so that there is progress, and Ctrl-C is heard."""
    calls = list(_calls(traffic))
    between(name, 0, len(calls))
    attack.prepare(knowledge)
    guesses = []
    for number, call in enumerate(calls, 1):
        guesses.append(attack.run(call))
        between(name, number, len(calls))
    recalls = [guess.coarse_recall for guess in guesses if guess.coarse_recall is not None]
    labels = [row for guess in guesses for row in guess.labels or ()]
    return Guess(
        tuple(row for guess in guesses for row in guess.tokens),
        sum(recalls) / len(recalls) if recalls else None,
        tuple(labels) or None,
    )


def _calls(traffic: Traffic) -> Iterator[Traffic]:
    """Each call by itself, with its backward."""
    backwards = {backward.call: backward for backward in traffic.backwards}
    for forward in traffic.forwards:
        backward = backwards.get(forward.call)
        yield replace(traffic, forwards=(forward,), backwards=() if backward is None else (backward,))
