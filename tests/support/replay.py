"""The project's own handshake and record layer, driven by the frozen vectors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from isthmus.protocol.limits import Limits
from isthmus.protocol.secure import handshake, renewal as renewals
from isthmus.protocol.secure.certificates import WorkerCertificate
from isthmus.protocol.secure.framing import Direction
from isthmus.protocol.secure.handshake import ClientHandshake, Secrets, ServerHandshake, Verdict, version_refusal
from isthmus.protocol.secure.keys import Fingerprint, WorkerIdentity
from isthmus.protocol.secure.record import Opener, Sealer
from isthmus.protocol.secure.renewal import CloudRenewal, EdgeRenewal


def client(inputs: dict[str, Any]) -> ClientHandshake:
    """The edge's side, with the random bytes of the vectors."""
    root = Ed25519PrivateKey.from_private_bytes(inputs["root_private_key"])
    edge = Ed25519PrivateKey.from_private_bytes(inputs["edge_private_key"])
    draws = iter((inputs["client_nonce"], inputs["client_secret"]))
    pin = Fingerprint.of(root.public_key().public_bytes_raw())
    return ClientHandshake(pin, edge, now=lambda: inputs["now"], random=lambda count: next(draws))


def server(inputs: dict[str, Any]) -> ServerHandshake:
    """The worker's side, with the random bytes and the fresh keys of the vectors."""
    root = Ed25519PrivateKey.from_private_bytes(inputs["root_private_key"])
    worker = Ed25519PrivateKey.from_private_bytes(inputs["worker_private_key"])
    certificate = WorkerCertificate.issue(root, worker.public_key().public_bytes_raw(), inputs["not_after"])
    return ServerHandshake(
        WorkerIdentity(worker, certificate), lambda count: inputs["server_nonce"], lambda: fresh_keys(inputs)
    )


class _FrozenHpke:
    """HPKE whose encryption, which draws random bytes of its own, gives what it gave when the vectors were made."""

    def __init__(self, secret: bytes, info: bytes, sealed: bytes) -> None:
        self._expected, self._sealed = (secret, info), sealed

    def encrypt(self, secret: bytes, key: object, info: bytes) -> bytes:
        assert (bytes(secret), info) == self._expected
        return self._sealed

    decrypt = handshake._HPKE.decrypt


