"""The layers around an emulator: what stays of the model."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from support.models.tiny import CONFIGS, N_LAYERS, VOCAB, tiny_checkpoint
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.split.span import load_span
from isthmus.emulator.compress.outer_layers import OuterLayers

from ..conftest import Checkpoints


def living_layers() -> dict[int, LlamaDecoderLayer]:
    """Decoder layers with weights in this process, which live as long as the result does."""
    gc.collect()
    return {id(each): each for each in gc.get_objects() if isinstance(each, LlamaDecoderLayer)}


@pytest.mark.parametrize("with_top", [False, True])
def test_without_a_top_nothing_above_the_middle_is_kept(tmp_path: Path, with_top: bool) -> None:
    checkpoint = Checkpoint(tiny_checkpoint("llama", tmp_path / "model"), "tiny")
    before = living_layers()  # of other tests, whose threads may end meanwhile
    outer = OuterLayers(checkpoint, SplitPlan.parse("1:2", N_LAYERS), with_top=with_top)
    assert len(living_layers().keys() - before.keys()) == (3 if with_top else 1)
    del outer


@pytest.mark.parametrize("plan", ["2:2", "0:1"])
@pytest.mark.parametrize("family", CONFIGS)
def test_below_the_middle_and_above_it_are_the_whole_model(checkpoints: Checkpoints, family: str, plan: str) -> None:
    checkpoint, split = checkpoints(family), SplitPlan.parse(plan, N_LAYERS)
    outer = OuterLayers(checkpoint, split, with_top=True)
    ids = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))
    whole = AutoModelForCausalLM.from_pretrained(checkpoint.folder).eval()
    with torch.no_grad():
        expected = whole(ids, labels=ids, use_cache=False)
        states = load_span(checkpoint, split)(outer.entry(ids))
        for _ in range(2):  # each leaves the layers as they were
            logits, loss = outer.predict(ids, states, with_loss=True)
            torch.testing.assert_close(logits, expected.logits, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(loss, expected.loss)
        assert outer.predict(ids, states)[1] is None
        assert not torch.allclose(outer.predict(ids, states.flip(1))[0], expected.logits, atol=1e-3)
