"""A policy that finds the sites worth their traffic: KR-style, after DLoRA's kill-and-revive (Gao & Zhang 2024).

DLoRA's exact rule is not public; this one is ours. Every step of it counts in the budget.

1. **Warm-up.** All sites train for `visits` steps, at the cost of always-on, so that all scores are of the same steps.
2. **Kill.** The sites of the highest score per load stay (see `Sites.fill`). The load falls from `kill_from` along a
   cubic to the base level, like the budget of AdaLoRA (Zhang et al. 2023).
3. **Revive.** Then, at each `revive_every`-th decision, dead sites are on trial for a period, on top of the live ones:
   those with the highest score from before they died plus a bonus for sites seldom tried (UCB1, Auer et al. 2002). At
   the next decision they compete with the live ones, whose scores count `incumbency` times, because a killed site's
   contribution is lost and a fresh site moves more than a trained one.
4. **Settle.** In the last part of the run no site is killed. In the first half of it, sites are added where the budget
   has room for them to the end.

Scores: the values of a step are divided by their mean, as the first steps of a run lower the loss much more than later
ones. A site's score is the plain mean of these over its first `1 / (1 - beta)` live steps, then `s <- beta·s +
(1 - beta)·value`. A dead site keeps its score; the mean starts anew when it is revived.

The base level is the load left for each step to come:

    (budget - spent - what later kill and revive phases take above the base level) / steps to come

It never falls: what whole sites leave unused is used later.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from isthmus.common.errors import CheckpointError, ConfigError, NonFiniteError
from isthmus.edge.sites.site_policy import Budget, Decision, Sites


@dataclass(frozen=True, slots=True)
class KillReviveOptions:
    """How `KillRevive` spends its budget; see the module. Loads are in units of the budget (see `Sites`).

    Attributes:
        budget: Shares of always-on's traffic and computation over the whole run.
        visits: Steps of the warm-up.
        period: Steps between decisions.
        beta: Weight of the past in the moving average of the scores.
        kill_from: Load at which the kill phase starts, at least 1.
        kill_share: Part of the run that the kill phase takes.
        revive_every: Decisions from one revival to the next; 0 for no revival.
        revive_load: Load of the sites on trial, on top of the base level.
        exploration: Weight of the bonus for sites seldom tried; the mean score is 1.
        incumbency: Factor on the scores of live sites when they compete with those on trial, at least 1.
        settle_share: Part of the run, at its end, in which no site is killed.
        seed: Decides between equal sites.
    """

    budget: Budget = field(default_factory=Budget)
    visits: int = 2
    period: int = 10
    beta: float = 0.8
    kill_from: float = 1.5
    kill_share: float = 0.05
    revive_every: int = 3
    revive_load: float = 0.15
    exploration: float = 0.5
    incumbency: float = 2.0
    settle_share: float = 0.7
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("visits", 1, math.inf),
            ("period", 1, math.inf),
            ("beta", 0, 0.9999),
            ("kill_from", 1, math.inf),
            ("kill_share", 0, 1),
            ("revive_every", 0, math.inf),
            ("revive_load", 0, math.inf),
            ("exploration", 0, math.inf),
            ("incumbency", 1, math.inf),
            ("settle_share", 0, 1),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ConfigError(f"{name} = {value} of kill-and-revive is out of range: give {low} to {high}.")


@dataclass(frozen=True, slots=True)
class Plan:
    """The schedule of a run, which does not depend on scores.

    Attributes:
        decisions: The numbers of applied steps at which the live sites may change.
        trials: Those decisions at which sites are revived.
        settled: The last decision that may kill.
        extra: The load above the base level, by step.
    """

    steps: int
    decisions: tuple[int, ...]
    trials: frozenset[int]
    settled: int
    extra: tuple[float, ...]

    def base_level(self, step: int, spent: float) -> float:
        """The load that every step from `step` on can have; `spent` is the sum of the loads before."""
        return (self.steps - spent - sum(self.extra[step:])) / (self.steps - step)


def plan(sites: Sites, options: KillReviveOptions, steps: int) -> Plan:
    """Lay out a run of `steps` optimizer steps so that all of it keeps the budget.

    Raises:
        ConfigError: The run is too short for its phases, or the budget too small for the warm-up or for any site after
            it; the message names the numbers.
    """
    started, period = options.visits, options.period
    settled = steps - math.ceil(options.settle_share * steps)
    kills = math.ceil(options.kill_share * steps / period)
    if started + kills * period > settled or started >= steps:
        raise ConfigError(
            f"a run of {steps} steps is too short for {started} of warm-up and {kills} periods of {period} to kill in "
            f"before it settles after {settled}: lower visits, period, kill_share or settle_share, or take more steps."
        )
    decisions = tuple(range(started, min(steps - 1, (settled + steps) // 2) + 1, period))
    killing = [at for at in decisions if at <= settled]
    trials = set(killing[kills + options.revive_every : -1 : options.revive_every] if options.revive_every else ())
    room = sites.load(sites.names, options.budget) - 1  # nothing is gained above all sites
    extra = [0.0] * steps
    for count, at in enumerate(decisions[:kills]):
        extra[at : at + period] = [min(room, options.kill_from - 1) * (1 - count / kills) ** 3] * period
    for at in trials:
        extra[at : at + period] = [min(room, options.revive_load)] * period
    laid_out = Plan(steps, decisions, frozenset(trials), killing[-1], tuple(extra))
    _check(sites, options, laid_out)
    return laid_out


def _check(sites: Sites, options: KillReviveOptions, laid_out: Plan) -> None:
    warmup = options.visits * sites.load(sites.names, options.budget)
    whole = f"{options.budget.traffic:.1%} of the traffic and {options.budget.computation:.1%} of the computation"
    if warmup >= laid_out.steps:
        raise ConfigError(
            f"a warm-up of {options.visits} steps takes {warmup / laid_out.steps:.0%} of the budget of a run of "
            f"{laid_out.steps} ({whole}): lower visits, take more steps or raise the budget."
        )
    base = laid_out.base_level(options.visits, warmup)
    needed = min(sites.load({name}, options.budget) for name in sites.names)
    if base < needed:
        raise ConfigError(
            f"warm-up, kill and revive phases leave a load of {base:.2f} per step of the budget ({whole}), and the "
            f"smallest site needs {needed:.2f}: lower visits, kill_from or revive_load, or raise the budget."
        )


class KillRevive:
    """The policy; see the module. Equal seeds and scores give equal decisions.

    Raises:
        ConfigError: See `plan`.
    """

    def __init__(self, sites: Sites, steps: int, options: KillReviveOptions | None = None) -> None:
        self.options = options or KillReviveOptions()
        self.plan = plan(sites, self.options, steps)
        self._sites = sites
        self._order = sorted(sites.names)
        random.Random(self.options.seed).shuffle(self._order)  # noqa: S311  # for ties, no secret
        self._step = 0
        self._spent = 0.0  # sum of the loads of the applied steps
        self._live = sites.names
        self._on_trial: frozenset[str] = frozenset()
        self._scores = dict.fromkeys(self._order, 0.0)
        self._visits = dict.fromkeys(self._order, 0)
        self._ages = dict.fromkeys(self._order, 0)  # steps that count in a score

    def live(self, step: int) -> frozenset[str]:
        """The sites that are live in the step after `step` applied ones, which must be the next one.

        Raises:
            ConfigError: It is another one, or beyond the planned end.
        """
        if step >= self.plan.steps:
            raise ConfigError(f"the sites were planned for {self.plan.steps} steps: plan for more to go on after them.")
        if step != self._step:
            raise ConfigError(
                f"the live sites of step {step} are asked for, but {self._step} steps were observed: "
                "load the policy's state with the checkpoint's."
            )
        return self._live

    def observe(self, step: int, scores: Mapping[str, float]) -> Decision | None:
        """Take in the scores of the live sites after that step; see `SitePolicy`.

        Raises:
            ConfigError: It is not the next step, or `scores` are of other sites than the live ones.
            NonFiniteError: A score is NaN or infinite. The policy is as before.
        """
        live = self.live(step)
        if scores.keys() != live:
            name = min(scores.keys() ^ live)
            raise ConfigError(
                f"the score of {name} is {scores.get(name)}: give those of the live sites, and no others."
            )
        for name, value in scores.items():
            if not math.isfinite(value):
                raise NonFiniteError(
                    f"the score of the site {name} in step {step} is {value}: lower the learning rate."
                )
        usual = math.fsum(max(0.0, value) for value in scores.values()) / len(scores) or 1.0
        for name, value in scores.items():
            self._visits[name] += 1
            self._ages[name] += 1
            weight = max(1 - self.options.beta, 1 / self._ages[name])
            self._scores[name] += weight * (value / usual - self._scores[name])
        self._spent += self._sites.load(live, self.options.budget)
        self._step += 1
        return self._decide() if self._step in self.plan.decisions else None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON has it."""
        return {
            "steps": self.plan.steps,
            "step": self._step,
            "spent": self._spent,
            "live": sorted(self._live),
            "on_trial": sorted(self._on_trial),
            "scores": dict(self._scores),
            "visits": dict(self._visits),
            "ages": dict(self._ages),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises:
            CheckpointError: It is of other sites, of a run of another length, or not a state.
        """
        try:
            scores, visits, ages = dict(state["scores"]), dict(state["visits"]), dict(state["ages"])
            steps, step, spent = int(state["steps"]), int(state["step"]), float(state["spent"])
            live, on_trial = frozenset(state["live"]), frozenset(state["on_trial"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the state of kill-and-revive is damaged ({error!r}): resume from another."
            ) from error
        if steps != self.plan.steps:
            raise CheckpointError(
                f"the checkpoint's sites were planned for {steps} steps, this run's for {self.plan.steps}: "
                "resume with as many steps as it was started with."
            )
        strange = {name for known in (scores, visits, ages) for name in known.keys() ^ self._sites.names}
        strange |= live - self._sites.names
        if strange:
            name = min(strange)
            raise CheckpointError(f"the site {name} is not in both the checkpoint and this run: resume with its sites.")
        self._step, self._spent, self._live, self._on_trial = step, spent, live, on_trial
        # In this run's order, which decides between equal sites.
        self._scores = {name: float(scores[name]) for name in self._order}
        self._visits = {name: int(visits[name]) for name in self._order}
        self._ages = {name: int(ages[name]) for name in self._order}

    def _decide(self) -> Decision | None:
        step, budget = self._step, self.options.budget
        base = self.plan.base_level(step, self._spent)
        level, trial = base + self.plan.extra[step], step in self.plan.trials
        values = self._values()
        before = self._live
        dead = {name: value for name, value in values.items() if name not in before}
        if step > self.plan.settled:
            kept, live = before, self._sites.fill(dead, base, budget, before)
            if live == before:
                return None
        else:
            weight = {name: 1.0 if name in self._on_trial else self.options.incumbency for name in before}
            staying = {name: value * weight[name] for name, value in values.items() if name in before}
            keep = base if trial else level
            live = kept = self._sites.fill(staying, keep, budget) or self._sites.fill(values, keep, budget)
            if trial:
                curious = {name: value + self._bonus(name) for name, value in dead.items()}
                live = self._sites.fill(curious, level, budget, kept)
        self._live, self._on_trial = live, live - kept
        killed, revived = sorted(before - live), sorted(live - before)
        self._ages |= dict.fromkeys(revived, 0)
        return Decision(step, tuple(killed), tuple(revived), tuple(sorted(live)), values)

    def _values(self) -> dict[str, float]:
        """Scores to compare, in the seed's order: none negative, of mean 1."""
        scores = {name: max(0.0, score) for name, score in self._scores.items()}
        mean = sum(scores.values()) / len(scores)
        return {name: score / mean if score else 0.0 for name, score in scores.items()}

    def _bonus(self, name: str) -> float:
        return self.options.exploration * math.sqrt(math.log(self._step) / self._visits[name])
