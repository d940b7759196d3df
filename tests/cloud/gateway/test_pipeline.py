"""A span in stages: the same bits as one worker with all of it, whatever a stage forgets or whoever goes away."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import socket
import stat
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from support.cloud.clouds import Home, ThreadServer, served
from support.cloud.sessions import eventually
from support.models.tiny import HIDDEN, tiny_checkpoint

from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.backbone.plan import Span, SplitPlan
from isthmus.backbone.sites.site_spec import SiteSpec
from isthmus.cloud.control.ports import Ports
from isthmus.cloud.control.worker import Worker, WorkerSpec
from isthmus.cloud.control.worker_specs import stage_specs
from isthmus.cloud.directory import Update
from isthmus.cloud.engine.requests import Share
from isthmus.cloud.gateway import pipeline as pipeline_module, server as server_module
from isthmus.cloud.gateway.pipeline import NextStage
from isthmus.cloud.session.served_model import Served
from isthmus.cloud.telemetry.logs import LOGGER
from isthmus.common.errors import ConnectionLostError, NotEnrolledError, RefusedError
from isthmus.edge.client.link import Link, connect
from isthmus.protocol import messages as m
from isthmus.protocol.enrolment import ConnectionString, Quota, Tenant
from isthmus.protocol.limits import KEEPALIVE_SECONDS, LEAST_KEEPALIVE_SECONDS
from isthmus.protocol.secure.keys import load_edge
from isthmus.rpc.transport import GrpcTransport

MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
POSITIONS = torch.arange(6)[None]


def hidden(seed: int) -> torch.Tensor:
    return torch.randn(2, 6, HIDDEN, generator=torch.Generator().manual_seed(seed))


class Pipeline:
    """Three stages on three servers, and the whole span beside them."""

    def __init__(self, model: Path, folder: Path, dtype: str = "fp32") -> None:
        self.whole = served(model, folder / "parts", dtype=dtype)
        self.parts = [served(model, folder / "parts", dtype=dtype, layers=layers) for layers in ("2:3", "3:4", "4:5")]
        self.homes = [Home(folder / f"home-{number}") for number in range(3)]
        self.dtype = dtype
        self.servers: list[ThreadServer] = []

    def start(self) -> None:
        """Start the last stage first: each needs the port of the one behind it."""
        behind: NextStage | None = None
        for number in (2, 1, 0):
            home = self.homes[number]
            server = ThreadServer(self.parts[number], home, next_stage=behind).start()
            self.servers.insert(0, server)
            if number:
                key = load_edge(home.new_edge("stage", stage=True))
                behind = NextStage(partial(str, f"127.0.0.1:{server.port}"), home.pin, key, self.dtype)

    def restart(self, number: int) -> None:
        """End a stage's server and everything that it remembers, and start one at the same port."""
        old = self.servers[number]
        old.__exit__()
        listen = f"127.0.0.1:{old.port}"
        behind = old.server._next_stage
        self.servers[number] = ThreadServer(
            self.parts[number], self.homes[number], listen=listen, next_stage=behind
        ).start()

    def link(self) -> Link:
        link = self.servers[0].link()
        link.open(5)
        return link


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("pipeline") / "model", num_hidden_layers=7)


@pytest.fixture
def pipeline(model: Path, tmp_path: Path) -> Iterator[Pipeline]:
    made = Pipeline(model, tmp_path)
    made.start()
    yield made
    for server in made.servers:
        server.__exit__()


