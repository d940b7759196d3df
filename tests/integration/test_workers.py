"""Clouds of several workers, in processes of their own: whoever is killed, the adapter is the undisturbed run's."""

from __future__ import annotations

import json
import os
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cloud.clouds import Home, ThreadServer, served
from support.commands import in_process
from support.models.tiny import HIDDEN, tiny_checkpoint
from support.run_folders import adapter, same

from isthmus.edge.client.link import Link, connect
from isthmus.edge.config.training_config import TrainConfig
from isthmus.edge.split_run import train_over
from isthmus.experiments.harness.launch import LocalCloud
from isthmus.protocol.enrolment import Quota

pytestmark = pytest.mark.server
STEPS = 10


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
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
    return adapter(place / name)


@pytest.fixture(scope="module")
def undisturbed(place: Path) -> dict[str, torch.Tensor]:
    """The adapter of a run over one server that nobody disturbs."""
    home = Home(place / "undisturbed")
    with ThreadServer(served(place / "model", place / "parts"), home) as server:
        trained = train(place, "run-undisturbed", server.address, home.key_file)
    assert max(float(value.abs().max()) for name, value in trained.items() if "lora_B" in name) > 0
    return trained


class Killer:
    """Kills what a test names in the middle of every other call of a kind, so many times."""

    def __init__(self, question: str, kill: Callable[[], None], times: int) -> None:
        self._question, self._kill, self._times = question, kill, times
        self._seen = 0
        self.kills = 0

    def watch(self, link: Link) -> None:
        """Look at what a link does."""
        link.observer = self.observe

    def observe(self, question: str, phase: str) -> None:
        """See `isthmus.rpc.secure_stream.Observer`."""
        if (question, phase) != (self._question, "waiting"):
            return
        self._seen += 1
        if self._seen % 2 and self.kills < self._times:
            self._kill()
            self.kills += 1


@pytest.fixture(scope="module")
def two(place: Path) -> Iterator[LocalCloud]:
    with LocalCloud(place / "two", str(place / "model"), "--threads", "1", "--workers", "2") as cloud:
        yield cloud


