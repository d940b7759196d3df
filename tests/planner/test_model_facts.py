"""Sizes of models against the models themselves."""

from __future__ import annotations

from typing import Any

import pytest
from support.models.tiny import CONFIGS, HIDDEN, N_LAYERS, VOCAB, tiny_config
from transformers import AutoModelForCausalLM

from isthmus.backbone.families import family_of
from isthmus.common.errors import ConfigError
from isthmus.edge.run_report import linear_parameters
from isthmus.planner.model_facts import ModelFacts

LLAMA = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
LLAMA += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


@pytest.mark.parametrize("family", CONFIGS)
def test_parameters_are_those_of_the_model(family: str) -> None:
    config = tiny_config(family)
    model: Any = AutoModelForCausalLM.from_config(config)
    layer = model.get_submodule(family_of(config).layers_path)[0]
    facts = ModelFacts.of(config)
    assert facts.outside_parameters + N_LAYERS * facts.layer_parameters == sum(p.numel() for p in model.parameters())
    assert facts.linear_parameters == linear_parameters(layer)
    assert facts.head_parameters == model.get_output_embeddings().weight.numel()
    assert (facts.hidden, facts.n_layers, facts.vocabulary) == (HIDDEN, N_LAYERS, VOCAB)
    assert facts.sites


def test_linears_that_share_an_input_are_one_group() -> None:
    facts = ModelFacts.of(tiny_config("llama"))
    assert [linear.name for linear in facts.linears] == LLAMA
    assert [linear.group for linear in facts.linears] == [0, 0, 0, 1, 2, 2, 3]
    assert [(linear.inputs, linear.outputs) for linear in facts.linears[:3]] == [(32, 32), (32, 16), (32, 16)]
    assert [[site.name for site in group] for group in facts.site_groups] == [["self_attn.q_proj", "self_attn.v_proj"]]


def test_a_transposed_linear_is_read_the_right_way_round() -> None:
    (site,) = ModelFacts.of(tiny_config("gpt2")).sites
    assert (site.name, site.inputs, site.outputs) == ("attn.c_attn", 32, 96)


def test_sites_follow_the_target_modules() -> None:
    facts = ModelFacts.of(tiny_config("llama"), targets=["up_proj", "down_proj", "k_proj"])
    assert [[site.name for site in group] for group in facts.site_groups] == [
        ["self_attn.k_proj"],
        ["mlp.up_proj"],
        ["mlp.down_proj"],
    ]
    assert facts.sites[1].adapter_parameters(8) == 8 * (32 + 64)


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(ConfigError, match="no_such_proj"):
        ModelFacts.of(tiny_config("llama"), targets=["no_such_proj"])


def test_flops_are_those_of_products() -> None:
    facts = ModelFacts.of(tiny_config("llama"))
    linears = 32 * (32 + 16 + 16 + 32 + 64 + 64) + 64 * 32
    assert facts.forward_flops(10) == 2 * linears + 2 * 2 * 10 * 32
    assert facts.backward_flops(10) == 2 * linears + 4 * 2 * 10 * 32
    assert facts.head_flops == 4 * VOCAB * 32


def test_a_ladder_grows_with_its_taps() -> None:
    facts = ModelFacts.of(tiny_config("llama"))
    (two, few), (four, more) = facts.ladder(2), facts.ladder(4)
    assert four > two > 0
    assert more > few > 2
    assert facts.ladder(2, 4)[0] < two
