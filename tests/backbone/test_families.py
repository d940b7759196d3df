from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.models.tiny import CONFIGS, N_LAYERS, tiny_config
from transformers import AutoConfig

from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.backbone.checkpoints.tensor_reader import write_json
from isthmus.backbone.families import SUPPORTED, family_named, family_of, longest_sequence
from isthmus.common.errors import CheckpointError, ConfigError, UnsupportedFamilyError


@pytest.mark.parametrize("model_type", ["bloom", "bert", "mixtral"])
def test_an_unsupported_architecture_is_refused_with_the_list_of_the_supported(model_type: str) -> None:
    with pytest.raises(UnsupportedFamilyError) as caught:
        family_of(AutoConfig.for_model(model_type))
    assert repr(model_type) in str(caught.value)
    assert all(name in str(caught.value) for name in SUPPORTED)


def test_every_supported_name_is_an_architecture_of_transformers() -> None:
    for name in SUPPORTED:
        assert family_of(AutoConfig.for_model(name)).name == name


@pytest.mark.parametrize("family", CONFIGS)
def test_the_number_of_layers_is_where_the_family_says(family: str, tmp_path: Path) -> None:
    tiny_config(family).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    checkpoint = Checkpoint(tmp_path, "tiny")
    assert values[family_named(values["model_type"]).count] == checkpoint.n_layers == N_LAYERS


@pytest.mark.parametrize(("model_type", "count"), [("llama", 32), ("gpt2", 12)])
def test_a_number_of_layers_that_is_left_out_is_the_one_of_transformers(
    model_type: str, count: int, tmp_path: Path
) -> None:
    write_json(tmp_path / "config.json", {"model_type": model_type})
    assert Checkpoint(tmp_path, "tiny").n_layers == count


def test_a_number_of_layers_that_is_none_is_told(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"model_type": "llama", "num_hidden_layers": "six"})
    with pytest.raises(CheckpointError, match="does not make sense"):
        _ = Checkpoint(tmp_path, "tiny").n_layers


@pytest.mark.parametrize(
    ("family", "overrides", "says"),
    [
        ("gpt2", {"add_cross_attention": True}, "cross-attention"),
        ("opt", {"layerdrop": 0.1}, "layerdrop=0.1"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantized"),
    ],
)
def test_parts_that_cannot_be_cut_exactly_are_refused(family: str, overrides: dict[str, object], says: str) -> None:
    with pytest.raises(UnsupportedFamilyError, match=says):
        family_of(tiny_config(family, **overrides))


def test_the_attention_implementation_is_the_familys_unless_asked() -> None:
    gemma, llama = family_of(tiny_config("gemma2")), family_of(tiny_config("llama"))
    assert (gemma.attention(None), llama.attention(None), llama.attention("eager")) == ("eager", "sdpa", "eager")
    with pytest.raises(ConfigError, match=r"'sdpa' does not fit gemma2; use eager"):
        gemma.attention("sdpa")


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 1e4}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4,
    "original_max_position_embeddings": 16,
}  # fmt: skip


@pytest.mark.parametrize("family", CONFIGS)
def test_the_longest_sequence_is_what_the_configuration_says(family: str) -> None:
    assert longest_sequence(tiny_config(family)) == 128


@pytest.mark.parametrize(("rope", "longest"), [(YARN, 512), (LINEAR, 256), (LLAMA3, 128)])
def test_scaled_rotary_embeddings_make_a_model_longer(rope: dict[str, object], longest: int) -> None:
    assert longest_sequence(tiny_config("llama", rope_parameters=rope)) == longest
