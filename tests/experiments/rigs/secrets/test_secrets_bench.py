"""The parts of `isthmus bench secrets` at a tiny scale, each with a control that it must find."""

from __future__ import annotations

import base64
import json
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
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from support.cloud.clouds import Home
from support.models.tiny import tiny_checkpoint

from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.cloud.engine.freed_memory import wiping
from isthmus.experiments.harness.launch import free_ports
from isthmus.experiments.harness.rig_settings import RIGS, SecretsSettings
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
from isthmus.experiments.rigs.secrets.remains import (
    FILES,
    LOGS,
    OBJECT,
    TENANT,
    Place,
    _held_found,
    look,
    new_name,
)
from isthmus.experiments.rigs.secrets.secrets_bench import Parts, freed_wiped, run_secrets, show
from isthmus.experiments.rigs.secrets.text_controls import Planted
from isthmus.protocol.enrolment import ConnectionString, Quota
from isthmus.protocol.secure.framing import KEY_BYTES, KeyChain
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
    places = {
        "logs": {"copies": 0, "control": TENANT, "control_copies": 2, "forms": {"hex": 1, "base64": 0}},
        "ray": {"copies": 0, "control": OBJECT, "control_copies": 3, "forms": {}},
    }
    seen = {"during": 3, "after": 0, "elsewhere": 0, "held_found": True, "controls_found": True, "places": places}
    monkeypatch.setattr(Parts, "cloud", lambda _, name: {**seen, "at_once": int(name == "plain")})
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
    said = capsys.readouterr().out
    assert "1.500 with --wipe-freed" in said
    assert f"logs: 0 copies, 2 of {TENANT}, 1 of 2 planted forms\n" in said
    assert f"ray: 0 copies, 3 of {OBJECT}\n" in said
    assert "nothing is left" in said


@pytest.mark.parametrize(
    ("plain", "wiping", "wiped"),
    [
        ({"at_once": 3, "after": 1}, {"at_once": 0, "after": 0}, True),
        ({"at_once": 3, "after": 0}, {"at_once": 1, "after": 0}, False),
        ({"at_once": 3, "after": 0}, {"at_once": 0, "after": 1}, False),
        ({"at_once": 0, "after": 0}, {"at_once": 0, "after": 0}, None),  # the control has nothing either
    ],
)
def test_wiping_is_shown_only_by_a_cloud_that_leaves_something_without_it(
    plain: dict[str, int], wiping: dict[str, int], wiped: bool | None
) -> None:
    assert freed_wiped(plain, wiping) is wiped


def test_a_measurement_that_shows_nothing_of_wiping_has_not_passed() -> None:
    assert "freed_wiped" in RIGS["secrets"].passed


@pytest.fixture
def place(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """A server in a process of its own, without Ray."""
    monkeypatch.setattr(remains, "SETTLE_SECONDS", 0.5)
    home, name = Home(tmp_path), new_name()
    key = home.new_edge(name, quota=Quota(max_sessions=remains.SESSIONS))
    address = str(ConnectionString("127.0.0.1", *free_ports("127.0.0.1", 1), home.pin, False))
    logs = tmp_path / "nonces"
    logs.mkdir()
    planted = {LOGS: Planted(LOGS), FILES: Planted(FILES)}
    (tmp_path / "controls.log").write_bytes(planted[LOGS].log_lines)
    (tmp_path / "controls.txt").write_bytes(planted[FILES].lines)
    with Nursery(checkpoint, PLAN, home.folder, key, address, logs, tmp_path / "nursery.log") as nursery:
        yield Place(
            address=address,
            key=key,
            worker=nursery.bear("worker"),
            busy=lambda: 0,
            folders={FILES: [tmp_path]},
            said=lambda: [name.encode()],
            others=dict,
            controls={name.encode()[:WINDOW]: TENANT},
            planted=planted,
        )


@pytest.mark.long
@pytest.mark.server
@pytest.mark.usefixtures("warm_children")
def test_what_a_worker_holds_of_sessions_is_found_in_its_memory_alone(place: Place) -> None:
    found = look(place, tokens=64)
    assert found["held_found"]
    assert found["controls_found"]
    assert found["elsewhere"] == 0
    assert set(found["forms"].values()) == {2}
    assert all(row["after"] == 0 for row in found["memory"] if row["kind"] in {"AES key", "traffic secret"})


@pytest.mark.long
@pytest.mark.server
@pytest.mark.usefixtures("warm_children")
def test_a_worker_that_logs_its_keys_in_text_is_told(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remains, "LOOKS", 1)
    (folder,) = place.folders[FILES]
    installed, keys = KeyChain._install, []

    def install(chain: KeyChain) -> None:
        key = HKDFExpand(SHA256(), KEY_BYTES, b"isthmus traffic key").derive(bytes(chain._secret))
        keys.append(key)
        forms = {"hex": key.hex(), "base64": base64.b64encode(b"k" + key).decode(), "repr": repr(key)}
        with (folder / "worker.log").open("a") as log:
            log.write(json.dumps({"event": "key", **forms}) + "\n")
        installed(chain)

    monkeypatch.setattr(KeyChain, "_install", install)  # in this process, whose sessions have the worker's keys
    found = look(place, tokens=16)
    assert found["places"][LOGS]["found"] == {KEY: 2 * 3 * len(keys)}  # two looks, three forms
    assert found["elsewhere"] == 2 * 3 * len(keys) > 0


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


@pytest.mark.long
@pytest.mark.server
@pytest.mark.usefixtures("warm_children")
def test_controls_that_are_not_found_are_told(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's object is to be found, and there is no Ray; and hex among the files, and there is none."""
    monkeypatch.setattr(remains, "LOOKS", 1)
    (folder,) = place.folders[FILES]
    lines = (folder / "controls.txt").read_bytes()
    (folder / "controls.txt").write_bytes(lines.replace(place.planted[FILES].texts["hex"].encode(), b""))
    found = look(replace(place, controls={**place.controls, os.urandom(WINDOW): OBJECT}), tokens=16)
    assert not found["controls_found"]
    assert found["places"]["logs"]["control_copies"]
    assert [form for form, count in found["places"][FILES]["forms"].items() if not count] == ["hex"]
    assert found["forms"]["hex"] == 1  # that of the logs
    for row in found["places"].values():
        row["forms"].pop("hex", None)
    assert not remains._controls_found(replace(place, controls={**place.controls, b"": OBJECT}), found["places"])
    assert remains._controls_found(place, found["places"])


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
