"""What the attacks got of a rehearsal, in numbers and in a line."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from isthmus.privacy.attacks.attack import UNKNOWN, Attack, Guess, Knowledge
from isthmus.privacy.attacks.averaging import AveragedMatching, mean_of
from isthmus.privacy.ledger.judged_attacks import (
    LABEL_ATTACKS,
    TOKEN_ATTACKS,
    Judged,
    Truth,
    judge_labels,
    judge_tokens,
)
from isthmus.privacy.measures.bootstrap import Interval, share_interval
from isthmus.privacy.measures.token_accuracy import token_hits
from isthmus.privacy.recording.traffic import Traffic

NO_PATH = "answers withheld, the front is not trained"
"""Why no label reaches the cloud: nothing that is sent depends on any."""
SLOPES = "not measured: mezo moves the front by the labels"
"""Why all labels are taken to be read."""

Between = Callable[[str, int, int], None]
"""Called with an attack's name, the calls that it has attacked, and all of them."""

Enough = Callable[[Sequence[Judged]], bool]
"""Told of the attacks so far; true where no other is needed."""


@dataclass(frozen=True, slots=True)
class Leak:
    """What a run gives up in one channel.

    Attributes:
        channel: `tokens` or `labels`.
        attack: The one with the largest upper bound; where none was made, why.
        measured: The share that it got of what is attacked.
        bound: Its upper 95 % bound, at least the 3 / n of n texts without a hit: a hit must not lower it, and the
            bootstrap's interval alone would let a few hits do so.
        share: Of private texts that the run sends. A budget does not go by it: a text is no safer for others that
            stay here.
        recovered: Secrets that any attack got, and all that were looked for.
        listed: The share of positions whose right token was in the attack's lists of candidates, by its own estimate;
            None where it has no lists. A small one says that more public texts may find more.
    """

    channel: str
    attack: str
    measured: float
    bound: float
    share: float
    recovered: tuple[int, int] = (0, 0)
    listed: float | None = None

    @property
    def value(self) -> float:
        """What a budget limits: the rate of a text that is sent."""
        return self.bound

    @property
    def rate(self) -> str:
        """The bound for a person; where the run sends some of the texts alone, also as a share of all texts."""
        if self.share == 1:
            return f"{self.bound:.2f}"
        return f"{self.bound:.2f} of a text that is sent, {self.bound * self.share:.2f} of all"

    def text(self) -> str:
        """For a person."""
        if self.attack == NO_PATH:
            return f"{self.channel} 0 ({self.attack})"
        text = f"{self.channel} ≤ {self.rate} ({self.attack})"
        found, of = self.recovered
        return f"{text}, {found} of {of} secrets" if of else text


def attack_texts(
    knowledge: Knowledge,
    first: Traffic,
    others: Iterable[Traffic],
    truth: Truth,
    answers: Sequence[Tensor],
    enough: Enough,
    between: Between,
) -> tuple[list[Judged], tuple[Tensor, ...]]:
    """Attack the texts, the quick attacks first; each gives tokens, and labels where they are among the tokens.

    Args:
        first: What goes up of the texts in one pass of the run, which attacks take alone.
        others: The same of each other pass that says more, made as it is taken; one attack takes the mean of all.
        answers: Of each row of `truth.tokens` the labels where they stand, -1 elsewhere.
        enough: Whether the attacks so far are.
        between: Called between the parts of the work; what it raises ends it.

    Returns:
        What each attack got, and the tokens that the last one guesses.
    """
    judged: list[Judged] = []
    guess = Guess(())
    for name, make in TOKEN_ATTACKS.items():
        guess = _guess(make(), name, knowledge, first, between)
        judged.append(_judged(name, guess.tokens, knowledge, truth, answers, guess.listed))
        if enough(judged):
            return judged, guess.tokens
    mean, counted = mean_of(chain([first], others))
    if counted > 1:
        name = AveragedMatching.name
        guess = _guess(AveragedMatching(counted), name, knowledge, mean, between)
        judged.append(_judged(name, guess.tokens, knowledge, truth, answers, guess.listed))
    return judged, guess.tokens


