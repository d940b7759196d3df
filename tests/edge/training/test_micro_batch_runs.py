"""Whole runs with several micro-batches in flight: the bits of one at a time, whatever fails."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.cloud.train_runs import Runs
from support.run_folders import adapter, assert_same_run, losses

from isthmus.common.errors import ConfigError, NonFiniteError, OverQuotaError, UnreachableError
from isthmus.common.shutdown import Interrupted, StopRequest
from isthmus.edge import cloud_link
from isthmus.edge.client.link import Link
from isthmus.edge.client.remote_span import BackwardRequest, SpanCalls
from isthmus.edge.cloud_link import open_link
from isthmus.edge.config.training_config import TrainConfig
from isthmus.edge.split_run import train_over

SITED = {"sites": "all", "target_modules": "q_proj,v_proj,down_proj"}


@pytest.fixture(scope="module")
def alone(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one micro-batch at a time."""
    out = tmp_path_factory.mktemp("alone")
    report = runs.train(out, **SITED)
    assert report.loss_after is not None
    assert report.loss_before is not None
    assert report.loss_after < report.loss_before
    return out


@pytest.mark.parametrize("overlap", [2, 3])
def test_micro_batches_in_flight_change_no_bit(runs: Runs, alone: Path, tmp_path: Path, overlap: int) -> None:
    report = runs.train(tmp_path, overlap=overlap, **SITED)
    assert_same_run(tmp_path, alone)
    assert any("layers.2" in name for name in adapter(tmp_path))
    assert report.calls == 9 * 2  # the nine micro-batches of an epoch, whatever link they went over
    assert report.retries == 0


@pytest.mark.parametrize(
    "values",
    [
        {"method": "full"},
        {"method": "vera", "target_modules": "q_proj"},
        {"optimizer": "mezo", "learning_rate": 1e-3},
        {"optimizer": "lora-fa"},
        {"precision": "bf16", "codec": "int8"},
    ],
)
def test_micro_batches_in_flight_change_no_bit_of_other_ways_to_train(
    runs: Runs, tmp_path: Path, values: dict[str, Any]
) -> None:
    for overlap in (1, 2):
        runs.train(tmp_path / str(overlap), steps=2, overlap=overlap, **values)
    assert losses(tmp_path / "1") == losses(tmp_path / "2")
    state = "checkpoint-2/parameters.safetensors"
    assert (tmp_path / "1" / state).read_bytes() == (tmp_path / "2" / state).read_bytes()


def test_with_dropout_two_runs_with_micro_batches_in_flight_are_equal(runs: Runs, alone: Path, tmp_path: Path) -> None:
    for name in ("one", "other"):
        runs.train(tmp_path / name, overlap=3, dropout=0.2, **SITED)
    assert_same_run(tmp_path / "one", tmp_path / "other")
    assert losses(tmp_path / "one") != losses(alone)


class Observed:
    """`open_link`, with something done when a link asks; the links are numbered as they open."""

    def __init__(self, act: Callable[[Link, int, str, str], None]) -> None:
        self.links: list[Link] = []
        self._act = act

    def __call__(self, config: TrainConfig) -> Link:
        link, number = open_link(config), len(self.links)
        self.links.append(link)
        link.observer = lambda question, phase: self._act(link, number, question, phase)
        return link


def train(runs: Runs, act: Callable[[Link, int, str, str], None], out: Path, **values: Any) -> Observed:
    """A run whose links are observed."""
    opened = Observed(act)
    config = runs.config(out, **values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cloud_link, "open_link", opened)
        with opened(config) as link:
            train_over(link, config)
    return opened


@pytest.mark.parametrize(
    ("question", "phase"), [("forward", "waiting"), ("siteanswer", "sending"), ("backward", "receiving")]
)
def test_a_link_whose_connection_breaks_is_healed(
    runs: Runs, alone: Path, tmp_path: Path, question: str, phase: str
) -> None:
    broken: list[int] = []

    def cut(link: Link, number: int, asked: str, where: str) -> None:
        if link.step == 2 and (asked, where) == (question, phase) and number not in broken:
            broken.append(number)
            stream = link._keeper._stream
            assert stream is not None
            stream._stream._call.cancel()  # type: ignore[attr-defined]  # this is on the event loop

    opened = train(runs, cut, tmp_path, overlap=2, **SITED)
    assert sorted(broken) == [0, 1]
    assert all(link.totals().retries > 0 for link in opened.links)
    assert_same_run(tmp_path, alone)


def test_a_cloud_that_stays_away_from_one_link_ends_the_run_and_it_resumes(
    runs: Runs, alone: Path, tmp_path: Path
) -> None:
    def away(link: Link, number: int, asked: str, where: str) -> None:
        if link.step == 2 and number == 1:
            raise UnreachableError("away.")

    with pytest.raises(UnreachableError, match=r"away.*checkpoint-1: repeat"):
        train(runs, away, tmp_path, overlap=2, **SITED)
    runs.train(tmp_path, overlap=2, resume=True, **SITED)
    assert_same_run(tmp_path, alone)


def test_ctrl_c_ends_every_one(runs: Runs, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = threading.Event()

    def check(_: StopRequest) -> None:
        if asked.is_set():
            raise Interrupted

    monkeypatch.setattr(StopRequest, "check", check)

    def ask(link: Link, number: int, question: str, phase: str) -> None:
        if link.step == 2 and (question, phase) == ("backward", "waiting"):
            asked.set()

    with pytest.raises(KeyboardInterrupt, match=r"Stopped after step 1 of 3.*--resume"):
        train(runs, ask, tmp_path, overlap=3, **SITED)
    asked.clear()
    runs.train(tmp_path, overlap=3, resume=True, **SITED)
    assert_same_run(tmp_path, alone)


def test_a_number_that_is_not_finite_in_one_micro_batch_names_the_step(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = SpanCalls.backward

    def spoilt(self: SpanCalls, request: BackwardRequest) -> Any:
        if self.step == 2:
            request = dataclasses.replace(request, gradient=request.gradient * float("nan"))
        return real(self, request)

    monkeypatch.setattr(SpanCalls, "backward", spoilt)
    with pytest.raises(NonFiniteError, match="checkpoint-1"):
        runs.train(tmp_path, overlap=2)


def test_more_in_flight_than_sessions_are_refused_with_the_remedy(runs: Runs, tmp_path: Path) -> None:
    with pytest.raises(OverQuotaError, match=r"overlap = 5 takes as many sessions.*4 are allowed.*lower --overlap"):
        runs.train(tmp_path, overlap=5, accumulate=5)


def test_more_in_flight_than_micro_batches_are_refused(runs: Runs, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="overlap = 5 is more than the 4"):
        runs.config(tmp_path, overlap=5)
