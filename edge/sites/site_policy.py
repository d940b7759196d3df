"""Which adapter sites are live at an optimizer step: sites and their costs, budgets, fixed choices, and the accounts.

A site is one frozen linear of a cloud layer that carries an adapter of the edge. A live site costs traffic and
computation on the edge for each token, and each group of live sites with one input costs a round trip. A dead site's
adapter is left out of the forward and costs nothing.

A policy chooses the live sites before each optimizer step, and gets their scores after it. The fixed policies here are
for comparison: all sites, a random choice, and evenly spaced sites of one kind. `isthmus.edge.sites.kill_revive` has
the policy that learns. Nothing here imports a link, a model or a trainer.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol, Self

from torch import Tensor

from isthmus.common.errors import CheckpointError, ConfigError

# Loads are sums of quotients; this is far above their rounding and far below any site's load.
_ROUNDING = 1e-12


@dataclass(frozen=True, slots=True)
class SiteInfo:
    """One site and what it costs per token of a training step while it is live.

    Only shares of the sums count, so any units do, if all sites have the same ones.

    Attributes:
        kind: The last part of its name, such as `v_proj`.
        group: The sites that read the same input.
        traffic: What the site itself moves: elements, or bytes where the two directions differ in width.
        shared_traffic: What its group moves once, as soon as one of its sites is live. The same for the whole group.
        computation: The edge's, in multiplications or FLOPs.
    """

    name: str
    layer: int
    kind: str
    group: str
    traffic: int
    shared_traffic: int
    computation: int

    @classmethod
    def of_linear(
        cls,
        name: str,
        *,
        layer: int,
        group: str,
        in_features: int,
        out_features: int,
        parameters: int,
        summed: bool = False,
    ) -> Self:
        """The site at a linear `[out_features, in_features]`. The kind of a site behind a whole layer is `layer`.

        - Forward: the input comes down once for the group, and the delta goes up.
        - Backward: the delta's gradient comes down, and the gradient of the input goes up: one for each site, or one
          for the group if `summed`.
        - An adapter of N parameters, all in matrices, costs 6N FLOPs (see `isthmus.edge.run_report`).
        """
        own, shared = (0, 2 * in_features) if summed else (in_features, in_features)
        last = name.rpartition(".")[2]
        kind = "layer" if last.isdigit() else last
        return cls(name, layer, kind, group, 2 * out_features + own, shared, 6 * parameters)


@dataclass(frozen=True, slots=True)
class Cost:
    """What live sites cost: traffic and computation in the units of `SiteInfo`, and groups (round trips)."""

    traffic: int = 0
    computation: int = 0
    groups: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.traffic + other.traffic, self.computation + other.computation, self.groups + other.groups)


@dataclass(frozen=True, slots=True)
class Budget:
    """The shares of always-on's traffic and computation that a run may spend, both over 0 and up to 1.

    The defaults leave room below 15 % and 20 % for frame headers and for batches of uneven length.
    """

    traffic: float = 0.145
    computation: float = 0.195

    def __post_init__(self) -> None:
        for field in fields(self):
            share = getattr(self, field.name)
            if not 0 < share <= 1:
                raise ConfigError(
                    f"the budget of {field.name} is {share}: give a share of always-on's, above 0 up to 1."
                )


class Sites:
    """All sites of a model, what any set of them costs, and how to fill a budget with them.

    A *load* is a cost in units of a budget: a load of 1 is what the budget allows per step on average, in traffic or in
    computation, whichever is nearer to its limit. If the loads of all steps average 1 or less, both budgets are kept.

    Raises:
        ConfigError: There are no sites, two of one name, or sites of a group that disagree about what they share.
    """

    def __init__(self, sites: Iterable[SiteInfo]) -> None:
        self.infos: dict[str, SiteInfo] = {}
        shared: dict[str, int] = {}
        for site in sites:
            if site.name in self.infos:
                raise ConfigError(f"the site {site.name} is given twice: name each site once.")
            if (
                min(site.traffic, site.shared_traffic) < 0
                or site.traffic + site.shared_traffic == 0
                or site.computation <= 0
            ):
                raise ConfigError(
                    f"the site {site.name} costs nothing or less ({site}): give what it moves and computes."
                )
            if shared.setdefault(site.group, site.shared_traffic) != site.shared_traffic:
                raise ConfigError(
                    f"the site {site.name} shares {site.shared_traffic} with its group {site.group}, others "
                    f"{shared[site.group]}: sites of a group have one input."
                )
            self.infos[site.name] = site
        if not self.infos:
            raise ConfigError("there are no sites to choose from: name target modules in the cloud's layers.")
        self.names = frozenset(self.infos)
        self.total = self.cost(self.names)

    def cost(self, live: Iterable[str]) -> Cost:
        """The cost per token of a step in which exactly `live` are live."""
        sites = [self.infos[name] for name in live]
        shared = {site.group: site.shared_traffic for site in sites}
        traffic = sum(site.traffic for site in sites) + sum(shared.values())
        return Cost(traffic, sum(site.computation for site in sites), len(shared))

    def load(self, live: Iterable[str], budget: Budget) -> float:
        """The cost of `live`, as a load."""
        return self._as_load(self.cost(live), budget)

    def fill(
        self, values: Mapping[str, float], level: float, budget: Budget, base: Iterable[str] = ()
    ) -> frozenset[str]:
        """Add to `base`, one by one, the site of the highest value per load that it adds, while the load allows.

        The greedy rule for knapsacks. A second site of a group adds less than the first one, whose input it shares.

        Args:
            values: Of the candidates, not negative. Of equal ones the earlier is taken.

        Returns:
            `base` and what was added.
        """
        chosen = set(base)
        spent = self.cost(chosen)
        while True:
            open_groups = {self.infos[name].group for name in chosen}
            best, best_value, best_added = None, -1.0, Cost()
            for name, value in values.items():
                if name in chosen:
                    continue
                added = self._added(name, open_groups)
                per_load = value / self._as_load(added, budget)
                if per_load > best_value and self._as_load(spent + added, budget) <= level + _ROUNDING:
                    best, best_value, best_added = name, per_load, added
            if best is None:
                return frozenset(chosen)
            chosen.add(best)
            spent += best_added

    def _added(self, name: str, open_groups: set[str]) -> Cost:
        site = self.infos[name]
        if site.group in open_groups:
            return Cost(site.traffic, site.computation)
        return Cost(site.traffic + site.shared_traffic, site.computation, 1)

    def _as_load(self, cost: Cost, budget: Budget) -> float:
        return max(
            cost.traffic / (budget.traffic * self.total.traffic),
            cost.computation / (budget.computation * self.total.computation),
        )


@dataclass(frozen=True, slots=True)
class Decision:
    """A change of the live sites, for logs and curves.

    `step` counts the optimizer steps applied before it; `killed` and `revived` are the differences to what was live
    before. `scores` are of all sites, as they were compared.
    """

    step: int
    killed: tuple[str, ...]
    revived: tuple[str, ...]
    live: tuple[str, ...]
    scores: dict[str, float]


class SitePolicy(Protocol):
    """Chooses the live sites. A step is named by the number of steps applied before it, so the first one is 0."""

    def live(self, step: int) -> frozenset[str]:
        """The sites that are live in the optimizer step after `step` applied ones; asking again changes nothing."""

    def observe(self, step: int, scores: Mapping[str, float]) -> Decision | None:
        """Take in the scores of the live sites after that step; see `gain`.

        Returns:
            The change of the live sites from the next step on; None without a change.
        """

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the policy, as JSON has it."""

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises:
            CheckpointError: It is of other sites or another run.
        """


class FixedSites:
    """The same sites at every step."""

    def __init__(self, names: Iterable[str]) -> None:
        self._live = frozenset(names)

    def live(self, step: int) -> frozenset[str]:
        """The sites; see `SitePolicy`."""
        return self._live

    def observe(self, step: int, scores: Mapping[str, float]) -> None:
        """Nothing is learned."""

    def state(self) -> dict[str, Any]:
        """The names."""
        return {"live": sorted(self._live)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Check that they are the same; see `SitePolicy`."""
        if state != self.state():
            raise CheckpointError(
                f"the checkpoint's live sites are {state.get('live')}, this run's {sorted(self._live)}: "
                "resume with the sites that it was started with."
            )


