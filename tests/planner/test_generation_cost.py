"""Predictions of generation against numbers worked out by hand, and its bytes against a real cloud's meter."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch
from support.cloud.clouds import ThreadServer
from support.models.round_speeds import speed
from support.models.tiny import tiny_config

from isthmus.backbone.plan import SplitPlan
from isthmus.common.errors import ConfigError
from isthmus.edge import connect
from isthmus.edge.codecs.wire_codecs import WireCodecs
from isthmus.planner.cost_model import PlanSettings
from isthmus.planner.generation_cost import (
    DEFAULT_ACCEPTANCE,
    MEASURED_ACCEPTANCE,
    NGRAM,
    SMALL,
    DraftCost,
    GenerationCost,
    GenerationSettings,
    predict_generation,
    tokens_per_round,
)
from isthmus.planner.link_spec import LinkSpec
from isthmus.planner.model_facts import Linear, ModelFacts
from isthmus.planner.speed_profile import SpeedProfile
from isthmus.planner.wire_cost import Wire

# Six layers of width 16, three of them on the edge. FLOPs of a position of 20: 2 · 1024 + 4 · 20 · 16 a layer.
FACTS = ModelFacts(16, 6, 50, 2, 16, 1100, 1000, 800, (Linear("q", 16, 64, 0, True),))
PLAN = SplitPlan.parse("2:1", 6)
TRAFFIC = Wire(1, 1, 16, WireCodecs()).decode()
EDGE_S, CLOUD_S = 3 * 0.001 + 0.002, 3 * 0.001
FURTHER_S = (6 * 0.002 + 0.002) / 8
"""What one more token adds to a pass of all layers and the head."""
DRAFTED_S = (3 + 2) * 0.001 + 0.002
ENDLESS = 10**12
"""Tokens of a text for which the draft's pass over its prompt does not count."""


def machine(**changes: Any) -> SpeedProfile:
    """Drafts in bf16 take what the edge's own steps take, but for what is given."""
    return speed(**{"draft_layer_s": 0.001, "draft_head_s": 0.002} | changes)


def predicted(
    link: str = "local", edge: SpeedProfile | None = None, cloud: SpeedProfile | None = None, **settings: Any
) -> GenerationCost:
    plan = PlanSettings(PLAN, 2, 10, WireCodecs())
    wanted = GenerationSettings.of(PLAN, **{"prompt": 64, "tokens": ENDLESS, "draft_layers": 2} | settings)
    return predict_generation(FACTS, plan, wanted, LinkSpec.parse(link), edge or machine(), cloud or machine())


def of(cost: GenerationCost, draft: str) -> DraftCost:
    return next(each for each in cost.drafts if each.draft == draft)


def test_without_a_link_a_token_takes_what_both_sides_compute() -> None:
    cost = predicted()
    assert (cost.edge_s, cost.cloud_s, cost.wire_s) == (pytest.approx(EDGE_S), pytest.approx(CLOUD_S), 0)
    assert of(cost, "none").tokens_per_s == pytest.approx(1 / (EDGE_S + CLOUD_S)) == pytest.approx(125)
    slower = predicted(cloud=machine(decode_layer_s=0.002))
    assert of(slower, "none").tokens_per_s == pytest.approx(1 / (EDGE_S + 2 * CLOUD_S))


def test_a_link_adds_its_round_trip_its_bytes_and_its_ends() -> None:
    cost = predicted("80kB/s,100ms", machine(message_s=0.01, byte_s=1e-5, codec_s={"fp32": 1e-4}))
    wire = 0.1 + TRAFFIC.total / 80e3 + 2 * 0.01 + TRAFFIC.total * 1e-5 + 2 * 16 * 1e-4
    assert cost.wire_s == pytest.approx(wire)
    assert of(cost, "none").tokens_per_s == pytest.approx(1 / (EDGE_S + CLOUD_S + wire))


def test_the_best_length_of_a_draft_that_costs_nothing_but_its_verification() -> None:
    # 1, 1.5, 1.75 tokens in 8, 9.75, 11.5 ms: 125, 153.8, 152.2 tokens/s.
    ngram = of(predicted(acceptance_rate=0.5), NGRAM)
    assert (ngram.drafted, ngram.tokens_per_round) == (1, 1.5)
    assert ngram.tokens_per_s == pytest.approx(1.5 / (EDGE_S + CLOUD_S + FURTHER_S)) == pytest.approx(153.846, abs=1e-3)
    assert ngram.break_even_rate == pytest.approx(FURTHER_S / (EDGE_S + CLOUD_S)) == pytest.approx(0.21875)


