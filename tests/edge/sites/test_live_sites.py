"""Live sites: what they cost, who asks the policy and tells it, and what is written down."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support.models.sited_span import Sited
from support.models.small_training import config
from support.models.tiny import CONFIGS, tiny_checkpoint, tiny_config

from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.runtime.site_host import SiteHost, linear_groups
from isthmus.backbone.split.edge_parts import load_edge_parts
from isthmus.backbone.split.span import load_span
from isthmus.common.errors import CheckpointError, ConfigError
from isthmus.edge.sites.kill_revive import KillRevive
from isthmus.edge.sites.live_sites import DECISIONS, LiveSites, live_sites, site_costs
from isthmus.edge.sites.site_policy import Decision, FixedSites

SPLIT = SplitPlan.parse("1:1", 6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("model"))


def edge_model(folder: Path, targets: Any = ("q_proj", "v_proj", "down_proj"), plan: SplitPlan = SPLIT) -> Any:
    model = load_edge_parts(folder, plan, Sited())
    if targets:
        names = targets if isinstance(targets, str) else list(targets)
        peft.get_peft_model(
            model, peft.LoraConfig(r=2, target_modules=names, task_type="CAUSAL_LM", fan_in_fan_out="c_attn" in names)
        )
    return model


# What sites cost ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CONFIGS)
def test_the_groups_of_a_layer_are_known_without_its_weights(family: str, tmp_path: Path) -> None:
    groups = linear_groups(tiny_config(family))
    host = SiteHost(load_span(tiny_checkpoint(family, tmp_path), SplitPlan.parse("2:2", 6)))
    for layer in (2, 3):
        assert tuple(tuple(name for _, name in group) for group in host.groups if group[0][0] == layer) == groups


@pytest.mark.parametrize(
    ("family", "targets"),
    [("llama", ("q_proj", "v_proj", "down_proj")), ("gpt2", ("c_attn", "c_fc")), ("phi3", "all-linear")],
)
def test_a_site_costs_what_its_linear_s_shape_says(family: str, targets: Any, tmp_path: Path) -> None:
    folder = tiny_checkpoint(family, tmp_path)
    model = edge_model(folder, targets)
    sites = list(model.find_sites())
    costs = site_costs(model, sites)
    host = SiteHost(load_span(folder, SPLIT))
    group_of = {place: group for group in host.groups for place in group}
    assert len(costs.infos) == len(sites) > 4
    for site in sites:
        info = costs.infos[site.name]
        n_in, n_out = host.widths(site.spec)
        assert (info.traffic, info.shared_traffic) == (2 * n_out + n_in, n_in)
        assert info.computation == 6 * 2 * (n_in + n_out)  # of rank 2
        together = {(other.layer, other.part) for other in sites if costs.infos[other.name].group == info.group}
        assert together == {(other.layer, other.part) for other in sites} & set(group_of[site.layer, site.part])


# Around a step --------------------------------------------------------------------------------------------------------


class Noted:
    """A policy with fixed turns, which notes what it is told and decides after the second step."""

    def __init__(self, turns: Sequence[frozenset[str]]) -> None:
        self._turns = turns
        self.told: list[tuple[int, dict[str, float]]] = []

    def live(self, step: int) -> frozenset[str]:
        return self._turns[step]

    def observe(self, step: int, scores: Mapping[str, float]) -> Decision | None:
        self.told.append((step, dict(scores)))
        if step != 1:
            return None
        return Decision(2, ("a",), (), tuple(sorted(self._turns[2])), {"a": 0.5})

    def state(self) -> dict[str, Any]:
        return {"told": len(self.told)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.told = self.told[: state["told"]]


class Watched:
    """The observer, its policy, and a model whose sites' gradients a test makes up."""

    def __init__(self, folder: Path, log: Path) -> None:
        self.model = edge_model(folder, ("q_proj",))
        self.sites = {site.name: site for site in self.model.find_sites()}
        names = sorted(self.sites)
        self.turns = [frozenset(names[:2]), frozenset(names[1:3]), frozenset(names[3:]), frozenset(names[3:])]
        self.policy = Noted(self.turns)
        self.said: list[str] = []
        self.log = log / DECISIONS
        self.live = LiveSites(
            self.model.remote_layers,
            self.sites,
            site_costs(self.model, self.sites.values()),
            self.policy,
            lambda step: 0.5 if step else 0.0,
            self.log,
            self.said.append,
        )

    def step(self, number: int, move: float = 0.0) -> None:
        self.live.before_step(number)
        for site in self.sites.values():
            acts = site.name in self.turns[number - 1]
            for parameter in site.parameters:
                parameter.grad = torch.full_like(parameter, 2.0) if acts else None
                with torch.no_grad():
                    parameter.add_(move)
        self.live.after_step(number)


@pytest.fixture
def watched(folder: Path, tmp_path: Path) -> Watched:
    return Watched(folder, tmp_path)


def test_the_gate_has_the_policy_s_sites_at_every_step(watched: Watched) -> None:
    gate = watched.model.remote_layers
    assert gate.live_sites is None
    for number in (1, 2, 3):
        watched.step(number)
        assert gate.live_sites == watched.turns[number - 1]


def test_the_policy_is_told_by_how_much_each_live_site_lowered_the_loss(watched: Watched) -> None:
    watched.step(1, move=-0.25)  # no learning rate yet: it cannot tell
    watched.step(2, move=-0.25)
    size = sum(p.numel() for p in next(iter(watched.sites.values())).parameters)
    assert watched.policy.told == [
        (0, dict.fromkeys(watched.turns[0], 0.0)),
        (1, dict.fromkeys(watched.turns[1], pytest.approx(2.0 * 0.25 * size / 0.5))),
    ]


