"""A worker's folder on its node: its key, when it asks for a certificate, and what it writes of a delivery."""

from __future__ import annotations

import dataclasses
import os
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from support.cluster.owners_folder import OwnersFolder
from support.protocol.wire import NOW

from isthmus.cloud.nodes import worker_home
from isthmus.cloud.nodes.deliveries import AdapterPlace, Delivery
from isthmus.cloud.nodes.worker_home import WorkerHome, node_home
from isthmus.common.errors import DiskError, KeyFileError
from isthmus.protocol.secure.certificates import REQUEST_SECONDS
from isthmus.protocol.secure.keys import Issuer, load_issuer, load_node

LIFE = 1000


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = float(NOW)

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def owner(tmp_path: Path) -> OwnersFolder:
    return OwnersFolder(tmp_path, now=NOW)


@pytest.fixture
def issuer(owner: OwnersFolder) -> Issuer:
    return load_issuer(owner.folder, lambda: NOW)


def opened(owner: OwnersFolder, number: int = 0, *, clock: Clock | None = None, cloud: str = "cloud") -> WorkerHome:
    return WorkerHome((cloud, owner.pin.digest), number, clock or Clock())


def certified(issuer: Issuer, home: WorkerHome, life: float = LIFE) -> Delivery:
    return Delivery(issuer.issue(home.public_key, NOW + life).to_json())


def as_if_written_at(home: WorkerHome, when: float) -> None:
    os.utime(home.folder / "worker_cert", (when, when))


@pytest.mark.usefixtures("node")
def test_a_worker_makes_its_key_once_and_each_cloud_and_number_has_its_own(owner: OwnersFolder) -> None:
    home = opened(owner)
    assert home.folder.is_relative_to(node_home())
    assert stat.S_IMODE((home.folder / "worker_key").stat().st_mode) == 0o600
    assert stat.S_IMODE(home.folder.stat().st_mode) == 0o700
    assert opened(owner).public_key == home.public_key
    others = [opened(owner, 1), opened(owner, cloud="other"), WorkerHome(("cloud", bytes(32)), 0, Clock())]
    assert len({home.public_key, *(each.public_key for each in others)}) == 4


@pytest.mark.usefixtures("node")
@pytest.mark.parametrize("text", [b"", b"-----BEGIN PRIVATE KEY-----\n", bytes(120)])
def test_a_key_that_a_crash_has_spoilt_is_made_anew_and_certified_afresh(
    owner: OwnersFolder, issuer: Issuer, text: bytes
) -> None:
    before = opened(owner)
    before.write(certified(issuer, before))
    path = before.folder / "worker_key"
    path.write_bytes(text)
    home = opened(owner)
    assert home.public_key != before.public_key
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert home.wants_certificate
    home.write(certified(issuer, home))
    again = opened(owner)
    assert (again.public_key, again.is_certified) == (home.public_key, True)


