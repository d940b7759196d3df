"""What adapters inside the cloud's layers cost: the numbers of the documents, those of the wire, and a notice."""

from __future__ import annotations

import logging
from typing import Any

import peft
import pytest
import torch
from support.cloud.memory_cloud import MemoryCloud, new_link
from support.models.tiny import HIDDEN, N_LAYERS, tiny_config
from torch import nn

from isthmus.backbone.sites.edge_sites import Site
from isthmus.backbone.sites.low_rank import LowRankSite
from isthmus.backbone.sites.site_spec import Placement, SiteSpec
from isthmus.edge.client.link import Link
from isthmus.edge.client.site_traffic import SiteNotice, SiteTraffic
from isthmus.edge.codecs.wire_codecs import WireCodecs

IDS = torch.tensor([[5, 9, 33, 120, 7, 2]])
CONFIG = tiny_config("llama")  # v writes half of what q writes
FP32 = WireCodecs()


def linear(layer: int, part: str, n_out: int, placement: Placement = Placement.EDGE) -> Site:
    return Site(f"model.layers.{layer}.{part}", SiteSpec(layer, part, placement), nn.Linear(HIDDEN, n_out, bias=False))


Q, V = (linear(2, "self_attn.q_proj", HIDDEN), linear(2, "self_attn.v_proj", HIDDEN // 2))


def test_sites_of_one_group_share_a_round_trip_and_their_input() -> None:
    alone, both = SiteTraffic.of([Q], CONFIG, FP32), SiteTraffic.of([Q, V], CONFIG, FP32)
    assert alone == SiteTraffic(1, 4 * 2 * HIDDEN, 4 * 2 * HIDDEN)
    assert both == SiteTraffic(1, int(4 * 2.5 * HIDDEN), int(4 * 3.5 * HIDDEN))
    assert SiteTraffic.of([Q, V], CONFIG, FP32, summed=True).backward_bytes == int(4 * 2.5 * HIDDEN)


def test_other_groups_and_layers_have_round_trips_of_their_own() -> None:
    other = linear(2, "self_attn.o_proj", HIDDEN), linear(3, "self_attn.q_proj", HIDDEN)
    assert SiteTraffic.of([Q, V, *other], CONFIG, FP32).round_trips == 3


def test_codecs_count_in_their_directions() -> None:
    codecs = WireCodecs.parse("forward_up=bf16")
    assert SiteTraffic.of([Q], CONFIG, codecs) == SiteTraffic(1, 6 * HIDDEN, 8 * HIDDEN)


def test_leased_weights_cost_nothing_and_low_rank_sites_their_rank() -> None:
    assert SiteTraffic.of([linear(2, "mlp.up_proj", 64, Placement.LEASED)], CONFIG, FP32) == SiteTraffic(0, 0, 0)
    site = Site("up", SiteSpec(2, "mlp.up_proj", Placement.LOW_RANK, 3, 1), LowRankSite(3, 1.0))
    assert SiteTraffic.of([site], CONFIG, FP32) == SiteTraffic(1, 4 * 6, 4 * 6)


def test_the_notice_is_given_once(caplog: pytest.LogCaptureFixture) -> None:
    notice = SiteNotice(CONFIG, lambda: FP32)
    notice([])
    notice([linear(2, "mlp.up_proj", 64, Placement.LEASED)])
    assert not caplog.records
    for _ in range(2):
        notice([Q, V])
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("isthmus", logging.WARNING)
    assert "1 round trips and 320 B for each token position to a forward" in record.getMessage()
    assert "layers_to_transform=list(model.split_plan.edge_layers)" in record.getMessage()


# On a model -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def link(cloud: MemoryCloud, cache_folder: None) -> Link:
    return new_link(cloud)


def adapted(model: Any, **options: Any) -> Any:
    targets = ["q_proj", "v_proj"]
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM", **options))


def test_a_model_says_once_what_its_adapters_in_the_clouds_layers_cost(
    link: Link, caplog: pytest.LogCaptureFixture
) -> None:
    model = adapted(link.load_model())
    said = [record.getMessage() for record in caplog.records if record.name == "isthmus"]
    assert len(said) == 1  # before anything is computed
    assert "2 of the cloud's layers (2 to 3)" in said[0]
    assert "2 round trips and 640 B for each token position to a forward" in said[0]
    assert "2 round trips and up to 896 B to its backward" in said[0]
    before = link.traffic.round_trips
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    assert link.traffic.round_trips - before == 2 + 2 * 2 + 1  # two calls, their pauses, and the list of sites
    assert len([record for record in caplog.records if record.name == "isthmus"]) == 1


def test_a_model_whose_adapters_are_the_edges_own_says_nothing(link: Link, caplog: pytest.LogCaptureFixture) -> None:
    model = link.load_model()
    edge_layers = list(model.split_plan.edge_layers)  # type: ignore[attr-defined]  # of the edge's models
    assert len(edge_layers) < N_LAYERS
    model = adapted(model, layers_to_transform=edge_layers)
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    assert not [record for record in caplog.records if record.name == "isthmus"]
