"""What the plan recommends and shows, from made-up costs."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console
from support.models.round_speeds import speed

from isthmus.backbone.plan import SplitPlan
from isthmus.edge.codecs.wire_codecs import WireCodecs
from isthmus.planner.cost_model import MODES, ModeCost, PlanSettings, StepCost, Work
from isthmus.planner.link_spec import LinkSpec
from isthmus.planner.plan_report import assumptions, budget_lines, notes, recommend, rows, table
from isthmus.planner.wire_cost import Traffic

POSITIONS = 512


def cost(
    mode: str, seconds: float, kib_per_token: float = 1.0, memory: float = 1e9, first: float | None = None
) -> ModeCost:
    """A mode whose step takes `seconds`, most of them on the wire, and moves so much, up and down alike."""
    half = kib_per_token * 1024 * POSITIONS / 2
    step = StepCost(Work(seconds / 4, 3e9), Work(0.0, 1e9), Traffic(half, half, 6), seconds * 3 / 4)
    if first is None:
        return ModeCost(mode, step, memory, 2e9)
    cached = StepCost(Work(seconds, 4e9))
    return ModeCost(mode, cached, memory, 2e9, StepCost(Work(first, 4e9), Work(), step.traffic, 0.0))


def costs(**seconds: float) -> list[ModeCost]:
    values = {
        "single": 1.0,
        "u_shape": 1.2,
        "edge": 40.6,
        "kill_revive": 7.0,
        "low_rank": 1.94,
        "leased": 1.5,
    } | seconds
    return [cost("tail_cache", 0.4, first=0.9), cost("emulator", 0.7, 0.0), *(cost(m, s) for m, s in values.items())]


def test_quality_takes_split_where_sites_are_slow() -> None:
    assert recommend(costs(), "quality", POSITIONS, 200, 0) == (
        "Use split (isthmus edge train): 1.2 s per step and 4.0 minutes for 200, 1.0 KiB per token; sites in all "
        "layers, which learn more, would take 41 s over this link."
    )
    slow = costs(u_shape=18.0, edge=120.0, kill_revive=20.0)
    assert recommend(slow, "quality", POSITIONS, 200, 0).startswith("Use split (isthmus edge train): 18 s")


def test_quality_takes_edge_sites_where_the_link_carries_them() -> None:
    assert recommend(costs(edge=1.79), "quality", POSITIONS, 10, 0) == (
        "Use sites (isthmus edge train --sites all): 1.8 s per step and 17.9 s for 10, 1.0 KiB per token; sites in all "
        "layers learned most where the modes were compared; split would take 1.2 s and keeps the adapter from the "
        "cloud."
    )
    assert "Use split" in recommend(costs(edge=1.81), "quality", POSITIONS, 10, 0)  # more than 1.5 times as long


def test_speed_takes_the_shortest_step_and_says_what_split_costs() -> None:
    assert recommend(costs(), "speed", POSITIONS, 200, 0) == (
        "Use top only (adapters on the last layers alone, for labels --withhold-answers): 0.4 s per step and 80.0 s "
        "for 200 after the first epoch, whose steps take 0.9 s and 1.0 KiB per token; no step is shorter; split would "
        "take 1.2 s."
    )


def test_privacy_takes_what_keeps_the_leak_budget_and_by_default_what_gives_up_nothing() -> None:
    assert recommend(costs(), "privacy", POSITIONS, 200, 0) == (
        "Use emulator (isthmus emulator tune): 0.7 s per step and 2.3 minutes for 200, and nothing crosses the link; "
        "no other mode keeps the leak budget."
    )
    first, *lines, last = budget_lines(costs(), "privacy", {})
    assert first.startswith("Leak budget tokens<=0 and labels<=0: emulator only.")
    assert "emulator keeps it: nothing of the texts crosses" in lines
    assert "top only breaks it: tokens 1.00 (hidden states at the cut)" in lines
    assert "nothing was attacked" in last
    without = [each for each in costs() if each.mode != "emulator"]
    assert recommend(without, "privacy", POSITIONS, 200, 0).startswith("No mode that fits the edge keeps tokens<=0")


def test_a_label_budget_is_kept_where_no_gradients_go_up() -> None:
    assert recommend(costs(), "privacy", POSITIONS, 200, 0, {"labels": 0.1}) == (
        "Use top only (adapters on the last layers alone, for labels --withhold-answers): 0.4 s per step and 80.0 s "
        "for 200 after the first epoch, whose steps take 0.9 s and 1.0 KiB per token; the leak budget is kept by "
        "emulator, too."
    )
    lines = budget_lines(costs(), "privacy", {"labels": 0.1})
    both = "tokens 1.00 (hidden states at the cut) and labels 1.00 (gradients at the output of the cloud's layers)"
    assert f"split breaks it: {both}" in lines
    # For any goal, and the control: a budget that allows everything changes nothing.
    assert recommend(costs(), "quality", POSITIONS, 200, 0, {"labels": 0.1}).startswith("Use top only")
    assert recommend(costs(), "quality", POSITIONS, 200, 0, {"labels": 1.0}) == recommend(
        costs(), "quality", POSITIONS, 200, 0
    )
    assert budget_lines(costs(), "quality", {}) == []


@pytest.mark.parametrize("goal", ["quality", "speed", "privacy"])
def test_one_process_and_leased_adapters_are_never_recommended(goal: Any) -> None:
    quick = costs(single=0.01, leased=0.01)
    assert "single" not in recommend(quick, goal, POSITIONS, 200, 0)
    assert "leased" not in recommend(quick, goal, POSITIONS, 200, 0)


def test_what_does_not_fit_the_memory_is_no_choice() -> None:
    big = [cost("edge", 1.0, memory=4e9), cost("low_rank", 2.0, memory=3e9), cost("u_shape", 5.0, memory=1e9)]
    assert recommend(big, "quality", POSITIONS, 200, 0).startswith("Use sites")
    assert recommend(big, "quality", POSITIONS, 200, 3 * 10**9).endswith(
        "; sites in all layers, which learn more, need more memory than the edge has."
    )
    assert recommend(big[:2], "quality", POSITIONS, 200, 3 * 10**9).startswith("Use low-rank sites")
    assert recommend(big, "quality", POSITIONS, 200, 10**8) == (
        "No mode fits the edge's 95.4 MiB: split needs the least, 953.7 MiB, so use a smaller batch or fewer edge "
        "layers."
    )


def test_a_row_has_the_fixed_keys_and_is_json() -> None:
    cached, _, *others = rows(costs(), POSITIONS, 200)
    low_rank = next(row for row in others if row["mode"] == "low_rank")
    assert json.loads(json.dumps(low_rank)) == {
        "mode": "low_rank",
        "trains_inside": True,
        "command": "isthmus edge train --sites all --method low_rank",
        "steps_s": pytest.approx(388),
        "leak_tokens": 1.0,
        "leak_labels": 1.0,
        "step_s": pytest.approx(1.94),
        "edge_s": pytest.approx(0.485),
        "cloud_s": 0.0,
        "strip_s": pytest.approx(1.455),
        "bytes_up": 262144,
        "bytes_down": 262144,
        "bytes_per_token": 1024,
        "round_trips": 6,
        "edge_memory_bytes": 10**9,
        "cloud_memory_bytes": 2 * 10**9,
        "edge_flops": 3 * 10**9,
        "edge_flops_share": 0.75,
    }
    assert not cached["trains_inside"]
    assert (cached["step_s"], cached["bytes_up"], cached["round_trips"], cached["edge_flops_share"]) == (0.4, 0, 0, 1.0)
    assert (cached["first_epoch_step_s"], cached["first_epoch_bytes_up"], cached["first_epoch_bytes_down"]) == (
        0.9,
        262144,
        262144,
    )
    assert cached["first_epoch_round_trips"] == 6


def test_the_table_has_what_one_types_in_80_columns() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table(costs(edge=123456.0), POSITIONS, 200))
    lines = console.export_text().splitlines()
    assert lines[0].split("  ")[0] == "isthmus edge train ..."
    assert lines[0].split()[-4:] == ["steps", "per", "token", "memory"]
    assert [line.split("  ")[0] for line in lines[1:]] == [
        "top only, first epoch",
        "top only, cached",
        "isthmus emulator tune",
        "one process, no cloud",
        "split: no further option",
        "--sites all",
        "--sites all --site-policy kill-revive",
        "--sites all --method low_rank",
        "--sites all --leased all",
    ]
    assert next(line for line in lines if "low_rank" in line).split()[-7:-4] == ["1.94", "6.5", "minutes"]
    assert all(line.rstrip().endswith("MiB") for line in lines[1:])  # nothing is cut off


def test_every_mode_has_a_name_and_notes_are_few() -> None:
    settings = PlanSettings(SplitPlan.parse("1:3", 8), 2, 64, WireCodecs())
    shown = table([cost(mode, 1.0) for mode in MODES], POSITIONS, 200)
    assert shown.row_count == len(MODES)
    few = notes(settings, speed(), speed(dtype="bf16", threads=4))
    assert len(few) <= 4
    assert "2 x 64" in few[0]
    assert few[0].endswith("the cloud at 2 x 10, bf16, 4 threads.")
    assert "--edge-layers 0:3" in few[1]


def test_assumptions_follow_the_settings() -> None:
    settings = PlanSettings(SplitPlan.parse("1:3", 8), 2, 64, WireCodecs(), live_share=0.2, taps=5, tap_width=32)
    edge, cloud = speed(), speed(dtype="bf16", threads=4)
    far = "\n".join(assumptions(settings, LinkSpec.parse("1mbit"), edge, cloud))
    for expected in (
        "2 x 64",
        "20%",
        "5 taps of width 32",
        "plan 0:3",
        "Cloud: 2 x 10, bf16, 4 threads",
        "no slow start",
    ):
        assert expected in far
    near = "\n".join(assumptions(settings, LinkSpec.parse("local"), edge, edge))
    assert "Cloud: the same" in near
    assert "slow start" not in near
