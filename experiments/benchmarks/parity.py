"""Parity: the split run equals the single-process run, bit for bit at fp32.

Three runs over the same batches with the same adapters: one process that holds the whole model; an edge that trains
against a cloud in other processes over sealed gRPC; and a control, the first with one weight of one cloud layer
changed a little, which the comparison has to notice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from isthmus.backbone.families import family_of
from isthmus.backbone.plan import SplitPlan
from isthmus.common.errors import ConfigError, DataError, IsthmusError
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
    difference, caught = _compare(split, whole), _compare(split, control)
    lora_b = [tensor for name, tensor in split.adapter.items() if "lora_B" in name]
    return {
        "bitwise_equal": difference.equal,
        "max_abs_loss_diff": difference.loss,
        "gradient_max_abs_diff": difference.gradient,
        "adapter_max_abs_diff": difference.adapter,
        "lora_b_max_abs": max(float(tensor.abs().max()) for tensor in lora_b),
        "loss_first": split.losses[0],
        "loss_last": split.losses[-1],
        "control_detected": not caught.equal,
        "control_gradient_max_abs_diff": caught.gradient,
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


@dataclass(frozen=True, slots=True)
class _Difference:
    equal: bool
    loss: float
    gradient: float
    adapter: float


def _compare(one: _Outcome, other: _Outcome) -> _Difference:
    if one.gradients.keys() != other.gradients.keys() or one.adapter.keys() != other.adapter.keys():
        raise IsthmusError("the two runs trained different parameters: nothing can be compared")
    losses = [abs(a - b) for a, b in zip(one.losses, other.losses, strict=True)]
    gradients = [_distance(one.gradients[name], other.gradients[name]) for name in one.gradients]
    adapters = [_distance(one.adapter[name], other.adapter[name]) for name in one.adapter]
    equal = one.losses == other.losses and all(
        torch.equal(mine[name], theirs[name])
        for mine, theirs in ((one.gradients, other.gradients), (one.adapter, other.adapter))
        for name in mine
    )
    return _Difference(equal, max(losses), max(gradients), max(adapters))


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


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


def train_config(settings: ParitySettings) -> TrainConfig:
    """The adapter and the data of a parity run, as the trainer has them."""
    return TrainConfig(
        cloud="-",
        data=settings.data,
        max_length=settings.seq,
        batch=settings.batch,
        learning_rate=settings.learning_rate,
        codec=settings.codec,
        method="lora",
    )


def batches_of(settings: ParitySettings, tokenizer: Any) -> Batches:
    """The run's batches: real tokens, padded on the right."""
    config = train_config(settings)
    examples, dropped = encode(read_examples(settings.data, config), tokenizer, settings.seq)
    if not examples:
        raise DataError(
            f"none of the {dropped} examples of {settings.data} has a label within {settings.seq} tokens: raise --seq"
        )
    return Batches(examples, settings.batch, tokenizer.pad_token_id or 0, seed=0)


def endless(batches: Batches) -> Iterator[dict[str, Tensor]]:
    """Batches of one epoch after another."""
    epoch = 0
    while True:
        yield from batches.epoch(epoch)
        epoch += 1


def train_steps(model: Any, batches: Iterator[dict[str, Tensor]], settings: ParitySettings) -> dict[str, Any]:
    """A plain training loop, the same for every mode. Returns losses, all gradients of all steps, and the adapter."""
    parameters = trained(model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=settings.learning_rate)
    losses, gradients, padded, ragged = [], {}, 0, 0
    model.train()
    for step in range(settings.steps):
        batch = next(batches)
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


def _main(parent: Parent) -> None:
    task = parent.task
    settings = ParitySettings(**task["settings"])
    torch.set_num_threads(settings.threads)
    if task["mode"] == "split":
        with connect(task["cloud"], key=task["key"], codec=settings.codec) as link:
            result = train_steps(
                build_peft(link.load_model(), train_config(settings)),
                endless(batches_of(settings, link.load_tokenizer())),
                settings,
            )
    else:
        model, tokenizer, plan = whole_model(settings.model, settings.edge_layers)
        if task["mode"] == "control":
            _perturb(model, plan)
        adapted = build_peft(model, train_config(settings), layers=plan.edge_layers)
        result = train_steps(adapted, endless(batches_of(settings, tokenizer)), settings)
    out = Path(task["out"])
    save_file(result.pop("gradients"), out / "gradients.safetensors")
    save_file(result.pop("adapter"), out / "adapter.safetensors")
    parent.say(result)


def _perturb(model: Any, plan: SplitPlan) -> None:
    layer = model.get_submodule(family_of(model.config).layers_path)[(plan.cloud.start + plan.cloud.stop) // 2]
    weight = next(parameter for parameter in layer.parameters() if parameter.ndim == 2)
    with torch.no_grad():
        weight[0, 0] += PERTURBATION


if __name__ == "__main__":
    serve(_main)
