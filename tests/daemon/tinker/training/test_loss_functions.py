"""Each loss and its gradient, against the documented formula computed target by target in double precision."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from isthmus.common.errors import ConfigError
from isthmus.daemon.tinker.training.loss_functions import NAMES, loss_named

N = 40


def _data() -> dict[str, torch.Tensor]:
    """Log probabilities near those of the sampler and far from them, advantages and weights of both signs."""
    drawn = torch.Generator().manual_seed(7)
    sampled = -3 * torch.rand(N, generator=drawn)
    return {
        "own": (sampled + 0.8 * torch.randn(N, generator=drawn)).clamp(max=-0.01),
        "logprobs": sampled,
        "advantages": torch.randn(N, generator=drawn),
        "weights": torch.randn(N, generator=drawn),
    }


def _clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


# For one target: the loss, and its derivative by log p.
def _cross_entropy(p: float, each: Mapping[str, float], _: Mapping[str, float]) -> tuple[float, float]:
    return -each["weights"] * p, -each["weights"]


def _importance_sampling(p: float, each: Mapping[str, float], _: Mapping[str, float]) -> tuple[float, float]:
    loss = -math.exp(p - each["logprobs"]) * each["advantages"]
    return loss, loss


def _ppo(p: float, each: Mapping[str, float], settings: Mapping[str, float]) -> tuple[float, float]:
    ratio, advantage = math.exp(p - each["logprobs"]), each["advantages"]
    clipped = _clip(ratio, settings["clip_low_threshold"], settings["clip_high_threshold"])
    if ratio * advantage <= clipped * advantage:
        return -ratio * advantage, -ratio * advantage
    return -clipped * advantage, 0.0


def _cispo(p: float, each: Mapping[str, float], settings: Mapping[str, float]) -> tuple[float, float]:
    ratio = math.exp(p - each["logprobs"])
    clipped = _clip(ratio, settings["clip_low_threshold"], settings["clip_high_threshold"])
    return -clipped * each["advantages"] * p, -clipped * each["advantages"]


def _dro(p: float, each: Mapping[str, float], settings: Mapping[str, float]) -> tuple[float, float]:
    far = p - each["logprobs"]
    loss = -(p * each["advantages"] - settings["beta"] / 2 * far**2)
    return loss, -each["advantages"] + settings["beta"] * far


Reference = Callable[[float, Mapping[str, float], Mapping[str, float]], tuple[float, float]]
_PPO, _CISPO = (0.8, 1.2), (0.0, 4.0)  # the documented defaults
CASES: list[tuple[str, Reference, dict[str, float], dict[str, float]]] = [
    ("cross_entropy", _cross_entropy, {}, {}),
    ("importance_sampling", _importance_sampling, {}, {}),
    ("ppo", _ppo, {}, {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}),
    ("ppo", _ppo, {"clip_high_threshold": 2.0}, {"clip_low_threshold": 0.8, "clip_high_threshold": 2.0}),
    ("cispo", _cispo, {}, {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0}),
    ("cispo", _cispo, {"clip_low_threshold": 0.9}, {"clip_low_threshold": 0.9, "clip_high_threshold": 4.0}),
    ("dro", _dro, {"beta": 0.3}, {"beta": 0.3}),
]


def _computed(name: str, given: Mapping[str, float]) -> tuple[float, list[float]]:
    data = _data()
    own = data.pop("own").requires_grad_()
    loss = loss_named(name, given)(own, data)
    loss.backward()  # type: ignore[no-untyped-call]
    assert own.grad is not None
    assert loss.dtype == own.grad.dtype == torch.float32
    return loss.item(), own.grad.tolist()


def _expected(reference: Reference, settings: Mapping[str, float]) -> tuple[float, list[float]]:
    data = {name: values.tolist() for name, values in _data().items()}
    results = [
        reference(p, {name: values[i] for name, values in data.items()}, settings) for i, p in enumerate(data["own"])
    ]
    return sum(loss for loss, _ in results), [gradient for _, gradient in results]


@pytest.mark.parametrize(("name", "reference", "given", "settings"), CASES)
def test_a_loss_is_the_documented_sum_and_so_is_its_gradient(
    name: str, reference: Reference, given: dict[str, float], settings: dict[str, float]
) -> None:
    loss, gradient = _computed(name, given)
    wanted, slopes = _expected(reference, settings)
    assert loss == pytest.approx(wanted, rel=1e-5, abs=1e-5)
    assert gradient == pytest.approx(slopes, rel=1e-5, abs=1e-6)


def test_no_loss_is_another_one() -> None:
    """The control: each formula is told from every other, and from itself with other settings."""
    found = [_expected(reference, settings) for _, reference, _, settings in CASES]
    for number, (name, _, given, _) in enumerate(CASES):
        loss, gradient = _computed(name, given)
        same = [
            loss == pytest.approx(other, rel=1e-5, abs=1e-5) and gradient == pytest.approx(slopes, rel=1e-5, abs=1e-6)
            for other, slopes in found
        ]
        assert same == [each == number for each in range(len(CASES))]


def test_all_losses_are_covered() -> None:
    assert {name for name, *_ in CASES} == set(NAMES)


@pytest.mark.parametrize(
    ("name", "config", "said"),
    [
        ("gspo", {}, "gspo.*cross_entropy"),
        ("stable_reinforce", {}, "stable_reinforce"),
        ("dro", {}, "dro needs beta"),
        ("dro", {"beta": -1.0}, "beta = -1.0"),
        ("ppo", {"beta": 1.0}, "no setting 'beta'; it has clip_low_threshold"),
        ("cross_entropy", {"beta": 1.0}, "it has none"),
        ("ppo", {"clip_low_threshold": math.nan}, "clip_low_threshold = nan"),
        ("ppo", {"clip_low_threshold": 3.0}, r"clip_low_threshold = 3.0 is above clip_high_threshold = 1.2"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(name: str, config: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        loss_named(name, config)
