"""Attacks on texts and labels, each judged beside the truth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from isthmus.privacy.attacks.attack import Attack, Guess, Knowledge
from isthmus.privacy.attacks.labels.gradient_labels import DirectLabels, ExactLabels
from isthmus.privacy.attacks.learned_inverter import LearnedInverter
from isthmus.privacy.attacks.nearest_neighbour import NearestNeighbour
from isthmus.privacy.attacks.ridge_inversion import RidgeInversion
from isthmus.privacy.attacks.vocabulary_matching import VocabularyMatching
from isthmus.privacy.measures.bootstrap import Interval, mean_interval, share_interval
from isthmus.privacy.measures.planted_secrets import decoded, secret_hits
from isthmus.privacy.measures.rouge import rouge_l
from isthmus.privacy.measures.token_accuracy import Hits, rare_tokens, token_hits
from isthmus.privacy.recording.traffic import Traffic

TOKEN_ATTACKS: dict[str, Callable[[], Attack]] = {
    attack.name: attack for attack in (NearestNeighbour, RidgeInversion, LearnedInverter, VocabularyMatching)
}
LABEL_ATTACKS: dict[str, Callable[[], Attack]] = {attack.name: attack for attack in (DirectLabels, ExactLabels)}

RARE_BELOW = 1e-4
"""A token is rare if it is less than this share of the public texts."""

Front = Literal["known", "tuned"]
"""`known`: the attacker has the front that the edge runs. `tuned`: a private front, which the
edge has tuned and keeps to itself."""


@dataclass(frozen=True, slots=True)
class Truth:
    """What was sent, which an attack is judged by.

    Attributes:
        tokens: As `Guess.tokens`: `[sequence]` for each row of each forward, -1 for padding.
        labels: As `Guess.labels`: for each row of each backward the token that each position learns to predict, -1
            where none; empty where no gradient went up.
        secrets: Strings planted in each row of `tokens`; empty for none at all.
    """

    tokens: tuple[Tensor, ...]
    labels: tuple[Tensor, ...] = ()
    secrets: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Judged:
    """What an attack got.

    Attributes:
        attack: Its name.
        front: What it knows of the edge's layers.
        token_accuracy: Share of tokens that are right.
        rare_accuracy: The same of rare tokens; None where the texts have none.
        secret_recall: Share of planted secrets that the guess holds letter by letter; None where none are planted.
        rouge_l: Mean over the texts.
        label_accuracy: Share of labels that are right, for attacks on labels; None for others.
        coarse_recall: Share of positions whose list of candidates held the right token, by the attacker's own
            estimate; for attacks on labels of public texts. None for attacks without lists.
    """

    attack: str
    front: Front
    token_accuracy: Interval | None = None
    rare_accuracy: Interval | None = None
    secret_recall: Interval | None = None
    rouge_l: Interval | None = None
    label_accuracy: Interval | None = None
    coarse_recall: Interval | None = None


def judge_tokens(attack: str, front: Front, guess: Guess, knowledge: Knowledge, truth: Truth) -> Judged:
    """How much of a guess of the texts is right."""
    rare = token_hits(
        guess.tokens, truth.tokens, rare=rare_tokens(knowledge.public, knowledge.n_tokens, below=RARE_BELOW)
    )
    texts = [
        decoded(knowledge.tokenizer, tokens[true >= 0]) for tokens, true in zip(guess.tokens, truth.tokens, strict=True)
    ]
    sent = [decoded(knowledge.tokenizer, true[true >= 0]) for true in truth.tokens]
    return Judged(
        attack,
        front,
        token_accuracy=share_interval(token_hits(guess.tokens, truth.tokens)),
        rare_accuracy=share_interval(rare) if rare.of.sum() else None,
        secret_recall=share_interval(secret_hits(texts, truth.secrets)) if any(truth.secrets) else None,
        rouge_l=mean_interval(torch.tensor([rouge_l(ours, theirs) for ours, theirs in zip(texts, sent, strict=True)])),
        coarse_recall=_coarse_recall(guess),
    )


def judge_labels(attack: str, front: Front, guess: Guess, truth: Truth) -> Judged:
    """How much of a guess of the labels is right."""
    accuracy = share_interval(token_hits(guess.labels or (), truth.labels))
    return Judged(attack, front, label_accuracy=accuracy, coarse_recall=_coarse_recall(guess))


def _coarse_recall(guess: Guess) -> Interval | None:
    if guess.listed is None or not sum(len(each) for each in guess.listed):
        return None
    sums, counts = ([float(count(each)) for each in guess.listed] for count in (torch.sum, len))
    return share_interval(Hits(torch.tensor(sums, dtype=torch.float64), torch.tensor(counts, dtype=torch.float64)))


def guess_of(make: Callable[[], Attack], knowledge: Knowledge, traffic: Traffic) -> Guess:
    """What a fresh attack makes of the traffic."""
    attack = make()
    attack.prepare(knowledge)
    return attack.run(traffic)
