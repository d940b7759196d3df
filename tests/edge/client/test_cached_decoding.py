"""Generation over real sockets: the text of one process, whatever is evicted, cut or repeated."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support.cloud.clouds import Home, ThreadServer, served
from support.generated_text import NEW, Each, assert_equal, prompt, text, whole
from support.models.tiny import HIDDEN, tiny_checkpoint

from isthmus.backbone.decoding.key_values import cache_bytes
from isthmus.cloud.bounds import Bounds, EngineOptions
from isthmus.cloud.decoding.cache_pool import CachePool
from isthmus.cloud.session.served_model import Served
from isthmus.common.errors import ConnectionLostError, DiskError, OverQuotaError, RefusedError, UnsupportedCallError
from isthmus.edge.client import cloud_cache
from isthmus.edge.client.cloud_cache import CloudCache, CloudCaches
from isthmus.edge.client.hidden_history import HiddenHistory
from isthmus.edge.client.link import Link
from isthmus.edge.generation.exact import exact_decoding

pytestmark = pytest.mark.usefixtures("cache_folder", "one_thread")


@contextlib.contextmanager
def open_link(cloud: Served, tmp_path: Path, **options: Any) -> Iterator[tuple[Link, ThreadServer]]:
    with ThreadServer(cloud, Home(tmp_path), **options) as server, server.link() as link:
        link.open(5)
        yield link, server


def test_alone_and_fast_it_has_the_bits_of_one_process(tiny_cloud: Served, tiny_model: Path, tmp_path: Path) -> None:
    with open_link(tiny_cloud, tmp_path) as (link, server):
        edge = link.load_model()
        calls = link.traffic.calls
        assert_equal(text(edge), text(whole(tiny_model)))
        assert link.traffic.calls - calls == NEW
        assert server.server.status()["cache_bytes"] > 0
        assert_equal(text(edge, num_beams=3), text(whole(tiny_model), num_beams=3))
        assert_equal(text(edge, prompt_lookup_num_tokens=3), text(whole(tiny_model), prompt_lookup_num_tokens=3))


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("beams", [1, 3])
def test_the_text_is_the_same_though_every_step_loses_its_cache(
    tiny_cloud: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exact: bool, beams: int
) -> None:
    with open_link(tiny_cloud, tmp_path) as (link, server), contextlib.ExitStack() as stack:
        edge = link.load_model()
        if exact:
            stack.enter_context(exact_decoding(link, edge))
        undisturbed = text(edge, num_beams=beams)
        pool: CachePool = server.server._calls.caches

        def lose() -> None:
            for key in list(pool._entries):
                pool.drop(key)

        finish = CachePool.finish
        monkeypatch.setattr(CachePool, "finish", lambda self, *args, **more: (finish(self, *args, **more), lose())[0])
        disturbed = text(edge, num_beams=beams)
        assert pool.counters.lost >= NEW - 1
        assert link.span.caches.replayed > NEW * 10
    assert torch.equal(disturbed[0], undisturbed[0])
    assert torch.allclose(disturbed[1], undisturbed[1], atol=1e-4)
    assert torch.equal(disturbed[1], undisturbed[1]) or not exact


@pytest.mark.parametrize("exact", [False, True])
def test_the_text_is_the_same_though_every_token_cuts_the_connection(
    tiny_cloud: Served, tmp_path: Path, exact: bool
) -> None:
    with open_link(tiny_cloud, tmp_path) as (link, _), contextlib.ExitStack() as stack:
        edge = link.load_model()
        if exact:
            stack.enter_context(exact_decoding(link, edge))
        undisturbed = text(edge)
        sessions = link.traffic.sessions
        disturbed = text(edge, streamer=Each(link._keeper.drop))
        assert link.traffic.sessions >= sessions + NEW
    assert torch.equal(disturbed[0], undisturbed[0])
    assert torch.equal(disturbed[1], undisturbed[1]) or not exact


def test_an_answer_that_is_lost_on_its_way_is_asked_for_again(tiny_cloud: Served, tmp_path: Path) -> None:
    with open_link(tiny_cloud, tmp_path) as (link, _):
        edge = link.load_model()
        undisturbed = text(edge, num_beams=3)
        ask = link._keeper._ask
        asked = iter(range(10**6))

        def lossy(stream: Any, message: Any, *rest: Any) -> Any:
            answer = ask(stream, message, *rest)
            if type(message).__name__ == "Decode" and next(asked) % 3 == 1:
                raise ConnectionLostError("the answer is lost")
            return answer

        link._keeper._ask = lossy  # type: ignore[method-assign]
        disturbed = text(edge, num_beams=3)
    assert torch.equal(disturbed[0], undisturbed[0])


def test_exact_has_the_same_bits_with_drafts_and_in_any_steps(tiny_cloud: Served, tmp_path: Path) -> None:
    repeating = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    results = []
    for steps in (512, 4):
        bounds = Bounds(engine=EngineOptions(prefill_tokens=steps))
        with open_link(tiny_cloud, tmp_path / str(steps), bounds=bounds) as (link, _):
            edge = link.load_model()
            with exact_decoding(link, edge):
                results += [text(edge, repeating), text(edge, repeating, prompt_lookup_num_tokens=4)]
    for each in results[1:]:
        assert_equal(each, results[0])


def test_a_prompt_in_steps_and_in_several_calls(tiny_model: Path, tmp_path: Path) -> None:
    cloud = served(tiny_model, tmp_path / "parts", max_tokens=16)
    bounds = Bounds(engine=EngineOptions(prefill_tokens=7))
    ids = prompt(50)
    with open_link(cloud, tmp_path, bounds=bounds) as (link, _):
        edge = link.load_model()
        found = text(edge, ids)
        assert link.traffic.calls > NEW + 3
    expected = text(whole(tiny_model), ids)
    assert torch.equal(found[0], expected[0])
    assert torch.allclose(found[1], expected[1], atol=1e-4)


def test_leased_adapters_inside_the_cloud_s_layers(tiny_cloud: Served, tiny_model: Path, tmp_path: Path) -> None:
    def adapted(base: Any) -> Any:
        torch.manual_seed(4)
        config = peft.LoraConfig(
            r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False
        )
        return peft.get_peft_model(base, config).eval()

    expected = text(adapted(whole(tiny_model)))
    with open_link(tiny_cloud, tmp_path) as (link, _):
        edge = adapted(link.load_model(leased=lambda name: True))
        fast = text(edge)
        with exact_decoding(link, edge):
            exact = text(edge)
            assert_equal(text(edge, prompt_lookup_num_tokens=3), exact)
        with pytest.raises(UnsupportedCallError, match="lease it to the cloud"):
            text(adapted(link.load_model()))
    assert_equal(fast, expected)
    assert torch.equal(exact[0], expected[0])
    assert not torch.equal(expected[0], text(whole(tiny_model))[0])


def test_in_a_pipeline(tiny_model: Path, tmp_path: Path) -> None:
    from ...cloud.gateway.test_pipeline import Pipeline

    folder = tiny_checkpoint("llama", tmp_path / "model", num_hidden_layers=7)
    pipeline = Pipeline(folder, tmp_path)
    pipeline.start()
    try:
        with pipeline.link() as link:
            edge = link.load_model()
            expected = text(whole(folder), num_beams=3)
            assert_equal(text(edge, num_beams=3), expected)
            stages = iter(range(10**6))

            def forget() -> None:
                pool = pipeline.servers[1 + next(stages) % 2].server._calls.caches
                for key in list(pool._entries):
                    pool.drop(key)

            ids = text(edge, streamer=Each(forget))[0]
            assert torch.equal(ids, text(whole(folder))[0])
            assert link.span.caches.replayed > 0
            with exact_decoding(link, edge):
                assert_equal(text(edge, streamer=Each(forget)), text(edge))
            assert pipeline.servers[0].server.status()["caches_lost"] == 0
            tokens = iter(range(10**6))

            def restart() -> None:
                if (stage := {4: 1, 8: 2}.get(next(tokens))) is not None:
                    with torch.enable_grad():  # a server that begins measures its span
                        pipeline.restart(stage)

            replayed = link.span.caches.replayed
            with exact_decoding(link, edge):
                assert_equal(text(edge, streamer=Each(restart)), text(edge))
            assert link.span.caches.replayed > replayed  # which the first stage asks for: the edge keeps its session
    finally:
        for server in pipeline.servers:
            server.__exit__()


def test_many_texts_at_a_time_share_a_small_pool(tiny_cloud: Served, tmp_path: Path) -> None:
    small = dataclasses.replace(tiny_cloud, cache_bytes=3 * cache_bytes(tiny_cloud.executor.host.span, 1, 10 + NEW))
    with open_link(small, tmp_path) as (link, server):
        edge = link.load_model()
        expected = [text(edge, prompt(seed=seed))[0] for seed in range(6)]
        with torch.no_grad():
            running = [(edge(prompt(seed=seed), use_cache=True), prompt(seed=seed)) for seed in range(6)]
            texts = [ids for _, ids in running]
            for _ in range(NEW):
                for number, (output, _) in enumerate(running):
                    token = output.logits[:, -1:].argmax(-1)
                    texts[number] = torch.cat([texts[number], token], dim=1)
                    running[number] = edge(token, use_cache=True, cache=output.cache), token
                    status = server.server.status()
                    assert status["cache_bytes"] <= status["cache_budget_bytes"]
        assert server.server.status()["caches_evicted"] > NEW
    assert all(torch.equal(*pair) for pair in zip(texts, expected, strict=True))


def test_a_text_that_never_fits_is_refused_and_says_so(tiny_cloud: Served, tmp_path: Path) -> None:
    small = dataclasses.replace(tiny_cloud, cache_bytes=100)
    with open_link(small, tmp_path) as (link, _), pytest.raises(RefusedError, match="--cache-bytes"):
        text(link.load_model())


def test_a_cloud_that_never_keeps_anything_is_given_up(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cloud = served(tiny_model, tmp_path / "parts", max_tokens=8)
    finish = CachePool.finish
    monkeypatch.setattr(CachePool, "finish", lambda self, key, **more: (finish(self, key, **more), self.drop(key))[0])
    with open_link(cloud, tmp_path) as (link, server):
        with pytest.raises(OverQuotaError, match="lost the cache 8 times"):
            text(link.load_model(), prompt(30))
        assert server.server.status()["caches_lost"] == 8
        assert (
            link.span.caches.replayed == 7 * 8
        )  # seven replays of the first eight tokens; it is given up at the eighth


def test_exact_is_refused_where_bits_depend_on_the_batch(tiny_cloud: Served, tmp_path: Path) -> None:
    with open_link(tiny_cloud, tmp_path, batching=False) as (link, _):
        edge = link.load_model()
        with (
            exact_decoding(link, edge),
            pytest.raises(RefusedError, match="exact decoding is not possible on this cloud"),
        ):
            text(edge)


def test_numbers_of_caches_are_free_again(tiny_cloud: Served, tmp_path: Path) -> None:
    with open_link(tiny_cloud, tmp_path) as (link, server):
        edge = link.load_model()
        for _ in range(3):
            text(edge)
        assert server.server.status()["caches"] == 1
        held = [link.span.new_cache() for _ in range(64)]
        with pytest.raises(UnsupportedCallError, match="64 caches"):
            link.span.new_cache()
        del held
        link.span.new_cache()


def test_hidden_states_that_are_many_go_to_the_disk(
    tiny_cloud: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_link(tiny_cloud, tmp_path) as (link, _):
        edge = link.load_model()
        expected = text(edge, num_beams=2), text(edge)
        made: list[CloudCache] = []
        new = CloudCaches.new
        monkeypatch.setattr(CloudCaches, "new", lambda self: made.append(new(self)) or made[-1])
        monkeypatch.setattr(cloud_cache, "HiddenHistory", lambda: HiddenHistory(memory_bytes=1))
        assert_equal(text(edge, num_beams=2), expected[0])
        again = text(edge, streamer=Each(link._keeper.drop))  # replayed from the file
    assert torch.equal(again[0], expected[1][0])
    for cache, rows in zip(made, (2, 1), strict=True):
        history = cache._history
        assert not any(chunk.nbytes for chunk in history._chunks)
        assert history._file is not None
        # Beams reorder it at every token, and it is written anew each time.
        assert history._file.seek(0, 2) == rows * history.length * HIDDEN * 4


@pytest.mark.parametrize("exact", [False, True])
def test_a_full_disk_leaves_the_cache_as_it_was(
    tiny_cloud: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exact: bool
) -> None:
    def full(**_options: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    states = torch.randn(2, 12, HIDDEN, generator=torch.Generator().manual_seed(0))
    with open_link(tiny_cloud, tmp_path) as (link, _):
        link.span.caches.exact = exact
        undisturbed, cache = link.span.new_cache(), link.span.new_cache()
        for each in (undisturbed, cache):
            each.extend(states[:, :10], None, None)
        assert isinstance(cache, CloudCache)
        with monkeypatch.context() as disk:
            disk.setattr(tempfile, "TemporaryFile", full)
            cache._history.memory_bytes = 0
            with pytest.raises(DiskError, match="No space left"):
                cache.extend(states[:, 10:11], None, None)
            with pytest.raises(DiskError, match="No space left"):
                cache.select(torch.tensor([1, 0]))
            assert (cache.length, cache.rows) == (10, 2)
        expected = undisturbed.extend(states[:, 10:], None, None)
        assert torch.equal(cache.extend(states[:, 10:], None, None), expected)


def test_a_session_that_ends_leaves_no_bytes(tiny_cloud: Served, tmp_path: Path) -> None:
    from support.cloud.sessions import eventually

    with ThreadServer(tiny_cloud, Home(tmp_path)) as server:
        with server.link() as link:
            link.open(5)
            text(link.load_model())
            assert server.server.status()["caches"] == 1
        eventually(lambda: server.server.status()["caches"] == 0)
