"""Copies of what was learned: to go on from, bit for bit, and to talk to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cloud.train_runs import Runs, cloud_for_runs
from support.daemon.local_trainer import LocalTrainer, random_data
from support.models.tiny import tiny_checkpoint
from support.run_folders import same

from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.split.edge_parts import load_edge_parts
from isthmus.common.errors import CheckpointError, ConfigError, UnknownModelError
from isthmus.daemon.tinker.training import training_models
from isthmus.daemon.tinker.training.lora_shape import LoraShape
from isthmus.daemon.tinker.training.open_cloud import OpenCloud
from isthmus.daemon.tinker.training_worker import TrainingHandlers
from isthmus.edge.client.adapted_model import load_adapted
from isthmus.edge.config.client_config import ClientConfig

LOGPROBS_APART = 1e-4
"""A cached step has other bits than a forward of the whole text."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    with cloud_for_runs(tmp_path_factory.mktemp("copies")) as started:
        yield started


@pytest.fixture
def trainer(runs: Runs, tmp_path: Path) -> Iterator[LocalTrainer]:
    with LocalTrainer(runs, tmp_path) as started:
        yield started


@pytest.mark.server
@pytest.mark.parametrize("layers", ["edge", "all"])
def test_a_copy_goes_on_bit_for_bit(trainer: LocalTrainer, layers: str) -> None:
    trainer.create(layers=layers)
    trainer.train(range(1, 3))
    copy = trainer.save(optimizer=True)
    wanted = trainer.train(range(3, 6)), trainer.adapter()
    trainer.create("b", seed=9, layers=layers)
    trainer.train(range(1, 2), "b")
    trainer.load(copy, "b", optimizer=True)
    found = trainer.train(range(3, 6), "b"), trainer.adapter("b")
    assert found[0] == wanted[0]
    assert same(found[1], wanted[1])
    trainer.load(copy, "b")  # the control: moments that start anew
    losses = trainer.train(range(7, 10), "b")
    assert not same(trainer.adapter("b"), wanted[1])
    assert losses[0] != wanted[0][0]


@pytest.mark.server
def test_a_model_goes_on_from_its_folder_bit_for_bit(trainer: LocalTrainer) -> None:
    assert trainer.create()["saved"] is None
    losses = trainer.train(range(1, 5))
    wanted = trainer.adapter()
    trainer.create("b")
    first = trainer.train(range(1, 3), "b")
    trainer.forward_backward(random_data(99), "b")  # gradients end with the process
    again = LocalTrainer(trainer.runs, trainer.folder, TrainingHandlers())
    with again:
        assert again.create("b")["saved"] == 2
        assert first + again.train(range(3, 5), "b") == losses
        assert same(again.adapter("b"), wanted)
        with pytest.raises(CheckpointError, match="rank was 4 and is now 8"):
            again.create("b", rank=8)
        copy = trainer.save()
        again.create("b")
        again.forward_backward(random_data(9), "b")
        again.load(copy, "b")  # without a step, too
        assert again.create("b")["saved"] == 5
        assert same(again.adapter("b"), trainer.adapter())
        again.train(range(6, 7), "b")
        assert not same(again.adapter("b"), trainer.adapter())
        assert again.create("b")["saved"] == 6
    assert trainer.create("b")["saved"] == 6  # one in memory is made anew, too


@pytest.mark.server
def test_a_copy_that_does_not_fit_is_refused_and_changes_nothing(trainer: LocalTrainer) -> None:
    trainer.create()
    trainer.train(range(1, 2))
    copy, bare = trainer.save(optimizer=True), trainer.save()
    trainer.create("b", rank=8)
    trainer.create("c", mlp=False)
    for model, folder, said in [
        ("b", copy, "has r 4, and this model 8"),
        ("c", copy, "does not fit: .*mlp"),
        ("a", bare, "without the optimizer's state"),
        ("a", trainer.folder / "nowhere", "nowhere"),
    ]:
        before = trainer.values(model)
        with pytest.raises(CheckpointError, match=said):
            trainer.load(folder, model, optimizer=True)
        assert same(trainer.values(model), before)
    trainer.load(bare)
    for name, field in (("adapter_config.json", "lora_alpha"), ("isthmus_tuning.json", "digest")):
        path = copy / name
        text = path.read_text()
        path.write_text(json.dumps({**json.loads(text), field: 16}))
        with pytest.raises(CheckpointError, match=r"alpha 16|another base model"):
            trainer.load(copy, optimizer=True)
        path.write_text(text)
    trainer.load(copy, optimizer=True)
    weights = copy / "optimizer.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors cannot be read"):
        trainer.load(copy, optimizer=True)


