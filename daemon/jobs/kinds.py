"""The kinds of jobs, their configurations, and what a worker is given."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from isthmus.common.files import write_atomic
from isthmus.edge.config.client_config import EvalConfig, GenerateConfig
from isthmus.edge.config.settings import Settings
from isthmus.edge.config.training_config import TrainConfig, TuneConfig

KINDS: Mapping[str, type[Settings]] = {
    "train": TrainConfig,
    "tune": TuneConfig,
    "evaluate": EvalConfig,
    "generate": GenerateConfig,
}
TRAINING = ("train", "tune")
"""Those that make an adapter."""
MODES: Mapping[str, str] = {"split": "train", "emulator": "tune"}
"""Where the middle layers of a training are: in the cloud, or, as an emulator, on this machine; and its kind."""
MODE_OF: Mapping[str, str] = {kind: mode for mode, kind in MODES.items()}
SPEC = "spec.json"
RUN = "run"
"""The folder of a training run, in a job's."""
PACKAGE = "package"
"""The folder of the package that a cloud offers, in a job's: it stays the same, whatever is offered meanwhile."""
LOSSES = "losses.jsonl"
"""Its log (`isthmus.edge.training.trainer.LOG_FILE`)."""
RESULTS: Mapping[str, tuple[str, str]] = {
    "train": ("step_metrics.csv", "fine-tune-results"),
    "tune": ("step_metrics.csv", "fine-tune-results"),
    "evaluate": ("evaluation.json", "fine-tune-results"),
    "generate": ("answers.jsonl", "batch_output"),
}
"""By kind: the result in a job's folder, and its purpose as a `StoredFile`."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a worker does; `spec.json` in the job's folder.

    Attributes:
        attempt: How often a process has begun the job, with this one.
        model: The name of the base model.
        config: The kind's configuration, as its fields that are not by default.
        adapter, prompts: Paths; None where there are none.
        models: The folder of the adapters that can be talked to.
        offers: Of a job that tunes on what a cloud offers: the fields of its `ClientConfig`, the package's name, or
            None for the only one, and the folder where it is kept for all jobs.
        fit: The fields of the `FitConfig` of the edge's own bridge, but for those of `offers`; None for no bridge.
    """

    job: str
    attempt: int
    kind: str
    model: str
    config: Mapping[str, Any]
    models: str
    adapter: str | None = None
    prompts: str | None = None
    offers: tuple[Mapping[str, Any], str | None, str] | None = None
    fit: Mapping[str, Any] | None = None

    def write(self, folder: Path) -> None:
        """Write it into the job's folder.

        Raises:
            DiskError: The disk is full or cannot be written.
        """
        write_atomic(folder / SPEC, json.dumps(asdict(self)).encode(), 0o600)

    @classmethod
    def read(cls, folder: Path) -> Work:
        """The inverse of `write`."""
        return cls(**json.loads((folder / SPEC).read_bytes()))
