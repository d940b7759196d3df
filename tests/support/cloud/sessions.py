"""Sessions with a `ThreadServer`, calls of theirs that are held in flight, and plain gRPC calls."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from support.cloud.clouds import ThreadServer
from support.models.tiny import HIDDEN

from isthmus.cloud.session.served_model import Served
from isthmus.common.errors import NotEnrolledError, UnreachableError
from isthmus.experiments.harness.blocking_stream import BlockingStream
from isthmus.protocol import messages as m
from isthmus.protocol.limits import DEFAULT_LIMITS, Limits
from isthmus.protocol.secure.keys import load_edge
from isthmus.rpc.secure_stream import SecureStream
from isthmus.rpc.transport import run


def hidden(rows: int = 2, length: int = 6) -> torch.Tensor:
    """Hidden states for a call, the same ones every time."""
    return torch.randn(rows, length, HIDDEN, generator=torch.Generator().manual_seed(0))


def eventually(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"it did not happen within {seconds} s"
        time.sleep(0.01)


def raw_stream(server: ThreadServer) -> BlockingStream:
    """A stream to a server that has said nothing yet."""
    return BlockingStream(f"127.0.0.1:{server.port}")


class Channel:
    """An open session without what a `Link` does for it."""

    def __init__(self, server: ThreadServer, link: bytes, key: Path, limits: Limits) -> None:
        self._stream = raw_stream(server)
        try:
            opened = SecureStream.open(
                self._stream.stream, server.home.pin, load_edge(key), m.Attach(link), limits=limits
            )
            self._secure = run(opened)
        except BaseException:
            self._stream.close()
            raise
        self._session = self._secure._session

    def ask(self, question: m.Message, timeout: float, answer_bytes: int | None = None) -> m.Message:
        return run(self._secure.ask(question, timeout, answer_bytes)).message

    def close(self) -> None:
        run(self._secure.close())
        self._stream.close()

    def abandon(self) -> None:
        run(self._secure.abandon())
        self._stream.close()


def channel(
    server: ThreadServer, link: bytes = b"l" * 16, key: Path | None = None, limits: Limits = DEFAULT_LIMITS
) -> Channel:
    """An open session without what a `Link` does for it."""
    return Channel(server, link, key or server.home.key_file, limits)


def status_of_call(server: ThreadServer, method: str, message: bytes, *, compressed: bool = False) -> tuple[str, str]:
    """The status of a call with one message, by name, and its text."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(f"127.0.0.1:{server.port}", options) as plain:
        compression = grpc.Compression.Gzip if compressed else None
        call = plain.stream_stream(method)(iter([message]), compression=compression, timeout=20)
        with contextlib.suppress(grpc.RpcError):
            list(call)
        return call.code().name, call.details()


def streams_of(server: ThreadServer) -> int:
    """The gRPC calls that a server has not got rid of."""

    async def count() -> int:
        return sum(task.get_name() == "rpc_task" for task in asyncio.all_tasks())

    return int(server.run(count()))


@contextlib.contextmanager
def channels(server: ThreadServer, count: int, key: Path | None = None) -> Iterator[list[Channel]]:
    """Open sessions of one edge over links of their own, which are abandoned at the end."""
    opened = [channel(server, bytes((number,)) * 16, key) for number in range(count)]
    try:
        yield opened
    finally:
        for each in opened:
            each.abandon()


@dataclass
class Held:
    """A call in flight, and what it led to."""

    release: threading.Event
    result: list[Any]
    thread: threading.Thread


@contextlib.contextmanager
def call_in_flight(server: ThreadServer, cloud: Served) -> Iterator[Held]:
    """A call of alice's that is being computed until it is released."""
    link = server.link(give_up_after=0.1)
    link.open(5)
    entered, held = threading.Event(), Held(threading.Event(), [], threading.Thread())
    original = type(cloud.executor).forward

    def slow(*args: Any, **options: Any) -> torch.Tensor:
        entered.set()
        held.release.wait(20)
        return original(*args, **options)

    def call() -> None:
        try:
            held.result.append(link.forward_span(hidden(), None, None, keep=False)[0])
        except (UnreachableError, NotEnrolledError) as error:
            held.result.append(error)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(cloud.executor), "forward", slow)
        held.thread = threading.Thread(target=call)
        held.thread.start()
        assert entered.wait(10)
        yield held
        held.release.set()
        held.thread.join(10)
    link.close()


def step_together(server: ThreadServer, cloud: Served, step: Callable[[int], None], count: int) -> None:
    """Let so many tenants make a step, by their numbers, whose first calls wait together for one of alice's."""
    with call_in_flight(server, cloud) as held:
        threads = [threading.Thread(target=step, args=(number,)) for number in range(count)]
        for thread in threads:
            thread.start()
        eventually(lambda: len(server.server.status()["waiting"]) == count)
        held.release.set()
        for thread in threads:
            thread.join(10)
