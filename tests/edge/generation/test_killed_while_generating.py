"""A worker or an edge is killed in the middle of an answer: the text is that of an undisturbed run."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cloud.clouds import ThreadServer
from support.cloud.dying_worker import MortalWorker
from support.commands import in_process
from support.generated_text import NEW, Each, text
from support.models.tiny import tiny_checkpoint

from isthmus.cloud.decoding.cache_pool import CachePool
from isthmus.edge.client.link import Link, connect
from isthmus.edge.drafts import FixedLength, NgramDraft, drafting
from isthmus.edge.generation.exact import exact_decoding
from isthmus.experiments.rigs.fault_points.fault_points import DECODING_POINTS, arm, is_armed

pytestmark = pytest.mark.server
REPEATING = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MortalWorker]:
    folder = tmp_path_factory.mktemp("killed")
    with MortalWorker(tiny_checkpoint("llama", folder / "model"), folder / "worker") as running:
        yield running


@pytest.fixture
def over(worker: MortalWorker) -> Iterator[Link]:
    with connect(worker.connection, key=worker.home.key_file, connect_timeout=60) as link:
        yield link


def disturbed(worker: MortalWorker, model: Any, instruction: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A text in the middle of which the worker meets a fault, at one point after the other."""
    tokens, points = iter(range(10**6)), iter(DECODING_POINTS)

    def fault() -> None:
        if next(tokens) in (3, 6):
            arm(worker.points, next(points), instruction)

    found = text(model, REPEATING, streamer=Each(fault))
    assert next(points, None) is None
    assert not any(is_armed(worker.points, point) for point in DECODING_POINTS)
    return found


@pytest.mark.parametrize("way", ["fast", "exact", "draft"])
def test_a_worker_that_dies_or_fails_costs_no_token(worker: MortalWorker, over: Link, way: str) -> None:
    model = over.load_model()
    with contextlib.ExitStack() as stack:
        if way != "fast":
            stack.enter_context(exact_decoding(over, model))
        expected = text(model, REPEATING)
        if way == "draft":
            stack.enter_context(drafting(model, NgramDraft(FixedLength(2))))
        for instruction, deaths in (("raise", 0), ("kill", len(DECODING_POINTS))):
            lives, replayed, retries = worker.lives, over.span.caches.replayed, over.traffic.retries
            found = disturbed(worker, model, instruction)
            assert worker.lives == lives + deaths
            assert over.span.caches.replayed > replayed
            assert over.traffic.retries >= retries + len(DECODING_POINTS)
            assert torch.equal(found[0], expected[0])
            assert torch.equal(found[1], expected[1]) or way == "fast"


# The edge -------------------------------------------------------------------------------------------------------------


def killed(server: ThreadServer, words: list[str], cache: Path, patch: pytest.MonkeyPatch, calls: int) -> None:
    """Run `isthmus edge generate`, and kill it while the cloud computes one of its calls."""
    count, reached, over = iter(range(10**6)), threading.Event(), threading.Event()
    finish = CachePool.finish

    def held(self: CachePool, *args: Any, **more: Any) -> Any:
        if next(count) == calls:
            reached.set()
            over.wait(60)
        return finish(self, *args, **more)

    with patch.context() as context:
        context.setattr(CachePool, "finish", held)
        process = subprocess.Popen(
            [sys.executable, "-m", "isthmus.cli.main", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1", "ISTHMUS_CACHE": str(cache)},
        )  # fmt: skip
        assert reached.wait(60)
        process.kill()
        assert process.wait(60) == -signal.SIGKILL
        over.set()


@pytest.mark.usefixtures("warm_children")
@pytest.mark.parametrize("sampling", [(), ("--temperature", "1.5", "--seed", "3")])
def test_an_edge_that_is_killed_goes_on_to_the_file_of_an_undisturbed_run(
    server: ThreadServer,
    parts_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    sampling: tuple[str, ...],
) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in ("Once", "a", "The cloud", "edge")))
    own = ("--cloud", server.address, "--key", str(server.home.key_file), "--max-new-tokens", str(NEW))
    words = ["edge", "generate", *own, "--batch", str(texts), "--batch-size", "1", *sampling]
    for name in ("whole", "again"):
        assert in_process(capsys, *words, "--out", str(tmp_path / name)).returncode == 0
    whole = (tmp_path / "whole").read_bytes()
    assert (tmp_path / "again").read_bytes() == whole
    cut = tmp_path / "cut"
    for calls in (NEW + NEW // 2, NEW // 2):  # in the second answer; then again in the one where it goes on
        killed(server, [*words, "--out", str(cut)], parts_cache, monkeypatch, calls)
        assert cut.read_bytes() == b"".join(whole.splitlines(keepends=True)[:1])
    assert in_process(capsys, *words, "--out", str(cut)).returncode == 0
    assert cut.read_bytes() == whole
    if sampling:
        assert in_process(capsys, *words[:-1], "4", "--out", str(tmp_path / "other")).returncode == 0
        assert (tmp_path / "other").read_bytes() != whole
