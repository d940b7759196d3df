"""The handshake: who is let in, and what every kind of interference ends in."""

from __future__ import annotations

import contextlib
import struct
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings, strategies as st
from support.protocol.wire import (
    EDGE,
    NOW,
    PIN,
    TENANT,
    WORKER,
    forward,
    identity,
    new_cloud,
    new_edge,
    new_pair,
    session_info,
    shake,
)

from isthmus.common.errors import (
    DrainingError,
    FingerprintError,
    FrameError,
    IsthmusError,
    LimitError,
    LocalProtocolError,
    MessageError,
    NotEnrolledError,
    OverQuotaError,
    RefusedError,
    RemoteProtocolError,
    VersionError,
)
from isthmus.protocol import session as session_module
from isthmus.protocol.enrolment import AuthorizedEdges
from isthmus.protocol.secure.framing import VERSION
from isthmus.protocol.secure.keys import Fingerprint, WorkerIdentity, format_public_key
from isthmus.protocol.session import CloudSession, EdgeSession, Established, NeedSend, Refused

EXPECTED = (RemoteProtocolError, VersionError, FingerprintError)
SIZES = (40, 1454, 1286)


def test_a_handshake_establishes_both_sides() -> None:
    asked: list[bytes] = []
    edge, cloud = new_edge(), new_cloud(authorize=lambda key: asked.append(key) or TENANT)
    first = edge.start()
    second = cloud.receive(first)
    assert isinstance(second, NeedSend)
    third = edge.receive(second.frames[0])
    assert isinstance(third, NeedSend)
    assert not edge.established
    assert not cloud.established
    fourth = cloud.receive(third.frames[0])
    assert isinstance(fourth, Established)
    last = edge.receive(fourth.frames[0])
    assert isinstance(last, Established)
    assert last.frames == ()
    assert edge.established
    assert cloud.established
    assert last.info == fourth.info == edge.info == cloud.info
    assert len(bytes.fromhex(last.info.session_id)) == 16
    assert cloud.tenant == TENANT
    assert asked == [EDGE.public_key().public_bytes_raw()]
    assert tuple(len(flight) for flight in (first, second.frames[0], third.frames[0])) == SIZES


def test_the_network_does_not_see_who_the_edge_is() -> None:
    flights = shake(new_edge(), new_cloud())
    public = EDGE.public_key().public_bytes_raw()
    assert not any(public in flight for flight in flights)
    assert not any(b"tiny" in flight for flight in flights)


def test_another_root_key_is_refused() -> None:
    other = identity(Ed25519PrivateKey.generate())
    edge = new_edge()
    with pytest.raises(FingerprintError, match=r"SHA256:.*not the pinned SHA256:") as caught:
        shake(edge, new_cloud(identity=other))
    assert str(PIN) in str(caught.value)
    assert str(other.pin) in str(caught.value)
    assert edge.closed


def test_an_expired_certificate_is_refused() -> None:
    with pytest.raises(FingerprintError, match="expired"):
        shake(new_edge(), new_cloud(identity=identity(not_after=NOW)))
    shake(new_edge(), new_cloud(identity=identity(not_after=NOW + 1)))


def test_a_certificate_that_the_root_did_not_sign_is_refused() -> None:
    good = identity().certificate
    bad = identity(Ed25519PrivateKey.generate()).certificate
    forged = type(good)(good.root, good.worker, good.not_after, bad.signature)
    with pytest.raises(FingerprintError, match="not signed"):
        shake(new_edge(), new_cloud(identity=WorkerIdentity(WORKER, forged)))


def test_a_stolen_certificate_without_its_key_is_refused() -> None:
    with pytest.raises(FingerprintError, match="does not prove"):
        shake(new_edge(), new_cloud(identity=WorkerIdentity(Ed25519PrivateKey.generate(), identity().certificate)))


def test_an_edge_that_is_not_enrolled_gets_a_clear_answer() -> None:
    edges = AuthorizedEdges.parse(format_public_key(WORKER.public_key().public_bytes_raw(), "somebody-else"))
    edge, cloud = new_edge(), new_cloud(authorize=edges.require)
    outcome = refusal(edge, cloud)
    assert isinstance(outcome, NotEnrolledError)
    assert str(Fingerprint.of(EDGE.public_key().public_bytes_raw())) in str(outcome)


