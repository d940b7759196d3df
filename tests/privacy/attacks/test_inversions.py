"""Nearest neighbour, ridge inversion and the learned inverter: one shape, one test."""

from __future__ import annotations

import pytest
import torch
from support.privacy.attacked import attacked

from isthmus.common.errors import ConfigError
from isthmus.privacy.attacks.attack import Attack, Guess
from isthmus.privacy.attacks.coarse_maps import inverter_of
from isthmus.privacy.attacks.learned_inverter import LearnedInverter
from isthmus.privacy.attacks.nearest_neighbour import NearestNeighbour
from isthmus.privacy.attacks.ridge_inversion import RidgeInversion


# The model is random, and its states have 32 channels, so that one layer hides more than it does in a real model; there
# are 256 tokens. The three find 0.20, 0.75 and 0.82 of them: the first knows the table of embeddings alone. The last
# has 40 steps on 50 texts, and finds no more with 160.
@pytest.mark.parametrize(
    ("attack", "enough"), [(NearestNeighbour(), 0.15), (RidgeInversion(), 0.7), (LearnedInverter(), 0.7)]
)
def test_an_inversion_finds_many_tokens_after_one_layer(attack: Attack, enough: float) -> None:
    case = attacked("gpt2", bottom=1)
    guess = case.attack(attack)
    assert isinstance(guess, Guess)
    assert case.accuracy(guess) > enough
    assert case.shuffled().accuracy(attack.run(case.shuffled().traffic)) < enough / 4  # the control


def test_a_learned_inverter_depends_on_its_seed_alone() -> None:
    hidden = attacked().traffic.forwards[0].hidden[0]
    torch.manual_seed(8)
    first = inverter_of(attacked().knowledge).scores(hidden)
    torch.manual_seed(9)
    assert torch.equal(inverter_of(attacked().knowledge).scores(hidden), first)
    assert not torch.equal(inverter_of(attacked().knowing(seed=1).knowledge).scores(hidden), first)


def test_too_little_public_text_is_refused() -> None:
    with pytest.raises(ConfigError, match="1 public texts"):
        attacked().knowing(public=(torch.tensor([5, 6]),))
