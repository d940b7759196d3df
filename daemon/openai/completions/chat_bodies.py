"""What a request for a chat completion may ask (`isthmus.daemon.openai.request_fields` has the rule).

followed    messages (texts, and lists of text parts, which are joined as they are), model, max_completion_tokens and
            the older max_tokens, n, seed, temperature, top_p, stop, stream, stream_options.include_usage, logprobs,
            top_logprobs
satisfied   frequency_penalty, presence_penalty (0), logit_bias (empty), store (false), metadata (empty),
            response_format (text), modalities (text), verbosity (medium), reasoning_effort (none, or the default,
            medium), service_tier (auto, default), tools (none), tool_choice and function_call (none, auto),
            parallel_tool_calls, stream_options.include_obfuscation (false), prompt_cache_retention (in_memory); and
            with every text user, safety_identifier, prompt_cache_key
refused     audio, functions, prediction, web_search_options; of messages the roles tool and function, and name, audio,
            refusal, tool_calls, function_call; parts other than text

The role `developer` is the newer word for `system`, which chat templates know.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, FailFast, Field, model_validator

from isthmus.common.bounded_values import shown
from isthmus.daemon.openai.completions.sampling_bodies import SamplingFields
from isthmus.daemon.openai.request_fields import Fields, only
from isthmus.daemon.serving.answer_forms import MAX_MESSAGES
from isthmus.daemon.serving.answers import Prompt, Sampling
from isthmus.daemon.web.api_error import ApiError

_NO_TOOLS = "tools are not called here"


def _text(value: Any) -> str:
    """The text of a message's content."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise ValueError("give a text, or a list of parts {'type': 'text', 'text': …}")
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise ValueError("only parts of type 'text' are understood here: leave images, audio and files out")
        if part.keys() != {"type", "text"} or not isinstance(part["text"], str):
            raise ValueError("a part of type 'text' has a 'text', and nothing else")
    return "".join(part["text"] for part in value)


class Message(Fields):
    """A message of a conversation."""

    role: Literal["developer", "system", "user", "assistant"]
    name: Annotated[Any, only(why="chat templates show no names")] = None
    refusal: Annotated[Any, only(None, why="models here have no separate refusals")] = None
    audio: Annotated[Any, only(None, why="audio is not understood here")] = None
    tool_calls: Annotated[Any, only([], why=_NO_TOOLS)] = None
    function_call: Annotated[Any, only(None, why=_NO_TOOLS)] = None
    content: Annotated[str, BeforeValidator(_text)]  # null beside some of the above, which are named first


class ChatBody(SamplingFields):
    """The body of `POST /v1/chat/completions`."""

    messages: Annotated[list[Message], FailFast(), Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=20)] = None

    store: Annotated[Any, only(False, None, why="answers are not stored")] = None
    metadata: Annotated[Any, only({}, None, why="answers are not stored")] = None
    response_format: Annotated[Any, only({"type": "text"}, why="text is not forced into a form")] = None
    modalities: Annotated[Any, only(["text"], None, why="answers are text")] = None
    verbosity: Annotated[Any, only("medium", None, why="the length of answers cannot be set")] = None
    reasoning_effort: Annotated[Any, only("none", "medium", None, why="models here do not reason by effort")] = None
    service_tier: Annotated[Any, only("auto", "default", None, why="there is one tier")] = None
    prompt_cache_retention: Annotated[Any, only("in_memory", None, why="prompts are not kept")] = None
    tools: Annotated[Any, only([], why=_NO_TOOLS)] = None
    tool_choice: Annotated[Any, only("none", "auto", why=_NO_TOOLS)] = None
    function_call: Annotated[Any, only("none", "auto", why=_NO_TOOLS)] = None
    functions: Annotated[Any, only(why=_NO_TOOLS)] = None
    parallel_tool_calls: bool = True
    audio: Annotated[Any, only(None, why="answers are text")] = None
    prediction: Annotated[Any, only(None, why="drafts are the daemon's own (`offered_draft`)")] = None
    web_search_options: Annotated[Any, only(why="the web is not searched")] = None
    safety_identifier: Annotated[str, Field(max_length=64)] = ""
    prompt_cache_key: str = ""

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(
                400, f"top_logprobs = {self.top_logprobs} needs logprobs = true: give it", param="top_logprobs"
            )
        lengths = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(lengths) > 1:
            raise ApiError(
                400,
                f"max_tokens = {self.max_tokens} and max_completion_tokens = {self.max_completion_tokens} differ: give "
                "the latter alone",
                param="max_tokens",
            )
        return self

    def prompt(self, form: str | None = None) -> Prompt:
        """The messages, for a chat template; of a model that was tuned on prompt and completion, the message's text.

        Args:
            form: Of the examples that the model was tuned on; None where it is not known.

        Raises:
            ApiError: Such a model has learned no turns, and there are several messages, or not the user's.
        """
        if form == "prompt":
            if [each.role for each in self.messages] != ["user"]:
                raise ApiError(
                    400,
                    f"{shown(self.model)} was tuned on prompt and completion, without turns: send one message of the "
                    "user, which is its prompt, or ask /v1/completions",
                    param="messages",
                )
            return self.messages[0].content
        roles = {"developer": "system"}
        return [{"role": roles.get(each.role, each.role), "content": each.content} for each in self.messages]

    def how(self) -> Sampling:
        """How to sample the answer."""
        top = (self.top_logprobs or 0) if self.logprobs else None
        return self.sampling(self.max_completion_tokens or self.max_tokens, top)
