"""The settings of defences, and with which others they do not go together."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, field_validator

from isthmus.edge.config.settings import Settings
from isthmus.privacy.defences.defence_options import (
    DEFENCES,
    DefenceOptions,
    DpSgd,
    LearnedNoise,
    Mixing,
    Smoothing,
    check_together,
    read_defence,
)

if TYPE_CHECKING:
    from isthmus.edge.config.training_config import TrainConfig, TuneConfig, TuningConfig

KEY_FILE = "defence-key"
"""Inside the run's folder."""


class DefenceConfig(Settings):
    """What changes what is sent, so that a cloud can learn less of the texts."""

    panel = "Privacy"

    defence: tuple[str, ...] = Field(
        (),
        description="NAME[:PARAMETER=VALUE,…], once for each defence, in the order in which they act: "
        f"{', '.join(DEFENCES)}. None is known to hide the text from a cloud that attacks and leave the training "
        "useful; rotation and quantization are there to show that they protect nothing. All but decoys change the "
        "adapter.",
    )
    defence_key: Path | None = Field(
        None,
        description="File with the secret from which defences draw, 64 hexadecimal digits; the same key gives the same "
        f"run where the cloud gives the same answers. By default OUT/{KEY_FILE}, which is made when it is missing.",
    )

    @field_validator("defence", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @field_validator("defence")
    @classmethod
    def _check_defences(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        check_together([read_defence(text) for text in value])
        return value

    def defences(self) -> list[DefenceOptions]:
        """The options of each defence, in their order."""
        return [read_defence(text) for text in self.defence]


def check_defended(config: TrainConfig) -> None:
    """Refuse what makes no sense with a run's defences.

    Raises:
        ValueError: Something does not; the message names both.
    """
    defences = config.defences()
    if not defences:
        return
    name = defences[0].name
    if config.sites != "none":
        raise ValueError(f"sites send what no defence sees, and defence is {name}: give sites = none")
    if config.method in ("prompt", "ladder"):
        raise ValueError(
            f"method {config.method} sends or reads what no defence sees, and defence is {name}: use another method"
        )
    if config.overlap > 1:
        raise ValueError(
            f"overlap = {config.overlap} makes calls in an order that differs between runs, and defence {name} draws "
            "for each call in turn: give overlap = 1"
        )
    if config.codec.strip().startswith("auto"):
        raise ValueError(f"codec = {config.codec!r} sends probes besides, and defence is {name}: name a codec")
    for each in defences:
        _check_one(config, each)


def check_alone(config: TuneConfig) -> None:
    """Refuse defences that have nothing to do where nothing is sent.

    Raises:
        ValueError: One has not; the message names it.
    """
    for each in config.defences():
        if not isinstance(each, DpSgd):
            raise ValueError(
                f"defence {each.name} changes what is sent, and tuning on a package sends nothing: leave it out, or "
                "give dp-sgd, which bounds what the adapter tells"
            )
        _check_gradients(config, each)
        if config.start_from is not None:
            raise ValueError(
                f"defence {each.name} bounds what this run's adapter tells, and not what one to start from has learned "
                "before: leave out --start-from"
            )


def _check_gradients(config: TuningConfig, each: DefenceOptions) -> None:
    if config.optimizer == "mezo" and isinstance(each, DpSgd | Smoothing | Mixing | LearnedNoise):
        raise ValueError(f"defence {each.name} acts on gradients, and optimizer mezo has none: use another")


def _check_one(config: TrainConfig, each: DefenceOptions) -> None:
    if config.span_cache_mib is not None and not isinstance(each, DpSgd | Smoothing):
        raise ValueError(
            f"span_cache_mib = {config.span_cache_mib} gives again what was sent before, and defence {each.name} "
            "changes what is sent: leave one of them out"
        )
    _check_gradients(config, each)
    if each.trained and config.optimizer not in ("adamw", "mezo"):
        raise ValueError(
            f"defence {each.name} is trained beside the adapter, and optimizer {config.optimizer} moves LoRA alone: "
            "use adamw"
        )
    if isinstance(each, DpSgd) and config.draft_package is not None:
        raise ValueError(f"draft = {config.draft!r} learns from examples without dp-sgd's noise: give draft = none")
    if isinstance(each, Mixing) and config.batch < 2:
        raise ValueError(f"defence mixing takes two examples of a micro-batch, and batch is {config.batch}: raise it")
