"""The same training in one process: of the whole model, which the split run is compared with, or of an edge's parts.

python -m isthmus.experiments.harness.single_process MODEL EDGE_LAYERS '{"data": …, "out": …, …}' [everywhere]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from isthmus.backbone.checkpoints.sources import load_tokenizer, resolve
from isthmus.backbone.families import family_of
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.split.edge_parts import load_edge_parts
from isthmus.common.shutdown import run_to_end
from isthmus.common.torch_threads import use_threads
from isthmus.edge.config.schedule import total_steps
from isthmus.edge.config.training_config import TrainConfig, load_config
from isthmus.edge.data.batches import load_data
from isthmus.edge.run_report import Report
from isthmus.edge.training.edge_steps import StepObserver
from isthmus.edge.training.methods import build_peft
from isthmus.edge.training.precision import hold_frozen_linears
from isthmus.edge.training.run_identity import ModelIdentity
from isthmus.edge.training.trainer import Trainer


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
        model_name: As for `--model`.
        edge_layers: The split plan. Adapters go to the layers that the edge would hold; a ladder stands beside those
            that the cloud would.
        config: The run's options, without those of sites.
        everywhere: Put adapters on all layers.
        watchers: Called around every step.
    """
    use_threads(config.threads)
    checkpoint = resolve(model_name)
    model, tokenizer, plan = whole_model(model_name, edge_layers)
    data = load_data(config, tokenizer)
    layers = range(plan.n_layers) if everywhere else plan.edge_layers
    adapted = build_peft(model, config, total_steps=total_steps(config, len(data.train)), layers=layers, beside=plan)
    hold_frozen_linears(adapted, config)
    identity = ModelIdentity(checkpoint.name, checkpoint.digest(), "whole")
    return Trainer(adapted, data, config, identity, step_observers=watchers).fit().report


def train_parts_alone(
    model_name: str, edge_layers: str, config: TrainConfig, *, watchers: Sequence[StepObserver] = ()
) -> Report:
    """Run `edge train`'s trainer on an edge's parts, with nothing in the cloud's place: all that an edge must hold.

    Args:
        model_name: As for `--model`.
        edge_layers: The split plan.
        config: The run's options, without those of sites.
        watchers: Called around every step.
    """
    use_threads(config.threads)
    checkpoint = resolve(model_name)
    plan = SplitPlan.parse(edge_layers, checkpoint.config.num_hidden_layers)
    model = load_edge_parts(checkpoint, plan, _nothing_between)
    data = load_data(config, load_tokenizer(checkpoint.folder))
    adapted = build_peft(model, config, total_steps=total_steps(config, len(data.train)))
    hold_frozen_linears(adapted, config)
    identity = ModelIdentity(checkpoint.name, checkpoint.digest(), "parts")
    return Trainer(adapted, data, config, identity, step_observers=watchers).fit().report


def _nothing_between(hidden: Tensor, _mask: Tensor | None, _positions: Tensor | None) -> Tensor:
    return hidden


def _process() -> None:
    options = load_config(None, {"cloud": "-", **json.loads(sys.argv[3])})
    train_in_one_process(sys.argv[1], sys.argv[2], options, everywhere="everywhere" in sys.argv[4:])


if __name__ == "__main__":
    run_to_end(_process)


def whole_model(name: str, edge_layers: str) -> tuple[Any, Any, SplitPlan]:
    """The whole model in one process as the split one runs it, its tokenizer, and the plan.

    The attention implementation is the same, and the layers that would be the cloud's stay in eval mode: GPT-2's and
    OPT's have a dropout of their own, which a frozen span does not apply.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    checkpoint = resolve(name)
    family = family_of(checkpoint.config)
    plan = SplitPlan.parse(edge_layers, checkpoint.config.num_hidden_layers)
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint.folder, dtype=torch.float32, attn_implementation=family.attention(None)
    )
    layers = model.get_submodule(family.layers_path)
    for index in plan.cloud:
        layers[index].eval()
        layers[index].train = partial(_stay, layers[index])  # model.train() reaches every layer through this
    return model, load_tokenizer(checkpoint.folder), plan


def _stay(layer: Any, mode: bool = True) -> Any:
    return layer
