"""Pieces of answers: asked for until the client goes, and sent at once or as server-sent events.

The first piece is awaited before anything is sent, so that a prompt that is too long, or a cloud that is away, is an
error with its status. What goes wrong later is a last event `data: {"error": …}`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse

from isthmus.daemon.serving.answers import Answers, Piece, Prompt, Sampling, Target, TokenChance
from isthmus.daemon.web.api_error import ApiError
from isthmus.daemon.web.refusals import as_api_error, internal
from isthmus.daemon.workers.asking import WorkerError

Pieces = AsyncGenerator[Piece, None]
Found = TypeVar("Found")


@dataclass(slots=True)
class Answered:
    """One whole answer."""

    text: str = ""
    chances: list[TokenChance] = field(default_factory=list)
    finish: str = "stop"


@dataclass(slots=True)
class Usage:
    """Tokens, counted as their pieces come."""

    prompt: int = 0
    completion: int = 0

    def count(self, piece: Piece) -> None:
        """Add a piece's."""
        self.prompt += piece.prompt_tokens or 0
        self.completion += len(piece.tokens)

    def body(self) -> dict[str, int]:
        """As the API tells it."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
        }


async def ask(
    answers: Answers, target: Target, prompts: Sequence[Prompt], sampling: Sampling, owner: str, request: Request
) -> Pieces:
    """The pieces of the answers to prompts, one prompt after the other; those of the second count on from `sampling.n`.

    The first of them is there already. Raises what `Answers.generate` does.
    """
    pieces = _pieces(answers, target, prompts, sampling, owner)
    try:
        first = await until_gone(request, anext(pieces))
    except WorkerError as error:
        if target.adapter is None or Path(target.adapter).exists():
            raise
        raise ApiError(  # a checkpoint that was pruned, or a model that was deleted, while the request waited
            404, "the model has just been deleted: GET /v1/models lists what can be talked to",
            param="model", code="model_not_found",
        ) from error  # fmt: skip
    return _with_first(first, pieces)


async def collect(pieces: Pieces, request: Request) -> tuple[dict[int, Answered], Usage]:
    """The whole answers, by their index, unless the client goes meanwhile. Raises what `Answers.generate` does."""
    return await until_gone(request, _collected(pieces))


class Form(Protocol):
    """The objects that an answer is sent in."""

    def chunks(self, piece: Piece) -> Iterable[Mapping[str, Any]]:
        """The chunks of a piece."""

    def last(self) -> Iterable[Mapping[str, Any]]:
        """The chunks after all pieces."""


def stream(pieces: Pieces, form: Form, request: Request) -> StreamingResponse:
    """The answer that sends each piece as it comes."""
    events = _events(pieces, form, request.state.request_id)
    return StreamingResponse(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})


async def until_gone(request: Request, work: Awaitable[Found]) -> Found:
    """The result of `work`, which is cancelled once the client has closed its connection.

    Raises:
        ApiError: It has; nobody reads this.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(400, "the client has closed its connection", code="client_gone")
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        with suppress(BaseException):
            await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _pieces(
    answers: Answers, target: Target, prompts: Sequence[Prompt], sampling: Sampling, owner: str
) -> Pieces:
    for number, prompt in enumerate(prompts):
        async with aclosing(answers.generate(target, prompt, sampling, owner=owner)) as generated:
            async for piece in generated:
                counted = piece.prompt_tokens if piece.index == 0 else None  # several answers have one prompt
                yield replace(piece, index=number * sampling.n + piece.index, prompt_tokens=counted)


async def _with_first(first: Piece, pieces: Pieces) -> Pieces:
    async with aclosing(pieces):
        yield first
        async for piece in pieces:
            yield piece


async def _collected(pieces: Pieces) -> tuple[dict[int, Answered], Usage]:
    answers: dict[int, Answered] = {}
    usage = Usage()
    async with aclosing(pieces):
        async for piece in pieces:
            answer = answers.setdefault(piece.index, Answered())
            answer.text += piece.text
            answer.chances.extend(piece.chances)
            answer.finish = piece.finish or answer.finish
            usage.count(piece)
    return dict(sorted(answers.items())), usage


async def _events(pieces: Pieces, form: Form, request_id: str) -> AsyncIterator[bytes]:
    try:
        async with aclosing(pieces):
            async for piece in pieces:
                for chunk in form.chunks(piece):
                    yield _event(chunk)
        for chunk in form.last():
            yield _event(chunk)
        yield b"data: [DONE]\n\n"
    except Exception as error:
        told = as_api_error(error)
        yield _event((told or internal(request_id)).body())
        if told is None:
            raise


def _event(body: Any) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False).encode("utf-8", "replace") + b"\n\n"
