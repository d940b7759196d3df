"""Renewals of a session's keys: when they come, what is refused, and that a thief who listens reads no more after."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from support.protocol.sealed import deliver
from support.protocol.wire import SMALL, new_pair

from isthmus.common.errors import FrameError, LimitError, RemoteProtocolError
from isthmus.protocol import messages as m
from isthmus.protocol.limits import GIB, Limits
from isthmus.protocol.secure.framing import PUBLIC_BYTES, SEALED_SECRET_BYTES, Direction, FreshSecret, KeyChain, Kind
from isthmus.protocol.secure.record import Opener
from isthmus.protocol.secure.renewal import EdgeRenewal
from isthmus.protocol.session import CloudSession, EdgeSession, Incomplete, Received

OFTEN = replace(SMALL, renew_bytes=1, least_renew_bytes=0)
NEVER = replace(SMALL, renew_bytes=1 << 60, renew_seconds=math.inf)


def kinds(frames: list[bytes]) -> list[int]:
    return [frame[4] for frame in frames]


def epochs(edge: Any, cloud: Any) -> tuple[int, int]:
    """Of the edge's direction and the cloud's, on which both sides agree."""
    up, down = edge._sealer._keys.epoch, cloud._sealer._keys.epoch
    assert (up, down) == (cloud._opener._keys.epoch, edge._opener._keys.epoch)
    return up, down


def ping(edge: EdgeSession, cloud: CloudSession) -> list[int]:
    """A message either way; the kinds of frames that crossed."""
    up = list(edge.send(m.Ping(1)))
    assert deliver(up, cloud) == [m.Ping(1)]
    down = list(cloud.send(m.Pong(1, 2)))
    assert deliver(down, edge) == [m.Pong(1, 2)]
    return kinds(up + down)


def test_an_offer_an_answer_and_a_switch_go_before_the_next_messages() -> None:
    edge, cloud = new_pair(limits=OFTEN)
    assert ping(edge, cloud) == [Kind.DATA, Kind.DATA]  # nothing was sealed before it
    assert ping(edge, cloud) == [Kind.OFFER, Kind.DATA, Kind.ANSWER, Kind.DATA]
    assert epochs(edge, cloud) == (0, 1)
    assert ping(edge, cloud) == [Kind.SWITCH, Kind.DATA, Kind.DATA]
    assert epochs(edge, cloud) == (1, 1)
    assert edge._renewal is not None
    assert cloud._renewal is not None
    assert edge._renewal._fresh is cloud._renewal._fresh is None


def test_what_a_renewal_has_held_is_overwritten() -> None:
    edge, cloud = new_pair(limits=OFTEN)
    for _ in range(2):
        ping(edge, cloud)
    held = [session._renewal._fresh.secret for session in (edge, cloud)]  # type: ignore[union-attr]
    assert held[0] == held[1] != bytes(32)
    ping(edge, cloud)
    assert held == [bytes(32), bytes(32)]
    ping(edge, cloud)
    held = [session._renewal._fresh.secret for session in (edge, cloud)]  # type: ignore[union-attr]
    edge.close()
    cloud.close()
    assert held == [bytes(32), bytes(32)]


@pytest.mark.parametrize("limits", [Limits(renew_seconds=120), Limits(renew_seconds=math.inf, renew_bytes=1000)])
def test_a_renewal_is_due_after_seconds_or_bytes_and_not_before(limits: Limits) -> None:
    now = [0.0]
    edge, cloud = new_pair(limits=replace(limits, least_renew_bytes=100), clock=lambda: now[0])
    by_time = limits.renew_bytes == GIB
    for _ in range(3):
        since, size = now[0], edge._sealer.total + edge._opener.total  # type: ignore[union-attr]
        while Kind.OFFER not in ping(edge, cloud):
            now[0] += 7.5 if by_time else 0.0
        passed = edge._sealer.total + edge._opener.total - size  # type: ignore[union-attr]
        assert now[0] - since == 120 if by_time else 1000 <= passed - PUBLIC_BYTES - SEALED_SECRET_BYTES < 1100
        assert ping(edge, cloud)[0] == Kind.SWITCH


def test_an_idle_session_renews_nothing() -> None:
    now = [0.0]
    edge, cloud = new_pair(clock=lambda: now[0])
    now[0] = 86_400.0
    assert list(edge._renewing(iter(()))) != []  # it is a message that takes the offer along
    assert kinds(list(cloud.send(m.Pong(1, 2)))) == [Kind.DATA]


def test_an_edge_cannot_make_a_cloud_renew_more_often_than_its_bound() -> None:
    now = [0.0]
    limits = Limits(renew_bytes=1)
    edge, cloud = new_pair(limits=limits, clock=lambda: now[0])
    now[0] = limits.least_renew_seconds
    for _ in range(3):
        ping(edge, cloud)
    assert epochs(edge, cloud) == (1, 1)
    now[0] += limits.least_renew_seconds - 0.1
    with pytest.raises(LimitError, match="came less than 10 s and 67108864 bytes after the last one"):
        ping(edge, cloud)
    assert cloud.closed
    edge, cloud = new_pair(limits=replace(limits, least_renew_bytes=4000), clock=lambda: now[0])
    ping(edge, cloud)
    with pytest.raises(LimitError):
        ping(edge, cloud)


def test_the_cloud_counts_no_less_than_the_edge() -> None:
    """Both have the same interval: what passes for the edge has passed for the cloud, whatever is on its way."""
    now = [0.0]
    limits = replace(SMALL, renew_bytes=3000, least_renew_bytes=3000, renew_seconds=9, least_renew_seconds=9)
    edge, cloud = new_pair(limits=limits, clock=lambda: now[0])
    down: list[bytes] = []
    for number in range(400):
        deliver(list(edge.send(m.Ping(number))), cloud)
        down += cloud.send(m.Pong(number, 2))
        now[0] += 0.1
        if number % 7 == 0:  # answers come late
            deliver(down, edge)
            down = []
    assert edge._sealer is not None
    assert edge._sealer._keys.epoch > 3


def offered(edge: Any, cloud: Any) -> None:
    deliver(list(edge.send(m.Ping(1))), cloud)
    deliver(list(edge.send(m.Ping(1))), cloud)


REFUSED: dict[str, Callable[[Any, Any], bytes]] = {
    "a second offer": lambda edge, cloud: (offered(edge, cloud), edge._sealer.control(Kind.OFFER, bytes(1216)))[1],
    "an answer from the edge": lambda edge, cloud: edge._sealer.control(Kind.ANSWER, bytes(1168)),
    "a switch without an answer": lambda edge, cloud: edge._sealer.control(Kind.SWITCH),
    "a switch before the answer": lambda edge, cloud: (offered(edge, cloud), edge._sealer.control(Kind.SWITCH))[1],
    "keys that are none": lambda edge, cloud: edge._sealer.control(Kind.OFFER, b"\xff" * PUBLIC_BYTES),
    "an X25519 key of small order": lambda edge, cloud: edge._sealer.control(Kind.OFFER, bytes(PUBLIC_BYTES)),
    "an offer of another size": lambda edge, cloud: edge._sealer.control(Kind.OFFER, bytes(PUBLIC_BYTES - 1)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_comes_out_of_turn_ends_the_session(name: str) -> None:
    edge, cloud = new_pair(limits=OFTEN)
    with pytest.raises(RemoteProtocolError):
        cloud.receive(REFUSED[name](edge, cloud))
    assert cloud.closed


@pytest.mark.parametrize("kind", [Kind.OFFER, Kind.ANSWER, Kind.SWITCH])
def test_an_edge_takes_nothing_but_the_answer_to_its_offer(kind: Kind) -> None:
    edge, cloud = new_pair(limits=OFTEN)
    sizes = {Kind.OFFER: PUBLIC_BYTES, Kind.ANSWER: SEALED_SECRET_BYTES, Kind.SWITCH: 0}
    assert cloud._sealer is not None
    with pytest.raises(FrameError, match="out of turn"):
        edge.receive(cloud._sealer.control(kind, bytes(sizes[kind])))
    edge, cloud = new_pair(limits=OFTEN)
    offered(edge, cloud)
    assert cloud._sealer is not None
    with pytest.raises(FrameError, match="cannot be opened" if kind == Kind.ANSWER else "out of turn"):
        edge.receive(cloud._sealer.control(kind, bytes(sizes[kind])))


def test_an_answer_to_another_offer_is_refused() -> None:
    pairs = [new_pair(limits=OFTEN) for _ in range(2)]
    for edge, cloud in pairs:
        offered(edge, cloud)
    (_, cloud), (edge, other) = pairs
    assert cloud._renewal is not None
    assert other._sealer is not None
    answer = cloud._renewal._answer  # type: ignore[union-attr]
    assert answer is not None
    with pytest.raises(FrameError, match="cannot be opened"):
        edge.receive(other._sealer.control(Kind.ANSWER, answer))


class Thief:
    """Has the secret of a direction as it is, and hears what crosses from then on. Reads what it can."""

    def __init__(self, sender: Any, direction: Direction, limits: Limits) -> None:
        keys = sender._sealer._keys
        self._opener = Opener(bytearray(keys._secret), bytes.fromhex(sender.info.session_id), direction, limits)
        self._opener._keys.epoch, self._opener._keys.counter = keys.epoch, keys.counter
        self._opener.on_control = self._control
        self.heals = 0  # control frames that changed the key by a secret that the thief has not
        self.read = 0

    def _control(self, kind: Kind, plain: bytes, keys: Any) -> None:
        if kind != Kind.OFFER:
            self.heals += 1
            keys.ratchet(FreshSecret(bytearray(plain[:32].ljust(32, b"\0")), bytes(32)))  # its best guess

    def hear(self, frame: bytes) -> None:
        try:
            self.read += self._opener.open(frame) is not None
        except FrameError:
            assert self.heals
            self._opener._dead = True


def steal(edge: Any, cloud: Any, limits: Limits) -> dict[Any, Thief]:
    return {
        edge: Thief(edge, Direction.EDGE_TO_CLOUD, limits),
        cloud: Thief(cloud, Direction.CLOUD_TO_EDGE, limits),
    }


@pytest.mark.parametrize(("limits", "reads"), [(OFTEN, (2, 1)), (NEVER, (5, 5))])
def test_a_thief_who_listens_reads_until_the_renewal_and_without_one_for_ever(
    limits: Limits, reads: tuple[int, int]
) -> None:
    edge, cloud = new_pair(limits=limits)
    thieves = steal(edge, cloud, limits)
    for _ in range(5):
        for sender, receiver, message in ((edge, cloud, m.Ping(1)), (cloud, edge, m.Pong(1, 2))):
            for frame in sender.send(message):  # type: ignore[attr-defined]
                if not thieves[sender]._opener._dead:
                    thieves[sender].hear(frame)
                receiver.receive(frame)  # type: ignore[attr-defined]
    assert (thieves[edge].read, thieves[cloud].read) == reads


class Renewing(RuleBasedStateMachine):
    """Traffic both ways around renewals, in any order; frames are on their way for any time, in order."""

    limits = replace(SMALL, renew_bytes=400, least_renew_bytes=400, rekey_frames=9)

    def __init__(self) -> None:
        super().__init__()
        self.edge, self.cloud = new_pair(limits=self.limits)
        self.ways: dict[Any, deque[bytes]] = {self.edge: deque(), self.cloud: deque()}
        self.sent: dict[Any, list[m.Message]] = {self.edge: [], self.cloud: []}
        self.got: dict[Any, list[m.Message]] = {self.edge: [], self.cloud: []}
        self.thieves: dict[Any, Thief] = {}
        self.number = 0

    def _other(self, side: Any) -> Any:
        return self.cloud if side is self.edge else self.edge

    def _put(self, side: Any, frames: Any) -> None:
        for frame in frames:
            self.ways[side].append(frame)
            thief = self.thieves.get(side)
            if thief is not None and not thief._opener._dead:
                thief.hear(frame)

    def _send(self, side: Any, message: m.Message) -> None:
        self.sent[side].append(message)
        self._put(side, side.send(message))

    def _deliver(self, side: Any) -> None:
        event = self._other(side).receive(self.ways[side].popleft())
        assert isinstance(event, Received | Incomplete)
        if isinstance(event, Received):
            self.got[side].append(event.message)

    @rule()
    def edge_sends(self) -> None:
        self.number += 1
        self._send(self.edge, m.Put("adapter", 0, 200, bytes(32), bytes((self.number % 256,)) * 200))

    @rule()
    def cloud_sends(self) -> None:
        self.number += 1
        self._send(self.cloud, m.Blob("adapter", 0, 150, bytes(32), bytes((self.number % 256,)) * 150))

    @precondition(lambda self: self.ways[self.edge])
    @rule()
    def edge_arrives(self) -> None:
        self._deliver(self.edge)

    @precondition(lambda self: self.ways[self.cloud])
    @rule()
    def cloud_arrives(self) -> None:
        self._deliver(self.cloud)

    @rule()
    def edge_rekeys(self) -> None:
        self._put(self.edge, [self.edge.rekey()])
        self.edge_sends()

    @precondition(lambda self: not self.thieves)
    @rule()
    def secrets_are_stolen(self) -> None:
        self.thieves = steal(self.edge, self.cloud, self.limits)

    @invariant()
    def messages_come_in_order_and_the_thief_reads_none_behind_a_renewal(self) -> None:
        for side in (self.edge, self.cloud):
            assert self.got[side] == self.sent[side][: len(self.got[side])]
        for thief in self.thieves.values():
            assert thief.heals <= 1  # what comes behind the first one is not opened

    def teardown(self) -> None:
        """What is on its way arrives, and two renewals later both sides agree and the thief reads nothing."""
        for _ in range(12):
            self.edge_sends()
            while self.ways[self.edge]:
                self.edge_arrives()
            self.cloud_sends()
            while self.ways[self.cloud]:
                self.cloud_arrives()
        assert self.got == self.sent
        assert min(epochs(self.edge, self.cloud)) >= 1
        assert all(thief.heals == 1 and thief._opener._dead for thief in self.thieves.values())


TestRenewing = Renewing.TestCase
TestRenewing.settings = settings(
    max_examples=15,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def test_a_message_that_goes_while_an_answer_comes_makes_no_second_offer(monkeypatch: pytest.MonkeyPatch) -> None:
    edge, cloud = new_pair(limits=OFTEN)
    offered(edge, cloud)
    answered = list(cloud.send(m.Pong(1, 2)))
    ratchet, sent = KeyChain.ratchet, list[bytes]()

    def meanwhile(keys: KeyChain, fresh: FreshSecret | None = None) -> None:
        sent.extend(edge.send(m.Ping(1)))  # as another thread may
        ratchet(keys, fresh)

    with monkeypatch.context() as patch:
        patch.setattr(KeyChain, "ratchet", meanwhile)
        deliver(answered, edge)
    assert kinds(sent) == [Kind.DATA]
    assert kinds(list(edge.send(m.Ping(1)))) == [Kind.SWITCH, Kind.DATA]


def test_an_edge_has_one_offer_under_way() -> None:
    edge, cloud = new_pair(limits=OFTEN)
    ups = [frame for _ in range(6) for frame in edge.send(m.Ping(1))]
    assert kinds(ups).count(Kind.OFFER) == 1
    assert isinstance(edge._renewal, EdgeRenewal)
    assert len(deliver(ups, cloud)) == 6
    deliver(list(cloud.send(m.Pong(1, 2))), edge)
    assert kinds(list(edge.send(m.Ping(1)))) == [Kind.SWITCH, Kind.DATA]
