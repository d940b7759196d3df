"""Links to a cloud: how many at a time, what they carry, and a cloud that goes away and comes back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.cloud.clouds import ThreadServer

from isthmus.common.errors import (
    ChatTemplateError,
    CheckpointError,
    ConfigError,
    ConnectionLostError,
    DataError,
    LocalProtocolError,
    OverQuotaError,
    UnknownModelError,
    UnreachableError,
    UnsupportedCallError,
)
from isthmus.daemon.daemon_settings import DaemonSettings
from isthmus.daemon.serving import served_cloud
from isthmus.daemon.serving.served_cloud import EdgeParts, Seen, ServedCloud
from isthmus.daemon.serving.serving_worker import Serving
from isthmus.daemon.workers.answering import Question
from isthmus.edge.client.link import Link
from isthmus.edge.client.session_keeper import Wait
from isthmus.edge.cloud_link import open_link
from isthmus.edge.config.client_config import ClientConfig
from isthmus.edge.run_report import WireTotals
from isthmus.protocol.enrolment import Quota


def nothing() -> None:
    """There is nothing to check."""


@pytest.fixture
def clouds() -> Iterator[Callable[..., ServedCloud]]:
    """Makes clouds, which are closed after the test."""
    made: list[ServedCloud] = []

    def make(server: ThreadServer, most: int = 2, key: Path | None = None) -> ServedCloud:
        made.append(ServedCloud("main", config_of(server, key), most))
        return made[-1]

    yield make
    for each in made:
        each.close()


def config_of(server: ThreadServer, key: Path | None = None) -> ClientConfig:
    return ClientConfig(cloud=server.address, key=key or server.home.key_file, connect_timeout=0.5, give_up_after=0.5)


def together(cloud: ServedCloud, number: int) -> int:
    """How many links there are while so many are wanted at a time, each for a moment."""
    most = 0
    barrier = threading.Barrier(number)

    def work() -> None:
        nonlocal most
        barrier.wait()
        with cloud.link(nothing) as link:
            assert link.cloud_peak_bytes() is not None
            most = max(most, len(cloud._used))

    threads = [threading.Thread(target=work) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    return most


def test_links_are_few_and_stay_open(server: ThreadServer, clouds: Callable[..., ServedCloud]) -> None:
    cloud = clouds(server)
    assert together(cloud, 6) <= 2
    with cloud.link(nothing) as first, cloud.link(nothing) as second:
        assert first is not second
        assert len(cloud._used) == 2
    with cloud.link(nothing) as again:
        assert again in (first, second)
    with pytest.raises(UnknownModelError, match="serves tiny now, and not other"), cloud.link(nothing) as link:
        cloud.parts_of(link, "other")
    assert link in cloud._idle
    for error in (ConnectionLostError, LocalProtocolError, InterruptedError):
        with pytest.raises(error), cloud.link(nothing) as link:
            raise error
        assert link not in cloud._used  # one that something went wrong over is not used again


@pytest.mark.parametrize("error", [ConfigError, DataError, UnknownModelError, UnsupportedCallError, ChatTemplateError])
def test_a_request_that_is_wrong_keeps_its_link(
    server: ThreadServer, clouds: Callable[..., ServedCloud], error: type[Exception]
) -> None:
    cloud = clouds(server)
    with pytest.raises(error), cloud.link(nothing) as link:
        raise error("the request's")
    with cloud.link(nothing) as again:
        assert again is link
        assert link.cloud_peak_bytes() is not None


def test_a_cloud_whose_model_cannot_be_used_hides_no_other(
    server: ThreadServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    clouds = {"bad": config_of(server), "good": config_of(server)}
    serving = Serving(DaemonSettings(clouds=clouds, answers_at_once=1))
    load = ServedCloud.load

    def loaded(cloud: ServedCloud, link: Link) -> EdgeParts:
        if cloud.name == "bad":
            raise CheckpointError("its tokenizer is damaged")
        return load(cloud, link)

    def seen() -> tuple[list[str], dict[str, Any]]:
        ((found, _),) = serving.look(Question("look", {}))
        ((state, _),) = serving.state(Question("state", {}))
        return [cloud["name"] for cloud in found["clouds"]], {each["name"]: each for each in state["clouds"]}

    try:
        monkeypatch.setattr(ServedCloud, "load", loaded)
        found, state = seen()
        assert found == ["good"]
        assert (state["bad"]["reachable"], state["bad"]["error"]) == (False, "its tokenizer is damaged")
        assert (state["good"]["reachable"], state["good"]["error"]) == (True, None)
        monkeypatch.undo()
        found, state = seen()
        assert found == ["bad", "good"]
        assert state["bad"]["reachable"]
    finally:
        serving.close()


def test_a_small_quota_is_enough(server: ThreadServer, clouds: Callable[..., ServedCloud]) -> None:
    key = server.home.new_edge("one-session", quota=Quota(max_sessions=1))
    cloud = clouds(server, key=key)
    assert together(cloud, 4) == 1
    with cloud.link(nothing):
        cloud.look()  # the cloud is there, and gives no second session
        assert cloud.seen.reachable
    assert len(cloud._used) == 1


@pytest.mark.parametrize("opener", ["look", "link"])
def test_the_only_session_is_waited_for_while_it_is_opened(
    server: ThreadServer, clouds: Callable[..., ServedCloud], monkeypatch: pytest.MonkeyPatch, opener: str
) -> None:
    key = server.home.new_edge(f"opened-by-{opener}", quota=Quota(max_sessions=1))
    cloud, other = clouds(server, key=key), clouds(server, key=key)
    opened, asked = threading.Event(), threading.Event()

    def slowly(*args: Any, **options: Any) -> Link:
        if threading.current_thread() is not first:
            asked.set()
            return open_link(*args, **options)
        link = open_link(*args, **options)  # it has the session, and nobody knows it yet
        opened.set()
        assert asked.wait(60)
        asked.clear()
        assert asked.wait(60)  # the second thread was refused once, and asks again
        return link

    def use() -> None:
        with cloud.link(nothing):
            pass

    monkeypatch.setattr(served_cloud, "open_link", slowly)
    first = threading.Thread(target=use if opener == "link" else cloud.look)
    first.start()
    assert opened.wait(60)
    use()
    first.join(60)
    assert len(cloud._used) == 1
    with pytest.raises(OverQuotaError), other.link(nothing):  # where another program has it, nobody waits
        pass


def test_what_crosses_is_counted_once(server: ThreadServer, clouds: Callable[..., ServedCloud]) -> None:
    cloud = clouds(server)
    assert cloud.look()
    first = cloud.take_counts()
    assert first.bytes_up > 0
    assert cloud.take_counts() == WireTotals()
    with cloud.link(nothing) as link:
        link.cloud_peak_bytes()
        second = cloud.take_counts()
        link.cloud_peak_bytes()
    third = cloud.take_counts()
    assert second.calls == third.calls == 1
    assert (cloud.totals - (first + second + third)).bytes_up == 0
    assert cloud.take_counts() == WireTotals()


def test_a_cloud_goes_away_and_comes_back(server: ThreadServer, clouds: Callable[..., ServedCloud]) -> None:
    with ThreadServer(server.served, server.home) as there:
        cloud = clouds(there)
        assert cloud.look()
    assert not cloud.look()
    assert cloud.seen.reachable is False
    assert "cloud" in str(cloud.seen.error)
    assert cloud.parts is not None  # which is still known
    since = cloud.seen.since
    with pytest.raises(UnreachableError), cloud.link(nothing):
        pass
    assert (cloud.now.reachable, cloud.now.since, cloud.now.until) == (False, since, None)
    with ThreadServer(server.served, server.home, listen=f"127.0.0.1:{there.port}"):
        with cloud.link(nothing) as link:
            assert link.info.model == "tiny"
            assert cloud.now == Seen(True)
            link._keeper.wait = Wait(1000.0, 1030.0, "the stream broke")
            assert cloud.now == Seen(False, "the stream broke", 1000.0, 1030.0)
            link._keeper.wait = None
        assert cloud.seen.reachable
        assert cloud.look()


def test_a_wait_for_a_link_can_be_given_up(server: ThreadServer, clouds: Callable[..., ServedCloud]) -> None:
    cloud = clouds(server, 1)

    def given_up() -> None:
        raise InterruptedError

    with cloud.link(nothing), pytest.raises(InterruptedError), cloud.link(given_up):
        pass
    assert len(cloud._idle) == 1
