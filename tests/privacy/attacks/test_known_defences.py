"""What an edge sends under each defence, and an attacker who knows the defence and not its key."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.models.tiny import HIDDEN
from support.privacy.attacked import LENGTH, Attacked, attacked
from torch import Tensor

from isthmus.common.errors import ConfigError
from isthmus.privacy.attacks.averaging import AveragedMatching, mean_of
from isthmus.privacy.attacks.known_defences import KnownDefences
from isthmus.privacy.attacks.vocabulary_matching import VocabularyMatching
from isthmus.privacy.defences.defence import Defence, Pass
from isthmus.privacy.defences.defence_options import read_defence
from isthmus.privacy.defences.defended_span import build_defences
from isthmus.privacy.defences.secret_noise import KEY_BYTES, SecretNoise


def defences(text: str) -> list[Defence]:
    return build_defences([read_defence(text)], HIDDEN)


def defended(case: Attacked, text: str, passes: int = 1) -> Attacked:
    """The same with what an edge with this defence sends of its texts, in one micro-batch a pass."""
    made, front, forwards = defences(text), case.knowledge.front, []
    for turn in range(passes):

        def about(ids: Tensor, turn: int = turn) -> Pass:
            return Pass(SecretNoise(b"k" * KEY_BYTES), (turn,), ids, torch.ones_like(ids, dtype=torch.bool))

        def states(tokens: Tensor) -> Tensor:
            with front.changed_embedding(lambda found: made[0].embedded(found, about(tokens[None]))):
                return front.states(tokens)

        hidden = torch.stack([states(tokens) for tokens in case.texts])
        hidden = made[0].hidden(hidden, about(torch.stack(case.texts))).detach()
        forwards.append(replace(case.traffic.forwards[0], call=turn, hidden=hidden))
    return replace(case, texts=case.texts * passes, traffic=replace(case.traffic, forwards=tuple(forwards)))


def knowing(case: Attacked, text: str) -> Attacked:
    def others() -> list[Tensor]:
        return [each.exact for each in case.knowledge.public_texts]

    return case.knowing(defence=KnownDefences(defences(text), others), inverter_steps=20)


@pytest.mark.parametrize(
    ("text", "enough"),
    [
        ("gaussian:clip=4,sigma=0.03", 0.9),
        ("bottleneck:rank=16", 1.0),
        ("bottleneck:rank=16,clip=2,sigma=0.03", 0.9),
        ("embedding-noise:eta=1000", 0.9),
        ("mixing:share=0.7", 0.8),
        ("quantization:bits=4", 1.0),
    ],
)
def test_matching_looks_through_a_known_defence(text: str, enough: float) -> None:
    informed = knowing(defended(attacked(), text), text)
    found = informed.accuracy(informed.attack(VocabularyMatching()))
    assert found >= enough


def averaged(case: Attacked, counted: int) -> float:
    """What matching gets of the mean of the passes, of which so many have to count."""
    traffic, found = mean_of(replace(case.traffic, forwards=(each,)) for each in case.traffic.forwards)
    assert found == counted
    mean = replace(case, texts=case.texts[: len(case.texts) // len(case.traffic.forwards)], traffic=traffic)
    return mean.accuracy(mean.attack(AveragedMatching(found)))


@pytest.mark.long
def test_passes_of_an_example_are_averaged() -> None:
    noise = "gaussian:clip=40,sigma=0.06"
    once = knowing(defended(attacked(), noise), noise)
    often = knowing(defended(attacked(), noise, passes=8), noise)
    alone, together = once.accuracy(once.attack(VocabularyMatching())), averaged(often, 8)
    assert together > alone + 0.1

    # The control: noise that an example has in every pass does not average out.
    memo = noise + ",memo=true"
    same = knowing(defended(attacked(), memo, passes=8), memo)
    assert averaged(same, 1) < together - 0.1


def test_the_mean_of_64_passes_that_are_in_order_has_an_eighth_of_the_noise() -> None:
    loud = defended(attacked(), "gaussian:clip=40,sigma=2", passes=64)
    mean, counted = mean_of(replace(loud.traffic, forwards=(each,)) for each in loud.traffic.forwards)
    exact = torch.stack([loud.knowledge.front.states(tokens) for tokens in loud.texts[: len(attacked().texts)]])
    apart = (mean.forwards[0].hidden - exact).std() / (loud.traffic.forwards[0].hidden - exact).std()
    assert counted == 64
    assert float(apart) == pytest.approx(1 / 8, rel=0.1)


def test_the_noise_is_the_attackers_own() -> None:
    known, hidden = KnownDefences(defences("gaussian:clip=100,sigma=0.1")), torch.randn(1, LENGTH, HIDDEN)
    assert not torch.equal(known.send(hidden), known.send(hidden))
    assert torch.equal(known.expect(hidden), hidden)


def test_a_secret_matrix_and_a_mixture_with_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="rotation"):
        KnownDefences(defences("rotation"))
    with pytest.raises(ConfigError, match="mixing"):
        KnownDefences(defences("mixing"))


def test_how_much_labels_are_smoothed_is_known() -> None:
    assert KnownDefences(defences("smoothing:share=0.1")).label_smoothing == 0.1
    assert KnownDefences(defences("gaussian:clip=1,sigma=1")).label_smoothing == 0