def random_sites(sites: Sites, budget: Budget, seed: int) -> frozenset[str]:
    """Sites drawn by `seed`, as many as fit the budget at every step."""
    order = sorted(sites.names)
    random.Random(seed).shuffle(order)  # noqa: S311  # a draw, no secret
    chosen: set[str] = set()
    for name in order:
        if sites.load({*chosen, name}, budget) <= 1 + _ROUNDING:
            chosen.add(name)
    return frozenset(chosen)


def evenly_spaced(sites: Sites, kind: str, budget: Budget) -> frozenset[str]:
    """Sites of one kind, v_proj for example, at even distances over the layers, as many as fit the budget.

    Of M sites, k > 1 are those at `round(i·(M-1)/(k-1))`; a single one is the middle one.

    Raises:
        ConfigError: There is no site of this kind, or the budget allows none.
    """
    of_kind = sorted((site for site in sites.infos.values() if site.kind == kind), key=lambda site: site.layer)
    if not of_kind:
        kinds = ", ".join(sorted({site.kind for site in sites.infos.values()}))
        raise ConfigError(f"no site is of the kind {kind!r}: choose among {kinds}.")
    for k in range(len(of_kind), 0, -1):
        last = len(of_kind) - 1
        spread = {of_kind[round(i * last / (k - 1))].name for i in range(k)} if k > 1 else {of_kind[last // 2].name}
        if sites.load(spread, budget) <= 1 + _ROUNDING:
            return frozenset(spread)
    raise ConfigError(f"{budget} allows not even one site of the kind {kind!r}: raise it.")


class Accounting:
    """What a run's live sites have cost, and what all sites would have cost."""

    def __init__(self, sites: Sites) -> None:
        self._sites = sites
        self.spent = Cost()
        self.always_on = Cost()

    def add(self, live: Iterable[str]) -> None:
        """Count a step with these sites live."""
        self.spent += self._sites.cost(live)
        self.always_on += self._sites.total

    def shares(self) -> dict[str, float]:
        """Traffic, computation and groups (round trips) as shares of always-on's; 0 before the first step."""
        spent, whole = asdict(self.spent), asdict(self.always_on)
        return {name: spent[name] / whole[name] if whole[name] else 0.0 for name in spent}

    def state(self) -> dict[str, Any]:
        """The counts, as JSON has them."""
        return {"spent": asdict(self.spent), "always_on": asdict(self.always_on)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on counting where `state` was taken."""
        self.spent, self.always_on = Cost(**state["spent"]), Cost(**state["always_on"])


def gain(moved: Iterable[tuple[Tensor, Tensor]], learning_rate: float) -> float:
    """How much one site's step lowered the loss, to first order: `-⟨∇θ, θ' - θ⟩ / learning rate`.

    The sum over the sites is the step's whole first-order decrease, so sites of all kinds can be compared. It is
    negative where momentum carries a site uphill. The Taylor scores of pruning (Molchanov et al. 2019) and AdaLoRA's
    sensitivity are similar.

    Args:
        moved: The site's parameters after the step, with the gradients that the optimizer was given (those without one
            do not count), and the values that they had before it.
        learning_rate: The step's, above 0.
    """
    fallen = 0.0
    for parameter, before in moved:
        if parameter.grad is not None:
            fallen += float((parameter.grad.double() * (before - parameter.detach()).double()).sum())
    return fallen / learning_rate
