"""Emulators generate with a cache, and draft for the model that they stand in for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support.emulator.packages import tiny_package
from support.models.tiny import HIDDEN, N_LAYERS, PAD, VOCAB, WINDOW
from torch import Tensor

from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.backbone.decoding.key_values import KeyValues, LayerKeyValues
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.split.edge_parts import load_edge_parts
from isthmus.common.errors import PackageError, UnsupportedCallError
from isthmus.edge.drafts import EmulatorDraft, FixedLength, ModelDraft, drafting
from isthmus.edge.drafts.emulator_draft import around_emulator
from isthmus.emulator.compress.emulator_model import Emulator, build_emulator
from isthmus.emulator.compress.recipe import Recipe

from ...backbone.conftest import Checkpoints, Pairs

PLAN = SplitPlan.parse("1:1", N_LAYERS)
NEW = 16
FAMILIES = ["llama", "mistral", "qwen2_sliding", "gemma3_text", "gpt2_scaled", "opt"]


def prompt(length: int = 12) -> Tensor:
    return torch.randint(3, VOCAB, (1, length), generator=torch.Generator().manual_seed(7))


def text(model: Any, ids: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    """Tokens, and the logits that they were chosen by."""
    ids = prompt() if ids is None else ids
    given = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    found = model.generate(ids, **{**given, **options}, output_logits=True, return_dict_in_generate=True)
    return found.sequences, torch.stack(found.logits)


def emulator(folder: Path, recipe: str, keep: float = 0.5) -> Emulator:
    """Of the middle of a tiny model."""
    blocks = torch.randint(3, VOCAB, (24, 16), generator=torch.Generator().manual_seed(5))
    return build_emulator(Checkpoint(folder, "tiny"), PLAN, Recipe.parse(recipe, keep), blocks)


@pytest.mark.parametrize("recipe", ["crash", "importance+bridged"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_emulator_generates_with_a_cache_what_it_does_without(
    checkpoints: Checkpoints, family: str, recipe: str
) -> None:
    assert WINDOW < NEW
    folder = checkpoints(family)
    found = emulator(folder, recipe)
    if recipe == "crash":
        assert len(set(found.layers)) < len(found.layers)  # some layer stands twice
    model = load_edge_parts(folder, PLAN, found, attn_implementation=found.attn_implementation)
    tokens, logits = text(model)
    expected, expected_logits = text(model, use_cache=False)
    assert torch.equal(tokens, expected)
    assert torch.allclose(logits, expected_logits, atol=1e-4)
    beams = text(model, num_beams=3)[0]
    assert torch.equal(beams, text(model, num_beams=3, use_cache=False)[0])


def test_with_one_entry_for_a_layer_that_stands_twice_the_text_is_another(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoints("llama")
    model = load_edge_parts(folder, PLAN, emulator(folder, "crash"))
    expected = text(model, use_cache=False)[1]

    def shared(self: KeyValues, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return self._places[layer][0].update(keys, values)

    monkeypatch.setattr(KeyValues, "update", shared)
    with pytest.raises((AssertionError, RuntimeError)):
        assert torch.allclose(text(model)[1], expected, atol=1e-4)


def test_a_pass_that_fails_leaves_the_cache_as_it_was(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = emulator(checkpoints("llama"), "crash")
    states = torch.randn(1, 9, HIDDEN, generator=torch.Generator().manual_seed(1))
    cache = found.new_cache()
    cache.extend(states[:, :6], None, None)
    update, calls = LayerKeyValues.update, []

    def failing(self: LayerKeyValues, *args: Any) -> tuple[Tensor, Tensor]:
        calls.append(self)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return update(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(LayerKeyValues, "update", failing)
        with pytest.raises(KeyboardInterrupt):
            cache.extend(states[:, 6:], None, None)
    assert [each.get_seq_length() for each in cache.keys.layers] == [6] * len(found.layers)
    assert torch.allclose(cache.extend(states[:, 6:], None, None), found(states)[:, 6:], atol=1e-5)
    assert (cache.length, cache.rows) == (9, 1)


def test_adapters_in_the_middle_are_refused(checkpoints: Checkpoints) -> None:
    from isthmus.backbone.split.edge_model import EdgeModelMixin

    folder = checkpoints("llama")
    model: EdgeModelMixin = load_edge_parts(folder, PLAN, emulator(folder, "uniform"))
    with pytest.raises(UnsupportedCallError):
        text(peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")))


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
@pytest.mark.parametrize("recipe", ["crash", "uniform"])
def test_a_greedy_text_with_an_emulator_is_the_same(pairs: Pairs, family: str, recipe: str) -> None:
    pair = pairs(family)
    expected = text(pair.edge)[0]
    found = emulator(pair.folder, recipe, 0.75)
    with drafting(pair.edge, ModelDraft(around_emulator(pair.edge, found), FixedLength(3))) as draft:
        assert torch.equal(text(pair.edge)[0], expected)
    assert draft.statistics.drafted > 0
    assert draft.statistics.tokens == NEW


def test_an_emulator_that_is_the_whole_middle_is_always_right(pairs: Pairs) -> None:
    pair = pairs("mistral")
    expected = text(pair.edge)[0]
    found = emulator(pair.folder, "uniform", 1.0)
    with drafting(pair.edge, ModelDraft(around_emulator(pair.edge, found), FixedLength(3))) as draft:
        assert torch.equal(text(pair.edge)[0], expected)
    assert draft.statistics.accepted == draft.statistics.drafted > 0


def test_a_draft_shares_the_edge_s_weights_and_adapters(pairs: Pairs) -> None:
    pair = pairs("llama")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[0, 5], task_type="CAUSAL_LM")
    model = peft.get_peft_model(pair.edge, config).eval()
    found = emulator(pair.folder, "uniform", 1.0)
    with drafting(model, ModelDraft(around_emulator(pair.edge, found), FixedLength(3))) as outer:
        drafter = around_emulator(pair.edge, found)
        assert drafter.isthmus_draft is None
        assert pair.edge.isthmus_draft is outer
    assert {id(each) for each in drafter.parameters()} == {id(each) for each in pair.edge.parameters()}
    assert drafter.remote_layers.span is found
    assert pair.edge.remote_layers.span is not found
    before = text(model)[0]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(2))
    expected = text(model)[0]
    assert not torch.equal(expected, before)
    with drafting(model, ModelDraft(drafter, FixedLength(3))) as draft:
        assert torch.equal(text(model)[0], expected)
    assert draft.statistics.accepted == draft.statistics.drafted > 0  # it had the adapter as it is now


def test_a_frozen_draft_has_no_parameter_that_is_trained_and_all_of_the_memory(pairs: Pairs) -> None:
    pair = pairs("llama")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[0, 5], task_type="CAUSAL_LM")
    model = peft.get_peft_model(pair.edge, config)
    drafter = around_emulator(pair.edge, emulator(pair.folder, "uniform"), frozen=True)
    ours, theirs = dict(drafter.named_parameters()), dict(pair.edge.named_parameters())
    assert {name: each.data_ptr() for name, each in ours.items()} == {n: each.data_ptr() for n, each in theirs.items()}
    assert not any(each.requires_grad for each in ours.values())
    assert any(each.requires_grad for each in model.parameters())  # the model's own are as they were


def test_a_draft_in_bf16_has_weights_of_its_own(pairs: Pairs, tmp_path: Path) -> None:
    pair = pairs("llama", "2:2")
    folder = tiny_package(tmp_path / "package", pair.folder, plan="2:2").folder
    expected = text(pair.edge)[0]
    for model in (None, pair.edge):
        found = EmulatorDraft.open(folder, model, rule=FixedLength(2), dtype=torch.bfloat16)
        weights = [*found.model.parameters(), *found.model.remote_layers.span.parameters()]
        assert {each.dtype for each in weights} == {torch.bfloat16}
        assert not {id(each) for each in weights} & {id(each) for each in pair.edge.parameters()}
        with drafting(pair.edge, found):
            assert torch.equal(text(pair.edge)[0], expected)
        assert found.statistics.drafted > 0
    assert {each.dtype for each in pair.edge.parameters()} == {torch.float32}


def test_a_package_is_opened(pairs: Pairs, tmp_path: Path) -> None:
    pair = pairs("llama", "2:2")
    package = tiny_package(tmp_path / "package", pair.folder, plan="2:2")
    expected = text(pair.edge)[0]
    texts = []
    for model in (None, pair.edge):
        with drafting(pair.edge, EmulatorDraft.open(package.folder, model, rule=FixedLength(2))) as draft:
            assert torch.equal(text(pair.edge)[0], expected)
        texts.append(text(draft.model)[0])
    assert torch.equal(*texts)
    with pytest.raises(PackageError, match="cut by 1:1"):
        EmulatorDraft.open(package.folder, pairs("llama", "1:1").edge)
    with pytest.raises(PackageError, match="digest"):
        EmulatorDraft.open(package.folder, pairs("mistral", "2:2").edge)
    (package.folder / "config.json").write_text("{}")
    with pytest.raises(PackageError):
        EmulatorDraft.open(package.folder)
