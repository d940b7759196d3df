"""Files from another worker, over real sessions: what arrives, and what another worker cannot make this one take."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from support.cloud.clouds import Home, ThreadServer
from support.protocol.wire import PIN

from isthmus.cloud.nodes import peers as peers_module
from isthmus.cloud.nodes.peers import Peers
from isthmus.cloud.session.file_store import FileStore
from isthmus.cloud.session.served_model import Served
from isthmus.common.errors import (
    ConnectionLostError,
    DiskError,
    FingerprintError,
    IsthmusError,
    NotEnrolledError,
    RemoteProtocolError,
)
from isthmus.protocol import messages as m
from isthmus.protocol.secure.keys import load_edge, load_issuer, load_worker, make_issuer

WEIGHTS = "model.safetensors"
Offering = Callable[[FileStore], str]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "fetched"
    made.mkdir()
    return made


def fetch(
    peers: Peers, address: str, folder: Path, file_set: m.FileSet = m.FileSet.MODEL, **options: Callable[..., object]
) -> list[str]:
    return asyncio.run(peers.fetch(address, file_set, folder, **options))  # type: ignore[arg-type]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_worker_fetches_the_model_in_chunks_and_tells_how_far_it_is(
    peers: Peers, address: str, folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isthmus.protocol.messages.MAX_FILE_CHUNK", 4096)
    told: list[tuple[int, int]] = []
    names = fetch(peers, address, folder, told=lambda done, total: told.append((done, total)))
    assert files(folder) == files(model)
    assert set(names) == set(files(model))
    total = sum(map(len, files(model).values()))
    assert {of for _, of in told} == {total}
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1] == (total, total)
    assert len(told) > len(names) + 2


def test_what_is_here_whole_stays_and_what_is_damaged_is_fetched_again(
    peers: Peers, address: str, folder: Path, model: Path
) -> None:
    fetch(peers, address, folder)
    inodes = {path.name: path.stat().st_ino for path in folder.iterdir()}
    damaged = bytearray((folder / WEIGHTS).read_bytes())
    damaged[-1] ^= 1
    (folder / WEIGHTS).write_bytes(damaged)
    fetch(peers, address, folder)
    assert files(folder) == files(model)
    assert {path.name for path in folder.iterdir() if path.stat().st_ino != inodes[path.name]} == {WEIGHTS}


def test_a_fetch_that_was_cut_off_goes_on_where_it_was(
    peers: Peers, offering: Offering, folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isthmus.protocol.messages.MAX_FILE_CHUNK", 4096)
    store = LyingStore(model)
    address = offering(store)
    fetch(peers, address, folder)
    whole = store.read_names.count(WEIGHTS)
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).unlink()
    (folder / f".{WEIGHTS}.part").write_bytes(data[: 2 * 4096 + 1])
    fetch(peers, address, folder)
    assert files(folder) == files(model)
    assert store.read_names.count(WEIGHTS) - whole == whole - 2


def test_what_was_kept_of_another_file_is_found_out_and_fetched_anew(
    peers: Peers, address: str, folder: Path, model: Path
) -> None:
    (folder / f".{WEIGHTS}.part").write_bytes(b"of another model")
    with pytest.raises(RemoteProtocolError, match="arrived with another hash"):
        fetch(peers, address, folder)
    fetch(peers, address, folder)
    assert files(folder) == files(model)


def test_files_are_asked_for_by_name_where_a_list_would_be_too_long(
    peers: Peers, address: str, folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isthmus.protocol.messages.MAX_FILE_CHUNK", 4096)
    names = ["config.json", "gone.json", WEIGHTS]
    size = sum((model / name).stat().st_size for name in ("config.json", WEIGHTS))

    def named(most: int) -> list[str]:
        return asyncio.run(peers.fetch_named(address, m.FileSet.MODEL, names, folder, most))

    with pytest.raises(RemoteProtocolError, match=f"offers {size} bytes: at most {size - 1} are taken"):
        named(size - 1)
    assert named(size) == ["config.json", WEIGHTS]
    assert files(folder) == {name: (model / name).read_bytes() for name in ("config.json", WEIGHTS)}


def test_a_worker_that_an_issuer_has_certified_is_fetched_from(
    peers: Peers, cloud: Served, home: Home, folder: Path, model: Path
) -> None:
    worker = load_worker(home.folder)
    make_issuer(home.folder)
    issuer = load_issuer(home.folder)
    certificate = issuer.issue(worker.certificate.worker, issuer.certificate.not_after)
    (home.folder / "worker_cert").write_text(certificate.to_json())
    with ThreadServer(cloud, home) as server:
        fetch(peers, f"127.0.0.1:{server.port}", folder)
    assert files(folder) == files(model)


# Who is who -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file_set", [m.FileSet.MODEL, m.FileSet.ADAPTERS])
def test_an_edge_that_asks_is_refused(
    peers: Peers, address: str, home: Home, folder: Path, file_set: m.FileSet
) -> None:
    fetch(peers, address, folder, file_set)
    before = files(folder)
    edge = dataclasses.replace(peers, key=load_edge(home.key_file))
    with pytest.raises(RemoteProtocolError, match="answered FetchList with only the workers of this cloud may fetch"):
        fetch(edge, address, folder, file_set)
    assert files(folder) == before
    assert fetch(edge, address, folder, m.FileSet.PARTS)  # an edge's own files are another matter


def test_a_worker_that_the_other_one_does_not_know_yet_is_refused(peers: Peers, address: str, folder: Path) -> None:
    stranger = dataclasses.replace(peers, key=Ed25519PrivateKey.generate())
    with pytest.raises(NotEnrolledError):
        fetch(stranger, address, folder)
    assert files(folder) == {}


def test_a_worker_of_another_cloud_is_not_fetched_from(peers: Peers, address: str, folder: Path) -> None:
    with pytest.raises(FingerprintError, match="not the pinned"):
        fetch(dataclasses.replace(peers, pin=PIN), address, folder)
    assert files(folder) == {}


def test_a_worker_that_is_gone_is_told(peers: Peers, folder: Path) -> None:
    with socket.socket() as nobody:  # bound, and not listening
        nobody.bind(("127.0.0.1", 0))
        with pytest.raises(ConnectionLostError):
            fetch(peers, f"127.0.0.1:{nobody.getsockname()[1]}", folder)


# What another worker may not do ---------------------------------------------------------------------------------------


class LyingStore(FileStore):
    """A model's files, with changes to what is said of them."""

    def __init__(
        self,
        folder: Path,
        entries: Callable[[m.FileEntry], m.FileEntry] = lambda entry: entry,
        chunks: Callable[[m.Blob], m.Blob | m.Status] = lambda blob: blob,
    ) -> None:
        super().__init__(folder, m.FileSet.MODEL)
        self._entries, self._chunks = entries, chunks
        self.read_names: list[str] = []

    def listing(self) -> m.FileList:
        return m.FileList(tuple(self._entries(entry) for entry in super().listing().entries))

    def read(self, name: str, offset: int) -> m.Blob | m.Status:
        self.read_names.append(name)
        blob = super().read(name, offset)
        assert isinstance(blob, m.Blob)
        return self._chunks(blob) if name == WEIGHTS else blob


