"""Which run a checkpoint belongs to: the model, the data, and the options that may not change half-way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from isthmus.edge.config.training_config import TuneConfig, TuningConfig
from isthmus.training.run_checkpoint import RunCheckpoint, check_settings, damaged_entry

START_ANEW = "give another --out"

DRAFT_PACKAGE = "the draft's package"
NO_DRAFT: Mapping[str, Any] = {DRAFT_PACKAGE: None}  # so that a run with a draft is not gone on with without it

# Options that do not change what a step computes; every other one must be the same after a resume. The data's path and
# form are covered by the fingerprint of the tokens, the package by the model's identity, the draft by its own settings;
# steps and epochs by the total, where it matters; the adapter to go on from by its contents.
_FREE = {
    "cloud",
    "key",
    "package",
    "signer",
    "data",
    "validation",
    "validation_split",
    "format",
    "header",
    "text_column",
    "prompt_column",
    "completion_column",
    "prompt_template",
    "completion_template",
    "max_length",
    "steps",
    "epochs",
    "out",
    "save_every",
    "keep_checkpoints",
    "resume",
    "report_to",
    "log_every",
    "eval_every",
    "threads",
    "connect_timeout",
    "give_up_after",
    "call_timeout",
    "keepalive",
    "renew_seconds",
    "renew_gib",
    "tls_ca",
    "tls_cert",
    "tls_key",
    "start_from",
    "plugged",
    "draft",
    "draft_learning_rate",
    "defence_key",
    "transcript",
    "audit_sample",
    "max_unsigned",
    "leak_budget",
    "secrets",
    "public",
    "leak_sample",
    "leak_change",
    "leak_every",
    "keep_outputs_gib",
}


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """Which model a run tunes.

    `digest` is of its weights and configuration; `plan` is the split plan ("2:2"), or "whole" without one. What the
    cloud's span computes in, and with which attention, is None where there is no cloud. `package` is the id of the
    package whose emulator stands for the middle layers, None where these are the model's own.
    """

    name: str
    digest: str
    plan: str
    span_dtype: str | None = None
    attn_implementation: str | None = None
    package: str | None = None


def fixed_settings(
    config: TuningConfig, total: int, start: str | None, draft: Mapping[str, Any] = NO_DRAFT
) -> dict[str, Any]:
    """The options that a run may not change half-way.

    Args:
        total: Its optimizer steps, which may change where nothing was planned by them.
        start: The digest of the adapter that it went on from.
        draft: What a draft that is tuned adds.
    """
    settings = config.model_dump(mode="json", exclude=set(_FREE))
    if config.device == "cpu":  # as in runs of releases that had no other
        del settings["device"]
    if isinstance(config, TuneConfig) and not config.defence:  # alike
        settings["defence"] = None
    planned = (
        config.schedule != "constant"
        or config.method == "adalora"
        or getattr(config, "site_policy", "") == "kill-revive"
    )
    settings |= {"total steps": total if planned else None, "the adapter to go on from": start}
    return {**settings, **draft}


def noted_settings(config: TuningConfig) -> dict[str, Any]:
    """What a run writes down of its calls, which a resume may not change either.

    A transcript is of all calls or of none, and each call of a transcript has the same chance to be in the sample.
    These are no `fixed_settings`, on which the noise of defences depends: what is written down changes no noise.
    """
    sampled = getattr(config, "audit_sample", None) is not None
    return {"transcript": getattr(config, "transcript", False), "whether audit_sample was given": sampled}


def identity_entries(model: ModelIdentity, data: str) -> dict[str, Any]:
    """What a checkpoint says of the model, and of the data by their fingerprint."""
    return {"model": asdict(model), "data": data}


def check_fits(checkpoint: RunCheckpoint, folder: Path, model: ModelIdentity, data: str) -> None:
    """Refuse to go on with a checkpoint of another model or other data.

    Raises:
        CheckpointError: They differ; the message names both.
    """
    try:
        theirs, their_data = ModelIdentity(**checkpoint.entries["model"]), checkpoint.entries["data"]
    except (KeyError, TypeError) as error:
        raise damaged_entry(folder, error) from error
    check_settings(folder, _named(theirs, their_data), _named(model, data), START_ANEW)


def _named(model: ModelIdentity, data: str) -> dict[str, Any]:
    return {
        "the model": model.name,
        "the weights (digest)": model.digest,
        "the split plan": model.plan,
        "the span's dtype": model.span_dtype,
        "the attention implementation": model.attn_implementation,
        "the emulator's package": model.package,
        "the tokenized data (fingerprint)": data,
    }
