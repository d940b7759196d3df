"""Faults: whatever breaks between an edge and a cloud, the adapter is the undisturbed run's, bit for bit.

Two runs of the same training: one that nobody disturbs, and one whose traffic goes through a relay that breaks it on
command, whose worker and edge are killed, whose cloud is restarted and forgets forward states. The edge stops at every
phase of every call until this process lets it go on, so a fault falls where it is meant to. See
`isthmus.experiments.rigs.faults.fault_plan` for which faults count.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from isthmus.common.errors import IsthmusError
from isthmus.edge.client.link import Link, connect
from isthmus.experiments.harness.bench_flags import names_of
from isthmus.experiments.harness.launch import LocalCloud, stderr_progress
from isthmus.experiments.harness.prose import write_jsonl
from isthmus.experiments.harness.rig_settings import FaultSettings
from isthmus.experiments.harness.tickets import make_tickets
from isthmus.experiments.rigs.faults.fault_edge import Edge
from isthmus.experiments.rigs.faults.fault_plan import PHASES, Fault, FaultPlan, Moment
from isthmus.experiments.rigs.network.relay import Direction, Relay
from isthmus.protocol.enrolment import ConnectionString

PASSED_SECONDS = 10.0  # a question that the edge has queued is through the relay within this time
AWAY_SECONDS = 1.5
MIDDLE = 2048  # bytes into a question; even a tiny model's are several times as long
# Bytes into a handshake: in the middle of the server's keys, and of the edge's sealed identity.
IN_HANDSHAKE: dict[Direction, int] = {"down": 700, "up": 900}


def run_faults(settings: FaultSettings, folder: Path) -> dict[str, Any]:
    """Run both trainings and compare them; see the module.

    Returns:
        The figures of `isthmus bench faults`.

    Raises:
        ConfigError: an unknown phase.
        IsthmusError: the cloud did not start, or an edge ended with an error that no fault explains.
    """
    phases = names_of(settings.phases, "phases", PHASES)
    write_texts(folder / "tickets.jsonl", 4 * settings.steps)
    started = time.monotonic()
    with _Clouds(settings, folder) as clouds:
        task = _task(settings, folder, "undisturbed", clouds.address, clouds.key)
        with Edge(task, folder / "undisturbed.log", watched=False) as edge:
            edge.finish()
        plan = FaultPlan(phases, settings.per_phase, settings.steps)
        with Relay(*clouds.endpoint) as relay, stderr_progress("faults", plan.wanted) as advance:
            run = _DisturbedRun(settings, folder, clouds, relay, plan, advance)
            run.run()
    counted = plan.counted
    return {
        "faults": counted.total(),
        "faults_injected": plan.injected,
        "faults_by_phase": {phase: counted[phase] for phase in phases},
        **compare_runs(settings.steps, folder / "undisturbed", folder / "disturbed"),
        "retries": run.retries,
        "seconds": round(time.monotonic() - started, 1),
        **{name: value for name, value in dataclasses.asdict(settings).items() if name != "phases"},
    }


class _Clouds:
    """The cloud, its successor with a small activation cache, and a second tenant who fills that cache."""

    def __init__(self, settings: FaultSettings, folder: Path) -> None:
        self._settings = settings
        self._folder = folder
        self._cloud = self._new()
        self._other_key = folder / "other" / "id_ed25519"
        self._other: Link | None = None
        self.key = self._cloud.edge_key

    @property
    def address(self) -> ConnectionString:
        """The running cloud's connection string."""
        return ConnectionString.parse(self._cloud.connection)

    @property
    def endpoint(self) -> tuple[str, int]:
        """Host and port of the running cloud."""
        return self.address.host, self.address.port

    def kill_worker(self) -> None:
        """SIGKILL the worker's process; Ray starts another one on the same port."""
        os.kill(self._cloud.status()["pid"], signal.SIGKILL)

    def restart(self) -> None:
        """Drain and end the cloud, and start one whose activation cache is small.

        Raises IsthmusError where it left a call unanswered.
        """
        hidden_size = self._second_tenant().info.hidden_size
        self._leave()
        code = self._cloud.stop()
        if code:
            raise IsthmusError(
                f"the drained cloud ended with exit code {code}; its output is in {self._folder / 'serve.log'}"
            )
        state = self._settings.batch * self._settings.seq * hidden_size * 4
        self._cloud = self._new("--stash-bytes", str(2 * state))
        self._cloud.start()

    def evict(self) -> None:
        """Fill the small activation cache as another tenant, so that all other forward states and inputs are lost."""
        other = self._second_tenant()
        batch, seq = self._settings.batch, self._settings.seq
        hidden = torch.randn(2 * batch, seq, other.info.hidden_size)
        other.forward_span(hidden, None, None, keep=True)

    def __enter__(self) -> _Clouds:
        try:
            self._cloud.start()
            self._cloud.enroll("other", self._other_key)
        except BaseException:
            self._cloud.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._leave()
        self._cloud.stop()

    def _new(self, *options: str) -> LocalCloud:
        settings = self._settings
        plan = ("--edge-layers", settings.edge_layers, "--threads", str(settings.threads))
        return LocalCloud(self._folder, settings.model, *plan, *options)

    def _second_tenant(self) -> Link:
        if self._other is None:
            self._other = connect(str(self.address), key=self._other_key)
        return self._other

    def _leave(self) -> None:
        if self._other is not None:
            self._other.close()
            self._other = None


