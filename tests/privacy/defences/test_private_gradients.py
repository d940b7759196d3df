"""DP-SGD: the sensitivity and the deviation that the accountant goes by."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from isthmus.privacy.defences.defence_options import DpSgd
from isthmus.privacy.defences.private_gradients import PrivateGradients, poisson_sample
from isthmus.privacy.defences.secret_noise import SecretNoise


def mean(noise: SecretNoise, sigma: float, examples: list[list[Tensor]], step: int = 1) -> list[Tensor]:
    private = PrivateGradients(DpSgd(clip=2.0, sigma=sigma), noise, lambda: ("step", step))
    for gradients in examples:
        private.add(gradients)
    return private.mean()


def test_the_noise_has_the_stated_deviation(noise: SecretNoise) -> None:
    zeros = [torch.zeros(300, 40), torch.zeros(200)]
    large, small = mean(noise, 3.0, [zeros] * 4)
    assert large.std() == pytest.approx(2 * 3 / 4, rel=0.03)
    assert small.std() == pytest.approx(2 * 3 / 4, rel=0.2)
    assert not torch.equal(large, mean(noise, 3.0, [zeros] * 4, step=2)[0])
    assert torch.equal(large, mean(noise, 3.0, [zeros] * 4)[0])


def test_an_example_moves_the_sum_by_twice_the_clip_at_most(noise: SecretNoise) -> None:
    others = [[torch.randn(5), torch.randn(3)] for _ in range(3)]
    one, other = [torch.full((5,), 50.0), torch.zeros(3)], [torch.full((5,), -50.0), torch.zeros(3)]

    def moved(sigma: float) -> float:
        first, second = (mean(noise, sigma, [*others, example]) for example in (one, other))
        return 4 * float(torch.cat(first).sub(torch.cat(second)).norm())

    assert moved(1e-9) == pytest.approx(4, rel=1e-5)
    # The control: without clipping it is moved by 100 times the square root of five.
    assert float(one[0].sub(other[0]).norm()) > 50 * 4


def test_small_gradients_are_averaged_as_they_are(noise: SecretNoise) -> None:
    found = mean(noise, 1e-12, [[torch.tensor([1.0])], [torch.tensor([0.5])]])
    assert found[0] == pytest.approx(0.75)


def test_drawn_examples_are_divided_by_how_many_are_expected(noise: SecretNoise) -> None:
    private = PrivateGradients(DpSgd(clip=2.0, sigma=1e-12), noise, lambda: ("step", 1), expected=2.5)
    private.add([torch.tensor([1.0])])
    assert private.mean()[0] == pytest.approx(0.4)


def test_a_step_without_examples_is_noise_alone(noise: SecretNoise) -> None:
    private = PrivateGradients(DpSgd(clip=2.0, sigma=3.0), noise, lambda: ("step", 1), expected=4)
    like = [torch.ones(300, 40), torch.ones(200)]
    of_zeros = mean(noise, 3.0, [[torch.zeros_like(each) for each in like]] * 4)
    assert all(torch.equal(*pair) for pair in zip(private.mean(like), of_zeros, strict=True))


def test_the_noise_follows_from_what_was_answered_until_it_is_drawn(noise: SecretNoise) -> None:
    def drawn(answer: bytes) -> Tensor:
        answers = [b""]
        private = PrivateGradients(DpSgd(clip=2.0, sigma=3.0), noise, lambda: ("step", 1, answers[-1]))
        private.add([torch.zeros(40)])
        answers.append(answer)  # after the step has begun
        return private.mean()[0]

    assert torch.equal(drawn(b"one"), drawn(b"one"))
    assert not torch.equal(drawn(b"one"), drawn(b"other"))


def test_each_example_is_drawn_by_itself(noise: SecretNoise) -> None:
    steps = [poisson_sample(noise, 8, 0.25, step) for step in range(1, 401)]
    assert steps == [poisson_sample(noise, 8, 0.25, step) for step in range(1, 401)]
    assert {len(each) for each in steps} >= {0, 1, 2, 3, 4}
    drawn = torch.zeros(400, 8)
    for row, each in zip(drawn, steps, strict=True):
        row[each] = 1
    assert drawn.mean(0) == pytest.approx(0.25, abs=0.08)
    # A binomial's variance; batches of a fixed size have none.
    assert float(drawn.sum(1).var()) == pytest.approx(8 * 0.25 * 0.75, rel=0.25)
    assert float(torch.corrcoef(drawn.T).fill_diagonal_(0).abs().max()) < 0.2
    assert poisson_sample(noise, 8, 1.0, 1) == list(range(8))
    other = SecretNoise(bytes(32))
    assert steps != [poisson_sample(other, 8, 0.25, step) for step in range(1, 401)]
