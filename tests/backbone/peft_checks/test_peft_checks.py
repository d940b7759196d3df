"""When PEFT's work on a split model is refused, and in which words."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils.integrations import init_empty_weights
from support.models.peft_methods import EDGE, names
from support.models.tiny import CONFIGS, tiny_config
from transformers import AutoModelForCausalLM

from isthmus.backbone.peft_checks import checks, probe, whole
from isthmus.backbone.split import edge_model
from isthmus.common.errors import UnsupportedCallError

from ..conftest import Pairs, batch
from ..sites.test_edge_sites import lora, split

NORMS = {
    "target_modules": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"], task_type="CAUSAL_LM"),
    "modules_to_save": lambda: lora(["q_proj"], modules_to_save=["input_layernorm"]),
}


def edge_lora(**options: Any) -> peft.LoraConfig:
    return lora(names(EDGE, "self_attn.q_proj"), **options)


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # PEFT says so of the edge's norms
@pytest.mark.parametrize("field", NORMS)
@pytest.mark.parametrize("plan", ["2:2", "0:2", "1:0"])
def test_a_norm_of_the_cloud_is_refused_when_the_model_is_wrapped(pairs: Pairs, field: str, plan: str) -> None:
    model, _ = split(pairs("llama", plan))
    with pytest.raises(UnsupportedCallError, match=rf"layers\.{plan[0]}\.input_layernorm is in the cloud.*{field}"):
        peft.get_peft_model(model, NORMS[field]())


REFUSED = {
    r"layer_replication=\[\[0, 4\], \[2, 6\]\].*leave it out": (
        "llama",
        lambda: lora(["q_proj"], layer_replication=[[0, 4], [2, 6]]),
    ),
    r"model\.layers\.2\.self_attn is in the cloud.*the edge's own layers": (
        "llama",
        lambda: peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=4, task_type="CAUSAL_LM"),
    ),
    r"bias='all' trains model\.layers\.2\.self_attn\.\w_proj\.bias.*bias='none'": (
        "qwen2",
        lambda: edge_lora(bias="all"),
    ),
    r"bias='all' trains model\.layers\.2\.self_attn\.\w_proj\.bias.* bias='none'": (
        "qwen2",  # by the narrow model, as FRoD reads weights
        lambda: peft.FrodConfig(
            target_modules=names(EDGE, "self_attn.q_proj"), bias="all", progressbar=False, task_type="CAUSAL_LM"
        ),
    ),
    r"target_parameters with 'mlp\.up_proj\.weight' trains model\.layers\.2\.mlp\.up_proj.*edge's own layers": (
        "llama",
        lambda: lora([], target_parameters=["mlp.up_proj.weight"]),
    ),
    r"LoRA with ALoraLinearVariant on model\.layers\.2\.self_attn\.q_proj.*plain LoRA": (
        "llama",
        lambda: lora(["q_proj"], alora_invocation_tokens=[5]),
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_refusal_names_the_value_and_the_remedy(pairs: Pairs, message: str) -> None:
    family, make = REFUSED[message]
    model, _ = split(pairs(family))
    with pytest.raises(UnsupportedCallError, match=message) as caught:
        peft.get_peft_model(model, make())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [peft.PrefixTuningConfig, peft.CartridgeConfig])
def test_what_passes_keys_and_values_is_refused_at_the_call(pairs: Pairs, kind: Any) -> None:
    model, _ = split(pairs("llama"))
    model = peft.get_peft_model(model, kind(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with pytest.raises(UnsupportedCallError, match="use prompt tuning"):
        model(**batch("no_mask"))


# Later adapters -------------------------------------------------------------------------------------------------------


def test_a_later_adapter_is_refused_at_the_first_call(pairs: Pairs) -> None:
    base, _ = split(pairs("qwen2"))
    model = peft.get_peft_model(base, edge_lora())
    assert torch.isfinite(model(**batch("no_mask")).loss)
    model.add_adapter("biases", edge_lora(bias="all"))
    for _ in range(2):  # and at every further one
        with pytest.raises(UnsupportedCallError, match="bias='all'"):
            model(**batch("no_mask"))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_an_adapter_that_is_injected_is_refused(pairs: Pairs) -> None:
    model, _ = split(pairs("qwen2"))  # transformers' own `add_adapter` injects, too
    peft.inject_adapter_in_model(edge_lora(), model, "first")
    assert torch.isfinite(model(**batch("no_mask")).loss)
    with pytest.raises(UnsupportedCallError, match="bias='all'"):
        peft.inject_adapter_in_model(edge_lora(bias="all"), model, "second")


def test_another_adapter_under_a_known_name_is_looked_at(pairs: Pairs) -> None:
    base, _ = split(pairs("qwen2"))
    model = peft.get_peft_model(base, edge_lora())
    model.add_adapter("second", edge_lora())
    model(**batch("no_mask"))
    model.delete_adapter("second")
    model.add_adapter("second", edge_lora(bias="all"))
    with pytest.raises(UnsupportedCallError, match="bias='all'"):
        model(**batch("no_mask"))


def test_a_changed_configuration_is_looked_at_when_it_is_used_again(pairs: Pairs) -> None:
    base, _ = split(pairs("qwen2"))
    config = edge_lora()
    unloaded = peft.get_peft_model(base, config).unload()
    again = peft.get_peft_model(unloaded, config)  # the control: unchanged, it passes again
    assert torch.isfinite(again(**batch("no_mask")).loss)
    unloaded = again.unload()
    config.bias = "all"
    with pytest.raises(UnsupportedCallError, match="bias='all'"):
        peft.get_peft_model(unloaded, config)


def test_a_changed_configuration_is_looked_at_under_the_same_name(pairs: Pairs) -> None:
    base, _ = split(pairs("qwen2"))
    model = peft.get_peft_model(base, edge_lora())
    config = edge_lora()
    model.add_adapter("second", config)
    model(**batch("no_mask"))
    model.delete_adapter("second")
    config.bias = "all"
    model.add_adapter("second", config)
    with pytest.raises(UnsupportedCallError, match="bias='all'"):
        model(**batch("no_mask"))


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")  # AdaLoRA names parameters there
def test_a_second_adalora_loads_with_the_ranks_that_it_was_saved_with(pairs: Pairs, tmp_path: Path) -> None:
    pair = pairs("llama")
    options = {"init_r": 4, "target_r": 2, "total_step": 10, "tinit": 1, "tfinal": 1}
    config = peft.AdaLoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", **options)
    saved = peft.get_peft_model(pair.whole, config)
    ranks = {}
    for name, parameter in saved.named_parameters():
        if ".lora_E." in name:
            # Of each layer's four ranks, two have been given up.
            ranks[name.removeprefix("base_model.model.").replace(".default", "")] = [True, True, False, False]
            assert len(parameter) == 4
    saved.base_model.resize_modules_by_rank_pattern(
        {f"{name}.default": kept for name, kept in ranks.items()}, "default"
    )
    config.rank_pattern = ranks
    saved.save_pretrained(tmp_path)
    base, _ = split(pair)
    model = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    model.load_adapter(tmp_path, "second")
    assert torch.isfinite(model(**batch("no_mask")).loss)
    assert {len(parameter) for name, parameter in model.named_parameters() if ".lora_E." in name} == {2}


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_an_adapter_whose_weights_come_last_is_checked(pairs: Pairs, tmp_path: Path, low_cpu_mem_usage: bool) -> None:
    pair = pairs("llama")
    saved = peft.get_peft_model(pair.whole, lora(["q_proj"]))
    saved.save_pretrained(tmp_path)
    base, _ = split(pair)
    model = peft.PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.isfinite(model(**batch("no_mask")).loss)
    state = peft.get_peft_model_state_dict(saved)
    assert all(torch.equal(value, state[name]) for name, value in peft.get_peft_model_state_dict(model).items())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("inits", [init_empty_weights, nullcontext])
def test_the_probe_looks_at_numbers_also_where_peft_has_parameters_made_on_meta(
    pairs: Pairs, monkeypatch: pytest.MonkeyPatch, family: str, inits: Any
) -> None:
    base, _ = split(pairs(family))
    linear = "q_proj" if family == "llama" else "c_attn"
    model = peft.get_peft_model(base, lora([linear], fan_in_fan_out=family == "gpt2"))
    (wrapper, *_) = (module for name, module in model.named_modules() if ".2." in name and name.endswith(linear))
    with inits():
        assert probe.adds_to_its_linear(wrapper, "default")
    real = type(wrapper).forward
    monkeypatch.setattr(type(wrapper), "forward", lambda self, x: real(self, x) + self.base_layer(x))
    with inits():  # the control: the weight counts twice
        assert not probe.adds_to_its_linear(wrapper, "default")


@pytest.mark.parametrize("trainable", [False, True])
def test_a_saved_adapter_of_the_whole_model_that_would_lose_something_is_refused(
    pairs: Pairs, tmp_path: Path, trainable: bool
) -> None:
    pair = pairs("qwen2")
    peft.get_peft_model(pair.whole, edge_lora(bias="all")).save_pretrained(tmp_path)
    model, _ = split(pair)
    with pytest.raises(UnsupportedCallError, match="bias='all'"):
        peft.PeftModel.from_pretrained(model, tmp_path, is_trainable=trainable)


def test_an_adapter_over_another_is_refused(pairs: Pairs) -> None:
    model, _ = split(pairs("llama"))
    mixed = peft.get_peft_model(model, lora(["q_proj"]), mixed=True)
    mixed.add_adapter("other", peft.LoHaConfig(r=2, target_modules=["q_proj"], init_weights=False))
    mixed.set_adapter(["default", "other"])
    with pytest.raises(UnsupportedCallError, match="not one over another"):
        mixed(**batch("no_mask"))


def test_what_peft_left_half_wrapped_is_refused(pairs: Pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = split(pairs("llama", "0:2"))

    def broken(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(peft.tuners.lora.LoraModel, "_mark_only_adapters_as_trainable", broken)
    with pytest.raises(KeyboardInterrupt):
        peft.get_peft_model(model, lora(["q_proj"]))
    with pytest.raises(UnsupportedCallError, match="PEFT has not finished"):
        model(**batch("no_mask"))


def test_an_unloaded_model_can_be_wrapped_again(pairs: Pairs) -> None:
    model, _ = split(pairs("llama"))
    unloaded = peft.get_peft_model(model, lora(["q_proj"])).unload()
    assert torch.isfinite(unloaded(**batch("no_mask")).loss)
    again = peft.get_peft_model(unloaded, edge_lora(), adapter_name="again")
    assert torch.isfinite(again(**batch("no_mask")).loss)


# How the checks run ---------------------------------------------------------------------------------------------------


def test_each_adapter_is_looked_at_once_also_in_a_copy(pairs: Pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    real = whole.check_against_whole

    def spy(model: Any, adapter: str, config: Any) -> None:
        looked.append(adapter)
        real(model, adapter, config)

    monkeypatch.setattr(checks, "check_against_whole", spy)
    base, _ = split(pairs("llama"))
    model = peft.get_peft_model(base, lora(["q_proj"]))
    model.add_adapter("second", lora(["v_proj"]))
    model(**batch("no_mask"))
    model(**batch("no_mask"))
    copy.deepcopy(model)(**batch("no_mask"))
    assert looked == ["default", "second"]


def test_what_is_put_on_a_layer_by_hand_is_noticed(pairs: Pairs) -> None:
    model, _ = split(pairs("llama"))
    wrapped = peft.get_peft_model(pairs("llama").edge, edge_lora()).get_base_model()
    assert torch.isfinite(model(**batch("no_mask")).loss)
    model.model.layers[3].self_attn.q_proj = wrapped.model.layers[0].self_attn.q_proj
    with pytest.raises(UnsupportedCallError, match="PEFT has not finished"):
        model(**batch("no_mask"))


def test_nothing_is_looked_at_where_nothing_has_changed(pairs: Pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    walks: list[int] = []
    real = edge_model.find_sites

    def spy(layers: Any) -> Any:
        walks.append(len(layers))
        return real(layers)

    base, _ = split(pairs("llama"))
    model = peft.get_peft_model(base, lora(["q_proj"]))
    monkeypatch.setattr(edge_model, "find_sites", spy)
    for _ in range(2):
        model(**batch("no_mask"))
        with model.disable_adapter():  # the sites are known, and do not act
            model(**batch("no_mask"))
    assert walks == []
    model.add_adapter("second", lora(["v_proj"]))  # the control
    model(**batch("no_mask"))
    assert walks == [2, 2]  # for the span, and for the calls


@pytest.mark.parametrize(
    "config",
    [lambda: lora(["q_proj"]), lambda: peft.ShiraConfig(r=2, target_modules=names(EDGE, "self_attn.q_proj"))],
)
def test_the_checks_draw_no_random_numbers(pairs: Pairs, config: Any) -> None:
    model, _ = split(pairs("llama"))
    base = peft.get_peft_model(model, config()).get_base_model()
    state = torch.get_rng_state()
    base.isthmus_passed = {}, []  # nothing has been looked at
    base.check_adapters()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("family", CONFIGS)
def test_the_narrow_model_has_the_whole_ones_modules(family: str) -> None:
    config = tiny_config(family)
    with torch.device("meta"):
        real = AutoModelForCausalLM.from_config(config)
    narrow = whole._narrow_model(config)
    assert [name for name, _ in narrow.named_modules()] == [name for name, _ in real.named_modules()]
    assert {name for name, _ in narrow.named_parameters()} == {name for name, _ in real.named_parameters()}


# By hand --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["", ".self_attn", ".input_layernorm", ".self_attn.q_proj"])
@pytest.mark.parametrize("layer", [2, 3])
def test_unfreezing_a_module_of_the_cloud_is_refused_and_freezing_is_not(pairs: Pairs, layer: int, path: str) -> None:
    name = f"model.layers.{layer}{path}"
    module = pairs("llama").edge.get_submodule(name)
    module.requires_grad_(False)
    with pytest.raises(UnsupportedCallError, match=f"{name} is in the cloud"):
        module.requires_grad_(True)


def test_unfreezing_a_weight_of_the_cloud_is_refused(pairs: Pairs) -> None:
    linear = pairs("llama").edge.model.layers[2].mlp.up_proj
    linear.weight.requires_grad = False
    linear.weight.requires_grad_(False)
    message = r"layers\.2\.mlp\.up_proj is in the cloud"
    with pytest.raises(UnsupportedCallError, match=message):
        linear.weight.requires_grad = True
    with pytest.raises(UnsupportedCallError, match=message):
        linear.weight.requires_grad_()


def test_the_parameters_of_a_part_of_the_cloud_cannot_be_asked_for(pairs: Pairs) -> None:
    layer = pairs("llama").edge.model.layers[3]
    with pytest.raises(UnsupportedCallError, match=r"layers\.3\.mlp is in the cloud"):
        next(layer.mlp.parameters())
    assert list(layer.parameters()) == []  # optimizers with a group for each layer ask that


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # PEFT says so of the edge's norms
def test_a_model_that_is_cut_behind_its_cloud_layers_is_checked(pairs: Pairs) -> None:
    model, _ = split(pairs("llama", "2:2"))
    del model.model.layers[3:]
    model.check_adapters()
    with pytest.raises(UnsupportedCallError, match=r"layers\.2\.input_layernorm is in the cloud"):
        peft.get_peft_model(model, NORMS["target_modules"]())
