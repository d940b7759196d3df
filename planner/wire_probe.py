"""What the software at the two ends of a link costs: measured with real messages, frames and gRPC streams on loopback.

A thread plays the cloud: it opens a question, hands it to a computing thread as the server does, and seals an answer of
the same size. The network of a real link comes on top of this.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import grpc.aio
import torch

from isthmus.common.errors import IsthmusError
from isthmus.protocol.encoding import pack, unpack
from isthmus.protocol.limits import MIB
from isthmus.protocol.messages import Backward, BackwardReply, CallId
from isthmus.protocol.secure.framing import KEY_BYTES, Direction
from isthmus.protocol.secure.record import Opened, Opener, Sealer
from isthmus.protocol.service import METHOD, SERVER_CODING, SERVICE, stream_options
from isthmus.protocol.tensor_codecs import Payload, Role, codec_id, encode
from isthmus.rpc.transport import GrpcTransport, run

LARGE = 1 << 18
"""Numbers of the larger of the two messages: 1 MiB."""
PATIENCE = 10.0
_SESSION = bytes(16)


def measure_wire(repeats: int = 40) -> tuple[float, float]:
    """Seconds that a message costs, and seconds that each of its bytes costs, sealing, copies and loopback included."""
    with _answering() as port:
        transport = GrpcTransport(f"127.0.0.1:{port}")
        stream = run(transport.open())
        try:
            sealer, opener = _ends(Direction.EDGE_TO_CLOUD)[0], _ends(Direction.CLOUD_TO_EDGE)[1]

            async def ask(gradient: Payload) -> Opened:
                for frame in sealer.seal(*pack(Backward(CallId(1, 1), gradient, None, codec_id("fp32")))):
                    await stream.send(frame)
                opened = None
                while opened is None:
                    opened = opener.open(await stream.receive())
                return opened

            def exchange(numbers: int) -> float:
                gradient = encode(torch.zeros(1, 1, numbers), "fp32", Role.GRADIENT)
                start = time.perf_counter()
                opened = run(asyncio.wait_for(ask(gradient), PATIENCE))
                unpack(opened.header, opened.body)
                return time.perf_counter() - start

            exchange(LARGE)
            # In turns, so that whatever else the machine does hits both alike.
            pairs = [(exchange(1), exchange(LARGE)) for _ in range(repeats)]
        finally:
            run(transport.close())
    small, large = (statistics.median(seconds) for seconds in zip(*pairs, strict=True))
    return small / 2, max(0.0, large - small) / (2 * 4 * LARGE)


def _ends(direction: Direction) -> tuple[Sealer, Opener]:
    return Sealer(bytearray(KEY_BYTES), _SESSION, direction), Opener(bytearray(KEY_BYTES), _SESSION, direction)


@contextlib.contextmanager
def _answering() -> Iterator[int]:
    """A server in a thread of its own; gives its port."""
    loop = asyncio.new_event_loop()
    ready: list[int] = []
    started = threading.Event()

    async def serve() -> None:
        server = grpc.aio.server(options=stream_options(MIB))
        handler = grpc.stream_stream_rpc_method_handler(_session, **SERVER_CODING)
        name = METHOD.rsplit("/", 1)[1]
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, {name: handler})])
        ready.append(server.add_insecure_port("127.0.0.1:0"))
        await server.start()
        started.set()
        await stop.wait()
        await server.stop(0)

    stop = asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), name="wire-probe", daemon=True)
    thread.start()
    try:
        if not started.wait(PATIENCE):
            raise IsthmusError("a server on this machine's loopback did not start: check that 127.0.0.1 can be used")
        yield ready[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(PATIENCE)
        loop.close()


async def _session(frames: AsyncIterator[bytes], context: Any) -> None:
    """The cloud's end of one stream."""
    sealer, opener = _ends(Direction.CLOUD_TO_EDGE)[0], _ends(Direction.EDGE_TO_CLOUD)[1]
    await context.send_initial_metadata(())
    with ThreadPoolExecutor(1) as compute:
        async for frame in frames:
            opened = opener.open(frame)
            if opened is None:
                continue
            reply = await asyncio.get_running_loop().run_in_executor(compute, _reply_to(opened))
            for answer in sealer.seal(*pack(reply)):
                await context.write(answer)


def _reply_to(opened: Opened) -> Callable[[], BackwardReply]:
    question = unpack(opened.header, opened.body)
    assert isinstance(question, Backward)  # noqa: S101  # the other end is this file's
    return lambda: BackwardReply(question.id, question.gradient, 0, 0, 0, False)
