"""PEFT on the edge's model: what lands on the edge's layers trains there, and what is saved loads into the whole model.

The span of these tests is a plain function, which takes no adapters inside; `test_sites` has those.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model

from isthmus.common.errors import UnsupportedCallError

from ..conftest import Pairs, batch

TARGETS = {
    "llama": ["q_proj", "v_proj"],
    "gemma2": ["q_proj", "v_proj"],
    "phi3": ["qkv_proj"],
    "gpt2": ["c_attn"],
    "opt": ["q_proj", "v_proj"],
}


EDGE_LAYERS = [0, 1, 4, 5]


def lora(targets: Any, layers: list[int] | None = EDGE_LAYERS, **options: Any) -> LoraConfig:
    return LoraConfig(
        r=4,
        target_modules=targets,
        layers_to_transform=layers,
        task_type="CAUSAL_LM",
        init_lora_weights=False,
        **options,
    )


@pytest.mark.filterwarnings(
    "ignore:fan_in_fan_out is set to False:UserWarning"
)  # PEFT says so for GPT-2 and corrects it
@pytest.mark.parametrize("family", TARGETS)
def test_an_adapter_made_on_the_edge_gives_the_whole_model_the_same_logits(
    pairs: Pairs, tmp_path: Path, family: str
) -> None:
    pair = pairs(family)
    model = get_peft_model(pair.edge, lora(TARGETS[family]))
    adapted = [name for name, _ in model.named_parameters() if "lora_" in name]
    layers = {int(part) for name in adapted for part in name.split(".") if part.isdigit()}
    assert layers == set(pair.plan.edge_layers)
    inputs = batch("left_padded")
    output = model(**inputs)
    output.loss.backward()
    model.save_pretrained(tmp_path)
    full = PeftModel.from_pretrained(pair.whole, tmp_path, is_trainable=True)
    expected = full(**inputs, use_cache=False)
    expected.loss.backward()
    assert torch.equal(output.logits, expected.logits)
    gradients = {name: value.grad for name, value in full.named_parameters() if value.requires_grad}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, gradients[name]), name


@pytest.mark.parametrize(
    ("options", "layer"),
    [
        ({"targets": ["q_proj"]}, 2),
        ({"targets": ["q_proj"], "layers": [1, 3]}, 3),
        ({"targets": ["q_proj"], "layers": [2, 3]}, 2),
        ({"targets": ["model.layers.0.self_attn.q_proj", "model.layers.2.self_attn.q_proj"], "layers": None}, 2),
        ({"targets": r".*layers\.(0|3)\.self_attn\.q_proj", "layers": None}, 3),
    ],
)
def test_an_adapter_on_a_cloud_layer_is_refused_when_the_model_is_built(
    pairs: Pairs, options: dict[str, Any], layer: int
) -> None:
    with pytest.raises(UnsupportedCallError, match=rf"layers\.{layer}\.self_attn\.q_proj.*layers_to_transform"):
        get_peft_model(pairs("llama").edge, lora(**{"layers": None, **options}))


@pytest.mark.parametrize("name", ["model.layers.2", "model.layers.3", "model.layers.3.self_attn.v_proj"])
def test_a_module_of_the_cloud_cannot_be_trained_as_a_whole(pairs: Pairs, name: str) -> None:
    with pytest.raises(UnsupportedCallError, match=rf"{name} is in the cloud.*modules_to_save"):
        get_peft_model(pairs("llama").edge, lora(["q_proj"], modules_to_save=[name]))


def test_a_second_adapter_on_a_cloud_layer_is_refused_where_it_is_used(pairs: Pairs) -> None:
    model = get_peft_model(pairs("llama").edge, lora(["q_proj"]))
    model.add_adapter("other", lora(["q_proj"], layers=[3]))
    assert torch.isfinite(model(**batch("no_mask")).loss)
    model.set_adapter("other")
    with pytest.raises(UnsupportedCallError, match=r"layers\.3\.self_attn\.q_proj"):
        model(**batch("no_mask"))


@pytest.mark.parametrize("layers", [[0], [1, 5], [0, 1, 4, 5]])
def test_adapters_on_some_of_the_edges_layers_run(pairs: Pairs, layers: list[int]) -> None:
    model = get_peft_model(pairs("llama").edge, lora(["q_proj"], layers))
    assert torch.isfinite(model(**batch("no_mask")).loss)


def test_prompt_tuning_passes_and_prefix_tuning_is_refused(pairs: Pairs) -> None:
    pair = pairs("llama")
    torch.manual_seed(0)
    model = get_peft_model(pair.edge, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    inputs = batch("left_padded")
    whole = get_peft_model(pair.whole, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    whole.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(model(**inputs).logits, whole(**inputs, use_cache=False).logits)
    prefix = get_peft_model(pairs("llama").edge, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(UnsupportedCallError):
        prefix(**inputs)


def test_the_bare_model_does_not_save_itself_with_an_adapter_inside_and_does_once_merged(
    pairs: Pairs, tmp_path: Path
) -> None:
    from isthmus.backbone.split.edge_weights import load_edge_weights

    pair = pairs("llama")
    model = get_peft_model(pair.edge, lora(["q_proj"]))
    with pytest.raises(UnsupportedCallError, match="merge"):
        pair.edge.save_pretrained(tmp_path)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    load_edge_weights(pair.whole, tmp_path)
    inputs = batch("no_mask")
    assert torch.equal(merged(**inputs).logits, pair.whole(**inputs).logits)


def test_a_peft_model_generates(pairs: Pairs, tmp_path: Path) -> None:
    pair = pairs("llama")
    model = get_peft_model(pair.edge, lora(["q_proj"]))
    ids = batch("one_row", length=8)["input_ids"]
    tokens = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    model.save_pretrained(tmp_path)
    whole = PeftModel.from_pretrained(pair.whole, tmp_path)
    assert torch.equal(tokens, whole.generate(input_ids=ids, max_new_tokens=6, do_sample=False, use_cache=False))


def test_an_adapter_outside_the_layers_is_kept_too(pairs: Pairs, tmp_path: Path) -> None:
    pair = pairs("llama")
    model = get_peft_model(pair.edge, lora(r"lm_head|.*layers\.[0145]\.self_attn\.q_proj", None))
    inputs = batch("no_mask")
    logits = model(**inputs).logits
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert torch.equal(PeftModel.from_pretrained(pair.whole, tmp_path)(**inputs, use_cache=False).logits, logits)
