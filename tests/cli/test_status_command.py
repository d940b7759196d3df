"""`isthmus cloud status`, with a cloud and a clock of the test's own."""

from __future__ import annotations

import io
import json
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from isthmus.cli import cloud_commands
from isthmus.cloud.control import serve_state
from isthmus.common.errors import ConfigError, UnreachableError


def test_a_pipe_gets_the_connection_string_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    connection = f"isthmus://{'a' * 60}.example:7443#SHA256:{'b' * 43}"
    monkeypatch.setattr(
        serve_state,
        "read_status",
        lambda home: {"connection": connection, "workers": [{"worker": 0, "state": "serving", "restarts": 0}]},
    )
    cloud_commands.status(tmp_path, as_json=False, watch=False, every=1.0)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if connection in line]
    assert max(map(len, lines)) < 200


def test_watching_goes_on_until_ctrl_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pauses: list[float] = []

    def read(home: Path) -> dict[str, Any]:
        assert home == tmp_path
        return {"state": "serving", "look": len(pauses), "workers": []}

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(serve_state, "read_status", read)
    monkeypatch.setattr(cloud_commands.time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        cloud_commands.status(tmp_path, as_json=True, watch=True, every=2.0)
    assert [json.loads(line)["look"] for line in capsys.readouterr().out.splitlines()] == [0, 1, 2]
    assert pauses == [2.0] * 3
    pauses.clear()
    with pytest.raises(KeyboardInterrupt):
        cloud_commands.status(tmp_path, as_json=False, watch=True, every=1.0)
    assert "serving" in capsys.readouterr().out


def test_watching_outlasts_a_cloud_that_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    looks: list[bool] = []  # whether the cloud is there

    def read(_home: Path) -> dict[str, Any]:
        if not looks:
            raise KeyboardInterrupt
        if not looks.pop(0):
            raise UnreachableError("it is restarting")
        return {"state": "serving", "workers": []}

    monkeypatch.setattr(serve_state, "read_status", read)
    monkeypatch.setattr(cloud_commands.time, "sleep", lambda _seconds: None)
    for as_json in (True, False):
        looks[:] = [True, False, True]
        with pytest.raises(KeyboardInterrupt):
            cloud_commands.status(tmp_path, as_json=as_json, watch=True, every=1.0)
        told = capsys.readouterr().out
        if as_json:
            lines = [json.loads(line) for line in told.splitlines()]
            assert [line["state"] for line in lines] == ["serving", "unreachable", "serving"]
            assert (lines[1]["error"], lines[1]["workers"]) == ("it is restarting", [])
        looks[:] = [False]
        with pytest.raises(UnreachableError):
            cloud_commands.status(tmp_path, as_json=as_json, watch=True, every=1.0)


@pytest.mark.parametrize(
    "raw", [b"", b"\xff", b"[]", b"{}", b"[" * 100_000, b'{"connection": "", "metrics": 1, "pid": 1}']
)
def test_a_damaged_word_of_the_cloud_is_told(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / serve_state.STATE_FILE).write_bytes(raw)
    with pytest.raises(ConfigError, match=r"serving\.json is damaged"):
        serve_state.read_status(tmp_path)


def test_a_word_of_the_cloud_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / serve_state.STATE_FILE).mkdir()
    with pytest.raises(ConfigError, match="cannot be read"):
        serve_state.read_status(tmp_path)


@pytest.mark.parametrize("raw", [b"[]", b"{}", b'{"workers": {}}', b"[" * 100_000, b"\xff"])
def test_an_answer_that_is_no_status_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raw: bytes) -> None:
    serve_state.write_state(tmp_path, {"connection": "isthmus://h:7443", "metrics": "h:1", "pid": 1})
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: io.BytesIO(raw))
    with pytest.raises(UnreachableError, match="does not answer"):
        serve_state.read_status(tmp_path)


def test_a_status_without_an_end_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = b'{"workers": []}'
    serve_state.write_state(tmp_path, {"connection": "isthmus://h:7443", "metrics": "h:1", "pid": 1})
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: io.BytesIO(raw))
    assert serve_state.read_status(tmp_path)["workers"] == []
    monkeypatch.setattr(serve_state, "MAX_STATUS", len(raw) - 2)
    with pytest.raises(UnreachableError, match="does not answer"):
        serve_state.read_status(tmp_path)


def test_an_answer_that_is_cut_off_is_none(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(b'HTTP/1.0 200 OK\r\nContent-Length: 100\r\n\r\n{"state"')

        metrics = f"127.0.0.1:{listener.getsockname()[1]}"
        serve_state.write_state(tmp_path, {"connection": "isthmus://h:7443", "metrics": metrics, "pid": 1})
        cloud = threading.Thread(target=answer)
        cloud.start()
        with pytest.raises(UnreachableError, match="does not answer"):
            serve_state.read_status(tmp_path)
        cloud.join()
