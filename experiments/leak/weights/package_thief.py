"""The thief of an emulator's package, from the table of emulators: what its owner gives away with it.

The thief keeps the package and trains all of it on the data owner's task for as many steps as the data owner tunes the
edge's layers on it, who then plugs what was learned into the real middle.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from isthmus.common.errors import ConfigError
from isthmus.experiments.harness.emulator_settings import TableSettings
from isthmus.experiments.offsite.table import run_table


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageThiefSettings:
    """The package, and what both do with it; see `TableSettings` for what is not said here.

    Attributes:
        model, adapter_layers: The model, and the layers that a package holds as they are.
        task, data_folder: What both train on.
        method, keep: The emulator's recipe, and the share of the middle's layers that it keeps.
        steps, batch: Of every training run.
        edge_rate, whole_rate: Learning rates of the data owner, who trains the edge's layers, and of the thief.
        validation, test: Documents that the thief chooses by, and held-out ones.
        precision: What training and scoring compute in.
        threads: Threads of torch; None for torch's choice.
    """

    model: str = "smollm2-135m"
    adapter_layers: str = "2:2"
    task: str = "e2e"
    data_folder: Path | None = None
    method: str = "importance"
    keep: float = 0.5
    text: Path | None = None
    steps: int = 30
    batch: int = 8
    edge_rate: float = 3e-4
    whole_rate: float = 1e-4
    validation: int = 64
    test: int = 100
    precision: str = "bf16"
    threads: int | None = None


@dataclass(frozen=True, slots=True)
class PackageThiefResult:
    """Held-out losses, nats a token, and shares of what the edge's layers gain over the real middle.

    Attributes:
        loss: Of the full model as it is.
        emulator_loss: Of the package as it is.
        reference_loss: Of the edge's layers tuned over the real middle.
        plug_in_loss: Of the same tuned over the emulator and plugged into the real middle.
        thief_loss: Of the thief's model.
        plug_in_recovery, thief_recovery: Shares of the gain from `loss` to `reference_loss`; None where that gain is
            not above two standard errors.
        share_given_away: Parameters of the emulator over those of the middle.
    """

    loss: float
    emulator_loss: float
    reference_loss: float
    plug_in_loss: float
    thief_loss: float
    plug_in_recovery: float | None
    thief_recovery: float | None
    share_given_away: float


def measure_package_thief(settings: PackageThiefSettings, folder: Path) -> PackageThiefResult:
    """Make the table's row, or go on with it.

    Args:
        folder: For emulators and finished runs, which are taken from there when they are there already.

    Raises:
        ConfigError: A setting makes no sense.
        DataError: The data are missing.
    """
    if "," in settings.method + settings.task:
        raise ConfigError(f"method = {settings.method!r} and task = {settings.task!r} name several: name one of each")
    table = run_table(
        TableSettings(
            model=settings.model,
            tasks=settings.task,
            methods=settings.method,
            keep=f"{settings.keep:g}",
            adapter_layers=settings.adapter_layers,
            seeds=1,
            steps=settings.steps,
            batch=settings.batch,
            learning_rates=f"{settings.edge_rate:g}",
            whole_rates=f"{settings.whole_rate:g}",
            text=settings.text,
            precision=settings.precision,
            score_precision=settings.precision,
            validation=settings.validation,
            test=settings.test,
            data_folder=settings.data_folder,
            device="cpu",
            threads=settings.threads,
            whole_runs=False,
            out=folder,
        )
    )
    (row,) = (row for row in table["runs"] if row["metric"] == "completion_loss")
    return PackageThiefResult(
        loss=row["full_zero_shot"],
        emulator_loss=row["emulator_zero_shot"],
        reference_loss=row["edge_layers_full_middle"],
        plug_in_loss=row["plug_in"],
        thief_loss=row["thief"],
        plug_in_recovery=row["plug_in_recovery"],
        thief_recovery=row["thief_recovery"],
        share_given_away=row["share_given_away"],
    )
