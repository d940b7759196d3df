"""Every method trains, resumes bit for bit, saves what loads into the whole model, and keeps to the edge's layers."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models.small_training import Wire, config, data, trainer, weights
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
from isthmus.edge.training.evaluation import evaluate
from isthmus.edge.training.methods import build_peft, trained
from isthmus.edge.training.run_identity import ModelIdentity
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
    with pytest.raises(CheckpointError, match="is not an adapter"):
        go_on("lora", tmp_path)


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


def named_layers(names: Iterable[str]) -> set[int]:
    return {int(match[1]) for name in names if (match := re.search(r"\.(?:layers|h)\.(\d+)\.", name))}


@pytest.mark.parametrize(
    ("sites", "layers"),
    [("none", {0, 4, 5}), ("all", {0, 1, 2, 3, 4, 5}), ("2", {0, 2, 4, 5}), ([1, 3], {0, 1, 3, 4, 5})],
)
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("method", ["lora", "vera", "adalora", "ia3"])
def test_sites_are_layers_of_the_cloud_that_get_adapters_too(
    tmp_path: Path, family: str, method: str, sites: Any, layers: set[int]
) -> None:
    model = AutoModelForCausalLM.from_config(tiny_config(family))
    every = {name for name, _ in model.named_modules()}
    model.split_plan = SplitPlan.parse("1:2", 6)
    tuned = build_peft(model, config(tmp_path, method=method, rank=2, sites=sites), total_steps=10)
    assert named_layers(trained(tuned)) == layers
    targets = tuned.active_peft_config.target_modules
    assert targets <= every
    assert named_layers(targets) == layers
    assert getattr(tuned.active_peft_config, "layers_to_transform", None) is None


def test_sites_change_nothing_of_the_edges_own_adapters(tmp_path: Path) -> None:
    found = []
    for sites in ("none", "all"):
        model = AutoModelForCausalLM.from_config(tiny_config("llama"))
        model.split_plan = SplitPlan.parse("1:2", 6)
        tuned = build_peft(model, config(tmp_path, sites=sites))
        found.append({name: value.shape for name, value in weights(tuned).items()})
    assert found[0].items() < found[1].items()


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ("all", "sites = all: this model has no sites in the cloud's layers"),
        ("2,3", "sites = 2,3: this model has no sites in the cloud's layers"),
        ("0,2", r"sites = 0,2: layer 0 is not the cloud's, which holds layers 1 to 3"),
        ("3-7", r"sites = 3,4,5,6,7: layer 4 is not the cloud's"),
    ],
)
def test_layers_without_sites(tmp_path: Path, sites: str, message: str) -> None:
    model = hollow(SplitPlan.parse("1:2", 6))
    with pytest.raises(ConfigError, match=message):
        build_peft(model, config(tmp_path, sites=sites))


def test_a_whole_model_has_no_cloud(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the cloud holds no layer of this model"):
        build_peft(AutoModelForCausalLM.from_config(tiny_config("llama")), config(tmp_path, sites="all"))


def hollow(plan: SplitPlan) -> Any:
    """A model whose cloud layers have no modules."""
    model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    for index in plan.cloud:
        model.model.layers[index] = torch.nn.Identity()
    model.split_plan = plan
    return model


@pytest.mark.parametrize("method", ["lora", "vera", "adalora", "ia3"])
def test_a_saved_adapter_names_its_modules_in_full(tmp_path: Path, method: str) -> None:
    """Of twenty names and more, PEFT would keep what tells them apart in this model: `q_proj`, for all of the whole."""
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]
    if method == "vera":  # one shape only
        modules = ["q_proj", "o_proj"]
    plan = SplitPlan.parse("4:1" if method != "vera" else "9:1", 11)
    base = AutoModelForCausalLM.from_config(tiny_config("llama", num_hidden_layers=11))
    edge = copy.deepcopy(base)
    for index in plan.cloud:
        edge.model.layers[index] = torch.nn.Identity()
    edge.split_plan = plan
    tuned = build_peft(edge, config(tmp_path, method=method, rank=2, target_modules=modules), total_steps=10)
    save_adapter(tuned, tmp_path / "adapter")
    named = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_modules"]
    assert len(named) == len(modules) * len(plan.edge_layers) >= 20
    assert all(re.fullmatch(r"model\.layers\.\d+\.(self_attn|mlp)\.\w+", name) for name in named)
    loaded = load_adapter(base, tmp_path / "adapter", trainable=method != "adalora")
    prefix = "lora_" if method in {"lora", "adalora"} else f"{method}_"
    adapted = {name for name, _ in loaded.named_parameters() if f".{prefix}" in name}
    assert named_layers(adapted) == set(plan.edge_layers)


def test_a_whole_model_can_be_given_the_same_layers(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    found = trained(build_peft(model, config(tmp_path), layers=[0, 5]))
    assert {name.split(".layers.")[1][0] for name in found} == {"0", "5"}


def test_the_seed_decides_the_start(tmp_path: Path) -> None:
    def start(seed: int) -> list[torch.Tensor]:
        model = AutoModelForCausalLM.from_config(tiny_config("llama"))
        return [
            value for name, value in weights(build_peft(model, config(tmp_path, seed=seed))).items() if "lora_A" in name
        ]

    assert all(map(torch.equal, start(1), start(1)))
    assert not any(map(torch.equal, start(1), start(2)))


@pytest.mark.parametrize("method", ["lora", "ia3", "vera", "adalora"])
def test_modules_that_the_edge_does_not_have(tmp_path: Path, method: str) -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    with pytest.raises(ConfigError, match=r"nonsense"):
        build_peft(model, config(tmp_path, method=method, target_modules=["nonsense"]), total_steps=10)


def test_an_edge_without_layers(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    model.split_plan = SimpleNamespace(edge_layers=())
    with pytest.raises(ConfigError, match="the edge holds none"):
        build_peft(model, config(tmp_path))
    assert trained(build_peft(model, config(tmp_path, method="prompt")))


def test_adalora_needs_the_number_of_steps(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    with pytest.raises(ConfigError, match="--steps"):
        build_peft(model, config(tmp_path, method="adalora", steps=None))
