"""Parity: the split run equals the single-process run, bit for bit at fp32.

Three runs over the same batches with the same adapters: one process that holds the whole model; an edge that trains
against a cloud in other processes over sealed gRPC; and a control, the first with one weight of one cloud layer
changed a little, which the comparison has to notice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from isthmus.backbone.families import family_of
from isthmus.backbone.plan import SplitPlan
from isthmus.common.errors import ConfigError, DataError, IsthmusError
from isthmus.common.torch_threads import set_torch_threads
from isthmus.edge.client.link import connect
from isthmus.edge.config.training_config import TrainConfig
from isthmus.edge.data.batches import Batches, encode
from isthmus.edge.data.readers import read_examples
from isthmus.edge.training.methods import build_peft, trained
from isthmus.experiments.harness.bench_settings import ParitySettings
from isthmus.experiments.harness.launch import LocalCloud
from isthmus.experiments.harness.processes import Parent, run_task, serve
from isthmus.experiments.harness.prose import write_prose
from isthmus.experiments.harness.single_process import whole_model

PERTURBATION = 1e-2  # added to one weight for the control


def run_parity(settings: ParitySettings, folder: Path) -> dict[str, Any]:
    """Run the three runs and compare them; see the module."""
    if not settings.data:
        path = folder / "prose.jsonl"
        write_prose(path, settings.batch)
        settings = replace(settings, data=str(path))
    with LocalCloud(
        folder,
        settings.model,
        *("--edge-layers", settings.edge_layers, "--dtype", settings.dtype),
        *("--threads", str(settings.threads), "--pipeline", str(settings.pipeline)),
    ) as cloud:
        split = _run("split", settings, folder, cloud)
    whole = _run("whole", settings, folder)
    control = _run("control", settings, folder)
    return {
        "bitwise_equal": _equal(split, whole),
        "max_abs_loss_diff": max(abs(a - b) for a, b in zip(split.losses, whole.losses, strict=True)),
        "gradient_max_abs_diff": _distance(split.gradients, whole.gradients),
        "adapter_max_abs_diff": _distance(split.adapter, whole.adapter),
        "lora_b_max_abs": max(float(each.abs().max()) for name, each in split.adapter.items() if "lora_B" in name),
        "loss_first": split.losses[0],
        "loss_last": split.losses[-1],
        "control_detected": not _equal(split, control),
        "control_gradient_max_abs_diff": _distance(split.gradients, control.gradients),
        "tokens_padded": split.padded,
        "ragged_batch": split.ragged,
        **asdict(settings),
    }


@dataclass(frozen=True, slots=True)
class _Outcome:
    losses: list[float]
    gradients: dict[str, Tensor]  # "step/name"
    adapter: dict[str, Tensor]
    padded: int
    ragged: int


def _equal(one: _Outcome, other: _Outcome) -> bool:
    pairs = ((one.gradients, other.gradients), (one.adapter, other.adapter))
    if any(mine.keys() != theirs.keys() for mine, theirs in pairs):
        raise IsthmusError("the two runs trained different parameters: nothing can be compared")
    return one.losses == other.losses and all(
        torch.equal(mine[name], theirs[name]) for mine, theirs in pairs for name in mine
    )


def _distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def _run(mode: str, settings: ParitySettings, folder: Path, cloud: LocalCloud | None = None) -> _Outcome:
    """Run one of the three in a process of its own."""
    out = folder / mode
    out.mkdir()
    task = {
        "mode": mode,
        "settings": asdict(settings),
        "out": str(out),
        "cloud": None if cloud is None else cloud.connection,
        "key": None if cloud is None else str(cloud.edge_key),
    }
    summary = run_task(f"the {mode} run", "isthmus.experiments.benchmarks.parity", task)
    return _Outcome(
        gradients=load_file(out / "gradients.safetensors"), adapter=load_file(out / "adapter.safetensors"), **summary
    )


# Inside one of the processes ------------------------------------------------------------------------------------------


def _main(parent: Parent) -> None:
    task = parent.task
    settings = ParitySettings(**task["settings"])
    set_torch_threads(settings.threads)
    config = TrainConfig(
        cloud="-",
        data=settings.data,
        max_length=settings.seq,
        batch=settings.batch,
        learning_rate=settings.learning_rate,
        codec=settings.codec,
        method="lora",
    )
    if task["mode"] == "split":
        with connect(task["cloud"], key=task["key"], codec=settings.codec) as link:
            result = _train(build_peft(link.load_model(), config), link.load_tokenizer(), config, settings)
    else:
        model, tokenizer, plan = whole_model(settings.model, settings.edge_layers)
        if task["mode"] == "control":
            _perturb(model, plan)
        result = _train(build_peft(model, config, layers=plan.edge_layers), tokenizer, config, settings)
    out = Path(task["out"])
    save_file(result.pop("gradients"), out / "gradients.safetensors")
    save_file(result.pop("adapter"), out / "adapter.safetensors")
    parent.say(result)


def _train(model: Any, tokenizer: Any, config: TrainConfig, settings: ParitySettings) -> dict[str, Any]:
    """A plain training loop over real tokens, padded on the right: the fields of `_Outcome`."""
    examples, dropped = encode(read_examples(settings.data, config), tokenizer, settings.seq)
    if not examples:
        raise DataError(
            f"none of the {dropped} examples of {settings.data} has a label within {settings.seq} tokens: raise --seq"
        )
    batches = Batches(examples, settings.batch, tokenizer.pad_token_id or 0, seed=0)
    endless = (batch for epoch in count() for batch in batches.epoch(epoch))
    parameters = trained(model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=settings.learning_rate)
    losses, gradients, padded, ragged = [], {}, 0, 0
    model.train()
    for step, batch in zip(range(settings.steps), endless, strict=False):
        padded += int((batch["attention_mask"] == 0).sum())
        ragged += int(len(batch["input_ids"]) < settings.batch)
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        for name, parameter in parameters.items():
            if parameter.grad is None:
                raise ConfigError(f"{name} got no gradient: the plan {settings.edge_layers} leaves nothing to train")
            gradients[f"{step}/{name}"] = parameter.grad.clone()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    adapter = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    return {"losses": losses, "padded": padded, "ragged": ragged, "gradients": gradients, "adapter": adapter}


def _perturb(model: Any, plan: SplitPlan) -> None:
    layer = model.get_submodule(family_of(model.config).layers_path)[(plan.cloud.start + plan.cloud.stop) // 2]
    weight = next(parameter for parameter in layer.parameters() if parameter.ndim == 2)
    with torch.no_grad():
        weight[0, 0] += PERTURBATION


if __name__ == "__main__":
    serve(_main)
