"""`POST /v1/chat/completions`; what it takes is in `isthmus.daemon.openai.completions.chat_bodies`."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.concurrency import run_in_threadpool

from isthmus.daemon.openai.completions.answer_events import Usage, ask, collect, stream
from isthmus.daemon.openai.completions.chat_bodies import ChatBody
from isthmus.daemon.openai.completions.token_texts import token_text
from isthmus.daemon.openai.model_names import find_target, form_of
from isthmus.daemon.openai.request_fields import json_body
from isthmus.daemon.serving.answers import Piece, TokenChance
from isthmus.daemon.web.context import Asker, Here

routes = APIRouter()


@routes.post("/chat/completions")
async def chat(
    request: Request, here: Here, asker: Asker, body: Annotated[ChatBody, Depends(json_body(ChatBody))]
) -> Any:
    """The next message of a conversation."""
    target = await run_in_threadpool(find_target, here, asker.id, body.model)
    prompt = body.prompt(await run_in_threadpool(form_of, target))
    pieces = await ask(here.answers, target, [prompt], body.how(), asker.id, request)
    form = _Form(body)
    if body.stream:
        return stream(pieces, form, request)
    answers, usage = await collect(pieces, request)
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": _logprobs(answer.chances) if body.logprobs else None,
            "finish_reason": answer.finish,
        }
        for index, answer in answers.items()
    ]
    return {**form.head("chat.completion"), "choices": choices, "usage": usage.body()}


class _Form:
    """The objects that one request's answer is sent in."""

    def __init__(self, body: ChatBody) -> None:
        self._body, self._usage = body, Usage()
        self._id, self._created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())
        self._begun: set[int] = set()

    def head(self, kind: str) -> dict[str, Any]:
        """What every object begins with."""
        return {"id": self._id, "object": kind, "created": self._created, "model": self._body.model}

    def chunks(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """The chunks of a piece: who speaks, what is new, why it ends."""
        self._usage.count(piece)
        if piece.index not in self._begun:
            self._begun.add(piece.index)
            yield self._chunk(piece.index, {"role": "assistant", "content": "", "refusal": None})
        if piece.text or piece.chances:
            logprobs = _logprobs(piece.chances) if self._body.logprobs else None
            yield self._chunk(piece.index, {"content": piece.text}, logprobs=logprobs)
        if piece.finish is not None:
            yield self._chunk(piece.index, {}, finish=piece.finish)

    def last(self) -> Iterator[dict[str, Any]]:
        """The chunk of the counts, where it is wanted."""
        if self._body.with_usage:
            yield {**self.head("chat.completion.chunk"), "choices": [], "usage": self._usage.body()}

    def _chunk(
        self, index: int, delta: dict[str, Any], *, logprobs: Any = None, finish: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        chunk = {**self.head("chat.completion.chunk"), "choices": [choice]}
        return {**chunk, "usage": None} if self._body.with_usage else chunk


def _logprobs(chances: Sequence[TokenChance]) -> dict[str, Any]:
    content = []
    for chance in chances:
        top = [_token(text, raw, logprob) for _, text, raw, logprob in chance.top]
        content.append({**_token(chance.text, chance.raw, chance.logprob), "top_logprobs": top})
    return {"content": content, "refusal": None}


def _token(text: str, raw: bytes, logprob: float) -> dict[str, Any]:
    return {"token": token_text(text, raw), "logprob": logprob, "bytes": list(raw)}