@pytest.mark.parametrize("kind", [RefusedError, DrainingError, OverQuotaError, NotEnrolledError])
@pytest.mark.parametrize("place", ["authorize", "info"])
def test_refusals_arrive_as_what_they_are(kind: type[IsthmusError], place: str) -> None:
    def refuse(*args: Any) -> Any:
        raise kind("no, and here is why: ü" * 100)

    outcome = refusal(new_edge(), new_cloud(**{place: refuse}))
    assert type(outcome) is kind
    assert str(outcome).startswith("no, and here is why: ü")
    assert len(str(outcome).encode()) <= 1024


def test_a_refusal_cannot_write_control_characters() -> None:
    def refuse(key: bytes) -> Any:
        raise RefusedError("a\x1b[2Jb\nc")

    assert str(refusal(new_edge(), new_cloud(authorize=refuse))) == "a?[2Jb?c"


def refusal(edge: EdgeSession, cloud: CloudSession) -> IsthmusError:
    """Drive a handshake that the cloud refuses; give what the edge raises, and check that both sides are dead."""
    event = cloud.receive(edge.receive(cloud.receive(edge.start()).frames[0]).frames[0])
    assert isinstance(event, Refused)
    assert cloud.closed
    assert not cloud.established
    with pytest.raises(IsthmusError) as caught:
        edge.receive(event.frames[0])
    assert edge.closed
    with pytest.raises(LocalProtocolError):
        cloud.receive(edge_frame())
    return caught.value


def edge_frame() -> bytes:
    edge, _ = new_pair()
    return next(iter(edge.send(forward())))


def test_another_version_is_named_on_both_sides() -> None:
    edge, cloud = new_edge(), new_cloud()
    hello = bytearray(edge.start())
    hello[5] = VERSION + 1
    event = cloud.receive(hello)
    assert isinstance(event, Refused)
    assert isinstance(event.error, VersionError)
    assert f"version {VERSION + 1}" in str(event.error)
    assert cloud.closed
    with pytest.raises(VersionError, match=f"version {VERSION}"):
        edge.receive(event.frames[0])
    assert edge.closed


def test_another_suite_is_refused() -> None:
    edge, cloud = new_edge(), new_cloud()
    hello = bytearray(edge.start())
    struct.pack_into("!H", hello, 6, 2)
    event = cloud.receive(hello)
    assert isinstance(event, Refused)
    assert "suite 2" in str(event.error)
    with pytest.raises(VersionError):
        edge.receive(event.frames[0])


def test_a_replayed_first_flight_meets_fresh_keys() -> None:
    hello = new_edge().start()
    replies = [new_cloud().receive(hello).frames[0] for _ in range(2)]
    assert replies[0] != replies[1]
    nonce, mlkem, x25519 = slice(6, 38), slice(38, 38 + 1184), slice(38 + 1184, 38 + 1216)
    for part in (nonce, mlkem, x25519):
        assert replies[0][part] != replies[1][part]


def test_a_replayed_handshake_does_not_open_a_session() -> None:
    flights = shake(new_edge(), new_cloud())
    cloud = new_cloud()
    cloud.receive(flights[0])
    with pytest.raises(FrameError):
        cloud.receive(flights[2])
    assert cloud.closed


def test_same_random_bytes_still_give_other_keys() -> None:
    """Even with a stuck random source, fresh server keys keep two sessions apart."""
    frames = []
    for _ in range(2):
        edge, cloud = new_edge(random=lambda n: b"\7" * n), new_cloud(random=lambda n: b"\7" * n)
        shake(edge, cloud)
        frames.append(b"".join(edge.send(forward())))
    assert frames[0] != frames[1]


def flights_with(alter: Callable[[int, bytes], bytes]) -> None:
    """Run a handshake with interference: nothing may stand on both sides at the end, and only typed errors may rise."""
    edge, cloud = new_edge(), new_cloud()
    with contextlib.suppress(*EXPECTED):
        shake(edge, cloud, alter)
    assert not edge.established
    if not cloud.established:  # the cloud speaks last; it stands when only the last flight was changed
        assert cloud.closed or edge.closed


