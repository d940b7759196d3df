"""The same training in one process that holds the whole model: the baseline that the split run is compared with.

python -m isthmus.experiments.single MODEL EDGE_LAYERS '{"data": …, "out": …, …}'
"""

from __future__ import annotations

import json
import sys

import torch

from isthmus.backbone.sources import resolve
from isthmus.edge.checkpoint import ModelIdentity
from isthmus.edge.config import TrainConfig, load_config
from isthmus.edge.data import load_data
from isthmus.edge.methods import build_peft
from isthmus.edge.report import Report
from isthmus.edge.schedule import total_steps
from isthmus.edge.trainer import Trainer
from isthmus.experiments.parity import whole_model


def train_in_one_process(model_name: str, edge_layers: str, config: TrainConfig) -> Report:
    """Run `edge train`'s trainer on the whole model, with adapters on the layers that the edge would hold."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    checkpoint = resolve(model_name)
    model, tokenizer, plan = whole_model(model_name, edge_layers)
    data = load_data(config, tokenizer)
    adapted = build_peft(model, config, total_steps=total_steps(config, len(data.train)), layers=plan.edge_layers)
    identity = ModelIdentity(checkpoint.name, checkpoint.digest(), "whole")
    return Trainer(adapted, data, config, identity).fit().report


if __name__ == "__main__":
    train_in_one_process(sys.argv[1], sys.argv[2], load_config(None, {"cloud": "-", **json.loads(sys.argv[3])}))
