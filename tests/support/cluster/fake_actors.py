"""A Ray cluster of plain objects: named actors that answer at once, not now, or never again, and workers on nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from isthmus.cloud.cluster.cluster_spec import Claims
from isthmus.cloud.control.ray_cluster import ActorGoneError, MethodError, NoAnswerError
from isthmus.cloud.directory import Peer, Report, SessionEntry, Update
from isthmus.cloud.nodes.deliveries import Delivery, NodeReport
from isthmus.cloud.nodes.node_worker import NodeSpec, spec_digest
from isthmus.protocol.limits import MAX_WORKERS
from isthmus.protocol.secure.certificates import CertificateRequest, WorkerCertificate


class FakeAnswer:
    """An answer that is there, or comes when its actor answers again."""

    def __init__(self, actor: FakeActor, method: str, arguments: tuple[object, ...]) -> None:
        self._actor, self._call = actor, (method, arguments)
        self._outcome: tuple[Any, BaseException | None] | None = None
        self._settle()

    def _settle(self) -> None:
        if self._outcome is None and (self._actor.is_gone or not self._actor.is_silent):
            self._outcome = self._actor.carry_out(*self._call)

    def is_ready(self) -> bool:
        self._settle()
        return self._outcome is not None

    def result(self, seconds: float | None = None) -> Any:
        self._settle()
        if self._outcome is None:
            raise NoAnswerError("GetTimeoutError")
        value, error = self._outcome
        if error is not None:
            raise error
        return value


class FakeActor:
    """An actor around an object of the test; `calls` are the methods that it has been asked for."""

    def __init__(self, name: str, inner: Any) -> None:
        self.name, self.inner = name, inner
        self.is_silent = self.is_gone = self.was_killed = False
        self.calls: list[tuple[str, tuple[object, ...]]] = []

    def ask(self, method: str, *arguments: object) -> FakeAnswer:
        self.calls.append((method, arguments))
        return FakeAnswer(self, method, arguments)

    def kill(self) -> None:
        self.was_killed = self.is_gone = True

    def carry_out(self, method: str, arguments: tuple[object, ...]) -> tuple[Any, BaseException | None]:
        if self.is_gone:
            return None, ActorGoneError("The actor is dead because its node has died.")
        try:
            return getattr(self.inner, method)(*arguments), None
        except Exception as error:  # noqa: BLE001  # as Ray hands on whatever a method raises
            return None, MethodError(error)


@dataclass
class FakeCluster:
    """The actors of a cluster by their names, as Ray's control store knows them.

    Attributes:
        make: makes what is inside an actor, of its class and argument.
        started: the names of actors in the order of their starts, and what they claim.
    """

    make: Callable[[type, Any], Any]
    actors: dict[str, FakeActor] = field(default_factory=dict)
    started: list[tuple[str, Claims]] = field(default_factory=list)
    environments: dict[str, dict[str, str]] = field(default_factory=dict)

    def start_anywhere(
        self, kind: type, argument: Any, *, name: str, environment: Mapping[str, str], claims: Claims
    ) -> FakeActor:
        found = self.find_actor(name)
        if found is not None:
            return found
        self.started.append((name, claims))
        self.environments[name] = dict(environment)
        actor = self.actors[name] = FakeActor(name, self.make(kind, argument))
        return actor

    def start_here(self, kind: type, argument: Any, *, name: str, environment: Mapping[str, str]) -> FakeActor:
        return self.start_anywhere(kind, argument, name=name, environment=environment, claims=Claims())

    def find_actor(self, name: str) -> FakeActor | None:
        found = self.actors.get(name)
        return None if found is None or found.is_gone else found

    def named_actors(self, name_of: Callable[[int], str]) -> dict[int, FakeActor]:
        found = {number: self.find_actor(name_of(number)) for number in range(MAX_WORKERS)}
        return {number: actor for number, actor in found.items() if actor is not None}

    def wait_for(self, answers: Iterable[FakeAnswer], seconds: float) -> None:
        for answer in answers:
            answer.is_ready()


class FakeWorker:
    """A worker on a node: it asks for a certificate, then serves with what was delivered.

    Attributes:
        waits: what else it waits for, once it is certified.
        fault: why it keeps no delivery.
        renews: whether it asks for a new certificate although it has one.
        sessions: how many sessions it reports; `overdue` and `waiting` calls beside them.
    """

    def __init__(self, spec: NodeSpec, node: Ed25519PrivateKey, now: Callable[[], float]) -> None:
        self.spec, self.node, self._now = spec, node, now
        self.number = spec.worker.number
        self.key = Ed25519PrivateKey.generate()
        self.host, self.pid = f"10.0.0.{self.number + 1}", 100 + self.number
        self.waits, self.failure, self.fault, self.renews, self.restarts = "", "", "", False, 0
        self.has_model, self.adapters = True, dict[str, int]()
        self.sessions, self.overdue, self.waiting = 0, 0, 0
        self.delivery, self.revision, self.certificate = Delivery(), "", ""
        self.deliveries: list[Delivery | None] = []
        self.updates: list[Update] = []
        self.drained: list[float] = []
        self.drains = True  # whether all calls are answered within the grace

    @property
    def raw(self) -> bytes:
        return self.key.public_key().public_bytes_raw()

    @property
    def place(self) -> str:
        return f"{self.host}:{7443 + self.number}"

    @property
    def is_certified(self) -> bool:
        return bool(self.certificate) and WorkerCertificate.from_json(self.certificate).worker == self.raw

    def exchange(self, update: Update, delivery: Delivery | None) -> NodeReport:
        self.updates.append(update)
        self.deliveries.append(delivery)
        if delivery is not None and not self.fault:
            self.delivery, self.revision = delivery, delivery.revision
            self.certificate = delivery.certificate or self.certificate
        if update.restarts is not None:
            self.restarts = update.restarts
        waits = self.waits if self.is_certified else "its certificate"
        asks = not self.is_certified or self.renews
        return NodeReport(
            self._report(serving=not waits and not self.failure),
            self.raw,
            f"gpu-{self.number} ({self.host})",
            self.place,
            CertificateRequest.make(self.node, self.spec.root, self.raw, self._now()),
            asks,
            self.revision,
            self.has_model,
            dict(self.adapters),
            waits,
            self.failure,
            self.fault,
            spec_digest(self.spec),
        )

    def metrics(self) -> bytes:
        return b"# TYPE isthmus_positions counter\nisthmus_positions 7\n"

    def drain(self, grace: float) -> bool:
        self.drained.append(grace)
        return self.drains

    def _report(self, *, serving: bool) -> Report:
        status: dict[str, Any] = {
            **{"worker": self.number, "address": self.place, "pid": self.pid, "restarts": self.restarts},
            "positions": 0.0,
        }
        state = "draining" if self.drained else "serving"
        if not serving:
            return Report({**status, "state": "starting", "waits": self.waits}, None)
        status |= {
            **{
                "span": "2:4",
                "state": "draining" if self.drained else "serving",
                "model": "tiny",
                "plan": "2:2",
                "span_dtype": "fp32",
            },
            **{"uptime_s": 1.0, "certificate_not_after": 2000, "sessions": {}, "waiting": {}, "deadlines": {}},
            **{"queue_depth": self.waiting, "overdue": self.overdue, "in_flight": 0},
            **{"span_bytes": 10, "stash_bytes": 5, "stash_budget_bytes": 50},
            **{"graphs_evicted": 0, "inputs_evicted": 0, "recomputed": 0},
            **{"caches": 0, "cache_bytes": 0, "cache_budget_bytes": 0, "caches_evicted": 0, "caches_lost": 0},
        }
        entries = tuple(SessionEntry("alice", f"link{at}", float(at)) for at in range(self.sessions))
        return Report(status, None if self.spec.inner else Peer(self.place, state, entries))
