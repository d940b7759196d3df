"""What the modes of the placement benchmark are, and the figures that it draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from isthmus.common.errors import ConfigError
from isthmus.edge.config.training_config import TrainConfig
from isthmus.experiments.placements.placement_figures import bytes_of, draw_budgets, draw_losses, draw_sites, short_name
from isthmus.experiments.placements.placement_modes import MODES, modes_of
from isthmus.experiments.placements.placements import _verdict
from isthmus.planner.cost_model import MODES as PLANNED


@pytest.mark.parametrize("name", MODES)
def test_every_mode_is_planned_and_its_options_are_a_run_s(name: str) -> None:
    mode = MODES[name]
    assert mode.planned_as in PLANNED
    TrainConfig(cloud="-", data="-", **mode.options)
    alone = TrainConfig(cloud="-", data="-", **mode.alone)
    assert (alone.sites, alone.span_cache_mib, alone.site_policy) == ("none", None, "always")


def test_only_the_tail_has_another_plan() -> None:
    assert {name: mode.edge_layers("3:2") for name, mode in MODES.items() if mode.edge_layers("3:2") != "3:2"} == {
        "tail_cache": "0:2"
    }


def test_modes_are_read_in_the_order_given_and_once() -> None:
    assert [mode.name for mode in modes_of("taps, edge,taps")] == ["taps", "edge"]
    assert [mode.name for mode in modes_of("")] == list(MODES)
    with pytest.raises(ConfigError, match=r"'lease' is no mode.*leased"):
        modes_of("lease")


def test_a_policy_can_have_another_budget() -> None:
    usual, small = modes_of("random, random@0.05")
    config = TrainConfig(cloud="-", data="-", **small.options)
    assert (small.name, config.site_policy, config.site_traffic) == ("random@0.05", "random", 0.05)
    assert config.site_computation == pytest.approx(0.195 * 0.05 / 0.145)
    assert "site_traffic" not in usual.options
    for wrong in ("edge@0.1", "random@", "random@2", "random@x"):
        with pytest.raises(ConfigError, match=rf"'{wrong}' is no mode.*kill_revive, random, even"):
            modes_of(wrong)


def test_losses_are_drawn_over_budgets(tmp_path: Path) -> None:
    runs = [
        {"mode": "single", "score": 1.0, "site_traffic_share": None},
        {"mode": "kill_revive", "score": 1.2, "site_traffic_share": 0.145},
        {"mode": "kill_revive@0.05", "score": 1.4, "site_traffic_share": 0.05},
        {"mode": "random", "score": None, "site_traffic_share": None},
    ]
    draw_budgets({"runs": runs, "settings": {"model": "tiny"}}, tmp_path / "budgets.png")
    assert (tmp_path / "budgets.png").read_bytes().startswith(b"\x89PNG")


def test_the_verdict_is_of_gains_over_the_model_as_it_is() -> None:
    rows: dict[str, dict[str, Any]] = {
        "edge": {"score": 1.0},
        "kill_revive": {"score": 1.1, "site_traffic_share": 0.125, "site_computation_share": 0.25},
        "random": {"score": 1.5},
        "even": {"score": None},
        "random@0.05": {"score": 1.8},
    }
    verdict = _verdict(rows, {"completion_loss": 3.0})
    assert verdict == {
        "gain_shares": {"kill_revive": pytest.approx(0.95), "random": 0.75, "random@0.05": pytest.approx(0.6)},
        "less_site_traffic": 0.875,
        "less_adapter_computation": 0.75,
    }
    assert _verdict({"single": rows.pop("edge")} | rows, {"completion_loss": 3.0}) == verdict
    assert _verdict(rows, None) is None
    assert _verdict(rows | {"kill_revive": {"score": None}}, {"completion_loss": 3.0}) is None


def row(mode: str, score: float | None, up: float | None, first: float | None = None) -> dict[str, Any]:
    return {
        "mode": mode,
        "score": score,
        "bytes_per_token_up": up,
        "bytes_per_token_down": up,
        "first_epoch_bytes_per_token": first,
    }


def test_figures_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        row("u_shape", 1.5, 4608.0),
        row("tail_cache", 1.7, 0.0, 4608.0),
        row("single", 1.4, 0.0),
        row("x", None, 1),
    ]
    assert [bytes_of(each) for each in rows] == [9216.0, 4608.0, 0.0, 2.0]
    policy = row("random", 1.6, 5000.0) | {"site_traffic_share": 0.25}
    always = row("edge", 1.3, 50_000.0)
    assert bytes_of(policy, {"u_shape": rows[0], "edge": always}) == 9216 + 0.25 * (100_000 - 9216)
    assert bytes_of(policy, {"u_shape": rows[0]}) == 10_000.0
    draw_losses({"runs": rows, "settings": {"model": "tiny"}}, tmp_path / "losses.png")
    names = ["model.layers.3.self_attn.v_proj", "model.layers.11.self_attn.q_proj"]
    assert short_name(names[1]) == "11 q_proj"
    draw_sites([{"step": 10, "live": names}, {"step": 30, "live": names[:1]}], 50, tmp_path / "sites.png")
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("losses.png", "sites.png"))
