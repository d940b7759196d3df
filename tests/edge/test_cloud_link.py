"""What a run's configuration makes of the way to the cloud: how many links, which codecs, and when they close."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from isthmus.common.errors import ConfigError, OverQuotaError, UnreachableError
from isthmus.edge import cloud_link
from isthmus.edge.cloud_link import Wire, cache_of, open_link, wire_of
from isthmus.edge.config.training_config import TrainConfig
from isthmus.edge.training.micro_batches import InFlight, SummedMeter


def config(**values: Any) -> TrainConfig:
    defaults = {"cloud": "isthmus://h:1#SHA256:x", "data": "unused", "accumulate": 4}
    return TrainConfig.model_validate({**defaults, **values})


class FakeLink:
    """A link that knows whether it is open."""

    def __init__(self) -> None:
        self.is_open = True
        self.span: Any = None
        self.checks: list[Callable[[], None]] = []

    def __enter__(self) -> FakeLink:
        return self

    def __exit__(self, *_: object) -> None:
        self.is_open = False

    def watch(self, check: Callable[[], None]) -> None:
        self.checks.append(check)


class Opener:
    """`connect`, which fails at the n-th link."""

    def __init__(self, fail_at: int = 0, error: Exception | None = None) -> None:
        self.links: list[FakeLink] = []
        self.options: list[dict[str, Any]] = []
        self._fail_at, self._error = fail_at, error or UnreachableError("away.")

    def __call__(self, address: str, **options: Any) -> FakeLink:
        self.options.append({"address": address, **options})
        if len(self.options) == self._fail_at:
            raise self._error
        self.links.append(FakeLink())
        return self.links[-1]


def opened(monkeypatch: pytest.MonkeyPatch, **failure: Any) -> Opener:
    opener = Opener(**failure)
    monkeypatch.setattr(cloud_link, "connect", opener)
    monkeypatch.setattr(cloud_link, "no_core_files", lambda: None)
    return opener


@pytest.mark.parametrize(("written", "asked"), [("int8,int4", "int8,int4"), ("auto", "fp32"), ("auto:0.9", "fp32")])
def test_codecs_that_are_yet_to_be_chosen_are_fp32(monkeypatch: pytest.MonkeyPatch, written: str, asked: str) -> None:
    opener = opened(monkeypatch)
    open_link(config(codec=written, call_timeout=7.0, give_up_after=8.0))
    assert (opener.options[0]["codec"], opener.options[0]["call_timeout"]) == (asked, 7.0)
    assert opener.options[0]["give_up_after"] == 8.0
    assert not opener.options[0]["interactive"]
    open_link(config(), interactive=True, deadline=2.5)
    assert opener.options[1]["interactive"]
    assert opener.options[1]["deadline"] == 2.5


@pytest.mark.parametrize("text", ["auto:2", "auto:no", "auto:"])
def test_a_target_that_is_none_is_refused_before_anything_connects(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    opener = opened(monkeypatch)
    with pytest.raises(ConfigError, match=f"'{text}' names no target"):
        open_link(config(codec=text))
    assert not opener.options


def test_one_link_is_its_own_meter(monkeypatch: pytest.MonkeyPatch) -> None:
    opener = opened(monkeypatch)
    first: Any = FakeLink()
    with wire_of(first, config()) as wire:
        assert wire.in_flight is None
        assert wire.meter is first
        assert wire.links == (first,)
    assert not opener.options
    assert first.is_open  # it is not the wire's to close


def test_a_link_for_each_micro_batch_in_flight_until_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    opener = opened(monkeypatch)
    first: Any = FakeLink()
    with wire_of(first, config(overlap=3)) as wire:
        assert isinstance(wire.in_flight, InFlight)
        assert isinstance(wire.meter, SummedMeter)
        assert len(opener.links) == 2
        assert all(link.is_open for link in opener.links)

        def check() -> None:
            """Nothing."""

        wire.watch(check)
        assert all(link.checks == [check] for link in (first, *opener.links))
    assert not any(link.is_open for link in opener.links)
    assert first.is_open


@pytest.mark.parametrize(
    ("error", "message"),
    [(UnreachableError("away."), r"^away\.$"), (OverQuotaError("2 are allowed"), r"overlap = 3.*2 are allowed.*lower")],
)
def test_links_that_are_open_close_when_one_cannot_be_opened(
    monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    opener = opened(monkeypatch, fail_at=2, error=error)
    first: Any = FakeLink()
    with pytest.raises(type(error), match=message), wire_of(first, config(overlap=3)):
        pass
    assert [link.is_open for link in opener.links] == [False]
    assert first.is_open


def test_fixed_codecs_and_no_cache_ask_for_nothing(tmp_path: Path) -> None:
    link: Any = FakeLink()
    assert Wire([link]).auto_codec(config(), None, [], None, print) is None  # type: ignore[arg-type]
    with cache_of(link, config(out=tmp_path), None) as cached:
        assert cached is None
    assert not list(tmp_path.iterdir())
