"""The relay: every packet's fate and time by a clock of the test's own, and the loop over real descriptors."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import socket
import struct
import termios
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, strategies as st

from isthmus.experiments.network.delay_relay import REORDER_SECONDS, Conditions, PacketSchedule, relay

EDGE, CLOUD = 0, 1


class Clock:
    """Stands still until it is told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def schedule(**conditions: object) -> tuple[PacketSchedule, Clock]:
    clock = Clock()
    return PacketSchedule(Conditions(**conditions), clock), clock


def fates(count: int, end: int = EDGE, **conditions: object) -> list[int]:
    """How often each of `count` packets arrives."""
    made, clock = schedule(**conditions)
    for number in range(count):
        made.add(end, b"%d" % number)
    clock.now += 1.0
    arrived = Counter(int(packet) for _, packet in made.due())
    return [arrived[number] for number in range(count)]


def test_a_packet_arrives_half_a_round_trip_later_at_the_other_end() -> None:
    made, clock = schedule(rtt_s=0.5)
    assert made.wait() is None
    made.add(EDGE, b"up")
    clock.now += 0.125
    made.add(CLOUD, b"down")
    assert made.wait() == 0.125
    assert list(made.due()) == []
    clock.now += 0.125
    assert list(made.due()) == [(CLOUD, b"up")]
    clock.now += 1.0
    assert made.wait() == 0.0
    assert list(made.due()) == [(EDGE, b"down")]
    assert made.wait() is None


@given(st.lists(st.tuples(st.sampled_from([EDGE, CLOUD]), st.floats(0, 0.1)), max_size=40), st.floats(0, 0.3))
def test_a_good_way_delivers_everything_once_and_in_order(sent: list[tuple[int, float]], rtt: float) -> None:
    made, clock = schedule(rtt_s=rtt)
    arrived: list[tuple[int, bytes]] = []
    for number, (end, pause) in enumerate(sent):
        made.add(end, b"%d" % number)
        clock.now += pause
        arrived += made.due()
    clock.now += 1.0
    arrived += made.due()
    assert arrived == [(1 - end, b"%d" % number) for number, (end, _) in enumerate(sent)]


def test_losses_and_doubles_are_as_frequent_as_asked_and_the_same_every_time() -> None:
    lost = fates(4000, loss=0.1, seed=3)
    assert 0.08 < lost.count(0) / 4000 < 0.12
    assert lost.count(1) + lost.count(0) == 4000
    assert lost == fates(4000, loss=0.1, seed=3)
    assert lost != fates(4000, loss=0.1, seed=4)
    assert lost != fates(4000, CLOUD, loss=0.1, seed=3)
    doubled = fates(4000, duplicate=0.1, seed=3)
    assert 0.08 < doubled.count(2) / 4000 < 0.12
    both = fates(4000, loss=0.1, duplicate=0.1, reorder=0.5, seed=3)
    assert [fate == 0 for fate in both] == [fate == 0 for fate in lost]


def test_the_extremes_lose_all_and_double_all() -> None:
    assert set(fates(20, loss=1.0, duplicate=1.0)) == {0}
    assert set(fates(20, duplicate=1.0)) == {2}


def test_a_reordered_packet_is_overtaken() -> None:
    made, clock = schedule(rtt_s=0.25, reorder=0.5)
    for number in range(50):
        made.add(EDGE, b"%d" % number)
    clock.now += 0.125
    punctual = [int(packet) for _, packet in made.due()]
    assert made.wait() == pytest.approx(REORDER_SECONDS)
    clock.now += REORDER_SECONDS * 1.001
    late = [int(packet) for _, packet in made.due()]
    assert sorted(punctual + late) == list(range(50))
    assert min(late) < max(punctual)


def test_nothing_that_is_sent_during_a_silence_arrives() -> None:
    made, clock = schedule(rtt_s=0.5)
    start = clock.now
    for end in (EDGE, CLOUD):
        made.add(end, b"before")
    made.change(Conditions(rtt_s=0.5, silence_s=30.0))
    for second in (0.0, 29.9, 30.0):
        clock.now = start + second
        for end in (EDGE, CLOUD):
            made.add(end, str(second).encode())
    clock.now += 1.0
    # What was on its way when the silence began still arrives.
    assert list(made.due()) == [(1 - end, sent) for sent in (b"before", b"30.0") for end in (EDGE, CLOUD)]


