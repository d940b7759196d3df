"""A run's folder as whoever verifies it is handed it: what the certificate ties together, and what comes apart."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support.protocol.wire import EDGE, NOW, PIN, identity
from typer.testing import CliRunner

from isthmus.cli.main import app
from isthmus.common.errors import ConfigError, IsthmusError, TranscriptError, UnsignedError
from isthmus.privacy.transcript import run_certificate
from isthmus.privacy.transcript.chain import CloudTranscript, Exchange, Session
from isthmus.privacy.transcript.run_certificate import CERTIFICATE_FILE, write_certificate
from isthmus.privacy.transcript.transcript_file import TRANSCRIPT_FILE, TranscriptLog, read_transcript
from isthmus.privacy.transcript.verified_run import verify_run
from isthmus.protocol import messages as m
from isthmus.protocol.limits import MAX_UNSIGNED
from isthmus.protocol.secure.keys import WorkerIdentity

SESSION = Session(bytes(range(16)), "ab" * 32, "2:2", "fp32", "sdpa", "here")
EXCHANGE = Exchange("Forward", m.CallId(1, 2), b"a" * 32, b"b" * 32, bytes(32))


def signed_by(worker: WorkerIdentity, path: Path) -> None:
    """A transcript of one exchange."""
    cloud = CloudTranscript(SESSION, lambda: worker)
    cloud._chain.head, cloud._chain.exchanges = EXCHANGE.after(SESSION.head), 1
    signed = cloud.sign(m.SignTranscript(1), NOW)
    assert isinstance(signed, m.SignedTranscript)
    log = TranscriptLog(path)
    log.begin(SESSION)
    log.exchange(SESSION, 1, EXCHANGE)
    log.signature(SESSION, signed)


def run_in(folder: Path, leak: str | None = None) -> Path:
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "weights").write_bytes(b"1")
    signed_by(identity(), folder / TRANSCRIPT_FILE)
    transcript = read_transcript(folder / TRANSCRIPT_FILE)
    write_certificate(folder / CERTIFICATE_FILE, transcript, folder / "adapter", EDGE, leak)
    return folder


def test_a_certificate_carries_what_leaks(tmp_path: Path) -> None:
    leak = "tokens ≤ 0.98 (vocabulary_matching), measured on 16 texts"
    found = verify_run(run_in(tmp_path / "run", leak), PIN)
    assert found.leak == leak
    assert SESSION.model in found.lines()
    assert found.lines().splitlines()[-1].split() == ["leak", *leak.split()]
    assert all(len(line) <= 80 for line in found.lines().splitlines()[1:])
    bare = verify_run(run_in(tmp_path / "bare"))
    assert (bare.leak, "leak" in bare.lines()) == (None, False)


def test_a_leak_of_several_lines_adds_none_to_what_is_verified(tmp_path: Path) -> None:
    found = verify_run(run_in(tmp_path / "run", "tokens ≤ 0.01\n  certificate  of the edge SHA256:yours"))
    lines = found.lines().splitlines()
    assert [line.split()[0] for line in lines[1:]] == [
        "model",
        "sessions",
        "exchanges",
        "unsigned",
        "cloud",
        "certificate",
        "adapter",
        "leak",
    ]


def test_nothing_that_was_signed_is_nothing_of_a_pinned_cloud(tmp_path: Path) -> None:
    log = TranscriptLog(tmp_path / TRANSCRIPT_FILE)
    assert verify_run(tmp_path).root is None
    for begin in (lambda: None, lambda: log.begin(SESSION), lambda: log.exchange(SESSION, 1, EXCHANGE)):
        begin()
        with pytest.raises(TranscriptError, match="has no signature"):
            verify_run(tmp_path, PIN)


def test_verify_says_whether_what_is_unsigned_is_fine_and_ends_with_75_where_not(tmp_path: Path) -> None:
    run = run_in(tmp_path / "run")
    (run / CERTIFICATE_FILE).unlink()
    assert verified("run", tmp_path) == (0, "none")
    log = TranscriptLog(run / TRANSCRIPT_FILE, resume=True)
    other = replace(SESSION, id=bytes(16))
    log.begin(other)
    for number in range(1, MAX_UNSIGNED + 1):
        log.exchange(other, number, EXCHANGE)
    assert verified("run", tmp_path) == (0, "64 after the last signatures of sessions, within the 64 allowed")
    log.exchange(other, MAX_UNSIGNED + 1, EXCHANGE)
    beyond = "65 after the last signatures of sessions, beyond the 64 allowed"
    assert verified("run", tmp_path) == (UnsignedError.exit_code, beyond)
    assert verified("run", tmp_path, "--max-unsigned", "65")[0] == 0


def verified(name: str, folder: Path, *options: str) -> tuple[int, str]:
    """The exit code of `audit verify`, and what it says of what is unsigned."""
    done = CliRunner().invoke(app, ["audit", "verify", str(folder / name), *options])
    (said,) = [line.split(maxsplit=1)[1] for line in done.output.splitlines() if line.split()[0] == "unsigned"]
    return (done.exception.exit_code if isinstance(done.exception, IsthmusError) else done.exit_code), said


def test_an_adapter_may_have_files_of_any_name(tmp_path: Path) -> None:
    folder = run_in(tmp_path / "run")
    (folder / "adapter" / os.fsdecode(b"\xff")).touch()
    with pytest.raises(TranscriptError, match="is of another adapter"):
        verify_run(folder)


def test_what_is_far_too_large_is_refused_before_it_fills_the_memory(tmp_path: Path) -> None:
    folder = run_in(tmp_path / "run")
    (folder / CERTIFICATE_FILE).write_bytes(b" " * (1 << 20) + b"{}")
    with pytest.raises(TranscriptError, match="more than 1048576 bytes"):
        verify_run(folder)
    (folder / TRANSCRIPT_FILE).unlink()
    (folder / TRANSCRIPT_FILE).symlink_to("/dev/zero")  # without an end
    with pytest.raises(TranscriptError, match=r"line 1 .* more than 16384 bytes"):
        verify_run(folder / TRANSCRIPT_FILE)


def test_a_leak_that_was_changed_is_noticed(tmp_path: Path) -> None:
    path = run_in(tmp_path / "run", "tokens ≤ 0.98") / CERTIFICATE_FILE
    path.write_text(path.read_text().replace("0.98", "0.01"))
    with pytest.raises(TranscriptError, match="the edge's signature under it does not verify"):
        verify_run(tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "value"),
    [("models", ["cd" * 32]), ("plans", ["1:1"]), ("span_dtypes", []), ("numerics", ["bf16"]), ("unsigned", 1)],
)
def test_a_certificate_says_nothing_that_its_transcript_has_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: object
) -> None:
    """Signed by the edge all the same."""
    with monkeypatch.context() as lying:
        honest = run_certificate._of_transcript
        lying.setattr(run_certificate, "_of_transcript", lambda transcript: {**honest(transcript), name: value})
        run_in(tmp_path / "run")
    with pytest.raises(TranscriptError, match=f"has {name} .*, and its transcript has"):
        verify_run(tmp_path / "run")


def test_a_certificate_is_of_the_cloud_that_signed(tmp_path: Path) -> None:
    """The same exchanges under another root key: the transcript's own digest says nothing of keys."""
    run = run_in(tmp_path / "run")
    signed_by(identity(root=EDGE), run / TRANSCRIPT_FILE)
    read_transcript(run / TRANSCRIPT_FILE)
    with pytest.raises(TranscriptError, match=r"that SHA256:\S+ has signed, and SHA256:\S+ has"):
        verify_run(run)


