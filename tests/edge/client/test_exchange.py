"""The package and the adapter over a link in memory.

What is fetched, what is returned, and that an interruption costs no more than the rest.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from support.cloud.memory_cloud import CUT, FaultyTransport, MemoryCloud, MemoryTransport, messages, new_link
from support.emulator.packages import Owner, tiny_package
from support.models.tiny import tiny_checkpoint
from support.protocol.wire import NOW, PIN, identity

from isthmus.backbone.adapters.adapter_files import load_adapter
from isthmus.backbone.checkpoints.sources import default_cache
from isthmus.backbone.split.edge_parts import load_edge_parts
from isthmus.cloud.session.file_store import FileStore
from isthmus.cloud.session.handler import OfferedPackage
from isthmus.common.errors import (
    AdapterError,
    ConfigError,
    OverQuotaError,
    PackageError,
    RefusedError,
    RemoteProtocolError,
    SignerError,
    UnreachableError,
)
from isthmus.edge.client import fetch, return_adapter
from isthmus.edge.client.link import Link
from isthmus.emulator.package.manifest import sign
from isthmus.emulator.package.package import open_package
from isthmus.protocol import messages as m
from isthmus.protocol.enrolment import Tenant
from isthmus.protocol.secure.keys import Fingerprint

IDS = torch.tensor([[5, 9, 33, 120, 7, 2]])
PIECE = 4096
pytestmark = pytest.mark.usefixtures("no_waiting", "cache_folder")
Answer = Callable[[m.Message], m.Message | None]


@pytest.fixture(scope="module")
def owner(tmp_path_factory: pytest.TempPathFactory) -> Owner:
    torch.set_num_threads(1)
    return Owner(tmp_path_factory.mktemp("owner"))


@pytest.fixture
def cloud(owner: Owner, tmp_path: Path) -> MemoryCloud:
    return MemoryCloud(owner.offer(tmp_path / "adapters"))


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.protocol.messages.MAX_FILE_CHUNK", PIECE)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def die_at(transport: MemoryTransport, kind: type[Any], name: str, offset: int) -> Answer:
    """A cloud that is gone when it is asked about a place of a file."""

    def answer(message: m.Message) -> m.Message | None:
        if isinstance(message, kind) and message.name == name and message.offset >= offset:
            transport.up = False
            return m.Goodbye("the power went")
        return None

    return answer


# The package ----------------------------------------------------------------------------------------------------------


def test_the_package_arrives_whole_and_verified(owner: Owner, cloud: MemoryCloud, tmp_path: Path) -> None:
    out = tmp_path / "package"
    assert new_link(cloud).fetch_package(out).folder == out
    assert files(out) == files(owner.package.folder)
    assert open_package(out, signer=PIN).id == owner.package.id
    assert not (tmp_path / "package.part").exists()
    again = new_link(cloud)
    assert again.fetch_package(out) == open_package(out)  # what is there is not fetched again
    assert again.traffic.bytes_down < 10_000
    (out / "strange").write_text("")
    new_link(cloud).fetch_package(out)  # a damaged one is replaced
    assert files(out) == files(owner.package.folder)


def test_a_package_goes_on_where_it_stopped(owner: Owner, cloud: MemoryCloud, tmp_path: Path) -> None:
    out, transport = tmp_path / "package", MemoryTransport(cloud)
    cloud.answer = die_at(transport, m.Fetch, "emulator.safetensors", 3 * PIECE)
    link = new_link(transport, give_up_after=1)
    with pytest.raises(UnreachableError):
        link.fetch_package(out)
    assert not out.exists()
    came = sum(path.stat().st_size for path in (tmp_path / "package.part").iterdir())
    cloud.answer, transport.up = lambda message: None, True
    cloud.seen.clear()
    link = new_link(transport)
    link.fetch_package(out)
    asked = [(each.name, each.offset) for each in messages(cloud, m.Fetch)]
    assert ("emulator.safetensors", 3 * PIECE) in asked
    assert min(offset for name, offset in asked if name == "emulator.safetensors") == 3 * PIECE
    rest = sum(len(data) for data in files(owner.package.folder).values()) - came
    assert rest < link.traffic.bytes_down < rest + 500 * len(asked) + 10_000
    assert open_package(out).id == owner.package.id


def test_what_is_left_of_an_older_package_does_not_stay(owner: Owner, cloud: MemoryCloud, tmp_path: Path) -> None:
    out, part = tmp_path / "package", tmp_path / "package.part"
    part.mkdir()
    (part / "merges.txt").write_text("of an older package")
    (part / ".emulator.safetensors.0123456789abcdef.part").write_text("likewise")
    new_link(cloud).fetch_package(out)
    assert files(out) == files(owner.package.folder)


def offering(cloud: MemoryCloud, folder: Path) -> Link:
    offered = OfferedPackage(FileStore(folder, m.FileSet.EMULATOR), "")
    cloud.served = dataclasses.replace(cloud.served, packages={"package": offered})
    return new_link(cloud)


def test_a_package_of_another_signer_is_not_taken(owner: Owner, cloud: MemoryCloud, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(owner.package.folder, tmp_path / "theirs"))
    stranger = Ed25519PrivateKey.from_private_bytes(bytes(32))
    (folder / "manifest.json").write_bytes(sign(owner.package.manifest, identity(stranger, NOW * 2)))
    with pytest.raises(SignerError, match=str(PIN).replace("+", r"\+")):
        offering(cloud, folder).fetch_package(tmp_path / "package")
    assert not (tmp_path / "package").exists()
    assert not (tmp_path / "package.part").exists()


def test_a_changed_byte_on_the_clouds_disk_is_refused(owner: Owner, cloud: MemoryCloud, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(owner.package.folder, tmp_path / "theirs"))
    data = bytearray((folder / "emulator.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "emulator.safetensors").write_bytes(data)
    with pytest.raises(PackageError, match=r"emulator\.safetensors was changed"):
        offering(cloud, folder).fetch_package(tmp_path / "package")
    assert not (tmp_path / "package").exists()


def test_a_package_of_another_model_is_refused(cloud: MemoryCloud, tmp_path: Path) -> None:
    other = tiny_package(tmp_path / "theirs", tiny_checkpoint("llama", tmp_path / "model", seed=7))
    with pytest.raises(PackageError, match=rf"{other.digest[:16]}\), and the cloud serves tiny .*this one's model$"):
        offering(cloud, other.folder).fetch_package(tmp_path / "package")
    assert not (tmp_path / "package").exists()


def test_what_is_in_the_way_stays_and_nothing_is_asked(cloud: MemoryCloud, tmp_path: Path) -> None:
    out = tmp_path / "package"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    link = new_link(cloud)
    with pytest.raises(ConfigError, match="no package"):
        link.fetch_package(out)
    assert files(out) == {"thesis.txt": b"mine"}
    assert not messages(cloud, m.FetchList)


def test_a_cloud_without_a_package_says_so(owner: Owner, tmp_path: Path) -> None:
    bare = MemoryCloud(owner.offer(tmp_path / "adapters", package=False))
    with pytest.raises(RefusedError, match="offers no package"):
        new_link(bare).fetch_package(tmp_path / "package")


@pytest.mark.parametrize("name", ["adapter_config.json", "modeling.py", "authorized_keys", "model.safetensors"])
def test_a_file_that_is_no_packages_is_refused(cloud: MemoryCloud, tmp_path: Path, name: str) -> None:
    listing = m.FileList((m.FileEntry(name, 1, bytes(32)),))
    cloud.answer = lambda message: listing if isinstance(message, m.FetchList) else None
    with pytest.raises(RemoteProtocolError, match=f"'{name}', which is none of a package's files"):
        new_link(cloud).fetch_package(tmp_path / "package")
    assert not messages(cloud, m.Fetch)


# The adapter ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "full", "bottleneck"])
def test_a_returned_adapter_computes_over_the_full_middle(owner: Owner, cloud: MemoryCloud, method: str) -> None:
    adapter = owner.adapter(method)
    link = new_link(cloud)
    said = link.return_adapter(adapter)
    assert method in said
    folder = link.plugged_adapter()
    assert folder.is_relative_to(default_cache())
    mine = files(adapter)
    mine.pop("README.md", None)
    assert files(folder) == mine
    model = load_adapter(link.load_model(), folder)
    whole = load_edge_parts(owner.folder / "parts", link.plan, owner.plain.executor.host.span)
    with torch.no_grad():
        over_the_link = model(input_ids=IDS).logits
        assert torch.equal(over_the_link, load_adapter(whole, adapter)(input_ids=IDS).logits)
        assert not torch.equal(over_the_link, link.load_model()(input_ids=IDS).logits)


def test_adapters_in_the_cache_are_bounded(owner: Owner, cloud: MemoryCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "MAX_FOLDERS", 2)
    link, folders = new_link(cloud), []
    for seed in (1, 2, 3):
        link.return_adapter(owner.adapter(seed=seed))
        folders.append(link.plugged_adapter())
    assert [folder.is_dir() for folder in folders] == [False, True, True]
    assert link.plugged_adapter() == folders[2]


def test_another_tenant_gets_no_adapter(owner: Owner, cloud: MemoryCloud) -> None:
    link = new_link(cloud)
    link.return_adapter(owner.adapter())
    other = Tenant("hospital-b", Fingerprint.of(bytes(32)))
    theirs = new_link(MemoryCloud(cloud.served, authorize=lambda key: other))
    with pytest.raises(RefusedError, match="no adapter of yours is plugged in"):
        theirs.plugged_adapter()
    with pytest.raises(RefusedError, match="no adapter of yours"):
        theirs._keeper.ask(m.Blob, m.Fetch(m.FileSet.ADAPTER, "adapter_model.safetensors", 0))
    theirs.return_adapter(owner.adapter(seed=2))
    assert files(theirs.plugged_adapter()) != files(link.plugged_adapter())


def test_an_upload_goes_on_where_it_stopped(owner: Owner, cloud: MemoryCloud) -> None:
    adapter, transport = owner.adapter("full"), MemoryTransport(cloud)
    size = (adapter / "model.safetensors").stat().st_size
    cloud.answer = die_at(transport, m.Put, "model.safetensors", 5 * PIECE)
    with pytest.raises(UnreachableError):
        new_link(transport, give_up_after=1).return_adapter(adapter)
    cloud.answer, transport.up = lambda message: None, True
    cloud.seen.clear()
    link = new_link(transport)
    link.return_adapter(adapter)
    sent = [each for each in messages(cloud, m.Put) if each.name == "model.safetensors" and len(each.data)]
    assert sent[0].offset == 5 * PIECE
    assert sum(len(each.data) for each in sent) == size - 5 * PIECE
    assert link.traffic.bytes_up < size - 5 * PIECE + 500 * len(messages(cloud, m.Put)) + 10_000
    assert (link.plugged_adapter() / "model.safetensors").read_bytes() == (adapter / "model.safetensors").read_bytes()


@pytest.mark.parametrize("way", ["send", "receive"])
@pytest.mark.parametrize("fault", ["first piece", "last piece", "plug in"])
def test_a_lost_message_changes_nothing(owner: Owner, tmp_path: Path, way: str, fault: str) -> None:
    quiet = FaultyTransport(MemoryTransport(MemoryCloud(owner.offer(tmp_path / "undisturbed"))), {})
    new_link(quiet).return_adapter(owner.adapter())
    last = quiet.counts[way]
    place = {"first piece": 5, "last piece": last - 1, "plug in": last}[fault]
    transport = FaultyTransport(MemoryTransport(MemoryCloud(owner.offer(tmp_path / "adapters"))), {(way, place): CUT})
    link = new_link(transport)
    assert "plugged in" in link.return_adapter(owner.adapter())
    assert transport.hit == [(way, place)]
    assert link.traffic.retries == 1
    arrived = files(link.plugged_adapter())
    assert arrived == {name: data for name, data in files(owner.adapter()).items() if name != "README.md"}


def test_a_refused_adapter_leaves_the_plugged_one(owner: Owner, cloud: MemoryCloud, tmp_path: Path) -> None:
    link = new_link(cloud)
    link.return_adapter(owner.adapter())
    before = files(link.plugged_adapter())
    bad = Path(shutil.copytree(owner.adapter("bottleneck"), tmp_path / "bad"))
    tuning = json.loads((bad / "isthmus_tuning.json").read_text())
    (bad / "isthmus_tuning.json").write_text(json.dumps({**tuning, "package": "ab" * 32}))
    with pytest.raises(RefusedError, match=r"tuned on the package abab.*fetch the package again"):
        link.return_adapter(bad)
    assert files(link.plugged_adapter()) == before


def test_smaller_pieces_are_sent_where_the_quota_is_small(
    owner: Owner, cloud: MemoryCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(return_adapter, "SMALLEST_CHUNK", 512)
    cloud.answer = lambda message: (
        m.Status(m.StatusCode.OVER_QUOTA, None, "over 1000")
        if isinstance(message, m.Put) and len(message.data) > 1000
        else None
    )
    link = new_link(cloud)
    assert "plugged in" in link.return_adapter(owner.adapter())
    sizes = [len(each.data) for each in messages(cloud, m.Put)]
    assert 1 <= sum(size > 1000 for size in sizes) <= 2  # what fits is found once and kept to
    cloud.answer = lambda message: (
        m.Status(m.StatusCode.OVER_QUOTA, None, "no") if isinstance(message, m.Put) and len(message.data) else None
    )
    with pytest.raises(OverQuotaError):
        link.return_adapter(owner.adapter("bottleneck"))


def test_a_cloud_that_forgets_what_it_was_sent_is_given_up(owner: Owner, cloud: MemoryCloud) -> None:
    cloud.answer = lambda message: m.PutReply(message.name, message.sha256, 0) if isinstance(message, m.Put) else None
    with pytest.raises(RemoteProtocolError, match="holds 0 bytes"):
        new_link(cloud).return_adapter(owner.adapter())
    assert len(messages(cloud, m.Put)) == 2 + return_adapter.MAX_SETBACKS


@pytest.mark.parametrize("reply", [m.PutReply("other", bytes(32), 0), m.PutReply("isthmus_tuning.json", bytes(32), 0)])
def test_an_answer_about_another_file_is_refused(owner: Owner, cloud: MemoryCloud, reply: m.PutReply) -> None:
    cloud.answer = lambda message: reply if isinstance(message, m.Put) else None
    with pytest.raises(RemoteProtocolError, match="something else"):
        new_link(cloud).return_adapter(owner.adapter())


def test_a_folder_that_is_no_adapter_is_not_sent(owner: Owner, cloud: MemoryCloud, tmp_path: Path) -> None:
    link = new_link(cloud)
    with pytest.raises(AdapterError, match="is no adapter"):
        link.return_adapter(tmp_path / "nowhere")
    folder = Path(shutil.copytree(owner.adapter(), tmp_path / "adapter"))
    (folder / "patients.jsonl").write_text("{}")
    with pytest.raises(AdapterError, match=r"patients\.jsonl"):
        link.return_adapter(folder)
    (folder / "patients.jsonl").unlink()
    (folder / "isthmus_tuning.json").unlink()
    with pytest.raises(AdapterError, match=r"no isthmus_tuning\.json"):
        link.return_adapter(folder)
    assert not messages(cloud, m.Put)


def test_an_adapter_from_the_cloud_is_checked_before_it_is_given_away(
    owner: Owner, cloud: MemoryCloud, tmp_path: Path
) -> None:
    link = new_link(cloud)
    folder = Path(shutil.copytree(owner.adapter(), tmp_path / "theirs"))
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "megatron_core": "antigravity"}))
    shelf = FileStore(folder, m.FileSet.ADAPTER)

    def answer(message: m.Message) -> m.Message | None:
        if getattr(message, "file_set", None) != m.FileSet.ADAPTER:
            return None
        return shelf.listing() if isinstance(message, m.FetchList) else shelf.read(message.name, message.offset)  # type: ignore[union-attr]  # the only other one

    cloud.answer = answer
    with pytest.raises(AdapterError, match="megatron_core"):
        link.plugged_adapter()


def test_an_adapter_that_is_replaced_while_it_is_fetched_is_not_mixed(owner: Owner, cloud: MemoryCloud) -> None:
    link = new_link(cloud)
    link.return_adapter(owner.adapter())
    other = new_link(MemoryCloud(cloud.served))
    swapped: list[str] = []

    def answer(message: m.Message) -> m.Message | None:
        if isinstance(message, m.Fetch) and message.file_set == m.FileSet.ADAPTER and message.offset and not swapped:
            swapped.append(other.return_adapter(owner.adapter(seed=2)))
        return None

    cloud.answer = answer
    with pytest.raises(RemoteProtocolError, match="another chunk"):
        link.plugged_adapter()
    weights = "adapter_model.safetensors"
    assert (link.plugged_adapter() / weights).read_bytes() == (owner.adapter(seed=2) / weights).read_bytes()
    assert swapped
