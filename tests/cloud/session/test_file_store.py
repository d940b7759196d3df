"""Which files an edge may fetch of a cloud, and that they arrive whole."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import pytest
from safetensors import safe_open
from support.protocol.span_messages import refusal
from support.protocol.wire import TENANT

from isthmus.cloud.engine.paused_calls import CallThreads
from isthmus.cloud.session.file_store import FileStore
from isthmus.cloud.session.handler import OfferedPackage, TenantSession
from isthmus.cloud.session.served_model import Served
from isthmus.protocol import messages as m


def test_the_files_are_those_of_the_folder_and_arrive_whole(
    tenant: TenantSession, cloud: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isthmus.protocol.messages.MAX_FILE_CHUNK", 1000)
    listing = tenant.handle(m.FetchList(m.FileSet.PARTS))
    assert isinstance(listing, m.FileList)
    assert {"config.json", "tokenizer.json", "edge.safetensors"} <= {entry.name for entry in listing.entries}
    for entry in listing.entries:
        data = b""
        while len(data) < entry.size:
            piece = tenant.handle(m.Fetch(m.FileSet.PARTS, entry.name, len(data)))
            assert isinstance(piece, m.Blob)
            assert (piece.name, piece.offset, piece.total, piece.sha256) == (
                entry.name,
                len(data),
                entry.size,
                entry.sha256,
            )
            assert 0 < len(piece.data) <= 1000
            data += bytes(piece.data)
        assert hashlib.sha256(data).digest() == entry.sha256


@pytest.mark.parametrize(
    "name", ["model.safetensors", "worker_key", "../model/model.safetensors", "/etc/passwd", "..", "", "config.json/"]
)
def test_no_other_file_can_be_fetched(tenant: TenantSession, name: str) -> None:
    text = refusal(tenant.handle(m.Fetch(m.FileSet.PARTS, name, 0)))
    assert repr(name) in text
    assert "edge.safetensors" in text


def test_an_offset_behind_the_end_is_refused(tenant: TenantSession) -> None:
    assert "999999999" in refusal(tenant.handle(m.Fetch(m.FileSet.PARTS, "config.json", 999_999_999)))


def test_of_several_packages_one_is_named(cloud: Served) -> None:
    few = {name: OfferedPackage(cloud.parts, f"split {name}") for name in "ab"}
    both = dataclasses.replace(cloud, packages=few).session(b"s" * 16, TENANT, CallThreads(1, 16))
    one = dataclasses.replace(cloud, packages={"a": few["a"]}).session(b"s" * 16, TENANT, CallThreads(1, 16))
    which = m.FileSet.EMULATOR
    for session, name in ((one, None), (one, "a"), (both, "a"), (both, "b")):
        assert session.handle(m.FetchList(which, name)) == cloud.parts.listing()
        assert isinstance(session.handle(m.Fetch(which, "config.json", 0, name)), m.Blob)
    for question in (m.FetchList(which), m.Fetch(which, "config.json")):
        assert "several packages: fetch one by name" in refusal(both.handle(question))
    assert "no package 'c': fetch one by name" in refusal(one.handle(m.FetchList(which, "c")))


def test_a_list_of_all_packages_has_room_in_a_status(cloud: Served) -> None:
    many = {f"{number:032}": OfferedPackage(cloud.parts, "x" * 90) for number in range(m.MAX_PACKAGES)}
    session = dataclasses.replace(cloud, packages=many).session(b"s" * 16, TENANT, CallThreads(1, 16))
    text = refusal(session.handle(m.FetchList(m.FileSet.EMULATOR)))
    assert all(name in text for name in many)


def test_no_served_file_holds_a_middle_layer(cloud: Served, tmp_path: Path) -> None:
    for entry in cloud.parts.listing().entries:
        piece = cloud.parts.read(entry.name, 0)
        assert isinstance(piece, m.Blob)
        assert len(piece.data) == entry.size  # tiny files fit in one piece
        if not entry.name.endswith(".safetensors"):
            assert entry.size < 100_000
            continue
        (tmp_path / entry.name).write_bytes(piece.data)
        with safe_open(tmp_path / entry.name, framework="pt") as file:
            names = set(file.keys())
        layers = {int(name.split(".")[2]) for name in names if name.startswith("model.layers.")}
        assert layers == {0, 1, 4, 5}
        assert {name for name in names if not name.startswith("model.layers.")} == {
            "model.embed_tokens.weight",
            "model.norm.weight",
            "lm_head.weight",
        }


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("weights")
    folder = tmp_path / "parts"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "link.json").symlink_to(tmp_path / "secret")
    (folder / "sub").mkdir()
    assert [entry.name for entry in FileStore(folder, m.FileSet.PARTS).listing().entries] == ["config.json"]