@contextmanager
def frozen_hpke(vectors: dict[str, Any]) -> Iterator[None]:
    """The client's encryption is that of the vectors."""
    derived = vectors["derived"]
    frozen = _FrozenHpke(vectors["inputs"]["client_secret"], derived["th1"], derived["sealed_secret"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(handshake, "_HPKE", frozen)
        yield


def verdict(values: dict[str, Any]) -> Verdict:
    """The server's last word."""
    return Verdict(values["code"], values["session_id"], values["body"])


def replay_handshake(vectors: dict[str, Any]) -> None:
    """Have both sides make every flight from the inputs, and compare."""
    inputs, flights, derived = (vectors[part] for part in ("inputs", "flights", "derived"))
    for ending, word in (("server_done", "verdict"), ("server_done_refused", "verdict_refused")):
        edge, cloud = client(inputs), server(inputs)
        assert edge.start() == flights["client_hello"]
        assert cloud.answer(flights["client_hello"]) == flights["server_hello"]
        with frozen_hpke(vectors):
            assert edge.answer(flights["server_hello"]) == flights["client_auth"]
        assert cloud.identify(flights["client_auth"]) == derived["edge_public_key"]
        flight, sent = cloud.finish(verdict(inputs[word]))
        assert flight == flights[ending]
        got, received = edge.finish(flight)
        assert got == verdict(inputs[word])
        assert sent == received
        assert (sent is None) == (inputs[word]["code"] != 0)
        if sent is not None:
            up, down = (bytes(derived[f"traffic_secret_{way}"]) for way in ("edge_to_cloud", "cloud_to_edge"))
            assert sent == Secrets(bytearray(up), bytearray(down))
    assert version_refusal() == flights["version_refused"]


def replay_refusal(vectors: dict[str, Any], to: str, flight: str, arrived: bytes, now: int | None) -> None:
    """Have one side read a flight that arrives as something else. Raises what it raises."""
    inputs, flights = vectors["inputs"], vectors["flights"]
    if to == "server":
        cloud = server(inputs)
        if flight == "client_hello":
            cloud.answer(arrived)
            return
        cloud.answer(flights["client_hello"])
        cloud.identify(arrived)
        return
    edge = client(inputs if now is None else {**inputs, "now": now})
    edge.start()
    with frozen_hpke(vectors):
        edge.answer(arrived if flight == "server_hello" else flights["server_hello"])
    if flight == "server_done":
        edge.finish(arrived)


def limits_of(case: dict[str, Any]) -> Limits:
    """The limits that a case names, and the protocol's own for the others."""
    names = ("chunk_bytes", "rekey_bytes", "max_message_bytes", "max_header_bytes")
    return Limits(**{name: case[name] for name in names if name in case})


def body_of(message: dict[str, Any]) -> bytes:
    """A body, or one of so many bytes that count up to 250 again and again."""
    size = message.get("body_counting_to")
    return bytes(message["body"]) if size is None else bytes(i % 251 for i in range(size))


def seal(case: dict[str, Any]) -> list[list[bytes]]:
    """The frames of each step of a case."""
    sealer = Sealer(
        bytearray(case["secret"]), case["session_id"], Direction(case["direction"]), limits_of(case), lambda: 0.0
    )
    return [
        list(sealer.seal(step["header"], [body_of(step)])) if "header" in step else [sealer.rekey()]
        for step in case["steps"]
    ]


def new_opener(case: dict[str, Any]) -> Opener:
    """The receiver of a case."""
    return Opener(bytearray(case["secret"]), case["session_id"], Direction(case["direction"]), limits_of(case))


def replay_records(case: dict[str, Any]) -> list[bytes]:
    """Have the sender make every frame and the receiver open it, and compare; returns the frames."""
    frames: list[bytes] = []
    opener = new_opener(case)
    for step, made in zip(case["steps"], seal(case), strict=True):
        if "frames" in step:
            assert made == step["frames"]
        else:
            assert [hashlib.sha256(frame).digest() for frame in made] == step["frames_sha256"]
        opened = [opener.open(frame) for frame in made]
        assert opened[:-1] == [None] * (len(made) - 1)
        if "header" in step:
            last = opened[-1]
            assert last is not None
            assert (bytes(last.header), bytes(last.body)) == (step["header"], body_of(step))
        frames += made
    return frames


def renewal(inputs: dict[str, Any], derived: dict[str, Any] | None = None) -> dict[str, list[bytes]]:
    """Have both sides renew their keys around a message of each, and one behind it; the frames of each direction.

    Args:
        inputs: the vectors'.
        derived: what comes of them, where the cloud's encryption is to be that of the vectors.
    """
    up, down = (inputs[f"traffic_secret_{way}"] for way in ("edge_to_cloud", "cloud_to_edge"))
    session_id, limits = inputs["session_id"], Limits(renew_bytes=0, least_renew_bytes=0)
    ends = [(up, Direction.EDGE_TO_CLOUD), (down, Direction.CLOUD_TO_EDGE)]
    sealers = [Sealer(bytearray(secret), session_id, way, limits, lambda: 0.0) for secret, way in ends]
    openers = [Opener(bytearray(secret), session_id, way, limits) for secret, way in ends]
    edge = EdgeRenewal(sealers[0], openers[1], session_id, limits, lambda: 0.0)
    drawn = inputs["cloud_secret"]
    cloud = CloudRenewal(sealers[1], openers[0], session_id, limits, lambda: 0.0, lambda count: drawn)
    frames: list[list[bytes]] = [[], []]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(renewals, "fresh_keys", lambda: fresh_keys(inputs))
        if derived is not None:
            patch.setattr(handshake, "_HPKE", _FrozenHpke(drawn, derived["th1"], derived["answer"]))
        for side, sender, name in ((0, edge, b"before"), (1, cloud, b"answer"), (0, edge, b"behind")):
            first = sender.before_message()
            made = [*([] if first is None else [first]), *sealers[side].seal(name, [inputs["body"]])]
            opened = [openers[side].open(frame) for frame in made][-1]
            assert opened is not None
            assert (bytes(opened.header), bytes(opened.body)) == (name, inputs["body"])
            frames[side] += made
    return {"edge_to_cloud": frames[0], "cloud_to_edge": frames[1]}


def fresh_keys(inputs: dict[str, Any]) -> tuple[MLKEM768PrivateKey, X25519PrivateKey]:
    """The fresh keys of the vectors."""
    return (
        MLKEM768PrivateKey.from_seed_bytes(inputs["mlkem_seed"]),
        X25519PrivateKey.from_private_bytes(inputs["x25519_private_key"]),
    )
