"""DP-SGD on the adapters (Abadi et al. 2016): what they learn of any one example is bounded.

The gradient of each example's mean loss is scaled down to the norm C, the examples of a step are added up, normal noise
of standard deviation σC is added to each number, and the sum is divided by how many examples there were, or, with
Poisson sampling, are expected.

Claims: the adapters after every step, and so the one that is returned, are (ε, δ)-differentially private in each
example. An example is in one step of each epoch, whose sum it changes by at most 2C where another takes its place.
Batches are those of a shuffled epoch and no Poisson samples, so nothing is gained by subsampling; the accountant
counts epochs, and one that several processes of the run have begun as often. A step that is made again has the same
noise where the cloud answers the same, and other noise where it does not.

In `emulator tune` there is no cloud. Batches are Poisson samples there: each example is in a step with the same chance,
whatever else is in it, by draws from the run's secret key. The sum is divided by how many are expected, and a step
without any is noise alone. The accountant counts the amplification. A step that is made again has the same examples and
the same noise, and counts once.

Not claimed: anything about messages. What the cloud sees of an example while it is trained on is not less for it;
with `gaussian` beside it, the claims add up to one about everything.

It costs a forward and a backward for each example instead of each micro-batch: as many calls as examples. Padding that
a micro-batch would have is not sent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from isthmus.privacy.defences.defence_options import DpSgd
from isthmus.privacy.defences.secret_noise import Label, SecretNoise


class PrivateGradients:
    """The sum of a step.

    Args:
        turn: Which step of the run it is, and what the cloud has answered until then: no other one has the same. It is
            asked when the noise is drawn, after the step's answers.
        expected: How many examples a step has in the mean, where they are drawn by chance; None where it has a number
            that everybody may know.
    """

    def __init__(
        self,
        options: DpSgd,
        noise: SecretNoise,
        turn: Callable[[], tuple[Label, ...]],
        expected: float | None = None,
    ) -> None:
        self._options = options
        self._noise = noise
        self._turn = turn
        self._expected = expected
        self._sums: list[Tensor] = []
        self._examples = 0

    def add(self, gradients: Sequence[Tensor]) -> None:
        """Add an example's gradients, one for each parameter, in an order that is always the same."""
        norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))
        scale = min(1.0, self._options.clip / norm) if norm else 1.0
        scaled = [gradient * scale for gradient in gradients]
        self._sums = [sum_ + part for sum_, part in zip(self._sums, scaled, strict=True)] if self._sums else scaled
        self._examples += 1

    def mean(self, parameters: Sequence[Tensor] = ()) -> list[Tensor]:
        """The noisy mean over the step's examples.

        Args:
            parameters: What the gradients are of; needed where the step may have no example.
        """
        deviation, turn = self._options.sigma * self._options.clip, self._turn()
        sums = self._sums or [torch.zeros_like(parameter) for parameter in parameters]
        noisy = [
            total + deviation * self._noise.normal(tuple(total.shape), "dp-sgd", index, *turn).to(total)
            for index, total in enumerate(sums)
        ]
        return [torch.div(total, self._expected or self._examples) for total in noisy]


def poisson_sample(noise: SecretNoise, count: int, rate: float, step: int) -> list[int]:
    """Which of `count` examples are in a step: each with the chance `rate`, by itself."""
    chosen: list[int] = (noise.uniform(count, "sample", step) < rate).nonzero().flatten().tolist()
    return chosen
