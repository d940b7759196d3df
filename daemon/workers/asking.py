"""The daemon's side of a worker process: it is started when it is needed, asked, and started anew when it has died."""

from __future__ import annotations

import asyncio
import itertools
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from isthmus.common.errors import IsthmusError, WorkerDiedError
from isthmus.daemon.workers.answering import CANCEL, Answer
from isthmus.daemon.workers.frames import HEADER_BYTES, Frame, frame_of, lengths


class WorkerError(IsthmusError):
    """A worker could not answer.

    Attributes:
        code: The exit code of the error that it met (docs/exit-codes.md); 1 for a defect.
    """

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


class WorkerProcess:
    """A process that answers questions (`isthmus.daemon.workers.answering`). All its methods are for one event loop.

    Args:
        arguments: Of Python: "-m", a module, and what it takes.
        log: Where its standard error goes.
    """

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        self._arguments, self._log = list(arguments), log
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Queue[Answer | IsthmusError | None]] = {}

    @property
    def pid(self) -> int | None:
        """Its number while it runs."""
        return None if self._process is None or self._process.returncode is not None else self._process.pid

    async def ask(self, method: str, blob: bytes = b"", **values: Any) -> Answer:
        """The one answer to a question.

        Raises:
            WorkerError: It could not be answered.
            WorkerDiedError: The process has ended meanwhile.
        """
        found: list[Answer] = [answer async for answer in self.stream(method, blob, **values)]
        return found[-1] if found else ({}, b"")

    async def stream(self, method: str, blob: bytes = b"", **values: Any) -> AsyncIterator[Answer]:
        """The answers to a question, as they come; to close the iterator takes it back. Raises what `ask` does."""
        process = await self._started()
        number = next(self._numbers)
        answers = self._answers[number] = asyncio.Queue()
        ended = False
        try:
            await self._send(process, Frame({"id": number, "method": method, "values": values}, blob))
            while True:
                answer = await answers.get()
                if answer is None or isinstance(answer, IsthmusError):
                    ended = True
                    if answer is not None:
                        raise answer
                    return
                yield answer
        finally:
            self._answers.pop(number, None)
            if not ended:
                with suppress(WorkerDiedError):
                    await self._send(process, Frame({"id": number, "method": CANCEL, "values": {}}))

    async def stop(self, patience: float = 10.0) -> None:
        """End the process: by the end of its pipe, and after `patience` seconds by a signal."""
        process = self._process
        if process is None or process.returncode is not None:
            return
        assert process.stdin is not None  # noqa: S101  # it was started with one
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), patience)
        except TimeoutError:
            process.kill()
            await process.wait()

    async def _started(self) -> asyncio.subprocess.Process:
        async with self._starting:
            if self._process is None or self._process.returncode is not None:
                if self._reader is not None:
                    await self._reader
                with self._log.open("ab") as log:
                    self._process = await asyncio.create_subprocess_exec(
                        sys.executable,
                        *self._arguments,
                        stdin=asyncio.subprocess.PIPE,
                        stdout=asyncio.subprocess.PIPE,
                        stderr=log,
                    )
                self._reader = asyncio.create_task(self._read(self._process))
            return self._process

    async def _send(self, process: asyncio.subprocess.Process, frame: Frame) -> None:
        assert process.stdin is not None  # noqa: S101  # it was started with one
        try:
            process.stdin.write(frame.to_bytes())
            await process.stdin.drain()
        except ConnectionError as error:
            raise WorkerDiedError("the process that answers has ended: ask again") from error

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        """Hand out what the process answers, until it ends."""
        pipe = process.stdout
        assert pipe is not None  # noqa: S101  # it was started with one
        with suppress(asyncio.IncompleteReadError):
            while True:
                n_text, n_blob = lengths(await pipe.readexactly(HEADER_BYTES))
                frame = frame_of(await pipe.readexactly(n_text), await pipe.readexactly(n_blob))
                answers = self._answers.get(frame.values["id"])
                if answers is None:
                    continue  # nobody waits for it any more
                if "end" not in frame.values:
                    answers.put_nowait((frame.values["values"], frame.blob))
                elif (end := frame.values["end"]) is None:
                    answers.put_nowait(None)
                else:
                    answers.put_nowait(WorkerError(end["message"], end["code"]))
        await process.wait()
        for answers in list(self._answers.values()):
            answers.put_nowait(WorkerDiedError(f"the process that answers has ended (see {self._log}): ask again"))
