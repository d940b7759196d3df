"""Key files and certificates, as a folder that somebody hands over may hold them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from fuzz.target import Cursor, Target, scratch
from support.protocol.wire import EDGE, NOW, WORKER, identity

from isthmus.common.errors import KeyFileError
from isthmus.protocol.secure import keyfiles, keys
from isthmus.protocol.secure.certificates import WorkerCertificate
from isthmus.protocol.secure.keys import load_edge, load_worker

_PEM, _SSH = PrivateFormat.PKCS8, PrivateFormat.OpenSSH


@functools.cache
def _folder() -> Path:
    folder = scratch()
    (folder / keys.WORKER_CERT).write_text(identity().certificate.to_json())
    return folder


def _run(data: bytes) -> None:
    script = Cursor(data)
    which, content = script.number() % 3, script.rest()
    name, read = ((keys.WORKER_CERT, _worker), (keys.WORKER_KEY, _worker), ("edge_key", _edge))[which]
    folder = _folder()
    for each in (keys.WORKER_KEY, keys.WORKER_CERT, "edge_key"):
        (folder / each).unlink(missing_ok=True)
    files = {keys.WORKER_KEY: _key(_PEM), keys.WORKER_CERT: identity().certificate.to_json().encode(), name: content}
    for each, raw in files.items():
        keyfiles.create_file(folder / each, raw, 0o600)
    try:
        with patch.object(keys.OF_EDGE, "asks", False):
            loaded = read(folder)
    except KeyFileError as error:
        str(error).encode(errors="backslashreplace")
        return
    if not isinstance(loaded, Ed25519PrivateKey):
        raise AssertionError(f"a {type(loaded).__name__} was taken for a key")


def _worker(folder: Path) -> Any:
    worker = load_worker(folder, now=lambda: float(NOW))
    worker.certificate.verify(NOW)
    if WorkerCertificate.from_json(worker.certificate.to_json()) != worker.certificate:
        raise AssertionError("a certificate is another one when it is read again")
    return worker.key


def _edge(folder: Path) -> Any:
    return load_edge(folder / "edge_key")


def _key(form: PrivateFormat, key: Any = WORKER, protection: Any = None) -> bytes:
    raw: bytes = key.private_bytes(Encoding.PEM, form, protection or NoEncryption())
    return raw


def _seeds() -> Iterator[bytes]:
    yield b"\0" + identity().certificate.to_json().encode()
    yield b"\0" + identity(not_after=NOW).certificate.to_json().encode()
    yield b"\0" + identity(root=EDGE).certificate.to_json().encode()
    yield b'\0{"root": "", "worker": "", "signature": "", "not_after": 1}'
    yield b"\0\xff"
    yield b"\0" + b"[" * 4000
    yield b"\1" + _key(_PEM)
    yield b"\1" + _key(_PEM, EDGE)
    yield b"\2" + _key(_SSH, EDGE)
    yield b"\2" + _key(_PEM, EDGE, BestAvailableEncryption(b"secret"))


TARGET = Target(
    _run,
    _seeds,
    [
        load_worker,
        load_edge,
        keys._load_pem,
        keys.Passphrase.of,
        WorkerCertificate.from_json,
        WorkerCertificate.verify,
        keyfiles._read,
        keyfiles._decode,
    ],
    floor=0.8,
    max_len=4096,
    words=[
        b"-----BEGIN OPENSSH PRIVATE KEY-----\n",
        b"-----BEGIN PRIVATE KEY-----\n",
        b"-----END",
        b"openssh-key-v1\0",
        b"ssh-ed25519",
        b"aes256-ctr",
        b"bcrypt",
        b"none",
        b'"not_after": ',
        b'"version": 1',
    ],
)
