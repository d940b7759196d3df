"""Predictions of generation against numbers worked out by hand, and its bytes against a real cloud's meter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.cloud.clouds import Home, ThreadServer, served
from support.models.round_speeds import speed
from support.models.tiny import tiny_checkpoint, tiny_config

from isthmus.backbone.plan import SplitPlan
from isthmus.common.errors import ConfigError
from isthmus.edge import connect
from isthmus.edge.codecs.wire_codecs import WireCodecs
from isthmus.planner.cost_model import PlanSettings
from isthmus.planner.generation_cost import (
    ASSUMED,
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


def machine(**changes: Any) -> SpeedProfile:
    decoding = {"decode_layer_s": 0.001, "decode_layer9_s": 0.003, "decode_head_s": 0.002, "decode_head9_s": 0.004}
    return speed(**decoding | changes)


def predicted(
    link: str = "local", edge: SpeedProfile | None = None, cloud: SpeedProfile | None = None, **settings: Any
) -> GenerationCost:
    plan = PlanSettings(PLAN, 2, 10, WireCodecs())
    wanted = GenerationSettings.of(PLAN, **{"draft_layers": 2} | settings)
    where, here = LinkSpec.parse(link), edge or machine()
    cost = predict_generation(FACTS, plan, wanted, where, here, cloud or machine())
    assert cost is not None
    return cost


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
    ngram = of(predicted(acceptance=0.5), NGRAM)
    assert (ngram.drafted, ngram.tokens_per_round) == (1, 1.5)
    assert ngram.tokens_per_s == pytest.approx(1.5 / (EDGE_S + CLOUD_S + FURTHER_S)) == pytest.approx(153.846, abs=1e-3)
    assert ngram.pays_from == pytest.approx(FURTHER_S / (EDGE_S + CLOUD_S)) == pytest.approx(0.21875)


def test_a_small_draft_pays_where_the_round_trip_is_long() -> None:
    near = of(predicted(acceptance=0.5), SMALL)
    assert (near.drafted, near.tokens_per_s) == (0, pytest.approx(125))
    assert near.pays_from == pytest.approx((DRAFTED_S + FURTHER_S) / (EDGE_S + CLOUD_S)) == pytest.approx(1.09375)
    # Nearly 1.5, 1.75, 1.875, 1.9375 tokens in 116.75, 125.5, 134.25, 143 ms: 12.85, 13.94, 13.97, 13.55 tokens/s.
    far = of(predicted("1000gbit,100ms", acceptance=0.5), SMALL)
    assert (far.drafted, far.tokens_per_round) == (3, 1.875)
    assert far.tokens_per_s == pytest.approx(1.875 / 0.13425, rel=1e-6)


@pytest.mark.parametrize("link", ["local", "100mbit,5ms", "1gbit,80ms"])
@pytest.mark.parametrize("acceptance", [0, 0.05, 0.1, 0.2, 0.21, 0.22, 0.5, 0.9, 1])
def test_a_draft_has_tokens_exactly_where_it_pays(link: str, acceptance: float) -> None:
    cost = predicted(link, acceptance=acceptance)
    for draft in (NGRAM, SMALL):
        found = of(cost, draft)
        assert found.pays_from is not None
        assert (found.drafted > 0) == (acceptance > found.pays_from)
        assert (found.tokens_per_s > of(cost, "none").tokens_per_s) == (found.drafted > 0)


def test_tokens_per_round_are_those_of_the_geometric_law() -> None:
    for drafted in (0, 1, 5):
        assert tokens_per_round(0.7, drafted) == pytest.approx((1 - 0.7 ** (drafted + 1)) / (1 - 0.7))
    assert (tokens_per_round(1, 5), tokens_per_round(0, 5), tokens_per_round(0.7, 0)) == (6, 1, 1)


@pytest.mark.parametrize(
    ("draft", "measured"),
    [(NGRAM, [(1.191, 0.185), (1.42, 0.185)]), (SMALL, [(1.274, 0.548), (1.553, 0.561), (1.634, 0.659)])],
)
def test_what_is_assumed_fits_what_was_measured(draft: str, measured: list[tuple[float, float]]) -> None:
    """Of docs/results.md: tokens drafted, and accepted, in a round over 80 and 150 ms."""

    def error(share: float) -> float:
        return max(abs(law(share, drafted) / (1 + accepted) - 1) for drafted, accepted in measured)

    def law(share: float, drafted: float) -> float:  # a mean number of tokens is no whole one
        return (1 - share ** (drafted + 1)) / (1 - share)

    assert error(ASSUMED[draft]) < 0.05
    assert error(ASSUMED[draft] + 0.1) > 0.05  # another share would not
    assert of(predicted(), draft).acceptance == ASSUMED[draft]


def test_the_first_token_takes_the_prompt_through_all_layers() -> None:
    wire = Wire(1, 20, 16, WireCodecs()).decode().total / 1e6 + 0.1
    flops = 20 * 3 * (2 * 1024 + 4 * 20 * 16)
    cost = predicted("1MB/s,100ms", machine(layer_inference=1e6), machine(layer_inference=2e6), prompt=20)
    assert cost.first_token_s == pytest.approx(flops / 1e6 + 0.002 + flops / 2e6 + wire)
    # However quick the products are, the weights are read.
    quick = machine(layer_inference=1e12)
    assert predicted(edge=quick, cloud=quick, prompt=20).first_token_s == pytest.approx(6 * 0.003 + 0.002)


def test_a_verification_that_measured_quicker_counts_as_no_quicker() -> None:
    noisy = machine(decode_layer9_s=0.0005, decode_head9_s=0.001)
    assert of(predicted(edge=noisy, cloud=noisy), NGRAM).pays_from == 0


def test_profiles_without_decode_steps_predict_nothing() -> None:
    plan, settings = PlanSettings(PLAN, 2, 10, WireCodecs()), GenerationSettings()
    for pair in ((speed(), machine()), (machine(), speed())):
        assert predict_generation(FACTS, plan, settings, LinkSpec.parse("local"), *pair) is None


def test_what_does_not_fit_is_refused() -> None:
    assert GenerationSettings.of(SplitPlan.parse("2:2", 6)).draft_layers == 2
    with pytest.raises(ConfigError, match="a draft of 4 layers cannot stand for the cloud's 3"):
        GenerationSettings.of(PLAN, draft_layers=4)
    with pytest.raises(ConfigError, match=r"acceptance = 1\.5"):
        GenerationSettings.of(PLAN, acceptance=1.5)
    with pytest.raises(ConfigError, match="'fp32' is not among those that were measured"):
        predicted(edge=machine(codec_s={}))


# Against a real cloud -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThreadServer]:
    folder = tmp_path_factory.mktemp("cloud")
    model = tiny_checkpoint("llama", folder / "model")
    with pytest.MonkeyPatch.context() as patch, ThreadServer(served(model, folder / "parts"), Home(folder)) as running:
        patch.setenv("ISTHMUS_CACHE", str(folder / "cache"))
        yield running


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
