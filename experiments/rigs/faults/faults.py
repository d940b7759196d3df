"""Faults: whatever breaks between an edge and a cloud, the adapter is the undisturbed run's, bit for bit, and an answer
that is generated has its text.

Two runs of the same training: one that nobody disturbs, and one whose traffic goes through a relay that breaks it on
command, whose worker and edge are killed, whose cloud is restarted and forgets forward states. Then two of the same
answer, in one of which the connection is cut and the worker killed. The edge stops at every phase of every call until
this process lets it go on, so a fault falls where it is meant to. See `isthmus.experiments.rigs.faults.fault_plan` for
which faults count.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file

from isthmus.common.errors import IsthmusError
from isthmus.edge.client.link import Link, connect
from isthmus.experiments.harness.bench_flags import names_of
from isthmus.experiments.harness.launch import LocalCloud, stderr_progress
from isthmus.experiments.harness.prose import write_jsonl
from isthmus.experiments.harness.rig_settings import FaultSettings
from isthmus.experiments.harness.tickets import make_tickets
from isthmus.experiments.rigs.faults import answering_edge
from isthmus.experiments.rigs.faults.fault_edge import Edge
from isthmus.experiments.rigs.faults.fault_plan import ANSWER_PHASES, PHASES, Fault, FaultPlan, Moment
from isthmus.experiments.rigs.network.relay import Direction, Relay
from isthmus.protocol.enrolment import ConnectionString

PROMPT = "Hello, my card was charged twice for the"
PASSED_SECONDS = 10.0  # a question that the edge has queued is through the relay within this time
AWAY_SECONDS = 1.5
# Bytes into a question or an answer: even a tiny model's are twice as long, those of many tokens and of one.
MIDDLE, MIDDLE_OF_ONE = 2048, 64
# Bytes into a handshake: in the middle of the server's keys, and of the edge's sealed identity.
IN_HANDSHAKE: dict[Direction, int] = {"down": 700, "up": 900}


def run_faults(settings: FaultSettings, folder: Path) -> dict[str, Any]:
    """Run both trainings and both answers, and compare them; see the module.

    Returns:
        The figures of `isthmus bench faults`; of the training or the answer, only where a phase of it is broken.

    Raises:
        ConfigError: an unknown phase.
        IsthmusError: the cloud did not start, or an edge ended with an error that no fault explains.
    """
    phases = names_of(settings.phases, "phases", PHASES)
    kinds: tuple[type[_Training | _Answer], ...] = (_Training, _Answer)
    works: list[_Work] = [kind(settings, folder) for kind in kinds if not set(kind.phases).isdisjoint(phases)]
    broken = [[phase for phase in phases if phase in work.phases] for work in works]
    plans = [FaultPlan(each, settings.per_phase, work.steps) for each, work in zip(broken, works, strict=True)]
    started, retries = time.monotonic(), 0
    with (
        _Clouds(settings, folder) as clouds,
        stderr_progress("faults", sum(plan.wanted for plan in plans)) as advance,
    ):
        for work, plan in zip(works, plans, strict=True):
            with work.edge("undisturbed", clouds.address, clouds.key, watched=False) as edge:
                edge.finish()
            with Relay(*clouds.endpoint) as relay:
                run = _DisturbedRun(work, clouds, relay, plan, advance)
                run.run()
            retries += run.retries
    counted = sum((plan.counted for plan in plans), Counter[str]())
    return {
        "faults": counted.total(),
        "faults_injected": sum(plan.injected for plan in plans),
        "faults_by_phase": {phase: counted[phase] for phase in phases},
        **{name: value for work in works for name, value in work.compared().items()},
        "retries": retries,
        "seconds": round(time.monotonic() - started, 1),
        **{name: value for name, value in dataclasses.asdict(settings).items() if name != "phases"},
    }


class _Work(Protocol):
    """What an edge does twice: undisturbed and disturbed."""

    @property
    def phases(self) -> Sequence[str]:
        """Those that can be broken in it."""

    @property
    def steps(self) -> int:
        """As in `Moment`."""

    def edge(self, name: str, cloud: ConnectionString, key: Path, *, watched: bool = True) -> Edge:
        """An edge that does it, and goes on where one of the same name was killed."""

    def compared(self) -> dict[str, Any]:
        """What the disturbed one differs in."""


class _Training:
    """A training: LoRA with dropout, so that the random state has to be resumed too."""

    phases = tuple(phase for phase in PHASES if phase not in ANSWER_PHASES)

    def __init__(self, settings: FaultSettings, folder: Path) -> None:
        self._settings, self._folder, self._data = settings, folder, folder / "tickets.jsonl"
        self.steps = settings.steps
        write_texts(self._data, 4 * settings.steps)

    def edge(self, name: str, cloud: ConnectionString, key: Path, *, watched: bool = True) -> Edge:
        """See `_Work`."""
        settings = self._settings
        config = {  # the fields of `TrainConfig`
            "cloud": str(cloud),
            "key": str(key),
            "data": str(self._data),
            "validation_split": 0.0,
            "out": str(self._folder / name),
            "steps": settings.steps,
            "batch": settings.batch,
            "max_length": settings.seq,
            "learning_rate": 1e-3,
            "dropout": 0.1,
            "save_every": settings.save_every,
            "threads": settings.threads,
            "resume": True,
        }
        return Edge(config, self._folder / f"{name}.log", watched=watched)

    def compared(self) -> dict[str, Any]:
        """See `compare_runs`."""
        return compare_runs(self.steps, self._folder / "undisturbed", self._folder / "disturbed")


class _Answer:
    """An answer: sampled, as greedy ones of a small model repeat a few tokens, whatever its caches have."""

    phases = ANSWER_PHASES

    def __init__(self, settings: FaultSettings, folder: Path) -> None:
        self._settings, self._folder = settings, folder
        self.steps = settings.tokens

    def edge(self, name: str, cloud: ConnectionString, key: Path, *, watched: bool = True) -> Edge:
        """See `_Work`."""
        config = {  # see `answering_edge`
            "cloud": str(cloud),
            "key": str(key),
            "prompt": PROMPT,
            "max_new_tokens": self._settings.tokens,
            "temperature": 1.0,
            "seed": 0,
            "threads": self._settings.threads,
            "out": str(self._file(name)),
        }
        return Edge(config, self._folder / f"{name}-answer.log", watched=watched, module=answering_edge.MODULE)

    def compared(self) -> dict[str, Any]:
        """See `compare_answers`."""
        return compare_answers(self._file("undisturbed"), self._file("disturbed"))

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}-answer.json"


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
        """SIGKILL the worker's process; Ray starts another one on the same port.

        Raises UnreachableError where the one before has had no successor for too long.
        """
        os.kill(self._cloud.worker(), signal.SIGKILL)

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
    """The work that is disturbed."""

    work: _Work
    clouds: _Clouds
    relay: Relay
    plan: FaultPlan
    advance: Callable[[], None]
    retries: int = 0
    asked: tuple[int, int] = (0, 0)
    """Bytes at the beginning of the question: passed by the relay, and handed over by the edge."""

    def run(self) -> None:
        """Work to the end, with as many edges as that takes."""
        while not self._one_life():
            self.plan.reborn()

    def _one_life(self) -> bool:
        """Run one edge; True if it came to the work's end, False if it was killed."""
        address = ConnectionString("127.0.0.1", self.relay.port, self.clouds.address.pin)
        last = 0
        with self.work.edge("disturbed", address, self.clouds.key) as edge:
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
                # The stream's own small frames pass; no answer is so short.
                self.relay.hold_after(_middle(moment.question), "down")
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
            case "forward_sending" | "backward_sending" | "decode_sending":
                relay.cut_after(_middle(moment.question) * (1 + fault.number % 3), "up")
            case "forward_waiting" | "backward_waiting" | "decode_waiting":
                self._delivered(size)
                relay.cut()
            case "forward_receiving" | "backward_receiving" | "decode_receiving":
                relay.cut_after(size // 4, "down")  # after what passed already; an answer is about as long
                relay.release()
            case "cloud_away":
                relay.refuse_for(AWAY_SECONDS)
                relay.cut()
            case "worker_killed" | "decode_worker_killed":
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


def _middle(question: str) -> int:
    return MIDDLE_OF_ONE if question == "decode" else MIDDLE


def write_texts(path: Path, count: int) -> None:
    """Tickets as plain text: every token has a label, so that even the shortest `seq` leaves something to learn."""
    write_jsonl(path, ({"text": ticket.prompt + ticket.completion} for ticket in make_tickets(count)))


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


def compare_answers(undisturbed: Path, disturbed: Path) -> dict[str, Any]:
    """Whether two answers are the same, and how much of the disturbed one's caches was lost.

    Args:
        undisturbed: What `isthmus.experiments.rigs.faults.answering_edge` has written.
    """
    one, other = (json.loads(path.read_text()) for path in (undisturbed, disturbed))
    return {
        "answer_identical": (one["text"], one["tokens"]) == (other["text"], other["tokens"]),
        "answer_replayed": other["replayed"],
    }
