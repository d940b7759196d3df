"""Fetching a cloud's files: what arrives, what is kept, and what the cache never mixes up."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from support.cloud.memory_cloud import MemoryCloud, MemoryTransport, messages, new_link
from support.protocol.wire import PIN

from isthmus.backbone.checkpoints.sources import default_cache
from isthmus.cloud.session.served_model import Served
from isthmus.common.errors import DiskError, RemoteProtocolError, UnreachableError
from isthmus.common.files import locked
from isthmus.common.ownership import check_contents
from isthmus.edge.client import fetch
from isthmus.edge.client.fetch import fetch_parts
from isthmus.protocol import messages as m
from isthmus.protocol.secure.keys import Fingerprint

OTHER_PIN = Fingerprint.of(Ed25519PrivateKey.from_private_bytes(bytes(32)).public_key().public_bytes_raw())
pytestmark = pytest.mark.usefixtures("no_waiting", "cache_folder")


# Fetching -------------------------------------------------------------------------------------------------------------


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_parts_arrive_as_served_and_are_kept(cloud: MemoryCloud) -> None:
    link = new_link(cloud)
    folder = link._parts()
    assert folder.is_relative_to(default_cache())
    expected = {entry.name: entry.sha256 for entry in cloud.served.parts.listing().entries}
    assert {name: hashlib.sha256(data).digest() for name, data in files(folder).items()} == expected
    fetched = len(messages(cloud, m.Fetch))
    assert new_link(cloud)._parts() == folder
    assert len(messages(cloud, m.Fetch)) == fetched  # the cache had them all


def test_a_download_goes_on_where_it_stopped(cloud: MemoryCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.protocol.messages.MAX_FILE_CHUNK", 4096)
    transport = MemoryTransport(cloud)
    link = new_link(transport, give_up_after=1)

    def answer(message: m.Message) -> m.Message | None:
        if isinstance(message, m.Fetch) and message.name == "edge.safetensors" and message.offset >= 3 * 4096:
            transport.up = False
            return m.Goodbye("the power went")
        return None

    cloud.answer = answer
    with pytest.raises(UnreachableError):
        link._parts()
    cloud.answer, transport.up = lambda message: None, True
    cloud.seen.clear()
    folder = new_link(transport)._parts()
    offsets = [message.offset for message in messages(cloud, m.Fetch) if message.name == "edge.safetensors"]
    assert offsets[0] == 3 * 4096
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    entry = next(entry for entry in cloud.served.parts.listing().entries if entry.name == "edge.safetensors")
    assert hashlib.sha256((folder / "edge.safetensors").read_bytes()).digest() == entry.sha256


def test_a_changed_byte_is_refused_and_fetched_anew(cloud: MemoryCloud) -> None:
    link = new_link(cloud)

    def answer(message: m.Message) -> m.Message | None:
        if not isinstance(message, m.Fetch) or message.name != "edge.safetensors":
            return None
        blob = cloud.served.parts.read(message.name, message.offset)
        assert isinstance(blob, m.Blob)
        data = bytearray(blob.data)
        data[len(data) // 2] ^= 1
        return m.Blob(blob.name, blob.offset, blob.total, blob.sha256, bytes(data))

    cloud.answer = answer
    with pytest.raises(RemoteProtocolError, match=r"edge\.safetensors arrived with another hash"):
        link._parts()
    cloud.answer = lambda message: None
    assert (link._parts() / "edge.safetensors").is_file()


def test_a_chunk_of_another_place_is_refused(cloud: MemoryCloud) -> None:
    link = new_link(cloud)
    cloud.answer = lambda message: (
        m.Blob(message.name, 1, 10**6, bytes(32), b"x") if isinstance(message, m.Fetch) else None
    )
    with pytest.raises(RemoteProtocolError, match="another chunk"):
        link._parts()


@pytest.mark.parametrize("name", ["authorized_keys", "modeling.py", "model.safetensors", "config.json.part"])
def test_a_file_that_is_no_part_is_refused(cloud: MemoryCloud, name: str) -> None:
    link = new_link(cloud)
    listing = m.FileList((m.FileEntry(name, 1, bytes(32)),))
    cloud.answer = lambda message: listing if isinstance(message, m.FetchList) else None
    with pytest.raises(RemoteProtocolError, match=f"offers the file '{name}'"):
        link._parts()
    assert not messages(cloud, m.Fetch)


def test_two_edges_fetch_one_after_the_other(cloud: MemoryCloud) -> None:
    first, second = new_link(cloud), new_link(MemoryCloud(cloud.served))
    others: list[Thread] = []

    def answer(message: m.Message) -> m.Message | None:
        if isinstance(message, m.Fetch) and not others:
            others.append(Thread(target=second._parts))
            others[0].start()
            others[0].join(0.3)
            assert others[0].is_alive()  # it waits for the first one
        return None

    cloud.answer = answer
    folder = first._parts()
    others[0].join(30)
    assert second._parts() == folder
    assert second.traffic.bytes_down < (folder / "edge.safetensors").stat().st_size  # it found them there


def test_a_damaged_cache_is_repaired(cloud: MemoryCloud) -> None:
    folder = new_link(cloud)._parts()
    good = files(folder)
    (folder / "config.json").write_bytes(b"{}")
    (folder / "edge.safetensors").write_bytes(good["edge.safetensors"][:-1] + b"!")
    assert files(new_link(cloud)._parts()) == good


def test_a_cache_that_cannot_be_written_is_a_disk_error(
    cloud: MemoryCloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "file"))
    with pytest.raises(DiskError, match="file"):
        new_link(cloud)._parts()


# The cache ------------------------------------------------------------------------------------------------------------


def test_one_clouds_files_do_not_reach_anothers_folder(cloud: MemoryCloud) -> None:
    link = new_link(cloud)
    hostile = fetch_parts(link._keeper, OTHER_PIN)  # another cloud that claims the same digest
    for name in ("generation_config.json", "tokenizer.model", "chat_template.jinja"):
        (hostile / name).write_text("{{ evil }}")
    honest = link._parts()
    assert honest != hostile
    assert {path.name for path in honest.iterdir()} == {entry.name for entry in cloud.served.parts.listing().entries}
    assert PIN.digest.hex() in str(honest)
    assert OTHER_PIN.digest.hex() in str(hostile)


def test_a_folder_of_the_cache_is_checked_under_its_lock_only(
    cloud: MemoryCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it, another edge of this user that fetches the same replaces files in between."""
    looked: list[Path] = []
    held: list[bool] = []

    @contextmanager
    def lock(folder: Path) -> Iterator[None]:
        with locked(folder):
            held.append(True)
            yield
            held.pop()

    def look(folder: Path) -> None:
        assert held
        looked.append(folder)
        check_contents(folder)

    monkeypatch.setattr(fetch, "locked", lock)
    monkeypatch.setattr(fetch, "check_contents", look)
    assert looked == [new_link(cloud)._parts()]


