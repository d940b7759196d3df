"""Runs that stop and go on, with observers around their steps: nothing is lost, and nothing is done twice."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from support import older_checkpoints as older
from support.models import small_training as training
from support.models.small_training import Turns, Wire, config, data, raise_unreachable, trainer
from support.models.tiny import tiny_checkpoint
from support.run_folders import assert_same_run, losses
from support.warm_processes import warm

from isthmus.common.errors import CheckpointError, ConfigError, DiskError, UnreachableError
from isthmus.common.files import claim
from isthmus.edge.run_files.run_identity import ModelIdentity
from isthmus.edge.training.edge_steps import COSTS_FILE
from isthmus.edge.training.methods import trained
from isthmus.training import run_checkpoint as checkpoints


def checkpoint_names(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir() if "checkpoint" in path.name)


# Around a step -------------------------------------------------------------------------------------------------------


def test_observers_are_called_around_every_step(model_folder: Path, undisturbed: Path, tmp_path: Path) -> None:
    first, second = Turns(), Turns()
    run = trainer(model_folder, config(tmp_path), Wire(), step_observers=(first, second))
    first.parameters = list(trained(run.model).values())
    run.fit()
    for observer in (first, second):
        assert observer.begun == observer.ended == list(range(1, 10))
    assert all(first.graded)
    assert_same_run(tmp_path, undisturbed)
    for step in (6, 9):
        state = json.loads((tmp_path / f"checkpoint-{step}" / "state.json").read_text())
        steps = list(range(1, step + 1))
        assert state["observers"] == [{"begun": steps, "ended": steps}] * 2


@pytest.mark.parametrize("where", ["observer", "wire"])
def test_the_state_of_observers_comes_back_on_a_resume(
    model_folder: Path, undisturbed: Path, tmp_path: Path, where: str
) -> None:
    """It is that of the last applied step, whatever the observer did in the step that was given up."""
    observer = Turns(fail_before=5 if where == "observer" else 0)
    run = trainer(model_folder, config(tmp_path), Wire(), step_observers=[observer])
    if where == "wire":
        run.model.get_base_model().lm_head.register_forward_hook(
            lambda *_: raise_unreachable() if run.step == 4 else None
        )
    with pytest.raises(UnreachableError, match="checkpoint-4"):
        run.fit()
    assert observer.begun == [1, 2, 3, 4, 5]
    again = Turns()
    trainer(model_folder, config(tmp_path, resume=True), Wire(), step_observers=[again]).fit()
    assert again.begun == again.ended == list(range(1, 10))
    assert_same_run(tmp_path, undisturbed)


def test_a_resumed_run_has_the_same_observers(model_folder: Path, tmp_path: Path) -> None:
    trainer(model_folder, config(tmp_path, steps=2), step_observers=[Turns()]).fit()
    with pytest.raises(CheckpointError, match=r"states of 1 parts .* this run has 0"):
        trainer(model_folder, config(tmp_path, steps=2, resume=True)).fit()


# Stopping and going on -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(
    model_folder: Path, undisturbed: Path, tmp_path: Path, number: signal.Signals
) -> None:
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    wire = Wire("begin", 5, lambda: signal.raise_signal(number))
    with pytest.raises(KeyboardInterrupt, match=r"after step 4 of 9.*checkpoint-4.*--resume"):
        trainer(model_folder, config(tmp_path), wire).fit()
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    assert [line["step"] for line in losses(tmp_path)] == [1, 2, 3, 4]
    wire = Wire()
    trainer(model_folder, config(tmp_path, resume=True), wire).fit()
    assert wire.steps == [5, 6, 7, 8, 9]
    assert_same_run(tmp_path, undisturbed)


def test_a_second_signal_stops_at_once(model_folder: Path, tmp_path: Path) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="at once"):
        trainer(model_folder, config(tmp_path), Wire("begin", 5, twice)).fit()
    assert checkpoint_names(tmp_path) == ["checkpoint-3"]


def test_a_cloud_that_stays_away(model_folder: Path, undisturbed: Path, tmp_path: Path) -> None:
    with pytest.raises(UnreachableError, match=r"stayed away for 600 s\. .*checkpoint-4.*--resume"):
        trainer(model_folder, config(tmp_path), Wire("begin", 5, raise_unreachable)).fit()
    trainer(model_folder, config(tmp_path, resume=True), Wire()).fit()
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.parametrize(
    ("moment", "step", "left"),
    [
        ("begin", 5, ["checkpoint-3"]),  # inside a step
        ("applied", 5, ["checkpoint-3"]),  # after the optimizer, before the loss log
        ("save", 6, [".isthmus-tmp-checkpoint-6", "checkpoint-3"]),  # inside a checkpoint
        ("begin", 2, []),  # before the first checkpoint
    ],
)
def test_a_killed_edge_goes_on_as_if_nothing_had_been(
    model_folder: Path, undisturbed: Path, tmp_path: Path, *, moment: str, step: int, left: list[str]
) -> None:
    words = (str(model_folder), str(tmp_path), moment, str(step))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = warm().run(words, environment, tmp_path, 240, program=training.__file__)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert checkpoint_names(tmp_path) == left
    trainer(model_folder, config(tmp_path, resume=True), Wire()).fit()
    assert_same_run(tmp_path, undisturbed)
    assert checkpoint_names(tmp_path) == ["checkpoint-6", "checkpoint-9"]


def test_a_finished_run_can_be_resumed(model_folder: Path, undisturbed: Path, tmp_path: Path) -> None:
    first = trainer(model_folder, config(tmp_path), Wire()).fit()
    wire = Wire()
    again = trainer(model_folder, config(tmp_path, resume=True), wire).fit()
    assert wire.steps == []
    assert (again.report.tokens, again.report.seconds) == (first.report.tokens, first.report.seconds)
    assert_same_run(tmp_path, undisturbed)


def test_a_folder_is_trained_into_by_one_process_at_a_time(model_folder: Path, tmp_path: Path) -> None:
    other = trainer(model_folder, config(tmp_path, resume=True))
    with claim(tmp_path), pytest.raises(ConfigError, match=r"another process is training.*another --out"):
        other.fit()
    assert not (tmp_path / "losses.jsonl").exists()
    assert other.fit().report.steps == 9


def test_costs_are_of_one_run_and_of_every_time_that_a_step_was_made(model_folder: Path, tmp_path: Path) -> None:
    def steps() -> list[int]:
        return [json.loads(line)["step"] for line in (tmp_path / COSTS_FILE).read_text().splitlines()]

    (tmp_path / COSTS_FILE).write_text('{"step": 1}\n{"step": 2}\n')  # of a run that ended before a checkpoint
    trainer(model_folder, config(tmp_path, steps=3, save_every=1)).fit()
    assert steps() == [1, 2, 3]
    shutil.rmtree(tmp_path / "checkpoint-3")
    trainer(model_folder, config(tmp_path, steps=3, save_every=1, resume=True)).fit()
    assert steps() == [1, 2, 3, 3]


def test_a_signal_ends_a_wait_for_the_cloud(model_folder: Path, tmp_path: Path) -> None:
    """As the link does while the cloud is away: it asks again and again whether the wait is still wanted."""
    asked: list[int] = []

    def wait() -> None:
        for number in range(10):
            asked.append(number)
            run.check_stop()
            if number == 3:
                signal.raise_signal(signal.SIGTERM)

    run = trainer(model_folder, config(tmp_path), Wire("begin", 5, wait))
    with pytest.raises(KeyboardInterrupt, match=r"after step 4 of 9.*checkpoint-4.*--resume"):
        run.fit()
    assert asked == [0, 1, 2, 3, 4]
    run.check_stop()  # a request counts for its own run only


def test_a_folder_with_a_run_is_not_overwritten(model_folder: Path, tmp_path: Path) -> None:
    trainer(model_folder, config(tmp_path, steps=2)).fit()
    before = (tmp_path / "losses.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"checkpoint-2.*--resume"):
        trainer(model_folder, config(tmp_path, steps=2)).fit()
    assert (tmp_path / "losses.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 4}, "rank was 8 and is now 4"),
        ({"learning_rate": 1e-3}, "learning_rate was 0.01"),
        ({"steps": 10}, "total steps was 9 and is now 10"),
        ({"identity": ModelIdentity("other", "d1", "whole")}, "the model was 'tiny' and is now 'other'"),
        ({"data": data(12)}, "the tokenized data"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    model_folder: Path, undisturbed: Path, change: dict[str, Any], message: str
) -> None:
    keywords = {name: change[name] for name in ("identity", "data") if name in change}
    options = config(
        undisturbed, resume=True, **{name: value for name, value in change.items() if name not in keywords}
    )
    with pytest.raises(CheckpointError, match=message):
        trainer(model_folder, options, **keywords).fit()


def test_a_constant_schedule_can_be_made_longer(model_folder: Path, tmp_path: Path) -> None:
    for steps, name in ((4, "grown"), (7, "grown"), (7, "straight")):
        trainer(model_folder, config(tmp_path / name, steps=steps, schedule="constant", resume=True)).fit()
    assert_same_run(tmp_path / "grown", tmp_path / "straight")


@pytest.mark.parametrize("values", [{}, {"method": "adalora", "steps": 12}, {"optimizer": "lora-fa"}])
def test_a_checkpoint_of_the_loop_before_is_resumed(model_folder: Path, tmp_path: Path, values: dict[str, Any]) -> None:
    trainer(model_folder, config(tmp_path / "straight", **values), Wire(), step_observers=[Turns()]).fit()
    wire = Wire("begin", 5, raise_unreachable)
    with pytest.raises(UnreachableError):
        trainer(model_folder, config(tmp_path / "run", **values), wire, step_observers=[Turns()]).fit()
    older.rewrite_edge(tmp_path / "run" / "checkpoint-4", epoch=1, position=1, learning_rate=1e-3)
    resumed = config(tmp_path / "run", resume=True, **values)
    trainer(model_folder, resumed, Wire(), step_observers=[Turns()]).fit()
    assert_same_run(tmp_path / "run", tmp_path / "straight")


def test_a_checkpoint_of_other_layers_is_refused(undisturbed: Path, tmp_path: Path) -> None:
    larger = tiny_checkpoint("llama", tmp_path / "larger", num_hidden_layers=3)
    with pytest.raises(CheckpointError, match="has shape None there"):
        trainer(larger, config(undisturbed, resume=True)).fit()


def test_a_full_disk_loses_nothing(
    model_folder: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = checkpoints.save_file

    def full(tensors: Any, path: Path) -> None:
        if "checkpoint-6" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_file", full)
        with pytest.raises(DiskError, match=r"checkpoint-6 cannot be written \(No space left on device\)"):
            trainer(model_folder, config(tmp_path)).fit()
    assert checkpoint_names(tmp_path) == ["checkpoint-3"]
    trainer(model_folder, config(tmp_path, resume=True)).fit()
    assert_same_run(tmp_path, undisturbed)
