"""Whose a checkpoint is: another model, other data or other settings are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models.small_training import config

from isthmus.common.errors import CheckpointError
from isthmus.edge.run_files.run_identity import ModelIdentity, check_fits, fixed_settings, identity_entries
from isthmus.training.run_checkpoint import RandomState, RunCheckpoint

MODEL = ModelIdentity("tiny", "d1", "2:2")
NOW = RandomState.take(torch.device("cpu"))


@pytest.mark.parametrize(
    ("change", "both"),
    [
        ({"model": ModelIdentity("other", "d1", "2:2")}, "'tiny' and is now 'other'"),
        ({"model": ModelIdentity("tiny", "d2", "2:2")}, "'d1' and is now 'd2'"),
        ({"model": ModelIdentity("tiny", "d1", "1:3")}, "'2:2' and is now '1:3'"),
        ({"model": replace(MODEL, span_dtype="bf16")}, "the span's dtype was None and is now 'bf16'"),
        ({"model": replace(MODEL, attn_implementation="eager")}, "implementation was None and is now 'eager'"),
        ({"data": "f2"}, "'f1' and is now 'f2'"),
    ],
)
def test_another_run_is_refused_and_both_are_named(tmp_path: Path, change: dict[str, Any], both: str) -> None:
    saved = RunCheckpoint(3, {}, {}, {}, (), NOW, entries=identity_entries(MODEL, "f1"))
    now: dict[str, Any] = {"model": MODEL, "data": "f1"}
    check_fits(saved, tmp_path, **now)
    with pytest.raises(CheckpointError, match=both):
        check_fits(saved, tmp_path, **{**now, **change})


@pytest.mark.parametrize(
    ("values", "planned"),
    [
        ({"schedule": "constant"}, False),
        ({"schedule": "linear"}, True),
        ({"schedule": "constant", "method": "adalora"}, True),
        ({"schedule": "constant", "sites": "all", "site_policy": "kill-revive"}, True),
        ({"schedule": "constant", "sites": "all", "site_policy": "random"}, False),
    ],
)
def test_a_run_that_was_planned_by_its_length_keeps_it(tmp_path: Path, values: dict[str, Any], planned: bool) -> None:
    settings = fixed_settings(config(tmp_path, dropout=0.0, **values), 9, None)
    assert settings["total steps"] == (9 if planned else None)


def test_what_changes_a_step_may_not_change_on_a_resume(tmp_path: Path) -> None:
    settings = fixed_settings(config(tmp_path), 9, None)
    fixed = {"codec", "codec_every", "overlap", "span_cache_mib", "sites", "site_policy", "site_traffic"}
    assert fixed | {"site_computation", "optimizer", "accumulate"} <= settings.keys()
    assert not {"call_timeout", "give_up_after", "out", "threads"} & settings.keys()


@pytest.mark.parametrize(
    "entries", [{}, {"model": {}, "data": "f1"}, {"model": {"strange": 1}, "data": "f1"}, {"data": 1}]
)
def test_an_identity_that_makes_no_sense_is_damage(tmp_path: Path, entries: dict[str, Any]) -> None:
    saved = RunCheckpoint(3, {}, {}, {}, (), NOW, entries=entries)
    with pytest.raises(CheckpointError, match=r"state\.json is damaged"):
        check_fits(saved, tmp_path, MODEL, "f1")