@pytest.mark.long
def test_workers_that_are_killed_in_turn_change_nothing(
    place: Path, two: LocalCloud, undisturbed: dict[str, torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    def kill_mine() -> None:
        deadline = time.monotonic() + 30
        while len(pids := busy(two)) != 1:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(pids[0], signal.SIGKILL)

    killer = Killer("backward", kill_mine, 3)  # one worker twice
    trained = train(place, "run-killed", two.connection, two.edge_key, killer.watch)
    assert killer.kills == 3
    assert same(trained, undisturbed)

    deadline = time.monotonic() + 120
    while two.cloud_status()["restarts"] < killer.kills:  # the last ones are still being started again
        assert time.monotonic() < deadline
        time.sleep(0.2)
    controller = two.cloud_status()["controller_pid"]
    os.kill(controller, signal.SIGKILL)  # what it knew, it asks for
    while ask(two).get("controller_pid", controller) == controller:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    command = ("cloud", "status", "--home", two.home)
    shown = in_process(capsys, *command).stdout
    status = json.loads(in_process(capsys, *command, "--json").stdout)
    assert [worker["worker"] for worker in status["workers"]] == [0, 1]
    assert len({worker["address"] for worker in status["workers"]}) == 2
    assert status["restarts"] == sum(worker["restarts"] for worker in status["workers"]) == 3
    assert all(worker["address"] in shown for worker in status["workers"])


def busy(cloud: LocalCloud) -> list[int]:
    """The processes of the workers that have sessions, as far as the controller, which asks now and then, has heard."""
    pids = [worker["pid"] for worker in cloud.cloud_status()["workers"] if worker.get("sessions")]
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def ask(cloud: LocalCloud) -> dict[str, Any]:
    """The cloud's status; nothing while its controller is away, or has not asked all workers."""
    try:
        status = cloud.cloud_status()
    except OSError:
        return {}
    return status if all("pid" in worker for worker in status["workers"]) else {}


@pytest.mark.long
def test_a_cluster_without_its_control_store_is_started_again(
    place: Path, two: LocalCloud, undisturbed: dict[str, torch.Tensor]
) -> None:
    before = {worker["pid"] for worker in two.cloud_status()["workers"]}
    serve = json.loads((two.home / "serving.json").read_text())["pid"]

    def kill_the_control_store() -> None:
        stores = [pid for pid in children(serve) if b"gcs_server" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        assert len(stores) == 1
        os.kill(stores[0], signal.SIGKILL)
        deadline = time.monotonic() + 120
        while any(Path(f"/proc/{pid}").exists() for pid in before):  # the workers go when the supervisor ends Ray
            assert time.monotonic() < deadline
            time.sleep(0.2)

    killer = Killer("backward", kill_the_control_store, 1)
    trained = train(place, "run-store", two.connection, two.edge_key, killer.watch)
    assert killer.kills == 1
    assert same(trained, undisturbed)
    deadline = time.monotonic() + 120
    while not (status := ask(two)):  # the workers are there before the controller
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert not before & {worker["pid"] for worker in status["workers"]}
    assert "control_store_lost" in events(two)


def events(cloud: LocalCloud) -> list[str]:
    """What `serve` has logged."""
    return [json.loads(line)["event"] for line in (cloud.home / "serve.log").read_text().splitlines()]


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.long
def test_a_worker_is_added_where_calls_are_overdue_and_takes_its_part(place: Path) -> None:
    with LocalCloud(
        place / "growing", str(place / "model"), "--threads", "1", "--workers", "1:2", "--batching", "off"
    ) as cloud:
        key = cloud.home.parent / "many" / "id_ed25519"
        key.parent.mkdir(mode=0o700)
        cloud.enroll("many", key, Quota(max_sessions=8))
        assert len(cloud.cloud_status()["workers"]) == 1
        added, enough, outputs = threading.Event(), threading.Event(), [torch.empty(0)] * 6
        hidden = torch.randn(64, 128, HIDDEN, generator=torch.Generator().manual_seed(0))

        def want(number: int) -> None:
            """Nobody waits for partners here: what waits is overdue."""
            with connect(cloud.connection, key=key) as link:
                outputs[number] = link.forward_span(hidden, None, None, keep=False)[0]
                while not enough.wait(0.5 if added.is_set() else 0):  # the new worker needs the processor, too
                    assert torch.equal(link.forward_span(hidden, None, None, keep=False)[0], outputs[number])

        with ThreadPoolExecutor(len(outputs)) as pool:
            asking = [pool.submit(want, number) for number in range(len(outputs))]
            try:
                deadline = time.monotonic() + 120
                while len(cloud.cloud_status()["workers"]) < 2:
                    assert time.monotonic() < deadline
                    time.sleep(0.2)
                added.set()
                while len(status := ask(cloud).get("workers", [])) < 2 or not all(each["sessions"] for each in status):
                    assert time.monotonic() < deadline, status
                    time.sleep(0.2)
            finally:
                enough.set()
            for each in asking:
                each.result()
        assert all(torch.equal(output, outputs[0]) for output in outputs)
        assert "worker_added" in events(cloud)


@pytest.mark.long
def test_stages_that_are_killed_change_nothing(place: Path, undisturbed: dict[str, torch.Tensor]) -> None:
    # The stash holds inputs and no graph: every backward computes its forward again.
    options = ("--threads", "1", "--pipeline", "2", "--stash-bytes", "16KiB")
    with LocalCloud(place / "stages", str(place / "model"), *options) as cloud:
        stages = iter((1, 0))

        def kill_next() -> None:
            deadline = time.monotonic() + 30
            while not (status := ask(cloud)):
                assert time.monotonic() < deadline
                time.sleep(0.05)
            os.kill(status["workers"][next(stages)]["pid"], signal.SIGKILL)

        killer = Killer("backward", kill_next, 2)
        trained = train(place, "run-stages", cloud.connection, cloud.edge_key, killer.watch)
        assert killer.kills == 2
        assert same(trained, undisturbed)
        deadline = time.monotonic() + 60
        # The controller asks twice a second.
        while not (status := ask(cloud)) or not all(worker["recomputed"] for worker in status["workers"]):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert [(worker["span"], worker["front"]) for worker in status["workers"]] == [("2:3", True), ("3:5", False)]
        assert stat.S_IMODE((cloud.home / "pipeline" / "1" / "id_ed25519").stat().st_mode) == 0o600
        assert cloud.stop() == 0
    assert not (cloud.home / "pipeline").exists()
