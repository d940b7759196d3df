"""Key changes of a sealed session: by hand, bytes, time and frames; each is authentic, in its place, and once."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from support.protocol.sealed import SECRET, SESSION, assert_refused, both_ends, deliver, message_frames
from support.protocol.wire import SMALL, forward, new_pair

from isthmus.common.errors import FrameError, LimitError
from isthmus.protocol import messages as m
from isthmus.protocol.limits import Buffer
from isthmus.protocol.secure import framing
from isthmus.protocol.secure.framing import Direction
from isthmus.protocol.secure.record import Opener
from isthmus.protocol.session import Incomplete


@pytest.mark.parametrize("up", [True, False])
def test_rekeying_by_hand_in_both_directions(up: bool) -> None:
    sender, receiver = new_pair() if up else new_pair()[::-1]
    for _ in range(3):
        assert receiver.receive(sender.rekey()) == Incomplete()
        assert len(deliver(list(sender.send(m.Goodbye("up"))), receiver)) == 1
        assert len(deliver(list(receiver.send(m.Goodbye("down"))), sender)) == 1
    assert sender._sealer is not None
    assert receiver._opener is not None
    assert sender._sealer._keys.epoch == receiver._opener._keys.epoch == 3
    assert receiver._sealer is not None
    assert receiver._sealer._keys.epoch == 0


def test_rekeying_by_bytes() -> None:
    sealer, opener = both_ends(replace(SMALL, rekey_bytes=400))
    epochs = []
    for number in range(6):
        frames = list(sealer.seal(b"h", [bytes((number,)) * 199]))
        opened = [opener.open(frame) for frame in frames]
        last = opened[-1]
        assert last is not None
        assert bytes(last.body) == bytes((number,)) * 199
        epochs.append((sealer._keys.epoch, opener._keys.epoch))
    assert epochs == [(0, 0), (0, 0), (1, 1), (1, 1), (2, 2), (2, 2)]


def test_rekeying_by_time() -> None:
    now = [0.0]
    sealer, opener = both_ends(replace(SMALL, rekey_seconds=10), clock=lambda: now[0])

    def send() -> int:
        for frame in sealer.seal(b"h", [bytes(10)]):
            opener.open(frame)
        assert sealer._keys.epoch == opener._keys.epoch
        return opener._keys.epoch

    assert send() == 0
    now[0] = 9.9
    assert send() == 0
    now[0] = 10.0
    assert send() == 1
    now[0] = 19.9
    assert send() == 1
    now[0] = 1000.0
    assert send() == 2


def test_rekeying_by_frames() -> None:
    sealer, opener = both_ends(replace(SMALL, rekey_frames=5))
    for _ in range(4):
        for frame in sealer.seal(b"h", [bytes(200)]):
            opener.open(frame)
    assert sealer._keys.epoch == opener._keys.epoch == 3


@pytest.mark.parametrize("lifetime", [{"rekey_frames": 4}, {"rekey_bytes": 200}])
def test_a_receiver_takes_nothing_beyond_a_keys_lifetime(lifetime: dict[str, int]) -> None:
    """What a sender changes its key at, here two messages, and a largest message."""
    careless = replace(SMALL, max_message_bytes=60, max_header_bytes=40)
    sealer, opener = both_ends(careless)
    opener = Opener(bytearray(SECRET), SESSION, Direction.EDGE_TO_CLOUD, replace(careless, **lifetime))

    def send(count: int) -> None:
        for _ in range(count):
            for frame in sealer.seal(b"h" * 40, [bytes(60)]):  # two records, of 100 bytes
                opener.open(frame)

    send(2)
    opener.open(sealer.rekey())
    send(3)
    with pytest.raises(LimitError, match="beyond its lifetime"):
        send(2)
    sealer, opener = both_ends(careless)  # with the lifetime that sessions have
    send(200)


@pytest.mark.parametrize("limits", [{"rekey_frames": 7}, {"rekey_bytes": 331}, {"rekey_frames": 1}, {"rekey_bytes": 1}])
def test_a_sender_stays_within_its_keys_lifetime_whatever_it_sends(limits: dict[str, int]) -> None:
    sealer, opener = both_ends(replace(SMALL, max_message_bytes=130, max_header_bytes=40, **limits))
    for number in range(300):
        for frame in sealer.seal(b"h" * (1 + number % 40), [bytes(number * 7 % 131)]):
            opener.open(frame)
        if number % 11 == 0:
            opener.open(sealer.rekey())
    assert opener._keys.epoch > 30


def test_a_key_change_is_authentic_in_its_place_and_once() -> None:
    sealer, opener = both_ends()
    change = sealer.rekey()
    changed = change[:-1] + bytes((change[-1] ^ 1,))
    assert_refused([changed], FrameError)
    assert_refused([change + b"\0"], FrameError)
    assert_refused([change, change], FrameError)
    assert_refused([message_frames()[0], change], FrameError)
    opener.open(change)
    with pytest.raises(FrameError):
        opener.open(message_frames()[0])  # sealed under the old key
    inside = both_ends()[0]
    frames = inside.seal(b"h", [bytes(200)])
    first = next(frames)
    inside._busy = False
    assert_refused([first, inside.rekey()], FrameError)


def test_what_is_taken_later_does_not_open_what_went_before() -> None:
    sealer, _ = both_ends()
    before = next(sealer.seal(b"h", [b"secret"]))
    sealer.rekey()
    later = bytearray(sealer._keys._secret)
    assert later != SECRET
    with pytest.raises(FrameError):
        Opener(later, SESSION, Direction.EDGE_TO_CLOUD, SMALL).open(before)


def test_no_nonce_is_used_twice_under_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[tuple[bytes, bytes]] = []

    class Recording:
        """The cipher, with a record of every key and nonce that sealed something."""

        def __init__(self, key: bytearray) -> None:
            self.key = bytes(key)
            self.cipher = AESGCM(key)

        def encrypt_into(self, nonce: bytes, data: Buffer, aad: bytes, into: memoryview) -> int:
            used.append((self.key, nonce))
            return self.cipher.encrypt_into(nonce, data, aad, into)

        def encrypt(self, nonce: bytes, data: bytes, aad: bytes) -> bytes:
            used.append((self.key, nonce))
            return self.cipher.encrypt(nonce, data, aad)

        def decrypt_into(self, nonce: bytes, data: Buffer, aad: bytes, into: memoryview) -> int:
            return self.cipher.decrypt_into(nonce, data, aad, into)

    monkeypatch.setattr(framing, "AESGCM", Recording)
    edge, cloud = new_pair(limits=replace(SMALL, rekey_bytes=3000))
    for call in range(40):
        deliver(list(edge.send(forward(call=call))), cloud)
        deliver(list(cloud.send(m.Status(m.StatusCode.OK, None, "x" * call))), edge)
    assert len(used) > 200
    assert len({key for key, _ in used}) > 4
    assert len(set(used)) == len(used)
