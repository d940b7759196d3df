"""Predictions against numbers worked out by hand, against design's table of bytes, and against a real cloud's meter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.cloud.clouds import ThreadServer
from support.models.round_speeds import speed
from support.models.tiny import HIDDEN, VOCAB, tiny_config

from isthmus.backbone.plan import SplitPlan
from isthmus.common.errors import ConfigError, PlanError
from isthmus.edge import connect
from isthmus.edge.codecs.wire_codecs import WireCodecs
from isthmus.edge.run_report import WireTotals
from isthmus.planner.cost_model import MODES, TRAINS_INSIDE, ModeCost, PlanSettings, predict, predict_packages
from isthmus.planner.link_spec import LinkSpec
from isthmus.planner.model_facts import Linear, ModelFacts
from isthmus.planner.wire_cost import Wire

LOCAL = LinkSpec.parse("local")

# Six layers of width 16 with sites at q (16 to 16) and v (16 to 8), which share an input, and down (32 to 16).
LINEARS = (
    Linear("q", 16, 16, 0, True),
    Linear("k", 16, 8, 0, False),
    Linear("v", 16, 8, 0, True),
    Linear("down", 32, 16, 1, True),
)
FACTS = ModelFacts(
    hidden=16,
    n_layers=6,
    vocabulary=50,
    heads=2,
    attention=16,
    layer_parameters=1100,
    outside_parameters=1000,
    head_parameters=800,
    linears=LINEARS,
)
POSITIONS = 20
FORWARD = (2 * 1024 + 4 * 10 * 16) * POSITIONS  # FLOPs of a layer
BACKWARD = (2 * 1024 + 8 * 10 * 16) * POSITIONS
HEAD = 4 * 800 * POSITIONS
ADAPTERS = 2 * (32 + 24 + 48)  # weights of a layer's three, of rank 2
INFERENCE_S, TRAINED_S, HEAD_S = FORWARD / 4e3, FORWARD / 2e3 + BACKWARD / 1e3, HEAD / 5e2
ADAPTERS_S = 2 * ADAPTERS * POSITIONS / 1e2 + 4 * ADAPTERS * POSITIONS / 5e1


def settings(plan: str = "1:2", **changes: Any) -> PlanSettings:
    values: dict[str, Any] = {"batch": 2, "length": 10, "codecs": WireCodecs(), "rank": 2} | changes
    return PlanSettings(SplitPlan.parse(plan, 6), **values)


def costs(
    plan: str = "1:2", link: LinkSpec = LOCAL, edge: Any = None, cloud: Any = None, **changes: Any
) -> dict[str, ModeCost]:
    found = predict(FACTS, settings(plan, **changes), link, edge or speed(), cloud or speed())
    return {cost.mode: cost for cost in found}


WIRE = Wire(2, 10, 16, WireCodecs())
CALL = WIRE.forward() + WIRE.backward(wanted=False)


def sites_only(cost: ModeCost) -> float:
    """Bytes that a mode's sites add to the call."""
    return cost.step.traffic.total - CALL.total


def test_all_modes_come_in_their_order() -> None:
    assert tuple(costs()) == MODES


def test_a_single_process_runs_all_layers_and_no_backward_below_the_lowest_adapter() -> None:
    step = costs()["single"].step
    assert step.seconds == pytest.approx(INFERENCE_S + 5 * TRAINED_S + HEAD_S + 3 * ADAPTERS_S)
    assert step.edge.flops == 6 * FORWARD + 5 * BACKWARD + HEAD + 3 * 6 * ADAPTERS * POSITIONS
    assert (step.cloud.flops, step.traffic.total) == (0, 0)


def test_a_u_shape_splits_the_layers_and_moves_four_tensors() -> None:
    step = costs(cloud=speed(layer_forward=1e4, layer_backward=1e4))["u_shape"].step
    assert step.edge.seconds == pytest.approx(3 * TRAINED_S + HEAD_S + 3 * ADAPTERS_S)
    assert step.cloud.seconds == pytest.approx(3 * (FORWARD + BACKWARD) / 1e4)
    assert step.cloud.flops == 3 * (FORWARD + BACKWARD)
    assert step.traffic == WIRE.forward() + WIRE.backward()
    assert step.traffic.round_trips == 2


def test_nothing_below_the_span_means_no_backward() -> None:
    step = costs("0:2")["u_shape"].step
    assert step.traffic == WIRE.forward()
    assert step.cloud.seconds == pytest.approx(4 * INFERENCE_S)


