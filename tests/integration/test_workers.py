"""Clouds of several workers, in processes of their own: whoever is killed, the adapter is the undisturbed run's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.clouds import Home, ThreadServer, served
from support.tiny import tiny_checkpoint

from isthmus.edge.config import TrainConfig
from isthmus.edge.link import Link, connect
from isthmus.edge.run import train_over
from isthmus.experiments.harness import LocalCloud

pytestmark = pytest.mark.server
STEPS = 10


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("workers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ISTHMUS_CACHE", str(folder / "cache"))
        tiny_checkpoint("llama", folder / "model", num_hidden_layers=7)
        rows = (json.dumps({"text": f"case {n}: " + "ab" * (n % 7)}) + "\n" for n in range(20))
        (folder / "texts.jsonl").write_text("".join(rows))
        yield folder


def train(
    place: Path, name: str, address: str, key: Path, watch: Callable[[Link], Any] = lambda link: None
) -> dict[str, torch.Tensor]:
    """Train with dropout over a cloud; returns the adapter."""
    config = TrainConfig.model_validate(
        {
            **{"cloud": address, "key": key, "data": str(place / "texts.jsonl"), "out": place / name, "steps": STEPS},
            **{"batch": 2, "dropout": 0.1, "learning_rate": 1e-2, "threads": 1},
        }
    )
    with connect(address, key=key) as link:
        watch(link)
        train_over(link, config)
    return load_file(place / name / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def undisturbed(place: Path) -> dict[str, torch.Tensor]:
    """The adapter of a run over one server that nobody disturbs."""
    home = Home(place / "undisturbed")
    with ThreadServer(served(place / "model", place / "parts"), home) as server:
        adapter = train(place, "run-undisturbed", server.address, home.key_file)
    assert max(float(value.abs().max()) for name, value in adapter.items() if "lora_B" in name) > 0
    return adapter


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Killer:
    """Kills what a test names in the middle of every other call of a kind, four times in all."""

    def __init__(self, question: str, kill: Callable[[], None]) -> None:
        self._question, self._kill = question, kill
        self._seen = 0
        self.kills = 0

    def watch(self, link: Link) -> None:
        """Look at what a link does."""
        link.observer = self.observe

    def observe(self, question: str, phase: str) -> None:
        """See `isthmus.edge.channel.Observer`."""
        if (question, phase) != (self._question, "waiting"):
            return
        self._seen += 1
        if self._seen % 2 and self.kills < 4:
            self._kill()
            self.kills += 1


def test_workers_that_are_killed_in_turn_change_nothing(place: Path, undisturbed: dict[str, torch.Tensor]) -> None:
    with LocalCloud(place / "two", str(place / "model"), "--threads", "1", "--workers", "2") as cloud:

        def kill_mine() -> None:
            busy = [worker for worker in cloud.cloud_status()["workers"] if worker.get("sessions")]
            assert len(busy) == 1
            os.kill(busy[0]["pid"], signal.SIGKILL)

        killer = Killer("backward", kill_mine)
        adapter = train(place, "run-killed", cloud.connection, cloud.edge_key, killer.watch)
        assert killer.kills == 4
        assert same(adapter, undisturbed)

        command = [sys.executable, "-m", "isthmus.cli.main", "cloud", "status", "--home", str(cloud.home)]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        status = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout)
        assert [worker["worker"] for worker in status["workers"]] == [0, 1]
        assert len({worker["address"] for worker in status["workers"]}) == 2
        assert status["restarts"] == sum(worker["restarts"] for worker in status["workers"]) >= 3
        assert all(worker["address"] in shown for worker in status["workers"])
