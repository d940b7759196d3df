from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.models.tiny import VOCAB
from support.privacy.attacked import Attacked, GaussianNoise, attacked, tiny_model

from isthmus.privacy.attacks.attack import UNKNOWN, Guess
from isthmus.privacy.attacks.front import Front
from isthmus.privacy.attacks.vocabulary_matching import VocabularyMatching


@pytest.mark.parametrize(
    ("family", "bottom", "codec"),
    [
        ("llama", 0, "fp32"),
        ("llama", 2, "fp32"),
        ("llama", 2, "int8"),
        ("llama", 2, "int4"),
        ("gemma3_text", 4, "fp32"),
        ("gpt2", 2, "fp32"),
        ("opt", 2, "fp32"),
    ],
)
def test_every_token_is_found(family: str, bottom: int, codec: str) -> None:
    case = attacked(family, bottom=bottom, codec=codec)
    guess = case.attack(VocabularyMatching())
    assert case.accuracy(guess) == 1
    assert _listed(guess) == pytest.approx(1, abs=0.01)


def test_noise_is_looked_through() -> None:
    states = attacked().traffic.forwards[0].hidden
    case = attacked(defence=GaussianNoise(float(states.std()) * 0.3))
    assert case.accuracy(case.attack(VocabularyMatching())) > 0.95
    drowned = attacked(defence=GaussianNoise(float(states.std()) * 30))  # the control
    assert drowned.accuracy(drowned.attack(VocabularyMatching())) < 0.1


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_padding_is_left_out(family: str, left: bool) -> None:
    case = attacked(family)
    forward = case.traffic.forwards[0]
    mask = torch.ones(forward.hidden.shape[:2], dtype=torch.bool)
    pad = forward.hidden.new_ones(len(mask), 3, forward.hidden.shape[2])
    sides = (lambda a, b: (b, a)) if left else (lambda a, b: (a, b))
    padded = replace(
        forward,
        hidden=torch.cat(sides(forward.hidden, pad), 1),
        mask=torch.cat(sides(mask, torch.zeros(len(mask), 3, dtype=torch.bool)), 1),
    )
    guess = replace(case, traffic=replace(case.traffic, forwards=(padded,))).attack(VocabularyMatching())
    kept = slice(3, None) if left else slice(None, -3)
    found = replace(guess, tokens=tuple(row[kept] for row in guess.tokens))
    assert case.accuracy(found) == 1
    assert all((row == UNKNOWN).sum() == 3 for row in guess.tokens)


def _listed(guess: Guess) -> float:
    assert guess.listed is not None
    return float(torch.cat(guess.listed).mean())


def _wrong_front() -> Attacked:
    return attacked().knowing(front=Front(tiny_model("llama", seed=9), 2))


@pytest.mark.parametrize("case", [_wrong_front(), attacked().shuffled()], ids=["wrong front", "shuffled"])
def test_it_fails_where_it_must_and_says_so(case: Attacked) -> None:
    guess = case.attack(VocabularyMatching())
    assert case.accuracy(guess) < 0.1
    assert _listed(guess) < 0.2


def test_what_the_coarse_map_misses_is_found_in_the_vocabulary() -> None:
    case = attacked()
    attack = VocabularyMatching()
    attack.prepare(case.knowledge)
    ranked = attack._map.scores

    class Worst:
        def scores(self, hidden: torch.Tensor) -> torch.Tensor:
            return -ranked(hidden)

    attack._map = Worst()
    assert case.accuracy(attack.run(case.traffic)) == 1
    assert VOCAB > 32  # the right one is near the end of the lists
