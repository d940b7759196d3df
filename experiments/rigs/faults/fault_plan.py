"""Which fault is injected when, and whether it counts. Pure: moments come in, faults come out, nothing is broken here.

One fault is open at a time. It counts when the edge is seen to have repeated a call because of it: its count of retries
has grown, or, where the edge itself was killed, the resumed edge has repeated the call that was in flight and got its
answer. A fault that turns out to have disturbed nothing does not count and is injected again.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

CALLS: Final = ("forward", "backward")

# What a phase waits for: the questions, and how far one of them has to be.
TRIGGERS: Final[dict[str, tuple[tuple[str, ...], str]]] = {
    "handshake": (("handshake",), "sending"),
    "forward_sending": (("forward",), "sending"),
    "forward_waiting": (("forward",), "waiting"),
    "forward_receiving": (("forward",), "waiting"),  # armed before the answer comes
    "backward_sending": (("backward",), "sending"),
    "backward_waiting": (("backward",), "waiting"),
    "backward_receiving": (("backward",), "waiting"),
    "cloud_away": (CALLS, "sending"),
    "worker_killed": (CALLS, "waiting"),
    "edge_killed": (CALLS, "waiting"),
    "cloud_restarted": (("forward",), "waiting"),
    "stash_evicted": (("backward",), "sending"),
    "decode_sending": (("decode",), "sending"),
    "decode_waiting": (("decode",), "waiting"),
    "decode_receiving": (("decode",), "waiting"),
    "decode_worker_killed": (("decode",), "waiting"),
}
PHASES: Final = tuple(TRIGGERS)
ANSWER_PHASES: Final = tuple(phase for phase, (questions, _) in TRIGGERS.items() if questions == ("decode",))
"""Those of an answer that is generated; the others are of a training."""
# The answer is held back for these: otherwise it might be with the edge before the fault is.
HELD: Final = (
    *("forward_waiting", "forward_receiving", "backward_waiting", "backward_receiving", "worker_killed"),
    *("decode_waiting", "decode_receiving", "decode_worker_killed"),
)
# A drained cloud answers the call in flight: it is the next one that fails.
PATIENCE: Final = {"cloud_restarted": 2}
EXHAUSTED = 4  # a phase may be tried so many times as often as it has to count
SPREAD = 0.9  # the part of the run over which the faults are spread


@dataclass(frozen=True, slots=True)
class Moment:
    """A phase of a question as it begins on the edge.

    Args:
        question: "handshake", "forward", "backward", "decode", or another message's name.
        phase: "sending", "waiting", "receiving" or "idle".
        step: the optimizer step under way, or the token of an answer, the first of which comes with the prompt; from 1.
            What is repeated has the same one.
        retries: the edge's count of repeated attempts so far.
        bytes_up: bytes of frames that the edge has handed to the stream so far.
    """

    question: str
    phase: str
    step: int
    retries: int
    bytes_up: int


@dataclass(frozen=True, slots=True)
class Fault:
    """One injection: the phase, and which of its kind, from 0."""

    phase: str
    number: int


@dataclass(slots=True)
class _Open:
    fault: Fault
    moment: Moment
    life: int
    sendings: int = 0


class FaultPlan:
    """Decides.

    Args:
        per_phase: faults of each phase that have to count.
        steps: of the run, as in `Moment`.

    Attributes:
        wanted: faults that have to count in all.
        counted: faults that have counted so far, by phase.
    """

    def __init__(self, phases: Sequence[str], per_phase: int, steps: int) -> None:
        # The small activation cache comes with the first restart of the cloud, so that evictions come after it.
        late = [phase for phase in ("cloud_restarted", "stash_evicted") if phase in phases]
        early = [phase for phase in phases if phase not in late]
        order = [Fault(phase, number) for number in range(per_phase) for phase in early]
        order += [Fault(phase, number) for phase in late for number in range(per_phase)]
        self.wanted = len(order)
        self._queue = deque(order)
        self._due = deque(1 + int(index * SPREAD * steps / len(order)) for index in range(len(order)))
        self._open: _Open | None = None
        self._life = 0
        self._tries: Counter[str] = Counter()
        self._most = per_phase * EXHAUSTED
        self.counted: Counter[str] = Counter()

    @property
    def left(self) -> int:
        """Faults that have still to count."""
        return len(self._queue) + (self._open is not None)

    @property
    def injected(self) -> int:
        """Faults injected so far, also those that did not count."""
        return self._tries.total()

    def reborn(self) -> None:
        """The edge's process was started again; its counts start at zero."""
        self._life += 1

    def settle(self, moment: Moment) -> bool | None:
        """Whether the open fault has counted; None where this moment does not say, and where no fault is open."""
        pending = self._open
        if pending is None:
            return None
        if self._life != pending.life:
            then = pending.moment
            repeated = (moment.step, moment.question, moment.phase) == (then.step, then.question, "idle")
            return self._close(pending.fault, counted=True) if repeated else None
        if moment.retries > pending.moment.retries:
            return self._close(pending.fault, counted=True)
        pending.sendings += moment.phase == "sending"
        if pending.sendings < PATIENCE.get(pending.fault.phase, 1):
            return None
        return self._close(pending.fault, counted=False)

    def choose(self, moment: Moment) -> Fault | None:
        """The fault to inject at this moment, if there is one."""
        if not self._next_is_due(moment, PHASES):
            return None
        fault = self._queue[0]
        if not _meets(fault, moment) or moment.phase != TRIGGERS[fault.phase][1]:
            return None
        self._queue.popleft()
        self._due.popleft()
        self._tries[fault.phase] += 1
        self._open = _Open(fault, moment, self._life)
        return fault

    def wants_reconnect(self, moment: Moment) -> bool:
        """Whether to break the connection now, because the next fault is one of the handshake and needs a new one."""
        return self._next_is_due(moment, ("handshake",)) and moment.question in CALLS and moment.phase == "sending"

    def wants_hold(self, moment: Moment) -> bool:
        """Whether to hold back the answer to the question that begins now, because the next fault falls before it."""
        return self._next_is_due(moment, HELD) and _meets(self._queue[0], moment) and moment.phase == "sending"

    def _next_is_due(self, moment: Moment, phases: Sequence[str]) -> bool:
        """Whether the next fault may fall now, and is one of these."""
        free = self._open is None and bool(self._queue)
        return free and moment.step >= self._due[0] and self._queue[0].phase in phases

    def _close(self, fault: Fault, *, counted: bool) -> bool:
        self._open = None
        self.counted[fault.phase] += counted
        if not counted and self._tries[fault.phase] < self._most:
            self._queue.appendleft(fault)
            self._due.appendleft(0)
        return counted


def _meets(fault: Fault, moment: Moment) -> bool:
    """Whether the moment belongs to a question that the fault waits for."""
    questions, _ = TRIGGERS[fault.phase]
    if len(questions) > 1:  # forward and backward take turns
        questions = (questions[fault.number % 2],)
    return moment.question in questions
