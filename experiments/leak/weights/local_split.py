"""An edge and the span that it would reach over the wire, in one process; or a package's emulator until it is tuned.

At fp32 a run here has the bits of the split run over a cloud, which a test compares.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from isthmus.backbone.checkpoints.sources import load_tokenizer, resolve
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.split.edge_parts import load_edge_parts
from isthmus.backbone.split.span import load_span
from isthmus.common.errors import ConfigError
from isthmus.common.progress import StepProgress
from isthmus.edge.config.schedule import total_steps
from isthmus.edge.config.training_config import TrainConfig, TuneConfig
from isthmus.edge.data.batches import Encoded, TrainingData, fingerprint, pad_id
from isthmus.edge.emulator_run import tune
from isthmus.edge.run_files.run_identity import ModelIdentity
from isthmus.edge.span_cache.cache_check import edge_model
from isthmus.edge.training.defended_run import defended_run
from isthmus.edge.training.methods import build_peft
from isthmus.edge.training.precision import hold_frozen_linears
from isthmus.edge.training.trainer import Trainer
from isthmus.emulator.package.package import open_package
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

    def train(self, texts: Sequence[Encoded], config: TrainConfig | TuneConfig) -> tuple[Any, Guarantee | None]:
        """Train on texts as `edge train` does, with the defences of `config`, whose `data` are not read.

        Returns:
            The edge's model with the adapter, in eval mode, and what the defences guarantee.

        Raises:
            IsthmusError: What a training run raises.
        """
        data = self._data(texts)
        if not isinstance(config, TrainConfig):
            raise TypeError("split training takes a TrainConfig")
        identity = ModelIdentity(self.checkpoint.name, self.checkpoint.digest(), str(self.plan))
        total = total_steps(config, len(texts))
        edge = self.edge()
        tuned = build_peft(edge, config, total_steps=total)
        hold_frozen_linears(tuned, config)
        progress = StepProgress("step", total, Console(stderr=True), every=config.log_every)
        with defended_run(edge, tuned, config, identity, data, self.tokenizer, progress.message) as defended:
            Trainer(tuned, data, config, identity, progress=progress, defended=defended).fit()
        return tuned.eval(), None if defended is None else defended.guarantee

    def _data(self, texts: Sequence[Encoded]) -> TrainingData:
        return TrainingData(texts, (), pad_id(self.tokenizer), 0, fingerprint(texts))


class LocalEmulator(LocalSplit):
    """The same, where adapters are tuned over a package's emulator and plugged into the model afterwards.

    Args:
        package: The folder of a package of the model, whose split is taken.

    Raises:
        ConfigError: It is of another model.
        PackageError: It is no package.
    """

    def __init__(self, model: str, package: Path) -> None:
        self._package = open_package(package)
        super().__init__(model, str(self._package.plan))
        if self._package.digest != self.checkpoint.digest():
            raise ConfigError(f"package {package} is of another model than {model}: give its own as --model")

    def train(self, texts: Sequence[Encoded], config: TrainConfig | TuneConfig) -> tuple[Any, Guarantee | None]:
        """Tune on texts as `emulator tune` does; see `LocalSplit.train`. The model has its own layers in the middle."""
        if not isinstance(config, TuneConfig):
            raise TypeError("tuning on a package takes a TuneConfig")
        tuned, report = tune(self._package, self._data(texts), config, self.tokenizer)
        edge_model(tuned).remote_layers.span = self.span
        promised = None if report.guarantee is None else Guarantee(report.epsilon, report.delta, report.guarantee)
        return tuned.eval(), promised