def test_what_is_not_finite_or_has_no_gradient_scores_nothing(watched: Watched) -> None:
    watched.step(1)
    watched.live.before_step(2)
    one, other = sorted(watched.turns[1])
    for parameter in watched.sites[one].parameters:
        parameter.grad = torch.full_like(parameter, float("inf"))
        with torch.no_grad():
            parameter.add_(1.0)
    for parameter in watched.sites[other].parameters:
        parameter.grad = None
    watched.live.after_step(2)
    assert watched.policy.told[1] == (1, {one: 0.0, other: 0.0})


def test_decisions_are_written_shown_and_counted(watched: Watched) -> None:
    watched.log.write_text("of an older run\n")
    watched.step(1)
    assert watched.log.read_text() == ""
    watched.step(2)
    (line,) = watched.log.read_text().splitlines()
    live = sorted(watched.turns[2])
    assert json.loads(line) == {"step": 2, "killed": ["a"], "revived": [], "live": live, "scores": {"a": 0.5}}
    assert watched.said == [
        f"sites after step 2: {len(live)} live, 1 killed, 0 revived; traffic 50.0%, computation 50.0% of always-on"
    ]
    watched.step(3)
    points = watched.live.points()
    shares = pytest.approx((2 + 2 + len(live)) / (3 * len(watched.sites)))
    assert points == {
        "sites/live": len(live),
        "sites/traffic": shares,
        "sites/computation": shares,
        "sites/groups": shares,
    }


def test_its_state_goes_through_json_and_forgets_what_came_after(
    folder: Path, watched: Watched, tmp_path: Path
) -> None:
    start = json.loads(json.dumps(watched.live.state()))
    watched.step(1)
    early = json.loads(json.dumps(watched.live.state()))
    watched.step(2)
    late = json.loads(json.dumps(watched.live.state()))
    written = watched.log.read_text()

    watched.live.load_state(early)
    assert watched.log.read_text() == ""
    assert watched.model.remote_layers.live_sites == watched.turns[0]
    assert watched.live.state() == early
    watched.live.load_state(start)
    assert watched.model.remote_layers.live_sites is None

    (tmp_path / "other").mkdir()
    other = Watched(folder, tmp_path / "other")
    other.live.load_state(late)
    assert other.log.read_text() == written
    assert other.model.remote_layers.live_sites == other.turns[1]
    assert other.live.accounting.shares() == watched_shares(late)
    other.step(3)
    assert other.log.read_text() == written


def watched_shares(state: dict[str, Any]) -> dict[str, float]:
    spent, whole = state["accounting"]["spent"], state["accounting"]["always_on"]
    return {name: spent[name] / whole[name] for name in spent}


# From a configuration -------------------------------------------------------------------------------------------------


def settings(out: Path, **values: Any) -> Any:
    return config(out, **{"sites": "all", "site_policy": "kill-revive", "dropout": 0.0, **values})


def chosen(folder: Path, out: Path, steps: int = 200, targets: Any = ("q_proj", "v_proj"), **values: Any) -> Any:
    return live_sites(edge_model(folder, targets), settings(out, **values), steps, print)


def test_always_needs_nobody(folder: Path, tmp_path: Path) -> None:
    assert chosen(folder, tmp_path, site_policy="always") is None


@pytest.mark.parametrize("policy", ["random", "even"])
def test_a_fixed_choice_keeps_the_budget_and_is_the_same_every_time(folder: Path, tmp_path: Path, policy: str) -> None:
    values = {"site_policy": policy, "site_traffic": 0.4, "site_computation": 0.5}
    observer = chosen(folder, tmp_path, seed=1, **values)
    observer.before_step(1)
    live = observer._remote_layers.live_sites
    observer.after_step(1)
    shares = observer.accounting.shares()
    assert 0 < shares["traffic"] <= 0.4
    assert 0 < shares["computation"] <= 0.5
    assert chosen(folder, tmp_path, seed=1, **values)._policy.state() == {"live": sorted(live)}
    if policy == "even":
        assert all(name.endswith("v_proj") for name in live)
    else:
        seeds = {frozenset(chosen(folder, tmp_path, seed=seed, **values)._policy.live(0)) for seed in range(5)}
        assert len(seeds) > 1


def test_even_takes_another_kind_where_there_is_no_v(folder: Path, tmp_path: Path) -> None:
    observer = chosen(folder, tmp_path, targets=("q_proj", "o_proj"), site_policy="even", site_traffic=0.3)
    assert isinstance(observer._policy, FixedSites)
    assert all(name.endswith("q_proj") for name in observer._policy.live(0))


def test_kill_and_revive_has_the_run_s_budget_length_and_seed(folder: Path, tmp_path: Path) -> None:
    observer = chosen(folder, tmp_path, steps=300, seed=5, site_traffic=0.3, site_computation=0.4)
    policy = observer._policy
    assert isinstance(policy, KillRevive)
    assert policy.plan.steps == 300
    assert (policy.options.budget.traffic, policy.options.budget.computation, policy.options.seed) == (0.3, 0.4, 5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"targets": None}, "chooses among adapters inside the cloud's layers, and there are none: give --sites"),
        ({"steps": 12}, "a run of 12 steps is too short"),
        ({"site_policy": "even", "site_traffic": 0.01}, "allows not even one site"),
    ],
)
def test_what_cannot_be_chosen_is_refused(folder: Path, tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        chosen(folder, tmp_path, **values)


def test_a_state_of_other_sites_is_refused(folder: Path, tmp_path: Path) -> None:
    budget = {"site_traffic": 0.5, "site_computation": 0.5}
    state = chosen(folder, tmp_path, targets=("q_proj",), **budget).state()
    with pytest.raises(CheckpointError, match=r"v_proj is not in both"):
        chosen(folder, tmp_path, **budget).load_state(state)
