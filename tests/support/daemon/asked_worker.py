"""A worker process for tests of how it is asked: `python FILE [greeted]`."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from isthmus.common.errors import ConfigError
from isthmus.daemon.workers.answering import Answer, Question, answer_questions
from isthmus.daemon.workers.frames import Frame, read_frame

_both = threading.Barrier(2)
_taken_back = threading.Event()
_greeting: list[Frame] = []


def _echo(question: Question) -> Iterator[Answer]:
    print("what is printed spoils no frame")
    yield {**question.values, "greeting": [each.values for each in _greeting]}, question.blob


def _count(question: Question) -> Iterator[Answer]:
    """Numbers, until nobody waits for more; half of them sent, half yielded."""
    number = 0
    while not question.cancelled.is_set():
        question.send({"number": number}, b"")
        yield {"number": number + 1}, b""
        number += 2
        time.sleep(0.001)
    _taken_back.set()


def _flood(question: Question) -> Iterator[Answer]:
    for number in range(question.values["answers"]):
        yield {"number": number}, bytes(question.values["bytes"])


def _refuse(_question: Question) -> Iterator[Answer]:
    raise ConfigError("it does not make sense")
    yield {}, b""


def _fail(_question: Question) -> Iterator[Answer]:
    yield {"first": True}, b""
    raise LookupError("a defect")


def _die(_question: Question) -> Iterator[Answer]:
    yield {"first": True}, b""
    os._exit(3)


def _meet(_question: Question) -> Iterator[Answer]:
    _both.wait(0.5)
    yield {}, b""


def _was_taken_back(question: Question) -> Iterator[Answer]:
    yield {"so": _taken_back.wait(question.values["seconds"])}, b""


if __name__ == "__main__":
    if "greeted" in sys.argv:
        first: Any = read_frame(sys.stdin.buffer)
        _greeting.append(first)
    answer_questions(
        {
            "echo": _echo,
            "count": _count,
            "flood": _flood,
            "refuse": _refuse,
            "fail": _fail,
            "die": _die,
            "meet": _meet,
            "meet alone": _meet,
            "was taken back": _was_taken_back,
        },
        {"count": 1, "meet": 2},
    )
