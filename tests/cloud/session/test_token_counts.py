"""How many tokens a tenant may have in all: counted before they are computed, in a file that outlives the server."""

from __future__ import annotations

import asyncio
import stat
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.cloud.clouds import Home, ThreadServer
from support.cloud.sessions import hidden
from support.models.tiny import HIDDEN
from support.protocol.wire import TENANT

from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.sites.site_spec import SiteSpec
from isthmus.cloud.gateway.calls import SessionCalls
from isthmus.cloud.session.file_threads import FileThreads
from isthmus.cloud.session.served_model import Served
from isthmus.cloud.session.token_counts import TokenCounts
from isthmus.common.errors import RefusedError
from isthmus.protocol import messages as m
from isthmus.protocol.enrolment import Quota
from isthmus.protocol.session import Received
from isthmus.protocol.tensor_codecs import Role, encode

OF_TEN = replace(TENANT, quota=Quota(max_tokens=10))


def counts(root: Path, plan: str = "2:2") -> TokenCounts:
    return TokenCounts(root, "d" * 64, SplitPlan.parse(plan, 6))


def forward(width: int, sites: int = 0) -> m.Forward:
    sent = encode(torch.ones(1, 2, width), "fp32", Role.ACTIVATION)
    return m.Forward(m.CallId(0, 99), False, sent, None, None, sent.codec, sites)


def test_what_was_counted_stays_counted(tmp_path: Path) -> None:
    assert counts(tmp_path).take(OF_TEN, 7) is None
    again = counts(tmp_path)
    said = again.take(OF_TEN, 4)
    assert said is not None
    assert "10 tokens" in said
    assert "3 are left" in said
    assert again.take(OF_TEN, 3) is None  # the refused ones count nothing
    assert again.take(replace(OF_TEN, quota=Quota(max_tokens=12)), 2) is None  # the owner allows more
    assert counts(tmp_path, "1:2").take(OF_TEN, 10) is None  # another split is another count
    assert again.take(TENANT, 10**9) is None  # who has no allowance is not counted


def test_workers_that_count_at_a_time_lose_nothing(tmp_path: Path) -> None:
    refused: list[str] = []

    def take() -> None:
        refused.extend(filter(None, (counts(tmp_path).take(OF_TEN, 1) for _ in range(5))))

    workers = [threading.Thread(target=take) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(refused) == 20 - 10


def test_nobody_else_sees_what_is_counted(tmp_path: Path) -> None:
    assert counts(tmp_path / "counts").take(OF_TEN, 1) is None
    modes = {path.relative_to(tmp_path): stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert len(modes) == 4
    assert all(mode == (0o700 if (tmp_path / path).is_dir() else 0o600) for path, mode in modes.items()), modes


@pytest.mark.parametrize("damage", [b"", b"ten", b"\xff"])
def test_what_cannot_be_counted_is_refused(tmp_path: Path, damage: bytes) -> None:
    assert counts(tmp_path).take(OF_TEN, 1) is None
    (path,) = (path for path in tmp_path.glob("*/*") if not path.name.startswith("."))
    path.write_bytes(damage)
    assert "cannot read or write its count" in str(counts(tmp_path).take(OF_TEN, 1))


def test_a_call_whose_edge_goes_while_it_is_counted_is_overwritten() -> None:
    counting, go_on = threading.Event(), threading.Event()

    def take(*_: object) -> None:
        counting.set()
        assert go_on.wait(60)

    calls: Any = SimpleNamespace(tokens=SimpleNamespace(take=take), files=FileThreads())
    session: Any = SimpleNamespace(tenant=OF_TEN)
    work: Any = SimpleNamespace(positions=lambda _: 2, check_bounds=lambda _: None)
    received = Received(forward(HIDDEN), bytearray(b"hidden states"))

    async def give_up() -> None:
        answering = asyncio.create_task(SessionCalls(calls, session, work, None, None)._reply(received, None))
        assert await asyncio.to_thread(counting.wait, 60)
        answering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await answering

    try:
        asyncio.run(give_up())
    finally:
        go_on.set()
        calls.files.shutdown()
    assert received.body == bytes(len(b"hidden states"))


def test_a_tenant_has_its_allowance_and_no_more_whatever_it_asks(cloud: Served, tmp_path: Path) -> None:
    home = Home(tmp_path, quota=Quota(max_tokens=12))
    fresh = replace(cloud, tokens=counts(tmp_path / "counts"))
    with ThreadServer(fresh, home) as server, server.link() as link:
        link.open(5)
        output, kept = link.forward_span(hidden(1, 4), None, None, keep=True)
        link.backward_span(kept, output, hidden(1, 4), None, None)
        with pytest.raises(RefusedError, match="no adapters inside the cloud"):
            link._keeper.ask(m.Status, m.Sites(1, (SiteSpec(3, "mlp.down_proj"),)))
        with pytest.raises(RefusedError, match="no adapters inside the cloud"):
            link._keeper.ask(m.ForwardReply, forward(HIDDEN, sites=1))
        assert "alice" not in server.server._calls._call_threads._held  # it was never given a thread
        with pytest.raises(RefusedError, match="do not fit"):
            link._keeper.ask(m.ForwardReply, forward(HIDDEN + 1))
        with pytest.raises(RefusedError, match=r"12 tokens.*6 were asked for and 4 are left") as refused:
            link.span.new_cache().extend(hidden(1, 6), None, None)
        assert refused.type is RefusedError  # as it does not pass, nothing waits for it
    # Another process of the cloud.
    with ThreadServer(replace(fresh, tokens=counts(tmp_path / "counts")), home) as server, server.link() as link:
        link.open(5)
        with pytest.raises(RefusedError, match=r"alice may have 12 tokens.*4 are left"):
            link.forward_span(hidden(1, 5), None, None, keep=False)
        assert link.forward_span(hidden(1, 4), None, None, keep=False)[0].shape == (1, 4, HIDDEN)
        with pytest.raises(RefusedError, match="0 are left"):
            link.forward_span(hidden(1, 1), None, None, keep=False)
        assert link.traffic.sessions == 1
        other = home.new_edge("bob")
        with server.link(other) as free:
            free.open(5)
            free.forward_span(hidden(2, 20), None, None, keep=False)
