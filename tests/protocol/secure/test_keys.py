"""Key files: modes, contents, refusals. Fingerprints and certificates."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat
from support.commands import in_process, refused
from support.protocol.wire import NOW, PIN, ROOT, identity

from isthmus.cli.cloud_commands import keygen
from isthmus.common.errors import ConfigError, FingerprintError, KeyFileError
from isthmus.protocol.enrolment import add_line
from isthmus.protocol.secure.keys import (
    Fingerprint,
    WorkerCertificate,
    generate_edge,
    generate_root,
    issue_worker,
    load_edge,
    load_worker,
    parse_public_key,
)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_worker_needs_no_root_key(tmp_path: Path) -> None:
    pin = generate_root(tmp_path / "root")
    issue_worker(tmp_path / "root")
    worker = tmp_path / "worker"
    worker.mkdir()
    for name in ("worker_key", "worker_cert"):
        shutil.copy2(tmp_path / "root" / name, worker / name)
    loaded = load_worker(worker)
    assert loaded.pin == pin
    assert loaded.certificate.worker == loaded.key.public_key().public_bytes_raw()


def test_private_files_are_private_and_never_overwritten(tmp_path: Path) -> None:
    generate_root(tmp_path)
    issue_worker(tmp_path)
    generate_edge(tmp_path / "edge", "me")
    private = [tmp_path / name for name in ("root_key", "worker_key", "edge")]
    assert [mode(path) for path in private] == [0o600] * 3
    before = [path.read_bytes() for path in private]
    with pytest.raises(KeyFileError, match=r"root_key exists and is not overwritten"):
        generate_root(tmp_path)
    with pytest.raises(KeyFileError, match=r"edge exists and is not overwritten"):
        generate_edge(tmp_path / "edge", "me")
    issue_worker(tmp_path)
    assert [path.read_bytes() for path in private] == before


def test_a_folder_that_cannot_be_made_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    below = tmp_path / "file" / "home"
    public = generate_edge(tmp_path / "edge", "me")
    for make in (
        lambda: generate_root(below),
        lambda: generate_edge(below / "id_ed25519", "me"),
        lambda: add_line(below / "authorized_edges", public),
    ):
        with pytest.raises(KeyFileError, match=r"file/home cannot be written \(Not a directory\): check the folder"):
            make()
    generate_edge(tmp_path / "new" / "id_ed25519", "me")
    assert mode(tmp_path / "new") == 0o700


@pytest.mark.parametrize("words", [("cloud", "keygen", "--home"), ("edge", "keygen", "--out")])
def test_the_commands_report_it_too(words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    refused(in_process(capsys, *words, tmp_path / "file" / "home" / "key"), 30, "file/home", "check the folder")


def test_a_place_where_the_user_may_not_look_is_reported(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # permissions do not bind root
    try:
        with pytest.raises(KeyFileError, match=r"locked/cloud cannot be written \(Permission denied\)"):
            keygen(locked / "cloud", 1)
    finally:
        os.seteuid(user)


def test_renewal_keeps_the_worker_key_and_moves_the_expiry(tmp_path: Path) -> None:
    generate_root(tmp_path)
    first = issue_worker(tmp_path, days=1, now=lambda: NOW)
    second = issue_worker(tmp_path, days=2, now=lambda: NOW)
    assert (first.worker, first.not_after + 86_400) == (second.worker, second.not_after)
    assert load_worker(tmp_path, now=lambda: NOW + 86_401).certificate == second
    with pytest.raises(KeyFileError, match=r"expired.*isthmus cloud keygen"):
        load_worker(tmp_path, now=lambda: NOW + 2 * 86_400)


@pytest.mark.parametrize("bits", [0o640, 0o604, 0o660, 0o601])
def test_files_that_others_can_read_are_refused(tmp_path: Path, bits: int) -> None:
    generate_root(tmp_path)
    issue_worker(tmp_path)
    generate_edge(tmp_path / "edge", "me")
    for name, load in (("edge", lambda: load_edge(tmp_path / "edge")), ("worker_key", lambda: load_worker(tmp_path))):
        (tmp_path / name).chmod(bits)
        with pytest.raises(KeyFileError, match=rf"{bits:04o}.*chmod 600 .*{name}"):
            load()


def test_missing_and_malformed_files_name_the_path_and_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match=r"none does not exist: run `isthmus edge keygen`"):
        load_edge(tmp_path / "none")
    with pytest.raises(KeyFileError, match=r"worker_key does not exist: run `isthmus cloud keygen`"):
        load_worker(tmp_path)
    with pytest.raises(KeyFileError, match=r"root_key does not exist"):
        issue_worker(tmp_path)
    with pytest.raises(KeyFileError, match="folder"):
        load_edge(tmp_path)
    for content in (
        b"",
        b"hello",
        b"\xff" * 100,
        b"-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END OPENSSH PRIVATE KEY-----\n",
    ):
        path = tmp_path / "bad"
        path.write_bytes(content)
        path.chmod(0o600)
        with pytest.raises(KeyFileError, match="bad is not a private key"):
            load_edge(path)


def test_keys_of_other_kinds_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.touch(mode=0o600)
    other = ec.generate_private_key(ec.SECP256R1())
    path.write_bytes(other.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    with pytest.raises(KeyFileError, match="not an Ed25519 key"):
        load_edge(path)
    locked = Ed25519PrivateKey.generate().private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")
    )
    generate_root(tmp_path)
    (tmp_path / "root_key").write_bytes(locked)
    with pytest.raises(KeyFileError, match="root_key has a passphrase"):
        issue_worker(tmp_path)


def test_a_private_key_with_a_changed_algorithm_is_refused(tmp_path: Path) -> None:
    generate_root(tmp_path)
    path = tmp_path / "root_key"
    good = path.read_text()
    path.write_text(good.replace("K2Vw", "K2Vv"))  # X448's number in the place of Ed25519's
    assert path.read_text() != good
    with pytest.raises(KeyFileError, match="not a private key in PEM"):
        issue_worker(tmp_path)


def test_a_certificate_of_another_key_or_root_is_refused(tmp_path: Path) -> None:
    generate_root(tmp_path)
    issue_worker(tmp_path)
    path = tmp_path / "worker_cert"
    good = path.read_text()
    data = json.loads(good)
    path.write_text(json.dumps({**data, "not_after": data["not_after"] + 1}))
    with pytest.raises(KeyFileError, match="not signed"):
        load_worker(tmp_path)
    wrong = ({**data, "worker": "AA=="}, {**data, "version": 2})
    for bad in ("", "{}", "[]", "[" * 100_000, *map(json.dumps, wrong)):
        path.write_text(bad)
        with pytest.raises(KeyFileError, match="not a worker's certificate"):
            load_worker(tmp_path)
    path.write_text(good)
    (tmp_path / "worker_key").unlink()
    other = tmp_path / "other"
    generate_root(other)
    issue_worker(other)
    shutil.copy2(other / "worker_key", tmp_path / "worker_key")
    with pytest.raises(KeyFileError, match="another key"):
        load_worker(tmp_path)


def test_certificates_are_checked() -> None:
    certificate = identity().certificate
    certificate.verify(NOW)
    with pytest.raises(FingerprintError, match="expired at 2023-11-14"):
        certificate.verify(certificate.not_after)
    other = identity(Ed25519PrivateKey.generate()).certificate
    forged = WorkerCertificate(certificate.root, certificate.worker, certificate.not_after, other.signature)
    with pytest.raises(FingerprintError, match="not signed"):
        forged.verify(NOW)
    far = WorkerCertificate.issue(ROOT, certificate.worker, (1 << 63) - 1)
    with pytest.raises(FingerprintError, match="expired at 9999"):
        far.verify(float(1 << 63))
    assert WorkerCertificate.from_json(certificate.to_json()) == certificate


def test_the_fingerprint_is_the_one_that_ssh_keygen_shows(tmp_path: Path) -> None:
    if shutil.which("ssh-keygen") is None:
        pytest.skip("ssh-keygen is not installed")
    pin = generate_root(tmp_path)
    shown = subprocess.run(
        ["ssh-keygen", "-lf", str(tmp_path / "root_key.pub")], check=True, capture_output=True, text=True
    )
    assert str(pin) in shown.stdout


def test_fingerprints_parse_strictly() -> None:
    assert Fingerprint.parse(str(PIN)) == PIN
    assert Fingerprint.parse(f" {PIN}\n") == PIN
    assert Fingerprint.of(bytes(32)).matches(Fingerprint.of(bytes(32)))
    assert not Fingerprint.of(bytes(32)).matches(PIN)
    text = str(PIN)
    for bad in (
        "",
        "SHA256:",
        text[:-1],
        text + "A",
        text + "=",
        text.replace("SHA256", "MD5"),
        text.split(":")[1],
        "SHA256:é",
    ):
        with pytest.raises(ConfigError, match="not a fingerprint"):
            Fingerprint.parse(bad)


def test_the_edge_key_round_trips(tmp_path: Path) -> None:
    public = generate_edge(tmp_path / "new" / "edge", "nurse@hospital")
    key, comment = parse_public_key((tmp_path / "new" / "edge.pub").read_text())
    assert comment == "nurse@hospital"
    assert load_edge(tmp_path / "new" / "edge").public_key().public_bytes_raw() == key == parse_public_key(public)[0]


def test_errors_survive_pickling() -> None:
    with pytest.raises(ConfigError) as caught:
        Fingerprint.parse("x")
    copy = pickle.loads(pickle.dumps(caught.value))  # noqa: S301  # the test's own bytes
    assert (type(copy), str(copy)) == (ConfigError, str(caught.value))
