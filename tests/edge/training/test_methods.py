"""Every method trains, resumes bit for bit, goes on from an adapter, and saves what loads into the whole model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models.small_training import Wire, config, data, named_layers, trainer, weights
from support.models.tiny import CONFIGS, tiny_checkpoint, tiny_config
from transformers import AutoConfig, AutoModelForCausalLM

from isthmus.backbone.adapters.adapter_files import load_adapter, save_adapter
from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.sites.bottleneck import Bottleneck
from isthmus.backbone.split.edge_parts import load_edge_parts
from isthmus.backbone.split.span import load_span
from isthmus.common.errors import CheckpointError, ConfigError, UnreachableError
from isthmus.edge.data.batches import Batches
from isthmus.edge.run_files.run_identity import ModelIdentity
from isthmus.edge.training.evaluation import evaluate
from isthmus.edge.training.methods import build_peft, trained
from isthmus.edge.training.trainer import Trainer

METHODS = ["lora", "dora", "ia3", "vera", "adalora", "prompt", "bottleneck", "bitfit", "full"]
IDS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("model"), num_hidden_layers=2, attention_bias=True)


def unreachable() -> None:
    raise UnreachableError("away.")


@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_resumes_and_reloads(model_folder: Path, tmp_path: Path, method: str) -> None:
    def options(name: str, **values: Any) -> Any:
        return config(tmp_path / name, method=method, steps=10, rank=2, save_every=4, virtual_tokens=3, **values)

    straight = trainer(model_folder, options("straight"))
    start = weights(straight.model)
    result = straight.fit()
    assert any(not torch.equal(start[name], value) for name, value in weights(straight.model).items())
    assert result.report.loss_before != result.report.loss_after

    with pytest.raises(UnreachableError):
        trainer(model_folder, options("broken"), Wire("begin", 8, unreachable)).fit()
    resumed = trainer(model_folder, options("broken", resume=True), Wire())
    resumed.fit()
    for name, value in weights(straight.model).items():
        assert torch.equal(weights(resumed.model)[name], value), name
    log = "losses.jsonl"
    assert (tmp_path / "straight" / log).read_text() == (tmp_path / "broken" / log).read_text()

    base = AutoModelForCausalLM.from_pretrained(result.adapter if method == "full" else model_folder)
    loaded = base if method == "full" else load_adapter(base, result.adapter)
    # AdaLoRA's own forward would add its penalty, and fails outright on an adapter that is only read.
    assert evaluate(loaded, Batches(data().validation, 3, 0)) == pytest.approx(result.report.loss_after, rel=1e-5)
    with torch.no_grad():
        ours, theirs = straight.model.eval()(IDS).logits, loaded.eval()(IDS).logits
    # AdaLoRA cuts the saved matrices to their ranks, so the same numbers are summed in another order.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 if method == "adalora" else 0)


@pytest.fixture(scope="module")
def deep_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama_tied", tmp_path_factory.mktemp("model"), num_hidden_layers=5, attention_bias=True)


@pytest.mark.parametrize("method", METHODS)
def test_a_split_model_trains_as_the_whole_one(deep_folder: Path, tmp_path: Path, method: str) -> None:
    plan = SplitPlan.parse("1:2", 5)
    runs = {}
    for name in ("whole", "split"):
        options = config(tmp_path / name, method=method, steps=5, rank=2)
        if name == "whole":
            model = AutoModelForCausalLM.from_pretrained(deep_folder)
        else:
            model = load_edge_parts(deep_folder, plan, load_span(deep_folder, plan))
        tuned = build_peft(model, options, total_steps=5, layers=plan.edge_layers)
        identity = ModelIdentity("tiny", Checkpoint(deep_folder, "tiny").digest(), str(plan))
        runs[name] = trainer(deep_folder, options, model=tuned, identity=identity)
        runs[name].fit()
    whole, split = weights(runs["whole"].model), weights(runs["split"].model)
    assert whole.keys() == split.keys()
    assert all(torch.equal(whole[key], split[key]) for key in whole)
    log = "losses.jsonl"
    assert (tmp_path / "whole" / log).read_text() == (tmp_path / "split" / log).read_text()

    wanted = runs["split"].model.eval()(IDS).logits
    bases = [
        AutoModelForCausalLM.from_pretrained(deep_folder),
        load_edge_parts(deep_folder, plan, load_span(deep_folder, plan)),
    ]
    for base in bases:
        loaded = load_adapter(base, tmp_path / "split" / "adapter").eval()
        torch.testing.assert_close(loaded(IDS).logits, wanted, rtol=0, atol=1e-5 if method == "adalora" else 0)


def spoil_nothing(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


def spoil_weights(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:50])


def add_a_weight(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(
        {**load_file(path), "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": torch.ones(2)}, path
    )


def drop_a_weight(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(dict(list(load_file(path).items())[1:]), path)


def grow_a_weight(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({name: torch.cat([value, value]) for name, value in load_file(path).items()}, path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_nothing, r"not an adapter \(adapter_config\.json is missing"),
        (spoil_weights, "damaged"),
        (add_a_weight, r"layers\.9\.self_attn\.q_proj\.lora_A\.weight, which this model has no place for"),
        (drop_a_weight, "which is missing there"),
        (grow_a_weight, "does not fit this model"),
    ],
)
@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")
def test_an_adapter_that_does_not_fit(
    model_folder: Path, tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    adapter = trainer(model_folder, config(tmp_path, steps=1)).fit().adapter
    spoil(adapter)
    with pytest.raises(CheckpointError, match=message):
        load_adapter(AutoModelForCausalLM.from_pretrained(model_folder), adapter)


def test_tuned_layers_of_another_model_are_refused(deep_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(deep_folder, other)
    weights = load_file(other / "model.safetensors")
    save_file({name: value + 0.01 for name, value in weights.items()}, other / "model.safetensors", {"format": "pt"})
    plan = SplitPlan.parse("1:1", AutoConfig.from_pretrained(deep_folder).num_hidden_layers)

    def edge_model(folder: Path) -> Any:
        return load_edge_parts(folder, plan, lambda hidden, mask, positions: hidden)

    save_adapter(edge_model(deep_folder), tmp_path / "tuned")
    load_adapter(edge_model(deep_folder), tmp_path / "tuned")
    with pytest.raises(CheckpointError, match="tuned on a model with the digest"):
        load_adapter(edge_model(other), tmp_path / "tuned")


def split_model(folder: Path) -> Any:
    plan = SplitPlan.parse("1:2", AutoConfig.from_pretrained(folder).num_hidden_layers)
    return load_edge_parts(folder, plan, load_span(folder, plan))


@pytest.mark.parametrize("method", [method for method in METHODS if method != "adalora"])
def test_a_run_goes_on_from_another_runs_adapter(deep_folder: Path, tmp_path: Path, method: str) -> None:
    def run(name: str, **values: Any) -> Trainer:
        options = config(tmp_path / name, method=method, steps=2, rank=2, dropout=0.0, virtual_tokens=3, **values)
        tuned = build_peft(split_model(deep_folder), options, total_steps=2)
        identity = ModelIdentity("tiny", Checkpoint(deep_folder, "tiny").digest(), "1:2")
        return trainer(deep_folder, options, model=tuned, identity=identity)

    first = run("first")
    result = first.fit()
    assert run("third", start_from=result.adapter).fit().report.loss_before == result.report.loss_after
    second = run("second", start_from=result.adapter)
    reached = weights(first.model)
    start = weights(second.model)
    assert start.keys() == reached.keys()
    assert all(torch.equal(start[name], value) for name, value in reached.items())
    with torch.no_grad():
        assert torch.equal(second.model.eval()(IDS).logits, first.model.eval()(IDS).logits)
    # One step more of either is the same step.
    for model in (first.model, second.model):
        optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-2, foreach=False)
        optimizer.zero_grad()  # what the run's last step has left
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        optimizer.step()
    moved = weights(second.model)
    assert all(torch.equal(moved[name], value) for name, value in weights(first.model).items())
    assert any(not torch.equal(moved[name], value) for name, value in reached.items())


def test_a_resumed_run_has_to_start_from_the_same_adapter(model_folder: Path, tmp_path: Path) -> None:
    adapters = [
        trainer(model_folder, config(tmp_path / name, steps=2, seed=seed, schedule="constant")).fit().adapter
        for seed, name in enumerate(("one", "two"))
    ]

    def go_on(adapter: Path | None, **values: Any) -> Trainer:
        return trainer(
            model_folder, config(tmp_path / "run", steps=2, schedule="constant", start_from=adapter, **values)
        )

    go_on(adapters[0]).fit()
    for other in (adapters[1], None):
        with pytest.raises(CheckpointError, match=r"the adapter to go on from was '.*' and is now"):
            go_on(other, resume=True).fit()
    moved = tmp_path / "moved"
    shutil.copytree(adapters[0], moved)
    go_on(moved, resume=True).fit()


def test_an_adapter_of_another_method_is_not_gone_on_from(model_folder: Path, tmp_path: Path) -> None:
    adapter = trainer(model_folder, config(tmp_path / "first", steps=1)).fit().adapter

    def go_on(method: str, start_from: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(model_folder)
        build_peft(model, config(tmp_path, method=method, start_from=start_from), total_steps=10)

    with pytest.raises(ConfigError, match=r"made by method lora, not dora: give --method lora"):
        go_on("dora", adapter)
    planned = trainer(model_folder, config(tmp_path / "planned", method="adalora")).fit().adapter
    with pytest.raises(ConfigError, match=r"'adalora' cannot go on"):
        go_on("adalora", planned)
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    for folder, remedy in ((tmp_path, "a folder that"), (tmp_path / "run", str(tmp_path / "run" / "adapter"))):
        with pytest.raises(CheckpointError, match=rf"is not an adapter .*: give {remedy}"):
            go_on("lora", folder)


def test_dropout_of_a_bottleneck_is_the_runs(model_folder: Path, tmp_path: Path) -> None:
    adapter = trainer(model_folder, config(tmp_path, method="bottleneck", steps=1, dropout=0.3)).fit().adapter
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    model = build_peft(base, config(tmp_path, method="bottleneck", start_from=adapter, dropout=0.1))
    assert {module.dropout.p for module in model.modules() if isinstance(module, Bottleneck)} == {0.1}


def test_the_width_of_a_bottleneck_is_the_rank(model_folder: Path, tmp_path: Path) -> None:
    model = build_peft(
        AutoModelForCausalLM.from_pretrained(model_folder), config(tmp_path, method="bottleneck", rank=3)
    )
    assert {value.shape[0] for name, value in trained(model).items() if name.endswith("down.weight")} == {3}


def test_a_family_without_biases_has_no_bitfit(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"llama model have none: use method lora or bottleneck"):
        build_peft(AutoModelForCausalLM.from_config(tiny_config("llama")), config(tmp_path, method="bitfit"))


@pytest.mark.parametrize("method", ["lora", "bottleneck", "full"])
def test_bf16_computes_in_bf16_and_keeps_fp32(deep_folder: Path, tmp_path: Path, method: str) -> None:
    seen = set()

    def look(module: Any, inputs: Any, output: torch.Tensor) -> None:
        seen.add(output.dtype)

    reports = {}
    for precision in ("fp32", "bf16"):
        options = config(tmp_path / precision, method=method, steps=4, rank=2, precision=precision)
        model = build_peft(split_model(deep_folder), options, total_steps=4)
        if precision == "bf16":
            model.get_submodule(next(n for n, _ in model.named_modules() if n.endswith("mlp"))).register_forward_hook(
                look
            )
        run = trainer(deep_folder, options, model=model)
        reports[precision] = run.fit().report
        assert {value.dtype for value in weights(run.model).values()} == {torch.float32}
        stored = next((tmp_path / precision / "adapter").glob("*.safetensors"))
        assert {value.dtype for value in load_file(stored).values()} == {torch.float32}
    assert seen == {torch.bfloat16}
    for name in ("loss_before", "loss_after"):
        exact, low = (getattr(reports[precision], name) for precision in ("fp32", "bf16"))
        assert exact != low
        assert low == pytest.approx(exact, rel=0.02)
    options = config(tmp_path / "bf16", method=method, steps=4, rank=2, resume=True)
    again = trainer(deep_folder, options, model=build_peft(split_model(deep_folder), options, total_steps=4))
    with pytest.raises(CheckpointError, match="precision was 'bf16' and is now 'fp32'"):
        again.fit()


@pytest.mark.parametrize("family", [name for name in CONFIGS if "_" not in name or name == "gemma3_text"])
@pytest.mark.parametrize("method", [method for method in METHODS if method != "bitfit"])
def test_every_family_has_usual_targets_and_keeps_to_the_edges_layers(family: str, method: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(tiny_config(family))
    model.split_plan = SimpleNamespace(edge_layers=(0, 1, 5))
    found = trained(build_peft(model, config(tmp_path, method=method, rank=2), total_steps=10))
    assert named_layers(found) == (set() if method == "prompt" else {0, 1, 5})
