"""Generation over real sockets: the text of one process, whatever is evicted, cut or repeated."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support.cloud.clouds import Home, ThreadServer, served
from support.models.tiny import VOCAB, tiny_checkpoint
from torch import Tensor
from transformers import AutoModelForCausalLM

from isthmus.backbone.decoding.key_values import cache_bytes
from isthmus.cloud.bounds import Bounds, EngineOptions
from isthmus.cloud.decoding.cache_pool import CachePool
from isthmus.cloud.session.served_model import Served
from isthmus.common.errors import ConnectionLostError, OverQuotaError, RefusedError, UnsupportedCallError
from isthmus.common.torch_threads import torch_threads
from isthmus.edge.client import cloud_cache
from isthmus.edge.client.hidden_history import HiddenHistory
from isthmus.edge.client.link import Link
from isthmus.edge.generation.exact import exact_decoding

NEW = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("decoding") / "model")


@pytest.fixture(scope="module")
def cloud(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Served:
    return served(model, tmp_path_factory.mktemp("parts") / "parts")


@pytest.fixture(autouse=True)
def _cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with torch_threads(1):  # as the server's
        yield


@contextlib.contextmanager
def open_link(cloud: Served, tmp_path: Path, **options: Any) -> Iterator[tuple[Link, ThreadServer]]:
    with ThreadServer(cloud, Home(tmp_path), **options) as server, server.link() as link:
        link.open(5)
        yield link, server


def whole(model: Path) -> Any:
    found = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa")
    for parameter in found.parameters():
        parameter.data = parameter.data.clone()
    return found


def prompt(length: int = 10, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (1, length), generator=torch.Generator().manual_seed(seed))


class Each:
    """A streamer that does something at every token."""

    def __init__(self, act: Callable[[], object]) -> None:
        self._act = act

    def put(self, _tokens: Tensor) -> None:
        self._act()

    def end(self) -> None:
        pass


def text(model: Any, ids: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    """Tokens, and the logits that they were chosen by."""
    ids = prompt() if ids is None else ids
    given = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    torch.manual_seed(5)
    found = model.generate(ids, **{**given, **options}, output_logits=True, return_dict_in_generate=True)
    return found.sequences, torch.stack(found.logits)


def assert_equal(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])


def test_alone_and_fast_it_has_the_bits_of_one_process(cloud: Served, model: Path, tmp_path: Path) -> None:
    with open_link(cloud, tmp_path) as (link, server):
        edge = link.load_model()
        calls = link.traffic.calls
        assert_equal(text(edge), text(whole(model)))
        assert link.traffic.calls - calls == NEW
        assert server.server.status()["cache_bytes"] > 0
        assert_equal(text(edge, num_beams=3), text(whole(model), num_beams=3))
        assert_equal(text(edge, prompt_lookup_num_tokens=3), text(whole(model), prompt_lookup_num_tokens=3))


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("beams", [1, 3])
def test_the_text_is_the_same_though_every_step_loses_its_cache(
    cloud: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exact: bool, beams: int
) -> None:
    with open_link(cloud, tmp_path) as (link, server), contextlib.ExitStack() as stack:
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
    cloud: Served, tmp_path: Path, exact: bool
) -> None:
    with open_link(cloud, tmp_path) as (link, _), contextlib.ExitStack() as stack:
        edge = link.load_model()
        if exact:
            stack.enter_context(exact_decoding(link, edge))
        undisturbed = text(edge)
        sessions = link.traffic.sessions
        disturbed = text(edge, streamer=Each(link._keeper.drop))
        assert link.traffic.sessions >= sessions + NEW
    assert torch.equal(disturbed[0], undisturbed[0])
    assert torch.equal(disturbed[1], undisturbed[1]) or not exact


def test_an_answer_that_is_lost_on_its_way_is_asked_for_again(cloud: Served, tmp_path: Path) -> None:
    with open_link(cloud, tmp_path) as (link, _):
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


def test_exact_has_the_same_bits_with_drafts_and_in_any_steps(cloud: Served, tmp_path: Path) -> None:
    repeating = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    results = []
    for steps in (512, 4):
        bounds = Bounds(engine=EngineOptions(prefill_tokens=steps))
        with open_link(cloud, tmp_path / str(steps), bounds=bounds) as (link, _):
            edge = link.load_model()
            with exact_decoding(link, edge):
                results += [text(edge, repeating), text(edge, repeating, prompt_lookup_num_tokens=4)]
    for each in results[1:]:
        assert_equal(each, results[0])


def test_a_prompt_in_steps_and_in_several_calls(model: Path, tmp_path: Path) -> None:
    cloud = served(model, tmp_path / "parts", max_tokens=16)
    bounds = Bounds(engine=EngineOptions(prefill_tokens=7))
    ids = prompt(50)
    with open_link(cloud, tmp_path, bounds=bounds) as (link, _):
        edge = link.load_model()
        found = text(edge, ids)
        assert link.traffic.calls > NEW + 3
    expected = text(whole(model), ids)
    assert torch.equal(found[0], expected[0])
    assert torch.allclose(found[1], expected[1], atol=1e-4)


def test_leased_adapters_inside_the_cloud_s_layers(cloud: Served, model: Path, tmp_path: Path) -> None:
    def adapted(base: Any) -> Any:
        torch.manual_seed(4)
        config = peft.LoraConfig(
            r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False
        )
        return peft.get_peft_model(base, config).eval()

    expected = text(adapted(whole(model)))
    with open_link(cloud, tmp_path) as (link, _):
        edge = adapted(link.load_model(leased=lambda name: True))
        fast = text(edge)
        with exact_decoding(link, edge):
            exact = text(edge)
            assert_equal(text(edge, prompt_lookup_num_tokens=3), exact)
        with pytest.raises(UnsupportedCallError, match="lease it to the cloud"):
            text(adapted(link.load_model()))
    assert_equal(fast, expected)
    assert torch.equal(exact[0], expected[0])
    assert not torch.equal(expected[0], text(whole(model))[0])


def test_in_a_pipeline(model: Path, tmp_path: Path) -> None:
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
            assert pipeline.servers[0].server.status()["caches_lost"] == 0
    finally:
        for server in pipeline.servers:
            server.__exit__()


def test_many_texts_at_a_time_share_a_small_pool(cloud: Served, tmp_path: Path) -> None:
    small = dataclasses.replace(cloud, cache_bytes=3 * cache_bytes(cloud.executor.host.span, 1, 10 + NEW))
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


def test_a_text_that_never_fits_is_refused_and_says_so(cloud: Served, tmp_path: Path) -> None:
    small = dataclasses.replace(cloud, cache_bytes=100)
    with open_link(small, tmp_path) as (link, _), pytest.raises(RefusedError, match="--cache-bytes"):
        text(link.load_model())


def test_a_cloud_that_never_keeps_anything_is_given_up(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cloud = served(model, tmp_path / "parts", max_tokens=8)
    finish = CachePool.finish
    monkeypatch.setattr(CachePool, "finish", lambda self, key, **more: (finish(self, key, **more), self.drop(key))[0])
    with open_link(cloud, tmp_path) as (link, _), pytest.raises(OverQuotaError, match="lost the cache"):
        text(link.load_model(), prompt(30))


def test_exact_is_refused_where_bits_depend_on_the_batch(cloud: Served, tmp_path: Path) -> None:
    with open_link(cloud, tmp_path, batching=False) as (link, _):
        edge = link.load_model()
        with exact_decoding(link, edge), pytest.raises(RefusedError, match="cannot decode exactly"):
            text(edge)


def test_numbers_of_caches_are_free_again(cloud: Served, tmp_path: Path) -> None:
    with open_link(cloud, tmp_path) as (link, server):
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
    cloud: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_link(cloud, tmp_path) as (link, _):
        edge = link.load_model()
        expected = text(edge, num_beams=2), text(edge)
        spilled = []
        spill = HiddenHistory._spill
        monkeypatch.setattr(HiddenHistory, "_spill", lambda self: (spilled.append(self.length), spill(self))[1])
        monkeypatch.setattr(cloud_cache, "HiddenHistory", lambda: HiddenHistory(memory_bytes=1))
        assert_equal(text(edge, num_beams=2), expected[0])
        again = text(edge, streamer=Each(link._keeper.drop))  # replayed from the file
    assert torch.equal(again[0], expected[1][0])
    assert len(spilled) > NEW


def test_a_session_that_ends_leaves_no_bytes(cloud: Served, tmp_path: Path) -> None:
    from support.cloud.sessions import eventually

    with ThreadServer(cloud, Home(tmp_path)) as server:
        with server.link() as link:
            link.open(5)
            text(link.load_model())
            assert server.server.status()["caches"] == 1
        eventually(lambda: server.server.status()["caches"] == 0)
