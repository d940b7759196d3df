"""Metrics of several workers, the port of `/status` and `/metrics`, and silent connections to it."""

from __future__ import annotations

import json
import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from isthmus.cloud.telemetry import metrics
from isthmus.cloud.telemetry.metrics import Metrics, merged, serve_metrics

PATIENCE = 60.0  # seconds; reached only where something hangs


@contextmanager
def served() -> Iterator[tuple[str, int]]:
    server = serve_metrics("127.0.0.1", 0, lambda: b"", lambda: {"state": "serving"})
    try:
        yield "127.0.0.1", server.server_port
    finally:
        server.shutdown()
        server.server_close()


def state_at(address: tuple[str, int]) -> str:
    host, port = address
    with urllib.request.urlopen(f"http://{host}:{port}/status", timeout=PATIENCE) as response:
        return str(json.load(response)["state"])


def test_a_connection_that_says_nothing_keeps_none_waiting() -> None:
    with served() as address, socket.create_connection(address):
        assert state_at(address) == "serving"


def test_a_connection_that_says_nothing_is_closed_without_a_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(metrics._QuietHandler, "timeout", 0.01)
    with served() as address, socket.create_connection(address, PATIENCE) as silent:
        assert silent.recv(1) == b""
    assert capsys.readouterr() == ("", "")


def test_connections_beyond_the_limit_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "MAX_CONNECTIONS", 1)
    with served() as address, socket.create_connection(address), socket.create_connection(address, PATIENCE) as beyond:
        assert beyond.recv(1) == b""


def test_metrics_of_several_workers_have_a_label_and_those_of_one_do_not() -> None:
    first, second = Metrics(), Metrics()
    first.tokens.labels("forward").inc(3)
    second.tokens.labels("forward").inc(4)
    assert first.positions() == 3.0
    text = merged({"0": first.text(), "1": second.text()}).decode()
    assert 'isthmus_tokens_total{operation="forward",worker="0"} 3.0' in text
    assert 'isthmus_tokens_total{operation="forward",worker="1"} 4.0' in text
    assert text.count("# TYPE isthmus_tokens_total counter") == 1
    assert merged({"0": first.text()}) == first.text()
