"""The kept corpus is decoded or refused, reaches what it is kept for, and a decoder that is wrong is noticed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
from fuzz import outcome, target as fuzz_target
from fuzz.outcome import judged, read_log
from fuzz.target import CORPUS, everything, kept, lines_of, lines_reached, load, names
from google.protobuf.message import DecodeError

from isthmus.cloud.decoding.cache_pool import CachePool
from isthmus.protocol import encoding

needs_atheris = pytest.mark.skipif(find_spec("atheris") is None, reason="atheris has wheels for Linux on x86-64 only")
CRASHING = b"ISTH" + b"\x11" + b"\xff\xff"


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, of settings that make little sense
@pytest.mark.parametrize("name", names())
def test_every_kept_input_is_decoded_or_refused(name: str) -> None:
    target = load(name)
    wanted = lines_of(target.decoders)
    assert kept(name)
    needed = target.floor * len(wanted)
    assert len(lines_reached(target.run, everything(name, target), wanted)) >= needed
    assert len(lines_reached(target.run, [b""], wanted)) < needed  # the control: a rejected input is not enough


def test_no_corpus_is_left_of_a_target_that_is_gone() -> None:
    assert {path.name for path in CORPUS.iterdir()} == set(names())
    assert sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()) < 300_000


def test_a_kept_input_that_crashes_its_decoder_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "planted").mkdir()
    (tmp_path / "planted" / "crash-1").write_bytes(CRASHING)
    planted = load("planted")
    assert lines_reached(planted.run, everything("planted", planted), lines_of(planted.decoders))
    monkeypatch.setattr(fuzz_target, "CORPUS", tmp_path)
    with pytest.raises(IndexError):
        lines_reached(planted.run, everything("planted", planted), lines_of(planted.decoders))


def test_a_decoder_that_loses_a_check_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "_parse", lambda kind, raw, what: kind.FromString(bytes(raw)))
    messages = load("messages")
    with pytest.raises((AssertionError, DecodeError)):
        lines_reached(messages.run, everything("messages", messages), set())


def test_a_pool_of_caches_that_loses_its_bound_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CachePool, "acquire", lambda _, wanted: list(range(len(wanted))))
    decodes = load("decodes")
    with pytest.raises(AssertionError, match="bytes count"):
        lines_reached(decodes.run, everything("decodes", decodes), set())


def test_lines_of_functions_classes_and_modules_are_counted() -> None:
    class Example:
        def one(self) -> int:
            return 1

        @property
        def two(self) -> int:
            return 2

    assert len(lines_of([Example])) == 2
    assert len(lines_of([Example.one])) == 1
    module = ModuleType(Example.__module__)
    module.Example = Example  # type: ignore[attr-defined]
    assert lines_of([module]) == lines_of([Example])


LOG = """INFO: Instrumenting isthmus.protocol
#2\tINITED cov: 10 ft: 11 corp: 1/1b exec/s: 0 rss: 50Mb
#900\tNEW    cov: 14 ft: 20 corp: 2/9b lim: 4 exec/s: 0 rss: 50Mb
#1000\tDONE   cov: 15 ft: 21 corp: 2/9b lim: 4 exec/s: 9 rss: 50Mb
stat::number_of_executed_units: 1001
"""
LINES = {"lines": 10, "empty": 1, "reached": 9, "floor": 0.8, "missed": []}


def test_a_run_without_a_finding_is_no_fault() -> None:
    log = read_log(LOG)
    assert log == outcome.Log(1001, 10, 15, "")
    assert judged("x", log, LINES, [], 2, planted=False).fault == ""


def test_what_is_wrong_with_a_run_is_said() -> None:
    log, crash = read_log(LOG), "\n === Uncaught Python exception: ===\nValueError: no\n"
    assert "ValueError: no" in judged("x", read_log(LOG + crash), LINES, [], 2, planted=False).fault
    assert "finding" in judged("x", log, LINES, ["crash-1"], 2, planted=False).fault
    slow = read_log(LOG + "==1== ERROR: libFuzzer: timeout\n")
    assert "a finding: timeout" in judged("x", slow, None, [], 2, planted=False).fault
    assert "did not begin" in judged("x", read_log(""), LINES, [], 0, planted=False).fault
    assert "replayed" in judged("x", log, None, [], 2, planted=False).fault
    assert "7 of 10" in judged("x", log, LINES | {"reached": 7}, [], 2, planted=False).fault
    assert "1 of 10" in judged("x", log, LINES | {"reached": 1, "floor": 0.0}, [], 2, planted=False).fault
    assert "planted bug" in judged("planted", log, LINES, [], 2, planted=True).fault
    assert judged("planted", log, LINES, ["crash-1"], 2, planted=True).fault == ""


@needs_atheris
@pytest.mark.long
def test_the_fuzzer_finds_the_planted_bug(tmp_path: Path) -> None:
    command, environment = _fuzz("planted", "--work", str(tmp_path), "--runs", "1000000")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "found, as it must be" in done.stdout
    command[-1] = "1"  # the control: one execution finds nothing
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "the planted bug was not found" in done.stdout


@needs_atheris
@pytest.mark.long
def test_ctrl_c_stops_the_fuzzer_and_loses_nothing(tmp_path: Path) -> None:
    command, environment = _fuzz("messages", "frames", "--seconds", "300", "--work", str(tmp_path))
    running = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # a terminal sends the signal to all of them, too
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        while not list(tmp_path.glob("messages/corpus/*")):
            assert running.poll() is None
            time.sleep(0.1)
        os.killpg(running.pid, signal.SIGINT)
        told, _ = running.communicate(timeout=120)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
    assert running.returncode == 130, told
    assert "stopped" in told
    assert list(tmp_path.glob("messages/corpus/*"))


def _fuzz(*arguments: str) -> tuple[list[str], dict[str, str]]:
    """The command and the environment of `make fuzz`."""
    paths = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    return [sys.executable, "-P", "-m", "fuzz", *arguments], {**os.environ, "PYTHONPATH": paths}
