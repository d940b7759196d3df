"""The settings of the leak budget, and with which others they do not go together."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Self

from pydantic import Field, field_validator, model_validator

from isthmus.edge.config.settings import MOST_FACTOR, MOST_STEPS, MOST_TEXTS, Settings
from isthmus.privacy.ledger.mode_leaks import read_limits

if TYPE_CHECKING:
    from isthmus.edge.config.training_config import TrainConfig


class BudgetConfig(Settings):
    """How much of the private texts a cloud may learn, by attacks that the edge runs on itself."""

    panel = "Privacy"

    leak_budget: tuple[str, ...] = Field(
        (),
        description="tokens<=X, labels<=X, or both with a comma: the largest share (0 to 1) of these that attacks may "
        "recover of the texts that are sent. Measured on a sample before anything private is sent, and not guaranteed.",
    )
    secrets: Path | None = Field(
        None,
        description="File with a string in each line that no attack may recover. The texts that hold them are always "
        "in the sample.",
    )
    public: str | None = Field(
        None,
        description="Public texts in the form of the data, which the attacker learns from. Where the run sends "
        "gradients, some of them are sent through the cloud, and it cannot do without. By default the attacker learns "
        "from private texts outside the sample, which stay here.",
    )
    leak_sample: int = Field(
        16,
        ge=2,
        le=MOST_TEXTS,
        description="Private texts that are attacked. What is limited is an upper bound: 3 / n where attacks recover "
        "little or nothing of n texts, so a small budget needs more of them.",
    )
    leak_change: float = Field(
        0.1,
        gt=0,
        le=MOST_FACTOR,
        description="Relative change of the sample's hidden states at the cut, of trained noise on them, or of what "
        "the last layers predict where gradients go up, after which a run attacks again: 0.1 is a tenth.",
    )
    leak_every: int | None = Field(
        None,
        ge=1,
        le=MOST_STEPS,
        description="Steps after which a run attacks again in any case; by default it goes by change alone.",
    )

    @field_validator("leak_budget", mode="before")
    @classmethod
    def _one_or_several_limits(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @field_validator("leak_budget")
    @classmethod
    def _check_limits(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        read_limits(value)
        return value

    @model_validator(mode="after")
    def _check_public(self) -> Self:
        if self.public is not None and not self.budgeted:
            raise ValueError(
                f"public = {self.public!r} is for the attacks of a leak budget, and there is none: give leak_budget or "
                "secrets"
            )
        return self

    @property
    def budgeted(self) -> bool:
        """Whether the run has a budget."""
        return bool(self.leak_budget) or self.secrets is not None

    def limits(self) -> dict[str, float]:
        """The largest value of each channel, `tokens` and `labels`, that has a limit."""
        return read_limits(self.leak_budget)


def check_budgeted(config: TrainConfig) -> None:
    """Refuse what the attacks of a leak budget would not measure.

    Raises:
        ValueError: Something is; the message names it.
    """
    if not config.budgeted:
        return
    what = "leak_budget" if config.leak_budget else "secrets"
    if config.sites != "none":
        raise ValueError(f"sites send what the attacks of {what} do not see: give sites = none")
    if config.method == "prompt":
        raise ValueError(f"method prompt sends what the attacks of {what} do not see: use another method")
    if config.codec.strip().startswith("auto"):
        raise ValueError(f"codec = {config.codec!r} sends probes, and in codecs that {what} has not measured: name one")
    if config.device != "cpu":
        raise ValueError(f"device = {config.device!r}: the attacks of {what} compute on the CPU; give cpu")
    if config.precision != "fp32":
        raise ValueError(f"precision = {config.precision!r}: the attacks of {what} compute in fp32; give fp32")
