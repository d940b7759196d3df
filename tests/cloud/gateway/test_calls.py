"""Calls over real gRPC: turns, shared passes, and deadlines."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cloud.clouds import Home, ThreadServer, served
from support.cloud.sessions import call_in_flight, channels, eventually, hidden, step_together
from support.models.tiny import HIDDEN, tiny_checkpoint

from isthmus.backbone.sites.site_spec import SiteSpec
from isthmus.cloud.bounds import Bounds, EngineOptions
from isthmus.cloud.engine.requests import Request
from isthmus.cloud.gateway import in_flight
from isthmus.cloud.session.served_model import Served
from isthmus.common.errors import ConfigError, ConnectionLostError, TooLateError, UnreachableError
from isthmus.protocol import messages as m
from isthmus.protocol.enrolment import Quota
from isthmus.rpc.transport import run


def test_what_is_granted_is_no_refusal(server: ThreadServer) -> None:
    with channels(server, 1) as (edge,):
        answer = edge.ask(m.Sites(1, (SiteSpec(3, "mlp.down_proj"),)), 5)
        assert isinstance(answer, m.Status)
        assert answer.code == m.StatusCode.OK
    assert refusals(server, "OK") == 0


def test_a_file_is_fetched_whatever_the_largest_call_is(tmp_path: Path) -> None:
    model = tiny_checkpoint("llama", tmp_path / "model")
    served(model, tmp_path / "parts")
    (tmp_path / "parts" / "vocab.bin").write_bytes(bytes(9 << 20))
    small = served(model, tmp_path / "parts", max_tokens=1)
    with ThreadServer(small, Home(tmp_path)) as server, server.link() as link:
        link.open(5)
        chunk = link._keeper.ask(m.Blob, m.Fetch(m.FileSet.PARTS, "vocab.bin", 0), answer_bytes=m.MAX_FILE_CHUNK)
        assert (len(chunk.data), chunk.total) == (8 << 20, 9 << 20)


def test_a_backward_with_its_replay_fits_the_largest_message(cloud: Served) -> None:
    limits = cloud.info.limits
    hidden_bytes = limits.max_tokens_per_call * HIDDEN * 4
    assert limits.max_message_bytes >= 2 * hidden_bytes + limits.max_tokens_per_call * 5


# Whose turn it is -----------------------------------------------------------------------------------------------------


def test_calls_have_their_turns_by_tenant_and_interactive_ones_come_first(cloud: Served, home: Home) -> None:
    home.new_edge("bob")
    keys = {"alice": home.key_file, "bob": home.key_file.parent / "bob"}
    order: list[str] = []
    original = type(cloud.executor).forward
    with ThreadServer(cloud, home, batching=False) as server, contextlib.ExitStack() as stack:

        def opened(tenant: str, **options: Any) -> Any:
            link = stack.enter_context(server.link(keys[tenant], **options))
            link.open(5)
            return link

        with call_in_flight(server, cloud) as held:
            links = {
                "alice 1": opened("alice"),
                "alice 2": opened("alice"),
                "alice 3": opened("alice"),
                "bob": opened("bob"),
                "bob, chat": opened("bob", interactive=True),
            }
            threads = []
            for rows, (name, link) in enumerate(links.items(), start=1):
                calls = server.server.status()["waiting"]

                def call(link: Any = link, rows: int = rows) -> None:
                    link.forward_span(hidden(rows, 3), None, None, keep=False)

                threads.append(threading.Thread(target=call, name=name))
                threads[-1].start()
                eventually(lambda calls=calls: server.server.status()["waiting"] != calls)
            assert server.server.status()["waiting"] == {"alice": 3, "bob": 2}
            names = dict(enumerate(links, start=1))

            def noted(self: Any, session: bytes, number: int, inputs: Any, **options: Any) -> Any:
                order.append(names[len(inputs.hidden)])
                return original(self, session, number, inputs, **options)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(type(cloud.executor), "forward", noted)
                held.release.set()
                for thread in threads:
                    thread.join(10)
    assert order[0] == "bob, chat"
    assert order.index("bob") < order.index("alice 2")
    assert [name for name in order if name.startswith("alice")] == ["alice 1", "alice 2", "alice 3"]


@pytest.mark.parametrize("batching", [True, False])
def test_calls_of_several_tenants_share_a_pass_and_have_the_bits_of_their_own(
    cloud: Served, home: Home, batching: bool
) -> None:
    # A tiny span is less than a call's forward state.
    bounds = Bounds(engine=EngineOptions(state_bytes=1 << 30))
    tenants = ("carol", "dave", "erin")
    for name in tenants:
        home.new_edge(name)
    keys = [home.key_file.parent / name for name in tenants]
    inputs = [hidden(rows, length) for rows, length in ((2, 6), (1, 16), (3, 12))]
    gradients = [torch.randn(each.shape) for each in inputs]
    results: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    with ThreadServer(cloud, home, batching=batching, bounds=bounds) as server, contextlib.ExitStack() as stack:
        links = [stack.enter_context(server.link(key)) for key in keys]
        for link in links:
            link.open(5)

        def step(number: int) -> None:
            output, call = links[number].forward_span(inputs[number], None, None, keep=True)[:2]
            results[number] = (output, links[number].backward_span(call, gradients[number], inputs[number], None, None))

        step_together(server, cloud, step, 3)
        shared = server.server.status()["calls_per_pass"]
    # The three forwards wait together, so that two at least share a pass; when the backwards come is up to the threads.
    assert shared > 1 if batching else shared == 0
    for number, (output, gradient) in results.items():
        leaf = inputs[number].clone().requires_grad_()
        expected = cloud.executor.host.span(leaf)
        assert torch.equal(output, expected)
        assert torch.equal(gradient, *torch.autograd.grad(expected, leaf, gradients[number]))


def test_a_tenant_over_its_rate_waits_and_what_nobody_waits_for_is_not_made(cloud: Served, tmp_path: Path) -> None:
    home = Home(tmp_path, quota=Quota(max_tokens_per_second=1))
    with ThreadServer(cloud, home) as server, server.link() as link:
        link.open(5)
        link.forward_span(hidden(2, 33), None, None, keep=False)
        enough = threading.Event()

        def look() -> None:
            if enough.is_set():
                raise UnreachableError("nobody waits any more")

        link.watch(look)
        calling = threading.Thread(target=_swallow, args=(link,), daemon=True)
        calling.start()
        eventually(lambda: server.server.status()["waiting"] == {"alice": 1})
        run(link._keeper._stream.abandon())  # type: ignore[union-attr]  # it is open
        eventually(lambda: server.server.status()["waiting"] == {})
        eventually(lambda: server.server.status()["in_flight"] == 0)
        enough.set()
        calling.join(10)


def test_an_edge_that_vanishes_in_a_call_leaves_nothing_behind(server: ThreadServer, cloud: Served) -> None:
    release = threading.Event()
    forward = cloud.executor.host.span.forward
    entered = threading.Event()

    def slow(*args: Any) -> torch.Tensor:
        entered.set()
        release.wait(10)
        return forward(*args)

    cloud.executor.host.span.forward = slow  # type: ignore[method-assign]  # the one way to hold a call in flight
    try:
        link = server.link()
        link.open(5)
        calling = threading.Thread(target=_swallow, args=(link,), daemon=True)
        calling.start()
        assert entered.wait(10)
        run(link._keeper._stream.abandon())  # type: ignore[union-attr]  # it is open
        eventually(lambda: server.server.status()["sessions"] == {})
    finally:
        release.set()
        del cloud.executor.host.span.forward
    link._keeper._closed = True
    eventually(lambda: server.server.status()["in_flight"] == 0)
    eventually(lambda: cloud.executor.cache.used == 0)


def _swallow(link: Any) -> None:
    link._keeper._options = dataclasses.replace(link._keeper._options, give_up_after=0.1)
    with contextlib.suppress(ConnectionLostError, UnreachableError):
        link.forward_span(hidden(), None, None, keep=True)
    link.close()


# Deadlines ------------------------------------------------------------------------------------------------------------


def test_a_call_that_cannot_keep_its_deadline_is_refused_and_the_session_goes_on(cloud: Served, home: Home) -> None:
    home.new_edge("erin")
    with ThreadServer(cloud, home) as server:
        with server.link(home.key_file.parent / "erin", deadline=0.2) as link:
            link.open(5)
            with call_in_flight(server, cloud) as held:
                with pytest.raises(TooLateError, match=r"within 0\.2 s"):
                    link.forward_span(hidden(), None, None, keep=False)
                assert not held.result, "the answer comes while the other call is computed"
            assert len(link.forward_span(hidden(), None, None, keep=False)[0]) == len(hidden())
        assert refusals(server, "TOO_LATE") == 1
        assert server.server.status()["deadlines"]["refused"] == 1


def test_a_call_that_is_computed_after_its_deadline_counts_as_late(
    cloud: Served, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    original = type(cloud.executor).forward

    def slow(*args: Any, **options: Any) -> Any:
        now[0] += 31.0
        return original(*args, **options)

    with (
        ThreadServer(cloud, home, clock=lambda: now[0]) as server,
        server.link(deadline=30.0) as link,
        server.link() as patient,
    ):
        for each in (link, patient):
            each.open(5)
        with monkeypatch.context() as patch:
            patch.setattr(type(cloud.executor), "forward", slow)  # no pace is known yet, so it is begun
            for each in (link, patient):
                each.forward_span(hidden(), None, None, keep=False)
        assert server.server.status()["deadlines"] == {"met": 0, "late": 1, "refused": 0}
        for _ in range(3):
            link.forward_span(hidden(), None, None, keep=False)
        assert link.cloud_peak_bytes() is not None  # no computing, so no deadline
        assert server.server.status()["deadlines"] == {"met": 3, "late": 1, "refused": 0}
        assert 'isthmus_deadline_calls_total{outcome="late"} 1.0' in server.server.metrics.text().decode()


def test_a_call_that_waits_beside_others_until_its_deadline_is_refused(
    cloud: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Home(tmp_path, quota=Quota(max_inflight_bytes=hidden().nbytes + 64))  # one call at a time
    with ThreadServer(cloud, home) as server, server.link(deadline=0.2) as link:
        link.open(5)
        with call_in_flight(server, cloud):
            bodies: list[bytearray] = []
            monkeypatch.setattr(in_flight, "wipe", bodies.append)
            with pytest.raises(TooLateError, match=r"within 0\.2 s"):
                link.forward_span(hidden(), None, None, keep=False)
            eventually(lambda: server.server.status()["in_flight"] == 1)  # the other one goes on
            assert len(bodies) == 1
            assert server.server.status()["deadlines"] == {"met": 0, "late": 0, "refused": 1}
        assert link.cloud_peak_bytes() is not None
        assert link.traffic.sessions == 1


def test_the_wait_beside_others_is_taken_off_the_deadline(
    cloud: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    left: list[float | None] = []
    home = Home(tmp_path, quota=Quota(max_inflight_bytes=hidden().nbytes + 64))
    with ThreadServer(cloud, home, clock=lambda: now[0]) as server, server.link(deadline=30.0) as link:
        link.open(5)
        submit = server.server._calls.engine.submit

        def noted(request: Request[Any]) -> Any:
            left.append(request.deadline and request.deadline - time.monotonic())
            return submit(request)

        with call_in_flight(server, cloud) as held:
            monkeypatch.setattr(server.server._calls.engine, "submit", noted)
            calling = threading.Thread(target=link.forward_span, args=(hidden(), None, None), kwargs={"keep": False})
            calling.start()
            eventually(lambda: server.server._calls.in_flight._rooms["alice"].turn.locked())
            now[0] += 10.0
            held.release.set()
            calling.join(10)
    assert left[0] == pytest.approx(20.0, abs=5.0)


def test_a_deadline_that_is_none_is_refused(cloud: Served, home: Home) -> None:
    with ThreadServer(cloud, home) as server:
        for deadline in (0.0, -1.0, 1e9, float("nan")):
            with pytest.raises(ConfigError, match="deadline"):
                server.link(deadline=deadline)


def refusals(server: ThreadServer, status: str) -> float:
    value = server.server.metrics.registry.get_sample_value("isthmus_refused_total", {"status": status})
    return value or 0.0
