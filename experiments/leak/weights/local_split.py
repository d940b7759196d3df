"""An edge and the span that it would reach over the wire, in one process.

At fp32 a run here has the bits of the split run over a cloud, which a test compares.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from isthmus.backbone.checkpoints.sources import load_tokenizer, resolve
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.split.edge_parts import load_edge_parts
from isthmus.backbone.split.span import load_span
from isthmus.common.progress import StepProgress
from isthmus.edge.config.schedule import total_steps
from isthmus.edge.config.training_config import TrainConfig
from isthmus.edge.data.batches import Encoded, TrainingData, fingerprint, pad_id
from isthmus.edge.run_files.run_identity import ModelIdentity
from isthmus.edge.training.defended_run import defended_run
from isthmus.edge.training.methods import build_peft
from isthmus.edge.training.precision import hold_frozen_linears
from isthmus.edge.training.trainer import Trainer
from isthmus.privacy.defences.accountant import Guarantee


class LocalSplit:
    """A model that is cut and not taken apart.

    Args:
        model: As `--model`.
        edge_layers: The split plan.
    """

    def __init__(self, model: str, edge_layers: str) -> None:
        self.checkpoint = resolve(model)
        self.plan = SplitPlan.parse(edge_layers, self.checkpoint.config.num_hidden_layers)
        self.tokenizer = load_tokenizer(self.checkpoint.folder)
        self.span = load_span(self.checkpoint, self.plan)

    def edge(self) -> Any:
        """A fresh edge's model over the span, in eval mode."""
        return load_edge_parts(self.checkpoint, self.plan, self.span)

    def train(self, texts: Sequence[Encoded], config: TrainConfig) -> tuple[Any, Guarantee | None]:
        """Train on texts as `edge train` does, with the defences of `config`, whose `data` are not read.

        Returns:
            The edge's model with the adapter, in eval mode, and what the defences guarantee.

        Raises:
            IsthmusError: What a training run raises.
        """
        data = TrainingData(texts, (), pad_id(self.tokenizer), 0, fingerprint(texts))
        identity = ModelIdentity(self.checkpoint.name, self.checkpoint.digest(), str(self.plan))
        total = total_steps(config, len(texts))
        edge = self.edge()
        tuned = build_peft(edge, config, total_steps=total)
        hold_frozen_linears(tuned, config)
        progress = StepProgress("step", total, Console(stderr=True), every=config.log_every)
        with defended_run(edge, tuned, config, identity, data, self.tokenizer, progress.message) as defended:
            Trainer(tuned, data, config, identity, progress=progress, defended=defended).fit()
        return tuned.eval(), None if defended is None else defended.guarantee
