"""Decode steps that sessions share, a pool that is too small for all, and one number of threads: over real sockets."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cloud.clouds import Home, ThreadServer
from support.generated_text import NEW, Each, assert_equal, prompt, text
from torch import Tensor

from isthmus.backbone.decoding.decode_pass import DecodePass
from isthmus.backbone.decoding.key_values import cache_bytes
from isthmus.cloud.bounds import Bounds, EngineOptions
from isthmus.cloud.decoding.decode_calls import EXACT, FAST
from isthmus.cloud.engine.engine import Engine
from isthmus.cloud.engine.requests import Request
from isthmus.cloud.session.served_model import Served
from isthmus.edge.client import cloud_cache
from isthmus.edge.generation.exact import exact_decoding

pytestmark = pytest.mark.usefixtures("cache_folder", "one_thread")
PROMPTS = (prompt(10, 1), prompt(23, 2))


@pytest.fixture
def pairs(monkeypatch: pytest.MonkeyPatch) -> list[Request[Any]]:
    """Lets decode steps of two sessions wait for each other, so that each pass is of two."""
    waiting: list[Request[Any]] = []
    submit = Engine.submit

    def paired(self: Engine, request: Request[Any]) -> Any:
        if request.kind not in (FAST, EXACT):
            return submit(self, request)
        waiting.append(request)
        if len(waiting) == 2:
            with self._changed:  # no thread takes the first one alone
                for each in waiting:
                    submit(self, each)
                waiting.clear()
        return request.future

    monkeypatch.setattr(Engine, "submit", paired)
    return waiting


def both(cloud: Served, home: Home, work: Callable[[Any, Any, Tensor], Any], **options: Any) -> tuple[list[Any], Any]:
    """What two tenants get that work at the same time, and the server's status."""
    keys = [home.key_file, home.folder.parent / "bob"]
    if not keys[1].exists():
        keys[1] = home.new_edge("bob")
    results: dict[int, Any] = {}
    together = threading.Barrier(2)  # neither session ends before the other one has been there
    with ThreadServer(cloud, home, **options) as server:

        def run(number: int) -> None:
            torch.set_num_threads(1)
            with server.link(keys[number]) as link:
                link.open(5)
                model = link.load_model()
                together.wait(60)
                results[number] = work(link, model, PROMPTS[number])
                together.wait(60)

        threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        return [results[number] for number in range(2)], server.server.status()


def exactly(link: Any, model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    with exact_decoding(link, model):
        return text(model, ids)


def alone(cloud: Served, home: Home, work: Callable[[Any, Any, Tensor], Any]) -> list[Any]:
    with ThreadServer(cloud, home) as server, server.link() as link:
        link.open(5)
        return [work(link, link.load_model(), ids) for ids in PROMPTS]


def test_exact_steps_that_are_shared_have_the_bits_of_those_alone(
    tiny_cloud: Served, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    home = Home(tmp_path)
    expected = alone(tiny_cloud, home, exactly)
    request.getfixturevalue("pairs")
    found, status = both(tiny_cloud, home, exactly)
    assert status["calls_per_pass"] == 2
    for one, other in zip(found, expected, strict=True):
        assert_equal(one, other)


def test_fast_steps_that_are_shared_have_the_tokens_of_those_alone(
    tiny_cloud: Served, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    home = Home(tmp_path)
    expected = alone(tiny_cloud, home, lambda _link, model, ids: text(model, ids))
    request.getfixturevalue("pairs")
    found, status = both(tiny_cloud, home, lambda _link, model, ids: text(model, ids))
    assert status["calls_per_pass"] == 2
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.allclose(one[1], other[1], atol=1e-4)


def test_outputs_that_go_to_the_wrong_session_are_noticed(
    tiny_cloud: Served, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Home(tmp_path)
    expected = alone(tiny_cloud, home, exactly)
    request.getfixturevalue("pairs")
    run = DecodePass.__call__

    def swapped(self: DecodePass, calls: Any) -> Any:
        outputs = run(self, calls)
        shapes = {each.shape for each in outputs}
        return outputs[::-1] if len(shapes) == 1 else outputs

    monkeypatch.setattr(DecodePass, "__call__", swapped)
    found, _ = both(tiny_cloud, home, exactly)
    assert not torch.equal(found[0][0], expected[0][0])


def test_calls_that_find_no_room_hold_nothing_and_come_to_an_end(tiny_cloud: Served, tmp_path: Path) -> None:
    span, home = tiny_cloud.executor.host.span, Home(tmp_path)
    small = dataclasses.replace(tiny_cloud, cache_bytes=cache_bytes(span, 1, 23 + NEW))  # of one text at a time
    bounds = Bounds(engine=EngineOptions(prefill_tokens=2))
    expected = alone(tiny_cloud, home, lambda _link, model, ids: text(model, ids)[0])
    found, status = both(small, home, lambda _link, model, ids: text(model, ids)[0], bounds=bounds)
    assert all(torch.equal(*each) for each in zip(found, expected, strict=True))
    assert status["caches_evicted"] > 0
    assert status["cache_bytes"] <= small.cache_bytes


def test_a_prompt_of_several_blocks_is_exact_in_a_replay(
    tiny_cloud: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cloud_cache.m, "MAX_BLOCK", 8)
    with ThreadServer(tiny_cloud, Home(tmp_path)) as server, server.link() as link:
        link.open(5)
        model = link.load_model()
        undisturbed = exactly(link, model, PROMPTS[1])
        with exact_decoding(link, model):
            assert_equal(text(model, PROMPTS[1], streamer=Each(link.drop)), undisturbed)
            assert_equal(text(model, PROMPTS[1], prompt_lookup_num_tokens=3), undisturbed)


def test_with_two_threads_exact_is_exact_and_fast_has_one_process_s_bits(tiny_cloud: Served, tmp_path: Path) -> None:
    with ThreadServer(tiny_cloud, Home(tmp_path), threads=2) as server, server.link() as link:
        link.open(5)
        model = link.load_model()
        for ids in PROMPTS:
            undisturbed = exactly(link, model, ids)
            with exact_decoding(link, model):
                assert_equal(text(model, ids, streamer=Each(link.drop)), undisturbed)
