"""The settings of what an edge notes for an audit, and of the audit."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from isthmus.edge.config.client_config import ClientConfig
from isthmus.edge.config.settings import MOST_FACTOR, MOST_MIB, MOST_STEPS, MOST_TEXTS, Settings
from isthmus.protocol.limits import MAX_UNSIGNED


class AuditConfig(Settings):
    """What is noted of a run's calls."""

    panel = "Audit"

    transcript: bool = Field(
        True,
        description="Have the cloud sign what it was sent and what it answered, as digests, in OUT/transcript.jsonl.",
    )
    max_unsigned: int = Field(
        MAX_UNSIGNED,
        ge=0,
        le=10**9,
        description="Exchanges that the cloud may leave unsigned where sessions break, and one more for each 32 that "
        "it signs. Beyond that the run stops.",
    )
    audit_sample: int | None = Field(
        None,
        ge=1,
        le=MOST_MIB,
        description="MiB, in OUT/audit, for a random sample of calls with their activations, which "
        "`isthmus edge audit` has computed again elsewhere.",
    )

    @model_validator(mode="after")
    def _check_sample(self) -> Self:
        if self.audit_sample is not None and not self.transcript:
            raise ValueError(
                f"audit_sample = {self.audit_sample} keeps calls whose answers a transcript proves, and transcript is "
                "false: leave out one of the two"
            )
        return self


class ReplayConfig(Settings):
    """Who computes sampled calls again, and how answers are compared."""

    panel = "Audit"

    model: Path | None = Field(
        None, description="Folder of the whole model, which this process replays with; instead of --cloud."
    )
    calls: int | None = Field(
        None, ge=1, le=MOST_STEPS, description="Calls to replay at most; by default all of the sample."
    )
    threshold: float | None = Field(
        None,
        ge=0,
        le=MOST_FACTOR,
        description="Distance |a - b| / |b| up to which answers are the same where they were computed by other "
        "numerics (processor, torch, threads). One above it is computed again with its inputs changed in their last "
        "place, and is wrong where that does not explain it. Without a threshold, such answers are undecided.",
    )
    threads: int | None = Field(None, ge=1, le=MOST_TEXTS, description="torch threads of a replay with --model.")


class AuditCommandConfig(ReplayConfig, ClientConfig):
    """What `edge audit` needs. `cloud` is the one that replays."""

    cloud: str = Field(
        "", description="Connection string of the cloud that replays, or the path of a file that holds it."
    )

    @model_validator(mode="after")
    def _check_replayer(self) -> Self:
        if bool(self.cloud) == (self.model is not None):
            raise ValueError("cloud and model say who replays: give one of the two")
        return self
