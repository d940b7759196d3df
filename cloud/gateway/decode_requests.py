"""The requests that a decode call makes of the engine: one for each of its steps."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from isthmus.cloud.decoding.decode_calls import CachePoolFull, DecodeCall, run_step, run_steps
from isthmus.cloud.engine.engine import Engine
from isthmus.cloud.engine.requests import Request
from isthmus.cloud.engine.scheduler import POLL_SECONDS
from isthmus.cloud.session.handler import TenantSession
from isthmus.protocol import messages as m
from isthmus.protocol.secure.framing import wipe


async def decoded(
    message: m.Decode,
    body: bytearray,
    work: TenantSession,
    engine: Engine,
    request: Callable[..., Request[Any]],
    deadline: float | None,
) -> m.Message | None:
    """Have a decode call answered, step by step; steps of others share its passes, or come in between.

    Args:
        message: What came.
        body: Its bytes, which are overwritten at the end.
        work: Whose call it is.
        engine: Computes the steps.
        request: Makes a request of the session.
        deadline: By when it has to begin, on the engine's clock; None for whenever.
    """
    call: DecodeCall | None = None
    try:
        call = work.decode_call(message)
        answer: m.Message | None = None
        for step in call.steps():
            make = partial(
                request,
                partial(run_step, step),
                kind=call.kind,
                item=step,
                run_batch=run_steps,
                positions=step.positions,
                nbytes=step.nbytes,
                # What has begun goes on: its cache is in use until its end.
                deadline=None if step.first else deadline,
            )
            answer = await _compute_when_room(engine, make, 0 if step.first else call.positions)
        return answer
    except Exception as error:  # noqa: BLE001  # `refusal` raises what is no refusal
        if call is not None:
            call.fail()  # where it was given up in the middle
        return work.refusal(message, error)
    finally:
        # Where the session is over, a step may run still: its cache counts until the session is closed behind it.
        wipe(body)


async def _compute_when_room(
    engine: Engine, make: Callable[..., Request[m.Message | None]], rate_positions: int
) -> m.Message | None:
    """Have a step computed once there is room for its cache. Meanwhile it holds no room itself, and no thread.

    Args:
        engine: Computes it.
        make: Makes a request of it.
        rate_positions: Token positions that count against the tenant's rate; 0 where they were counted before.
    """
    while True:
        try:
            return await asyncio.wrap_future(engine.submit(make(rate_positions=rate_positions)))
        except CachePoolFull:
            rate_positions = 0
            await asyncio.sleep(POLL_SECONDS)
