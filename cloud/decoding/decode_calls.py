"""The decode calls of one session, and the passes that steps of several sessions share.

A call of many tokens is computed in steps, so that the steps of others do not wait for all of it. Its cache is in use
from the first step to the last one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from isthmus.backbone.decoding.decode_pass import NOT_EXACT, DecodePass, ExactCall, FastCall
from isthmus.backbone.decoding.key_values import KeyValues, cache_bytes
from isthmus.backbone.decoding.leased_linears import Place
from isthmus.backbone.runtime.call_memory import CallShape, Pass
from isthmus.backbone.sites.leasing import LeasedLora
from isthmus.backbone.split.span import SpanInput
from isthmus.cloud.decoding.cache_pool import CacheEntry, CachePool, Key
from isthmus.cloud.engine.executor import Executor
from isthmus.cloud.engine.requests import Kind, NotBegun
from isthmus.cloud.telemetry.logs import log
from isthmus.protocol import messages as m
from isthmus.protocol.tensor_codecs import Role, codec_by_id, encode

FAST = Kind("decode", parallel=True, any_size=True, all_threads=True)
EXACT = Kind("exact decode", parallel=True, any_size=True, all_threads=False)
"""Steps of either way of decoding. How many tokens they have does not matter for what they may share a pass with.

Where one token attends, torch divides the keys between its threads, and the bits depend on their number.
"""


class CacheIsLost(Exception):  # noqa: N818 - tells what to answer, is never shown to anybody
    """A call's cache has fewer positions than the call begins with."""

    def __init__(self, have: int) -> None:
        super().__init__(have)
        self.have = have


class CachePoolFull(NotBegun):
    """Running calls hold too much of the pool for this step to begin; submit it again later."""


@dataclass(frozen=True, slots=True)
class Decoding:
    """What the decode calls of all sessions of a worker share.

    Attributes:
        executor: Has the span.
        decode_pass: Computes steps.
        pool: The caches.
        step_tokens: Token positions of a step, at most.
    """

    executor: Executor
    decode_pass: DecodePass
    pool: CachePool
    step_tokens: int


