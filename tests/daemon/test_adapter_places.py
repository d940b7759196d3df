"""What an adapter's folder says of where it acts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from isthmus.backbone.adapters.custom_adapters import ADAPTER_WEIGHTS
from isthmus.daemon.adapter_places import WEIGHTS, Cut, acts_in_cloud

CUT = Cut(n_layers=6, first=2, last=1)


def adapter(folder: Path, *names: str) -> Path:
    """A folder with weights of these names."""
    folder.mkdir(exist_ok=True)
    save_file({name: torch.zeros(1) for name in names}, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("stack", ["base_model.model.model.layers", "base_model.model.transformer.h", "layers"])
def test_layers_between_the_first_and_the_last_are_the_clouds(tmp_path: Path, stack: str) -> None:
    found = [acts_in_cloud(adapter(tmp_path, f"{stack}.{n}.q_proj.lora_A.weight"), CUT) for n in range(6)]
    assert found == [False, False, True, True, True, False]
    assert acts_in_cloud(adapter(tmp_path, f"{stack}.0.x", f"{stack}.3.x"), CUT)


def test_what_names_no_layer_or_cannot_be_read_acts_nowhere(tmp_path: Path) -> None:
    assert not acts_in_cloud(adapter(tmp_path, "prompt_embeddings", "ladder.players.3"), CUT)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"no weights")
    assert not acts_in_cloud(tmp_path, CUT)
    assert not acts_in_cloud(tmp_path / "none", CUT)


def test_the_weights_have_the_name_that_adapters_are_saved_with() -> None:
    assert WEIGHTS == ADAPTER_WEIGHTS


def test_a_cut_is_read_from_the_facts() -> None:
    assert Cut.of({"plan": "2:1", "n_layers": 6}) == CUT
    for facts in ({}, {"plan": "2:1"}, {"plan": "x", "n_layers": 6}):
        assert Cut.of(facts) is None
