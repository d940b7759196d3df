"""What is written for an edge, what is read from disk, and what a damaged or foreign checkpoint leads to."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import loading_memory
from support.models.tiny import CONFIGS, read_json, tiny_checkpoint
from support.warm_processes import warm

from isthmus.backbone.checkpoints.sources import Checkpoint, load_tokenizer
from isthmus.backbone.plan import Span, SplitPlan
from isthmus.backbone.split.edge_parts import export_edge_parts, load_edge_parts
from isthmus.backbone.split.span import load_span
from isthmus.common.errors import CheckpointError, ConfigError, DiskError, PlanError

from ..conftest import Checkpoints, Pairs, batch, whole_model

PLAN = SplitPlan(6, 2, 2)


@pytest.mark.parametrize("family", CONFIGS)
def test_exported_parts_make_the_same_edge_and_hold_nothing_of_the_cloud(
    pairs: Pairs, tmp_path: Path, family: str
) -> None:
    pair = pairs(family, "1:2")
    export_edge_parts(Checkpoint(pair.folder, "tiny"), pair.plan, tmp_path / "parts")
    names = load_file(tmp_path / "parts" / "edge.safetensors").keys()
    assert not [name for name in names for layer in pair.plan.cloud if f".{layer}." in name]
    edge = load_edge_parts(tmp_path / "parts", pair.plan, pair.span)
    inputs = batch("left_padded")
    assert torch.equal(edge(**inputs).logits, pair.whole(**inputs).logits)
    assert load_tokenizer(tmp_path / "parts").encode("hi") == load_tokenizer(pair.folder).encode("hi")
    assert load_tokenizer(tmp_path / "parts").chat_template is not None
    assert edge.generation_config.eos_token_id == pair.whole.generation_config.eos_token_id
    assert edge.split_plan == pair.plan


def test_exported_parts_know_their_model_and_their_plan(checkpoints: Checkpoints, tmp_path: Path) -> None:
    whole = Checkpoint(checkpoints("llama"), "tiny")
    parts = Checkpoint(tmp_path / "parts", "tiny")
    export_edge_parts(whole, SplitPlan(6, 3, 0), parts.folder)
    export_edge_parts(whole, PLAN, parts.folder, dtype=torch.bfloat16)  # replaces the first
    assert parts.is_edge_parts
    assert parts.digest() == whole.digest()
    with pytest.raises(PlanError, match="for plan 2:2, not 3:0"):
        load_edge_parts(parts, SplitPlan(6, 3, 0), lambda hidden, _mask, _positions: hidden)
    with pytest.raises(CheckpointError, match=r"has no tensor model\.layers\.2\."):
        load_span(parts, PLAN)
    stored = load_file(parts.folder / "edge.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert [path.name for path in tmp_path.iterdir()] == ["parts"]


def test_an_export_that_fails_leaves_the_old_one(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    from isthmus.backbone.split import edge_parts as parts

    folder = tmp_path / "parts"
    export_edge_parts(Checkpoint(checkpoints("llama"), "tiny"), PLAN, folder)
    before = (folder / "edge.safetensors").read_bytes()

    def full(*_args: object, **_options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(parts, "save_file", full)
    with pytest.raises(DiskError, match="No space left"):
        export_edge_parts(Checkpoint(checkpoints("llama"), "tiny"), SplitPlan(6, 1, 1), folder)
    assert (folder / "edge.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["parts"]


def test_a_sharded_checkpoint_is_read_like_a_single_file(tmp_path: Path) -> None:
    folder = tiny_checkpoint("llama", tmp_path / "sharded", max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    edge = load_edge_parts(folder, PLAN, load_span(folder, PLAN))
    inputs = batch("no_mask")
    assert torch.equal(edge(**inputs).logits, whole_model(folder)(**inputs).logits)
    next(folder.glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="damaged"):
        load_span(folder, PLAN)


@pytest.mark.parametrize(("family", "prefix"), [("gpt2", "transformer."), ("opt", "model.")])
def test_names_without_the_base_models_prefix_are_found(
    checkpoints: Checkpoints, tmp_path: Path, family: str, prefix: str
) -> None:
    folder = shutil.copytree(checkpoints(family), tmp_path / "old")
    old = {name.removeprefix(prefix): value for name, value in load_file(folder / "model.safetensors").items()}
    save_file(old, folder / "model.safetensors", metadata={"format": "pt"})
    edge = load_edge_parts(folder, PLAN, load_span(folder, PLAN))
    inputs = batch("no_mask")
    assert torch.equal(edge(**inputs).logits, whole_model(checkpoints(family))(**inputs).logits)


@pytest.mark.parametrize("keep", ["both", "head_only", "both_different"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tied_weights_are_loaded_as_transformers_loads_them(
    checkpoints: Checkpoints, tmp_path: Path, keep: str
) -> None:
    folder = shutil.copytree(checkpoints("llama_tied"), tmp_path / "tied")
    tensors = load_file(folder / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    tensors["lm_head.weight"] = head.flip(0) if keep == "both_different" else head
    if keep == "head_only":
        del tensors["model.embed_tokens.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edge = load_edge_parts(folder, PLAN, load_span(folder, PLAN))
    assert (edge.lm_head.weight is edge.model.embed_tokens.weight) == (keep != "both_different")
    inputs = batch("no_mask")
    assert torch.equal(edge(**inputs).logits, whole_model(folder)(**inputs).logits)
    edge.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert ("lm_head.weight" in saved) == (keep == "both_different")


def test_damaged_and_foreign_checkpoints_are_refused(checkpoints: Checkpoints, tmp_path: Path) -> None:
    truncated = shutil.copytree(checkpoints("llama"), tmp_path / "truncated")
    content = (truncated / "model.safetensors").read_bytes()
    (truncated / "model.safetensors").write_bytes(content[: len(content) // 2])
    foreign = shutil.copytree(checkpoints("llama"), tmp_path / "foreign")
    config = read_json(foreign / "config.json")
    (foreign / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    incomplete = shutil.copytree(checkpoints("llama"), tmp_path / "incomplete")
    tensors = load_file(incomplete / "model.safetensors")
    for layer in (0, 2):
        del tensors[f"model.layers.{layer}.mlp.up_proj.weight"]
    save_file(tensors, incomplete / "model.safetensors", metadata={"format": "pt"})
    bare = shutil.copytree(checkpoints("llama"), tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    for folder, says in (
        (truncated, r"model\.safetensors is damaged"),
        (foreign, r"shape .*, but config\.json asks for .*48"),
        (incomplete, r"has no tensor model\.layers\.\d\.mlp\.up_proj\.weight"),
        (bare, "save the model as safetensors"),
    ):
        with pytest.raises(CheckpointError, match=says):
            load_span(folder, PLAN)
        with pytest.raises(CheckpointError, match=says):
            load_edge_parts(folder, PLAN, lambda hidden, _mask, _positions: hidden)


def test_an_index_may_not_lead_out_of_its_folder(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoints("llama"), tmp_path / "model")
    index = {"weight_map": {"model.norm.weight": "../../secret.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside its folder"):
        load_span(folder, PLAN)


def test_weights_have_a_floating_point_dtype_of_choice(checkpoints: Checkpoints) -> None:
    with pytest.raises(ConfigError, match=r"torch\.int8"):
        load_span(checkpoints("llama"), PLAN, dtype=torch.int8)
    with pytest.raises(ConfigError, match="sdpa"):
        load_span(checkpoints("gemma2"), PLAN, attn_implementation="sdpa")
    span = load_span(checkpoints("llama"), Span(1, 3), dtype=torch.bfloat16)
    assert (span.dtype, str(span.layer_span), span.hidden_size) == (torch.bfloat16, "1:3", 32)


def test_the_digest_tells_models_apart_and_ignores_where_they_lie(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = checkpoints("llama")
    copy = shutil.copytree(folder, tmp_path / "copy")
    digest = Checkpoint(folder, "a").digest()
    assert Checkpoint(copy, "b").digest() == digest
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert Checkpoint(copy, "b").digest() != digest
    (copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError):
        Checkpoint(copy, "b").digest()


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of about 300 MB, its embedding tied, so that each part is well above what a process allocates anyway."""
    return tiny_checkpoint(
        "llama",
        tmp_path_factory.mktemp("large") / "model",
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=8,
        vocab_size=4096,
        tie_word_embeddings=True,
    )


@pytest.mark.parametrize("part", ["span", "edge"])
def test_loading_takes_little_more_memory_than_what_is_kept(large: Path, tmp_path: Path, part: str) -> None:
    small = tiny_checkpoint("llama", tmp_path / "small", num_hidden_layers=8)
    done = warm().run([part, str(small), str(large)], os.environ, tmp_path, 240, program=loading_memory.__file__)
    assert done.returncode == 0, done.stderr
    ratio, kept = (float(value) for value in done.stdout.split())
    assert kept > 100e6
    assert 0.9 < ratio < 1.2


@pytest.mark.parametrize("text", ["[]", "{"])
def test_generation_settings_that_make_no_sense_are_named(tmp_path: Path, text: str) -> None:
    folder = tiny_checkpoint("llama", tmp_path / "model")
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"generation_config\.json does not make sense"):
        load_edge_parts(folder, SplitPlan(6, 1, 1), lambda hidden, mask, positions: hidden)
