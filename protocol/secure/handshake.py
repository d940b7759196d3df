"""The handshake: a SIGMA-like exchange with a hybrid post-quantum key agreement.

Rules
    1. The edge talks only to the holder of a key that the pinned root key has certified, and tells its own name to
       nobody else.
    2. Every handshake has a fresh nonce of each side and a fresh key of the server; a first flight that is sent again
       begins a new session with new keys.
    3. Every signature and every key is bound to everything that was said before. Labels keep one use from another.
    4. Any failure ends the handshake for good.

Theory of operation
    C -> S  CLIENT_HELLO  suite u16, nonce32
    S -> C  SERVER_HELLO  nonce32, fresh ML-KEM-768 + X25519 public keys, root key, worker key + expiry signed by root,
                          [or signed by an issuer, whose key + expiry, signed by root, follow,]
                          Sign_worker("server" | th1)           th1 = H(CLIENT_HELLO, SERVER_HELLO without this
                          signature)
    C       checks: H(root key) = pin, the root's and the issuer's signatures, expiry, the worker's signature
            s = 32 random bytes; ct = HPKE.seal(s, the fresh keys, info = th1); th2 = H(CLIENT_HELLO, SERVER_HELLO, ct)
            prk = HKDF-Extract(th2, s); one handshake key per direction
    C -> S  CLIENT_AUTH   ct, AEAD(edge key, Sign_edge("edge" | th2 | edge key))     the network does not see who it is
    S       checks the signature, then asks its caller whether the edge is enrolled   th3 = H(th2, CLIENT_AUTH)
    S -> C  SERVER_DONE   AEAD(code, text)     code 0: accepted, session id and information; else why not
            traffic secrets = HKDF-Expand(prk, direction | H(th3, SERVER_DONE)); the fresh keys and s are dropped

    SIGMA: Krawczyk, 2003. HPKE: RFC 9180, with the hybrid KEM of ML-KEM-768 and X25519: who records the exchange must
    break both. Signatures are classical: they need to hold only while the handshake runs.
    Every flight begins with: magic "ISTH", kind u8, version u8. A server that does not speak the version answers
    VERSION_REFUSED with its own; this answer is not authenticated, and can do no more than stop the handshake, which
    the network can do anyhow.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256

from cryptography.exceptions import InvalidKey, InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hpke import (
    AEAD,
    KDF,
    KEM,
    MLKEM768X25519PrivateKey,
    MLKEM768X25519PublicKey,
    Suite,
)
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

from isthmus.common.errors import FingerprintError, FrameError, LimitError, LocalProtocolError, VersionError
from isthmus.protocol.limits import Buffer
from isthmus.protocol.secure.certificates import ISSUER_BYTES, IssuerCertificate, WorkerCertificate
from isthmus.protocol.secure.framing import (
    FLIGHT_PREFIX,
    KEY_BYTES,
    MAGIC,
    SEALED_SECRET_BYTES,
    TAG,
    VERSION,
    Direction,
    Kind,
    wipe,
)
from isthmus.protocol.secure.keys import Fingerprint, WorkerIdentity

SUITE = 1
"""ML-KEM-768 + X25519, HKDF-SHA256, AES-256-GCM, Ed25519, SHA-256."""

NONCE_BYTES = 32
SESSION_ID_BYTES = 16
MAX_DONE = 20 * 1024
"""Plaintext bytes of the last flight, at most."""

_HELLO = struct.Struct(f"!H{NONCE_BYTES}s")
_SERVER = struct.Struct(f"!{NONCE_BYTES}s1184s32s32s32sQ64s")
_SIGNATURE = 64
_MLKEM_PUBLIC = 1184
_SEALED_EDGE = 32 + _SIGNATURE + TAG
# Each handshake key seals exactly one flight.
_NONCE = bytes(12)
_HPKE = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)

_SERVER_LABEL = b"isthmus v1 server\0"
_EDGE_LABEL = b"isthmus v1 edge\0"


@dataclass(frozen=True, slots=True)
class Secrets:
    """What a finished handshake leaves: one traffic secret per direction. The receiver owns and overwrites them."""

    edge_to_cloud: bytearray
    cloud_to_edge: bytearray


@dataclass(frozen=True, slots=True)
class Verdict:
    """The server's last word: code 0 with its information, else a code and why, as bytes."""

    code: int
    session_id: bytes
    body: bytes


