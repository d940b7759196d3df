"""The same training in one process: of the whole model, which the split run is compared with, or of an edge's parts.

python -m isthmus.experiments.single MODEL EDGE_LAYERS '{"data": …, "out": …, …}' [everywhere]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from torch import Tensor

from isthmus.backbone.ending import run_to_end
from isthmus.backbone.parts import load_edge_parts
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.sources import load_tokenizer, resolve
from isthmus.backbone.threads import use_threads
from isthmus.edge.checkpoint import ModelIdentity
from isthmus.edge.config import TrainConfig, load_config
from isthmus.edge.data import load_data
from isthmus.edge.methods import build_peft
from isthmus.edge.precision import hold_frozen_linears
from isthmus.edge.report import Report
from isthmus.edge.schedule import total_steps
from isthmus.edge.trainer import StepObserver, Trainer
from isthmus.experiments.parity import whole_model


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