def expected(whole: Served, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    given = hidden(seed).requires_grad_()
    output = whole.executor.host.span(given.to(whole.executor.dtype), MASK, POSITIONS)
    (gradient,) = torch.autograd.grad(output, given, hidden(seed + 1).to(output.dtype))
    return output.detach(), gradient


def check_pass(link: Link, whole: Served, seed: int) -> None:
    """One forward and backward over the pipeline, and what the whole span gives."""
    output, gradient = expected(whole, seed)
    given = hidden(seed).requires_grad_()
    mine, kept = link.forward_span(given, MASK, POSITIONS, keep=True)
    assert torch.equal(mine, output.float())
    back = link.backward_span(kept, hidden(seed + 1), given, MASK, POSITIONS)
    assert back is not None
    assert torch.equal(back, gradient)


def test_a_pipeline_gives_the_bits_of_the_whole_span(pipeline: Pipeline) -> None:
    with pipeline.link() as link:
        check_pass(link, pipeline.whole, 1)
        check_pass(link, pipeline.whole, 2)
        assert link.traffic.retries == 0
        mine, _ = link.forward_span(hidden(3), MASK, POSITIONS, keep=False)
        assert torch.equal(mine, expected(pipeline.whole, 3)[0])
    assert [part.executor.host.span.layer_span for part in pipeline.parts] == [Span(2, 3), Span(3, 4), Span(4, 5)]


def test_a_pipeline_in_bf16_rounds_nothing_between_stages(model: Path, tmp_path: Path) -> None:
    made = Pipeline(model, tmp_path, "bf16")
    made.start()
    try:
        with made.link() as link:
            check_pass(link, made.whole, 1)
    finally:
        for server in made.servers:
            server.__exit__()


@pytest.mark.parametrize("forgetful", [(0,), (1,), (2,), (0, 2), (0, 1, 2)])
def test_a_stage_that_has_lost_the_forward_gets_it_again(pipeline: Pipeline, forgetful: tuple[int, ...]) -> None:
    output, gradient = expected(pipeline.whole, 1)
    with pipeline.link() as link:
        given = hidden(1).requires_grad_()
        mine, kept = link.forward_span(given, MASK, POSITIONS, keep=True)
        for number in forgetful:
            pipeline.parts[number].executor.cache.evict_all()
        back = link.backward_span(kept, hidden(2), given, MASK, POSITIONS)
        assert back is not None
        assert torch.equal(mine, output)
        assert torch.equal(back, gradient)
        assert all(part.executor.cache.used == 0 for part in pipeline.parts)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_stage_that_is_started_anew_is_found_again(pipeline: Pipeline, number: int) -> None:
    _, gradient = expected(pipeline.whole, 1)
    with pipeline.link() as link:
        given = hidden(1).requires_grad_()
        _, kept = link.forward_span(given, MASK, POSITIONS, keep=True)
        pipeline.restart(number)
        back = link.backward_span(kept, hidden(2), given, MASK, POSITIONS)
        assert back is not None
        assert torch.equal(back, gradient)
        check_pass(link, pipeline.whole, 3)


@pytest.fixture
def own_log() -> Iterator[None]:
    """Workers decide where the log goes."""
    handlers, level, propagate = LOGGER.handlers[:], LOGGER.level, LOGGER.propagate
    yield
    LOGGER.handlers[:], LOGGER.propagate = handlers, propagate
    LOGGER.setLevel(level)


@pytest.mark.usefixtures("own_log")
def test_the_workers_of_serve_are_a_pipeline(model: Path, tmp_path: Path) -> None:
    whole = served(model, tmp_path / "parts")
    home = Home(tmp_path / "home")
    checkpoint = Checkpoint(model, "tiny")
    plan = SplitPlan.parse("2:2", checkpoint.config.num_hidden_layers)
    with contextlib.closing(Ports()) as ports:
        listen = ports.take("127.0.0.1:0")
        spec = WorkerSpec(
            checkpoint=str(model),
            model="tiny",
            plan="2:2",
            dtype="fp32",
            parts=str(tmp_path / "parts"),
            home=str(home.folder),
            listen=listen,
            stash_bytes=1 << 26,
            max_tokens=4096,
            threads=1,
            log_file="",
            address=listen,
        )
        with stage_specs(spec, plan, 2, ports) as specs:
            workers = [Worker(each) for each in specs]
            try:
                key = home.folder / "pipeline" / "1" / "id_ed25519"
                assert stat.S_IMODE(key.stat().st_mode) == 0o600
                with connect(
                    str(ConnectionString("127.0.0.1", workers[0].port(), home.pin)), key=home.key_file
                ) as link:
                    check_pass(link, whole, 1)
                    reports = [worker.exchange(Update()) for worker in workers]
                stranger = ConnectionString("127.0.0.1", workers[1].port(), home.pin)
                with pytest.raises(NotEnrolledError):  # an edge has no business inside
                    connect(str(stranger), key=home.key_file)
            finally:
                assert [worker.drain(5.0) for worker in workers] == [True, True]
        assert not key.exists()
    assert [(report.status["span"], report.peer is None) for report in reports] == [("2:3", False), ("3:5", True)]
    assert [report.status["sessions"] for report in reports] == [{"alice": 1}, {"alice": 1}]
    assert all(report.status["positions"] > 0 for report in reports)


def test_every_stage_shares_its_time_out_among_the_edges_tenants(pipeline: Pipeline) -> None:
    bob = pipeline.homes[0].new_edge("bob", quota=Quota(weight=3))
    with pipeline.link() as first, pipeline.servers[0].link(bob, interactive=True) as second:
        second.open(5)
        check_pass(first, pipeline.whole, 1)
        check_pass(second, pipeline.whole, 2)
        for server in pipeline.servers:
            assert server.server.status()["sessions"] == {"alice": 1, "bob": 1}
            accounts = server.server._calls.engine._scheduler._tenants
            assert {name: account.share for name, account in accounts.items()} == {"alice": Share(1), "bob": Share(3)}
            assert all(account.virtual_time > 0 for account in accounts.values())


def test_a_pipeline_refuses_what_needs_the_whole_span(pipeline: Pipeline) -> None:
    with pipeline.link() as link:
        for message in (
            m.Sites(1, (SiteSpec(2, "self_attn.q_proj"),)),
            m.Put("adapter_config.json", 0, 1, bytes(32), b"x"),
        ):
            with pytest.raises(RefusedError, match="serve without --pipeline"):
                link._keeper.ask(m.Status, message)
        with pytest.raises(RefusedError, match="offers no package of the split 2:4"):
            link.forward_span(hidden(1), None, None, keep=False, plan="2:4")
        check_pass(link, pipeline.whole, 1)


def test_a_stage_inside_takes_no_edge(pipeline: Pipeline) -> None:
    edges = pipeline.servers[1].server._admission._edges()
    tenant: Tenant | None = edges.find(load_edge(pipeline.homes[0].key_file).public_key().public_bytes_raw())
    assert tenant is None


def test_an_edge_that_leaves_leaves_no_session_behind(pipeline: Pipeline) -> None:
    with pipeline.link() as link:
        check_pass(link, pipeline.whole, 1)
        assert [len(server.server.sessions.entries()) for server in pipeline.servers] == [1, 1, 1]
    for server in pipeline.servers:
        server.run(server.server.sessions.all_left())


def test_an_edge_that_is_revoked_at_the_first_stage_leaves_every_stage(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "REVIEW_SECONDS", 0.02)
    for number in range(3):
        pipeline.restart(2 - number)  # so that they look at their enrolments more often
    first, second, last = pipeline.servers
    with pipeline.link() as link:
        check_pass(link, pipeline.whole, 1)
        assert [each.server.status()["sessions"] for each in pipeline.servers] == [{"alice": 1}] * 3
        (first.home.folder / "authorized_edges").write_text("# nobody\n")
        eventually(lambda: all(each.server.status()["sessions"] == {} for each in (first, second, last)))
        with pytest.raises(NotEnrolledError):
            check_pass(link, pipeline.whole, 1)


def test_a_stage_whose_own_key_is_revoked_has_no_session_and_comes_back_with_the_same_bits(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "REVIEW_SECONDS", 0.02)
    for number in range(3):
        pipeline.restart(2 - number)
    second = pipeline.servers[1]
    with pipeline.link() as link:
        check_pass(link, pipeline.whole, 1)
        path = second.home.folder / "authorized_edges"
        enrolled = path.read_text()
        path.write_text("# nobody\n")
        eventually(lambda: second.server.status()["sessions"] == {})
        assert pipeline.servers[0].server.status()["sessions"] == {"alice": 1}
        path.write_text(enrolled)
        check_pass(link, pipeline.whole, 2)


# A stage that moves ---------------------------------------------------------------------------------------------------


class Address:
    """Where the next stage is: at one place after another, each for so many looks, and at the last one for good."""

    def __init__(self, *places: tuple[str, int]) -> None:
        self._places = list(places)
        self.looks = 0

    def __call__(self) -> str:
        self.looks += 1
        left = self.looks
        for place, looks in self._places:
            left -= looks
            if left <= 0:
                return place
        return self._places[-1][0]


@pytest.fixture
def nobody() -> Iterator[str]:
    """An address where nobody listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{bound.getsockname()[1]}"


@pytest.fixture
def long_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for a pause to end waits for longer than any test may take."""
    monkeypatch.setattr(pipeline_module, "pauses", lambda most: itertools.repeat(1e6))
    monkeypatch.setattr(pipeline_module, "LOOK_SECONDS", 0.001)


def ping(pipeline: Pipeline, target: Callable[[], str]) -> m.Message:
    """Ask the second stage, as the first one does."""
    usual = pipeline.servers[0].server._next_stage
    assert usual is not None
    stage = dataclasses.replace(usual, target=target)

    async def asked() -> m.Message:
        async with stage.session(m.Account("alice", 1), interactive=False) as session:
            return await session.ask(m.Ping(7))

    return asyncio.run(asked())


@pytest.mark.usefixtures("long_pauses")
def test_a_stage_that_has_moved_is_gone_on_with_at_once(pipeline: Pipeline, nobody: str) -> None:
    there = f"127.0.0.1:{pipeline.servers[1].port}"
    address = Address((nobody, 3), (there, 1))
    answer = ping(pipeline, address)
    assert isinstance(answer, m.Pong)
    assert address.looks >= 4


@pytest.mark.usefixtures("long_pauses")
def test_a_stage_that_nobody_knows_the_place_of_is_waited_for(pipeline: Pipeline) -> None:
    address = Address(("", 5), (f"127.0.0.1:{pipeline.servers[1].port}", 1))
    assert isinstance(ping(pipeline, address), m.Pong)
    assert address.looks >= 6


@pytest.mark.usefixtures("long_pauses")
def test_a_stage_that_stays_away_is_given_up_with_its_last_place(
    pipeline: Pipeline, nobody: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline_module, "PATIENCE_SECONDS", 0.0)
    with pytest.raises(ConnectionLostError, match=rf"the stage at {nobody} stayed away \(ConnectionLostError\)"):
        ping(pipeline, lambda: nobody)
    assert isinstance(ping(pipeline, lambda: f"127.0.0.1:{pipeline.servers[1].port}"), m.Pong)


@pytest.mark.usefixtures("long_pauses")
def test_a_pass_goes_on_at_the_place_that_a_stage_has_moved_to(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the bits of the whole span, though the stage there has lost the forward."""
    first, second = pipeline.servers[0], pipeline.servers[1]
    usual = first.server._next_stage
    assert usual is not None
    at = [f"127.0.0.1:{second.port}"]
    monkeypatch.setattr(first.server, "_next_stage", dataclasses.replace(usual, target=lambda: at[-1]))
    _, gradient = expected(pipeline.whole, 1)
    with pipeline.link() as link:
        given = hidden(1).requires_grad_()
        _, kept = link.forward_span(given, MASK, POSITIONS, keep=True)
        behind = second.server._next_stage
        second.__exit__()
        elsewhere = ThreadServer(pipeline.parts[1], pipeline.homes[1], next_stage=behind).start()
        pipeline.servers[1] = elsewhere
        at.append(f"127.0.0.1:{elsewhere.port}")
        back = link.backward_span(kept, hidden(2), given, MASK, POSITIONS)
        assert back is not None
        assert torch.equal(back, gradient)


def test_stages_ask_each_other_for_signs_of_life_more_often_than_edges(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []

    def transport(target: str, *, keepalive: float) -> GrpcTransport:
        seen.append(keepalive)
        return GrpcTransport(target, keepalive=keepalive)

    monkeypatch.setattr(pipeline_module, "GrpcTransport", transport)
    ping(pipeline, lambda: f"127.0.0.1:{pipeline.servers[1].port}")
    assert seen == [pipeline_module.KEEPALIVE_SECONDS]
    assert LEAST_KEEPALIVE_SECONDS <= seen[0] < KEEPALIVE_SECONDS
