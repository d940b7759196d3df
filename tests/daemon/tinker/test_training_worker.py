"""The process that trains, killed without a warning and started anew."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from safetensors.torch import load_file
from support.cloud.train_runs import Runs, cloud_for_runs
from support.daemon.local_trainer import ADAM, LocalTrainer, creation, random_data
from support.run_folders import same

from isthmus.daemon.tinker import tinker_wire_pb2 as wire
from isthmus.daemon.workers.frames import Frame, read_frame

pytestmark = [pytest.mark.server, pytest.mark.usefixtures("warm_children")]
MODULE = "isthmus.daemon.tinker.training_worker"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    with cloud_for_runs(tmp_path_factory.mktemp("worker")) as started:
        yield started


@pytest.fixture(autouse=True)
def _ended() -> Iterator[None]:
    yield
    for worker in list(Worker.running):
        worker.kill()


class Worker:
    """The process, asked one question after the other. Whatever a test meets, it ends with it."""

    running: ClassVar[list[Worker]] = []

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as the trainer in this process has
        self.process = subprocess.Popen(
            [sys.executable, "-m", MODULE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        self._numbers = itertools.count(1)
        self.running.append(self)

    def send(self, method: str, values: dict[str, Any], blob: bytes = b"") -> None:
        """Ask."""
        pipe = self.process.stdin
        assert pipe is not None
        pipe.write(Frame({"id": next(self._numbers), "method": method, "values": values}, blob).to_bytes())
        pipe.flush()

    def ask(self, method: str, blob: bytes = b"", **values: Any) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Ask, and wait for the answer and the error. A result in bytes is told by its metrics."""
        self.send(method, values, blob)
        pipe, answer = self.process.stdout, {}
        assert pipe is not None
        while (frame := read_frame(pipe)) is not None:
            if "end" in frame.values:
                return answer, frame.values["end"]
            answer = frame.values["values"]
            if frame.blob:
                answer = {"metrics": dict(wire.ForwardBackwardOutput.FromString(frame.blob).metrics)}
        raise AssertionError("the process has ended")

    def end(self) -> int:
        """Close its pipe, and wait for it to end."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.running.remove(self)
        code = self.process.wait(30)
        self.process.stdout.close()
        return code

    def kill(self) -> None:
        """End it without a warning."""
        self.process.kill()
        self.end()


def body(data: list[dict[str, Any]], loss: str = "cross_entropy") -> bytes:
    """A request of `forward_backward`, with what `random_data` makes."""
    request = wire.ForwardBackwardRequest(model_id="a", seq_id=1, loss=loss)
    for values in data:
        datum = request.data.add()
        datum.input.add().text.tokens = np.asarray(values["tokens"], "<i4").tobytes()
        for name, value in values.items():
            if name == "targets":
                datum.loss_inputs["target_tokens"].number = wire.NUMBER_INT64
                datum.loss_inputs["target_tokens"].dense = np.asarray(value, "<i8").tobytes()
            elif name != "tokens":
                datum.loss_inputs[name].number = wire.NUMBER_FLOAT32
                datum.loss_inputs[name].dense = np.asarray(value, "<f4").tobytes()
    return bytes(request.SerializeToString())


def test_a_killed_process_has_left_the_state_before_or_after_a_step(runs: Runs, tmp_path: Path) -> None:
    steps = 8
    with LocalTrainer(runs, tmp_path / "undisturbed") as trainer:
        trainer.create()
        losses = trainer.train(range(1, steps + 1))
        wanted = trainer.adapter()
    question = creation(runs, "a", tmp_path / "a")
    worker, done, found = Worker(), 0, {}
    deaths = {2: 0.0, 4: 0.01, 6: 0.1}  # seconds after a step is asked for, by the steps that are made
    assert worker.ask("create", **question)[0]["saved"] is None
    while done < steps:
        answer, error = worker.ask("forward_backward", body(random_data(done + 1)), model="a")
        assert error is None
        found[done + 1] = answer["metrics"]["loss:sum"]
        step = {"model": "a", "number": done + 1, "adam": ADAM, "calls": 1}
        if done not in deaths:
            assert worker.ask("optim_step", **step)[1] is None
            done += 1
            continue
        worker.send("optim_step", step)
        time.sleep(deaths.pop(done))
        worker.kill()
        worker = Worker()
        saved = worker.ask("create", **question)[0]["saved"]
        assert saved in (done, done + 1)
        if saved == done + 1:  # asked again, it answers as it would have then, and makes no step
            assert worker.ask("optim_step", **step)[0]["metrics"]["grad_norm:mean"] > 0
        done = saved
    assert not deaths
    folder = tmp_path / "copy"
    assert worker.ask("save", model="a", folder=str(folder), optimizer=False) == ({}, None)
    assert worker.end() == 0
    assert [found[number] for number in sorted(found)] == losses
    assert same(load_file(folder / "adapter_model.safetensors"), wanted)


def test_what_is_wrong_is_said_with_its_code(runs: Runs, tmp_path: Path) -> None:
    worker = Worker()
    assert worker.ask("create", **creation(runs, "a", tmp_path / "a"))[1] is None
    cases: list[tuple[str, dict[str, Any], int, str]] = [
        ("optim_step", {"model": "a", "number": 1, "adam": ADAM, "calls": 0}, 10, "no gradients"),
        ("optim_step", {"model": "a", "number": 1, "adam": {**ADAM, "beta1": 1.0}, "calls": 0}, 10, "adam.beta1"),
        ("optim_step", {"model": "a", "number": 1, "adam": {**ADAM, "eps": 1e39}, "calls": 0}, 10, "adam.eps"),
        ("optim_step", {"model": "a", "number": 1, "adam": ADAM, "calls": 3}, 1, "of 3 calls"),
        ("load", {"model": "a", "number": 1, "folder": str(tmp_path / "none"), "optimizer": True}, 23, "none"),
    ]
    bodies = [
        ("b", body(random_data(1)), 20, "model b is not in training"),
        ("a", b"no message", 10, "the body is no request of forward_backward"),
        ("a", body([]), 10, "data is empty"),
        ("a", body(random_data(1), "gspo"), 10, "loss_fn 'gspo' is not offered"),
        ("a", body(random_data(1), "ppo"), 10, "ppo takes no weights"),
        ("a", body(random_data(1, (2,), mask=[1.0, 1.0])), 10, "data.0.mask: Extra"),
    ]
    asked = [("forward_backward", {"model": model}, code, said, blob) for model, blob, code, said in bodies]
    for method, values, code, said, blob in [*asked, *((*case, b"") for case in cases)]:
        answer, error = worker.ask(method, blob, **values)
        assert answer == {}
        assert error is not None
        assert error["code"] == code
        assert said in error["message"]
    state, error = worker.ask("state")
    assert error is None
    assert state["pid"] == worker.process.pid
    assert state["models"] == {"a": {"number": 0, "calls": 0}}
    assert worker.end() == 0
