"""The same training in one process: of the whole model, which the split run is compared with, or of an edge's parts."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from isthmus.backbone.checkpoints.sources import Checkpoint, load_tokenizer, resolve
from isthmus.backbone.families import family_of
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.split.edge_parts import load_edge_parts
from isthmus.common.errors import IsthmusError
from isthmus.common.torch_threads import use_threads
from isthmus.edge.config.data_config import Precision
from isthmus.edge.config.schedule import total_steps
from isthmus.edge.config.training_config import TrainConfig, load_config
from isthmus.edge.data.batches import load_data
from isthmus.edge.run_files.run_identity import ModelIdentity
from isthmus.edge.run_report import Report
from isthmus.edge.training.edge_steps import StepObserver
from isthmus.edge.training.methods import build_peft, trained
from isthmus.edge.training.precision import computing_in, hold_frozen_linears
from isthmus.edge.training.trainer import Trainer
from isthmus.experiments.harness.processes import Parent, run_task, serve


def train_in_one_process(
    model_name: str,
    edge_layers: str,
    config: TrainConfig,
    *,
    everywhere: bool = False,
    watchers: Sequence[StepObserver] = (),
) -> Report:
    """Run `edge train`'s trainer on the whole model.

    Args:
        edge_layers: The split plan. Adapters go to the layers that the edge would hold; a ladder stands beside those
            that the cloud would.
    """
    model, tokenizer, plan = whole_model(model_name, edge_layers)
    layers = range(plan.n_layers) if everywhere else plan.edge_layers
    return _train(model, model_name, tokenizer, config, watchers, layers=layers, beside=plan)


def train_parts_alone(
    model_name: str, edge_layers: str, config: TrainConfig, *, watchers: Sequence[StepObserver] = ()
) -> Report:
    """Run `edge train`'s trainer on an edge's parts, with nothing in the cloud's place: all that an edge must hold."""
    checkpoint = resolve(model_name)
    plan = SplitPlan.parse(edge_layers, checkpoint.config.num_hidden_layers)
    model = load_edge_parts(checkpoint, plan, _nothing_between)
    return _train(model, model_name, load_tokenizer(checkpoint.folder), config, watchers)


def _train(
    model: Any, name: str, tokenizer: Any, config: TrainConfig, watchers: Sequence[StepObserver], **where: Any
) -> Report:
    """Run the trainer; `where` says to `build_peft` which layers get adapters."""
    use_threads(config.threads)
    data = load_data(config, tokenizer)
    adapted = build_peft(model, config, total_steps=total_steps(config, len(data.train)), **where)
    hold_frozen_linears(adapted, config)
    checkpoint = resolve(name)
    identity = ModelIdentity(checkpoint.name, checkpoint.digest(), "whole")
    return Trainer(adapted, data, config, identity, step_observers=watchers).fit().report


def _nothing_between(hidden: Tensor, _mask: Tensor | None, _positions: Tensor | None) -> Tensor:
    return hidden


def train_whole(model_name: str, edge_layers: str, options: Mapping[str, Any], *, everywhere: bool = False) -> None:
    """Have `train_in_one_process` done in a process of its own, whose progress the user sees.

    Raises IsthmusError where it failed.
    """
    task = {"model": model_name, "edge_layers": edge_layers, "options": dict(options), "everywhere": everywhere}
    run_task("the single-process run", "isthmus.experiments.harness.single_process", task, shown=True)


def parity_of(split: Path, single: Path) -> dict[str, Any]:
    """Compare the adapters and the loss logs of two runs' folders."""
    one, other = (load_file(out / "adapter" / "adapter_model.safetensors") for out in (split, single))
    if one.keys() != other.keys():
        raise IsthmusError("the two adapters have different parameters: nothing can be compared")
    losses = [losses_of(out) for out in (split, single)]
    return {
        "bitwise_equal": losses[0] == losses[1] and all(torch.equal(one[name], other[name]) for name in one),
        "max_abs_loss_diff": max(abs(a - b) for a, b in zip(*losses, strict=True)),
        "adapter_max_abs_diff": max(float((one[name] - other[name]).abs().max()) for name in one),
    }


def losses_of(out: Path) -> list[float]:
    """The loss of each step of a run, by the log in its folder."""
    return [json.loads(line)["loss"] for line in (out / "losses.jsonl").read_text().splitlines()]


def random_batch(vocabulary: int, rows: int, seq: int) -> dict[str, Tensor]:
    """Random tokens `[rows, seq]`, all of which are labels, for steps whose cost alone is of interest."""
    tokens = torch.randint(vocabulary, (rows, seq), generator=torch.Generator().manual_seed(0))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}


def stepper(model: Any, batch: Mapping[str, Tensor], precision: Precision = "fp32") -> Callable[[], float]:
    """What makes an optimizer step on what is trainable, always on the same batch, and returns its seconds."""
    optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-5, foreach=False)
    model.train()

    def step() -> float:
        start = time.perf_counter()
        with computing_in(precision, model):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    return step


class StepWatch:
    """The methods of a `StepObserver` that looks at the beginnings of steps alone, but for `before_step`."""

    def after_step(self, step: int) -> None:
        """Nothing: what follows a step is a part of it."""

    def points(self) -> dict[str, float]:
        """No curves."""
        return {}

    def state(self) -> dict[str, Any]:
        """Nothing that a next step depends on."""
        return {}

    def load_state(self, state: Any) -> None:
        """There is nothing in it."""


def whole(checkpoint: Checkpoint) -> Any:
    """The whole model of a checkpoint in fp32, with the attention that the split one has, in eval mode."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    attention = family_of(checkpoint.config).attention(None)
    return AutoModelForCausalLM.from_pretrained(
        checkpoint.folder, dtype=torch.float32, attn_implementation=attention
    ).eval()


def whole_model(name: str, edge_layers: str) -> tuple[Any, Any, SplitPlan]:
    """The whole model in one process as the split one runs it, its tokenizer, and the plan.

    The layers that would be the cloud's stay in eval mode: GPT-2's and OPT's have a dropout of their own, which a
    frozen span does not apply.
    """
    checkpoint = resolve(name)
    plan = SplitPlan.parse(edge_layers, checkpoint.config.num_hidden_layers)
    model = whole(checkpoint)
    layers = model.get_submodule(family_of(checkpoint.config).layers_path)
    for index in plan.cloud:
        layers[index].eval()
        layers[index].train = partial(_stay, layers[index])  # model.train() reaches every layer through this
    return model, load_tokenizer(checkpoint.folder), plan


def _stay(layer: Any, mode: bool = True) -> Any:
    return layer


def _main(parent: Parent) -> None:
    task = parent.task
    options = load_config(None, {"cloud": "-", **task["options"]})
    train_in_one_process(task["model"], task["edge_layers"], options, everywhere=task["everywhere"])
    parent.say("trained")


if __name__ == "__main__":
    serve(_main)
