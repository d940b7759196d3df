"""Faults at named points of a worker: what an instruction does, and that a training does not mind."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cloud.clouds import Home, ThreadServer, served
from support.cloud.dying_worker import MortalWorker
from support.models.tiny import tiny_checkpoint

from isthmus.common.errors import ConfigError
from isthmus.edge.cloud_link import open_link
from isthmus.edge.config.training_config import TrainConfig, load_config
from isthmus.edge.split_run import train_over
from isthmus.experiments.rigs.fault_points import fault_points
from isthmus.experiments.rigs.fault_points.fault_points import (
    POINTS,
    WRAPPED,
    InjectedFaultError,
    Point,
    arm,
    is_armed,
    reached,
)
from isthmus.experiments.rigs.faults.faults import compare_runs

EVERY = 2
STEPS = EVERY * (len(POINTS) + 1)


@pytest.fixture
def points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(fault_points.ENVIRONMENT, str(tmp_path))
    return tmp_path


def test_nothing_happens_where_nobody_has_asked_for_it(points: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reached("queued")  # nothing is armed
    arm(points, "queued", "kill")
    reached("opened")
    monkeypatch.delenv(fault_points.ENVIRONMENT)
    reached("queued")
    assert is_armed(points, "queued")


def test_a_fault_falls_once(points: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []
    here, sleep = threading.current_thread(), time.sleep

    def noted(seconds: float) -> None:  # others sleep as well, in the same module of Python's
        done.append(seconds) if threading.current_thread() is here else sleep(seconds)

    monkeypatch.setattr(fault_points.time, "sleep", noted)
    monkeypatch.setattr(fault_points.os, "kill", lambda *what: done.append(what))
    arm(points, "opened", "raise")
    with pytest.raises(InjectedFaultError, match="opened"):
        reached("opened")
    arm(points, "queued", "wait 1.5")
    arm(points, "reply_sent", "kill")
    for _ in range(2):
        for point in POINTS:
            reached(point)
    assert done == [1.5, (os.getpid(), signal.SIGKILL)]
    assert not any(is_armed(points, point) for point in POINTS)


Seen = list[str]


def test_a_point_that_nobody_reaches_is_refused(points: Path) -> None:
    with pytest.raises(ConfigError, match=r"no fault point 'lunch'.*reply_sent"):
        arm(points, "lunch", "kill")  # type: ignore[arg-type]  # there is none of that name
    assert not list(points.iterdir())


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """The points that this process's workers reach, once their methods are wrapped."""
    found: Seen = []
    monkeypatch.setattr(fault_points, "reached", found.append)
    return found


