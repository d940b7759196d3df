"""The tenants' adapters in the cloud: what is taken, what is refused, and that nobody reaches another's."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.emulator.packages import Owner
from support.protocol.wire import TENANT

from isthmus.cloud.session import tenant_adapters as adapters_module
from isthmus.cloud.session.tenant_adapters import AdapterStore, TenantAdapters
from isthmus.protocol import messages as m
from isthmus.protocol.enrolment import Tenant
from isthmus.protocol.secure.keys import Fingerprint

OTHER = Tenant("hospital-b", Fingerprint.of(bytes(32)))
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def mine(store: AdapterStore) -> TenantAdapters:
    return store.of(TENANT)


@pytest.fixture
def lora(owner: Owner, tmp_path: Path) -> Path:
    return Path(shutil.copytree(owner.adapter(), tmp_path / "lora"))


def entries(folder: Path) -> tuple[m.FileEntry, ...]:
    files = [path for path in sorted(folder.iterdir()) if path.name != "README.md"]
    return tuple(m.FileEntry(p.name, p.stat().st_size, hashlib.sha256(p.read_bytes()).digest()) for p in files)


def put(into: TenantAdapters, entry: m.FileEntry, data: bytes, offset: int = 0) -> m.PutReply | m.Status:
    return into.put(m.Put(entry.name, offset, entry.size, entry.sha256, data))


def bring(into: TenantAdapters, folder: Path) -> m.Status:
    """Send an adapter's files whole and have it plugged in."""
    for entry in entries(folder):
        reply = put(into, entry, (folder / entry.name).read_bytes())
        assert isinstance(reply, m.PutReply)
        assert reply.held == entry.size
    return into.plug_in(m.PlugIn(entries(folder)))


def refusal(answer: m.Message, code: m.StatusCode = m.StatusCode.BAD_REQUEST) -> str:
    assert isinstance(answer, m.Status)
    assert answer.code == code, answer.message
    return answer.message


def listed(of: TenantAdapters) -> set[m.FileEntry]:
    shelf = of.files()
    assert shelf is not None
    return set(shelf.listing().entries)


def incoming(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("incoming/*") if path.is_file())


