"""Live and dead sites in a training run: a policy chooses them before each step and gets their scores after it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from isthmus.backbone.runtime.site_host import linear_groups
from isthmus.backbone.sites.edge_sites import Site
from isthmus.backbone.split.edge_model import EdgeModelMixin, RemoteLayers
from isthmus.common.errors import ConfigError
from isthmus.common.files import write_atomic
from isthmus.edge.config.schedule import learning_rate
from isthmus.edge.config.training_config import TrainConfig
from isthmus.edge.sites.kill_revive import KillRevive, KillReviveOptions
from isthmus.edge.sites.site_policy import (
    Accounting,
    Budget,
    Decision,
    FixedSites,
    SiteInfo,
    SitePolicy,
    Sites,
    evenly_spaced,
    gain,
    random_sites,
)

DECISIONS = "live-sites.jsonl"
"""In the run's folder: one line for each decision."""


class LiveSites:
    """Lets a policy choose the live sites of each step; a `isthmus.edge.training.edge_steps.StepObserver`.

    A dead site makes no traffic: its adapter is left out of the forward, or leased to the cloud. Its parameters have no
    gradient, so AdamW leaves them and their moments as they are.

    Args:
        rate: The learning rate of the step after so many applied ones.
    """

    def __init__(
        self,
        remote_layers: RemoteLayers,
        sites: Mapping[str, Site],
        costs: Sites,
        policy: SitePolicy,
        rate: Callable[[int], float],
        log: Path,
        say: Callable[[str], None],
    ) -> None:
        self.accounting = Accounting(costs)
        self._remote_layers = remote_layers
        self._sites = sites
        self._policy = policy
        self._rate = rate
        self._log = log
        self._say = say
        self._before: dict[str, list[tuple[nn.Parameter, Tensor]]] = {}
        self._decisions: list[str] = []  # lines of the log

    def before_step(self, step: int) -> None:
        """Switch the sites of step number `step` (from 1) on and all others off."""
        if step == 1:
            self._save()  # replaces the log of a run that was stopped before its first checkpoint
        live = self._policy.live(step - 1)
        self._remote_layers.live_sites = live
        self._before = {
            name: [(parameter, parameter.detach().clone()) for parameter in self._sites[name].parameters]
            for name in live
        }

    def after_step(self, step: int) -> None:
        """Give the policy the scores of the live sites, and log what it decides."""
        rate = self._rate(step - 1)
        scores = {name: _score(moved, rate) for name, moved in self._before.items()}
        self._before = {}
        self.accounting.add(scores)
        decision = self._policy.observe(step - 1, scores)
        if decision is not None:
            self._write(decision)

    def points(self) -> dict[str, float]:
        """For the curves: how many sites are live, and which shares of always-on's cost were spent."""
        shares = self.accounting.shares()
        live = float(len(self._remote_layers.live_sites or ()))
        return {"sites/live": live, **{f"sites/{name}": share for name, share in shares.items()}}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        live = self._remote_layers.live_sites  # None, which is all, before the first step
        return {
            "policy": self._policy.state(),
            "accounting": self.accounting.state(),
            "decisions": self._decisions,
            "live": None if live is None else sorted(live),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken; the decisions that came after it are forgotten."""
        self._policy.load_state(state["policy"])
        self.accounting.load_state(state["accounting"])
        self._decisions = list(state["decisions"])
        self._remote_layers.live_sites = None if state["live"] is None else frozenset(state["live"])
        self._save()

    def _write(self, decision: Decision) -> None:
        self._decisions.append(json.dumps(asdict(decision)) + "\n")
        self._save()
        shares = self.accounting.shares()
        self._say(
            f"sites after step {decision.step}: {len(decision.live)} live, {len(decision.killed)} killed, "
            f"{len(decision.revived)} revived; traffic {shares['traffic']:.1%}, computation "
            f"{shares['computation']:.1%} of always-on"
        )

    def _save(self) -> None:
        write_atomic(self._log, "".join(self._decisions).encode())


def site_costs(model: EdgeModelMixin, sites: Iterable[Site], *, summed: bool = False) -> Sites:
    """What each site costs, from the shapes of its linear and the group that it reads its input with.

    `summed` as of `isthmus.edge.client.remote_span.RemoteSpan`.
    """
    config: Any = model.config  # type: ignore[attr-defined]  # of the transformers class beside the mixin
    group_of = {name: number for number, names in enumerate(linear_groups(config)) for name in names}
    infos = []
    for site in sites:
        n_in, n_out = site.widths
        infos.append(
            SiteInfo.of_linear(
                site.name,
                layer=site.layer,
                group=f"{site.layer}.{group_of.get(site.part, 'layer')}",
                in_features=n_in,
                out_features=n_out,
                parameters=sum(parameter.numel() for parameter in site.parameters),
                summed=summed,
            )
        )
    return Sites(infos)


def live_sites(
    model: EdgeModelMixin, config: TrainConfig, total_steps: int, say: Callable[[str], None]
) -> LiveSites | None:
    """The observer that `config.site_policy` asks for; None where all sites are live all the time.

    Raises:
        ConfigError: There are no sites, or the budget does not fit them and the run.
    """
    if config.site_policy == "always":
        return None
    remote_layers = model.remote_layers
    sites = {site.name: site for site in model.find_sites()}
    if not sites:
        raise ConfigError(
            f"site_policy = {config.site_policy!r} chooses among adapters inside the cloud's layers, and there are "
            "none: give --sites"
        )
    costs = site_costs(model, sites.values(), summed=config.summed)
    remote_layers.lend_dead = config.lend_dead
    return LiveSites(
        remote_layers,
        sites,
        costs,
        _policy(costs, config, total_steps),
        lambda step: learning_rate(config, step, total_steps),
        config.out / DECISIONS,
        say,
    )


def _policy(costs: Sites, config: TrainConfig, total_steps: int) -> SitePolicy:
    budget = Budget(config.site_traffic, config.site_computation)
    if config.site_policy == "kill-revive":
        return KillRevive(costs, total_steps, KillReviveOptions(budget=budget, seed=config.seed))
    if config.site_policy == "random":
        return FixedSites(random_sites(costs, budget, config.seed))
    kinds = sorted({info.kind for info in costs.infos.values()})
    return FixedSites(evenly_spaced(costs, "v_proj" if "v_proj" in kinds else kinds[-1], budget))


def _score(moved: Iterable[tuple[nn.Parameter, Tensor]], rate: float) -> float:
    """By how much a site's step has lowered the loss, to first order; 0 for what is not finite or had no gradient."""
    score = gain(moved, rate) if rate > 0 else 0.0
    return score if math.isfinite(score) else 0.0