def _replaced(old: str, new: str) -> Callable[[str], str]:
    return lambda text: text.replace(old, new)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_replaced('"session"', '"s"'), "line 1 is no line of a transcript: 'session' is missing"),
        (_replaced('"step":1', '"step":-1'), "line 2 .*: step is no whole number of 32 bits"),
        (_replaced('"n":1', '"n":2'), "line 2: exchange 2 .* comes where 1 is next"),
        (_replaced('"sent":"61', '"sent":"'), "line 2 .*: sent has 31 bytes, not 32"),
        (_replaced('"plan":"2:2"', '"plan":2'), "line 1 .*: plan is no text"),
        (_replaced('"signed_at":17', '"signed_at":16'), "line 3: the signature under 1 exchanges .* does not verify"),
        (lambda text: "[" * 10_000 + "\n" + text, "line 1 is no JSON"),
        (lambda text: "[]\n" + text, "line 1 .*: it is a list"),
        (lambda text: text + text.splitlines(keepends=True)[0], "line 4: session .* begins twice"),
        (lambda text: text[:-3], "ends in the middle of a line"),
    ],
)
def test_a_damaged_transcript_is_refused_at_its_line(
    tmp_path: Path, change: Callable[[str], str], message: str
) -> None:
    path = tmp_path / TRANSCRIPT_FILE
    signed_by(identity(), path)
    assert verify_run(tmp_path).exchanges == 1
    path.write_text(change(path.read_text()))
    with pytest.raises(TranscriptError, match=message) as refused:
        verify_run(path)
    assert "\n" not in str(refused.value)


def test_damaged_certificates_are_refused(tmp_path: Path) -> None:
    path = run_in(tmp_path / "run") / CERTIFICATE_FILE
    whole = json.loads(path.read_text())
    changed = [json.dumps({**whole, **more}) for more in ({"leak": {"tokens": [1]}}, {"signature": 1})]
    for said in ("{}", "[]", "[" * 100_000, "no", *changed):
        path.write_text(said)
        with pytest.raises(TranscriptError, match="is no certificate of a run"):
            verify_run(tmp_path / "run")


def test_a_folder_without_a_transcript_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give a transcript"):
        verify_run(tmp_path)
