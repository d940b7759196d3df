"""The daemon's side of a worker process: it is started when it is needed, asked, and started anew when it has died."""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

from isthmus.common.errors import IsthmusError, WorkerDiedError
from isthmus.common.files import private_opener
from isthmus.daemon.workers.answering import CANCEL, Answer
from isthmus.daemon.workers.frames import HEADER_BYTES, DamagedFrameError, Frame, frame_of, lengths

MOST_UNREAD = 4 << 20
"""Bytes of a question's answers that are held for whoever asked. A single answer may be larger."""
MOST_LOG = 4 << 20
"""Bytes of a log that a new process still adds to; a larger one gets `.1` behind its name, in the place of an older."""


class WorkerError(IsthmusError):
    """A worker could not answer.

    Attributes:
        code: The exit code of the error that it met (docs/exit-codes.md); 1 for a defect.
        kind: The name of that error, in `isthmus.common.errors`; empty for a defect, and for what no worker has met.
    """

    def __init__(self, message: str, code: int = 1, kind: str = "") -> None:
        super().__init__(message)
        self.code, self.kind = code, kind


class WorkerProcess:
    """A process that answers questions (`isthmus.daemon.workers.answering`). All its methods are for one event loop.

    Whoever reads the answers to a question so slowly that more than `MOST_UNREAD` bytes of them wait gets those, and
    then an error.

    Args:
        arguments: Of Python: "-m", a module, and what it takes.
        log: Where its standard error goes.
        greeting: A frame that each new process is sent before any question; None for none.
    """

    def __init__(self, arguments: Sequence[str], log: Path, greeting: Frame | None = None) -> None:
        self._arguments, self._log, self._greeting = list(arguments), log, greeting
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()
        self._numbers = itertools.count(1)
        self._answers: dict[int, _Answers] = {}

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
        last: Answer = {}, b""
        async with aclosing(self.stream(method, blob, **values)) as answers:
            async for answer in answers:
                last = answer
        return last

    async def stream(self, method: str, blob: bytes = b"", **values: Any) -> AsyncGenerator[Answer, None]:
        """The answers to a question, as they come; to close the iterator takes it back. Raises what `ask` does."""
        process = await self._started()
        number = next(self._numbers)
        answers = self._answers[number] = _Answers()
        ended = False
        try:
            if self._reader is None or self._reader.done():  # it ended while it was greeted
                raise self._died()
            await self._send(process, Frame({"id": number, "method": method, "values": values}, blob))
            while True:
                frame = await answers.next()
                if frame is None or isinstance(frame, IsthmusError):
                    ended = not answers.overflowed
                    if frame is not None:
                        raise frame
                    return
                yield frame.values["values"], frame.blob
        finally:
            self._answers.pop(number, None)
            if not ended:
                with suppress(WorkerDiedError):
                    await self._send(process, Frame({"id": number, "method": CANCEL, "values": {}}))

    async def stop(self, patience: float = 10.0) -> None:
        """End the process: by the end of its pipe, and after `patience` seconds by a signal."""
        process = self._process
        if process is None:
            return
        assert process.stdin is not None  # noqa: S101  # it was started with one
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), patience)
        except TimeoutError:
            process.kill()
            await process.wait()
        if self._reader is not None:
            await self._reader

    async def _started(self) -> asyncio.subprocess.Process:
        async with self._starting:
            if self._process is None or self._reader is None or self._reader.done():
                if self._log.exists() and self._log.stat().st_size > MOST_LOG:
                    self._log.replace(f"{self._log}.1")
                with open(self._log, "ab", opener=private_opener) as log:  # `Path.open` has no opener
                    self._process = await asyncio.create_subprocess_exec(
                        sys.executable,
                        *self._arguments,
                        stdin=asyncio.subprocess.PIPE,
                        stdout=asyncio.subprocess.PIPE,
                        stderr=log,
                        env={"GRPC_VERBOSITY": "NONE", **os.environ},  # as `isthmus.cli.main.console` has it
                        start_new_session=True,  # else Ctrl-C at the daemon's terminal would end it, too
                    )
                self._reader = asyncio.create_task(self._read(self._process))
                if self._greeting is not None:
                    await self._send(self._process, self._greeting)
            return self._process

    async def _send(self, process: asyncio.subprocess.Process, frame: Frame) -> None:
        assert process.stdin is not None  # noqa: S101  # it was started with one
        try:
            process.stdin.write(frame.to_bytes())
            await process.stdin.drain()
        except ConnectionError as error:
            raise self._died() from error

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        """Hand out what the process answers, until it ends."""
        pipe = process.stdout
        assert pipe is not None  # noqa: S101  # it was started with one
        try:
            while True:
                n_text, n_blob = lengths(await pipe.readexactly(HEADER_BYTES))
                text, blob = await pipe.readexactly(n_text), await pipe.readexactly(n_blob)
                frame = frame_of(text, blob)
                answers = self._answers.get(frame.values["id"])
                if answers is not None:  # else nobody waits for it any more
                    answers.put(frame, len(text) + len(blob))
        except asyncio.IncompleteReadError:
            pass  # it has ended, or is about to
        except (DamagedFrameError, LookupError):
            process.kill()  # nothing that it writes can be trusted to begin where a frame does
        finally:
            await process.wait()
            for answers in self._answers.values():
                answers.end(self._died())

    def _died(self) -> WorkerDiedError:
        return WorkerDiedError(f"the process that answers has ended (see {self._log}): ask again")


class _Answers:
    """The answers to one question that were not read yet.

    Attributes:
        overflowed: Whether some were dropped because nobody has read those before.
    """

    def __init__(self) -> None:
        self.overflowed = False
        self._frames: asyncio.Queue[tuple[Frame | IsthmusError | None, int]] = asyncio.Queue()
        self._bytes = 0
        self._ended = False

    def put(self, frame: Frame, size: int) -> None:
        """Take what the worker has answered, `size` bytes."""
        if self._ended:
            return
        if "end" in frame.values:
            end = frame.values["end"]
            self.end(None if end is None else WorkerError(end["message"], end["code"], end["kind"]))
        elif self._bytes and self._bytes + size > MOST_UNREAD:
            self.overflowed = True
            self.end(WorkerError(f"the answer was read too slowly: {MOST_UNREAD >> 20} MiB of it wait; read it faster"))
        else:
            self._frames.put_nowait((frame, size))
            self._bytes += size

    def end(self, error: IsthmusError | None) -> None:
        """Nothing follows."""
        if not self._ended:
            self._ended = True
            self._frames.put_nowait((error, 0))

    async def next(self) -> Frame | IsthmusError | None:
        """The next answer; at the end an error, or None for a good end, and nothing after that."""
        frame, size = await self._frames.get()
        self._bytes -= size
        return frame
