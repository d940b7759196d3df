"""`POST /v1/completions`; what it takes is in `isthmus.daemon.openai.completions.completion_bodies`.

The document, and the types of the official SDK, let no `finish_reason` be null, also in a stream. So a chunk that is
not the last one of its answer says "length", which it was cut at; the last chunk says why the answer ended. Nor may
`usage` be null there: it is in the last chunk of a stream alone.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.concurrency import run_in_threadpool

from isthmus.daemon.openai.completions.answer_events import Usage, ask, collect, stream
from isthmus.daemon.openai.completions.completion_bodies import CompletionBody
from isthmus.daemon.openai.completions.token_texts import token_text
from isthmus.daemon.openai.model_names import find_target
from isthmus.daemon.openai.request_fields import json_body
from isthmus.daemon.serving.answers import Piece, TokenChance
from isthmus.daemon.web.context import Asker, Here

routes = APIRouter()


@routes.post("/completions")
async def complete(
    request: Request, here: Here, asker: Asker, body: Annotated[CompletionBody, Depends(json_body(CompletionBody))]
) -> Any:
    """What follows a text."""
    target = await run_in_threadpool(find_target, here, asker.id, body.model)
    pieces = await ask(here.answers, target, body.prompt, body.how(), asker.id, request)
    form = _Form(body)
    if body.stream:
        return stream(pieces, form, request)
    answers, usage = await collect(pieces, request)
    choices = [
        form.choice(index, answer.text, answer.chances, answer.finish, first=True) for index, answer in answers.items()
    ]
    return {**form.head(), "choices": choices, "usage": usage.body()}


class _Form:
    """The objects that one request's answer is sent in."""

    def __init__(self, body: CompletionBody) -> None:
        self._body, self._usage = body, Usage()
        self._id, self._created = f"cmpl-{secrets.token_hex(12)}", int(time.time())
        self._written: dict[int, int] = {}

    def head(self) -> dict[str, Any]:
        """What every object begins with."""
        return {"id": self._id, "object": "text_completion", "created": self._created, "model": self._body.model}

    def chunks(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """The chunk of a piece, where it holds anything."""
        self._usage.count(piece)
        first = piece.index not in self._written
        if not (piece.text or piece.chances or piece.finish or (first and self._body.echo)):
            return
        choice = self.choice(piece.index, piece.text, piece.chances, piece.finish or "length", first=first)
        yield {**self.head(), "choices": [choice]}

    def last(self) -> Iterator[dict[str, Any]]:
        """The chunk of the counts, where it is wanted."""
        if self._body.with_usage:
            yield {**self.head(), "choices": [], "usage": self._usage.body()}

    def choice(
        self, index: int, text: str, chances: Sequence[TokenChance], finish: str, *, first: bool
    ) -> dict[str, Any]:
        """A part of an answer, or a whole one; its first part begins with the prompt where that is to be echoed."""
        offset = self._written.get(index, 0)
        self._written[index] = offset + sum(len(token_text(each.text, each.raw)) for each in chances)
        prompt = self._body.prompt[index // (self._body.n or 1)]
        before = prompt if self._body.echo and first and isinstance(prompt, str) else ""
        logprobs = None if self._body.logprobs is None else _logprobs(chances, offset)
        return {"index": index, "text": before + text, "logprobs": logprobs, "finish_reason": finish}


def _logprobs(chances: Sequence[TokenChance], offset: int) -> dict[str, Any]:
    """Lists of one item for each token, the likeliest with the chosen one; `offset` is where the first token begins."""
    lists: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for chance in chances:
        text = token_text(chance.text, chance.raw)
        top = {token_text(text, raw): logprob for _, text, raw, logprob in chance.top}
        lists["tokens"].append(text)
        lists["token_logprobs"].append(chance.logprob)
        lists["top_logprobs"].append({**top, text: chance.logprob})
        lists["text_offset"].append(offset)
        offset += len(text)
    return lists
