"""The side of a worker process: it answers what comes over its standard input, and ends with it.

A question is {"id": number, "method": name, "values": tree}, with bytes; {"id": number, "method": "cancel"} takes it
back. Its answers are any number of {"id": number, "values": tree}, with bytes, and then {"id": number, "end": null}, or
{"id": number, "end": {"code": exit code, "kind": the error's name, "message": one line}} if it failed.

The daemon may be killed at any time. Its end of the pipe is closed then, and the worker ends.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import IO, Any

from isthmus.common.errors import IsthmusError
from isthmus.daemon.workers.frames import DamagedFrameError, Frame, read_frame

CANCEL = "cancel"
INTERNAL = 1
"""The code of a failure that is a defect of the worker."""

Answer = tuple[dict[str, Any], bytes]
"""A tree of plain values, and bytes that go with it."""


def _nobody(values: dict[str, Any], blob: bytes = b"") -> None:
    """Where a question has nobody who asks."""


@dataclass(frozen=True, slots=True)
class Question:
    """Something that the daemon asks.

    Attributes:
        cancelled: Set once nobody waits for the answer any more.
        send: Sends an answer at once, for handlers that cannot yield it where they have it.
    """

    method: str
    values: dict[str, Any]
    blob: bytes = field(default=b"", repr=False)
    cancelled: threading.Event = field(default_factory=threading.Event)
    send: Callable[[dict[str, Any], bytes], None] = _nobody


Handler = Callable[[Question], Iterator[Answer]]


def answer_questions(handlers: Mapping[str, Handler], at_once: Mapping[str, int] | None = None) -> None:
    """Answer questions until standard input ends, and end the process then.

    What is printed meanwhile goes to standard error. An error of a handler is its question's answer: an `IsthmusError`
    with its code and its message, another one as a defect.

    Args:
        handlers: By the names of methods.
        at_once: How many questions of a method are answered at a time, each in a thread of its own, and beside those
            of other methods. Methods that are not in it are answered one after the other, in this thread.
    """
    pipe = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    answering = _Answering(handlers, pipe)
    for method, number in (at_once or {}).items():
        waiting = answering.queues[method] = queue.SimpleQueue()
        for _ in range(number):
            threading.Thread(target=answering.work, args=(waiting,), daemon=True).start()
    threading.Thread(target=answering.read, args=(sys.stdin.buffer,), daemon=True).start()
    answering.work(answering.others)


_Waiting = queue.SimpleQueue[tuple[int, Question]]


class _Answering:
    """The questions of a worker.

    Args:
        handlers: By the names of methods.
        pipe: Where answers go.

    Attributes:
        queues: Questions of the methods that have threads of their own.
        others: All other questions.
    """

    def __init__(self, handlers: Mapping[str, Handler], pipe: IO[bytes]) -> None:
        self._handlers, self._pipe = handlers, pipe
        self._writing = threading.Lock()
        self._open: dict[int, Question] = {}
        self.queues: dict[str, _Waiting] = {}
        self.others: _Waiting = queue.SimpleQueue()

    def read(self, pipe: IO[bytes]) -> None:
        """Put questions into the queues, and mark those that were taken back; at the pipe's end, end the process."""
        try:
            while (frame := read_frame(pipe)) is not None:
                self._take(frame)
        except DamagedFrameError as error:
            print(f"the daemon sent what is no question: {error}", file=sys.stderr, flush=True)
            os._exit(INTERNAL)
        os._exit(0)  # the daemon has gone; a call to the cloud that is under way is given up

    def work(self, waiting: _Waiting) -> None:
        """Answer the questions of a queue, for ever."""
        while True:
            number, question = waiting.get()
            end = self._answer(question)
            self._open.pop(number, None)
            self._write(Frame({"id": number, "end": end}))

    def _take(self, frame: Frame) -> None:
        number, method = frame.values["id"], frame.values["method"]
        if method == CANCEL:
            if (known := self._open.get(number)) is not None:
                known.cancelled.set()
            return

        def send(values: dict[str, Any], blob: bytes = b"") -> None:
            self._write(Frame({"id": number, "values": values}, blob))

        question = self._open[number] = Question(method, frame.values["values"], frame.blob, send=send)
        self.queues.get(method, self.others).put((number, question))

    def _answer(self, question: Question) -> dict[str, Any] | None:
        """Answer a question; what its end says."""
        if question.cancelled.is_set():
            return None
        try:
            if (handler := self._handlers.get(question.method)) is None:
                return _defect(f"there is no method {question.method!r}")
            for values, blob in handler(question):
                question.send(values, blob)
        except IsthmusError as error:
            return {"code": error.exit_code, "kind": type(error).__name__, "message": str(error)}
        except Exception as error:  # noqa: BLE001  # the question's answer says so, and the daemon goes on
            sys.excepthook(type(error), error, error.__traceback__)
            return _defect(f"{type(error).__name__}: {error}")
        return None

    def _write(self, frame: Frame) -> None:
        try:
            with self._writing:
                self._pipe.write(frame.to_bytes())
                self._pipe.flush()
        except BrokenPipeError:
            os._exit(0)  # the daemon has gone


def _defect(message: str) -> dict[str, Any]:
    """The end of a question that met a defect."""
    return {"code": INTERNAL, "kind": "", "message": f"internal error: {message}"}
