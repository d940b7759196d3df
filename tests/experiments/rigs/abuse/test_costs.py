"""The attacks on the cost of calls, against a tiny cloud on a thread."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from support.cloud.clouds import Home, ThreadServer, served
from support.models.tiny import tiny_checkpoint

from isthmus.experiments.rigs.abuse.costs import COSTS, run
from isthmus.experiments.rigs.abuse.decode_costs import DECODE_COSTS, run as run_decoding
from isthmus.experiments.rigs.abuse.honest import Honest
from isthmus.protocol import messages as m


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThreadServer]:
    folder = tmp_path_factory.mktemp("costs")
    cloud = served(tiny_checkpoint("llama", folder / "model"), folder / "parts", max_tokens=1 << 15)
    home = Home(folder)
    home.new_edge("bob")
    with ThreadServer(cloud, home) as running:
        yield running


@pytest.mark.parametrize("deed", COSTS)
def test_a_deed_is_answered_and_another_tenant_goes_on(server: ThreadServer, deed: str) -> None:
    key = server.home.key_file
    with Honest(server.address, key.parent / "bob") as honest:
        begun = time.monotonic()
        found = run(deed, server.address, key, 0.3)
        assert honest.latency_s(begun) > 0  # it raises where calls fail or none are answered
    if deed == "long_call":
        assert isinstance(found, m.Status)
        assert "16384 tokens is longer than the 128" in found.message
    if deed == "large_call":
        assert isinstance(found, m.ForwardReply)


@pytest.mark.parametrize("deed", DECODE_COSTS)
def test_a_deed_that_decodes_is_answered_within_the_budget(server: ThreadServer, deed: str) -> None:
    key = server.home.key_file
    with Honest(server.address, key.parent / "bob") as honest:
        begun = time.monotonic()
        answer = run_decoding(deed, server.address, key, 0.3)
        assert honest.latency_s(begun) > 0  # as above
    status = server.server.status()
    assert isinstance(answer, m.ForwardReply) or (deed == "wild_rows" and "longer than the 128" in answer.message)
    assert status["cache_bytes"] <= status["cache_budget_bytes"]