@dataclasses.dataclass
class _DisturbedRun:
    """The training that is disturbed."""

    settings: FaultSettings
    folder: Path
    clouds: _Clouds
    relay: Relay
    plan: FaultPlan
    advance: Callable[[], None]
    retries: int = 0
    asked: tuple[int, int] = (0, 0)
    """Bytes at the beginning of the question: passed by the relay, and handed over by the edge."""

    def run(self) -> None:
        """Train to the end, with as many edges as that takes."""
        while not self._one_life():
            self.plan.reborn()

    def _one_life(self) -> bool:
        """Run one edge; True if it came to the training's end, False if it was killed."""
        address = ConnectionString("127.0.0.1", self.relay.port, self.clouds.address.pin)
        last = 0
        task = _task(self.settings, self.folder, "disturbed", address, self.clouds.key)
        with Edge(task, self.folder / "disturbed.log") as edge:
            for moment in edge.moments():
                last = moment.retries
                if self._at(moment, edge):
                    self.retries += last
                    return False
            self.retries += last
            edge.finish()
        return True

    def _at(self, moment: Moment, edge: Edge) -> bool:
        """Do what this moment asks for; True if the edge was killed in it."""
        counted = self.plan.settle(moment)
        if counted is not None:
            self.relay.disarm()
            if counted:
                self.advance()
        if moment.phase == "sending":
            self.asked = (self.relay.bytes_passed("up"), moment.bytes_up)
            self.relay.release()
            if self.plan.wants_hold(moment):
                self.relay.hold_after(MIDDLE, "down")  # the stream's own small frames pass; no answer is so short
        if self.plan.wants_reconnect(moment):
            self.relay.cut()
        fault = self.plan.choose(moment)
        if fault is None:
            return False
        if fault.phase == "edge_killed":
            edge.kill()
            return True
        self._inject(fault, moment)
        return False

    def _inject(self, fault: Fault, moment: Moment) -> None:
        relay, size = self.relay, moment.bytes_up - self.asked[1]
        match fault.phase:
            case "handshake":
                direction: Direction = "up" if fault.number % 2 else "down"
                relay.cut_after(IN_HANDSHAKE[direction], direction)
            case "forward_sending" | "backward_sending":
                relay.cut_after(MIDDLE * (1 + fault.number % 3), "up")
            case "forward_waiting" | "backward_waiting":
                self._delivered(size)
                relay.cut()
            case "forward_receiving" | "backward_receiving":
                relay.cut_after(size // 2, "down")  # an answer is about as long as its question
                relay.release()
            case "cloud_away":
                relay.refuse_for(AWAY_SECONDS)
                relay.cut()
            case "worker_killed":
                self._delivered(size)
                self.clouds.kill_worker()
                relay.cut()  # an answer that it had sent by then is lost with it
            case "cloud_restarted":
                self._delivered(size)
                self.clouds.restart()
                relay.point_at(*self.clouds.endpoint)
            case "stash_evicted":
                self.clouds.evict()

    def _delivered(self, size: int) -> None:
        """Wait until the whole question is through the relay: only then the cloud is at work on it."""
        self.relay.wait_passed("up", self.asked[0] + size, PASSED_SECONDS)


def write_texts(path: Path, count: int) -> None:
    """Tickets as plain text: every token has a label, so that even the shortest `seq` leaves something to learn."""
    write_jsonl(path, ({"text": ticket.prompt + ticket.completion} for ticket in make_tickets(count)))


def _task(settings: FaultSettings, folder: Path, name: str, cloud: ConnectionString, key: Path) -> dict[str, Any]:
    """The fields of `TrainConfig`: LoRA with dropout, so that the random state has to be resumed too."""
    return {
        "cloud": str(cloud),
        "key": str(key),
        "data": str(folder / "tickets.jsonl"),
        "validation_split": 0.0,
        "out": str(folder / name),
        "steps": settings.steps,
        "batch": settings.batch,
        "max_length": settings.seq,
        "learning_rate": 1e-3,
        "dropout": 0.1,
        "save_every": settings.save_every,
        "threads": settings.threads,
        "resume": True,
    }


def compare_runs(steps: int, undisturbed: Path, disturbed: Path) -> dict[str, Any]:
    """What of a disturbed run's folder differs from the undisturbed run's.

    Args:
        undisturbed: folder with `losses.jsonl` and `adapter/`, as the trainer leaves it.
    """
    logs = [(out / "losses.jsonl").read_text().splitlines() for out in (undisturbed, disturbed)]
    seen = Counter(json.loads(line)["step"] for line in logs[1])
    one, other = (load_file(out / "adapter" / "adapter_model.safetensors") for out in (undisturbed, disturbed))
    return {
        "steps_lost": sum(not seen[step] for step in range(1, steps + 1)),
        "steps_doubled": sum(count > 1 for count in seen.values()),
        "adapter_identical": one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one),
        "losses_identical": logs[0] == logs[1],
        "lora_b_max_abs": max(float(tensor.abs().max()) for name, tensor in other.items() if "lora_B" in name),
    }
