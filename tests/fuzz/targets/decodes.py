"""Decode calls of two sessions in any order over one small pool: each is answered in one line, within every bound."""

from __future__ import annotations

import contextlib
import functools
import struct
from collections.abc import Iterator, Sequence

import torch
from fuzz.target import Cursor, Target, scratch
from support.cloud.clouds import served
from support.models.tiny import HIDDEN, tiny_checkpoint
from support.protocol.wire import TENANT

from isthmus.backbone.decoding.key_values import cache_bytes
from isthmus.cloud.bounds import EngineOptions
from isthmus.cloud.decoding import cache_pool, decode_calls
from isthmus.cloud.decoding.decode_calls import Decoding, run_step
from isthmus.cloud.engine.paused_calls import CallThreads
from isthmus.cloud.session.handler import TenantSession
from isthmus.cloud.session.served_model import Served
from isthmus.common.errors import LocalProtocolError, RemoteProtocolError
from isthmus.protocol import messages as m
from isthmus.protocol.encoding import pack, unpack
from isthmus.protocol.limits import DEFAULT_LIMITS
from isthmus.protocol.tensor_codecs import Role, codec_id, encode, encode_mask, encode_positions

MAX_TOKENS, STEP_TOKENS, ROOM, ROWS = 48, 8, 3, 8
_CALLS = 12
_EXACT, _MASKED, _PLACED, _LARGE, _LEASED, _PADDED = (1 << bit for bit in range(6))


@functools.cache
def _cloud() -> Served:
    torch.set_num_threads(1)
    folder = scratch()
    return served(tiny_checkpoint("llama", folder / "model"), folder / "parts", max_tokens=MAX_TOKENS)


def _decoding(cloud: Served) -> Decoding:
    made = cloud.decoding(ROWS, EngineOptions(prefill_tokens=STEP_TOKENS))
    made.pool.budget = ROOM * cache_bytes(cloud.executor.host.span, 1, 1)
    return made


def _run(data: bytes) -> None:
    script, cloud = Cursor(data), _cloud()
    decoding, threads = _decoding(cloud), CallThreads(1, 16)
    sessions = [cloud.session(bytes((each,)) * 16, TENANT, threads, decoding=decoding) for each in range(2)]
    for _ in range(_CALLS):
        if not script:
            break
        session = sessions[script.number() % 2]
        with contextlib.suppress(RemoteProtocolError, LocalProtocolError):
            header, body = pack(_call(script))
            message = unpack(header, bytearray(b"".join(body)), DEFAULT_LIMITS)
            assert isinstance(message, m.Decode)
            before = _have(decoding, session, message)
            _check(message, _answer(session, message), before, _have(decoding, session, message))
        _check_pool(decoding)
    for session in sessions:
        session.close()
    if len(decoding.pool):
        raise AssertionError(f"sessions that are closed leave {len(decoding.pool)} caches behind")


def _answer(session: TenantSession, message: m.Decode) -> m.Message | None:
    """As the gateway has it answered, without anybody beside it."""
    try:
        answer: m.Message | None = None
        for step in session.decode_call(message).steps():
            answer = run_step(step)
        return answer
    except Exception as error:  # noqa: BLE001  # `refusal` raises what is no refusal
        return session.refusal(message, error)


def _have(decoding: Decoding, session: TenantSession, message: m.Decode) -> tuple[int, int]:
    """Rows and positions of the cache that a call is for."""
    entry = decoding.pool.find((session.session_id, message.cache))
    return (0, 0) if entry is None else (entry.keys.rows, entry.keys.length)


def _check(message: m.Decode, answer: m.Message | None, before: tuple[int, int], after: tuple[int, int]) -> None:
    batch, length, _ = message.hidden.shape
    match answer:
        case m.ForwardReply():
            if answer.hidden.shape != message.hidden.shape or after != (batch, message.start + length):
                raise AssertionError(f"a call of {message.hidden.shape} after {message.start} leaves {after}")
            if message.start > before[1]:
                raise AssertionError(f"a call after {message.start} positions went on with a cache of {before}")
        case m.CacheLost():
            if answer.have >= message.start:
                raise AssertionError(f"a cache of {answer.have} is said to be too short for {message.start}")
        case m.Status():
            if answer.code not in (m.StatusCode.BAD_REQUEST, m.StatusCode.NON_FINITE) or "\n" in answer.message:
                raise AssertionError(f"{answer.code.name}: {answer.message}")
            if after[1] > before[1]:
                raise AssertionError(f"a refused call leaves {after} of {before}")
        case _:
            raise AssertionError(f"a decode call is answered with {type(answer).__name__}")
    pack(answer)


