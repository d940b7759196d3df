"""The command: what is finished is not made again, and a table that fits a terminal."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from support.emulator.packages import tiny_package
from support.models.small_tasks import task_folder
from support.models.tiny import tiny_checkpoint

from isthmus.common.errors import ConfigError
from isthmus.experiments.leak.weights import leak_weights
from isthmus.experiments.leak.weights.extraction_run import ExtractionResult
from isthmus.experiments.leak.weights.leak_weights import run_leak_weights, show
from isthmus.experiments.leak.weights.leak_weights_settings import PARTS, LeakWeightsSettings
from isthmus.experiments.leak.weights.membership_run import AttackedMembership, MembershipResult, MembershipRun
from isthmus.experiments.leak.weights.span_theft import TheftResult, TheftRun
from isthmus.privacy.attacks.weights.span_distillation import Fidelity
from isthmus.privacy.measures.bootstrap import Interval

PROMISED = "the adapters, of each example; the messages have none"
LARGE = Fidelity(12.345, 12.345, 0.1)
SOME = Interval(1.234567, 0.123456, 12.345678)
ATTACKED = tuple(AttackedMembership(name, SOME, SOME) for name in ("membership-loss", "membership-reference"))


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("package")
    return {
        "model": str(tiny_checkpoint("llama", folder / "model")),
        "data_folder": task_folder(folder / "data"),
    }


def test_what_is_finished_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: Any) -> None:
    made: list[int] = []

    def theft(settings: Any) -> TheftResult:
        made.append(settings.steps)
        runs = (TheftRun(0, 0, Fidelity(1.5, 0.9, 0.3), 0.4), TheftRun(5, 60, Fidelity(1.2, 0.3, 0.5), 0.8))
        return TheftResult(1.0, Fidelity(2.0, 1.5, 0.1), runs)

    monkeypatch.setattr(leak_weights, "measure_theft", theft)
    settings = LeakWeightsSettings(parts="theft", model=parts["model"], out=tmp_path, theft_steps=7)
    first = run_leak_weights(settings)
    assert run_leak_weights(settings) == first
    assert made == [7]
    assert (first["theft"]["without"]["divergence"], first["theft"]["runs"][1]["stolen"]["top1_agreement"]) == (
        1.5,
        0.5,
    )
    run_leak_weights(LeakWeightsSettings(parts="theft", model=parts["model"], out=tmp_path, theft_steps=8))
    assert made == [7, 8]


def test_settings_that_make_no_sense_are_refused_before_the_work(tmp_path: Path, parts: Any) -> None:
    for name, value, message in (
        ("parts", "thefts", "'thefts' is not known"),
        ("calls", "1,many", "--calls '1,many' is no list of numbers"),
    ):
        values: dict[str, Any] = {"model": parts["model"], "out": tmp_path / "out", name: value}
        with pytest.raises(ConfigError, match=message):
            run_leak_weights(LeakWeightsSettings(**values))
    assert not (tmp_path / "out" / "cells.jsonl").exists()


def test_over_a_package_the_settings_have_its_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: Any
) -> None:
    monkeypatch.setattr(leak_weights, "measure_membership", lambda *_: MembershipResult(2, 100, 1, SOME, SOME, (), 1.0))
    package = tiny_package(tmp_path / "package", Path(parts["model"]), plan="1:2")
    shared: dict[str, Any] = {"parts": "membership", "model": parts["model"], "out": tmp_path, "edge_layers": "1:1"}
    over = run_leak_weights(LeakWeightsSettings(**shared, package=package.folder))["membership"]["settings"]
    assert (over["edge_layers"], over["package"]) == ("1:2", package.emulator_name)
    assert run_leak_weights(LeakWeightsSettings(**shared))["membership"]["settings"]["edge_layers"] == "1:1"


def test_the_tables_fit_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    run = MembershipRun(None, None, None, None, 1.0, SOME, SOME, ATTACKED)
    defended = MembershipRun("dp-sgd:clip=1,sigma=4", 6.543, 1e-5, PROMISED, 0.7654, SOME, SOME, ATTACKED)
    results = {
        "membership": MembershipResult(100, 1000, 1000, SOME, SOME, (run, defended), 1.2345),
        "extraction": ExtractionResult(1040, 1040, 12345, 1.234e-5, 1.234e-3, 1.234e-3, "int4-outliers"),
        "theft": TheftResult(12.345, LARGE, (TheftRun(10000, 1000000, LARGE, -1.2345),)),
    }
    assert tuple(results) == PARTS
    show({name: asdict(each) for name, each in results.items()})
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert any("epsilon 6.54 at delta 1e-05" in line for line in lines)