def change(folder: Path, alter: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    alter(tensors)
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize("method", ["lora", "bottleneck", "full"])
def test_an_adapter_is_plugged_in_and_shown_to_its_tenant_alone(
    owner: Owner, store: AdapterStore, mine: TenantAdapters, method: str, tmp_path: Path
) -> None:
    folder = owner.adapter(method)
    assert mine.files() is None
    answer = bring(mine, folder)
    assert answer.code == m.StatusCode.OK
    assert method in answer.message
    assert owner.package.id[:16] in answer.message
    assert listed(mine) == set(entries(folder))
    assert store.of(OTHER).files() is None
    assert incoming(tmp_path) == []
    assert (tmp_path / "adapters").stat().st_mode & 0o077 == 0


def test_another_adapter_takes_the_place_of_the_first(owner: Owner, mine: TenantAdapters) -> None:
    bring(mine, owner.adapter())
    before = listed(mine)
    bring(mine, owner.adapter("bottleneck"))
    assert listed(mine) == set(entries(owner.adapter("bottleneck"))) != before


def test_plugging_in_again_is_harmless(owner: Owner, mine: TenantAdapters, tmp_path: Path) -> None:
    bring(mine, owner.adapter())
    again = mine.plug_in(m.PlugIn(entries(owner.adapter())))  # as after an answer that was lost
    assert again == m.Status(m.StatusCode.OK, None, "this adapter is plugged in")
    assert bring(mine, owner.adapter()) == again  # as by somebody who repeats the command
    assert incoming(tmp_path) == []


def test_what_was_plugged_in_and_what_came_survive_a_restart(
    owner: Owner, mine: TenantAdapters, tmp_path: Path
) -> None:
    bring(mine, owner.adapter())
    entry = entries(owner.adapter("bottleneck"))[0]
    data = (owner.adapter("bottleneck") / entry.name).read_bytes()
    put(mine, entry, data[:10])
    later = owner.store(tmp_path / "adapters").of(TENANT)
    assert listed(later) == set(entries(owner.adapter()))
    assert put(later, entry, b"") == m.PutReply(entry.name, entry.sha256, 10)


def test_adapters_of_another_model_or_plan_lie_elsewhere(owner: Owner, mine: TenantAdapters, tmp_path: Path) -> None:
    bring(mine, owner.adapter())
    info = owner.plain.info
    other = AdapterStore(
        tmp_path / "adapters",
        owner.folder / "parts",
        "ff" * 32,
        owner.package.plan,
        owner.plain.executor,
        max_tokens=256,
        attn_implementation=info.attn_implementation,
        packages=(),
    )
    assert other.of(TENANT).files() is None


# Pieces ---------------------------------------------------------------------------------------------------------------


def test_a_piece_that_does_not_continue_what_is_here_is_not_kept(lora: Path, mine: TenantAdapters) -> None:
    entry = entries(lora)[0]
    data = (lora / entry.name).read_bytes()
    held = [
        put(mine, entry, data[5:9], offset=5),  # too early
        put(mine, entry, data[:5]),
        put(mine, entry, data[:5]),  # the answer was lost, and the piece came again
        put(mine, entry, b""),
        put(mine, entry, data[5:], offset=5),
    ]
    assert [reply.held for reply in held if isinstance(reply, m.PutReply)] == [0, 5, 5, 5, entry.size]


def test_two_sessions_of_a_tenant_continue_each_others_files(
    owner: Owner, store: AdapterStore, mine: TenantAdapters, lora: Path
) -> None:
    other = store.of(TENANT)
    rest = [entry for entry in entries(lora) if entry.name != WEIGHTS]
    for entry in rest:
        put(mine, entry, (lora / entry.name).read_bytes())
    (weights,) = (entry for entry in entries(lora) if entry.name == WEIGHTS)
    data = (lora / WEIGHTS).read_bytes()
    half = len(data) // 2
    put(mine, weights, data[:half])
    put(other, weights, data[half : half + 100], offset=half)
    put(mine, weights, data[half:], offset=half)  # late, and not kept
    put(other, weights, data[half + 100 :], offset=half + 100)
    assert mine.plug_in(m.PlugIn(entries(lora))).code == m.StatusCode.OK
    assert other.plug_in(m.PlugIn(entries(lora))).code == m.StatusCode.OK
    assert listed(other) == set(entries(lora))


@pytest.mark.parametrize("name", ["config.json", "authorized_edges", "adapter_model.bin", "modeling.py", "..", "a/b"])
def test_a_name_that_no_adapter_has_is_refused(mine: TenantAdapters, tmp_path: Path, name: str) -> None:
    entry = m.FileEntry(name, 1, bytes(32))
    assert repr(name) in refusal(put(mine, entry, b"x"))
    assert repr(name) in refusal(mine.plug_in(m.PlugIn((entry,))))
    assert not (tmp_path / "adapters").exists()  # nothing was written for it


def test_too_many_bytes_are_refused_before_anything_is_written(
    owner: Owner, store: AdapterStore, mine: TenantAdapters, tmp_path: Path
) -> None:
    parts = (owner.folder / "parts" / "edge.safetensors").stat().st_size
    assert store.max_bytes == 2 * parts + (64 << 20)
    entry = m.FileEntry(WEIGHTS, store.max_bytes + 1, bytes(32))
    assert str(store.max_bytes) in refusal(put(mine, entry, b"x"))
    pair = (replace(entry, size=store.max_bytes), m.FileEntry("adapter_config.json", 1, bytes(32)))
    assert str(store.max_bytes) in refusal(mine.plug_in(m.PlugIn(pair)))
    assert not (tmp_path / "adapters").exists()


def test_abandoned_files_make_room_for_new_ones(store: AdapterStore, mine: TenantAdapters, tmp_path: Path) -> None:
    for number in range(2 * adapters_module.MAX_INCOMING):
        put(mine, m.FileEntry(WEIGHTS, 1000, bytes([number]) * 32), b"x")
    assert len(incoming(tmp_path)) == adapters_module.MAX_INCOMING
    store.max_bytes = 1500
    put(mine, m.FileEntry(WEIGHTS, 1000, b"a" * 32), bytes(1000))
    put(mine, m.FileEntry(WEIGHTS, 1000, b"b" * 32), bytes(1000))
    assert sum(path.stat().st_size for path in incoming(tmp_path)) <= 3000
    put(mine, m.FileEntry(WEIGHTS, 1500, b"c" * 32), bytes(1000))
    assert [path.name.split(".")[2][:2] for path in incoming(tmp_path)] == ["62", "63"]  # b and c


def test_a_disk_that_takes_nothing_is_told_without_a_path(
    lora: Path, mine: TenantAdapters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = entries(lora)[0]

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device", str(tmp_path))

    monkeypatch.setattr(TenantAdapters, "_append", full)
    text = refusal(put(mine, entry, b"x"), m.StatusCode.INTERNAL)
    assert "disk may be full" in text
    assert str(tmp_path) not in text


# What is refused at the end -------------------------------------------------------------------------------------------


def test_a_truncated_file_is_named_and_what_came_stays(lora: Path, mine: TenantAdapters, tmp_path: Path) -> None:
    for entry in entries(lora):
        put(mine, entry, (lora / entry.name).read_bytes()[:100])
    text = refusal(mine.plug_in(m.PlugIn(entries(lora))))
    assert "100 of" in text
    assert "send the rest" in text
    assert incoming(tmp_path)
    assert mine.files() is None


def test_a_file_with_another_hash_is_removed(lora: Path, mine: TenantAdapters, tmp_path: Path) -> None:
    for entry in entries(lora):
        data = (lora / entry.name).read_bytes()
        put(mine, entry, data[:-1] + bytes([data[-1] ^ 1]) if entry.name == WEIGHTS else data)
    assert f"{WEIGHTS} arrived with another hash" in refusal(mine.plug_in(m.PlugIn(entries(lora))))
    assert not [path for path in incoming(tmp_path) if path.name.startswith(WEIGHTS)]
    assert bring(mine, lora).code == m.StatusCode.OK


def with_nan(tensors: dict[str, torch.Tensor]) -> None:
    next(iter(tensors.values())).view(-1)[3] = torch.nan


def with_huge_numbers(tensors: dict[str, torch.Tensor]) -> None:
    for tensor in tensors.values():
        tensor.fill_(1e30)


def without_one(tensors: dict[str, torch.Tensor]) -> None:
    tensors.pop(next(iter(tensors)))


def of_another_shape(tensors: dict[str, torch.Tensor]) -> None:
    name = next(iter(tensors))
    tensors[name] = torch.zeros(3, 3)


@pytest.mark.parametrize(
    ("alter", "said"), [(with_nan, "NaN"), (without_one, "missing"), (of_another_shape, "shape [3, 3]")]
)
def test_a_bad_adapter_is_refused_and_removed_and_the_old_one_stays(
    owner: Owner,
    lora: Path,
    mine: TenantAdapters,
    tmp_path: Path,
    alter: Callable[[dict[str, torch.Tensor]], None],
    said: str,
) -> None:
    bring(mine, owner.adapter("bottleneck"))
    change(lora, alter)
    text = refusal(bring(mine, lora))
    assert said in text
    assert str(tmp_path) not in text
    assert listed(mine) == set(entries(owner.adapter("bottleneck")))
    assert incoming(tmp_path) == []
    assert not list(tmp_path.rglob(".isthmus-tmp-*"))


def test_an_adapter_that_computes_nothing_finite_is_refused(lora: Path, mine: TenantAdapters, tmp_path: Path) -> None:
    change(lora, with_huge_numbers)
    assert "computes NaN or infinity" in refusal(bring(mine, lora))
    assert mine.files() is None
    assert incoming(tmp_path) == []


def test_a_failure_of_the_clouds_own_keeps_what_came(
    lora: Path, store: AdapterStore, mine: TenantAdapters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError(f"out of memory near 0.123 in {tmp_path}")

    monkeypatch.setattr(store, "check", fail)
    text = refusal(bring(mine, lora), m.StatusCode.INTERNAL)
    assert "RuntimeError" in text
    assert "0.123" not in text
    monkeypatch.undo()
    assert mine.plug_in(m.PlugIn(entries(lora))).code == m.StatusCode.OK


def test_an_adapter_must_be_of_the_package_that_is_offered_or_of_none(
    owner: Owner, lora: Path, mine: TenantAdapters, tmp_path: Path
) -> None:
    tuning = json.loads((lora / "isthmus_tuning.json").read_text())
    (lora / "isthmus_tuning.json").write_text(json.dumps({**tuning, "package": "ab" * 32}))
    assert "abab" in refusal(bring(mine, lora))
    bare = owner.store(tmp_path / "bare", package=False).of(TENANT)
    assert "none is offered" in refusal(bring(bare, owner.adapter()))
    for tenant in (mine, bare):
        answer = bring(tenant, owner.adapter(on_package=False))
        assert answer.code == m.StatusCode.OK
        assert "tuned on the model itself" in answer.message


def test_the_log_names_the_tenant_and_no_path(
    owner: Owner, lora: Path, mine: TenantAdapters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[dict[str, Any]] = []
    monkeypatch.setattr(adapters_module, "log", lambda event, *_, **fields: lines.append({"event": event, **fields}))
    bring(mine, owner.adapter())
    change(lora, with_nan)
    bring(mine, lora)
    assert [line["event"] for line in lines] == ["adapter_plugged_in", "adapter_refused"]
    assert {line["tenant"] for line in lines} == {TENANT.name}
    assert str(tmp_path) not in json.dumps(lines)


def test_after_a_crash_a_plugged_file_cannot_be_written_to_by_its_other_name(
    lora: Path, mine: TenantAdapters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TenantAdapters, "_remove", lambda *_: None)  # as if it had died before
    bring(mine, lora)
    (weights,) = (entry for entry in entries(lora) if entry.name == WEIGHTS)
    longer = replace(weights, size=weights.size + 4)
    assert put(mine, longer, b"tail", offset=weights.size) == m.PutReply(WEIGHTS, weights.sha256, 0)
    (plugged,) = (path for path in tmp_path.rglob(f"plugged/{WEIGHTS}"))
    assert plugged.read_bytes() == (lora / WEIGHTS).read_bytes()


def test_an_adapter_that_names_a_layer_of_the_cloud_is_refused_and_removed(
    lora: Path, mine: TenantAdapters, tmp_path: Path
) -> None:
    settings = json.loads((lora / "adapter_config.json").read_text())
    settings["target_modules"].append("model.layers.3.self_attn.q_proj")
    (lora / "adapter_config.json").write_text(json.dumps(settings))
    assert "layers.3.self_attn.q_proj" in refusal(bring(mine, lora))
    assert incoming(tmp_path) == []
