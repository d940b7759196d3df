"""Tenants that misbehave against a worker in a process of its own: another tenant's calls get the same answers."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cloud.dying_worker import MortalWorker
from support.models.tiny import HIDDEN, tiny_checkpoint
from support.protocol.wire import PIN

from isthmus.edge.client.link import connect
from isthmus.experiments.harness.blocking_stream import NothingYetError
from isthmus.experiments.rigs.hostile_tenants import DEEDS, ENDED, Hostile

CALLS = 12


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MortalWorker]:
    folder = tmp_path_factory.mktemp("hostile")
    with MortalWorker(tiny_checkpoint("llama", folder / "model"), folder / "worker") as running:
        running.home.new_edge("mallory")
        yield running


@pytest.mark.server
@pytest.mark.parametrize("deed", DEEDS + ENDED)
def test_others_get_the_same_answers_whatever_a_tenant_does(worker: MortalWorker, deed: str) -> None:
    mallory = Hostile(worker.connection, worker.home.key_file.parent / "mallory", batch=2, seq=64)
    inputs = torch.randn(2, 16, HIDDEN, generator=torch.Generator().manual_seed(0))
    failures: list[BaseException] = []

    def misbehave() -> None:
        try:
            getattr(mallory, deed)(0.7)
        except BaseException as error:  # noqa: BLE001  # raised again below
            failures.append(error)

    with connect(worker.connection, key=worker.home.key_file, connect_timeout=60) as calm:
        expected, call = calm.forward_span(inputs, None, None, keep=True)
        gradient = calm.backward_span(call, torch.ones_like(expected), inputs, None, None)
        before = calm.traffic.retries
        thread = threading.Thread(target=misbehave)
        thread.start()
        calls = 0
        while thread.is_alive() or calls < CALLS:
            calls += 1
            output, call = calm.forward_span(inputs, None, None, keep=True)
            assert torch.equal(output, expected)
            assert torch.equal(calm.backward_span(call, torch.ones_like(output), inputs, None, None), gradient)
            if calls == CALLS // 2:  # and somebody new comes
                with connect(worker.connection, key=worker.home.key_file, connect_timeout=60) as other:
                    assert torch.equal(other.forward_span(inputs, None, None, keep=False)[0], expected)
        thread.join()
        assert calm.traffic.retries == before
        assert not failures
    assert worker.lives == 1


class _FullOfAnswers:
    """A stream that takes a frame only once an answer has been read."""

    def __init__(self) -> None:
        self.unread, self.taken = 1, 0

    def send(self, _frame: bytes) -> None:
        if self.unread:
            raise NothingYetError
        self.taken += 1

    def read(self, _seconds: float) -> None:
        self.unread = 0


@pytest.mark.parametrize("reads", [True, False])
def test_a_flood_goes_on_over_a_cloud_that_waits_for_its_answers_to_be_read(tmp_path: Path, reads: bool) -> None:
    stream: Any = _FullOfAnswers()
    end = time.monotonic() + (60 if reads else 0.05)
    hostile = Hostile(f"isthmus://127.0.0.1:1#{PIN}", tmp_path, 1, 1)
    assert hostile._send(stream, b"", end, stream.read if reads else None) == reads
    assert stream.taken == reads
