"""Low-rank sites as an ordinary LoRA, which PEFT loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from support.models.tiny import HIDDEN, N_LAYERS
from torch import nn

from isthmus.backbone.sites.low_rank import add_low_rank
from isthmus.backbone.sites.low_rank_basis import low_rank_basis, svd_basis
from isthmus.backbone.sites.low_rank_export import export_lora
from isthmus.common.errors import ConfigError

from ..conftest import Checkpoints, disturb, logits, whole_model
from .conftest import NAME, RANK, SITES, SkeletonLinear, low_rank_sites


@pytest.mark.parametrize("init", ["seeded", "svd"])
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "opt"])
def test_peft_loads_the_export_into_the_whole_model(
    checkpoints: Checkpoints, tmp_path: Path, family: str, init: str
) -> None:
    """The same products in the same order but for `B M`, which is rounded once more: some units in the last place."""
    folder = checkpoints(family)
    model = whole_model(folder)
    add_low_rank(model, SITES[family], RANK, alpha=6, seed=3, init=init)
    disturb(model)
    export_lora(model, tmp_path / "lora")
    loaded = peft.PeftModel.from_pretrained(whole_model(folder), str(tmp_path / "lora"))
    adapted = {
        name.removeprefix("base_model.model.")
        for name, module in loaded.named_modules()
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer)
    }
    ours, theirs = logits(model), logits(loaded)
    assert adapted == set(SITES[family])
    assert (ours - logits(whole_model(folder))).abs().max() > 0.01
    assert (ours - theirs).abs().max() <= 1e-5 * ours.abs().max()
    assert {file.name for file in (tmp_path / "lora").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_the_export_is_bit_for_bit_for_equal_inputs(checkpoints: Checkpoints, tmp_path: Path) -> None:
    model = whole_model(checkpoints("llama"))
    add_low_rank(model, [NAME], RANK, alpha=6, seed=3)
    disturb(model)
    export_lora(model, tmp_path / "lora")
    stored = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    down, up = low_rank_basis(NAME, HIDDEN, HIDDEN, RANK, 3)
    site = low_rank_sites(model)[NAME]
    assert torch.equal(stored[f"base_model.model.{NAME}.lora_A.weight"], down)
    assert torch.equal(stored[f"base_model.model.{NAME}.lora_B.weight"], up @ site.weight.detach())
    assert len(stored) == 2


def skeleton_model() -> Any:
    """A model in miniature whose one site lies in the cloud."""
    model: Any = nn.Module()
    model.site = SkeletonLinear(12, 20)
    model.name_or_path = "tiny"
    return model


def test_a_skeleton_exports_with_the_seed_alone(tmp_path: Path) -> None:
    model = skeleton_model()
    add_low_rank(model, ["site"], RANK, alpha=1, seed=9)
    disturb(model)
    export_lora(model, tmp_path / "lora")
    stored = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    down, up = low_rank_basis("site", 12, 20, RANK, 9)
    assert torch.equal(stored["base_model.model.site.lora_A.weight"], down)
    assert torch.equal(stored["base_model.model.site.lora_B.weight"], up @ model.site.low_rank.weight.detach())


def test_a_skeleton_under_svd_needs_the_clouds_basis(tmp_path: Path) -> None:
    model = skeleton_model()
    add_low_rank(model, ["site"], RANK, alpha=1, init="svd")
    disturb(model)
    with pytest.raises(ConfigError, match="A and B of site come from the cloud's weights"):
        export_lora(model, tmp_path / "lora")
    down, up = svd_basis(torch.randn(20, 12, generator=torch.Generator().manual_seed(0)), RANK)
    with pytest.raises(ConfigError, match=r"do not fit site: give \[4, 12\] and \[20, 4\]"):
        export_lora(model, tmp_path / "lora", bases={"site": (up, down)})
    assert not (tmp_path / "lora").exists()
    export_lora(model, tmp_path / "lora", bases={"site": (down, up)})
    stored = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert torch.equal(stored["base_model.model.site.lora_A.weight"], down)


def test_a_model_without_sites_is_not_exported(checkpoints: Checkpoints, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no low-rank sites to export"):
        export_lora(whole_model(checkpoints("llama", num_hidden_layers=N_LAYERS)), tmp_path / "lora")