def wrap_all(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, methods in WRAPPED.items():
        for name, points in methods.items():
            owner, method = name.split(".")
            wrapped = getattr(importlib.import_module(module), owner)
            monkeypatch.setattr(wrapped, method, fault_points._with_points(getattr(wrapped, method), *points))


def reached_by(call: Callable[[], object], seen: Seen) -> Seen:
    """The points of one request, the frames that arrive counted once."""
    seen.clear()
    call()
    deadline = time.monotonic() + 60
    while "reply_sent" not in seen and time.monotonic() < deadline:
        time.sleep(0.01)
    return list(dict.fromkeys(seen))


def test_a_request_reaches_each_point_at_its_place_and_a_worker_has_none_of_its_own(
    tmp_path: Path, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    cloud = served(tiny_checkpoint("llama", tmp_path / "model"), tmp_path / "parts")
    with ThreadServer(cloud, Home(tmp_path)) as server:
        with server.link() as link:
            link.open(5)
            link.forward_span(torch.zeros(1, 4, link.info.hidden_size), None, None, keep=False)
        assert seen == []
        wrap_all(monkeypatch)
        with server.link() as link:
            link.open(5)
            hidden = torch.zeros(1, 4, link.info.hidden_size)
            kept: list[Any] = []

            def forward() -> None:
                kept.append(link.forward_span(hidden, None, None, keep=True)[1])

            def backward() -> None:
                link.backward_span(kept[0], torch.ones_like(hidden), hidden, None, None)

            for call, done in ((forward, "forward_done"), (backward, "backward_done")):
                points = reached_by(call, seen)
                assert points[:2] == ["received", "opened"]
                assert set(points[2:4]) == {"queued", done}  # the event loop and the compute thread, at the same time
                assert points[4:] == ["reply_sent"]


@pytest.mark.parametrize("broken", [True, False])
@pytest.mark.long
def test_every_python_of_the_cloud_has_the_points_and_no_other_one(broken: bool, tmp_path: Path) -> None:
    program = (
        "import importlib, json, sys\n"
        "names = json.loads(sys.argv[1])\n"
        "print([hasattr(getattr(getattr(importlib.import_module(m), o), f), '__wrapped__') for m, o, f in names])\n"
    )
    names = [(module, *name.split(".")) for module, methods in WRAPPED.items() for name in methods]
    extra = fault_points.environment(tmp_path) if broken else {}
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(names)], capture_output=True, text=True, check=True,
        env=os.environ | extra,
    )  # fmt: skip
    assert json.loads(done.stdout.lower()) == [broken] * len(names)


class Arming:
    """Arms one point after the other, each at a step of its own."""

    def __init__(self, folder: Path, instruction: str) -> None:
        self._folder, self._instruction = folder, instruction
        self._left = list(POINTS)

    def before_step(self, step: int) -> None:
        if step % EVERY == 0 and self._left:
            arm(self._folder, self._left.pop(0), self._instruction)

    def after_step(self, step: int) -> None:
        pass

    def points(self) -> Mapping[str, float]:
        return {}

    def state(self) -> Mapping[str, Any]:
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        pass


def train(worker: MortalWorker, out: Path, instruction: str | None = None) -> int:
    """One training; returns how often its link has asked again."""
    data = out.parent / "data.jsonl"
    data.write_text(
        "".join(json.dumps({"text": f"Ticket {n}: the card was charged {n + 2} times"}) + "\n" for n in range(20))
    )
    config: TrainConfig = load_config(
        None,
        {
            "cloud": worker.connection,
            "key": str(worker.home.key_file),
            "data": str(data),
            "validation_split": 0.0,
            "out": str(out),
            "steps": STEPS,
            "batch": 2,
            "learning_rate": 1e-2,
            "dropout": 0.1,
            "threads": 1,
            "connect_timeout": 60.0,
        },
    )
    with open_link(config) as link:
        opened = link.traffic.retries  # a worker that begins is waited for
        train_over(link, config, () if instruction is None else (Arming(worker.points, instruction),))
        return link.traffic.retries - opened


@pytest.mark.server
@pytest.mark.long
def test_a_worker_that_dies_or_fails_at_any_point_costs_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    with MortalWorker(tiny_checkpoint("llama", tmp_path / "model"), tmp_path / "worker") as worker:
        assert train(worker, tmp_path / "calm") == 0
        for instruction, lives in (("raise", 1), ("kill", 1 + len(POINTS))):
            retries = train(worker, tmp_path / instruction, instruction)
            assert retries >= len(POINTS)
            assert worker.lives == lives
            assert not list(worker.points.iterdir())
            compared = compare_runs(STEPS, tmp_path / "calm", tmp_path / instruction)
            assert (compared["steps_lost"], compared["steps_doubled"]) == (0, 0)
            assert compared["adapter_identical"]
            assert compared["losses_identical"]
            assert compared["lora_b_max_abs"] > 0


def test_a_point_that_stands_still_delays_and_does_no_more(tmp_path: Path, points: Path) -> None:
    point: Point = "forward_done"
    arm(points, point, "wait 0.01")
    reached(point)
    assert not is_armed(points, point)
