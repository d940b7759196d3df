"""A relay of IP packets between two TUN devices, which makes of two network namespaces a long way.

It holds every packet for half a round trip and, where it is asked to, loses, doubles and reorders packets or lets
nothing through for a while: what `tc netem` does, on kernels that lack it. What happens to a packet is decided by
`PacketSchedule`, which is pure; the loop around it reads, waits and writes.

As a process it is given `ends`, inherited descriptors of TUN devices (without packet information), and `conditions`.
Each question has new conditions, and is answered when they have begun. The relay ends when the questions do, so it
never outlives its parent.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import json
import os
import random
import select
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

REORDER_SECONDS = 0.005  # a reordered packet is held so much longer: some 40 packets of 1500 bytes at 100 Mbit/s
LARGEST_PACKET = 1 << 16
LARGEST_COMMAND = 1 << 16
AT_ONCE = 64  # packets read from one end before due ones are delivered, so that a flood delays nobody
PRIORITY = 1  # of the real-time scheduler: a wire is punctual however busy the machine is


@dataclass(frozen=True, slots=True)
class Conditions:
    """What the way does to packets; each direction is treated alike and has random draws of its own.

    Args:
        rtt_s: seconds of a round trip; a packet is held for half of it.
        loss: probability that a packet is lost.
        duplicate: probability that it arrives twice.
        reorder: probability that it is held for `REORDER_SECONDS` more, so that later ones overtake it.
        silence_s: seconds, from the beginning of the conditions on, during which every packet sent is lost.
        seed: of the random draws; the n-th packet of a direction always has the same fate.
    """

    rtt_s: float = 0.0
    loss: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    silence_s: float = 0.0
    seed: int = 0


class PacketSchedule:
    """Which packet leaves at which end, and when.

    Args:
        clock: seconds, never running backwards; the schedule starts when it is made.
    """

    def __init__(self, conditions: Conditions, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._held: list[tuple[float, int, int, bytes]] = []  # when, order of arrival, end to leave at, packet
        self._numbers = itertools.count()
        self.change(conditions)

    def change(self, conditions: Conditions) -> None:
        """Treat packets otherwise from now on; those that are on their way arrive as they would have."""
        self._conditions = conditions
        self._start = self._clock()
        self._draws = tuple(random.Random(f"{conditions.seed}/{end}") for end in (0, 1))  # noqa: S311 - no secret

    def add(self, end: int, packet: bytes) -> None:
        """A packet came in at `end` (0 or 1), now."""
        conditions, now = self._conditions, self._clock()
        # Always three draws, so that one option does not change what another one does to a packet.
        lost, twice, late = (
            self._draws[end].random() < chance for chance in (conditions.loss, conditions.duplicate, conditions.reorder)
        )
        if lost or now - self._start < conditions.silence_s:
            return
        due = now + conditions.rtt_s / 2 + (REORDER_SECONDS if late else 0.0)
        for _ in range(1 + twice):
            heapq.heappush(self._held, (due, next(self._numbers), 1 - end, packet))

    def due(self) -> Iterator[tuple[int, bytes]]:
        """Packets that have to leave now, and the end of each, in the order in which they were due."""
        now = self._clock()
        while self._held and self._held[0][0] <= now:
            _, _, end, packet = heapq.heappop(self._held)
            yield end, packet

    def wait(self) -> float | None:
        """Seconds until the next packet is due, 0 where one is late; None where none is held."""
        return max(0.0, self._held[0][0] - self._clock()) if self._held else None


def relay(ends: tuple[int, int], schedule: PacketSchedule, commands: int, answers: int) -> None:
    """Relay packets until `commands` ends.

    Args:
        ends: descriptors of which each read and each write is one packet.
        commands: a descriptor; each line from it is the JSON of new conditions.
        answers: a descriptor; a line, `null`, goes to it when conditions have begun.
    """
    for end in ends:
        os.set_blocking(end, False)
    begun = b""
    while True:
        readable, _, _ = select.select([commands, *ends], [], [], schedule.wait())
        if commands in readable:
            command = os.read(commands, LARGEST_COMMAND)
            if not command:
                return
            *lines, begun = (begun + command).split(b"\n")
            for line in lines:
                schedule.change(Conditions(**json.loads(line)))
                os.write(answers, b"null\n")
        for number, end in enumerate(ends):
            if end in readable:
                for packet in _packets(end):
                    schedule.add(number, packet)
        for number, packet in schedule.due():
            os.write(ends[number], packet)


def _packets(end: int) -> Iterator[bytes]:
    with contextlib.suppress(BlockingIOError):
        for _ in range(AT_ONCE):
            yield os.read(end, LARGEST_PACKET)


def main(task: dict[str, Any]) -> None:
    """Relay as the task says; see the module."""
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(PRIORITY))
    first, second = task["ends"]
    schedule = PacketSchedule(Conditions(**task["conditions"]))
    os.write(sys.stdout.fileno(), b"null\n")  # it is there
    relay((first, second), schedule, sys.stdin.fileno(), sys.stdout.fileno())


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
