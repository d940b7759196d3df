"""The handshake and the record layer a second time, written from their description and not from the project's code.

Only struct, hashlib, hmac and the primitives of `cryptography`; nothing of `isthmus`. What it computes from the inputs
of the frozen vectors is compared with their intermediate values, so it also shows that the vectors suffice to write
such an implementation.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

EDGE_TO_CLOUD, CLOUD_TO_EDGE = 1, 2
DATA, REKEY, OFFER, ANSWER, SWITCH = range(16, 21)
CONTROLS = {REKEY: 0, OFFER: 1216, ANSWER: 1168, SWITCH: 0}
HEADER_PIECE, CHUNK_PIECE, REKEY_PIECE = 1, 2, 3
PIECES = {1: "header", 2: "chunk", 3: "rekey", 4: "offer", 5: "answer", 6: "switch"}
TAG = 16


def hkdf_extract(salt: bytes, secret: bytes) -> bytes:
    """RFC 5869 with SHA-256."""
    return hmac.new(salt, secret, hashlib.sha256).digest()


def hkdf_expand(key: bytes, info: bytes, size: int = 32) -> bytes:
    """RFC 5869 with SHA-256."""
    result, block, number = b"", b"", 1
    while len(result) < size:
        block = hmac.new(key, block + info + bytes([number]), hashlib.sha256).digest()
        result, number = result + block, number + 1
    return result[:size]


def transcript(*parts: bytes) -> bytes:
    """SHA-256 over parts, each behind its length in 4 bytes."""
    return hashlib.sha256(b"".join(struct.pack("!I", len(part)) + part for part in parts)).digest()


# The handshake --------------------------------------------------------------------------------------------------------


def hpke_open(sealed: bytes, mlkem: MLKEM768PrivateKey, x25519: X25519PrivateKey, info: bytes) -> dict[str, bytes]:
    """RFC 9180, base mode, one shot: KEM ML-KEM-768 + X25519 (0x647a), HKDF-SHA256 (1), AES-256-GCM (2)."""
    mlkem_ciphertext, x25519_ephemeral, ciphertext = sealed[:1088], sealed[1088:1120], sealed[1120:]
    mlkem_secret = mlkem.decapsulate(mlkem_ciphertext)
    x25519_secret = x25519.exchange(X25519PublicKey.from_public_bytes(x25519_ephemeral))
    own = x25519.public_key().public_bytes_raw()
    shared = hashlib.sha3_256(mlkem_secret + x25519_secret + x25519_ephemeral + own + rb"\.//^" + b"\\").digest()
    suite = b"HPKE" + struct.pack("!HHH", 0x647A, 1, 2)

    def extract(salt: bytes, label: bytes, secret: bytes) -> bytes:
        return hkdf_extract(salt, b"HPKE-v1" + suite + label + secret)

    def expand(key: bytes, label: bytes, context: bytes, size: int) -> bytes:
        return hkdf_expand(key, struct.pack("!H", size) + b"HPKE-v1" + suite + label + context, size)

    context = b"\0" + extract(b"", b"psk_id_hash", b"") + extract(b"", b"info_hash", info)
    secret = extract(shared, b"secret", b"")
    key, nonce = expand(secret, b"key", context, 32), expand(secret, b"base_nonce", context, 12)
    return {
        "mlkem_shared_secret": mlkem_secret,
        "x25519_shared_secret": x25519_secret,
        "kem_shared_secret": shared,
        "hpke_key": key,
        "hpke_base_nonce": nonce,
        "opened_secret": AESGCM(key).decrypt(nonce, ciphertext, b""),
    }


def handshake(inputs: dict[str, Any], flights: dict[str, bytes]) -> dict[str, bytes]:
    """Everything that both sides of a handshake derive, from the private keys and the flights.

    Raises:
        AssertionError, InvalidSignature, InvalidTag: something does not fit.
    """
    root, worker, edge = (
        Ed25519PrivateKey.from_private_bytes(inputs[f"{who}_private_key"]) for who in ("root", "worker", "edge")
    )
    mlkem = MLKEM768PrivateKey.from_seed_bytes(inputs["mlkem_seed"])
    x25519 = X25519PrivateKey.from_private_bytes(inputs["x25519_private_key"])
    root_public, worker_public, edge_public = (each.public_key().public_bytes_raw() for each in (root, worker, edge))
    ssh = struct.pack("!I", 11) + b"ssh-ed25519" + struct.pack("!I", 32) + root_public
    certified = b"isthmus v1 worker certificate\0" + worker_public + struct.pack("!Q", inputs["not_after"])
    version = bytes([inputs["version"]])

    hello = b"ISTH\x01" + version + struct.pack("!H", inputs["suite"]) + inputs["client_nonce"]
    unsigned = b"".join(
        (
            b"ISTH\x02" + version,
            inputs["server_nonce"],
            mlkem.public_key().public_bytes_raw(),
            x25519.public_key().public_bytes_raw(),
            root_public,
            worker_public,
            struct.pack("!Q", inputs["not_after"]),
            root.sign(certified),
        )
    )
    th1 = transcript(hello, unsigned)
    server_signed = b"isthmus v1 server\0" + th1
    assert flights["client_hello"] == hello
    assert flights["server_hello"] == unsigned + worker.sign(server_signed)

    auth = flights["client_auth"]
    assert auth[:6] == b"ISTH\x03" + version
    assert len(auth) == 6 + 1168 + 112
    sealed_secret, sealed_edge = auth[6 : 6 + 1168], auth[6 + 1168 :]
    hpke = hpke_open(sealed_secret, mlkem, x25519, th1)
    assert hpke["opened_secret"] == inputs["client_secret"]
    th2 = transcript(hello, flights["server_hello"], sealed_secret)
    prk = hkdf_extract(th2, inputs["client_secret"])
    up, down = (hkdf_expand(prk, b"isthmus v1 handshake" + bytes([way]) + th2) for way in (1, 2))
    edge_signed = b"isthmus v1 edge\0" + th2 + edge_public
    edge_plain = AESGCM(up).decrypt(bytes(12), sealed_edge, th2)
    assert edge_plain[:32] == edge_public
    Ed25519PublicKey.from_public_bytes(edge_public).verify(edge_plain[32:], edge_signed)

    th3 = transcript(th2, auth)
    derived = {
        "root_public_key": root_public,
        "worker_public_key": worker_public,
        "edge_public_key": edge_public,
        "root_fingerprint": hashlib.sha256(ssh).digest(),
        "certificate_signed": certified,
        "certificate_signature": root.sign(certified),
        "mlkem_public_key": mlkem.public_key().public_bytes_raw(),
        "x25519_public_key": x25519.public_key().public_bytes_raw(),
        "th1": th1,
        "server_signed": server_signed,
        "server_signature": worker.sign(server_signed),
        "sealed_secret": sealed_secret,
        **hpke,
        "th2": th2,
        "prk": prk,
        "handshake_key_edge_to_cloud": up,
        "handshake_key_cloud_to_edge": down,
        "edge_signed": edge_signed,
        "client_auth_plaintext": edge_plain,
        "th3": th3,
    }
    for name in ("server_done", "server_done_refused"):
        verdict = inputs["verdict" if name == "server_done" else "verdict_refused"]
        flight = flights[name]
        plain = AESGCM(down).decrypt(bytes(12), flight[6:], th3)
        assert flight[:6] == b"ISTH\x04" + version
        assert plain == bytes([verdict["code"]]) + verdict["session_id"] + verdict["body"]
        derived[f"{name}_plaintext"] = plain
    th4 = transcript(th3, flights["server_done"])
    ways = (("edge_to_cloud", EDGE_TO_CLOUD), ("cloud_to_edge", CLOUD_TO_EDGE))
    traffic = {f"traffic_secret_{name}": hkdf_expand(prk, b"isthmus v1 traffic" + bytes([w]) + th4) for name, w in ways}
    assert flights["version_refused"] == b"ISTH\x05" + version
    return {**derived, "th4": th4, **traffic}


# The record layer -----------------------------------------------------------------------------------------------------


def open_records(case: dict[str, Any], frames: list[bytes]) -> dict[str, Any]:
    """The messages of one direction, each piece that was sealed, and the secret and key of each epoch.

    `fresh` of the case: the secret and the transcript's hash of a renewal, if it has one.

    Raises:
        AssertionError, InvalidTag: something does not fit.
    """
    secret, epoch, counter = case["secret"], 0, 0
    key = hkdf_expand(secret, b"isthmus traffic key")
    epochs: list[dict[str, Any]] = [{"epoch": 0, "secret": secret, "key": key}]
    pieces: list[dict[str, Any]] = []
    messages: list[dict[str, bytes]] = []
    header, body, next_chunk = b"", b"", 0

    def take(frame: int, kind: int, prefix: bytes, sealed: bytes, header_hash: bytes = b"") -> bytes:
        nonlocal counter
        nonce = struct.pack("!IQ", epoch, counter)
        aad = case["session_id"] + bytes([case["direction"], kind]) + prefix + header_hash
        plain = AESGCM(key).decrypt(nonce, sealed, aad)
        name = PIECES[kind]
        number = {"frame": frame, "piece": name, "epoch": epoch, "counter": counter}
        pieces.append({**number, "nonce": nonce, "aad": aad, "plaintext": plain})
        counter += 1
        return plain

    for number, frame in enumerate(frames):
        prefix, rest = frame[:34], frame[34:]
        magic, kind, version, *named = struct.unpack("!4sBBIQ", prefix[:18])
        header_bytes, chunk, chunks, total = struct.unpack("!IHHQ", prefix[18:])
        assert (magic, version, named) == (b"ISTH", case["version"], [epoch, counter])
        if kind in CONTROLS:
            size = CONTROLS[kind]
            assert (next_chunk, header_bytes, chunk, chunks, total, len(rest)) == (0, 0, 0, 1, size, size + TAG)
            take(number, kind - REKEY + REKEY_PIECE, prefix, rest)
            if kind == OFFER:
                continue
            if kind == REKEY:
                secret = hkdf_expand(secret, b"isthmus next epoch")
            else:
                renewed = b"isthmus renewed epoch" + case["fresh"]["transcript"]
                secret = hkdf_expand(hkdf_extract(secret, case["fresh"]["secret"]), renewed)
            epoch += 1
            key = hkdf_expand(secret, b"isthmus traffic key")
            epochs.append({"epoch": epoch, "secret": secret, "key": key})
            continue
        assert (kind, chunk) == (DATA, next_chunk)
        assert chunks == max(1, -(-total // case["chunk_bytes"]))
        if chunk == 0:
            header = take(number, HEADER_PIECE, prefix, rest[: header_bytes + TAG])
            rest, body = rest[header_bytes + TAG :], b""
        if total:
            body += take(number, CHUNK_PIECE, prefix, rest, hashlib.sha256(header).digest())
        else:
            assert not rest
        next_chunk = (chunk + 1) % chunks
        if next_chunk == 0:
            assert len(body) == total
            messages.append({"header": header, "body": body})
    assert next_chunk == 0
    return {"messages": messages, "pieces": pieces, "epochs": epochs}


# Renewal --------------------------------------------------------------------------------------------------------------


def renewal(inputs: dict[str, Any], offer: bytes, answer: bytes) -> dict[str, bytes]:
    """Everything that both sides of a renewal derive, from the private keys and what the two frames carry.

    Raises:
        AssertionError, InvalidTag: something does not fit.
    """
    mlkem = MLKEM768PrivateKey.from_seed_bytes(inputs["mlkem_seed"])
    x25519 = X25519PrivateKey.from_private_bytes(inputs["x25519_private_key"])
    assert offer == mlkem.public_key().public_bytes_raw() + x25519.public_key().public_bytes_raw()
    th1 = transcript(b"isthmus v1 renewal", inputs["session_id"], offer)
    hpke = hpke_open(answer, mlkem, x25519, th1)
    assert hpke["opened_secret"] == inputs["cloud_secret"]
    return {"offer": offer, "th1": th1, "answer": answer, **hpke, "th2": transcript(th1, answer)}
