"""What sites cost, how a budget is filled, fixed choices, and the score of a site."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, strategies as st

from isthmus.common.errors import CheckpointError, ConfigError
from isthmus.edge.sites.site_policy import (
    Accounting,
    Budget,
    Cost,
    FixedSites,
    SiteInfo,
    Sites,
    evenly_spaced,
    gain,
    random_sites,
)

from .conftest import H, layout, name, noise

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


# What is refused ------------------------------------------------------------------------------------------------------


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