@settings(max_examples=250, deadline=None, derandomize=True)
@given(st.integers(0, 3), st.data())
def test_any_flipped_bit_ends_the_handshake(number: int, data: st.DataObject) -> None:
    def flip(at: int, flight: bytes) -> bytes:
        if at != number:
            return flight
        changed = bytearray(flight)
        changed[data.draw(st.integers(0, len(flight) - 1), "byte")] ^= 1 << data.draw(st.integers(0, 7), "bit")
        return bytes(changed)

    flights_with(flip)


def test_every_byte_of_every_flight_is_covered() -> None:
    """The fields one by one: a changed byte at each border and in each middle."""
    borders = {
        0: (0, 3, 4, 5, 6, 7, 8, 39),
        1: (0, 4, 5, 6, 37, 38, 1221, 1222, 1253, 1254, 1285, 1286, 1317, 1318, 1325, 1326, 1389, 1390, 1453),
        2: (0, 4, 5, 6, 1093, 1094, 1125, 1126, 1173, 1174, 1205, 1285),
        3: (0, 4, 5, 6, 7, 30, 100),
    }
    for number, places in borders.items():
        for place in places:
            flights_with(lambda at, f, n=number, p=place: f if at != n else f[:p] + bytes((f[p] ^ 0x80,)) + f[p + 1 :])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 3), st.one_of(st.integers(-1500, -1), st.binary(min_size=1, max_size=40)))
def test_any_cut_or_longer_flight_ends_the_handshake(number: int, change: int | bytes) -> None:
    flights_with(lambda at, f: f if at != number else f[:change] if isinstance(change, int) else f + change)


def test_reflected_and_swapped_flights_end_the_handshake() -> None:
    first = shake(new_edge(), new_cloud())
    for number in range(4):
        for other in range(4):
            flights_with(lambda at, f, n=number, o=other: f if at != n else first[o])
    edge = new_edge()
    hello = edge.start()
    with pytest.raises(FrameError):
        edge.receive(hello)


def test_a_huge_last_flight_is_refused() -> None:
    edge, cloud = new_edge(), new_cloud()
    edge.receive(cloud.receive(edge.start()).frames[0])
    with pytest.raises(LimitError, match="30000"):
        edge.receive(b"ISTH\x04\x01" + bytes(29_994))


def test_session_information_of_another_session_is_refused() -> None:
    cloud = new_cloud(info=lambda tenant, session_id: session_info(tenant, bytes(16)))
    edge = new_edge()
    auth = edge.receive(cloud.receive(edge.start()).frames[0]).frames[0]
    with pytest.raises(LocalProtocolError, match="session id"):
        cloud.receive(auth)


def test_malformed_session_information_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    edge, cloud = new_edge(), new_cloud()
    auth = edge.receive(cloud.receive(edge.start()).frames[0]).frames[0]
    with monkeypatch.context() as patch:
        patch.setattr(session_module, "pack_info", lambda info: b"{}")
        done = cloud.receive(auth).frames[0]
    with pytest.raises(MessageError, match="session information"):
        edge.receive(done)
    assert edge.closed


def test_misuse_is_local() -> None:
    edge, cloud = new_edge(), new_cloud()
    with pytest.raises(LocalProtocolError, match="start"):
        edge.receive(b"x")
    hello = edge.start()
    with pytest.raises(LocalProtocolError, match="starts once"):
        edge.start()
    for session in (edge, cloud):
        with pytest.raises(LocalProtocolError, match="not open"):
            session.send(forward())
        with pytest.raises(LocalProtocolError, match="not open"):
            session.rekey()
    edge.close()
    edge.close()
    with pytest.raises(LocalProtocolError, match="closed by this side"):
        edge.receive(cloud.receive(hello).frames[0])


def test_keys_handshake_and_sealing_import_no_torch() -> None:
    modules = "isthmus.protocol.secure.handshake, isthmus.protocol.secure.record, isthmus.protocol.secure.keys"
    code = f"import sys, {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
