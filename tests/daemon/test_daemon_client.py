"""Asking a daemon that breaks off."""

from __future__ import annotations

import io
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from isthmus.cli import jobs_commands
from isthmus.common.errors import NotRunningError
from isthmus.daemon.daemon_client import DaemonClient
from isthmus.daemon.home import Home

WHOLE = b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nabcd"
SHORT = b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nabcd"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nabcd\r\n"
JOB = b'HTTP/1.1 200 OK\r\ncontent-length: 23\r\n\r\n{"results": ["file-1"]}'


@pytest.fixture
def home() -> Iterator[Home]:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # short, as a socket's path must be
        made = Home.make(Path(folder) / "home")
        made.token.write_text(f"tml-{'a' * 43}\n")
        made.token.chmod(0o600)
        yield made


@contextmanager
def answering(home: Home, *answers: bytes) -> Iterator[None]:
    """A daemon that gives these answers, one a connection, and then closes it."""
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(str(home.socket))
        door.listen()

        def answer() -> None:
            for data in answers:
                connection, _ = door.accept()
                with connection:
                    connection.recv(1 << 16)
                    connection.sendall(data)

        thread = threading.Thread(target=answer)
        thread.start()
        yield
        thread.join()
    home.socket.unlink()


@pytest.mark.parametrize("broken", [SHORT, CHUNKED])
def test_a_download_that_breaks_off_is_none(home: Home, broken: bytes) -> None:
    out = io.BytesIO()
    with answering(home, WHOLE):
        DaemonClient(home).download("/x", out)
    assert out.getvalue() == b"abcd"
    with answering(home, broken), pytest.raises(NotRunningError, match=r"too early|Incomplete"):
        DaemonClient(home).download("/x", io.BytesIO())


def test_a_result_that_breaks_off_leaves_the_older_file(home: Home, tmp_path: Path) -> None:
    out = tmp_path / "figures.csv"
    out.write_bytes(b"older")
    with answering(home, JOB, SHORT), pytest.raises(NotRunningError):
        jobs_commands.result("ftjob-1", out, home.path)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"older"]
    with answering(home, JOB, WHOLE):
        jobs_commands.result("ftjob-1", out, home.path)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"abcd"]
