"""Clipping and Gaussian noise: the deviation and the sensitivity that the accountant goes by."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.privacy.defended_model import DefendedModel
from torch import Tensor

from isthmus.privacy.defences.defence import Pass, clipped
from isthmus.privacy.defences.defence_options import Gaussian
from isthmus.privacy.defences.gaussian_noise import GaussianNoise

WIDTH = 32


def defence(**more: object) -> GaussianNoise:
    values = {"clip": 2.0, "sigma": 3.0, "gradient_clip": 0.5, "gradient_sigma": 4.0, "memo": False, **more}
    return GaussianNoise(Gaussian.model_validate(values), WIDTH)


def test_noise_has_the_stated_deviation(passing: Callable[..., Pass]) -> None:
    now, zeros = passing(200, 200, 200), torch.zeros(3, 200, WIDTH)
    assert defence().hidden(zeros, now).std() == pytest.approx(2 * 3, rel=0.02)
    assert defence().gradient(zeros, now).std() == pytest.approx(0.5 * 4, rel=0.02)


def test_nothing_of_the_text_lies_on_padding(passing: Callable[..., Pass]) -> None:
    now, hidden = passing(3, 5), torch.randn(2, 5, WIDTH)
    for sent in (
        defence().hidden(hidden, now),
        defence(memo=True).hidden(hidden, now),
        defence().gradient(hidden, now),
    ):
        assert not sent[0, 3:].any()
        assert sent[0, :3].all()
        assert sent[1].all()


def sensitivity(send: Callable[[Tensor], Tensor]) -> float:
    """The farthest that messages of two examples of 9 tokens lie from each other, without noise."""
    torch.manual_seed(1)
    pairs = ((torch.randn(1, 9, WIDTH) * scale, -torch.randn(1, 9, WIDTH) * scale) for scale in (0.1, 1.0, 100.0))
    opposite = (torch.full((1, 9, WIDTH), 50.0), torch.full((1, 9, WIDTH), -50.0))
    return max(float((send(one) - send(other)).norm()) for one, other in (*pairs, opposite))


def test_clipping_bounds_the_sensitivity(passing: Callable[..., Pass]) -> None:
    now, bound = passing(9), 2 * 2.0 * 9**0.5
    silent = defence(sigma=1e-9)
    assert sensitivity(lambda hidden: silent.hidden(hidden, now)) == pytest.approx(bound, rel=1e-3)
    # The control: without clipping, nothing bounds it.
    assert sensitivity(lambda hidden: hidden) > 100 * bound


def test_short_vectors_are_left_as_they_are() -> None:
    vectors = torch.tensor([[0.3, 0.4], [3.0, 4.0], [0.0, 0.0]])
    assert torch.allclose(clipped(vectors, 1.0), torch.tensor([[0.3, 0.4], [0.6, 0.8], [0.0, 0.0]]))


def test_fresh_noise_averages_out_and_memoised_noise_does_not(passing: Callable[..., Pass]) -> None:
    hidden = clipped(torch.randn(1, 200, WIDTH), 2.0)

    def left(memo: bool) -> float:
        sent = [defence(memo=memo).hidden(hidden, passing(200, turn=turn)) for turn in range(64)]
        return float((torch.stack(sent).mean(0) - hidden).std())

    assert left(memo=False) == pytest.approx(6 / 8, rel=0.03)
    assert left(memo=True) == pytest.approx(6, rel=0.03)


def test_memoised_noise_is_the_examples_whatever_stands_beside_it(passing: Callable[..., Pass]) -> None:
    alone = defence(memo=True).hidden(torch.zeros(1, 4, WIDTH), passing(4))
    padded = defence(memo=True).hidden(torch.zeros(2, 7, WIDTH), passing(4, 7, turn=3))
    assert torch.equal(padded[0, :4], alone[0])
    other = defence(memo=True).hidden(torch.zeros(1, 4, WIDTH), passing(4, offset=1))
    assert not torch.equal(other, alone)


def test_what_crosses_is_noisy_in_both_directions(run: Callable[..., DefendedModel]) -> None:
    rows = [[5, 6, 7, 8], [9, 10, 11]]
    plain, noisy = run(), run("gaussian:clip=1,sigma=2,gradient_clip=1e-9,gradient_sigma=1e9")
    plain.gradient(rows)
    with noisy.defended() as span:
        noisy.gradient(rows, span)
    assert not torch.equal(plain.sent[0], noisy.sent[0])
    assert noisy.gradients[0][1, :3].std() == pytest.approx(1, rel=0.3)
    assert plain.gradients[0][1, :3].std() < 0.1
