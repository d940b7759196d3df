"""The files that the cloud's own workers may fetch: the model, and all tenants' adapters. No edge gets them."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.cloud.sessions import eventually
from support.emulator.packages import Owner
from support.protocol.wire import TENANT

from isthmus.backbone.checkpoints.sources import is_model_file
from isthmus.cloud.engine.paused_calls import CallThreads
from isthmus.cloud.session import file_store
from isthmus.cloud.session.file_store import FileStore, HashedLater
from isthmus.cloud.session.served_model import Served
from isthmus.cloud.session.tenant_adapters import AdapterStore
from isthmus.common.errors import AdapterError, DiskError
from isthmus.common.files import sha256_of
from isthmus.emulator.package.offered_files import adapter_prefix, belongs
from isthmus.protocol import messages as m
from isthmus.protocol.enrolment import Tenant
from isthmus.protocol.secure.keys import Fingerprint

OTHER = Tenant("hospital-b", Fingerprint.of(bytes(32)))
THREADS = CallThreads(1, 16)
MINE, THEIRS = (tenant.fingerprint.digest.hex() for tenant in (TENANT, OTHER))
THEN = 1_700_000_000_123
"""Unix milliseconds."""


def brought(folder: Path) -> dict[str, Path]:
    """A folder's files by their names, as they were fetched."""
    return {path.name: path for path in folder.iterdir() if path.name != "README.md"}


def copied(owner: Owner, tmp_path: Path, method: str = "lora") -> dict[str, Path]:
    """The files of an adapter that may be moved away."""
    return brought(Path(shutil.copytree(owner.adapter(method), tmp_path / f"copy-of-{method}", dirs_exist_ok=True)))


def plugged(store: AdapterStore, folder: Path) -> None:
    """Have the tenant return an adapter."""
    mine = store.of(TENANT)
    entries = tuple(
        m.FileEntry(name, path.stat().st_size, hashlib.sha256(path.read_bytes()).digest())
        for name, path in brought(folder).items()
    )
    for entry in entries:
        mine.put(m.Put(entry.name, 0, entry.size, entry.sha256, (folder / entry.name).read_bytes()))
    assert mine.plug_in(m.PlugIn(entries)).code == m.StatusCode.OK


def contents(files: FileStore | None) -> dict[str, bytes]:
    assert files is not None
    return {entry.name: entry.sha256 for entry in files.listing().entries}


def hashes(folder: Path) -> dict[str, bytes]:
    return {name: hashlib.sha256(path.read_bytes()).digest() for name, path in brought(folder).items()}


# What belongs where ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("model.safetensors", True),
        ("model-00001-of-00002.safetensors", True),
        ("model.safetensors.index.json", True),
        ("config.json", True),
        ("tokenizer.json", True),
        ("isthmus_origin.json", True),
        ("modeling.py", False),
        ("tokenizer.py", False),
        ("pytorch_model.bin", False),
        ("authorized_edges", False),
        ("worker_key", False),
        (".hidden.safetensors", False),
        ("model.safetensors.part", False),
        ("-model.safetensors", False),
    ],
)
def test_a_model_has_files_of_these_names_alone(name: str, is_one: bool) -> None:
    assert is_model_file(name) is is_one
    assert belongs(name, m.FileSet.MODEL) is is_one
    assert not belongs(name, m.FileSet.ADAPTERS)


def test_a_file_of_all_adapters_names_its_tenant_and_its_time() -> None:
    prefix = adapter_prefix(MINE, THEN)
    assert prefix == f"{MINE}-{THEN}-"
    assert belongs(f"{prefix}adapter_model.safetensors", m.FileSet.ADAPTERS)
    assert belongs(f"{adapter_prefix(MINE, 7)}adapter_config.json", m.FileSet.ADAPTERS)
    for name in (
        "adapter_model.safetensors",
        f"{prefix}config.json",
        f"{prefix}worker_key",
        f"{MINE[:-1]}-{THEN}-adapter_config.json",
        f"{MINE.upper()}-{THEN}-adapter_config.json",
        f"{MINE}-{THEN}0-adapter_config.json",
        f"{MINE}-adapter_config.json",
        f"{prefix}{prefix}adapter_config.json",
    ):
        assert not belongs(name, m.FileSet.ADAPTERS), name


