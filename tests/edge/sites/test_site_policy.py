"""Policies choose sites within their budget, whatever the scores are, and the same ones after a resume."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings, strategies as st

from isthmus.common.errors import CheckpointError, ConfigError, NonFiniteError
from isthmus.edge.sites.kill_revive import KillRevive, KillReviveOptions, plan
from isthmus.edge.sites.site_policy import (
    Accounting,
    Budget,
    Cost,
    Decision,
    FixedSites,
    SiteInfo,
    Sites,
    evenly_spaced,
    gain,
    random_sites,
)

H = 576
Scoring = Callable[[int, str], float]


def layout(layers: int = 26, *, summed: bool = False) -> Sites:
    """LoRA of rank 8 on q and v of SmolLM2-135M's layers."""
    return Sites(
        SiteInfo.of_linear(
            f"model.layers.{layer}.self_attn.{kind}",
            layer=layer,
            group=f"{layer}/attn",
            in_features=H,
            out_features=out,
            parameters=8 * (H + out),
            summed=summed,
        )
        for layer in range(2, 2 + layers)
        for kind, out in (("q_proj", H), ("v_proj", H // 3))
    )


def name(layer: int, kind: str = "v") -> str:
    return f"model.layers.{layer}.self_attn.{kind}_proj"


def run(
    policy: KillRevive, sites: Sites, score: Scoring, start: int = 0
) -> tuple[list[frozenset[str]], list[Decision]]:
    """The live sites of each step to the end, and the decisions."""
    lives, decisions = [], []
    for step in range(start, policy.plan.steps):
        lives.append(policy.live(step))
        decision = policy.observe(step, {site: score(step, site) for site in lives[-1]})
        decisions += [] if decision is None else [decision]
    return lives, decisions


def noise(seed: int) -> Scoring:
    return lambda step, site: random.Random(f"{seed}/{step}/{site}").uniform(-0.1, 1)  # noqa: S311


# Costs ----------------------------------------------------------------------------------------------------------------


def test_a_layer_with_q_and_v_costs_what_the_table_of_bytes_says() -> None:
    for summed, per_layer in ((False, (7 + 10) * H // 3), (True, (7 + 7) * H // 3)):
        sites = layout(summed=summed)
        assert sites.cost({name(4), name(4, "q")}) == Cost(per_layer, 6 * 8 * (3 * H + H // 3), 1)
        assert sites.total == sum([sites.cost({name(4), name(4, "q")})] * 26, Cost())


def test_the_second_site_of_a_group_shares_its_input() -> None:
    sites = layout()
    both, alone = sites.cost({name(4), name(4, "q")}), [sites.cost({name(4)}), sites.cost({name(4, "q")})]
    assert both.traffic == alone[0].traffic + alone[1].traffic - H
    assert sites.cost({name(4), name(5, "q")}) == alone[0] + alone[1]


def test_a_load_is_the_nearer_of_two_limits() -> None:
    sites = layout()
    assert sites.load(sites.names, Budget(0.5, 1)) == pytest.approx(2)
    assert sites.load(sites.names, Budget(1, 0.25)) == pytest.approx(4)
    assert sites.load((), Budget()) == 0


# Filling --------------------------------------------------------------------------------------------------------------


def test_fill_takes_the_highest_value_per_load() -> None:
    sites = layout()
    values = dict.fromkeys(sorted(sites.names), 1.0) | {name(7, "q"): 2.0}
    one_of_each = sites.load({name(3), name(7, "q")}, Budget())
    chosen = sites.fill(values, one_of_each, Budget())
    # q of layer 7 costs 1.5 times a v; then v of layer 7 adds less than any other v, since the input is there already.
    assert chosen == {name(7, "q"), name(7)}
    assert sites.fill(values, one_of_each, Budget(), base={name(3)}) == {name(3), name(7, "q")}


def test_fill_passes_over_what_does_not_fit_and_takes_the_earlier_of_equals() -> None:
    sites = layout()
    values = {name(9, "q"): 100.0, name(5): 1.0, name(4): 1.0}
    assert sites.fill(values, sites.load({name(4)}, Budget()), Budget()) == {name(5)}
    assert sites.fill(values, 0, Budget()) == frozenset()
    assert sites.fill(dict.fromkeys(sites.names, 0.0), 1e9, Budget()) == sites.names


@given(st.integers(1, 8), st.floats(0, 12), st.integers(0, 99))
def test_fill_never_exceeds_the_level_and_leaves_no_room(layers: int, level: float, seed: int) -> None:
    sites, budget = layout(layers), Budget(0.2, 0.15)
    values = {site: noise(seed)(0, site) + 0.1 for site in sorted(sites.names)}
    chosen = sites.fill(values, level, budget)
    assert sites.load(chosen, budget) <= level + 1e-9
    assert all(sites.load({*chosen, site}, budget) > level for site in sites.names - chosen)


# Fixed choices --------------------------------------------------------------------------------------------------------


@given(st.integers(1, 30), st.floats(0.05, 1), st.integers(0, 99))
def test_random_sites_use_the_budget_and_repeat_by_seed(layers: int, share: float, seed: int) -> None:
    sites, budget = layout(layers), Budget(share, share)
    chosen = random_sites(sites, budget, seed)
    assert chosen == random_sites(sites, budget, seed)
    assert sites.load(chosen, budget) <= 1 + 1e-9
    assert all(sites.load({*chosen, site}, budget) > 1 for site in sites.names - chosen)


def test_random_sites_differ_by_seed() -> None:
    assert len({random_sites(layout(), Budget(), seed) for seed in range(5)}) == 5


def test_evenly_spaced_sites_are_of_one_kind_and_as_many_as_fit() -> None:
    sites = layout()
    chosen = evenly_spaced(sites, "v_proj", Budget(0.15, 0.2))
    layers = sorted(sites.infos[site].layer for site in chosen)
    assert {sites.infos[site].kind for site in chosen} == {"v_proj"}
    assert (layers[0], layers[-1]) == (2, 27)
    assert {later - earlier for earlier, later in pairwise(layers)} <= {3, 4}
    assert sites.load(chosen, Budget(0.15, 0.2)) <= 1 < sites.load({*chosen, name(3)}, Budget(0.15, 0.2))


def test_evenly_spaced_sites_at_the_extremes() -> None:
    sites = layout(5)
    assert evenly_spaced(sites, "v_proj", Budget(1, 1)) == {name(layer) for layer in range(2, 7)}
    assert evenly_spaced(sites, "v_proj", Budget(0.1, 1)) == {name(4)}
    with pytest.raises(ConfigError, match="allows not even one"):
        evenly_spaced(sites, "v_proj", Budget(0.05, 1))
    with pytest.raises(ConfigError, match=r"'o_proj'.*q_proj, v_proj"):
        evenly_spaced(sites, "o_proj", Budget())


def test_a_fixed_policy_stays_and_refuses_another_ones_checkpoint() -> None:
    policy = FixedSites({"b", "a"})
    assert policy.live(0) == policy.live(10**6) == {"a", "b"}
    policy.observe(0, {"a": 1.0, "b": 2.0})
    policy.load_state(json.loads(json.dumps(policy.state())))
    with pytest.raises(CheckpointError, match="'c'"):
        policy.load_state(FixedSites({"c"}).state())


def test_accounts_are_shares_of_always_on() -> None:
    sites, budget = layout(4), Budget(0.5, 0.5)
    accounts = Accounting(sites)
    assert set(accounts.shares().values()) == {0}
    accounts.add(sites.names)
    for _ in range(3):
        accounts.add({name(2), name(2, "q")})
    assert accounts.shares() == pytest.approx(dict.fromkeys(("traffic", "computation", "groups"), (1 + 3 / 4) / 4))
    resumed = Accounting(sites)
    resumed.load_state(json.loads(json.dumps(accounts.state())))
    for account in (accounts, resumed):
        account.add(random_sites(sites, budget, 0))
    assert resumed.shares() == accounts.shares()


# Scores ---------------------------------------------------------------------------------------------------------------


def test_gains_add_up_to_what_the_loss_falls_by() -> None:
    torch.manual_seed(0)
    weights = {site: torch.randn(3, dtype=torch.float64, requires_grad=True) for site in "ab"}
    target = torch.randn(3, dtype=torch.float64)

    def loss() -> torch.Tensor:
        return ((weights["a"] * 2 + weights["b"] - target) ** 2).sum()

    first = loss()
    first.backward()
    before = {site: weight.detach().clone() for site, weight in weights.items()}
    rate = 1e-6
    torch.optim.SGD(weights.values(), lr=rate).step()
    gains = {site: gain([(weight, before[site])], rate) for site, weight in weights.items()}
    assert sum(gains.values()) * rate == pytest.approx((first - loss()).item(), rel=1e-4)
    assert gains["a"] == pytest.approx(4 * gains["b"])
    uphill = torch.zeros(3, requires_grad=True)
    assert gain([(uphill, torch.ones(3))], 1.0) == 0  # no gradient
    uphill.grad = -torch.ones(3)
    assert gain([(uphill, torch.ones(3))], 1.0) == -3


# Kill and revive ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("summed", [False, True])
def test_the_default_keeps_the_budget_of_a_run_of_400_steps_and_uses_it(summed: bool) -> None:
    sites = layout(summed=summed)
    policy, accounts = KillRevive(sites, 400), Accounting(sites)
    lives, decisions = run(policy, sites, noise(0))
    for live in lives:
        accounts.add(live)
    shares = accounts.shares()
    assert shares["computation"] <= 0.195
    assert 0.137 < shares["traffic"] <= 0.145
    assert any(decision.revived for decision in decisions)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 20),
    st.integers(30, 200),
    st.builds(
        KillReviveOptions,
        budget=st.builds(Budget, st.floats(0.1, 1), st.floats(0.1, 1)),
        visits=st.integers(1, 4),
        period=st.integers(1, 12),
        kill_from=st.floats(1, 4),
        kill_share=st.floats(0, 0.3),
        revive_every=st.integers(0, 3),
        revive_load=st.floats(0, 0.5),
        settle_share=st.floats(0, 0.9),
    ),
    st.integers(0, 99),
)
def test_no_scores_lead_over_the_budget(layers: int, steps: int, options: KillReviveOptions, seed: int) -> None:
    sites = layout(layers)
    try:
        policy = KillRevive(sites, steps, options)
    except ConfigError:
        return
    accounts, live = Accounting(sites), sites.names
    lives, decisions = run(policy, sites, noise(seed))
    for each in lives:
        assert each
        accounts.add(each)
    shares = accounts.shares()
    assert shares["traffic"] <= options.budget.traffic + 1e-9
    assert shares["computation"] <= options.budget.computation + 1e-9
    for decision in decisions:
        assert set(decision.killed) <= live
        assert not live & set(decision.revived)
        live = (live - set(decision.killed)) | set(decision.revived)
        assert live == set(decision.live)
        assert decision.step == steps or lives[decision.step] == live


def test_the_warmup_trains_all_sites_at_once_and_costs_that() -> None:
    sites = layout()
    options = KillReviveOptions(visits=20, settle_share=0.5)
    lives, _ = run(KillRevive(sites, 400, options), sites, noise(0))
    assert lives[19] == sites.names != lives[20]
    assert plan(sites, options, 400).base_level(20, 20 * sites.load(sites.names, options.budget)) < 0.7
    with pytest.raises(ConfigError, match=r"warm-up of 60 steps takes 103% .* run of 400 \(14.5% of the traffic"):
        plan(sites, replace(options, visits=60), 400)
    with pytest.raises(ConfigError, match=r"leave a load of .* smallest site needs"):
        plan(sites, replace(options, visits=57), 400)


@pytest.mark.parametrize("steps", [10, 27, 39])
def test_a_run_too_short_for_its_phases_is_refused(steps: int) -> None:
    with pytest.raises(ConfigError, match=f"a run of {steps} steps is too short for 2 of warm-up"):
        plan(layout(), KillReviveOptions(), steps)


def test_the_live_sites_shrink_to_the_best_and_then_stay() -> None:
    sites = layout()
    best = {name(5), name(6), name(20), name(11, "q"), name(12, "q")}
    policy = KillRevive(sites, 400, KillReviveOptions(kill_from=2, kill_share=0.1, revive_every=0))
    lives, decisions = run(policy, sites, lambda step, site: noise(0)(step, site) + 4 * (site in best))
    assert best <= lives[-1]
    killing = [sites.load(set(decision.live), policy.options.budget) for decision in decisions][:5]
    assert killing == sorted(killing, reverse=True)
    assert killing[0] > 1.8
    assert killing[-1] < 1.1
    assert not any(decision.killed for decision in decisions if decision.step > policy.plan.settled == 112)
    assert decisions[-1].step <= 260
    assert len(set(lives[decisions[-1].step :])) == 1


@pytest.mark.parametrize(("later", "stays"), [(0.5, False), (1.5, False), (9.0, True)])
def test_a_revived_site_stays_only_if_it_is_much_better(later: float, stays: bool) -> None:
    """One site seems useless in the warm-up, where all do ten times what they do later; in its trial it does `later`
    times what the live ones do."""
    sites, late, good = layout(), name(9), {name(layer) for layer in range(21, 28)}

    def score(step: int, site: str) -> float:
        now = 10.0 if step < 2 else 1.0
        return (0.3 * now if step < 50 else later) if site == late else now * (1.0 if site in good else 0.01)

    policy = KillRevive(sites, 400, KillReviveOptions(exploration=0))
    lives, _ = run(policy, sites, score)
    tried = min(policy.plan.trials)
    assert lives[tried - 1] == good
    assert late in lives[tried] >= good
    assert (late in lives[tried + 10]) == stays
    assert len(lives[tried + 10] & good) == (6 if stays else 7)


def test_room_that_whole_sites_leave_is_used_in_the_end() -> None:
    sites, good = layout(), {name(layer) for layer in range(21, 28)}
    policy = KillRevive(sites, 400, KillReviveOptions(revive_every=0))
    lives, decisions = run(policy, sites, lambda _, site: float(site in good))
    assert good == lives[decisions[-1].step - 1] < lives[-1]


def test_something_stays_live_where_no_live_site_fits_any_more() -> None:
    cheap, dear = SiteInfo("cheap", 0, "v", "0", 10, 10, 10), SiteInfo("dear", 1, "v", "1", 100, 10, 10)
    sites = Sites([cheap, dear])
    options = KillReviveOptions(budget=Budget(0.6, 1), visits=1, period=5, kill_share=0.1, revive_every=0)
    lives, decisions = run(KillRevive(sites, 60, options), sites, lambda _, site: 100.0 if site == "dear" else 1.0)
    assert decisions[0].live == ("dear",)
    assert lives[-1] == {"cheap"}


def test_exploration_brings_back_what_was_tried_least() -> None:
    sites = layout()

    def trials(exploration: float) -> int:
        options = KillReviveOptions(exploration=exploration, revive_every=1, settle_share=0.5)
        _, decisions = run(KillRevive(sites, 400, options), sites, lambda _, site: sites.infos[site].layer)
        return len({site for decision in decisions for site in decision.revived})

    assert trials(50) > trials(0)


def test_equal_sites_are_decided_between_by_the_seed() -> None:
    sites = layout()
    ends = [run(KillRevive(sites, 400, KillReviveOptions(seed=s)), sites, lambda *_: 1.0)[0][-1] for s in (0, 0, 1)]
    assert ends[0] == ends[1] != ends[2]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 118), st.integers(0, 99))
def test_a_restored_policy_goes_on_identically(stop: int, seed: int) -> None:
    sites, options = layout(9), KillReviveOptions(period=4, seed=seed)
    straight = run(KillRevive(sites, 120, options), sites, noise(seed))
    first = KillRevive(sites, 120, options)
    for step in range(stop):
        first.observe(step, {site: noise(seed)(step, site) for site in first.live(step)})
    second = KillRevive(sites, 120, options)
    second.load_state(json.loads(json.dumps(first.state(), sort_keys=True)))
    lives, decisions = run(second, sites, noise(seed), stop)
    assert lives == straight[0][stop:]
    assert decisions == [decision for decision in straight[1] if decision.step > stop]


def test_asking_again_changes_nothing_and_other_steps_are_refused() -> None:
    policy = KillRevive(layout(), 400)
    assert policy.live(0) == policy.live(0)
    for step in (1, 5):
        with pytest.raises(ConfigError, match=f"step {step} are asked for, but 0 steps"):
            policy.live(step)
    with pytest.raises(ConfigError, match="planned for 400 steps"):
        policy.live(400)


def test_sites_that_do_nothing_at_all_are_still_chosen_within_the_budget() -> None:
    sites = layout()
    lives, _ = run(KillRevive(sites, 400), sites, lambda *_: 0.0)
    assert 0 < sites.load(lives[-1], Budget()) < 1.1


def test_the_state_of_another_run_is_refused() -> None:
    sites = layout()
    policy, state = KillRevive(sites, 400), KillRevive(sites, 400).state()
    with pytest.raises(CheckpointError, match="planned for 300 steps, this run's for 400"):
        policy.load_state(KillRevive(sites, 300).state())
    with pytest.raises(CheckpointError, match=r"layers\.27.* is not in both"):
        policy.load_state(KillRevive(layout(25), 400).state())
    for key in state:
        with pytest.raises(CheckpointError, match="damaged"):
            policy.load_state({k: v for k, v in state.items() if k != key})
    with pytest.raises(CheckpointError, match="damaged"):
        policy.load_state(state | {"scores": 3})
    assert policy.state() == state


@pytest.mark.parametrize("share", [0, -0.1, 1.01, float("nan")])
def test_a_budget_is_a_share(share: float) -> None:
    with pytest.raises(ConfigError, match=str(share)):
        Budget(traffic=share)
    with pytest.raises(ConfigError, match=str(share)):
        Budget(computation=share)


def test_sites_that_make_no_sense_are_refused() -> None:
    site = SiteInfo("a.v", 0, "v", "g", 1, 1, 1)
    with pytest.raises(ConfigError, match="no sites"):
        Sites([])
    with pytest.raises(ConfigError, match=r"a\.v is given twice"):
        Sites([site, site])
    with pytest.raises(ConfigError, match=r"b\.v shares 2 with its group g"):
        Sites([site, replace(site, name="b.v", shared_traffic=2)])
    with pytest.raises(ConfigError, match="costs nothing"):
        Sites([replace(site, computation=0)])
    with pytest.raises(ConfigError, match="costs nothing"):
        Sites([replace(site, traffic=0, shared_traffic=0)])


def test_bad_scores_are_refused_and_leave_the_policy_as_it_was() -> None:
    policy = KillRevive(layout(), 400)
    live = policy.live(0)
    scores, before = dict.fromkeys(live, 1.0), policy.state()
    bad: list[tuple[Mapping[str, float], type[Exception], str]] = [
        (scores | {name(99): 1.0}, ConfigError, r"layers\.99"),
        (dict(list(scores.items())[1:]), ConfigError, "None"),
        (scores | {max(live): float("nan")}, NonFiniteError, "nan"),
        (scores | {max(live): float("inf")}, NonFiniteError, "inf"),
    ]
    for given_scores, error, words in bad:
        with pytest.raises(error, match=words):
            policy.observe(0, given_scores)
    assert policy.state() == before


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("visits", 0),
        ("period", 0),
        ("beta", 1.0),
        ("kill_from", 0.9),
        ("settle_share", 1.5),
        ("incumbency", 0),
    ],
)
def test_options_out_of_range_are_refused(option: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{option} = {value}"):
        KillReviveOptions(**{option: value})
