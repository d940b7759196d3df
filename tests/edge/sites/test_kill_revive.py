"""Kill and revive chooses live sites within its budget, whatever the scores are, and the same ones after a resume."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given, settings, strategies as st

from isthmus.common.errors import CheckpointError, ConfigError, NonFiniteError
from isthmus.edge.sites.kill_revive import KillRevive, KillReviveOptions, plan
from isthmus.edge.sites.site_policy import Accounting, Budget, Decision, SiteInfo, Sites

from .conftest import Scoring, layout, name, noise


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
