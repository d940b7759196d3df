"""What else the edge's model is: an ordinary transformers model, and one that refuses what it cannot do exactly."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.split.edge_parts import load_edge_parts
from isthmus.backbone.split.edge_weights import load_edge_weights
from isthmus.common.errors import CheckpointError, UnsupportedCallError

from ..conftest import Checkpoints, Pairs, batch, whole_model


def test_it_is_the_familys_own_class_and_holds_no_weight_of_the_cloud(pairs: Pairs) -> None:
    pair = pairs("llama")
    assert isinstance(pair.edge, LlamaForCausalLM)
    assert isinstance(pair.edge, PreTrainedModel)
    assert type(pair.edge).__name__ == "LlamaForCausalLM"
    assert pair.edge.split_plan == pair.plan
    assert pair.edge.remote_layers.span is pair.span
    assert pair.edge.name_or_path == str(pair.folder)
    interior = tuple(f"model.layers.{layer}." for layer in pair.plan.cloud)
    whole = pair.whole.state_dict()
    assert pair.edge.state_dict().keys() == {name for name in whole if not name.startswith(interior)}
    assert pair.span.n_params + pair.edge.num_parameters() == pair.whole.num_parameters()
    assert pair.span not in list(pair.edge.modules())


@pytest.mark.parametrize(
    "extra",
    [
        {"use_cache": True},
        {"cache": DynamicCache()},
        {"output_hidden_states": True},
        {"output_attentions": True},
        {"is_causal": False},
        {"attention_mask": torch.ones(3, 1, 24, 24)},
        {"attention_mask": {"full_attention": None}},
        {"position_ids": torch.arange(24)},
    ],
    ids=lambda extra: next(iter(extra)),
)
def test_calls_that_a_cut_model_cannot_do_exactly_are_refused(pairs: Pairs, extra: dict[str, Any]) -> None:
    pair = pairs("llama")
    name = next(iter(extra))
    with pytest.raises(UnsupportedCallError, match=name):
        pair.edge(**{**batch("no_mask"), **extra})
    pair.edge(**batch("no_mask"))  # and nothing of the refused call is left


def test_encoder_inputs_and_positional_caches_are_refused(pairs: Pairs) -> None:
    edge = pairs("gpt2").edge
    ids = batch("no_mask")["input_ids"]
    with pytest.raises(UnsupportedCallError, match="encoder_hidden_states"):
        edge(input_ids=ids, encoder_hidden_states=torch.zeros(3, 4, 32))
    with pytest.raises(UnsupportedCallError, match="cache"):
        edge(ids, DynamicCache())


def test_flags_in_the_configuration_are_refused_too(pairs: Pairs) -> None:
    edge = pairs("llama").edge
    for name in ("use_cache", "output_hidden_states"):
        setattr(edge.config, name, True)
        with pytest.raises(UnsupportedCallError, match=name):
            edge(**batch("no_mask"))
        setattr(edge.config, name, False)


def test_mask_and_positions_reach_the_span_and_are_forgotten_even_after_an_error(pairs: Pairs) -> None:
    pair = pairs("gpt2")
    seen: list[tuple[torch.Tensor | None, torch.Tensor | None]] = []

    def failing(hidden: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor | None) -> torch.Tensor:
        seen.append((mask, positions))
        raise ConnectionError(f"no span for {tuple(hidden.shape)}")

    inputs = batch("right_padded")
    positions = torch.arange(24).unsqueeze(0)
    pair.edge.remote_layers.span = failing
    with pytest.raises(ConnectionError):
        pair.edge(inputs["input_ids"], None, inputs["attention_mask"], position_ids=positions)
    assert seen[0][0] is inputs["attention_mask"]
    assert seen[0][1] is positions
    with pytest.raises(UnsupportedCallError, match="by itself"):
        pair.edge.remote_layers(torch.zeros(1, 2, 32))
    pair.edge.remote_layers.span = pair.span
    assert torch.equal(pair.edge(**batch("no_mask")).logits, pair.whole(**batch("no_mask")).logits)


def test_generation_that_needs_a_cache_is_refused(pairs: Pairs) -> None:
    pair = pairs("llama")
    ids = batch("one_row")["input_ids"]
    for options in (
        {"use_cache": True},
        {"generation_config": GenerationConfig(use_cache=True)},
        {"cache_implementation": "static"},
        {"assistant_model": pair.whole},
        {"prompt_lookup_num_tokens": 2},
    ):
        with pytest.raises(UnsupportedCallError, match="cache"):
            pair.edge.generate(ids, max_new_tokens=2, **options)
    config = GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=2)
    assert pair.edge.generate(ids, generation_config=config).shape[1] > ids.shape[1]


def test_a_copy_talks_to_the_same_span_through_its_own_layers(pairs: Pairs) -> None:
    pair = pairs("llama_tied")
    twin = copy.deepcopy(pair.edge)
    assert twin.remote_layers is not pair.edge.remote_layers
    assert twin.remote_layers.span is pair.span
    pair.edge.remote_layers.span = lambda hidden, _mask, _positions: torch.zeros_like(hidden)
    inputs = batch("left_padded")
    assert torch.equal(twin(**inputs).logits, pair.whole(**inputs).logits)
    assert twin.lm_head.weight is twin.model.embed_tokens.weight


def test_it_can_be_cast(pairs: Pairs) -> None:
    pair = pairs("llama")
    edge = pair.edge.to(torch.bfloat16)
    edge.remote_layers.span = lambda hidden, mask, positions: pair.span(hidden.float(), mask, positions).to(
        hidden.dtype
    )
    assert edge(**batch("no_mask")).logits.dtype == torch.bfloat16
    assert pair.span.dtype == torch.float32


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_runs_the_span_once_and_changes_no_gradient(pairs: Pairs, reentrant: bool) -> None:
    pair = pairs("llama")
    calls = 0

    def counting(hidden: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor | None) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return pair.span(hidden, mask, positions)

    pair.edge.remote_layers.span = counting
    pair.edge.activation_checkpointing_enable({"use_reentrant": reentrant})
    pair.edge.train()
    inputs = batch("left_padded")
    pair.edge(**inputs).loss.backward()
    pair.whole(**inputs).loss.backward()
    assert calls == 1
    whole = dict(pair.whole.named_parameters())
    assert all(torch.equal(value.grad, whole[name].grad) for name, value in pair.edge.named_parameters())


def train(edge: Any, folder: Path, **options: Any) -> Trainer:
    inputs = batch("left_padded", rows=4, length=10)
    rows = [{name: value[row] for name, value in inputs.items()} for row in range(4)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        max_steps=4,
        learning_rate=1e-2,
        save_steps=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        seed=1,
    )
    trainer = Trainer(model=edge, args=arguments, train_dataset=rows)
    trainer.train(**options)
    return trainer


@pytest.mark.parametrize("family", ["llama_tied", "opt_projected"])
def test_saved_by_trainer_it_loads_into_the_whole_model(pairs: Pairs, tmp_path: Path, family: str) -> None:
    pair = pairs(family)
    train(pair.edge, tmp_path)
    pair.edge.eval()
    saved = tmp_path / "checkpoint-4"
    assert not (saved / "config.json").exists()
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(saved)
    inputs = batch("right_padded")
    trained = pair.edge(**inputs).logits
    assert not torch.equal(trained, pair.whole(**inputs).logits)
    load_edge_weights(pair.whole, saved)
    assert torch.equal(trained, pair.whole(**inputs).logits)


def test_trainer_resumes_from_its_own_checkpoint(pairs: Pairs, tmp_path: Path) -> None:
    first, second = pairs("llama"), pairs("llama")
    train(first.edge, tmp_path)
    train(second.edge, tmp_path / "again", resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    expected = first.edge.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in second.edge.state_dict().items())


def test_weights_of_another_model_are_refused_and_change_nothing(
    pairs: Pairs, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    pairs("llama").edge.save_pretrained(tmp_path)
    for other, says in (
        (checkpoints("llama", intermediate_size=48), r"\[32, 64\].*\[32, 48\]"),
        (checkpoints("gpt2"), "has no tensor"),
    ):
        model = whole_model(other)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(CheckpointError, match=says):
            load_edge_weights(model, tmp_path)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(CheckpointError, match=r"isthmus_edge\.json"):
        load_edge_weights(whole_model(checkpoints("llama")), checkpoints("llama"))


def test_saving_refuses_pickle_the_hub_and_a_foreign_state(pairs: Pairs, tmp_path: Path) -> None:
    pair = pairs("llama")
    for options in ({"push_to_hub": True}, {"safe_serialization": False}, {"state_dict": pair.whole.state_dict()}):
        with pytest.raises(UnsupportedCallError):
            pair.edge.save_pretrained(tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


def test_new_tokens_get_rows_in_embedding_and_head(pairs: Pairs) -> None:
    pair = pairs("llama_tied")
    before = pair.edge(**batch("no_mask")).logits
    pair.edge.resize_token_embeddings(before.shape[-1] + 5, mean_resizing=False)
    after = pair.edge(**batch("no_mask")).logits
    assert after.shape[-1] == before.shape[-1] + 5
    torch.testing.assert_close(after[..., :-5], before)


def test_a_plan_for_another_depth_is_refused(checkpoints: Checkpoints) -> None:
    from isthmus.backbone.plan import Span
    from isthmus.backbone.split.span import load_span
    from isthmus.common.errors import PlanError

    folder = checkpoints("llama")
    with pytest.raises(PlanError, match="for 30 layers, but the model has 6"):
        load_edge_parts(folder, SplitPlan(30, 2, 2), lambda hidden, _mask, _positions: hidden)
    with pytest.raises(PlanError, match="no span 4:9"):
        load_span(folder, Span(4, 9))
