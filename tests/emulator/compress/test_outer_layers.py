"""The layers around an emulator: what stays of the model."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
from support.models.tiny import N_LAYERS, tiny_checkpoint
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.backbone.plan import SplitPlan
from isthmus.emulator.compress.outer_layers import OuterLayers


def living_layers() -> int:
    """Decoder layers with weights in this process."""
    gc.collect()
    return sum(isinstance(each, LlamaDecoderLayer) for each in gc.get_objects())


@pytest.mark.parametrize("with_top", [False, True])
def test_without_a_top_nothing_above_the_middle_is_kept(tmp_path: Path, with_top: bool) -> None:
    checkpoint = Checkpoint(tiny_checkpoint("llama", tmp_path / "model"), "tiny")
    before = living_layers()
    outer = OuterLayers(checkpoint, SplitPlan.parse("1:2", N_LAYERS), with_top=with_top)
    assert living_layers() - before == (3 if with_top else 1)
    del outer
