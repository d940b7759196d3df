"""A small training run on a split model whose span is in this process, with a draft that is tuned beside it.

Run as a program it is the edge that gets killed: `python draft_run.py MODEL OUT MOMENT STEP NAME=VALUE …`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from support.models.small_training import Wire, config, data, kill, trainer

from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.split.edge_parts import load_edge_parts
from isthmus.backbone.split.span import load_span
from isthmus.edge.config.schedule import total_steps
from isthmus.edge.config.training_config import TrainConfig
from isthmus.edge.training.draft_tuning import DraftTuning, draft_tuning
from isthmus.edge.training.methods import build_peft
from isthmus.edge.training.precision import hold_frozen_linears
from isthmus.edge.training.trainer import Trainer

PLAN = "1:1"


def split_model(folder: Path) -> Any:
    """The edge's model over the real layers."""
    plan = SplitPlan.parse(PLAN, Checkpoint(folder, "tiny").config.num_hidden_layers)
    return load_edge_parts(folder, plan, load_span(folder, plan))


def draft_run(folder: Path, options: TrainConfig, wire: Wire | None = None) -> tuple[Trainer, DraftTuning | None]:
    """A run from scratch, and the draft that its options ask for."""
    base, examples = split_model(folder), data()
    model = build_peft(base, options, total_steps=total_steps(options, len(examples.train)))
    hold_frozen_linears(model, options)
    draft = draft_tuning(base, options, None)
    return trainer(folder, options, wire, model=model, data=examples, draft=draft), draft


def main(arguments: list[str]) -> None:
    """See the top of the file."""
    folder, out, moment, step, *rest = arguments
    options = config(Path(out), **dict(item.split("=") for item in rest))
    draft_run(Path(folder), options, Wire(moment, int(step), kill))[0].fit()


if __name__ == "__main__":
    main(sys.argv[1:])