def fetch_named(cloud: MemoryCloud, honest: Served, number: int, max_bytes: int) -> str:
    """Fetch the parts of a model that the cloud says to be another one, in another plan; the folder's name."""
    info = dataclasses.replace(honest.info, digest=f"{number:016x}{0:048x}", plan="2:2" if number % 2 else "1:2")
    cloud.served = dataclasses.replace(honest, info=info)
    link = new_link(cloud)
    return fetch_parts(link._keeper, PIN, max_bytes).name


def test_what_is_kept_of_a_cloud_is_bounded_however_many_models_it_names(
    cloud: MemoryCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    link, honest = new_link(cloud), cloud.served
    of_another = fetch_parts(link._keeper, OTHER_PIN)
    total = sum(entry.size for entry in honest.parts.listing().entries)
    own = default_cache() / "edge" / PIN.digest.hex()

    def kept() -> set[str]:
        assert of_another.is_dir()
        return {path.name for path in own.iterdir()}

    names = [fetch_named(cloud, honest, number, 4 * total) for number in range(4)]
    assert kept() == set(names)  # the control: four have room
    assert fetch_named(cloud, honest, 0, 4 * total) == names[0]  # it is the last one that was used
    names.append(fetch_named(cloud, honest, 4, 4 * total - 1))
    assert kept() == {names[0], names[3], names[4]}
    monkeypatch.setattr(fetch, "MAX_FOLDERS", 2)
    names.append(fetch_named(cloud, honest, 5, 100 * total))
    assert kept() == {names[4], names[5]}
    assert {path.name for path in own.parent.iterdir() if path.is_file()} == {
        f".{pin.digest.hex()}.lock" for pin in (PIN, OTHER_PIN)
    }


def test_what_is_not_listed_does_not_stay(cloud: MemoryCloud) -> None:
    folder = new_link(cloud)._parts()
    listed = {path.name for path in folder.iterdir()}
    (folder / "tokenizer.model").write_text("of an older listing")
    (folder / "merges.txt").symlink_to("/etc/hostname")
    (folder / "additional").mkdir()
    (folder / "additional" / "file").write_text("x")
    (folder / ".tokenizer.model.0123456789abcdef.part").write_text("x")
    asked = len(messages(cloud, m.Fetch))
    assert new_link(cloud)._parts() == folder
    assert {path.name for path in folder.iterdir()} == listed
    assert len(messages(cloud, m.Fetch)) == asked  # the rest was there


def test_a_link_in_the_place_of_a_listed_file_is_not_followed(cloud: MemoryCloud, tmp_path: Path) -> None:
    folder = new_link(cloud)._parts()
    good = (folder / "config.json").read_bytes()
    (tmp_path / "elsewhere").write_bytes(good)
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(tmp_path / "elsewhere")
    new_link(cloud)._parts()
    assert not (folder / "config.json").is_symlink()
    assert (folder / "config.json").read_bytes() == good
