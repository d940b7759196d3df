"""Project Wycheproof's vectors, through the calls of `cryptography` that the protocol makes.

Each file has edge cases and known attacks: a tag that was changed, a signature that is malleable, a point of low order,
a key that is not reduced. What the library must refuse ends in an exception that the protocol catches around that call.

Not run: `mlkem_768_semi_expanded_decaps_test.json`, whose private keys are in the expanded form. The library and the
protocol take no such keys; private keys of ML-KEM are made fresh and never read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import InvalidKey, InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hpke import MLKEM768X25519PrivateKey, MLKEM768X25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand
from support import replay
from support.protocol import vectors
from support.protocol.reference import transcript

from isthmus.common.errors import FingerprintError, FrameError
from isthmus.protocol.secure import handshake
from isthmus.protocol.secure.certificates import WorkerCertificate

pytestmark = pytest.mark.shared_data

Vector = dict[str, Any]
Check = Callable[[Vector], None]


@pytest.fixture
def each(shared_data: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[str, Check], None]:
    """Runs a check on every vector of a file, and prints on how many."""
    folder = shared_data / "wycheproof"
    if not folder.is_dir():
        pytest.skip(f"there is no {folder}")

    def run(name: str, check: Check) -> None:
        said = check_all(folder / name, check)
        with capsys.disabled():
            print(f"\n{said}")

    return run


def check_all(file: Path, check: Check) -> str:
    """Check every vector of a file; says how many there were, and fails on none."""
    content = json.loads(file.read_text())
    ran = 0
    for vector in _vectors(content):
        try:
            check(vector)
        except BaseException as error:
            error.add_note(f"{file.name}, tcId {vector['tcId']}: {vector.get('comment')} {vector.get('flags')}")
            raise
        ran += 1
    assert ran == content["numberOfTests"] > 0
    return f"wycheproof: {file.name}: {ran} of {content['numberOfTests']} vectors ran"


def _vectors(content: dict[str, Any]) -> Iterator[Vector]:
    """Tests with what their group says, and bytes where there is hexadecimal."""
    words = (
        "result",
        "comment",
        "flags",
        "tcId",
        "type",
        "source",
        "publicKeyPem",
        "publicKeyJwk",
        "parameterSet",
        "curve",
    )
    for group in content["testGroups"]:
        shared = {key: value for key, value in group.items() if key != "tests"}
        if isinstance(shared.get("publicKey"), dict):
            shared["publicKey"] = shared["publicKey"]["pk"]
        for test in group["tests"]:
            both = {**shared, **test}
            yield {k: bytes.fromhex(v) if isinstance(v, str) and k not in words else v for k, v in both.items()}


def test_a_file_of_which_nothing_runs_fails(tmp_path: Path) -> None:
    for tests in (0, 1):
        file = tmp_path / "none.json"
        file.write_text(json.dumps({"numberOfTests": tests, "testGroups": []}))
        with pytest.raises(AssertionError):
            check_all(file, lambda vector: None)


def test_aes_gcm(each: Callable[[str, Check], None]) -> None:
    """As `sealing` and `handshake` seal and open: into a buffer, and to new bytes."""

    def check(v: Vector) -> None:
        sealed, into = v["ct"] + v["tag"], bytearray(len(v["msg"]))
        cipher = AESGCM(v["key"])
        if not 8 <= len(v["iv"]) <= 128:  # the library takes no others; the protocol's nonces have twelve bytes
            with pytest.raises(ValueError, match="Nonce must be"):
                cipher.decrypt_into(v["iv"], sealed, v["aad"], into)
        elif v["result"] == "valid":
            made = bytearray(len(sealed))
            cipher.encrypt_into(v["iv"], v["msg"], v["aad"], made)
            assert made == sealed == cipher.encrypt(v["iv"], v["msg"], v["aad"])
            cipher.decrypt_into(v["iv"], sealed, v["aad"], into)
            assert into == v["msg"] == cipher.decrypt(v["iv"], sealed, v["aad"])
        else:
            with pytest.raises(InvalidTag):
                cipher.decrypt_into(v["iv"], sealed, v["aad"], into)
            with pytest.raises(InvalidTag):
                cipher.decrypt(v["iv"], sealed, v["aad"])

    each("aes_gcm_test.json", check)


def test_ed25519(each: Callable[[str, Check], None]) -> None:
    def check(v: Vector) -> None:
        key = Ed25519PublicKey.from_public_bytes(v["publicKey"])
        if v["result"] == "valid":
            key.verify(v["sig"], v["msg"])
            return
        with pytest.raises((InvalidSignature, ValueError)):
            key.verify(v["sig"], v["msg"])

    each("ed25519_test.json", check)


def test_a_malleable_signature_of_a_certificate_is_refused() -> None:
    """The same through `WorkerCertificate`: s + the group's order, which the equation alone would take."""
    root = Ed25519PrivateKey.from_private_bytes(bytes(32))
    good = WorkerCertificate.issue(root, bytes(32), 2_000_000_000)
    good.verify(0)
    order = (1 << 252) + 27742317777372353535851937790883648493
    s = (int.from_bytes(good.signature[32:], "little") + order).to_bytes(32, "little")
    with pytest.raises(FingerprintError, match="not signed"):
        WorkerCertificate(good.root, good.worker, good.not_after, good.signature[:32] + s).verify(0)


