"""Chat completions, by the official SDK."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai import BadRequestError, NotFoundError, OpenAI
from support.daemon.openai_fakes import BASE, WORDS, OpenAIDaemon

from isthmus.backbone.adapters.adapter_files import TUNING_INFO
from isthmus.daemon.openai.model_names import TUNING
from isthmus.daemon.serving.answers import Sampling, Target

HI: Any = [{"role": "user", "content": "hi"}]


def asked(openai_daemon: OpenAIDaemon) -> Sampling:
    return openai_daemon.answers.asked[-1][2]


def test_an_answer(client: OpenAI, openai_daemon: OpenAIDaemon) -> None:
    answer = client.chat.completions.create(model=BASE, messages=HI)
    (choice,) = answer.choices
    assert (choice.message.content, choice.finish_reason, choice.logprobs) == ("".join(WORDS), "stop", None)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (5, 8, 13)
    assert openai_daemon.answers.asked[-1] == (Target(BASE), HI, Sampling())
    assert openai_daemon.answers.owners[-1] == openai_daemon.owner.id


def test_how_to_sample_is_followed(client: OpenAI, openai_daemon: OpenAIDaemon) -> None:
    answer = client.chat.completions.create(
        model=BASE, messages=HI, n=3, max_completion_tokens=2, temperature=0.5, top_p=0.25, seed=-1, stop=["a", "b"],
        logprobs=True, top_logprobs=2,
    )  # fmt: skip
    assert asked(openai_daemon) == Sampling(
        n=3, max_tokens=2, temperature=0.5, top_p=0.25, seed=2**63 - 129, stop=("a", "b"), logprobs=True, top_logprobs=2
    )
    assert [(choice.index, choice.finish_reason) for choice in answer.choices] == [(n, "length") for n in range(3)]
    logprobs = answer.choices[2].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    first = logprobs.content[0]
    assert (first.token, first.bytes, first.logprob) == ("Once", list(b"Once"), -0.25)
    assert [(top.token, top.bytes) for top in first.top_logprobs] == [
        ("bytes:\\xe2\\x82", [0xE2, 0x82]),
        ("~2", list(b"~2")),
    ]
    client.chat.completions.create(model=BASE, messages=HI, max_tokens=3, top_p=0, stop="a", logprobs=True)
    assert asked(openai_daemon) == Sampling(max_tokens=3, temperature=0, stop=("a",), logprobs=True)


def test_messages_reach_the_template(client: OpenAI, openai_daemon: OpenAIDaemon) -> None:
    client.chat.completions.create(
        model=BASE,
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": "c", "tool_calls": []},
            {"role": "user", "content": ""},
        ],
    )
    assert openai_daemon.answers.asked[-1][1] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": ""},
    ]


def test_a_checkpoint_answers_while_its_job_runs(
    client: OpenAI, openai_daemon: OpenAIDaemon, training_file: str
) -> None:
    job = client.fine_tuning.jobs.create(model=BASE, training_file=training_file, seed=5)
    openai_daemon.jobs.go_on(job.id, steps=[20])
    (checkpoint,) = client.fine_tuning.jobs.checkpoints.list(job.id)
    answer = client.chat.completions.create(model=checkpoint.fine_tuned_model_checkpoint, messages=HI)
    assert answer.model == checkpoint.fine_tuned_model_checkpoint
    folder = str(openai_daemon.context.home.model(checkpoint.id))
    assert openai_daemon.answers.asked[-1][0] == Target(BASE, folder)
    gone: Any = [{"role": "user", "content": "gone"}]
    with pytest.raises(NotFoundError, match="has just been deleted"):
        client.chat.completions.create(model=checkpoint.fine_tuned_model_checkpoint, messages=gone)
    client.fine_tuning.jobs.cancel(job.id)


def test_a_model_is_asked_in_the_form_that_it_was_tuned_on(
    client: OpenAI, openai_daemon: OpenAIDaemon, training_file: str
) -> None:
    job = client.fine_tuning.jobs.create(model=BASE, training_file=training_file, seed=6)
    openai_daemon.jobs.go_on(job.id, steps=[20])
    (checkpoint,) = client.fine_tuning.jobs.checkpoints.list(job.id)
    name, folder = checkpoint.fine_tuned_model_checkpoint, openai_daemon.context.home.model(checkpoint.id)
    several: Any = [{"role": "system", "content": "Be brief."}, *HI]
    for form, prompt in (("messages", HI), ("text", HI), ("prompt", "hi"), (None, HI)):
        (folder / TUNING).write_text(json.dumps({"digest": "0", **({"form": form} if form else {})}))
        client.chat.completions.create(model=name, messages=HI)
        assert openai_daemon.answers.asked[-1][1] == prompt
        assert client.models.retrieve(name).to_dict().get("isthmus") == ({"form": form} if form else None)
        if form != "prompt":
            client.chat.completions.create(model=name, messages=several)
            continue
        with pytest.raises(BadRequestError, match="tuned on prompt and completion") as caught:
            client.chat.completions.create(model=name, messages=several)
        assert caught.value.param == "messages"
    for told in ("[]", '"text"', "[" * 9999):
        (folder / TUNING).write_text(told)
        assert "isthmus" not in client.models.retrieve(name).to_dict()
    assert TUNING == TUNING_INFO
    client.fine_tuning.jobs.cancel(job.id)


def test_a_stream_is_the_same_answer(client: OpenAI) -> None:
    whole = client.chat.completions.create(model=BASE, messages=HI, n=2, logprobs=True, top_logprobs=1)
    chunks = list(
        client.chat.completions.create(
            model=BASE, messages=HI, n=2, logprobs=True, top_logprobs=1, stream=True,
            stream_options={"include_usage": True, "include_obfuscation": False},
        )
    )  # fmt: skip
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert {chunk.usage for chunk in chunks[:-1]} == {None}
    for index, choice in enumerate(whole.choices):
        parts = [part for chunk in chunks for part in chunk.choices if part.index == index]
        assert parts[0].delta.role == "assistant"
        assert "".join(part.delta.content or "" for part in parts) == choice.message.content
        assert [part.finish_reason for part in parts if part.finish_reason] == [choice.finish_reason]
        assert choice.logprobs is not None
        shown = [token for part in parts if part.logprobs for token in part.logprobs.content or []]
        assert shown == choice.logprobs.content


def test_a_client_that_goes_ends_its_answer(client: OpenAI, openai_daemon: OpenAIDaemon) -> None:
    while openai_daemon.answers.closed.acquire(blocking=False):
        pass
    stream = client.chat.completions.create(model=BASE, messages=[{"role": "user", "content": "stays"}], stream=True)
    assert next(stream).choices[0].delta.role == "assistant"
    stream.close()
    assert openai_daemon.answers.closed.acquire(timeout=20)
    with pytest.raises(Exception, match="timed out"):
        client.with_options(timeout=0.3).chat.completions.create(
            model=BASE, messages=[{"role": "user", "content": "stays"}]
        )
    assert openai_daemon.answers.closed.acquire(timeout=20)


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
SATISFIED: dict[str, Any] = {
    "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "user": "me", "store": False, "metadata": {},
    "response_format": {"type": "text"}, "modalities": ["text"], "verbosity": "medium", "reasoning_effort": "none",
    "service_tier": "auto", "tools": [], "tool_choice": "none", "parallel_tool_calls": False,
    "safety_identifier": "me", "prompt_cache_key": "k", "function_call": "none", "prediction": None, "audio": None,
}  # fmt: skip


def test_fields_that_ask_for_what_happens_anyway_are_taken(client: OpenAI, openai_daemon: OpenAIDaemon) -> None:
    client.chat.completions.create(model=BASE, messages=HI, **SATISFIED)
    assert asked(openai_daemon) == Sampling()


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"frequency_penalty": 0.1}, "frequency_penalty"),
        ({"presence_penalty": True}, "presence_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"store": True}, "store"),
        ({"metadata": {"a": "b"}}, "metadata"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"verbosity": "low"}, "verbosity"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"audio": {"voice": "ash", "format": "mp3"}}, "audio"),
        ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"extra_body": {"top_k": 3}}, "top_k"),
        ({"n": 129}, "n"),
        ({"n": 0}, "n"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"stop": []}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"user": None}, "user"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content"),
        ({"messages": [*HI, {"role": "assistant", "content": None, "tool_calls": [CALL]}]}, "messages[1].tool_calls"),
        ({"messages": [*HI, {"role": "assistant", "tool_calls": [CALL]}]}, "messages[1].tool_calls"),
        ({"messages": [*HI, {"role": "user", "content": "x", "name": "me"}]}, "messages[1].name"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
         "messages[0].content"),
    ],
)  # fmt: skip
def test_others_are_refused_by_name(client: OpenAI, options: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        client.chat.completions.create(**{"model": BASE, "messages": HI, **options})
    assert caught.value.param == param
