"""A training whose wire is broken in several ways, between real processes, ends in the undisturbed one's adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.models.tiny import tiny_checkpoint

from isthmus.common.errors import ConfigError
from isthmus.experiments.harness.rig_settings import FaultSettings
from isthmus.experiments.rigs.faults.fault_plan import PHASES
from isthmus.experiments.rigs.faults.faults import run_faults


@pytest.mark.server
@pytest.mark.usefixtures("warm_children")
def test_a_broken_wire_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    model = tiny_checkpoint("llama", tmp_path / "model")
    settings = FaultSettings(str(model), steps=16, per_phase=1, save_every=3)
    folder = tmp_path / "run"
    folder.mkdir()
    figures = run_faults(settings, folder)
    assert figures["faults_by_phase"] == dict.fromkeys(PHASES, 1)
    assert figures["faults"] == len(PHASES)
    assert (figures["steps_lost"], figures["steps_doubled"]) == (0, 0)
    assert figures["losses_identical"]
    assert figures["adapter_identical"]
    assert figures["lora_b_max_abs"] > 0


def test_an_unknown_phase_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lunch_break.*forward_sending"):
        run_faults(FaultSettings("unused", phases="lunch_break"), tmp_path)