def test_hkdf(each: Callable[[str, Check], None]) -> None:
    """As the handshake extracts, and the chain of keys expands."""

    def check(v: Vector) -> None:
        key, made = HKDF.extract(SHA256(), v["salt"], v["ikm"]), bytearray(v["size"])
        if v["result"] == "valid":
            HKDFExpand(SHA256(), v["size"], v["info"]).derive_into(key, made)
            assert made == v["okm"]
            return
        with pytest.raises(ValueError, match=r"(?i)large|length"):
            HKDFExpand(SHA256(), v["size"], v["info"]).derive_into(key, made)

    each("hkdf_sha256_test.json", check)


def test_x25519(each: Callable[[str, Check], None]) -> None:
    """Alone, and inside the hybrid HPKE: a point of low order is refused by errors that the handshake catches."""
    mlkem = MLKEM768PrivateKey.generate()

    def check(v: Vector) -> None:
        private = X25519PrivateKey.from_private_bytes(v["private"])
        public = X25519PublicKey.from_public_bytes(v["public"])
        if "ZeroSharedSecret" in v["flags"]:
            with pytest.raises(ValueError, match=r"(?i)shared key"):
                private.exchange(public)
        else:
            assert private.exchange(public) == v["shared"]
        hybrid = MLKEM768X25519PublicKey(mlkem.public_key(), public)
        if "ZeroSharedSecret" in v["flags"]:
            with pytest.raises(ValueError, match=r"(?i)shared key"):
                handshake._HPKE.encrypt(b"secret", hybrid, b"info")
            own = MLKEM768X25519PrivateKey(mlkem, private)
            sealed = handshake._HPKE.encrypt(b"secret", own.public_key(), b"info")
            with pytest.raises((InvalidTag, InvalidKey, ValueError)):
                handshake._HPKE.decrypt(sealed[:1088] + v["public"] + sealed[1120:], own, b"info")
        else:
            handshake._HPKE.encrypt(b"secret", hybrid, b"info")

    each("x25519_test.json", check)


def test_mlkem_keys(each: Callable[[str, Check], None]) -> None:
    def check(v: Vector) -> None:
        made = MLKEM768PrivateKey.from_seed_bytes(v["seed"])
        assert made.public_key().public_bytes_raw() == v["ek"]
        assert made.private_bytes_raw() == v["seed"]

    each("mlkem_768_keygen_seed_test.json", check)


def test_mlkem_decapsulation(each: Callable[[str, Check], None]) -> None:
    def check(v: Vector) -> None:
        if v["result"] == "valid":
            key = MLKEM768PrivateKey.from_seed_bytes(v["seed"])
            assert key.public_key().public_bytes_raw() == v["ek"]
            assert key.decapsulate(v["c"]) == v["K"]
            return
        with pytest.raises(ValueError, match=r"seed|ciphertext"):
            MLKEM768PrivateKey.from_seed_bytes(v["seed"]).decapsulate(v["c"])

    each("mlkem_768_test.json", check)


def hello_with(ek: bytes) -> tuple[bytes, bytes]:
    """The client's hello of a frozen handshake, and the worker's with another ML-KEM key and a good signature."""
    frozen = vectors.read("handshake.json")
    flights, inputs = frozen["flights"], frozen["inputs"]
    unsigned = flights["server_hello"][:38] + ek + flights["server_hello"][38 + 1184 : -64]
    th1 = transcript(flights["client_hello"], unsigned)
    worker = Ed25519PrivateKey.from_private_bytes(inputs["worker_private_key"])
    return flights["client_hello"], unsigned + worker.sign(b"isthmus v1 server\0" + th1)


def test_mlkem_encapsulation(each: Callable[[str, Check], None]) -> None:
    """Through the edge's handshake, whose server sends the key. Which secret comes out cannot be told: it is random."""
    inputs = vectors.read("handshake.json")["inputs"]

    def check(v: Vector) -> None:
        if len(v["ek"]) != 1184:
            with pytest.raises(ValueError, match=r"public key"):
                MLKEM768PublicKey.from_public_bytes(v["ek"])
            return
        client_hello, server_hello = hello_with(v["ek"])
        edge = replay.client(inputs)
        assert edge.start() == client_hello
        if v["result"] == "valid":
            assert len(edge.answer(server_hello)) == 6 + 1168 + 112
            return
        with pytest.raises(FrameError, match="fresh keys are malformed"):
            edge.answer(server_hello)

    each("mlkem_768_encaps_test.json", check)
