"""A worker process that is asked: answers, errors, questions taken back, its death, and readers that are too slow."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any, TypeVar

import pytest
from support.daemon import asked_worker

from isthmus.common.errors import WorkerDiedError
from isthmus.daemon.workers import asking
from isthmus.daemon.workers.asking import WorkerError, WorkerProcess
from isthmus.daemon.workers.frames import Frame

T = TypeVar("T")


def with_worker(work: Callable[[WorkerProcess], Awaitable[T]], folder: Path, *arguments: str, **options: Any) -> T:
    """What `work` returns, with a worker of its own."""

    async def run() -> T:
        worker = WorkerProcess(arguments or (str(asked_worker.__file__),), folder / "log", **options)
        try:
            return await asyncio.wait_for(work(worker), 30)
        finally:
            await worker.stop()

    return asyncio.run(run())


def test_answers_and_errors_come_to_their_questions(tmp_path: Path) -> None:
    async def work(worker: WorkerProcess) -> None:
        assert worker.pid is None
        answers = await asyncio.gather(*(worker.ask("echo", bytes([n]), n=n) for n in range(5)))
        assert answers == [({"n": n, "greeting": []}, bytes([n])) for n in range(5)]
        assert worker.pid is not None
        with pytest.raises(WorkerError, match="it does not make sense") as refused:
            await worker.ask("refuse")
        assert refused.value.code == 10
        for method, reason in (("fail", "LookupError: a defect"), ("dance", "there is no method 'dance'")):
            with pytest.raises(WorkerError, match=f"internal error: {reason}") as failed:
                await worker.ask(method)
            assert failed.value.code == 1
        assert await worker.ask("echo") == ({"greeting": []}, b"")

    with_worker(work, tmp_path)
    log = (tmp_path / "log").read_text()
    assert "what is printed spoils no frame" in log
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600
    assert log.count("Traceback") == 1


def test_a_worker_is_greeted_before_it_is_asked(tmp_path: Path) -> None:
    async def work(worker: WorkerProcess) -> None:
        for _ in range(2):
            assert (await worker.ask("echo"))[0]["greeting"] == [{"hello": 1}]
            assert worker.pid is not None
            os.kill(worker.pid, signal.SIGKILL)  # the next one is greeted, too
            with pytest.raises(WorkerDiedError):
                await worker.ask("echo")

    with_worker(work, tmp_path, str(asked_worker.__file__), "greeted", greeting=Frame({"hello": 1}))


def test_a_question_is_taken_back_when_its_iterator_is_closed(tmp_path: Path) -> None:
    async def work(worker: WorkerProcess) -> None:
        async with aclosing(worker.stream("count")) as numbers:
            found = [(await anext(numbers))[0]["number"] for _ in range(4)]
            assert not (await worker.ask("was taken back", seconds=0.05))[0]["so"]
        assert found == [0, 1, 2, 3]
        assert (await worker.ask("was taken back", seconds=20))[0]["so"]
        assert not worker._answers

    with_worker(work, tmp_path)


def test_questions_of_one_method_can_be_answered_at_a_time(tmp_path: Path) -> None:
    async def work(worker: WorkerProcess) -> None:
        async with aclosing(worker.stream("count")) as numbers:
            await anext(numbers)  # and goes on: others do not wait for it
            await asyncio.gather(worker.ask("meet"), worker.ask("meet"))
        found = await asyncio.gather(worker.ask("meet alone"), worker.ask("meet alone"), return_exceptions=True)
        assert [isinstance(each, WorkerError) and "BrokenBarrierError" in str(each) for each in found] == [True, True]

    with_worker(work, tmp_path)


def test_a_long_log_is_put_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(worker: WorkerProcess) -> None:
        await worker.ask("echo")

    for _ in range(2):
        with_worker(work, tmp_path)
    assert (tmp_path / "log").read_text().count("spoils no frame") == 2
    monkeypatch.setattr(asking, "MOST_LOG", 10)
    with_worker(work, tmp_path)
    assert (tmp_path / "log").read_text().count("spoils no frame") == 1
    assert (tmp_path / "log.1").read_text().count("spoils no frame") == 2


@pytest.mark.parametrize("how", ["by itself", "killed"])
def test_a_worker_that_dies_is_started_anew(tmp_path: Path, how: str) -> None:
    async def work(worker: WorkerProcess) -> None:
        await worker.ask("echo")
        before = worker.pid  # asked for now, since one that dies by itself may have none any more a moment later
        assert before is not None
        async with aclosing(worker.stream("die" if how == "by itself" else "count")) as answers:
            await anext(answers)
            if how == "killed":
                os.kill(before, signal.SIGKILL)
            with pytest.raises(WorkerDiedError, match=r"has ended \(see .*log\): ask again"):
                async for _ in answers:
                    pass
        assert await worker.ask("echo", n=1) == ({"n": 1, "greeting": []}, b"")
        assert worker.pid not in (None, before)

    with_worker(work, tmp_path)


def test_a_worker_that_writes_no_frames_is_ended(tmp_path: Path) -> None:
    async def work(worker: WorkerProcess) -> None:
        for _ in range(2):
            with pytest.raises(WorkerDiedError):
                await worker.ask("echo")

    program = "import sys, time; sys.stdout.buffer.write(bytes([255] * 64)); sys.stdout.flush(); time.sleep(60)"
    with_worker(work, tmp_path, "-c", program)


def test_whoever_reads_too_slowly_gets_an_error_and_holds_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "MOST_UNREAD", 1 << 20)

    async def numbers(worker: WorkerProcess, *, slowly: bool, size: int = 100_000) -> list[int]:
        found = []
        async with aclosing(worker.stream("flood", answers=40, bytes=size)) as answers:
            async for values, _ in answers:
                found.append(values["number"])
                if slowly and len(found) == 1:
                    await worker.ask("echo")  # comes behind all of the flood
                    (held,) = worker._answers.values()
                    assert held._bytes <= 1 << 20
        return found

    async def work(worker: WorkerProcess) -> None:
        assert await numbers(worker, slowly=False) == list(range(40))
        with pytest.raises(WorkerError, match="was read too slowly: 1 MiB of it wait"):
            await numbers(worker, slowly=True)
        assert await numbers(worker, slowly=True, size=1000) == list(range(40))
        ((_, blob),) = [answer async for answer in worker.stream("flood", answers=1, bytes=2 << 20)]
        assert len(blob) == 2 << 20  # one answer may be larger

    with_worker(work, tmp_path)
