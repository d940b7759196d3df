"""Plain completions, by the official SDK."""

from __future__ import annotations

from typing import Any

import pytest
from openai import BadRequestError, OpenAI
from support.daemon.openai_fakes import BASE, WORDS, OpenAIDaemon

from isthmus.daemon.serving.answers import Sampling, Target


def test_an_answer(client: OpenAI, openai_daemon: OpenAIDaemon) -> None:
    answer = client.completions.create(model=BASE, prompt="a", user="me", best_of=1, suffix=None)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, choice.logprobs) == ("".join(WORDS), "stop", None)
    assert answer.usage is not None
    assert answer.usage.total_tokens == 13
    assert openai_daemon.answers.asked[-1] == (Target(BASE), "a", Sampling(max_tokens=16))


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1, 2], [3]], [[1, 2], [3]])],
)
def test_the_four_forms_of_a_prompt(client: OpenAI, openai_daemon: OpenAIDaemon, prompt: Any, prompts: Any) -> None:
    answer = client.completions.create(model=BASE, prompt=prompt, n=2, max_tokens=2)
    assert [each[1] for each in openai_daemon.answers.asked[-len(prompts) :]] == prompts
    assert [choice.index for choice in answer.choices] == list(range(2 * len(prompts)))
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5 * len(prompts), 4 * len(prompts))


def test_logprobs_are_lists_of_one_item_for_each_token(client: OpenAI) -> None:
    answer = client.completions.create(model=BASE, prompt="a", logprobs=1, max_tokens=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.to_dict() == {
        "tokens": ["Once", " upon"],
        "token_logprobs": [-0.25, -0.25],
        "top_logprobs": [{"bytes:\\xe2\\x82": -2.5, "Once": -0.25}, {"bytes:\\xe2\\x82": -2.5, " upon": -0.25}],
        "text_offset": [0, 4],
    }


def test_a_stream_is_the_same_answer(client: OpenAI) -> None:
    options: dict[str, Any] = {"model": BASE, "prompt": ["x", "y"], "n": 2, "max_tokens": 3}
    for more in ({"echo": True}, {"logprobs": 2}):
        whole = client.completions.create(**options, **more)
        chunks = list(client.completions.create(**options, **more, stream=True, stream_options={"include_usage": True}))
        assert chunks[-1].usage == whole.usage
        assert chunks[-1].choices == []
        for choice in whole.choices:
            parts = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
            assert "".join(part.text for part in parts) == choice.text
            assert parts[-1].finish_reason == choice.finish_reason
            offsets = [offset for part in parts if part.logprobs for offset in part.logprobs.text_offset or []]
            assert offsets == (choice.logprobs.text_offset if choice.logprobs else [])
    assert client.completions.create(**options, echo=True).choices[2].text == "yOnce upon a"


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a"] * 65, "n": 2}, "prompt"),
        ({"prompt": [1], "echo": True}, "echo"),
        ({"echo": True, "logprobs": 0}, "echo"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": 6}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"extra_body": {"messages": []}}, "messages"),
    ],
)
def test_others_are_refused_by_name(client: OpenAI, options: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        client.completions.create(**{"model": BASE, "prompt": "a", **options})
    assert caught.value.param == param
