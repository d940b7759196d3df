"""Samples: each promise is answered by the process that generates, several at once, in no order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from pydantic import ValidationError
from sqlalchemy import select
from starlette.concurrency import run_in_threadpool

from isthmus.common.errors import WorkerDiedError
from isthmus.daemon.daemon_settings import DaemonSettings
from isthmus.daemon.serving.answers import Answers, BusyError, Piece, Sampling, Target, TokenChance
from isthmus.daemon.serving.fair_turns import FairTurns
from isthmus.daemon.state.database import Database
from isthmus.daemon.state.tables import TinkerPromise, TinkerSampler
from isthmus.daemon.tinker.promises import Promises, Told, told_refusal
from isthmus.daemon.tinker.refusal import RefusalError
from isthmus.daemon.tinker.saved_weights import SavedWeights
from isthmus.daemon.tinker.tinker_patience import MINE, MOST_DEATHS, MOST_FAILURES, Waits, pause_after, told_failure
from isthmus.daemon.tinker.tinker_requests import Sample, SamplingParams
from isthmus.daemon.tinker.wire_bodies import PROTOBUF, Sampled, written_samples
from isthmus.daemon.workers.asking import WorkerError

AT_ONCE = 16
"""Promises that the process is asked at a time."""
MOST_SAMPLES = 128
"""Answers to one prompt."""
MOST_LIKELIEST = 20

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Collected:
    """What has come of one answer."""

    tokens: list[int] = field(default_factory=list)
    chances: list[TokenChance] = field(default_factory=list)
    finish: str | None = None


class SamplingQueue:
    """The promises that sample. All its methods are for one event loop."""

    def __init__(
        self,
        settings: DaemonSettings,
        database: Database,
        promises: Promises,
        weights: SavedWeights,
        answers: Answers,
    ) -> None:
        self._settings, self._database = settings, database
        self._promises, self._weights, self._answers = promises, weights, answers
        self._turns = FairTurns(AT_ONCE)
        self._tasks: dict[str, asyncio.Task[None]] = {}  # of the promises that have no answer, by their ids
        self.reasons: dict[str, str] = {}  # why they wait

    def add(self, promise: TinkerPromise) -> None:
        """Answer a promise when its owner's turn comes. One that waits, or is under way, already is left as it is."""
        if promise.id not in self._tasks:
            self._tasks[promise.id] = asyncio.create_task(self._work(promise.owner, promise.id))

    async def stop(self) -> None:
        """Stop answering. What was under way is asked again after the next start."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _work(self, owner: str, promise_id: str) -> None:
        """Answer a promise; between two tries others have their turns."""
        waits = Waits()
        try:
            while True:
                async with self._turns.turn(owner):
                    reason = await self._do(promise_id, waits)
                if reason is None:
                    return
                self.reasons[promise_id] = reason
                await asyncio.sleep(waits.pause())
        finally:
            del self._tasks[promise_id]
            self.reasons.pop(promise_id, None)

    async def _do(self, promise_id: str, waits: Waits) -> str | None:
        """Answer a promise, or say why it waits. One that meets defects is refused."""
        failures, told = 0, None
        while True:
            try:
                promise = await run_in_threadpool(self._promises.find, promise_id)
                if promise is not None and promise.answer is None:
                    found = told or await self._answer(promise, waits)
                    if isinstance(found, str):
                        return found
                    told = found
                    await self._promises.tell(promise, told)
                return None
            except Exception as error:  # it is logged, and tried again: the disk was full, say
                failures += 1
                log.exception("a defect met %s, for the %d. time", promise_id, failures)
                if failures >= MOST_FAILURES:
                    told = told_failure(failures, error)
            await asyncio.sleep(pause_after(failures))

    async def _answer(self, promise: TinkerPromise, waits: Waits) -> Told | str:
        """The answer to a promise, or why it waits."""
        deaths = 0
        while True:
            try:
                return await self._sampled(promise)
            except WorkerDiedError as error:
                deaths += 1
                if deaths < MOST_DEATHS:
                    continue
                why = RefusalError(f"the process that generates has died {deaths} times at it ({error})", "server")
            except BusyError as error:
                return str(error)
            except WorkerError as error:
                if waits.passes(error):
                    return str(error)
                why = RefusalError(str(error), "server" if error.code in MINE else "user")
            except RefusalError as error:
                why = error
            return told_refusal(why)

    async def _sampled(self, promise: TinkerPromise) -> Told:
        request = await run_in_threadpool(lambda: Sample.model_validate_json(self._promises.body(promise)))
        tokens, sampling = checked(request)
        target = await run_in_threadpool(self._target, promise.owner, request)
        found = [_Collected() for _ in range(sampling.n)]
        prompt: Sequence[TokenChance | None] = ()
        pieces = self._answers.generate(target, tokens, sampling, owner=promise.owner)
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                _collect(found[piece.index], piece)
                prompt = piece.prompt_chances or prompt
        return Told(await run_in_threadpool(_written, request, tokens, found, prompt), PROTOBUF)

    def _target(self, owner: str, request: Sample) -> Target:
        query = select(TinkerSampler).where(TinkerSampler.id == request.sampling_session_id)
        with self._database.reading() as session:
            sampler = session.scalar(query.where(TinkerSampler.owner == owner))
        if sampler is None:
            raise RefusalError(f"there is no sampling session {request.sampling_session_id}")
        if sampler.weights is None:
            return Target(sampler.base)
        self._weights.use(sampler.weights)
        return Target(sampler.base, str(self._weights.folder(self._weights.needed(owner, sampler.weights))))


def checked(request: Sample) -> tuple[list[int], Sampling]:
    """The prompt's tokens, and how to sample. Raises RefusalError for what is not offered."""
    for name in ("target_prompt_logprobs", "prompt_alt_tokens_k", "record_stability_info"):
        if getattr(request, name):
            raise RefusalError(f"{name} is not offered: leave it out")
    try:
        params = SamplingParams.model_validate(request.sampling_params)
    except ValidationError as error:
        first = error.errors()[0]
        raise RefusalError(f"sampling_params: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    tokens = request.prompt.tokens()
    last = request.prompt_logprobs_last_n
    if last is not None and not (request.prompt_logprobs and 1 <= last < len(tokens)):
        raise RefusalError(
            f"prompt_logprobs_last_n = {last} goes with prompt_logprobs, and from 1 to {len(tokens) - 1}"
        )
    if not 1 <= request.num_samples <= MOST_SAMPLES:
        raise RefusalError(f"num_samples = {request.num_samples}: from 1 to {MOST_SAMPLES}")
    likeliest = max(request.topk_prompt_logprobs, request.topk_sample_logprobs)
    if likeliest > MOST_LIKELIEST or min(request.topk_prompt_logprobs, request.topk_sample_logprobs) < 0:
        raise RefusalError(f"topk_prompt_logprobs and topk_sample_logprobs go from 0 to {MOST_LIKELIEST}")
    if params.top_k == 0:
        raise RefusalError(f"top_k = {params.top_k}: -1 for all tokens, or 1 and more")
    texts, stop_tokens = params.stops()
    return tokens, Sampling(
        n=request.num_samples,
        max_tokens=params.max_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=None if params.top_k == -1 else params.top_k,
        seed=params.seed,
        stop=texts,
        stop_tokens=stop_tokens,
        logprobs=True,
        top_logprobs=likeliest,
        prompt_logprobs=bool(request.prompt_logprobs or request.topk_prompt_logprobs),
    )


def _collect(found: _Collected, piece: Piece) -> None:
    found.tokens += piece.tokens
    found.chances += piece.chances
    found.finish = piece.finish or found.finish


def _written(
    request: Sample, tokens: Sequence[int], found: Sequence[_Collected], prompt: Sequence[TokenChance | None]
) -> bytes:
    logprobs: list[float | None] | None = None
    if request.prompt_logprobs:
        logprobs = [None if chance is None else chance.logprob for chance in prompt]
        if request.prompt_logprobs_last_n is not None:
            first = len(tokens) - request.prompt_logprobs_last_n
            logprobs = [None if place < first else value for place, value in enumerate(logprobs)]
    return written_samples(
        [
            Sampled(
                answer.tokens,
                [chance.logprob for chance in answer.chances],
                [_pairs(chance) for chance in answer.chances],
                answer.finish == "stop",
            )
            for answer in found
        ],
        logprobs,
        [_pairs(chance) for chance in prompt],
        request.topk_sample_logprobs,
        request.topk_prompt_logprobs,
    )


def _pairs(chance: TokenChance | None) -> list[tuple[int, float]]:
    return [] if chance is None else [(token, logprob) for token, _, _, logprob in chance.top]
