"""Whatever breaks the wire between real processes, a training ends in the undisturbed one's adapter, and an answer has
the undisturbed one's text."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.models.tiny import tiny_checkpoint

from isthmus.common.errors import ConfigError
from isthmus.experiments.harness.rig_settings import FaultSettings
from isthmus.experiments.rigs.faults import answering_edge
from isthmus.experiments.rigs.faults.fault_plan import PHASES, Fault, FaultPlan, Moment
from isthmus.experiments.rigs.faults.faults import run_faults


class Seen:
    """The moments of the calls to decode, and those that were broken."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.moments: list[Moment] = []
        self.broken: list[Moment] = []
        choose = FaultPlan.choose

        def noting(plan: FaultPlan, moment: Moment) -> Fault | None:
            fault = choose(plan, moment)
            if moment.question == "decode":
                self.moments.append(moment)
                self.broken += [moment] * (fault is not None)
            return fault

        monkeypatch.setattr(FaultPlan, "choose", noting)


@pytest.mark.long
@pytest.mark.server
@pytest.mark.usefixtures("warm_children")
def test_a_broken_wire_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    seen = Seen(monkeypatch)
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
    assert figures["answer_identical"]
    assert figures["answer_replayed"] > 0
    assert seen.broken[0].step == 1  # the prompt's own call
    # Repeated calls are sent again, and are no further steps.
    assert [moment.phase for moment in seen.moments].count("sending") > settings.tokens
    assert sorted({moment.step for moment in seen.moments}) == list(range(1, settings.tokens + 1))


@pytest.mark.long
@pytest.mark.server
@pytest.mark.usefixtures("warm_children")
def test_an_answer_of_an_edge_that_forgets_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tests = str(Path(__file__).parents[1])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((tests, os.environ.get("PYTHONPATH", ""))))
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(answering_edge, "MODULE", "support.cloud.forgetful_edge")
    model = tiny_checkpoint("llama", tmp_path / "model")
    # The first fault breaks the call of the prompt, which is repeated whole: there is nothing to forget yet.
    settings = FaultSettings(str(model), tokens=8, per_phase=2, phases="decode_worker_killed")
    figures = run_faults(settings, tmp_path)
    assert figures["faults_by_phase"] == {"decode_worker_killed": 2}
    assert figures["retries"] > 0 < figures["answer_replayed"]
    assert not figures["answer_identical"]
    assert "adapter_identical" not in figures  # nothing was trained


def test_an_unknown_phase_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lunch_break.*forward_sending"):
        run_faults(FaultSettings("unused", phases="lunch_break"), tmp_path)