def test_a_cached_tail_pays_for_the_cloud_once() -> None:
    tail = costs()["tail_cache"]
    assert tail.first_epoch is not None
    assert tail.first_epoch.traffic == WIRE.forward()
    assert tail.first_epoch.cloud.seconds == pytest.approx(4 * INFERENCE_S)
    assert (tail.step.traffic.total, tail.step.traffic.round_trips, tail.step.cloud.flops) == (0, 0, 0)
    assert tail.step.seconds == pytest.approx(2 * TRAINED_S + HEAD_S + 2 * ADAPTERS_S)


def test_taps_cost_their_width_once_and_a_side_network_always() -> None:
    taps = costs(taps=3, edge=speed(rung_s=0.5))["taps"]
    assert taps.first_epoch is not None
    assert taps.first_epoch.traffic.down - WIRE.forward().down == pytest.approx(3 * 16 * 4 * POSITIONS, abs=100)
    assert taps.first_epoch.traffic.round_trips == 1
    assert taps.step.traffic.total == 0
    assert taps.step.seconds == pytest.approx(3 * INFERENCE_S + HEAD_S + 3 * 0.5 * POSITIONS)
    narrow = costs(taps=3, tap_width=2)["taps"]
    assert narrow.first_epoch is not None
    assert narrow.first_epoch.traffic.down < taps.first_epoch.traffic.down


def test_edge_sites_ask_once_per_group_and_direction() -> None:
    step = costs()["edge"].step
    assert step.traffic.round_trips == 2 + 3 * 2 * 2
    assert step.edge.seconds == pytest.approx(INFERENCE_S + 2 * TRAINED_S + HEAD_S + 3 * ADAPTERS_S)
    assert step.cloud.seconds == pytest.approx(3 * TRAINED_S)
    first = WIRE.pause("backward", 2, [16, 8], [16, 16]).up - WIRE.pause("backward", 2, [16, 8], []).up
    layer = (
        WIRE.pause("forward", 2, [16], [16, 8])
        + WIRE.pause("forward", 1, [32], [16])
        + WIRE.pause("backward", 2, [16, 8], [16, 16])
        + WIRE.pause("backward", 1, [16], [32])
    )
    # The first group's answer is empty, as nothing below it is trained.
    assert step.traffic.up == CALL.up + 3 * layer.up - first
    assert step.traffic.down == CALL.down + 3 * layer.down


def test_own_layers_are_adapted_beside_the_clouds_if_asked() -> None:
    plain, both = costs()["edge"].step, costs(own_layers=True)["edge"].step
    assert both.edge.seconds - plain.edge.seconds == pytest.approx(TRAINED_S - INFERENCE_S + 3 * ADAPTERS_S)
    assert both.traffic.up > plain.traffic.up  # the first group is answered
    assert both.traffic.down - plain.traffic.down > 4 * 16 * POSITIONS  # and the input's gradient comes back
    single = costs(own_layers=True)["single"].step
    assert single.seconds == pytest.approx(6 * TRAINED_S + HEAD_S + 6 * ADAPTERS_S)


def test_design_s_table_of_bytes() -> None:
    """SmolLM2 with sites at q and v: 2.33hb a layer forward, 3.33hb backward, 2.33hb summed; a U-shape 4hb."""
    config = tiny_config("llama", hidden_size=576, num_attention_heads=9, num_key_value_heads=3, head_dim=64)
    facts = ModelFacts.of(config, targets=["q_proj", "v_proj"])
    hb, positions = 576 * 4, 512

    def per_layer(summed: bool) -> float:
        plan = PlanSettings(SplitPlan.parse("1:1", 6), 4, 128, WireCodecs(), summed=summed, own_layers=True)
        found = {cost.mode: cost.step.traffic for cost in predict(facts, plan, LOCAL, speed(), speed())}
        assert found["u_shape"].total / positions / hb == pytest.approx(4, rel=0.001)
        return (found["edge"].total - found["u_shape"].total) / positions / hb / 4

    assert per_layer(summed=False) == pytest.approx(2 + 1 / 3 + 3 + 1 / 3, rel=0.001)
    assert per_layer(summed=True) == pytest.approx(2 * (2 + 1 / 3), rel=0.001)


def test_kill_and_revive_leaves_a_share_of_what_sites_cost() -> None:
    always, all_live = costs()["edge"], costs(live_share=1.0)["kill_revive"]
    assert all_live.step == always.step
    some = costs(live_share=0.25)["kill_revive"]
    assert sites_only(some) == pytest.approx(0.25 * sites_only(always))
    assert some.step.traffic.round_trips == 2 + 0.25 * 12
    assert some.step.edge.seconds == pytest.approx(INFERENCE_S + 2 * TRAINED_S + HEAD_S + 0.25 * 3 * ADAPTERS_S)