def test_conditions_survive_json() -> None:
    conditions = Conditions(0.05, 0.1, 0.2, 0.3, 1.5, 7)
    assert Conditions(**json.loads(json.dumps(dataclasses.asdict(conditions)))) == conditions


def test_conditions_may_change_and_what_is_on_its_way_does_not_notice() -> None:
    made, clock = schedule(rtt_s=0.5)
    made.add(EDGE, b"before")
    made.change(Conditions(loss=1.0))
    made.add(EDGE, b"lost")
    made.change(Conditions(rtt_s=0.0))
    made.add(EDGE, b"overtaking")
    assert list(made.due()) == [(CLOUD, b"overtaking")]
    clock.now += 0.25
    assert list(made.due()) == [(CLOUD, b"before")]


def test_a_silence_begins_with_its_conditions_and_ends_by_itself() -> None:
    made, clock = schedule()
    clock.now += 100.0
    made.change(Conditions(silence_s=30.0))
    for second in (0.0, 29.9, 30.0):
        clock.now = 1100.0 + second
        made.add(CLOUD, str(second).encode())
    assert list(made.due()) == [(EDGE, b"30.0")]


def test_new_conditions_draw_anew_by_their_seed() -> None:
    made, clock = schedule()
    fates = []
    for seed in (3, 4, 3):
        made.change(Conditions(loss=0.5, seed=seed))
        for number in range(100):
            made.add(EDGE, b"%d" % number)
        clock.now += 1.0
        fates.append([packet for _, packet in made.due()])
    assert fates[0] == fates[2] != fates[1]


@contextlib.contextmanager
def loop(conditions: Conditions) -> Iterator[tuple[socket.socket, socket.socket, Callable[[bytes], None]]]:
    """The loop between two sockets, whose outer ends are given, and a function that sends a command and has it done."""
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(2)]
    (edge, near), (far, cloud) = pairs
    for end in (edge, cloud):
        end.settimeout(20)
    commands, answers = os.pipe(), os.pipe()
    made = PacketSchedule(conditions)
    thread = threading.Thread(target=relay, args=((near.fileno(), far.fileno()), made, commands[0], answers[1]))
    thread.start()

    def command(line: bytes) -> None:
        os.write(commands[1], line)
        assert os.read(answers[0], 10) == b"null\n"

    try:
        yield edge, cloud, command
        assert thread.is_alive()
    finally:
        os.close(commands[1])
        thread.join(20)
        for descriptor in (commands[0], *answers):
            os.close(descriptor)
        for pair in pairs:
            for end in pair:
                end.close()
    assert not thread.is_alive()


def test_the_loop_carries_packets_both_ways_until_it_is_stopped() -> None:
    with loop(Conditions(rtt_s=0.002)) as (edge, cloud, _):
        for number in range(150):  # more than are read at once
            edge.send(b"up %d" % number)
            cloud.send(b"down %d" % number)
            assert cloud.recv(100) == b"up %d" % number
            assert edge.recv(100) == b"down %d" % number


def test_the_loop_takes_commands_while_it_runs() -> None:
    with loop(Conditions()) as (edge, cloud, command):
        edge.send(b"first")
        assert cloud.recv(100) == b"first"
        command(b'{"loss": 1.0}\n')
        edge.send(b"lost")
        eventually_empty(edge)  # of a packet and a command that it finds at once, the loop takes the command first
        command(b'{"duplicate": 1.0}\n')
        edge.send(b"twice")
        assert [cloud.recv(100), cloud.recv(100)] == [b"twice", b"twice"]


def eventually_empty(end: socket.socket) -> None:
    """Wait until what was sent has been read: a datagram socket takes no answer to tell it."""
    deadline = time.monotonic() + 20
    while struct.unpack("i", fcntl.ioctl(end, termios.TIOCOUTQ, bytes(4)))[0]:
        assert time.monotonic() < deadline
        time.sleep(0.001)