@dataclass(slots=True, eq=False)
class DecodeCall:
    """One call of one session, until it is answered.

    Args:
        decoding: What all calls share.
        session: Whose it is.
        tenant: Whose that is.
        message: What came.
        inputs: Decodes what the span is given. Raises ConfigError where the model is not made for the position ids.
        leases: Returns what the call's lease has. Raises LookupError where it is not here, ValueError where it is for
            sites that would ask the edge.
    """

    decoding: Decoding
    session: bytes
    tenant: str
    message: m.Decode
    inputs: Callable[[], SpanInput]
    leases: Callable[[m.Decode], Mapping[Place, LeasedLora]]
    spent_ns: int = 0
    _inputs: SpanInput | None = None
    _outputs: list[Tensor] = field(default_factory=list)
    _entry: CacheEntry | None = None
    _leased: Mapping[Place, LeasedLora] = field(default_factory=dict)

    @property
    def positions(self) -> int:
        """Token positions of all its steps."""
        batch, length, _ = self.message.hidden.shape
        return batch * length

    @property
    def key(self) -> Key:
        """That of its cache."""
        return self.session, self.message.cache

    @property
    def kind(self) -> Kind:
        """Of its steps."""
        return EXACT if self.message.blocks else FAST

    @property
    def nbytes(self) -> int:
        """Bytes that its cache will take."""
        batch, length, _ = self.message.hidden.shape
        return cache_bytes(self.decoding.executor.host.span, batch, self.message.start + length)

    @property
    def entry(self) -> CacheEntry:
        """Its cache, once it has begun."""
        if self._entry is None:
            raise RuntimeError("a decode call that has not begun")
        return self._entry

    def steps(self) -> Iterator[DecodeStep]:
        """Its steps, in their order."""
        batch, length, _ = self.message.hidden.shape
        most = max(1, self.decoding.step_tokens // batch)
        # A block is never cut: how many tokens attend at once is part of an exact call.
        sizes = list(self.message.blocks) or [most] * (length // most) + [length % most] * bool(length % most)
        first, start, blocks = 0, 0, list[int]()
        for size in sizes:
            if blocks and first - start + size > most:
                yield DecodeStep(self, start, first, tuple(blocks))
                start, blocks = first, []
            blocks.append(size)
            first += size
        yield DecodeStep(self, start, length, tuple(blocks))

    def begin(self) -> None:
        """Check and decode the message, and find its cache. A call that found no room begins again.

        Raises:
            CacheIsLost: The cache has fewer positions than the call begins with.
            ConfigError: The model is not made for its position ids.
            LookupError: Its leased weights are not here.
            ValueError: It does not fit its cache, is to be exact where that is not possible, or there is never room
                for it.
        """
        message, decoding = self.message, self.decoding
        batch, length, _ = message.hidden.shape
        if self._inputs is None:
            # A copy, as the message's place in memory is no multiple of 64, where a product of one row has other bits.
            self._inputs = decoding.executor.copy_inputs(self.inputs())
        if self.nbytes > decoding.pool.budget:
            raise ValueError(
                f"the keys and values of {batch} x {message.start + length} tokens take {self.nbytes} bytes, and this "
                f"cloud keeps {decoding.pool.budget} of all sessions (serve --cache-bytes): generate fewer or shorter "
                "texts at a time"
            )
        if message.blocks and decoding.decode_pass.rows is None:
            raise ValueError(NOT_EXACT)
        self._leased = self.leases(message)
        self._entry = self._cache()

    def trim_cache(self) -> None:
        """There is room: bring the cache to where the call begins.

        Raises:
            CacheIsLost: It has gone for others meanwhile.
        """
        message, keys = self.message, self.entry.keys
        if keys.length < message.start:
            self.decoding.pool.counters.lost += 1
            raise CacheIsLost(0)
        keys.keep(message.start)
        # A repeated call has taken its rows already.
        if message.start and message.rows and self.entry.last_call != message.id.call:
            keys.select(torch.tensor(message.rows, device=self.decoding.executor.device))

    def part(self, step: DecodeStep) -> FastCall:
        """What a step computes."""
        entry, inputs = self.entry, self._inputs
        if inputs is None:
            raise RuntimeError("a step of a decode call that is over")
        places, stop = slice(step.first, step.stop), self.message.start + step.stop
        mask, positions = inputs.attention_mask, inputs.position_ids
        given = SpanInput(
            inputs.hidden[:, places],
            None if mask is None else mask[:, :stop],
            None if positions is None else positions[:, places],
        )
        if self.message.blocks:
            return ExactCall(given, entry.keys, self._leased, step.blocks)
        return FastCall(given, entry.keys, self._leased)

    def take(self, output: Tensor, nanoseconds: int) -> m.ForwardReply | None:
        """Take what came of a step; the answer where it was the last one."""
        self._outputs.append(output)
        self.spent_ns += nanoseconds
        if sum(each.shape[1] for each in self._outputs) < self.message.hidden.shape[1]:
            return None
        whole = torch.cat(self._outputs, dim=1) if len(self._outputs) > 1 else output
        codec = codec_by_id(self.message.reply_codec).name
        hidden = encode(whole, codec, Role.ACTIVATION, "the output of the cloud's layers")
        self._end(failed=False)
        return m.ForwardReply(self.message.id, hidden, self.spent_ns, 0, 0)

    def rewind(self, step: DecodeStep) -> None:
        """Forget what a pass that has failed may have left of a step in the cache."""
        if self._entry is not None:
            self._entry.keys.keep(self.message.start + step.first)

    def fail(self) -> None:
        """It is given up in the middle."""
        if self._entry is not None and self._entry.in_use:
            self._end(failed=True)

    def _end(self, *, failed: bool) -> None:
        self.decoding.pool.finish(self.key, call=self.message.id.call, failed=failed)
        self._inputs, self._outputs, self._leased = None, [], {}

    def _cache(self) -> CacheEntry:
        """The call's cache, which is as it was. Raises what `begin` raises of it."""
        message, pool, key = self.message, self.decoding.pool, self.key
        entry, adapters = pool.find(key), (message.sites, message.lease)
        batch = message.hidden.shape[0]
        if entry is not None and (entry.adapters != adapters or not message.start):
            pool.drop(key)  # what was computed with other adapters is no good; what begins anew needs none of it
            entry = None
        if entry is None:
            if message.start:
                pool.counters.lost += 1
                raise CacheIsLost(0)
            entry = CacheEntry(self.tenant, KeyValues(self.decoding.executor.host.span), adapters)
            pool.put(key, entry)
            return entry
        # Another thread may evict it meanwhile, which takes its length first: rows that are gone belong to no length.
        rows, length = entry.keys.rows, entry.keys.length
        if length < message.start:
            pool.counters.lost += 1
            raise CacheIsLost(length)
        if message.rows and entry.last_call != message.id.call:
            if max(message.rows) >= rows:
                raise ValueError(f"row {max(message.rows)} of a cache that has {rows}")
            rows = len(message.rows)
        if rows != batch:
            raise ValueError(f"{batch} sequences do not fit a cache of {rows}")
        return entry


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """Some tokens of a call: those from `first` on and before `stop`, in blocks."""

    call: DecodeCall
    first: int
    stop: int
    blocks: tuple[int, ...]

    @property
    def positions(self) -> int:
        """Token positions."""
        return self.call.message.hidden.shape[0] * (self.stop - self.first)

    @property
    def nbytes(self) -> int:
        """Memory that it takes while it is computed, in bytes."""
        message = self.call.message
        batch, length = message.hidden.shape[0], self.stop - self.first
        masked = message.attention_mask is not None
        shape = CallShape(batch, length, Pass.FORWARD, masked, past=message.start + self.first)
        return self.call.decoding.executor.memory.of(shape)


Outcome = m.Message | Exception | None


def run_step(step: DecodeStep) -> m.Message | None:
    """Compute one step by itself. Raises what goes wrong."""
    (outcome,) = run_steps([step])
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def run_steps(steps: Sequence[DecodeStep]) -> list[Outcome]:
    """Compute steps of different sessions in one pass, those that there is room for.

    Returns:
        For each the answer to its call where it was the last step, None where there are further ones, or an error:
        `CachePoolFull` where it is to be asked for again.
    """
    outcomes: dict[int, Outcome] = {}
    for at, step in enumerate(steps):
        if step.first == 0:
            try:
                step.call.begin()
            except Exception as error:  # noqa: BLE001  # this session's error is no other's
                outcomes[at] = error
    begun = [at for at in range(len(steps)) if at not in outcomes]
    wanted = [(call.key, call.entry, call.nbytes) for call in (steps[at].call for at in begun)]
    admitted = [begun[place] for place in steps[0].call.decoding.pool.acquire(wanted)]
    outcomes.update((at, CachePoolFull()) for at in begun if at not in admitted)
    for at in admitted:
        try:
            if steps[at].first == 0:
                steps[at].call.trim_cache()
        except Exception as error:  # noqa: BLE001  # as above
            steps[at].call.fail()
            outcomes[at] = error
    ready = [at for at in admitted if at not in outcomes]
    if ready:
        outcomes.update(zip(ready, _run_pass([steps[at] for at in ready]), strict=True))
    return [outcomes[at] for at in range(len(steps))]


def _run_pass(steps: Sequence[DecodeStep]) -> list[Outcome]:
    """One pass; where it fails, each step is computed by itself, so that only the one at fault fails."""
    start = time.perf_counter_ns()
    try:
        outputs = steps[0].call.decoding.decode_pass([step.call.part(step) for step in steps])
    except Exception as error:  # noqa: BLE001  # computed again below, where it is one call's error
        if len(steps) == 1:
            steps[0].call.fail()
            return [error.with_traceback(None)]
        log("pass_failed", logging.WARNING, error=type(error).__name__, calls=len(steps))
        outputs = None
    if outputs is None:
        return _one_by_one(steps)
    spent, positions = time.perf_counter_ns() - start, sum(step.positions for step in steps)
    return [
        _taken(step, output, spent * step.positions // positions) for step, output in zip(steps, outputs, strict=True)
    ]


def _one_by_one(steps: Sequence[DecodeStep]) -> list[Outcome]:
    for step in steps:
        step.call.rewind(step)
    return [_run_pass([step])[0] for step in steps]


def _taken(step: DecodeStep, output: Tensor, nanoseconds: int) -> Outcome:
    try:
        return step.call.take(output, nanoseconds)
    except Exception as error:  # noqa: BLE001  # this session's error is no other's
        step.call.fail()
        return error
