"""What a worker serves: the edge's parts, the package, the enrolled edges, and how memory is divided."""

from __future__ import annotations

import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from support.cloud.clouds import Home, served
from support.models.tiny import tiny_checkpoint

from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.backbone.plan import SplitPlan
from isthmus.cloud.control import worker_setup
from isthmus.cloud.control.worker import WorkerSpec
from isthmus.cloud.control.worker_setup import (
    RESERVE_BYTES,
    EdgesFile,
    edges_in,
    edges_of,
    make_parts,
    memory_budgets,
    next_stage_of,
)
from isthmus.common.errors import ConfigError, PackageError
from isthmus.emulator.package.package import Package
from isthmus.protocol.enrolment import REVOKED_FILE, STAGE_OPTIONS, WORKERS_FILE, revoke
from isthmus.protocol.secure.keys import format_public_key, load_edge, load_worker


def test_two_workers_make_the_parts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint(tiny_checkpoint("llama", tmp_path / "model"), "tiny")
    plan = SplitPlan.parse("2:2", checkpoint.config.num_hidden_layers)
    exports = []
    both = threading.Event()

    def export(_checkpoint: Checkpoint, _plan: SplitPlan, folder: Path) -> None:
        exports.append(folder)
        both.wait(0.2)
        folder.mkdir()

    monkeypatch.setattr(worker_setup, "export_edge_parts", export)
    arguments = (checkpoint, plan, tmp_path / "parts")
    threads = [threading.Thread(target=make_parts, args=arguments) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(exports) == 1


def test_a_worker_offers_the_package_and_looks_at_it_again(package: Package, keys: Home, tmp_path: Path) -> None:
    model, parts = package.folder.parent / "model", tmp_path / "parts"
    (offered,) = served(model, parts, home=keys.folder, emulator=package.folder).packages.values()
    assert offered.about == "split 2:2"
    assert {entry.name for entry in offered.files.listing().entries} == {file.name for file in package.folder.iterdir()}
    assert served(model, parts, home=keys.folder).packages == {}
    damaged = shutil.copytree(package.folder, tmp_path / "damaged")
    (damaged / "emulator.json").write_text("{}")
    with pytest.raises(PackageError, match=r"emulator\.json"):
        served(model, parts, home=keys.folder, emulator=damaged)


def test_a_malformed_edges_file_is_refused_at_the_start(tmp_path: Path) -> None:
    home = Home(tmp_path)
    with (home.folder / "authorized_edges").open("a") as file:
        file.write("nonsense\n")
    with pytest.raises(ConfigError, match="line 2"):
        EdgesFile(home.folder)


@pytest.mark.parametrize("spoil", ["empty", "gone", "malformed"])
def test_a_list_that_is_being_written_takes_no_revoked_key_back(tmp_path: Path, spoil: str) -> None:
    home = Home(tmp_path)
    key = load_edge(home.key_file).public_key().public_bytes_raw()
    edges, path = edges_in(home.folder), home.folder / REVOKED_FILE
    assert edges().find(key) is not None
    revoke(home.folder, key)
    whole = path.read_text()
    for _ in range(2):
        assert edges().find(key) is None
        if spoil == "gone":
            path.unlink(missing_ok=True)
        else:
            path.write_text("" if spoil == "empty" else "ssh-ed25519 AAAA")
    path.write_text(whole + "# and nobody else\n")
    assert edges().find(key) is None
    path.write_text("# nobody any more\n")  # the control: a list that says so takes it back
    assert edges().find(key) is not None


def test_other_workers_of_the_cloud_may_open_sessions_where_a_file_names_them(tmp_path: Path) -> None:
    home = Home(tmp_path)
    spec = WorkerSpec("", "", "2:2", "bf16", "", str(home.folder), "", 1, 1, 1, "")
    edges = edges_of(spec)
    assert len(edges()) == 1
    key = Ed25519PrivateKey.generate().public_key().public_bytes_raw()
    assert edges().find(key) is None
    (home.folder / WORKERS_FILE).write_text(f"{STAGE_OPTIONS} {format_public_key(key, 'worker-1')}\n")
    worker = edges().find(key)
    assert worker is not None
    assert worker.stage
    assert len(edges()) == 2


def test_what_is_left_of_the_machine_is_shared_out() -> None:
    gib = 1 << 30
    free = 3 * gib
    stash, compute, cache = memory_budgets(free, None, None, None)
    assert (stash, compute, cache) == (gib // 2,) * 3
    assert RESERVE_BYTES + stash + 2 * compute + cache < free, "a small machine survives all of it at once"
    assert memory_budgets(100 * gib, None, None, None)[::2] == (2 * gib, 2 * gib)
    assert memory_budgets(free, 5, 7, 9) == (5, 7, 9)


def test_the_next_stages_place_is_read_anew_from_its_file(tmp_path: Path) -> None:
    keys = Home(tmp_path)
    file = tmp_path / "next_stage"
    spec = WorkerSpec("", "", "2:2", "bf16", "", str(keys.folder), "", 1, 1, 1, "", next_stage=str(file))
    stage = next_stage_of(spec)
    assert stage is not None
    assert (stage.target(), stage.codec, stage.pin) == ("", "bf16", keys.pin)
    for place in ("10.0.0.2:7444", "10.0.0.3:7444\n"):
        file.write_text(place)
        assert stage.target() == place.strip()
    assert stage.key.public_key() == load_worker(keys.folder).key.public_key()  # its own, where it was given none
    fixed = next_stage_of(replace(spec, next_stage="10.0.0.9:7444", next_key=str(keys.new_edge("stage", stage=True))))
    assert fixed is not None
    assert fixed.target() == "10.0.0.9:7444"
    assert fixed.key.public_key() == load_edge(tmp_path / "stage").public_key()
    assert next_stage_of(replace(spec, next_stage="")) is None