@pytest.mark.usefixtures("node")
def test_a_key_that_others_can_read_or_that_cannot_be_made_is_refused(
    owner: OwnersFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = opened(owner).folder / "worker_key"
    key = path.read_bytes()
    path.chmod(0o644)
    with pytest.raises(KeyFileError, match="can be read by others"):
        opened(owner)
    assert path.read_bytes() == key
    path.unlink()

    def refuse(folder: Path) -> None:
        raise KeyFileError(f"{folder}/worker_key cannot be written (Permission denied)")

    monkeypatch.setattr(worker_home, "make_worker_key", refuse)
    with pytest.raises(KeyFileError, match="Permission denied"):
        opened(owner)


def test_a_worker_shows_its_nodes_signature_and_wants_a_certificate_until_it_has_one(
    owner: OwnersFolder, node: Path, issuer: Issuer
) -> None:
    home = opened(owner)
    assert not home.is_certified
    assert home.wants_certificate
    home.write(certified(issuer, home))
    as_if_written_at(home, NOW)
    home = opened(owner)
    assert home.is_certified
    assert not home.wants_certificate
    request = home.request()  # a proof all the same
    request.verify(owner.pin.digest, NOW)
    assert (request.worker, request.node) == (home.public_key, load_node(node).public_key().public_bytes_raw())


@pytest.mark.usefixtures("node")
def test_a_request_is_signed_anew_long_before_it_is_too_old(owner: OwnersFolder) -> None:
    clock = Clock()
    home = opened(owner, clock=clock)
    first = home.request()
    assert home.request() is first
    clock.now += REQUEST_SECONDS / 2
    assert home.request().asked_at == clock.now
    home.request().verify(owner.pin.digest, clock.now)


@pytest.mark.usefixtures("node")
def test_a_certificate_is_renewed_when_half_of_its_time_has_passed(owner: OwnersFolder, issuer: Issuer) -> None:
    first = opened(owner)
    first.write(certified(issuer, first))
    as_if_written_at(first, NOW)
    clock = Clock()
    home = opened(owner, clock=clock)
    assert home.is_certified
    clock.now = NOW + LIFE / 2 - 1
    assert not home.wants_certificate
    clock.now = NOW + LIFE / 2
    assert home.wants_certificate
    assert home.request().asked_at == NOW + LIFE / 2
    assert home.is_certified  # and serves meanwhile
    home.write(certified(issuer, home, 2 * LIFE))
    as_if_written_at(home, NOW + LIFE / 2)
    assert not opened(owner, clock=clock).wants_certificate


@pytest.mark.usefixtures("node")
def test_a_certificate_that_has_expired_is_none(owner: OwnersFolder, issuer: Issuer) -> None:
    first = opened(owner)
    first.write(certified(issuer, first))
    clock = Clock()
    clock.now = NOW + LIFE - 1
    assert opened(owner, clock=clock).is_certified
    clock.now = NOW + LIFE
    late = opened(owner, clock=clock)
    assert not late.is_certified
    assert late.wants_certificate


@pytest.mark.usefixtures("node")
@pytest.mark.parametrize("text", [b"", b"{}", b"nonsense", b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_certificate_is_asked_for_anew(owner: OwnersFolder, issuer: Issuer, text: bytes) -> None:
    first = opened(owner)
    first.write(certified(issuer, first))
    assert opened(owner).is_certified
    (first.folder / "worker_cert").write_bytes(text)
    home = opened(owner)
    assert not home.is_certified
    assert home.wants_certificate
    home.write(certified(issuer, home))
    assert home.is_certified


@pytest.mark.usefixtures("node")
def test_a_certificate_of_the_key_before_is_not_taken_for_this_ones(owner: OwnersFolder, issuer: Issuer) -> None:
    """A worker that was placed on another node makes another key, and the controller still has the old certificate."""
    home = opened(owner)
    stranger = Delivery(
        issuer.issue(Ed25519PrivateKey.generate().public_key().public_bytes_raw(), NOW + LIFE).to_json()
    )
    home.write(stranger)
    assert not home.is_certified
    assert home.wants_certificate
    home.write(certified(issuer, home))
    own = (home.folder / "worker_cert").read_bytes()
    for other in (stranger, Delivery("nonsense")):
        home.write(other)
        assert home.is_certified
    assert (home.folder / "worker_cert").read_bytes() == own


@pytest.mark.usefixtures("node")
def test_a_delivery_becomes_files_and_what_is_the_same_stays_untouched(owner: OwnersFolder, issuer: Issuer) -> None:
    home = opened(owner)
    whole = dataclasses.replace(
        certified(issuer, home), authorized_edges="# nobody\n", workers="# none\n", next_stage="10.0.0.2:7444"
    )
    home.write(whole)
    read = {
        "worker_cert": whole.certificate,
        "authorized_edges": "# nobody\n",
        "authorized_workers": "# none\n",
        "next_stage": "10.0.0.2:7444",
    }
    assert {name: (home.folder / name).read_text() for name in read} == read
    before = {name: (home.folder / name).stat().st_ino for name in read}
    home.write(dataclasses.replace(whole, next_stage="10.0.0.3:7444"))
    after = {name: (home.folder / name).stat().st_ino for name in read}
    assert {name for name in read if before[name] != after[name]} == {"next_stage"}


@pytest.mark.usefixtures("node")
def test_what_a_delivery_does_not_know_stays_as_it_is(owner: OwnersFolder, issuer: Issuer) -> None:
    home = opened(owner)
    first = dataclasses.replace(
        certified(issuer, home), authorized_edges="# somebody\n", workers="# some\n", next_stage="10.0.0.2:7444"
    )
    home.write(first)
    home.write(Delivery())
    assert home.is_certified
    assert (home.folder / "worker_cert").read_text() == first.certificate
    assert (home.folder / "authorized_edges").read_text() == "# somebody\n"
    assert (home.folder / "authorized_workers").read_text() == "# some\n"
    assert (home.folder / "next_stage").read_text() == ""
    home.write(Delivery(authorized_edges="", workers="", revoked_edges="# one\n"))
    home.write(Delivery(authorized_edges="", workers="", revoked_edges=""))
    assert (home.folder / "revoked_edges").read_text() == "# one\n"
    assert (home.folder / "authorized_edges").read_text() == ""
    assert (home.folder / "authorized_workers").read_text() == ""


@pytest.mark.usefixtures("node")
def test_what_cannot_be_read_is_an_error_that_names_it(owner: OwnersFolder) -> None:
    home = opened(owner)
    (home.folder / "authorized_edges").mkdir()
    with pytest.raises(DiskError, match=r"worker-0/authorized_edges .*Is a directory"):
        home.write(Delivery(authorized_edges="# nobody\n"))


def test_a_node_without_a_key_of_its_own_is_refused_before_anything_is_made(
    owner: OwnersFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, node: Path
) -> None:
    monkeypatch.setenv("ISTHMUS_NODE_HOME", str(tmp_path / "bare"))
    with pytest.raises(KeyFileError, match=r"bare/node_key does not exist: run `isthmus cloud node-keygen`"):
        opened(owner)
    assert not (tmp_path / "bare").exists()
    monkeypatch.setenv("ISTHMUS_NODE_HOME", str(node))
    (node / "node_key").chmod(0o644)
    with pytest.raises(KeyFileError, match="can be read by others"):
        opened(owner)


def test_a_folder_that_others_can_write_is_refused(owner: OwnersFolder, node: Path) -> None:
    home = opened(owner)
    home.folder.chmod(0o777)
    with pytest.raises(KeyFileError, match="another user could put keys and enrolments"):
        opened(owner)
    home.folder.chmod(0o700)
    node.chmod(0o777)
    with pytest.raises(KeyFileError, match="another user could put keys"):
        opened(owner)


def test_the_folder_of_a_node_is_the_users_where_none_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ISTHMUS_NODE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert node_home() == tmp_path / ".isthmus" / "node"
    monkeypatch.setenv("ISTHMUS_NODE_HOME", "~/elsewhere")
    assert node_home() == tmp_path / "elsewhere"


def test_deliveries_have_the_same_revision_where_they_say_the_same() -> None:
    one = Delivery("cert", "edges", "workers", "next", ("a:1",), (AdapterPlace("aa", 1, "a:1"),))
    assert dataclasses.replace(one).revision == one.revision
    others = [
        dataclasses.replace(one, **changes)
        for changes in (
            {"certificate": "other"},
            {"authorized_edges": ""},
            {"authorized_edges": None},
            {"workers": ""},
            {"next_stage": ""},
            {"models_at": ("a:1", "b:1")},
            {"adapters": (AdapterPlace("aa", 2, "a:1"),)},
            {"revoked_edges": ""},
        )
    ]
    assert len({one.revision, Delivery().revision, *(each.revision for each in others)}) == 10