def test_low_rank_moves_r_numbers_per_site() -> None:
    step = costs()["low_rank"].step
    assert step.traffic.round_trips == costs()["edge"].step.traffic.round_trips
    elements = step.traffic.elements["fp32"] - CALL.elements["fp32"]
    # r down and r up for each site, forward and backward, but for the two sites of the first group's empty answer
    assert elements == (3 * 3 * 4 * 2 - 2 * 2) * POSITIONS
    assert step.cloud.flops - 3 * (FORWARD + BACKWARD) == 2 * 2 * ADAPTERS * 3 * POSITIONS
    sites = 3 * 3 * 2 * 2 * 2 * POSITIONS
    assert step.edge.flops == 3 * FORWARD + 2 * BACKWARD + HEAD + 3 * sites


def test_low_rank_moves_95_percent_less_at_a_real_width() -> None:
    config = tiny_config("llama", hidden_size=576, num_attention_heads=9, num_key_value_heads=3, head_dim=64)
    facts = ModelFacts.of(config, targets=["q_proj", "v_proj"])
    plan = PlanSettings(SplitPlan.parse("1:1", 6), 4, 128, WireCodecs(), rank=8)
    found = {cost.mode: cost.step.traffic.total for cost in predict(facts, plan, LOCAL, speed(), speed())}
    wire = Wire(4, 128, 576, WireCodecs())
    call = (wire.forward() + wire.backward(wanted=False)).total
    assert found["low_rank"] - call < 0.05 * (found["edge"] - call)


def test_a_leased_adapter_crosses_once_each_way_and_runs_in_the_cloud() -> None:
    step = costs()["leased"].step
    weights = 4 * 3 * ADAPTERS
    assert step.traffic.round_trips == 2
    assert step.traffic.up - CALL.up == pytest.approx(weights, abs=64 + 18 * 28 + 100)
    assert step.traffic.up - CALL.up == step.traffic.down - CALL.down
    assert step.cloud.seconds == pytest.approx(3 * TRAINED_S + 3 * ADAPTERS_S)


def test_an_emulator_needs_no_cloud() -> None:
    step = costs(emulator_keep=2 / 3)["emulator"].step
    assert step.seconds == pytest.approx(5 * TRAINED_S + HEAD_S + 3 * ADAPTERS_S)
    assert (step.traffic.total, step.cloud.flops) == (0, 0)
    top_only = costs("0:2", emulator_keep=0.5)["emulator"].step
    assert top_only.seconds == pytest.approx(2 * INFERENCE_S + 2 * TRAINED_S + HEAD_S + 2 * ADAPTERS_S)


def test_a_package_is_tuned_above_alone_and_later_epochs_leave_out_what_is_kept() -> None:
    fidelity, guarded, whole = predict_packages(FACTS, settings("2:1"), LOCAL, speed())
    assert [(each.preset, str(each.plan), each.kept) for each in (fidelity, guarded, whole)] == [
        ("fidelity", "1:2", 2),
        ("guarded", "1:2", 1),
        ("whole", "1:2", 3),
    ]
    adapters = 8 * (32 + 24 + 24 + 48)  # of all four linears, at the advised rank
    later = 2 * TRAINED_S + HEAD_S + 2 * adapters * POSITIONS * (2 / 1e2 + 4 / 5e1)
    for package, below in ((fidelity, 3), (guarded, 2)):
        first = package.tuning.first_epoch
        assert first is not None
        assert package.tuning.step.seconds == pytest.approx(later)
        assert first.seconds == pytest.approx(later + below * INFERENCE_S)
        assert (package.tuning.step.traffic.total, first.traffic.total) == (0, 0)
    assert fidelity.package_bytes == 4 * (5 * 1100 + 1000 + 2 * 17 * 16)
    assert fidelity.tuning.edge_memory - guarded.tuning.edge_memory == 4 * 1100  # a layer, and nothing kept in it
    adapted = 3 * adapters * POSITIONS * (2 / 1e2 + 4 / 5e1)
    assert whole.tuning.step.seconds == pytest.approx(6 * TRAINED_S + HEAD_S + adapted)  # all is gone through anew
    assert whole.tuning.first_epoch is None
    assert whole.package_bytes == 4 * (3 * 1100 + 1000) + 3 * 1100 // 2
    four = predict_packages(replace(FACTS, n_layers=4), settings("1:1"), LOCAL, speed())
    assert [each.kept for each in four] == [1, 1, 1]  # of a middle of one layer
    with pytest.raises(PlanError):
        predict_packages(replace(FACTS, n_layers=3), settings(), LOCAL, speed())


def test_modes_without_anything_to_train_are_left_out() -> None:
    assert set(MODES) - set(costs("0:0")) == {"u_shape", "tail_cache", "emulator"}
    assert set(MODES) - set(costs("2:0")) == {"tail_cache"}


