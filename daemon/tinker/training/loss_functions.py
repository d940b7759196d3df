"""The losses of Tinker's API: sums over all targets, not normalised, in fp32.

The formulas and the defaults of the thresholds are those of the public documentation ("Loss functions": cross_entropy,
importance_sampling, ppo, cispo, dro). There, q is the sampler, p the model, A the advantage, w the weight:

    cross_entropy        - sum w log p
    importance_sampling  - sum (p/q) A
    ppo                  - sum min((p/q) A, clip(p/q, low, high) A)        low 0.8, high 1.2
    cispo                - sum sg(clip(p/q, low, high)) A log p            low 0.0, high 4.0; sg: no gradient through it
    dro                  - sum (A log p - beta/2 (log p - log q)^2)        beta has no default

A weight may be negative: that is how a client computes a loss of its own, by weights that are its gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from isthmus.common.errors import ConfigError

_LOW, _HIGH, _BETA = "clip_low_threshold", "clip_high_threshold", "beta"
_SAMPLED = ("logprobs", "advantages")

Formula = Callable[[Tensor, Mapping[str, Tensor], Mapping[str, float]], Tensor]
"""`(log p, inputs of the same shape, settings) -> loss`, a scalar."""


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss with its settings.

    Attributes:
        name: Tinker's name.
        inputs: What it takes of each target.
        many: Whether a position may have several targets.
        formula: How it is computed.
        settings: All of its settings.
    """

    name: str
    inputs: tuple[str, ...]
    many: bool
    formula: Formula
    settings: Mapping[str, float]

    def __call__(self, logprobs: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """The loss of targets with these natural logarithms of probability; all tensors have one shape, fp32."""
        return self.formula(logprobs, inputs, self.settings)


def _cross_entropy(logprobs: Tensor, inputs: Mapping[str, Tensor], _settings: Mapping[str, float]) -> Tensor:
    return -(inputs["weights"] * logprobs).sum()


def _importance_sampling(logprobs: Tensor, inputs: Mapping[str, Tensor], _settings: Mapping[str, float]) -> Tensor:
    return -(_ratio(logprobs, inputs) * inputs["advantages"]).sum()


def _ppo(logprobs: Tensor, inputs: Mapping[str, Tensor], settings: Mapping[str, float]) -> Tensor:
    ratio, advantages = _ratio(logprobs, inputs), inputs["advantages"]
    clipped = ratio.clamp(settings[_LOW], settings[_HIGH])
    return -torch.minimum(ratio * advantages, clipped * advantages).sum()


def _cispo(logprobs: Tensor, inputs: Mapping[str, Tensor], settings: Mapping[str, float]) -> Tensor:
    clipped = _ratio(logprobs, inputs).clamp(settings[_LOW], settings[_HIGH]).detach()
    return -(clipped * inputs["advantages"] * logprobs).sum()


def _dro(logprobs: Tensor, inputs: Mapping[str, Tensor], settings: Mapping[str, float]) -> Tensor:
    distance = (logprobs - inputs["logprobs"]) ** 2
    return -(logprobs * inputs["advantages"] - 0.5 * settings[_BETA] * distance).sum()


def _ratio(logprobs: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    return torch.exp(logprobs - inputs["logprobs"])


_LOSSES: dict[str, tuple[tuple[str, ...], bool, Formula, dict[str, float | None]]] = {
    "cross_entropy": (("weights",), True, _cross_entropy, {}),
    "importance_sampling": (_SAMPLED, False, _importance_sampling, {}),
    "ppo": (_SAMPLED, False, _ppo, {_LOW: 0.8, _HIGH: 1.2}),
    "cispo": (_SAMPLED, False, _cispo, {_LOW: 0.0, _HIGH: 4.0}),
    "dro": (_SAMPLED, False, _dro, {_BETA: None}),
}

NAMES = tuple(_LOSSES)
"""Of the losses that there are."""


def loss_named(name: str, config: Mapping[str, float]) -> Loss:
    """A loss by its name and `loss_fn_config`.

    Raises:
        ConfigError: There is no such loss, a setting is unknown or missing, or a value does not make sense.
    """
    if name not in _LOSSES:
        raise ConfigError(f"there is no loss {name[:40]!r} here: use {', '.join(NAMES)}")
    inputs, many, formula, defaults = _LOSSES[name]
    for key, value in config.items():
        if key not in defaults:
            known = ", ".join(defaults) or "none"
            raise ConfigError(f"loss {name} has no setting {key[:40]!r}; it has {known}")
        if not math.isfinite(value) or value < 0:
            raise ConfigError(f"{key} = {value} of loss {name} does not make sense: give 0 or more")
    settings: dict[str, float] = {}
    for key, chosen in {**defaults, **config}.items():
        if chosen is None:
            raise ConfigError(f"loss {name} needs {key}: give it in loss_fn_config")
        settings[key] = chosen
    if _LOW in settings and settings[_LOW] > settings[_HIGH]:
        raise ConfigError(f"{_LOW} = {settings[_LOW]} is above {_HIGH} = {settings[_HIGH]}: give the smaller one first")
    return Loss(name, inputs, many, formula, settings)
