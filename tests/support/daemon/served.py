"""An application on a free port of loopback, while a block runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """Serve `app` in a thread; gives its URL."""
    server = uvicorn.Server(
        uvicorn.Config(app, port=0, lifespan="off", log_level="critical", ws="none", timeout_graceful_shutdown=5)
    )  # bounded as the daemon's own is: a request whose client left it open must not hold the block's end
    started = threading.Event()
    startup = server.startup

    async def told(*arguments: Any, **options: Any) -> None:
        await startup(*arguments, **options)
        started.set()

    server.startup = told  # type: ignore[method-assign]  # to know when, without looking again and again
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        if not started.wait(30):
            raise RuntimeError("the server did not start")
        host, port = server.servers[0].sockets[0].getsockname()[:2]
        yield f"http://{host}:{port}"
    finally:
        server.should_exit = True
        thread.join()