def test_a_small_draft_pays_where_the_round_trip_is_long() -> None:
    near = of(predicted(acceptance_rate=0.5), SMALL)
    assert (near.drafted, near.tokens_per_s) == (0, pytest.approx(125))
    # At best all 17 tokens of 16 drafted ones in 8 + 16 · 8.75 = 148 ms: 114.9 tokens/s.
    assert near.break_even_rate is None
    # Nearly 1.5, 1.75, 1.875, 1.9375 tokens in 116.75, 125.5, 134.25, 143 ms: 12.85, 13.94, 13.97, 13.55 tokens/s.
    far = of(predicted("1000gbit,100ms", acceptance_rate=0.5), SMALL)
    assert (far.drafted, far.tokens_per_round) == (3, 1.875)
    assert far.tokens_per_s == pytest.approx(1.875 / 0.13425, rel=1e-6)


def test_a_small_draft_s_tokens_take_what_its_dtype_takes() -> None:
    quick, found = machine(draft_layer_s=0.0002, draft_head_s=0.0005), predicted(acceptance_rate=0.5)
    drafted_s = (3 + 2) * 0.0002 + 0.0005
    small = of(predicted(edge=quick, acceptance_rate=0.5), SMALL)
    assert small.break_even_rate == pytest.approx((drafted_s + FURTHER_S) / (EDGE_S + CLOUD_S))
    assert of(predicted(cloud=quick, acceptance_rate=0.5), SMALL) == of(found, SMALL)  # the edge drafts
    assert of(predicted(edge=quick, acceptance_rate=0.5), NGRAM) == of(found, NGRAM)


def test_a_small_draft_passes_over_the_prompt_once_a_text() -> None:
    slow = machine(draft_inference=1e6)
    prompt_s = 20 * (3 + 2) * (2 * 1024 + 4 * 20 * 16) / 1e6
    given: dict[str, Any] = {"link": "1000gbit,100ms", "edge": slow, "prompt": 20, "acceptance_rate": 0.5}
    long, short, one = (of(predicted(tokens=tokens, **given), SMALL) for tokens in (ENDLESS, 100, 1))
    assert (long.drafted, short.drafted) == (3, 3)
    assert short.tokens_per_s == pytest.approx(100 / (prompt_s + 100 / long.tokens_per_s), rel=1e-6)
    assert (one.drafted, one.break_even_rate) == (0, None)  # a text that takes 108 ms cannot win 333
    assert short.break_even_rate is not None
    assert long.break_even_rate is not None
    assert short.break_even_rate > long.break_even_rate + 0.01
    # At the rate where drafts break even, a text takes as long as without, whatever its length.
    without = of(predicted(tokens=100, **given), "none").tokens_per_s
    even = of(predicted(tokens=100, **given | {"acceptance_rate": short.break_even_rate + 1e-9}), SMALL)
    assert even.drafted > 0
    assert even.tokens_per_s == pytest.approx(without, rel=1e-6)
    quick = machine(draft_inference=1e12)  # then the weights are read, once a layer
    read_s = (3 + 2) * 0.001
    found = of(predicted(tokens=100, **given | {"edge": quick}), SMALL)
    assert found.tokens_per_s == pytest.approx(100 / (read_s + 100 / long.tokens_per_s), rel=1e-6)


@pytest.mark.parametrize("tokens", [64, ENDLESS])
@pytest.mark.parametrize("link", ["local", "100mbit,5ms", "1gbit,80ms"])
@pytest.mark.parametrize("acceptance_rate", [0, 0.05, 0.1, 0.2, 0.21, 0.22, 0.5, 0.9, 1])
def test_a_draft_has_tokens_exactly_where_it_pays(link: str, acceptance_rate: float, tokens: int) -> None:
    cost = predicted(link, acceptance_rate=acceptance_rate, tokens=tokens)
    for draft in (NGRAM, SMALL):
        found = of(cost, draft)
        pays = found.break_even_rate is not None and acceptance_rate > found.break_even_rate
        assert (found.drafted > 0) == pays
        assert (found.tokens_per_s > of(cost, "none").tokens_per_s) == (found.drafted > 0)


def test_tokens_per_round_are_those_of_the_geometric_law() -> None:
    for drafted in (0, 1, 5):
        assert tokens_per_round(0.7, drafted) == pytest.approx((1 - 0.7 ** (drafted + 1)) / (1 - 0.7))
    assert (tokens_per_round(1, 5), tokens_per_round(0, 5), tokens_per_round(0.7, 0)) == (6, 1, 1)


