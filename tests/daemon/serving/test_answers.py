"""What the daemon asks of the process that generates: a real one, over a real cloud."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Coroutine, Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from safetensors.torch import save_file
from support.cloud.clouds import ThreadServer
from support.models.tiny import tiny_tokenizer
from transformers import AutoTokenizer

from isthmus.common.errors import DiskError, WorkerDiedError
from isthmus.daemon.daemon_settings import DaemonSettings
from isthmus.daemon.home import Home
from isthmus.daemon.serving.answers import Answers, BusyError, Piece, Sampling, Target
from isthmus.daemon.state.database import Database
from isthmus.daemon.state.tables import BaseModel, Owner, Traffic
from isthmus.daemon.workers.asking import WorkerError

T = TypeVar("T")
TINY = Target("tiny")
GREEDY = Sampling(temperature=0, max_tokens=12)
LONG = Sampling(temperature=0, max_tokens=480)


class Daemon:
    """Answers on an event loop of their own.

    Attributes:
        answers: They.
        database: Theirs.
    """

    def __init__(self, settings: DaemonSettings, folder: Path) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        home = Home.make(folder)
        self.database = Database(home.database)
        self.answers = self.run(self._made(settings, home))

    async def _made(self, settings: DaemonSettings, home: Home) -> Answers:
        return Answers(settings, home, self.database)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` returns."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    def close(self) -> None:
        """End the process and the loop."""
        self.run(self.answers.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self.database.close()

    def pieces(self, prompt: Any = "Once upon", sampling: Sampling = GREEDY, target: Target = TINY) -> list[Piece]:
        """All pieces of the answers to a prompt."""

        async def all_pieces() -> list[Piece]:
            return [piece async for piece in self.answers.generate(target, prompt, sampling)]

        return self.run(all_pieces())


@pytest.fixture(scope="module")
def daemon(settings: DaemonSettings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    made = Daemon(settings, tmp_path_factory.mktemp("daemon"))
    yield made
    made.close()


def text_of(pieces: list[Piece], index: int = 0) -> str:
    return "".join(piece.text for piece in pieces if piece.index == index)


async def settled(answers: Answers) -> None:
    """Wait until what has crossed is noted."""
    while answers._notes:
        await asyncio.gather(*answers._notes)


def test_nothing_is_started_for_the_state(settings: DaemonSettings, tmp_path: Path) -> None:
    made = Daemon(settings, tmp_path / "daemon")
    state = made.run(made.answers.state())
    made.close()
    assert state["pid"] is None
    assert [(cloud["name"], cloud["reachable"]) for cloud in state["clouds"]] == [("main", None)]


@pytest.mark.long
def test_what_clouds_serve_is_noted(daemon: Daemon, server: ThreadServer) -> None:
    with daemon.database.session() as session:
        session.add(BaseModel(name="older", cloud="main", facts={}, seen_at=0.0))
        session.add(BaseModel(name="elsewhere", cloud="gone", facts={}, seen_at=0.0))
    daemon.run(daemon.answers.look())
    with daemon.database.reading() as session:
        (row,) = session.query(BaseModel)
    info = server.served.info
    assert (row.name, row.cloud) == ("tiny", "main")
    assert row.facts == {
        "digest": info.digest,
        "plan": "2:2",
        "n_layers": 6,
        "longest": 512,
        "hidden_size": 32,
        "span_dtype": "fp32",
        "chat_template": True,
    }
    state = daemon.run(daemon.answers.state())
    assert state["pid"] == daemon.answers._worker.pid
    assert state["rss_bytes"] > 1 << 20
    (cloud,) = state["clouds"]
    assert (cloud["name"], cloud["reachable"], cloud["model"], cloud["error"]) == ("main", True, "tiny", None)
    assert cloud["bytes_up"] > 0


def test_of_two_clouds_with_one_model_the_first_that_is_there_counts(settings: DaemonSettings, tmp_path: Path) -> None:
    (config,) = settings.clouds.values()
    made = Daemon(settings.model_copy(update={"clouds": {"main": config, "second": config}}), tmp_path / "daemon")
    both = [{"name": name, "model": "tiny", "facts": {}} for name in ("main", "second")]
    found = []
    for there in (both, both[1:], both, []):
        made.answers._note_models(there)
        with made.database.reading() as session:
            found += [row.cloud for row in session.query(BaseModel)]
    made.close()
    assert found == ["main", "second", "main", "main"]  # while all are away, it is known where the model was last


def test_answers_to_one_prompt_have_their_own_seeds(daemon: Daemon) -> None:
    sampling = Sampling(n=3, max_tokens=12, seed=5)
    found = daemon.pieces(sampling=sampling)
    alone = [text_of(daemon.pieces(sampling=replace(sampling, n=1, seed=5 + index))) for index in range(3)]
    assert [text_of(found, index) for index in range(3)] == alone
    assert len(set(alone)) == 3
    assert sorted(piece.index for piece in found if piece.finish == "length") == [0, 1, 2]
    assert [piece.prompt_tokens for piece in found if piece.prompt_tokens is not None] == [9] * 3


def test_log_probabilities_come_over_the_pipe(daemon: Daemon) -> None:
    found = daemon.pieces("aé", replace(GREEDY, n=2, logprobs=True, top_logprobs=2, prompt_logprobs=True))
    (prompt,) = [piece.prompt_chances for piece in found if piece.prompt_chances]
    assert [None if each is None else each.raw for each in prompt] == [None, b"\xc3", b"\xa9"]
    assert prompt[1] is not None
    assert prompt[1].text == "�"
    for piece in found:
        (chance,) = piece.chances
        assert chance.token == piece.tokens[0]
        assert chance.top[0] == (chance.token, chance.text, chance.raw, chance.logprob)
        assert len(chance.top) == 2


def test_what_makes_no_sense_is_refused_by_name(daemon: Daemon) -> None:
    cases: list[tuple[Any, dict[str, Any], str]] = [
        ("", {}, "the prompt is empty"),
        ([], {}, "the prompt is empty"),
        ("a" * (4 << 20 | 1), {}, "has 4194305 characters"),
        ([5] * (1 << 20 | 1), {}, "has 1048577 tokens"),
        ([{"role": "user", "content": "a"}] * 4097, {}, "has 4097 messages"),
        ("a" * 600, {}, "has 600 tokens, and tiny takes 512"),
        ("a", {"n": 0}, "n = 0"),
        ("a", {"n": 129}, "n = 129"),
        ("a", {"max_tokens": 0}, "max_tokens = 0"),
        ("a", {"temperature": -0.1}, "temperature = -0.1"),
        ("a", {"temperature": float("nan")}, "temperature = nan"),
        ("a", {"top_p": 0}, "top_p = 0"),
        ("a", {"top_k": 0}, "top_k = 0"),
        ("a", {"seed": -1}, "seed = -1"),
        ("a", {"top_logprobs": 21}, "top_logprobs = 21"),
        ("a", {"stop": ["a"] * 17}, "17 stop texts"),
        ("a", {"stop": [""]}, "a stop text or sequence is empty"),
        ("a", {"stop": ["a" * 1001]}, "too long: give 1 to 1000"),
        ("a", {"stop_tokens": [[1]] * 17}, "17 stop sequences"),
        ("a", {"stop_tokens": [[]]}, "a stop text or sequence is empty"),
    ]
    for prompt, changes, message in cases:
        with pytest.raises(WorkerError, match=message) as refused:
            daemon.pieces(prompt, replace(GREEDY, **changes))
        assert refused.value.code == 10
    with pytest.raises(WorkerError, match=r"no cloud of daemon\.toml serves 'huge'") as refused:
        daemon.pieces(target=Target("huge"))
    assert refused.value.code == 20
    with pytest.raises(WorkerError, match="not there any more") as refused:
        daemon.pieces(target=Target("tiny", "/nowhere/at/all"))
    assert refused.value.code == 20
    assert daemon.answers._requests.taken.total() == 0
    assert daemon.pieces("a", replace(GREEDY, stop=["a" * 1000] * 16, stop_tokens=[[1]] * 16, top_logprobs=20))


def test_all_answers_together_have_a_bound(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.daemon.serving.answers.MAX_NEW_TOKENS", 1024)
    for sampling in (replace(GREEDY, n=3, max_tokens=None), replace(GREEDY, n=3, max_tokens=400)):
        with pytest.raises(WorkerError, match="lower n or max_tokens, 1024 are the most"):
            daemon.pieces(sampling=sampling)
    assert daemon.pieces(sampling=replace(GREEDY, n=3, max_tokens=2))


def test_an_answer_ends_when_its_iterator_is_closed(daemon: Daemon) -> None:
    async def work() -> list[Piece]:
        async with aclosing(daemon.answers.generate(TINY, "Once", replace(LONG, n=4))) as pieces:
            found = [await anext(pieces) for _ in range(3)]
        await asyncio.gather(*daemon.answers._notes)  # they ask the worker, too
        assert not daemon.answers._worker._answers
        assert daemon.answers._turns._free == 2
        return found

    assert len(daemon.run(work())) == 3
    assert daemon.answers._requests.taken.total() == 0
    assert len(daemon.pieces()) == 12


def test_too_many_requests_are_refused(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon.answers._requests, "most", 3)

    async def work() -> int:
        open_ones = [daemon.answers.generate(TINY, "Once", LONG) for _ in range(3)]
        waiting = [asyncio.create_task(anext(each)) for each in open_ones]
        await asyncio.sleep(0)
        with pytest.raises(BusyError, match="3 requests are being answered or wait"):
            await anext(daemon.answers.generate(TINY, "Once", LONG))
        open_ones.append(daemon.answers.generate(TINY, "Once", LONG, owner="another"))
        waiting.append(asyncio.create_task(anext(open_ones[-1])))
        await asyncio.sleep(0)
        assert daemon.answers._requests.taken == {"": 3, "another": 1}
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for each in open_ones:
            await each.aclose()
        return len([piece async for piece in daemon.answers.generate(TINY, "Once", GREEDY)])

    assert daemon.run(work()) == 12


def test_questions_about_the_process_do_not_wait_for_answers(daemon: Daemon) -> None:
    async def work() -> None:
        answering = [daemon.answers.generate(TINY, "Once", LONG) for _ in range(2)]
        for each in answering:
            await anext(each)
        await daemon.answers.state()
        await daemon.answers.look()
        await daemon.answers.tokenizer_files("tiny")
        for each in answering:
            assert (await anext(each)).finish is None  # both still go on
            await each.aclose()

    daemon.run(work())


def test_the_tokenizers_files_make_the_same_tokenizer(daemon: Daemon, tmp_path: Path) -> None:
    for name, data in daemon.run(daemon.answers.tokenizer_files("tiny")).items():
        (tmp_path / name).write_bytes(data)
    found, expected = AutoTokenizer.from_pretrained(tmp_path), tiny_tokenizer()
    assert found("Grüße")["input_ids"] == expected("Grüße")["input_ids"]
    assert found.chat_template == expected.chat_template


def test_what_has_crossed_is_noted(daemon: Daemon) -> None:
    def noted() -> tuple[int, int, int]:
        daemon.run(settled(daemon.answers))
        with daemon.database.reading() as session:
            (row,) = session.query(Traffic)
            assert row.cloud == "main"
            return row.bytes_up, row.bytes_down, row.calls

    before = noted()
    daemon.pieces()
    after = noted()
    assert after[0] - before[0] > (9 + 11) * 32 * 4  # hidden states of all tokens but the last one
    assert 12 <= after[2] - before[2] < 24  # a call of an answer that was given up may end late
    assert noted() == after
    (cloud,) = daemon.run(daemon.answers.state())["clouds"]
    assert (cloud["bytes_up"], cloud["bytes_down"]) == after[:2]


@pytest.mark.parametrize(("layers", "layer", "place"), [("all", 3, "leased"), ("edge", 3, "seen"), ("all", 1, "here")])
@pytest.mark.long
def test_what_the_cloud_learns_of_an_adapter_is_noted_before_it_does(
    settings: DaemonSettings, home: Home, tmp_path: Path, layers: str, layer: int, place: str
) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file({f"model.layers.{layer}.q.lora_A.weight": torch.zeros(1)}, adapter / "adapter_model.safetensors")
    made = Daemon(settings.model_copy(update={"training_layers": layers}), home.path)
    with made.database.session() as session:
        session.add_all(Owner(id=name, name=name, token_sha256=name, created_at=0.0) for name in ("one", "two"))
        facts = {"plan": "2:2", "n_layers": 6, "longest": 512}
        session.merge(BaseModel(name="tiny", cloud="main", facts=facts, seen_at=0.0))

    async def ask() -> None:
        async for _ in made.answers.generate(Target("tiny", str(adapter)), "Once", GREEDY, owner="one"):
            pass

    with pytest.raises(WorkerError):  # the adapter has no description
        made.run(ask())
    with made.database.reading() as session:
        assert {owner.id: owner.adapters for owner in session.query(Owner)} == {"one": place, "two": "here"}
    made.close()


@pytest.mark.long
def test_a_process_that_is_killed_is_started_anew(daemon: Daemon) -> None:
    async def work() -> None:
        async with aclosing(daemon.answers.generate(TINY, "Once", LONG)) as pieces:
            await anext(pieces)
            pid = daemon.answers._worker.pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(WorkerDiedError):
                async for _ in pieces:
                    pass

    before = text_of(daemon.pieces())
    daemon.run(work())
    assert text_of(daemon.pieces()) == before


@pytest.mark.parametrize("dies", [True, False])
def test_traffic_that_cannot_be_noted_is_told(
    settings: DaemonSettings, home: Home, caplog: pytest.LogCaptureFixture, *, dies: bool
) -> None:
    """But not that of a process that has died, which took it along."""

    async def fail() -> None:
        raise WorkerDiedError("it has ended") if dies else DiskError("the disk is full")

    async def run() -> None:
        answers = Answers(settings, home, database)
        task = asyncio.create_task(fail())
        await asyncio.wait([task])
        answers._traffic_noted(task)

    database = Database(home.database)
    asyncio.run(run())
    database.close()
    assert ("not noted: DiskError: the disk is full" in caplog.text) == (not dies)