@pytest.mark.parametrize("name", ["worker_key", "modeling.py", "authorized_edges", "model.safetensors.part"])
def test_a_file_that_does_not_belong_is_refused_before_anything_is_fetched(
    peers: Peers, offering: Offering, folder: Path, model: Path, name: str
) -> None:
    def renamed(entry: m.FileEntry) -> m.FileEntry:
        return dataclasses.replace(entry, name=name) if entry.name == WEIGHTS else entry

    store = LyingStore(model, entries=renamed)
    address = offering(store)
    with pytest.raises(RemoteProtocolError, match=f"offers the file '{name}', which does not belong there"):
        fetch(peers, address, folder)
    assert files(folder) == {}
    assert store.read_names == []


def flipped(blob: m.Blob) -> m.Blob:
    data = bytearray(blob.data)
    data[len(data) // 2] ^= 1
    return dataclasses.replace(blob, data=bytes(data))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (flipped, f"{WEIGHTS} arrived with another hash than another worker announced"),
        (
            lambda blob: dataclasses.replace(blob, offset=blob.offset + 1, total=blob.total + 1),
            "another chunk of model",
        ),
        (lambda blob: dataclasses.replace(blob, sha256=bytes(32)), "another chunk of model"),
        (lambda blob: dataclasses.replace(blob, name="config.json"), "another chunk of model"),
        (lambda blob: dataclasses.replace(blob, data=b""), "another chunk of model"),
        (lambda blob: m.Status(m.StatusCode.INTERNAL, None, "no disk"), "answered Fetch with no disk"),
    ],
    ids=["a damaged file", "another place", "another hash", "another name", "nothing", "a refusal"],
)
def test_what_is_not_what_was_listed_is_refused_and_not_kept(
    peers: Peers,
    offering: Offering,
    folder: Path,
    model: Path,
    change: Callable[[m.Blob], m.Blob | m.Status],
    said: str,
) -> None:
    lying = [True]

    def changed(blob: m.Blob) -> m.Blob | m.Status:
        return change(blob) if lying else blob

    store = LyingStore(model, chunks=changed)
    address = offering(store)
    with pytest.raises(RemoteProtocolError, match=said):
        fetch(peers, address, folder)
    assert WEIGHTS not in files(folder)
    lying.clear()
    fetch(peers, address, folder)
    assert files(folder) == files(model)


def test_a_list_of_too_many_files_is_refused(
    peers: Peers, address: str, folder: Path, monkeypatch: pytest.MonkeyPatch, model: Path
) -> None:
    count = len(files(model))
    monkeypatch.setattr(peers_module, "MAX_FILES", count - 1)
    with pytest.raises(RemoteProtocolError, match=f"offers {count} files: at most {count - 1} are taken"):
        fetch(peers, address, folder)
    monkeypatch.setattr(peers_module, "MAX_FILES", count)
    fetch(peers, address, folder)
    assert files(folder) == files(model)


def test_files_that_a_disk_has_no_room_for_are_not_begun(
    peers: Peers, offering: Offering, folder: Path, model: Path
) -> None:
    def huge(entry: m.FileEntry) -> m.FileEntry:
        return dataclasses.replace(entry, size=1 << 60) if entry.name == WEIGHTS else entry

    store = LyingStore(model, entries=huge)
    with pytest.raises(DiskError, match=r"bytes free, and \d+ bytes are to be fetched: make room"):
        fetch(peers, offering(store), folder)
    assert store.read_names == []


def test_a_worker_that_breaks_off_leaves_no_file_of_that_name(
    peers: Peers, address: str, folder: Path, server: ThreadServer, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isthmus.protocol.messages.MAX_FILE_CHUNK", 4096)

    def cut(done: int, total: int) -> None:
        if done > total // 2:
            server.drain(0.0)

    with pytest.raises(IsthmusError):
        fetch(peers, address, folder, told=cut)
    assert all(files(model)[name] == data for name, data in files(folder).items() if not name.startswith("."))
    assert set(files(folder)) != set(files(model))