def test_the_seconds_of_the_wire_add_up() -> None:
    link = LinkSpec.parse("80kB/s,100ms")
    edge = speed(message_s=0.01, byte_s=1e-5, codec_s=dict.fromkeys(speed().codec_s, 1e-4), optimizer_s=0.3)
    step = costs(link=link, edge=edge)["u_shape"].step
    traffic = WIRE.forward() + WIRE.backward()
    wire = traffic.total / 80e3 + 2 * 0.1 + 4 * 0.01 + traffic.total * 1e-5 + 4 * 16 * POSITIONS * 1e-4
    assert step.wire_s == pytest.approx(wire)
    optimizer = 3 * 3 * 2 * 0.3
    assert step.seconds == pytest.approx(6 * TRAINED_S + HEAD_S + 3 * ADAPTERS_S + optimizer + wire)


def test_a_slow_link_slows_those_that_use_it() -> None:
    near, far = costs(), costs(link=LinkSpec.parse("10mbit,200ms"))
    for mode in MODES:
        traffic = near[mode].step.traffic
        added = traffic.total / 1.25e6 + 0.2 * traffic.round_trips
        assert far[mode].step.seconds - near[mode].step.seconds == pytest.approx(added, abs=1e-9)


def test_memory_of_the_edge_and_of_the_cloud() -> None:
    found = costs(cloud=speed(dtype="bf16"))
    own = (3 * 1100 + 1000) * 4 + 3 * ADAPTERS * 16
    kept = POSITIONS * (3 * 100 + 3 * 4 * 50 + 2 * 4 * 16)
    assert found["u_shape"].edge_memory == 1_000_000 + own + kept
    assert found["u_shape"].cloud_memory == 3 * 1100 * 2 + 3 * POSITIONS * 100
    assert found["tail_cache"].cloud_memory == 4 * 1100 * 2
    # What edge sites keep: each group's input and each site's contribution.
    more = found["edge"].edge_memory - found["leased"].edge_memory
    assert more == 4 * POSITIONS * 3 * (16 + 32 + 16 + 8 + 16)
    assert found["low_rank"].edge_memory < found["leased"].edge_memory < found["single"].edge_memory
    assert found["emulator"].edge_memory > found["u_shape"].edge_memory


def test_the_modes_that_train_inside() -> None:
    assert set(MODES) > TRAINS_INSIDE
    assert "u_shape" not in TRAINS_INSIDE


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="live_share = 0"):
        settings(live_share=0)
    with pytest.raises(ConfigError, match=r"emulator_keep = 1\.5"):
        settings(emulator_keep=1.5)
    other = PlanSettings(SplitPlan.parse("1:1", 7), 2, 10, WireCodecs())
    with pytest.raises(PlanError, match="is for 7 layers, but the model has 6"):
        predict(FACTS, other, LOCAL, speed(), speed())
    with pytest.raises(ConfigError, match="'int8' is not among those that were measured"):
        costs(codecs=WireCodecs.parse("int8"), edge=speed(codec_s={"fp32": 0.0}))


# Against a real cloud -------------------------------------------------------------------------------------------------


def measured(cloud: ThreadServer, codec: str, layers: list[int]) -> WireTotals:
    """What the second of two steps moves; the first one also names the sites."""
    tokens = torch.randint(3, VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
    with connect(cloud.address, key=cloud.home.key_file, codec=codec) as link:
        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], layers_to_transform=layers)
        model: Any = get_peft_model(link.load_model(), lora)
        before = link.totals()
        for _ in range(2):
            before = link.totals()
            model(**batch, use_cache=False).loss.backward()
        return link.totals() - before


@pytest.mark.parametrize("codec", ["fp32", "int8,int4"])
@pytest.mark.parametrize(
    ("mode", "layers", "own_layers"),
    [("u_shape", [0, 1, 4, 5], False), ("edge", [2, 3], False), ("edge", [0, 1, 2, 3, 4, 5], True)],
)
def test_bytes_and_round_trips_are_those_of_a_real_step(
    cloud: ThreadServer, codec: str, mode: str, layers: list[int], own_layers: bool
) -> None:
    facts = ModelFacts.of(tiny_config("llama"), 4, ["q_proj", "v_proj", "down_proj"])
    assert facts.hidden == HIDDEN
    plan = PlanSettings(SplitPlan.parse("2:2", 6), 2, 24, WireCodecs.parse(codec), rank=4, own_layers=own_layers)
    found = {cost.mode: cost.step.traffic for cost in predict(facts, plan, LOCAL, speed(), speed())}[mode]
    real = measured(cloud, codec, layers)
    assert (found.up, found.down) == (real.bytes_up, real.bytes_down)
    assert found.round_trips == real.round_trips