class ClientHandshake:
    """The edge's side: `start`, then `answer` the server's hello, then `finish` with its last word.

    Args:
        pin: fingerprint of the root key that the server must show a certificate of.
        edge_key: who the edge is.
        now: the wall clock in Unix seconds, for the certificate's expiry.
        random: a cryptographic source of bytes.
    """

    def __init__(
        self,
        pin: Fingerprint,
        edge_key: Ed25519PrivateKey,
        now: Callable[[], float] = time.time,
        random: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self._pin = pin
        self._edge_key = edge_key
        self._now = now
        self._random = random
        self._hello = b""
        self._schedule: _Schedule | None = None

    def start(self) -> bytes:
        """Make the first flight."""
        self._hello = _flight(Kind.CLIENT_HELLO, _HELLO.pack(SUITE, self._random(NONCE_BYTES)))
        return self._hello

    def answer(self, flight: Buffer) -> bytes:
        """Check the server's hello and make the flight that names the edge.

        Raises:
            FingerprintError: the server is not the pinned one, or cannot prove it.
            FrameError: the flight is malformed.
            VersionError: the server speaks another version.
        """
        body = _body(flight, Kind.SERVER_HELLO, _SERVER.size + _SIGNATURE, _SERVER.size + ISSUER_BYTES + _SIGNATURE)
        _, mlkem, x25519, root, worker, not_after, certified = _SERVER.unpack(body[: _SERVER.size])
        th1 = hash_parts(self._hello, bytes(flight)[:-_SIGNATURE])
        issuer = body[_SERVER.size : -_SIGNATURE]
        certificate = WorkerCertificate(
            root, worker, not_after, certified, IssuerCertificate.from_bytes(issuer) if issuer else None
        )
        seen = Fingerprint.of(root)
        if not seen.matches(self._pin):
            raise FingerprintError(
                f"the server's key is {seen}, not the pinned {self._pin}: it is another server, or somebody is "
                "in between. Ask the cloud's owner for the connection string."
            )
        certificate.verify(self._now())
        try:
            Ed25519PublicKey.from_public_bytes(worker).verify(body[-_SIGNATURE:], _SERVER_LABEL + th1)
        except (InvalidSignature, ValueError) as error:
            raise FingerprintError(
                "the server does not prove that it holds the certified key: the exchange was changed on its way. "
                "Try again."
            ) from error
        secret = bytearray(self._random(KEY_BYTES))
        sealed_secret = seal_secret(secret, mlkem + x25519, th1)
        th2 = hash_parts(self._hello, flight, sealed_secret)
        self._schedule = _Schedule(th2, secret)
        wipe(secret)
        edge = self._edge_key.public_key().public_bytes_raw()
        signature = self._edge_key.sign(_EDGE_LABEL + th2 + edge)
        sealed = self._schedule.seal(Direction.EDGE_TO_CLOUD, edge + signature)
        reply = _flight(Kind.CLIENT_AUTH, sealed_secret + sealed)
        self._schedule.add(reply)
        return reply

    def finish(self, flight: Buffer) -> tuple[Verdict, Secrets | None]:
        """Read the server's last word; the secrets are there only if it accepts.

        Raises:
            FrameError: the flight is not authentic.
            LimitError: it is too long.
        """
        if self._schedule is None:
            raise LocalProtocolError("the handshake has no keys yet")
        if len(flight) > FLIGHT_PREFIX.size + MAX_DONE + TAG:
            raise LimitError(f"a last flight of {len(flight)} bytes is refused: {MAX_DONE} are accepted")
        plain = self._schedule.open(Direction.CLOUD_TO_EDGE, _body(flight, Kind.SERVER_DONE))
        if len(plain) < 1 + SESSION_ID_BYTES:
            raise FrameError("the server's last flight is too short")
        verdict = Verdict(plain[0], plain[1 : 1 + SESSION_ID_BYTES], plain[1 + SESSION_ID_BYTES :])
        self._schedule.add(flight)
        return verdict, self._schedule.secrets() if verdict.code == 0 else None

    def close(self) -> None:
        """Overwrite the keys."""
        if self._schedule is not None:
            self._schedule.wipe()


def fresh_keys() -> tuple[MLKEM768PrivateKey, X25519PrivateKey]:
    """Make the keys of one handshake, from the library's own source of random bytes."""
    return MLKEM768PrivateKey.generate(), X25519PrivateKey.generate()


def public_bytes(mlkem: MLKEM768PrivateKey, x25519: X25519PrivateKey) -> bytes:
    """The public keys of fresh keys, one behind the other."""
    return mlkem.public_key().public_bytes_raw() + x25519.public_key().public_bytes_raw()


def seal_secret(secret: Buffer, public: bytes, info: bytes) -> bytes:
    """Seal a secret for the holder of fresh keys. Raises FrameError where the public keys are malformed."""
    mlkem, x25519 = public[:_MLKEM_PUBLIC], public[_MLKEM_PUBLIC:]
    try:
        fresh = MLKEM768X25519PublicKey(
            MLKEM768PublicKey.from_public_bytes(mlkem), X25519PublicKey.from_public_bytes(x25519)
        )
        return _HPKE.encrypt(secret, fresh, info)
    except ValueError as error:
        raise FrameError("the other side's fresh keys are malformed") from error


def open_secret(sealed: bytes, fresh: MLKEM768X25519PrivateKey, info: bytes) -> bytearray:
    """Open a secret that was sealed for fresh keys. Raises FrameError where that is not possible."""
    try:
        return bytearray(_HPKE.decrypt(sealed, fresh, info))
    except (InvalidTag, InvalidKey, ValueError) as error:
        raise FrameError("the other side's secret cannot be opened: the exchange was changed on its way") from error


class ServerHandshake:
    """The worker's side: `answer` the hello, `identify` the edge, then `finish` with a verdict.

    Args:
        identity: the worker's key and certificate.
        random: a cryptographic source of bytes, for the nonce.
        fresh: makes the keys of this handshake.
    """

    def __init__(
        self,
        identity: WorkerIdentity,
        random: Callable[[int], bytes] = os.urandom,
        fresh: Callable[[], tuple[MLKEM768PrivateKey, X25519PrivateKey]] = fresh_keys,
    ) -> None:
        self._identity = identity
        self._random = random
        self._make_fresh = fresh
        self._hellos: tuple[bytes, bytes] | None = None
        self._th1 = b""
        self._fresh: MLKEM768X25519PrivateKey | None = None
        self._schedule: _Schedule | None = None

    def answer(self, flight: Buffer) -> bytes:
        """Make the server's hello.

        Raises:
            FrameError: the flight is malformed.
            VersionError: the edge speaks another version or suite; `version_refusal()` is the answer.
        """
        body = _body(flight, Kind.CLIENT_HELLO, _HELLO.size)
        suite, _ = _HELLO.unpack(body)
        if suite != SUITE:
            raise VersionError(
                f"the edge offers cipher suite {suite}; this worker speaks suite {SUITE}. Use the same release."
            )
        mlkem, x25519 = self._make_fresh()
        self._fresh = MLKEM768X25519PrivateKey(mlkem, x25519)
        certificate, public = self._identity.certificate, public_bytes(mlkem, x25519)
        fields = _SERVER.pack(
            self._random(NONCE_BYTES),
            public[:_MLKEM_PUBLIC],
            public[_MLKEM_PUBLIC:],
            certificate.root,
            certificate.worker,
            certificate.not_after,
            certificate.signature,
        )
        issuer = b"" if certificate.issuer is None else certificate.issuer.to_bytes()
        unsigned = _flight(Kind.SERVER_HELLO, fields + issuer)
        self._th1 = hash_parts(flight, unsigned)
        reply = unsigned + self._identity.key.sign(_SERVER_LABEL + self._th1)
        self._hellos = (bytes(flight), reply)
        return reply

    def identify(self, flight: Buffer) -> bytes:
        """Learn who the edge is.

        Returns:
            The edge's raw Ed25519 public key, proven to be its own. Whether it is enrolled is the caller's question.

        Raises:
            FrameError: the flight is malformed, or the proof fails.
        """
        if self._hellos is None or self._fresh is None:
            raise LocalProtocolError("the handshake has no keys yet")
        body = _body(flight, Kind.CLIENT_AUTH, SEALED_SECRET_BYTES + _SEALED_EDGE)
        sealed_secret, sealed_edge = body[:SEALED_SECRET_BYTES], body[SEALED_SECRET_BYTES:]
        fresh, self._fresh = self._fresh, None
        secret = open_secret(sealed_secret, fresh, self._th1)
        th2 = hash_parts(*self._hellos, sealed_secret)
        self._schedule = _Schedule(th2, secret)
        wipe(secret)
        plain = self._schedule.open(Direction.EDGE_TO_CLOUD, sealed_edge)
        edge, signature = plain[:32], plain[32:]
        try:
            Ed25519PublicKey.from_public_bytes(edge).verify(signature, _EDGE_LABEL + th2 + edge)
        except (InvalidSignature, ValueError) as error:
            raise FrameError("the edge does not prove that it holds its key") from error
        self._schedule.add(flight)
        return edge

    def finish(self, verdict: Verdict) -> tuple[bytes, Secrets | None]:
        """Make the last flight; the secrets are there only if the verdict accepts."""
        if self._schedule is None or len(verdict.session_id) != SESSION_ID_BYTES:
            raise LocalProtocolError("the handshake has no keys yet, or the session id is malformed")
        plain = bytes((verdict.code,)) + verdict.session_id + verdict.body
        if len(plain) > MAX_DONE:
            raise LocalProtocolError(f"a last flight of {len(plain)} bytes is over {MAX_DONE}")
        reply = _flight(Kind.SERVER_DONE, self._schedule.seal(Direction.CLOUD_TO_EDGE, plain))
        self._schedule.add(reply)
        return reply, self._schedule.secrets() if verdict.code == 0 else None

    def close(self) -> None:
        """Overwrite the keys."""
        self._fresh = None
        if self._schedule is not None:
            self._schedule.wipe()


def version_refusal() -> bytes:
    """Make the answer to a hello of another version or suite: it carries only this side's own version."""
    return _flight(Kind.VERSION_REFUSED, b"")


class _Schedule:
    """The keys of one handshake, and the transcript that they are bound to."""

    def __init__(self, th2: bytes, secret: Buffer) -> None:
        self._prk = bytearray(HKDF.extract(SHA256(), th2, secret))
        self._transcript = th2
        self._keys = {side: self._derive(b"isthmus v1 handshake", side, th2) for side in Direction}

    def _derive(self, label: bytes, direction: Direction, transcript: bytes) -> bytearray:
        key = bytearray(KEY_BYTES)
        info = label + bytes((direction,)) + transcript
        HKDFExpand(SHA256(), KEY_BYTES, info).derive_into(self._prk, key)
        return key

    def add(self, flight: Buffer) -> None:
        self._transcript = hash_parts(self._transcript, flight)

    def seal(self, direction: Direction, plain: bytes) -> bytes:
        return AESGCM(self._keys[direction]).encrypt(_NONCE, plain, self._transcript)

    def open(self, direction: Direction, sealed: Buffer) -> bytes:
        try:
            return AESGCM(self._keys[direction]).decrypt(_NONCE, sealed, self._transcript)
        except InvalidTag:
            raise FrameError("a flight of the handshake is not authentic: it was changed on its way") from None

    def secrets(self) -> Secrets:
        label = b"isthmus v1 traffic"
        up, down = (self._derive(label, side, self._transcript) for side in Direction)
        self.wipe()
        return Secrets(edge_to_cloud=up, cloud_to_edge=down)

    def wipe(self) -> None:
        wipe(self._prk, *self._keys.values())


def _flight(kind: Kind, body: bytes) -> bytes:
    return FLIGHT_PREFIX.pack(MAGIC, kind, VERSION) + body


def _body(flight: Buffer, kind: Kind, *sizes: int) -> bytes:
    """Check a flight's prefix and length and give its body. Without sizes: at least a tag."""
    if len(flight) < FLIGHT_PREFIX.size:
        raise FrameError(f"a flight of the handshake has {len(flight)} bytes")
    magic, got, version = FLIGHT_PREFIX.unpack(bytes(flight[: FLIGHT_PREFIX.size]))
    if magic != MAGIC:
        raise FrameError("the other side does not speak the protocol of Isthmus")
    if version != VERSION or got == Kind.VERSION_REFUSED:
        raise VersionError(
            f"the other side speaks version {version}, this side version {VERSION} with cipher suite {SUITE}. "
            "Use the same release on both sides."
        )
    if got != kind:
        raise FrameError(f"flight {got} of the handshake came where {int(kind)} was due")
    body = bytes(flight[FLIGHT_PREFIX.size :])
    if len(body) not in sizes if sizes else len(body) < TAG:
        due = " or ".join(map(str, sizes or (TAG,)))
        raise FrameError(f"a flight of the handshake has {len(body)} bytes where {due} are due")
    return body


def hash_parts(*parts: Buffer) -> bytes:
    """Hash parts with their lengths, so that no two lists of parts give the same hash."""
    state = sha256()
    for part in parts:
        state.update(len(part).to_bytes(4, "big"))
        state.update(part)
    return state.digest()
