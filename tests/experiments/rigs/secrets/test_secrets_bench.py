"""The parts of `isthmus bench secrets` at a tiny scale, each with a control that it must find."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.cloud.clouds import Home
from support.models.tiny import tiny_checkpoint

from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.cloud.engine.freed_memory import wiping
from isthmus.experiments.harness.launch import free_ports
from isthmus.experiments.harness.rig_settings import SecretsSettings
from isthmus.experiments.rigs.secrets import remains
from isthmus.experiments.rigs.secrets.canaries import KEY, LEASED, SECRET, TENSORS
from isthmus.experiments.rigs.secrets.memory_scan import (
    WINDOW,
    Scanner,
    canaries_of,
    files_below,
    memory_of,
    shared_files_of,
)
from isthmus.experiments.rigs.secrets.nursery import Nursery
from isthmus.experiments.rigs.secrets.remains import OBJECT, TENANT, Place, _held_found, look, new_name
from isthmus.experiments.rigs.secrets.secrets_bench import Parts, run_secrets, show
from isthmus.protocol.enrolment import ConnectionString, Quota
from isthmus.protocol.tensor_codecs import ACTIVATION_CODECS

PLAN = "2:2"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(tiny_checkpoint("llama", tmp_path_factory.mktemp("secrets") / "model"), "tiny")


@pytest.mark.server
@pytest.mark.usefixtures("warm_children")
def test_no_nonce_is_used_twice_and_an_interrupted_measurement_goes_on(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = SecretsSettings(model=str(checkpoint.folder), edge_layers=PLAN, restarts=4, sessions=200)
    place = {"copies": 0, "control": TENANT, "control_copies": 2}
    seen = {"during": 3, "at_once": 1, "after": 0, "elsewhere": 0, "held_found": True, "controls_found": True}
    monkeypatch.setattr(Parts, "cloud", lambda *_: {**seen, "places": {"logs": place}})
    monkeypatch.setattr(Parts, "step", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_secrets(settings, tmp_path)
    for name in ("processes", "machines", "cloud"):
        monkeypatch.setattr(Parts, name, lambda *_: 1 / 0)
    monkeypatch.setattr(Parts, "step", lambda _: {"ratio": 1.5})
    found = run_secrets(settings, tmp_path)
    processes, machines = (found["nonces"][part] for part in ("processes", "machines"))
    for part in (processes, machines):
        assert part["reuses"] == 0
        assert part["records"] > part["keys"] > 0
    assert processes["edges_in_session"] >= 1
    controls = [*processes["controls"], *machines["controls"]]
    assert len(controls) == 3
    assert all(control["reuses"] for control in controls)
    assert machines["own_source_constant"]["reuses"] == 0  # the library's random bytes are enough
    assert [found[name] for name in ("no_reuse", "nothing_elsewhere", "freed_wiped", "controls_found")] == [True] * 4
    show(found)
    assert "1.500 with --wipe-freed" in capsys.readouterr().out


@pytest.fixture
def place(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """A server in a process of its own, without Ray."""
    monkeypatch.setattr(remains, "SETTLE_SECONDS", 0.5)
    home, name = Home(tmp_path), new_name()
    key = home.new_edge(name, quota=Quota(max_sessions=remains.SESSIONS))
    address = str(ConnectionString("127.0.0.1", *free_ports("127.0.0.1", 1), home.pin, False))
    logs = tmp_path / "nonces"
    logs.mkdir()
    with Nursery(checkpoint, PLAN, home.folder, key, address, logs, tmp_path / "nursery.log") as nursery:
        yield Place(
            address=address,
            key=key,
            worker=nursery.bear("worker"),
            sessions=lambda: 0,
            folders=(tmp_path,),
            said=lambda: [name.encode()],
            others=dict,
            controls={name.encode()[:WINDOW]: TENANT},
        )


@pytest.mark.long
@pytest.mark.server
@pytest.mark.usefixtures("warm_children")
def test_what_a_worker_holds_of_sessions_is_found_in_its_memory_alone(place: Place) -> None:
    found = look(place, tokens=64)
    assert found["held_found"]
    assert found["controls_found"]
    assert found["elsewhere"] == 0
    assert all(row["after"] == 0 for row in found["memory"] if row["kind"] in {"AES key", "traffic secret"})


def test_all_that_a_cloud_must_hold_has_to_be_found() -> None:
    kinds = [
        *(f"{codec} {what}, as they cross" for codec in ACTIVATION_CODECS for what in TENSORS),
        SECRET,
        KEY,
        LEASED,
    ]
    found = Counter(dict.fromkeys(kinds, 1))
    assert _held_found(found)
    for kind in kinds:
        assert not _held_found(found - Counter([kind]))


@pytest.mark.server
@pytest.mark.usefixtures("warm_children")
def test_a_place_whose_control_is_not_found_is_told(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's object is to be found, and there is no Ray."""
    monkeypatch.setattr(remains, "LOOKS", 1)
    found = look(replace(place, controls={**place.controls, os.urandom(WINDOW): OBJECT}), tokens=16)
    assert not found["controls_found"]
    assert found["places"]["logs"]["control_copies"]


def test_bytes_are_found_in_memory_shared_memory_and_files(tmp_path: Path) -> None:
    (canary,) = canaries_of(torch.randn(64).numpy().tobytes(), 1)
    scanner = Scanner({canary: "planted"})
    assert scanner.count([bytes(10), canary[:-1], b"x" + canary * 2, bytes(1)]) == Counter(planted=2)
    (tmp_path / "log").write_bytes(b"odd" + canary)
    assert scanner.count(files_below(tmp_path)) == Counter(planted=1)
    assert scanner.count(files_below(tmp_path, wanted=lambda path: path.suffix == ".log")) == Counter()
    with tempfile.TemporaryFile(dir="/dev/shm") as shared:
        shared.truncate(1 << 30)  # all but a page was never written
        shared.seek(1 << 20)
        shared.write(canary)
        shared.flush()
        assert scanner.count(shared_files_of(os.getpid())) == Counter(planted=1)
    assert scanner.scanned < 1 << 28


FREEING = """
import ctypes, sys
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, (ctypes.c_size_t,), (ctypes.c_void_p,)
mark = bytearray.fromhex(sys.argv[1])  # the argument is not what is looked for
for at in range(len(mark)):
    mark[at] ^= 0x55
blocks = [libc.malloc(4 * len(mark)) for _ in range(500)]
for block in blocks:
    for at in range(4):
        ctypes.memmove(block + at * len(mark), (ctypes.c_char * len(mark)).from_buffer(mark), len(mark))
print(flush=True)
sys.stdin.readline()
mark[:] = bytes(len(mark))
for block in blocks:
    libc.free(block)
print(flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("wiped", [True, False])
def test_freed_memory_is_wiped_only_where_that_is_asked_for(wiped: bool) -> None:
    canary = os.urandom(WINDOW)
    scanner = Scanner({canary: "freed"})
    command = [sys.executable, "-c", FREEING, bytes(byte ^ 0x55 for byte in canary).hex()]
    environment = {**os.environ, **(wiping(os.environ) if wiped else {})}
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        assert scanner.count(memory_of(process.pid))["freed"] >= 2000
        process.stdin.write("\n")
        process.stdin.flush()
        process.stdout.readline()
        left = scanner.count(memory_of(process.pid))["freed"]
        process.stdin.close()
    assert left == 0 if wiped else left > 500
