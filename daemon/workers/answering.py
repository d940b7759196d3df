"""The side of a worker process: it answers what comes over its standard input, and ends with it.

A question is {"id": number, "method": name, "values": tree}, with bytes; {"id": number, "method": "cancel"} takes it
back. Its answers are any number of {"id": number, "values": tree}, with bytes, and then {"id": number, "end": null}, or
{"id": number, "end": {"code": exit code, "message": one line}} if it failed.

The daemon may be killed at any time. Its end of the pipe is closed then, and the worker ends.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import IO, Any

from isthmus.common.errors import IsthmusError
from isthmus.daemon.workers.frames import Frame, read_frame

CANCEL = "cancel"
INTERNAL = 1
"""The code of a failure that is a defect of the worker."""


@dataclass(frozen=True, slots=True)
class Question:
    """Something that the daemon asks.

    Attributes:
        cancelled: Set once nobody waits for the answer any more.
    """

    method: str
    values: dict[str, Any]
    blob: bytes = field(default=b"", repr=False)
    cancelled: threading.Event = field(default_factory=threading.Event)


Answer = tuple[dict[str, Any], bytes]
"""A tree of plain values, and bytes that go with it."""

Handler = Callable[[Question], Iterator[Answer]]


def answer_questions(handlers: dict[str, Handler]) -> None:
    """Answer questions one after the other until standard input ends, and end the process then.

    What is printed meanwhile goes to standard error. An error of a handler is its question's answer: an `IsthmusError`
    with its code and its message, another one as a defect.

    Args:
        handlers: By the names of methods.
    """
    pipe = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    waiting: queue.SimpleQueue[tuple[int, Question]] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(sys.stdin.buffer, waiting), daemon=True).start()
    while True:
        number, question = waiting.get()
        end: dict[str, Any] | None = None
        try:
            if not question.cancelled.is_set():
                for values, blob in handlers[question.method](question):
                    _write(pipe, Frame({"id": number, "values": values}, blob))
        except IsthmusError as error:
            end = {"code": error.exit_code, "message": str(error)}
        except Exception as error:  # noqa: BLE001  # the question's answer says so, and the daemon goes on
            sys.excepthook(type(error), error, error.__traceback__)
            end = {"code": INTERNAL, "message": f"internal error: {type(error).__name__}: {error}"}
        _write(pipe, Frame({"id": number, "end": end}))


def _write(pipe: IO[bytes], frame: Frame) -> None:
    try:
        pipe.write(frame.to_bytes())
        pipe.flush()
    except BrokenPipeError:
        os._exit(0)  # the daemon has gone


def _read(pipe: IO[bytes], waiting: queue.SimpleQueue[tuple[int, Question]]) -> None:
    """Put questions into the queue, and mark those that were taken back."""
    known: dict[int, Question] = {}
    while (frame := read_frame(pipe)) is not None:
        number, method = frame.values["id"], frame.values["method"]
        if method == CANCEL:
            if number in known:
                known.pop(number).cancelled.set()
            continue
        question = Question(method, frame.values["values"], frame.blob)
        known[number] = question
        waiting.put((number, question))
    os._exit(0)  # the daemon has gone; a call to the cloud that is under way is given up