def attack_learned_texts(
    knowledge: Knowledge,
    traffic: Traffic,
    guessed: Sequence[Tensor],
    truth: Truth,
    answers: Sequence[Tensor],
    enough: Enough,
    between: Between,
) -> list[Judged]:
    """Attack the texts by the gradients of `traffic`: what is learned are tokens of the text.

    Args:
        guessed: The tokens that an attack on hidden states guesses, of which those that gradients tell are replaced.
        truth, answers, enough, between: As of `attack_texts`.
    """
    judged: list[Judged] = []
    for name, make in LABEL_ATTACKS.items():
        found = _guess(make(), name, knowledge, traffic, between).labels or ()
        tokens = []
        for text, labels, places in zip(guessed, found, answers, strict=True):
            told = torch.cat([labels.new_full((1,), UNKNOWN), labels[:-1]])  # where the label stands as a token
            tokens.append(torch.where((places >= 0) & (told != UNKNOWN), told, text))  # places are the attacker's, too
        judged.append(_judged(name, tokens, knowledge, truth, answers))
        if enough(judged):
            break
    return judged


def _judged(
    name: str,
    tokens: Sequence[Tensor],
    knowledge: Knowledge,
    truth: Truth,
    answers: Sequence[Tensor],
    listed: tuple[Tensor, ...] | None = None,
) -> Judged:
    found = judge_tokens(name, "known", Guess(tuple(tokens), listed), knowledge, truth)
    return replace(found, label_accuracy=share_interval(token_hits(tokens, answers)))


def attack_gradients(
    knowledge: Knowledge, traffic: Traffic, truth: Truth, enough: Enough, between: Between
) -> list[Judged]:
    """Attack the labels by the gradients of `traffic`. Arguments as of `attack_texts`."""
    judged: list[Judged] = []
    for name, make in LABEL_ATTACKS.items():
        judged.append(judge_labels(name, "known", _guess(make(), name, knowledge, traffic, between), truth))
        if enough(judged):
            break
    return judged


def worst_leak(channel: str, judged: Sequence[Judged], share: float, truth: Truth) -> Leak:
    """What the strongest attack got in a channel."""

    def got(each: Judged) -> Interval:
        interval = each.token_accuracy if channel == "tokens" else each.label_accuracy
        return interval or Interval(0, 0, 0)

    most = max(judged, key=lambda each: (got(each).high, got(each).value))
    planted = sum(map(len, truth.secrets)) if channel == "tokens" else 0
    found = max((round(each.secret_recall.value * planted) for each in judged if each.secret_recall), default=0)
    attacked = sum(bool((row >= 0).any()) for row in truth.tokens or truth.labels)
    bound = max(got(most).high, min(1.0, 3 / attacked))
    listed = None if most.coarse_recall is None else most.coarse_recall.value
    return Leak(channel, most.attack, got(most).value, bound, share, (found, planted), listed)


def _guess(attack: Attack, name: str, knowledge: Knowledge, traffic: Traffic, between: Between) -> Guess:
    """One call after the other, so that there is progress, and Ctrl-C is heard."""
    calls = list(_calls(traffic))
    between(name, 0, len(calls))
    attack.prepare(knowledge)
    guesses = []
    for number, call in enumerate(calls, 1):
        guesses.append(attack.run(call))
        between(name, number, len(calls))
    listed = [row for guess in guesses for row in guess.listed or ()]
    labels = [row for guess in guesses for row in guess.labels or ()]
    return Guess(
        tuple(row for guess in guesses for row in guess.tokens),
        tuple(listed) or None,
        tuple(labels) or None,
    )


def _calls(traffic: Traffic) -> Iterator[Traffic]:
    """Each call by itself, with its backward."""
    backwards = {backward.call: backward for backward in traffic.backwards}
    for forward in traffic.forwards:
        backward = backwards.get(forward.call)
        yield replace(traffic, forwards=(forward,), backwards=() if backward is None else (backward,))
