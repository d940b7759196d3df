"""LoRA+ and LoRA-FA: what they move and how far, and that a resumed run goes on with their state."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft.optimizers
import pytest
import torch
from safetensors.torch import load_file
from support.models.small_training import Wire, config, data, trainer
from support.run_folders import adapter, assert_same_run
from transformers import AutoModelForCausalLM

from isthmus.backbone.adapters.adapter_files import load_adapter
from isthmus.common.errors import CheckpointError, UnreachableError
from isthmus.edge.config.schedule import learning_rate
from isthmus.edge.config.training_config import TuningConfig
from isthmus.edge.data.batches import Batches
from isthmus.edge.training.methods import build_peft, trained

OPTIMIZERS = ["adamw", "lora-plus", "lora-fa", "mezo"]


def options(out: Path, optimizer: str, **values: Any) -> Any:
    return config(out, optimizer=optimizer, dropout=0.0, **values)


def fresh(model_folder: Path, settings: TuningConfig) -> Any:
    return build_peft(AutoModelForCausalLM.from_pretrained(model_folder), settings).train()


def backward(model: Any, settings: TuningConfig, step: int) -> None:
    """The gradients of the step after `step` applied ones, of a run of nine steps of one micro-batch."""
    batch = list(Batches(data().train, 3, 0, settings.seed).epoch(step // 3))[step % 3]
    model(**batch, use_cache=False).loss.backward()
    torch.nn.utils.clip_grad_norm_(trained(model).values(), 1.0, foreach=False)


def assert_same(model: Any, other: Any) -> None:
    for (name, ours), (_, theirs) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_lora_plus_is_adamw_with_a_faster_b(model_folder: Path, tmp_path: Path, method: str) -> None:
    settings = options(tmp_path, "lora-plus", method=method, lora_plus_ratio=5.0, weight_decay=0.1)
    run = trainer(model_folder, settings)
    run.fit()
    model = fresh(model_folder, settings)
    slow = [value for name, value in trained(model).items() if "lora_A" in name]
    fast = [value for name, value in trained(model).items() if "lora_A" not in name]  # B, and DoRA's magnitudes
    assert {value.dim() for value in fast} == ({1, 2} if method == "dora" else {2})
    groups = [{"params": slow, "multiple": 1.0}, {"params": fast, "multiple": 5.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, weight_decay=0.1, foreach=False)
    for step in range(9):
        optimizer.zero_grad()
        backward(model, settings, step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step, 9) * group["multiple"]
        optimizer.step()
    assert_same(run.model, model)


def test_lora_fa_moves_b_alone_as_peft_does(model_folder: Path, tmp_path: Path) -> None:
    settings = options(tmp_path, "lora-fa", rank=4, weight_decay=0.1)
    run = trainer(model_folder, settings)
    report = run.fit().report
    model = fresh(model_folder, settings)
    start = {name: value.detach().clone() for name, value in trained(model).items()}
    optimizer = peft.optimizers.create_lorafa_optimizer(model, 4, 16, 1.0, weight_decay=0.1)
    for step in range(9):
        optimizer.zero_grad()
        backward(model, settings, step)
        optimizer.param_groups[0]["lr"] = learning_rate(settings, step, 9)
        optimizer.step()
    assert_same(run.model, model)
    for name, value in start.items():
        stayed = torch.equal(adapter(tmp_path)[name.replace(".default", "")], value)
        assert stayed == ("lora_A" in name), name
    assert report.trained_parameters == sum(value.numel() for name, value in start.items() if "lora_B" in name)
    assert report.loss_after is not None
    assert report.loss_before is not None
    assert report.loss_after < report.loss_before


def test_lora_fa_goes_on_from_an_adapter_with_its_own_rank(model_folder: Path, tmp_path: Path) -> None:
    first = trainer(model_folder, options(tmp_path / "first", "adamw", rank=2, alpha=4.0, steps=2)).fit().adapter
    settings = options(tmp_path / "second", "lora-fa", rank=8, start_from=first, steps=2)
    trainer(model_folder, settings).fit()
    before, after = adapter(tmp_path / "first"), adapter(tmp_path / "second")
    assert {name for name in before if torch.equal(before[name], after[name])} == {n for n in before if "lora_A" in n}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_resumes_bit_for_bit_and_its_adapter_loads(model_folder: Path, tmp_path: Path, optimizer: str) -> None:
    def unreachable() -> None:
        raise UnreachableError("away.")

    straight = trainer(model_folder, options(tmp_path / "straight", optimizer))
    straight.fit()
    with pytest.raises(UnreachableError, match="checkpoint-4"):
        trainer(model_folder, options(tmp_path / "broken", optimizer), Wire("begin", 5, unreachable)).fit()
    # A frozen A comes from the checkpoint, not from the seed.
    run = trainer(model_folder, options(tmp_path / "broken", optimizer, resume=True), Wire())
    with torch.no_grad():
        for name, parameter in run.model.named_parameters():
            if "lora_" in name:
                parameter.add_(1.0)
    run.fit()
    assert_same_run(tmp_path / "broken", tmp_path / "straight")

    loaded = load_adapter(AutoModelForCausalLM.from_pretrained(model_folder), tmp_path / "straight" / "adapter")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, straight.model.eval()(ids).logits)


def test_every_optimizer_makes_another_adapter(model_folder: Path, tmp_path: Path) -> None:
    made = []
    for optimizer in OPTIMIZERS:
        trainer(model_folder, options(tmp_path / optimizer, optimizer, steps=2)).fit()
        made.append(torch.cat([value.flatten() for value in adapter(tmp_path / optimizer).values()]))
    assert not any(torch.equal(one, other) for i, one in enumerate(made) for other in made[:i])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": "mezo"}, "optimizer was 'adamw' and is now 'mezo'"),
        ({"lora_plus_ratio": 4.0}, r"lora_plus_ratio was 16\.0 and is now 4\.0"),
        ({"mezo_eps": 0.1}, r"mezo_eps was 0\.001 and is now 0\.1"),
        ({"sites": "all"}, "sites was 'none' and is now 'all'"),
    ],
)
def test_a_resumed_run_keeps_its_optimizer_and_sites(
    model_folder: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    trainer(model_folder, config(tmp_path, dropout=0.0, steps=2)).fit()
    settings = config(tmp_path, **{"dropout": 0.0, "steps": 2, "resume": True, **change})
    model = fresh(model_folder, config(tmp_path))
    with pytest.raises(CheckpointError, match=message):
        trainer(model_folder, settings, model=model).fit()


def test_the_state_of_lora_fa_is_plain_tensors_in_the_checkpoint(model_folder: Path, tmp_path: Path) -> None:
    trainer(model_folder, options(tmp_path, "lora-fa", steps=3)).fit()
    folder = tmp_path / "checkpoint-3"
    state = load_file(folder / "optimizer.safetensors")
    names = {name.rpartition("/")[2] for name in state}
    assert names == {"step", "exp_avg_B", "exp_avg_sq_B"}
    assert {int(value) for name, value in state.items() if name.endswith("/step")} == {3}
    held = load_file(folder / "parameters.safetensors")
    assert any("lora_A" in name for name in held)
    assert json.loads((folder / "state.json").read_text())["settings"]["optimizer"] == "lora-fa"