@pytest.mark.server
@pytest.mark.parametrize("shape", [{}, {"layers": "all"}, {"unembed": True}], ids=["edge", "all", "head"])
def test_a_sampler_gives_the_trainers_log_probabilities(trainer: LocalTrainer, shape: dict[str, Any]) -> None:
    trainer.create(**shape)
    trainer.train(range(1, 6))
    (datum,) = random_data(31, (24,))
    wanted = trainer.forward_backward([datum], forward_only=True)["outputs"][0]["logprobs"]
    adapter, link = trainer.save(), trainer.model().cloud.link
    apart = []
    for folder in (adapter, None):
        model: Any = load_adapted(link, folder, plugged=False, leased="all").eval()
        tokens, targets = torch.tensor([datum["tokens"]]), datum["targets"]
        cache, logits = None, []
        with torch.no_grad():
            for start, stop in [(0, 8), *((n, n + 1) for n in range(8, 24))]:  # a prompt, and token by token
                step = model(input_ids=tokens[:, start:stop], past_key_values=cache, use_cache=True)
                cache = step.past_key_values
                logits.append(step.logits[0])
        found = torch.cat(logits).log_softmax(-1)[torch.arange(24), torch.tensor(targets)]
        apart.append(float((found - torch.tensor(wanted)).abs().max()))
    assert apart[0] <= LOGPROBS_APART
    assert apart[1] > 0.1  # the control: the base model


@pytest.mark.server
def test_the_head_is_trained_where_it_has_weights_of_its_own(trainer: LocalTrainer) -> None:
    made = trainer.create(attn=False, mlp=False, unembed=True)
    assert made["targets"] == []
    assert {name.rpartition(".lora_")[0] for name in trainer.adapter()} == {"base_model.model.lm_head"}
    first = trainer.train(range(1, 2))
    assert trainer.forward_backward(random_data(1))["metrics"]["loss:sum"] != first[0]


@pytest.mark.server
def test_a_tied_head_is_left_out_on_demand(trainer: LocalTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert trainer.create(unembed=True, spare_tied_head=True)["unembed"] is True  # it is not tied
    assert any("lm_head" in name for name in trainer.adapter())
    monkeypatch.setattr(OpenCloud, "tied_head", True)
    assert trainer.create("b", unembed=True, spare_tied_head=True)["unembed"] is False
    assert not any("lm_head" in name for name in trainer.adapter("b"))
    assert trainer.create("c", unembed=True)["unembed"] is True  # and not otherwise


def test_a_tied_head_is_refused_by_name(tmp_path: Path) -> None:
    shape = LoraShape(rank=2, seed=0, attn=True, mlp=True, unembed=True, layers="edge")
    cloud = ClientConfig(cloud="isthmus://nowhere:1#SHA256:x")
    for family, refused in (("llama_tied", True), ("llama", False)):
        folder = tiny_checkpoint(family, tmp_path / family)
        model = load_edge_parts(folder, SplitPlan.parse("1:1", 6), lambda hidden, mask, positions: hidden)
        if refused:
            with pytest.raises(ConfigError, match="train_unembed = true: the head of llama_tied"):
                shape.put_on(model, cloud)
        else:
            assert shape.put_on(model, cloud) is not None


@pytest.mark.parametrize("family", ["gpt2", "opt", "phi3", "qwen2", "gemma2"])
def test_switches_name_the_linears_of_every_family(tmp_path: Path, family: str) -> None:
    """Attention and MLP together are all linears of a layer, and have none in common."""
    cloud = ClientConfig(cloud="isthmus://nowhere:1#SHA256:x")
    folder = tiny_checkpoint(family, tmp_path / family)
    found = []
    for switches in ({"attn": True, "mlp": False}, {"attn": False, "mlp": True}):
        model = load_edge_parts(folder, SplitPlan.parse("1:1", 6), lambda hidden, mask, positions: hidden)
        shape = LoraShape(rank=2, seed=0, unembed=False, layers="edge", **switches)
        tuned = shape.put_on(model, cloud)
        names = {name.partition(".lora_")[0] for name, each in tuned.named_parameters() if each.requires_grad}
        assert all(("mlp" in name or ".fc" in name) == switches["mlp"] for name in names)
        found.append(names)
    kinds = ("Linear", "Conv1D")
    plain: Any = load_edge_parts(folder, SplitPlan.parse("1:1", 6), lambda hidden, mask, positions: hidden)
    layers = plain.isthmus_origin.family.layers_path
    linears = {
        f"base_model.model.{name}"
        for name, module in plain.named_modules()
        if type(module).__name__ in kinds and name.startswith((f"{layers}.0.", f"{layers}.5."))
    }
    assert found[0] | found[1] == linears
    assert not found[0] & found[1]


@pytest.mark.server
@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"rank": 0}, "rank: Input should be greater than or equal to 1"),
        ({"rank": 4096}, "rank: Input should be less than or equal to 1024"),
        ({"attn": False, "mlp": False}, "are all false"),
        ({"layers": "some"}, "layers"),
        ({"cloud": {"cloud": "x", "colour": 1}}, "colour"),
        ({"strange": 1}, "strange: Extra inputs"),
    ],
)
def test_a_model_that_cannot_be_is_refused_by_name(trainer: LocalTrainer, values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        trainer.create(**values)
    assert trainer.handlers.state({})["models"] == {}


@pytest.mark.server
def test_models_are_bounded_and_forgotten(trainer: LocalTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_models, "MOST_MODELS", 2)
    trainer.create("a")
    trainer.create("b")
    with pytest.raises(ConfigError, match="2 models are in training already"):
        trainer.create("c")
    trainer.handlers.forget({"model": "a"})
    trainer.create("c")
    with pytest.raises(UnknownModelError, match="model a is not in training here"):
        trainer.forward_backward(random_data(1), "a")
    for name in "bc":
        trainer.handlers.forget({"model": name})
    assert trainer.handlers.state({})["clouds"] == 0
