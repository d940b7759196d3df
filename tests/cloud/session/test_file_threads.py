"""Files for edges: on threads of their own, beside the compute threads, one at a time for each tenant."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cloud.clouds import Home, ThreadServer
from support.cloud.sessions import channels
from support.models.tiny import HIDDEN

from isthmus.cloud.session.file_threads import FILE_THREADS, FileThreads
from isthmus.cloud.session.served_model import Served
from isthmus.cloud.session.tenant_adapters import Compute, TenantAdapters
from isthmus.protocol import messages as m
from isthmus.protocol.enrolment import Quota
from isthmus.protocol.tensor_codecs import Role, codec_id, encode


def test_a_download_neither_waits_for_the_compute_thread_nor_keeps_it_waiting(
    cloud: Served, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.new_edge("bob")
    computing, go_on, reading, read = (threading.Event() for _ in range(4))
    forward, fetch = type(cloud.executor).forward, type(cloud.parts).read

    def slow_forward(*args: Any, **options: Any) -> Any:
        computing.set()
        assert go_on.wait(20)
        return forward(*args, **options)

    def slow_read(*args: Any) -> Any:
        reading.set()
        assert read.wait(20)
        return fetch(*args)

    hidden = torch.ones(1, 4, HIDDEN)
    with (
        ThreadServer(cloud, home) as server,
        server.link() as training,
        server.link(home.key_file.parent / "bob") as new,
    ):
        training.open(5)
        new.open(5)
        monkeypatch.setattr(type(cloud.executor), "forward", slow_forward)
        busy = threading.Thread(target=lambda: training.forward_span(hidden, None, None, keep=False), daemon=True)
        busy.start()
        assert computing.wait(10)
        listing = new._keeper.ask(m.FileList, m.FetchList(m.FileSet.PARTS))
        assert listing.entries, "a download goes on while a call is computed"
        go_on.set()
        busy.join(10)
        monkeypatch.setattr(type(cloud.parts), "read", slow_read)
        piece: list[Any] = []

        def load() -> None:
            question = m.Fetch(m.FileSet.PARTS, "config.json")
            piece.append(new._keeper.ask(m.Blob, question, answer_bytes=m.MAX_FILE_CHUNK))

        loading = threading.Thread(target=load, daemon=True)
        loading.start()
        assert reading.wait(10)
        done = threading.Event()
        again = threading.Thread(
            target=lambda: (training.forward_span(hidden, None, None, keep=False), done.set()), daemon=True
        )
        again.start()
        assert done.wait(10), "a call is computed while a download waits for its disk"
        read.set()
        loading.join(10)
        assert len(piece) == 1


def test_the_check_of_a_tenant_that_is_over_its_rate_keeps_no_others_waiting(
    cloud: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Home(tmp_path, quota=Quota(max_tokens_per_second=1))
    bob = home.new_edge("bob")

    def plug_in(self: TenantAdapters, request: m.PlugIn, compute: Compute) -> m.Status:
        return compute(lambda: m.Status(m.StatusCode.OK, None, "checked"), 4, 0)

    monkeypatch.setattr(TenantAdapters, "plug_in", plug_in)
    request = m.PlugIn((m.FileEntry("adapter_config.json", 1, bytes(32)),))
    with ThreadServer(cloud, home) as server, channels(server, 1) as (over,), channels(server, 1, bob) as (other,):
        payload = encode(torch.zeros(2, 33, HIDDEN), "fp32", Role.ACTIVATION)
        over.ask(m.Forward(m.CallId(1, 1), False, payload, None, None, codec_id("fp32")), 10)
        account = server.server._calls.engine._scheduler._tenants["alice"]
        for each in (over, other):
            answer = each.ask(request, 10)
            assert isinstance(answer, m.Status)
            assert answer.message == "checked"
        assert account.overdrawn > 0


def test_a_tenant_has_one_thread_at_a_time() -> None:
    files, go_on = FileThreads(), threading.Event()
    began: list[int] = []

    def hold(number: int) -> int:
        began.append(number)
        assert go_on.wait(20)
        return number

    async def run() -> list[int]:
        def over() -> None:
            pass

        greedy = [asyncio.create_task(files.run(b"a", lambda n=n: hold(n), over)) for n in range(2 * FILE_THREADS)]  # type: ignore[misc]
        await asyncio.sleep(0.05)
        assert began == [0]
        assert await files.run(b"b", lambda: 77, over) == 77, "another tenant finds a thread"
        go_on.set()
        return await asyncio.gather(*greedy)

    assert asyncio.run(run()) == list(range(2 * FILE_THREADS))
    assert files._turns == {}
    files.shutdown()


def test_who_gives_up_leaves_the_place_in_order() -> None:
    files, go_on = FileThreads(), threading.Event()
    over: list[str] = []

    async def run() -> None:
        first = asyncio.create_task(files.run(b"a", lambda: go_on.wait(20), lambda: over.append("first")))
        second = asyncio.create_task(files.run(b"a", lambda: True, lambda: over.append("second")))
        await asyncio.sleep(0.05)
        second.cancel()
        first.cancel()
        await asyncio.gather(first, second, return_exceptions=True)
        assert over == ["second"], "what has begun goes on, and its bytes are needed"
        third = asyncio.create_task(files.run(b"a", lambda: True, lambda: over.append("third")))
        await asyncio.sleep(0.05)
        assert not third.done()
        go_on.set()
        assert await third

    asyncio.run(run())
    assert over == ["second", "first", "third"]
    assert files._turns == {}
    files.shutdown()
