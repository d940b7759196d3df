"""Keys under a passphrase: where it comes from, what a wrong one gives, and that no key is tried with another's."""

from __future__ import annotations

import getpass
import io
import sys
from pathlib import Path

import pytest
from support.commands import in_process, refused

from isthmus.common.errors import KeyFileError
from isthmus.protocol.secure.keys import (
    Passphrase,
    generate_edge,
    generate_root,
    issue_worker,
    load_edge,
    load_issuer,
    load_worker,
    make_issuer,
)

Capture = pytest.CaptureFixture[str]
SEALED = "-----BEGIN ENCRYPTED PRIVATE KEY-----"
WORDS = "six words that nobody else knows"
OTHER = "other words that nobody else knows"


@pytest.fixture(autouse=True)
def neither_terminal_nor_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    for whose in ("ROOT", "ISSUER", "WORKER", "EDGE"):
        monkeypatch.delenv(f"ISTHMUS_{whose}_PASSPHRASE_FILE", raising=False)


def words_file(path: Path, words: str = WORDS, end: str = "\n") -> Path:
    path.write_bytes((words + end).encode())
    path.chmod(0o600)
    return path


class Terminal:
    """Stands for a person: what is typed, and what was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.typed: list[str] = []
        self.asked: list[str] = []
        monkeypatch.setattr(sys, "stdin", self)
        monkeypatch.setattr(getpass, "getpass", self._ask)

    def isatty(self) -> bool:
        return True

    def _ask(self, prompt: str) -> str:
        self.asked.append(prompt)
        return self.typed.pop(0)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    return Terminal(monkeypatch)


def test_a_new_root_key_asks_twice_and_an_old_one_once(tmp_path: Path, capsys: Capture, terminal: Terminal) -> None:
    home = tmp_path / "cloud"
    terminal.typed = [WORDS, WORDS]
    done = in_process(capsys, "cloud", "keygen", "--home", home)
    assert done.returncode == 0, done.stderr
    assert WORDS not in done.stdout + done.stderr
    assert terminal.asked == [f"New passphrase for {home / 'root_key'}: ", "The same again: "]
    assert (home / "root_key").read_text().startswith(SEALED)
    assert "ENCRYPTED" not in (home / "worker_key").read_text()
    terminal.asked, terminal.typed = [], [WORDS]
    assert in_process(capsys, "cloud", "keygen", "--home", home).returncode == 0
    assert terminal.asked == [f"Passphrase of {home / 'root_key'}: "]


@pytest.mark.parametrize(
    ("typed", "said"), [((WORDS, OTHER), "differ"), (("short", "short"), "12 characters"), (("é" * 512,) * 2, "1023")]
)
def test_no_key_is_made_with_a_passphrase_that_will_not_do(
    tmp_path: Path, capsys: Capture, terminal: Terminal, typed: tuple[str, str], said: str
) -> None:
    terminal.typed = list(typed)
    refused(in_process(capsys, "cloud", "keygen", "--home", tmp_path / "cloud"), 30, "root_key", said)
    assert not (tmp_path / "cloud" / "root_key").exists()


def test_without_a_terminal_and_a_file_the_error_says_both_ways_out(tmp_path: Path, capsys: Capture) -> None:
    home = tmp_path / "cloud"
    refused(
        in_process(capsys, "cloud", "keygen", "--home", home),
        30, "root_key", "ISTHMUS_ROOT_PASSPHRASE_FILE", "--no-passphrase",
    )  # fmt: skip
    assert not (home / "root_key").exists()
    assert in_process(capsys, "cloud", "keygen", "--home", home, "--no-passphrase").returncode == 0
    assert "ENCRYPTED" not in (home / "root_key").read_text()


def test_a_wrong_passphrase_is_said_once_and_a_typed_one_is_forgotten(tmp_path: Path, terminal: Terminal) -> None:
    root = Passphrase("root", asks=True)
    terminal.typed = [WORDS, WORDS]
    generate_root(tmp_path, root)
    issue_worker(tmp_path, root=root)  # which asks no third time
    later = Passphrase("root", asks=True)
    terminal.typed = [OTHER, WORDS]
    with pytest.raises(KeyFileError, match="root_key does not open with this passphrase of the root key"):
        issue_worker(tmp_path, root=later)
    assert terminal.typed == [WORDS]
    issue_worker(tmp_path, root=later)


def test_each_key_has_a_file_of_its_own(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    home, of_root, of_issuer = tmp_path / "cloud", words_file(tmp_path / "r"), words_file(tmp_path / "i", OTHER)
    given = ("--passphrase-file", of_root)
    assert in_process(capsys, "cloud", "keygen", "--home", home, *given).returncode == 0
    # The root key's file is not the issuer's, though it would do for a new key.
    refused(
        in_process(capsys, "cloud", "issuer", "--home", home, *given),
        30, "issuer_key", "ISTHMUS_ISSUER_PASSPHRASE_FILE", "--no-passphrase",
    )  # fmt: skip
    done = in_process(capsys, "cloud", "issuer", "--home", home, *given, "--issuer-passphrase-file", of_issuer)
    assert done.returncode == 0, done.stderr
    assert (home / "issuer_key").read_text().startswith(SEALED)
    with pytest.raises(KeyFileError, match=r"issuer_key has a passphrase.*ISTHMUS_ISSUER_PASSPHRASE_FILE"):
        load_issuer(home)
    monkeypatch.setenv("ISTHMUS_ROOT_PASSPHRASE_FILE", str(of_issuer))
    monkeypatch.setenv("ISTHMUS_ISSUER_PASSPHRASE_FILE", str(of_issuer))
    assert load_issuer(home)
    with pytest.raises(KeyFileError, match="root_key does not open with this passphrase of the root key"):
        make_issuer(home)
    of_root.chmod(0o640)
    monkeypatch.setenv("ISTHMUS_ROOT_PASSPHRASE_FILE", str(of_root))
    with pytest.raises(KeyFileError, match=r"0640.*chmod 600"):
        make_issuer(home)
    of_root.chmod(0o600)
    assert make_issuer(home)


def test_a_worker_s_and_an_edge_s_key_have_one_on_request(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, edge, words = tmp_path / "cloud", tmp_path / "id", words_file(tmp_path / "words")
    done = in_process(capsys, "cloud", "keygen", "--home", home, "--no-passphrase", "--worker-passphrase-file", words)
    assert done.returncode == 0, done.stderr
    with pytest.raises(KeyFileError, match=r"worker_key has a passphrase.*ISTHMUS_WORKER_PASSPHRASE_FILE$"):
        load_worker(home)
    monkeypatch.setenv("ISTHMUS_WORKER_PASSPHRASE_FILE", str(words))
    assert load_worker(home)
    line = generate_edge(tmp_path / "plain", "alice")
    assert "OPENSSH" in (tmp_path / "plain").read_text()
    assert line.startswith("ssh-ed25519 ")
    assert in_process(capsys, "edge", "keygen", "--out", edge, "--passphrase-file", words).returncode == 0
    assert edge.read_text().startswith(SEALED)
    with pytest.raises(KeyFileError, match=r"id has a passphrase.*ISTHMUS_EDGE_PASSPHRASE_FILE, or run this at a term"):
        load_edge(edge)
    for end in ("", "\n", "\r\n"):
        monkeypatch.setenv("ISTHMUS_EDGE_PASSPHRASE_FILE", str(words_file(words, end=end)))
        assert load_edge(edge)
    words_file(words, end="\n\n")
    with pytest.raises(KeyFileError, match="does not open"):
        load_edge(edge)
