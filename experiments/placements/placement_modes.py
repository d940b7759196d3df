"""The ways of training that `isthmus bench placements` sets side by side: options of `edge train`, no more. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from isthmus.common.errors import ConfigError
from isthmus.edge.sites.site_policy import Budget

SINGLE = "single"
"""One process that holds the whole model, with PEFT's LoRA at all layers."""

_OF_SITES = ("sites", "site_policy", "leased", "lend_dead", "summed", "span_cache_mib")
"""Options of `edge train` that mean nothing where the whole model is in one process."""


@dataclass(frozen=True, slots=True)
class Mode:
    """A way of training.

    Attributes:
        options: Fields of `TrainConfig`, beside those that all modes share.
        planned_as: The mode of `isthmus plan` that predicts it.
        tail: Whether the edge holds top layers only.
        chooses: Whether a policy says which sites are live, so that no single process trains quite the same.
    """

    name: str
    planned_as: str
    options: Mapping[str, Any] = field(default_factory=dict)
    tail: bool = False
    chooses: bool = False

    @property
    def summed(self) -> bool:
        """Whether one gradient per input is answered instead of one per site."""
        return bool(self.options.get("summed"))

    @property
    def everywhere(self) -> bool:
        """Whether adapters are at all layers."""
        return self.name == SINGLE or "sites" in self.options

    @property
    def drops_out(self) -> bool:
        """Whether its adapters can have dropout: those that run on the edge, as PEFT's."""
        return not {"method", "leased"} & self.options.keys()

    @property
    def alone(self) -> dict[str, Any]:
        """The options of the single process with the same trainables."""
        return {name: value for name, value in self.options.items() if name not in _OF_SITES}

    def edge_layers(self, plan: str) -> str:
        """The split plan, given the one of the other modes."""
        return f"0:{plan.partition(':')[2]}" if self.tail else plan


_POLICIES = {"kill_revive": "kill-revive", "random": "random", "even": "even"}

MODES = {
    mode.name: mode
    for mode in (
        Mode(SINGLE, "single"),
        Mode("u_shape", "u_shape"),
        Mode("tail_cache", "tail_cache", {"span_cache_mib": 1024}, tail=True),
        Mode("taps", "taps", {"method": "ladder", "span_cache_mib": 1024}),
        Mode("edge", "edge", {"sites": "all"}),
        Mode("edge_summed", "edge", {"sites": "all", "summed": True}),
        *(
            Mode(name, "kill_revive", {"sites": "all", "site_policy": policy}, chooses=True)
            for name, policy in _POLICIES.items()
        ),
        Mode("low_rank", "low_rank", {"sites": "all", "method": "low_rank"}),
        Mode("leased", "leased", {"sites": "all", "leased": "all"}),
    )
}
"""All of them. `random` and `even` are fixed choices of sites within the budget of `kill_revive`."""


def modes_of(text: str) -> list[Mode]:
    """The modes that a user names, comma-separated; all for an empty text.

    One whose sites a policy chooses can have another budget: `kill_revive@0.05` is for 5 % of always-on's site traffic,
    and of its computation in proportion.

    Raises ConfigError where there is no such mode, or no such budget.
    """
    names = [name.strip() for name in text.split(",")] if text else list(MODES)
    return [_mode_of(name) for name in dict.fromkeys(names)]


def policy_of(name: str) -> str:
    """The name of a mode without its budget."""
    return name.partition("@")[0]


def _mode_of(text: str) -> Mode:
    name, at, share = text.partition("@")
    if name not in MODES:
        raise ConfigError(f"{name!r} is no mode: choose of {', '.join(MODES)}")
    mode = MODES[name]
    if not at:
        return mode
    try:
        traffic = float(share)
    except ValueError:
        traffic = 0.0
    if not mode.chooses or not 0 < traffic < 1:
        chosen = ", ".join(mode.name for mode in MODES.values() if mode.chooses)
        raise ConfigError(f"{text!r} is no mode: a budget is a number between 0 and 1 behind one of {chosen}")
    usual = Budget()
    budget = {"site_traffic": traffic, "site_computation": min(1.0, usual.computation * traffic / usual.traffic)}
    return replace(mode, name=text, options={**mode.options, **budget})
