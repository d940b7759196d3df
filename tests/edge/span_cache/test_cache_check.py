"""Which models a span cache may serve: nothing trainable, no adapter and nothing random at or below the cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from support.models.tiny import tiny_checkpoint
from torch import nn
from transformers import AutoModelForCausalLM

from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.sites.bottleneck import Bottleneck, attach_bottleneck
from isthmus.backbone.split.edge_parts import load_edge_parts
from isthmus.common.errors import ConfigError, UnsupportedCallError
from isthmus.edge.span_cache.cache_check import check_cacheable


@pytest.fixture(scope="module")
def edges(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    made: dict[str, Path] = {}

    def get(family: str = "llama", plan: str = "2:2", **overrides: Any) -> Any:
        name = f"{family}{sorted(overrides.items())}"
        if name not in made:
            made[name] = tiny_checkpoint(family, tmp_path_factory.mktemp("model"), **overrides)
        model = load_edge_parts(made[name], SplitPlan.parse(plan, 6), lambda hidden, *_: hidden)
        return model.requires_grad_(False)

    return get


def lora(model: Any, layers: list[int] | None, **values: Any) -> Any:
    return get_peft_model(
        model, LoraConfig(r=2, layers_to_transform=layers, **{"target_modules": ["q_proj"], **values})
    )


def refused(model: Any, match: str) -> None:
    with pytest.raises(UnsupportedCallError, match=match):
        check_cacheable(model)


def test_adapters_above_the_cut_are_fine(edges: Callable[..., Any]) -> None:
    assert not check_cacheable(lora(edges(), [4, 5], lora_dropout=0.3))
    assert not check_cacheable(edges())
    for part in ("norm", "layers.4", "layers.5"):
        model = edges()
        model.model.get_submodule(part).requires_grad_(True)
        assert not check_cacheable(model)
    model = edges()
    model.lm_head.requires_grad_(True)
    assert not check_cacheable(model)
    model = edges()
    attach_bottleneck(model.model.layers[4], Bottleneck(32, 2, dropout=0.1))
    assert not check_cacheable(model)


@pytest.mark.parametrize("layers", [[1], [0, 4], [1, 4, 5]])
def test_an_adapter_below_is_refused(edges: Callable[..., Any], layers: list[int]) -> None:
    model = lora(edges(), layers)
    refused(model, rf"layers\.{layers[0]}\.self_attn\.q_proj\.lora_A.* is trainable.* on layers 4, 5 only")
    model.requires_grad_(False)
    refused(model, rf"layers\.{layers[0]}\.self_attn\.q_proj\.lora_A.* is an adapter's.* on layers 4, 5 only")


def test_a_plan_without_top_layers_is_told_so(edges: Callable[..., Any]) -> None:
    model = edges(plan="2:0")
    model.model.layers[1].requires_grad_(True)
    refused(model, "choose one with top layers")


def test_anything_inside_the_span_is_refused(edges: Callable[..., Any]) -> None:
    for layer in (2, 3):
        model = edges()
        model.model.layers[layer].add_module("adapter", nn.Linear(2, 2, bias=False))
        refused(model, rf"layers\.{layer}\.adapter\.weight is trainable")
        model.requires_grad_(False)
        refused(model, rf"layers\.{layer}\.adapter\.weight is an adapter's")


def test_trainable_embeddings_are_refused(edges: Callable[..., Any]) -> None:
    model = edges()
    model.get_input_embeddings().requires_grad_(True)
    refused(model, "embed_tokens.weight is trainable")
    model = edges("gpt2", "0:2", embd_pdrop=0.0)
    model.transformer.wpe.requires_grad_(True)
    refused(model, "wpe.weight is trainable")
    model = edges("opt_projected", "0:2")
    model.model.decoder.project_in.requires_grad_(True)
    refused(model, "project_in.weight is trainable")
    model = edges("opt_projected", "0:2")
    model.model.decoder.project_out.requires_grad_(True)
    assert not check_cacheable(model)
    refused(get_peft_model(edges(), LoraConfig(r=2, target_modules=["embed_tokens"])), "embed_tokens.*is trainable")


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")  # PEFT's, of merging
def test_a_trainable_head_that_is_the_embedding_is_refused(edges: Callable[..., Any]) -> None:
    model = edges("llama_tied")
    model.lm_head.requires_grad_(True)
    refused(model, "embed_tokens.weight is trainable")
    assert not check_cacheable(get_peft_model(edges("llama_tied"), LoraConfig(r=2, target_modules=["lm_head"])))


def test_a_prompt_is_refused(edges: Callable[..., Any]) -> None:
    settings = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3)
    refused(get_peft_model(edges(), settings), "prompt_encoder.* is trainable")


# Dropout --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "overrides", "where"),
    [
        ("gpt2", {}, r"transformer\.drop "),
        ("gpt2", {"embd_pdrop": 0.0}, r"transformer\.h\.0\.attn\.attn_dropout"),
        ("gpt2", {"embd_pdrop": 0.0, "attn_pdrop": 0.0}, r"transformer\.h\.0\.attn\.resid_dropout"),
        ("opt", {}, r"model\.decoder\.layers\.0"),
        ("llama", {"attention_dropout": 0.25}, r"model\.layers\.0\.self_attn .*p = 0\.25"),
        ("phi3", {"resid_pdrop": 0.1}, r"model\.layers\.0\.resid_attn_dropout"),
    ],
)
def test_dropout_below_is_refused(
    edges: Callable[..., Any], family: str, overrides: dict[str, Any], where: str
) -> None:
    refused(edges(family, **overrides), where + r".*set its dropout to 0")


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("gpt2", {"embd_pdrop": 0.0}),
        ("opt", {}),
        ("llama", {"attention_dropout": 0.25}),
        ("phi3", {"resid_pdrop": 0.1}),
    ],
)
def test_dropout_in_layers_above_and_in_the_clouds_is_fine(
    edges: Callable[..., Any], family: str, overrides: dict[str, Any]
) -> None:
    assert not check_cacheable(edges(family, "0:2", **overrides))


# Input gradients, and what is no split model --------------------------------------------------------------------------


def test_input_gradients_are_warned_about(edges: Callable[..., Any]) -> None:
    model = lora(edges(), [4, 5])
    model.enable_input_require_grads()
    with pytest.warns(UserWarning, match=r"disable_input_require_grads\(\) saves"):
        assert check_cacheable(model)
    model.disable_input_require_grads()
    assert not check_cacheable(model)


def test_a_whole_model_is_refused(tmp_path: Path) -> None:
    whole = AutoModelForCausalLM.from_pretrained(tiny_checkpoint("llama", tmp_path))
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no span to cache"):
        check_cacheable(whole)
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no span to cache"):
        check_cacheable(lora(whole, [1]))