def fitted_rate(drafted: float, accepted: float) -> float:
    """The rate at which the law has as many tokens as a mean round that was measured; a mean draft is no whole one."""
    low, high = 0.0, 0.999
    for _ in range(40):
        rate = (low + high) / 2
        low, high = (rate, high) if (1 - rate ** (drafted + 1)) / (1 - rate) < 1 + accepted else (low, rate)
    return low


CHAT_NGRAM = [(1.3272, 0.1689), (1.3973, 0.1689), (1.4848, 0.1707), (1.7401, 0.1743), (1.9146, 0.1925)]
E2E_NGRAM = [(1.2519, 0.1541), (1.297, 0.1541), (1.4568, 0.1619), (1.536, 0.1619), (1.6606, 0.1661)]
CHAT_SMALL = [(0.8679, 0.3173), (1.0957, 0.3863), (1.382, 0.4382), (1.5832, 0.4685)]
E2E_TUNED = [(1.8029, 1.1971), (2.0423, 1.2606), (2.4627, 1.4478), (2.6923, 1.5077), (3.0656, 1.5984)]
E2E_SMALL = [(1.0, 0.2244), (1.0166, 0.2365), (1.1474, 0.243)]
"""Tokens drafted and accepted in a mean round of one run of `isthmus bench generate --parts links`, a link each."""


@pytest.mark.parametrize(
    ("draft", "selected", "left_out"),
    [(NGRAM, CHAT_NGRAM, E2E_NGRAM), (SMALL, CHAT_SMALL, E2E_TUNED + E2E_SMALL)],
)
def test_the_default_rates_are_means_of_chats(
    draft: str, selected: list[tuple[float, float]], left_out: list[tuple[float, float]]
) -> None:
    """No check of the law: each text is fitted by itself."""
    every = [fitted_rate(*text) for text in selected + left_out]
    default = DEFAULT_ACCEPTANCE[draft]
    assert statistics.mean(every[: len(selected)]) == pytest.approx(default, abs=0.006)
    assert MEASURED_ACCEPTANCE[draft] == (round(min(every), 2), round(max(every), 2))
    assert of(predicted(), draft).acceptance_rate == default


def test_the_first_token_takes_the_prompt_through_all_layers() -> None:
    wire = Wire(1, 20, 16, WireCodecs()).decode().total / 1e6 + 0.1
    flops = 20 * 3 * (2 * 1024 + 4 * 20 * 16)
    cost = predicted("1MB/s,100ms", machine(layer_inference=1e6), machine(layer_inference=2e6), prompt=20)
    assert cost.first_token_s == pytest.approx(flops / 1e6 + 0.002 + flops / 2e6 + wire)
    # However quick the products are, the weights are read.
    quick = machine(layer_inference=1e12)
    assert predicted(edge=quick, cloud=quick, prompt=20).first_token_s == pytest.approx(6 * 0.003 + 0.002)


def test_a_verification_that_measured_quicker_counts_as_no_quicker() -> None:
    noisy = machine(verify_layer_s=0.0005, verify_head_s=0.001)
    assert of(predicted(edge=noisy, cloud=noisy), NGRAM).break_even_rate == pytest.approx(0, abs=1e-9)


def test_what_does_not_fit_is_refused() -> None:
    assert GenerationSettings.of(SplitPlan.parse("2:2", 6), 64, 64).draft_layers == 2
    with pytest.raises(ConfigError, match="a draft of 4 layers cannot stand for the cloud's 3"):
        GenerationSettings.of(PLAN, 64, 64, draft_layers=4)
    for rate in (1.5, -0.1):
        with pytest.raises(ConfigError, match=rf"acceptance_rate = {rate} is outside 0 to 1"):
            GenerationSettings.of(PLAN, 64, 64, acceptance_rate=rate)
    with pytest.raises(ConfigError, match="'fp32' is not among those that were measured"):
        predicted(edge=machine(codec_s={}))


# Against a real cloud -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_bytes_and_round_trips_are_those_of_a_real_text(cloud: ThreadServer, codec: str) -> None:
    wire, prompt = WireCodecs.parse(codec), torch.arange(3, 14)[None]
    prefill, further = (Wire(1, tokens, tiny_config("llama").hidden_size, wire).decode() for tokens in (11, 1))
    with connect(cloud.address, key=cloud.home.key_file, codec=codec) as link:
        model = link.load_model()
        model.generate(prompt, max_new_tokens=1, do_sample=False)  # the session's first messages
        for tokens in (1, 6):
            before = link.totals()
            model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
            real, expected = link.totals() - before, prefill + further * (tokens - 1)
            assert (real.bytes_up, real.bytes_down) == (expected.up, expected.down)
            assert real.round_trips == expected.round_trips
