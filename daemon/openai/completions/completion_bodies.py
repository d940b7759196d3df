"""What a request for a plain completion may ask (`isthmus.daemon.openai.request_fields` has the rule).

followed    prompt (a text, tokens, or a list of either; all answers to all prompts are at most 128), model, max_tokens
            (16 by default), n, seed, temperature, top_p, stop, stream, stream_options.include_usage, logprobs, and echo
            for texts without logprobs
satisfied   frequency_penalty, presence_penalty (0), logit_bias (empty), best_of (equal to n), suffix (null),
            stream_options.include_obfuscation (false), and user with every text
refused     a prompt that is null; max_tokens = 0; echo with logprobs, since the document has no form for the first
            token, which has no probability; echo of tokens
"""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BeforeValidator, FailFast, Field, model_validator

from isthmus.daemon.openai.completions.sampling_bodies import SamplingFields
from isthmus.daemon.openai.request_fields import only
from isthmus.daemon.serving.answers import Sampling
from isthmus.daemon.web.api_error import ApiError

MOST_ANSWERS = 128
"""Answers to all prompts of a request together."""
_TOKENS_BY_DEFAULT = 16


def _prompts(value: Any) -> list[str | list[int]]:
    """The prompts of the document's four forms: a text, texts, tokens, lists of tokens."""
    alone = isinstance(value, str) or _is_tokens(value)
    prompts = [value] if alone else value
    if not isinstance(prompts, list) or not prompts:
        raise ValueError("give a text, a list of tokens, or a list of either")
    if not (all(isinstance(each, str) for each in prompts) or all(_is_tokens(each) for each in prompts)):
        raise ValueError("a list holds texts, or lists of tokens (numbers from 0 on), and each has at least one")
    return prompts


def _is_tokens(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(token, int) and not isinstance(token, bool) and 0 <= token < 2**31 for token in value)
    )


class CompletionBody(SamplingFields):
    """The body of `POST /v1/completions`."""

    prompt: Annotated[list[str | list[int]], FailFast(), BeforeValidator(_prompts)]
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    logprobs: Annotated[int | None, Field(ge=0, le=5)] = None
    echo: bool | None = None
    best_of: Annotated[int | None, Field(ge=0, le=20)] = None
    suffix: Annotated[Any, only(None, why="text is not inserted before another")] = None

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        n = self.n or 1
        if self.best_of is not None and self.best_of != n:
            raise ApiError(
                400,
                f"best_of = {self.best_of} is not n = {n}, and all answers are given: leave it out",
                param="best_of",
            )
        if n * len(self.prompt) > MOST_ANSWERS:
            raise ApiError(
                400, f"{len(self.prompt)} prompts with n = {n} are more than {MOST_ANSWERS} answers", param="prompt"
            )
        if self.echo and self.logprobs is not None:
            raise ApiError(400, "echo with logprobs is not done here: leave one of them out", param="echo")
        if self.echo and not isinstance(self.prompt[0], str):
            raise ApiError(400, "echo is of texts, and the prompt is tokens: send the text", param="echo")
        return self

    def how(self) -> Sampling:
        """How to sample each answer."""
        return self.sampling(self.max_tokens or _TOKENS_BY_DEFAULT, self.logprobs)
