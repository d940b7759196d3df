"""What chat and plain completions have in common in their bodies."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BeforeValidator, FailFast, Field, model_validator

from isthmus.daemon.openai.request_fields import Fields, only
from isthmus.daemon.serving.answers import Sampling
from isthmus.daemon.web.api_error import ApiError

_SEEDS = 2**63 - 128
"""Seeds of the sampler, so that the last of 128 answers has one, too; others are taken modulo this number."""
_MOST_TOKENS = 2**31 - 1


def _stop_texts(value: Any) -> tuple[str, ...]:
    texts = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or (value is not None and not 1 <= len(texts) <= 4):
        raise ValueError("give a text, or a list of 1 to 4 of them")
    if not all(isinstance(text, str) and text for text in texts):
        raise ValueError("each is a text that is not empty")
    return tuple(texts)


class StreamOptions(Fields):
    """What a stream holds besides the answer."""

    include_usage: bool = False
    include_obfuscation: Annotated[Any, only(False, why="nothing is padded")] = False


class SamplingFields(Fields):
    """How tokens are chosen, and in which form they are sent.

    Satisfied: `frequency_penalty`, `presence_penalty` (0), `logit_bias` (empty), `user` (any text).
    """

    model: Annotated[str, Field(min_length=1)]
    n: Annotated[int | None, Field(ge=1, le=128)] = 1
    seed: Annotated[int | None, Field(ge=-(2**63), le=2**63)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(ge=0, le=1)] = None
    stop: Annotated[tuple[str, ...], FailFast(), BeforeValidator(_stop_texts)] = ()
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: Annotated[Any, only(0, None, why="tokens are not penalised")] = None
    presence_penalty: Annotated[Any, only(0, None, why="tokens are not penalised")] = None
    logit_bias: Annotated[Any, only({}, None, why="logits are not shifted")] = None
    user: str = ""

    @model_validator(mode="after")
    def _check_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ApiError(
                400, "stream_options says what a stream holds: give stream = true, too", param="stream_options"
            )
        return self

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with the counts of its tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, max_tokens: int | None, top_logprobs: int | None) -> Sampling:
        """How to sample. A `top_p` of 0 leaves the likeliest token alone, which is a temperature of 0.

        Args:
            max_tokens: New ones at most.
            top_logprobs: How many are shown beside each token; None for no log probabilities at all.
        """
        temperature = 1.0 if self.temperature is None else self.temperature
        return Sampling(
            n=self.n or 1,
            max_tokens=None if max_tokens is None else min(max_tokens, _MOST_TOKENS),
            temperature=0.0 if self.top_p == 0 else temperature,
            top_p=self.top_p or 1.0,
            seed=None if self.seed is None else self.seed % _SEEDS,
            stop=self.stop,
            logprobs=top_logprobs is not None,
            top_logprobs=top_logprobs or 0,
        )