def test_joined_stores_show_each_file_behind_its_prefix(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(name)
        (tmp_path / name / "stray").write_text("no file of an adapter")
    joined = FileStore.joined(
        {f"{each}-": FileStore(tmp_path / each, m.FileSet.ADAPTER) for each in ("a", "b")},
    )
    assert contents(joined) == {
        f"{each}-adapter_config.json": hashlib.sha256(each.encode()).digest() for each in ("a", "b")
    }
    blob = joined.read("b-adapter_config.json", 0)
    assert isinstance(blob, m.Blob)
    assert bytes(blob.data) == b"b"
    for name in ("adapter_config.json", "a-stray", "c-adapter_config.json"):
        assert isinstance(joined.read(name, 0), m.Status)
    assert contents(FileStore.joined({})) == {}


def test_a_large_store_is_hashed_once_and_meanwhile_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    go_on, hashed = threading.Event(), []

    def slowly(path: Path) -> bytes:
        hashed.append(path.name)
        assert go_on.wait(30)
        return sha256_of(path)

    monkeypatch.setattr(file_store, "sha256_of", slowly)
    store = HashedLater(tmp_path, m.FileSet.MODEL, seconds=0.01)
    for _ in range(3):
        answer = store()
        assert isinstance(answer, m.Status)
        assert answer.message == "the files are being hashed: ask again in a while"
    go_on.set()
    eventually(lambda: isinstance(store(), FileStore))
    assert store() is store()
    assert hashed == ["config.json"]


def test_a_large_store_that_cannot_be_read_is_tried_again(tmp_path: Path) -> None:
    folder = tmp_path / "later"
    store = HashedLater(folder, m.FileSet.MODEL)
    answer = store()
    assert isinstance(answer, m.Status)
    assert answer.message == "the files cannot be read; the cloud's owner has a log of it"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert isinstance(store(), FileStore)


# Copies of adapters ---------------------------------------------------------------------------------------------------


def test_a_copy_is_plugged_in_with_the_time_of_the_first(owner: Owner, store: AdapterStore, tmp_path: Path) -> None:
    assert store.held() == {}
    store.take(MINE, THEN, copied(owner, tmp_path))
    assert store.held() == {MINE: THEN}
    assert contents(store.of(TENANT).files()) == hashes(owner.adapter())
    assert store.of(OTHER).files() is None
    assert (tmp_path / "adapters").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(("plugged_at", "taken"), [(THEN - 1, False), (THEN, False), (THEN + 1, True)])
def test_a_newer_adapter_is_taken_and_an_older_one_is_not(
    owner: Owner, store: AdapterStore, tmp_path: Path, plugged_at: int, taken: bool
) -> None:
    store.take(MINE, THEN, copied(owner, tmp_path))
    store.take(MINE, plugged_at, copied(owner, tmp_path, "bottleneck"))
    assert store.held() == {MINE: max(THEN, plugged_at)}
    assert contents(store.of(TENANT).files()) == hashes(owner.adapter("bottleneck" if taken else "lora"))


def test_an_adapter_that_its_tenant_plugs_in_here_is_newer_than_a_copy(
    owner: Owner, store: AdapterStore, tmp_path: Path
) -> None:
    store.take(MINE, THEN, copied(owner, tmp_path))
    plugged(store, owner.adapter("bottleneck"))
    assert store.held()[MINE] > THEN


def test_an_adapter_is_newer_than_a_copy_from_a_machine_whose_clock_is_ahead(
    owner: Owner, store: AdapterStore, tmp_path: Path
) -> None:
    ahead = time.time_ns() // 10**6 + 3_600_000
    store.take(MINE, ahead, copied(owner, tmp_path))
    plugged(store, owner.adapter("bottleneck"))
    assert store.held()[MINE] == ahead + 1


def test_a_copy_that_is_no_adapter_is_refused_and_the_older_one_stays(
    owner: Owner, store: AdapterStore, tmp_path: Path
) -> None:
    store.take(MINE, THEN, copied(owner, tmp_path))
    files = copied(owner, tmp_path, "bottleneck")
    files["adapter_model.safetensors"].write_bytes(b"nonsense")
    with pytest.raises(AdapterError):
        store.take(MINE, THEN + 1, files)
    assert store.held() == {MINE: THEN}
    assert contents(store.of(TENANT).files()) == hashes(owner.adapter())


def test_what_is_shared_is_what_is_plugged_in_of_every_tenant(
    owner: Owner, store: AdapterStore, tmp_path: Path
) -> None:
    assert contents(store.shared_files()) == {}
    store.take(MINE, THEN, copied(owner, tmp_path))
    store.take(THEIRS, THEN + 5, copied(owner, tmp_path, "bottleneck"))
    (tmp_path / "adapters" / "stray").mkdir()
    expected = {
        **{f"{adapter_prefix(MINE, THEN)}{name}": found for name, found in hashes(owner.adapter()).items()},
        **{
            f"{adapter_prefix(THEIRS, THEN + 5)}{name}": found
            for name, found in hashes(owner.adapter("bottleneck")).items()
        },
    }
    assert contents(store.shared_files()) == expected
    assert all(belongs(name, m.FileSet.ADAPTERS) for name in expected)
    store.take(MINE, THEN + 9, copied(owner, tmp_path, "bottleneck"))
    assert {name.split("-")[1] for name in contents(store.shared_files())} == {str(THEN + 9), str(THEN + 5)}


def test_a_copy_that_breaks_off_leaves_the_old_adapter(owner: Owner, store: AdapterStore, tmp_path: Path) -> None:
    store.take(MINE, THEN, copied(owner, tmp_path))
    files = {**copied(owner, tmp_path, "bottleneck"), "gone": tmp_path / "gone"}
    with pytest.raises(DiskError, match="No such file"):
        store.take(MINE, THEN + 1, files)
    assert store.held() == {MINE: THEN}
    assert contents(store.of(TENANT).files()) == hashes(owner.adapter())


# What a session may fetch ---------------------------------------------------------------------------------------------


@pytest.fixture
def cloud(owner: Owner, tmp_path: Path) -> Served:
    offered = owner.offer(tmp_path / "adapters")
    offered.adapters.take(THEIRS, THEN, copied(owner, tmp_path))
    return dataclasses.replace(offered, model=lambda: FileStore(owner.model, m.FileSet.MODEL))


Ask = Callable[[bool, m.Message], m.Message | None]


@pytest.fixture
def ask(cloud: Served) -> Ask:
    """Ask as another worker, or as an edge."""

    def answered(of_worker: bool, message: m.Message) -> m.Message | None:
        return cloud.session(b"s" * 16, TENANT, THREADS, of_worker=of_worker).handle(message)

    return answered


def test_another_worker_gets_the_model_and_all_adapters(owner: Owner, ask: Ask) -> None:
    listing = ask(True, m.FetchList(m.FileSet.MODEL))
    assert isinstance(listing, m.FileList)
    assert {"config.json", "model.safetensors"} <= {entry.name for entry in listing.entries}
    blob = ask(True, m.Fetch(m.FileSet.MODEL, "config.json", 0))
    assert isinstance(blob, m.Blob)
    assert bytes(blob.data) == (owner.model / "config.json").read_bytes()
    adapters = ask(True, m.FetchList(m.FileSet.ADAPTERS))
    assert isinstance(adapters, m.FileList)
    assert {entry.name.split("-")[0] for entry in adapters.entries} == {THEIRS}


@pytest.mark.parametrize(
    ("file_set", "name"),
    [
        (m.FileSet.MODEL, "model.safetensors"),
        (m.FileSet.ADAPTERS, f"{adapter_prefix(THEIRS, THEN)}adapter_config.json"),
    ],
)
def test_an_edge_that_asks_for_what_is_the_workers_is_refused(ask: Ask, file_set: m.FileSet, name: str) -> None:
    for message in (m.FetchList(file_set), m.Fetch(file_set, name, 0)):
        assert not isinstance(ask(True, message), m.Status)
        answer = ask(False, message)
        assert isinstance(answer, m.Status)
        assert answer.code == m.StatusCode.BAD_REQUEST
        assert answer.message.startswith("only the workers of this cloud may fetch")
    assert isinstance(ask(False, m.FetchList(m.FileSet.PARTS)), m.FileList)


def test_a_worker_that_offers_no_model_refuses_even_other_workers(cloud: Served) -> None:
    closed = dataclasses.replace(cloud, model=None)
    for served, kind in ((cloud, m.FileList), (closed, m.Status)):
        session = served.session(b"s" * 16, TENANT, THREADS, of_worker=True)
        assert isinstance(session.handle(m.FetchList(m.FileSet.MODEL)), kind)


def test_a_model_is_not_hashed_before_somebody_asks(cloud: Served, owner: Owner) -> None:
    made: list[Path] = []

    def model() -> FileStore:
        made.append(owner.model)
        return FileStore(owner.model, m.FileSet.MODEL)

    session = dataclasses.replace(cloud, model=model).session(b"s" * 16, TENANT, THREADS, of_worker=True)
    session.handle(m.FetchList(m.FileSet.PARTS))
    assert made == []
    session.handle(m.FetchList(m.FileSet.MODEL))
    assert made == [owner.model]


def test_a_model_brings_no_code_and_follows_no_link(owner: Owner, tmp_path: Path) -> None:
    model = Path(shutil.copytree(owner.model, tmp_path / "model"))
    (model / "modeling_tiny.py").write_text("raise SystemExit")
    (model / "tokenizer.json.bak").symlink_to("/etc/passwd")
    (model / "vocab.txt").write_text("a\n")
    names = set(contents(FileStore(model, m.FileSet.MODEL)))
    assert names == {path.name for path in owner.model.iterdir()} | {"vocab.txt"}
