"""Sessions of the sans-IO state machines that crash at any point and begin again, and what they have sealed.

A crash loses a machine with all that it holds. After it, the same edge, with the same key, begins again with the same
worker: all that could make it seal with a key and a nonce for a second time is what it draws at random.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from isthmus.experiments.rigs.secrets.broken_random import SOURCES
from isthmus.experiments.rigs.secrets.nonce_log import Sealed, logged
from isthmus.protocol import messages as m
from isthmus.protocol.enrolment import Tenant
from isthmus.protocol.limits import DEFAULT_LIMITS
from isthmus.protocol.secure.framing import Direction
from isthmus.protocol.secure.keys import (
    Fingerprint,
    WorkerIdentity,
    generate_edge,
    generate_root,
    issue_worker,
    load_edge,
    load_worker,
)
from isthmus.protocol.secure.record import Sealer
from isthmus.protocol.session import CloudSession, EdgeSession, Established
from isthmus.protocol.tensor_codecs import ACTIVATION_CODECS

LIMITS = replace(DEFAULT_LIMITS, rekey_frames=3, renew_bytes=100, least_renew_bytes=0)
"""A new key after every few messages, and fresh ones, so that crashes fall before, in and after either."""
FLIGHTS, MOST_MESSAGES = 4, 12


class Machines:
    """An edge and a worker that know each other.

    Args:
        folder: Where their keys are made.
        seed: Says where they crash.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        home, key = folder / "machines", folder / "machine-edge"
        home.mkdir(parents=True, mode=0o700)
        self._pin: Fingerprint = generate_root(home)
        issue_worker(home)
        generate_edge(key, "edge")
        self._identity: WorkerIdentity = load_worker(home)
        self._key: Ed25519PrivateKey = load_edge(key)
        self._now = time.time()
        self._draw = random.Random(seed)  # noqa: S311  # is no secret

    def crash(self) -> None:
        """One session, to where it crashes: in the handshake, or after some messages."""
        edge = EdgeSession(pin=self._pin, edge_key=self._key, limits=LIMITS, now=lambda: self._now)
        cloud = CloudSession(
            identity=self._identity,
            authorize=lambda key: Tenant("edge", Fingerprint.of(key)),
            info=_info,
            limits=LIMITS,
        )
        steps = self._draw.randint(1, FLIGHTS + MOST_MESSAGES)
        for _ in zip(range(steps), self._session(edge, cloud), strict=False):
            pass

    def _session(self, edge: EdgeSession, cloud: CloudSession) -> Iterator[None]:
        """The steps of a session: the flights of the handshake, then messages either way."""
        flight = edge.start()
        while not edge.established:
            yield
            (flight,) = cloud.receive(flight).frames
            yield
            event = edge.receive(flight)
            if not isinstance(event, Established):
                (flight,) = event.frames
        while True:
            sender, receiver, message = (
                (edge, cloud, m.Ping(self._draw.getrandbits(32)))
                if self._draw.random() < 0.5
                else (cloud, edge, m.Pong(self._draw.getrandbits(32), 0))
            )
            for frame in sender.send(message):
                receiver.receive(frame)
            yield


def _info(_tenant: Tenant, session_id: bytes) -> m.SessionInfo:
    return m.SessionInfo(
        session_id=session_id.hex(),
        model="none",
        digest="00" * 32,
        family="llama",
        n_layers=4,
        plan="1:1",
        hidden_size=8,
        attn_implementation="sdpa",
        span_dtype="fp32",
        codecs=ACTIVATION_CODECS,
        limits=m.SpanLimits(max_tokens_per_call=4096, max_message_bytes=1 << 20, activation_cache_bytes=1 << 20),
        server_version="0",
        numerics="none",
    )


def crashed_machines(
    folder: Path, sessions: int, source: str, seed: int, advance: Callable[[], None] = lambda: None
) -> Sealed:
    """What the machines of so many sessions have sealed.

    Args:
        folder: For their keys; a new one.
        sessions: Each of an edge's machine and a worker's.
        source: Of random bytes, a name of `SOURCES`.
        seed: Says where they crash.
        advance: Called after each.
    """
    machines = Machines(folder, seed)
    entries: list[bytes] = []
    with logged(entries.append), SOURCES[source]():
        for _ in range(sessions):
            machines.crash()
            advance()
    return Sealed.of(entries)


def restored_sealer() -> Sealed:
    """What is sealed by two sealers of one secret: a session that goes on from a saved state after a crash."""
    entries: list[bytes] = []
    with logged(entries.append):
        for _ in range(2):
            sealer = Sealer(bytearray(range(32)), bytes(16), Direction.EDGE_TO_CLOUD, LIMITS)
            for _ in sealer.seal(b"header", [b"body"]):
                pass
    return Sealed.of(entries)
