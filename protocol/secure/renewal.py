"""Renewal: fresh keys within a session, so that who has stolen its secrets and listens can read no more soon after.

Rules
    1. The edge begins it, before a message, once enough seconds or bytes have passed since the last one was done. There
       is one at a time.
    2. The cloud bounds its rate: an offer that comes too early ends the session, so that no edge can make it compute
       more than its bytes, or a long wait, cost anyhow.
    3. The frames stand between messages, sealed as they are, and carry no message.
    4. It is not signed: it heals against a thief who listens, not against one who also changes what crosses.

Theory of operation
    E -> C  OFFER    fresh ML-KEM-768 + X25519 public keys        th1 = H("isthmus v1 renewal", session id, OFFER)
    C       s = 32 random bytes; ANSWER = HPKE.seal(s, the fresh keys, info = th1); th2 = H(th1, ANSWER)
    C -> E  ANSWER   before the cloud's next message; behind it the cloud's direction is in its next epoch
    E -> C  SWITCH   before the edge's next message; behind it the edge's direction is in its next epoch

    What is the next epoch's secret follows from the epoch's, from s and from th2 (`KeyChain.ratchet`), in either
    direction. Messages that cross meanwhile stay under the keys of their senders, which change in the stream's order.
    The fresh private keys are dropped with the ANSWER, and s is overwritten with the SWITCH.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from cryptography.hazmat.primitives.hpke import MLKEM768X25519PrivateKey

from isthmus.common.errors import FrameError, LimitError
from isthmus.protocol.limits import Limits
from isthmus.protocol.secure.framing import KEY_BYTES, FreshSecret, KeyChain, Kind, wipe
from isthmus.protocol.secure.handshake import fresh_keys, hash_parts, open_secret, public_bytes, seal_secret
from isthmus.protocol.secure.record import Opener, Sealer

LABEL = b"isthmus v1 renewal"


class _Renewal:
    """What both sides share.

    Args:
        sealer: seals what this side sends.
        opener: opens what the other side sends; its control frames come here from now on.
        session_id: 16 bytes.
        limits: when a renewal is due, and when it comes too early.
        clock: seconds that never go back.
    """

    def __init__(
        self, sealer: Sealer, opener: Opener, session_id: bytes, limits: Limits, clock: Callable[[], float]
    ) -> None:
        self._sealer = sealer
        self._opener = opener
        self._session_id = session_id
        self._limits = limits
        self._clock = clock
        self._fresh: FreshSecret | None = None
        self._begin_interval()
        opener.on_control = self._take

    def close(self) -> None:
        """Overwrite the secret of a renewal that is under way."""
        fresh, self._fresh = self._fresh, None
        if fresh is not None:
            wipe(fresh.secret)

    def _begin_interval(self) -> None:
        self._since, self._total = self._clock(), self._sealer.total + self._opener.total

    def _has_passed(self, seconds: float, size: int) -> bool:
        total = self._sealer.total + self._opener.total
        return self._clock() - self._since >= seconds or total - self._total >= size

    def _take(self, kind: Kind, plain: bytes, keys: KeyChain) -> None:
        raise NotImplementedError


class EdgeRenewal(_Renewal):
    """The edge's side: offers, and switches once the answer has come."""

    _private: MLKEM768X25519PrivateKey | None = None
    _th1 = b""  # from the offer to the switch, which the sending thread makes alone

    def before_message(self) -> bytes | None:
        """The frame that goes before the next message, if there is one."""
        if self._fresh is not None:
            frame = self._sealer.control(Kind.SWITCH, fresh=self._fresh)
            self.close()
            self._th1 = b""
            self._begin_interval()
            return frame
        if not self._th1 and self._has_passed(self._limits.renew_seconds, self._limits.renew_bytes):
            keys = fresh_keys()
            offer = public_bytes(*keys)
            self._private, self._th1 = MLKEM768X25519PrivateKey(*keys), hash_parts(LABEL, self._session_id, offer)
            return self._sealer.control(Kind.OFFER, offer)
        return None

    def close(self) -> None:
        """Overwrite the secret, and drop the private keys, of a renewal that is under way."""
        super().close()
        self._private = None

    def _take(self, kind: Kind, plain: bytes, keys: KeyChain) -> None:
        if kind != Kind.ANSWER or self._private is None:
            raise FrameError(f"{kind.name} of a renewal came out of turn")
        secret, self._private = open_secret(plain, self._private, self._th1), None
        fresh = FreshSecret(secret, hash_parts(self._th1, plain))
        keys.ratchet(fresh)
        self._fresh = fresh  # last: a message that is sent meanwhile, on another thread, ends with it


class CloudRenewal(_Renewal):
    """The cloud's side: answers, and takes the edge's switch.

    Args:
        random: a cryptographic source of bytes.

    The others are those of both sides.
    """

    def __init__(
        self,
        sealer: Sealer,
        opener: Opener,
        session_id: bytes,
        limits: Limits,
        clock: Callable[[], float],
        random: Callable[[int], bytes] = os.urandom,
    ) -> None:
        super().__init__(sealer, opener, session_id, limits, clock)
        self._random = random
        self._answer: bytes | None = None

    def before_message(self) -> bytes | None:
        """The frame that goes before the next message, if there is one."""
        answer, self._answer = self._answer, None
        return None if answer is None else self._sealer.control(Kind.ANSWER, answer, self._fresh)

    def _take(self, kind: Kind, plain: bytes, keys: KeyChain) -> None:
        if kind == Kind.SWITCH and self._fresh is not None and self._answer is None:
            keys.ratchet(self._fresh)
            self.close()
        elif kind == Kind.OFFER and self._fresh is None:
            if not self._has_passed(self._limits.least_renew_seconds, self._limits.least_renew_bytes):
                raise LimitError(
                    f"an offer of fresh keys came less than {self._limits.least_renew_seconds:g} s and "
                    f"{self._limits.least_renew_bytes} bytes after the last one"
                )
            self._begin_interval()
            th1 = hash_parts(LABEL, self._session_id, plain)
            secret = bytearray(self._random(KEY_BYTES))
            answer = seal_secret(secret, plain, th1)
            self._fresh = FreshSecret(secret, hash_parts(th1, answer))
            self._answer = answer  # last: from now on it goes before the next message
        else:
            raise FrameError(f"{kind.name} of a renewal came out of turn")