def _check_pool(decoding: Decoding) -> None:
    pool, entries = decoding.pool, list(decoding.pool._entries.values())
    held = sum(entry.keys.nbytes for entry in entries)
    if max(held, pool.used) > pool.budget or held != pool.used:
        raise AssertionError(f"caches of {held} bytes count {pool.used}, of {pool.budget}")
    if len(entries) > 2 * m.MAX_CACHES or any(entry.in_use for entry in entries):
        raise AssertionError("a cache is in use though nothing is computed")


_FORM = "BBHBBBBB"


def _call(script: Cursor) -> m.Decode:
    """A call whose numbers are the script's, and mostly wrong."""
    call, cache, start, batch, length, flags, n_rows, n_blocks = (script.number(each) for each in _FORM)
    rows = tuple(script.number() for _ in range(n_rows))
    blocks = tuple(script.number("H") for _ in range(n_blocks))
    shape = (1 + batch % 12, 1 + length % 64, HIDDEN)
    hidden = torch.ones(shape) * (3e38 if flags & _LARGE else 0.5)
    hidden[:, ::2] *= -1
    mask = positions = None
    if flags & _MASKED:
        seen = torch.ones(shape[0], min(start, 256) + shape[1], dtype=torch.long)
        seen[:, : script.number() % 8 if flags & _PADDED else 0] = 0
        mask = encode_mask(seen)
    if flags & _PLACED:
        positions = encode_positions((torch.arange(shape[1])[None] + start).int())
    sent = encode(hidden, "fp32", Role.ACTIVATION)
    lease = int(bool(flags & _LEASED))
    exact = blocks or (((1,) * shape[1]) if flags & _EXACT else ())
    return m.Decode(m.CallId(1, call), cache, start, rows, exact, sent, mask, positions, codec_id("fp32"), lease, lease)


def _op(
    start: int,
    length: int,
    *,
    session: int = 0,
    call: int = 1,
    cache: int = 0,
    batch: int = 1,
    flags: int = 0,
    rows: Sequence[int] = (),
    blocks: Sequence[int] = (),
    seen: bytes = b"",
) -> bytes:
    fixed = (session, call, cache, start, batch - 1, length - 1, flags, len(rows), len(blocks))
    return struct.pack(f"<B{_FORM}", *fixed) + bytes(rows) + struct.pack(f"<{len(blocks)}H", *blocks) + seen


def _seeds() -> Iterator[bytes]:
    prompt, token = _op(0, 20), _op(20, 1, call=2)
    yield prompt + token + token + _op(21, 4, call=3) + _op(22, 1, call=4) + _op(30, 1, call=5)
    yield _op(0, 20, flags=_EXACT) + _op(20, 1, call=2, flags=_EXACT) + _op(21, 3, call=3, blocks=(1, 2))
    yield _op(0, 20, blocks=(9, 9, 2)) + _op(20, 2, call=2, blocks=(1,)) + _op(20, 1, call=2, blocks=(60_000,))
    beams = _op(10, 1, call=2, batch=3, rows=(0, 1, 1))
    yield _op(0, 10, batch=2) + beams + beams + _op(11, 1, call=3, batch=2, rows=(2, 9)) + _op(11, 1, call=4, batch=9)
    yield b"".join(_op(0, 5, call=1 + each, cache=each, session=each % 2) for each in range(9)) + _op(5, 1, call=99)
    yield _op(0, 5, cache=63) + _op(0, 5, cache=64) + _op(0, 5, cache=255)
    yield _op(0, 40, batch=4) + _op(0, 12, batch=4) + _op(65_535, 1) + _op(120, 20, flags=_PLACED)
    yield _op(0, 9, flags=_MASKED) + _op(9, 1, call=2, flags=_MASKED) + _op(0, 9, flags=_MASKED | _PADDED, seen=b"\x03")
    yield _op(0, 3, batch=2, flags=_MASKED | _PADDED | _PLACED, seen=b"\x07") + _op(0, 9, flags=_LARGE)
    yield prompt + _op(20, 1, call=2, flags=_LARGE) + _op(20, 1, call=3) + _op(20, 1, call=4, flags=_LEASED)
    yield prompt + _op(0, 8, session=1, batch=3) + _op(20, 1, call=2) + _op(8, 1, session=1, call=2, batch=3)


TARGET = Target(_run, _seeds, [decode_calls, cache_pool], floor=0.75, max_len=1024)
