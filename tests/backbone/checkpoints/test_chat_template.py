"""Chat templates: rendered as transformers renders them, and ended where they take more than they may."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.models.tiny import tiny_tokenizer

from isthmus.backbone.checkpoints import chat_template
from isthmus.backbone.checkpoints.chat_template import ChatTemplate, TemplateLimits
from isthmus.common.errors import ChatTemplateError, DataError
from isthmus.edge.data.batches import encode
from isthmus.edge.data.readers import Example

CHAT = [
    {"role": "system", "content": "Sei höflich. \U0001f600"},
    {"role": "user", "content": "hi\n</s> {{ 1 }}"},
    {"role": "assistant", "content": "yo"},
]
LIMITS = TemplateLimits(cpu_seconds=0.5, memory_bytes=64 << 20, characters=10_000)
FEATURES = (
    "{{ bos_token }}{% set ns = namespace(n=0) %}{% for m in messages %}{% if loop.index0 > 5 %}{% break %}{% endif %}"
    "{% set ns.n = ns.n + 1 %}{{ m.role | tojson }}: {{ m['content'] | trim }}{{ eos_token }}{{ ns.n }}"
    "{% generation %}x{% endgeneration %}{% endfor %}{{ strftime_now('%Y') }}"
    "{% if add_generation_prompt %}<go>{% endif %}"
)
BOMBS = {
    "one loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}{% endfor %}"
    "{% endfor %}{% endfor %}",
    "a power": "{{ (9 ** 9) ** (9 ** 9) }}",
}
LARGE = {
    "a product": "{{ 'a' * 10 ** 12 }}",
    "a list": "{{ ([[0]] * 10 ** 10) | length }}",
    "a join": "{% set ns = namespace(t='aaaaaaaaaaaaaaaa') %}{% for i in range(60) %}{% set ns.t = ns.t ~ ns.t %}"
    "{% endfor %}{{ ns.t | length }}",
    "a width": "{{ '%1000000000d' % 1 }}",
}


def tokenizer(template: str | None = None) -> Any:
    made = tiny_tokenizer()
    if template is not None:
        made.chat_template = template
    return made


@pytest.fixture
def limited() -> Iterator[Any]:
    """Templates under tight limits, closed at the end."""
    opened: list[ChatTemplate] = []

    def make(template: str) -> ChatTemplate:
        opened.append(ChatTemplate(tokenizer(template), LIMITS))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


@pytest.mark.parametrize("template", [None, FEATURES])
@pytest.mark.parametrize("prompt", [True, False])
def test_a_conversation_is_what_transformers_makes_of_it(template: str | None, prompt: bool) -> None:
    made = tokenizer(template)
    expected = made.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=prompt)
    with ChatTemplate(made) as rendered:
        assert rendered.render(CHAT, add_generation_prompt=prompt) == expected
        assert rendered.render(CHAT[1:], add_generation_prompt=prompt) != expected
        assert made(expected, add_special_tokens=False)["input_ids"] == list(
            made.apply_chat_template(CHAT, add_generation_prompt=prompt)["input_ids"]
        )


@pytest.mark.parametrize("name", BOMBS)
def test_a_template_without_end_is_ended(limited: Any, name: str) -> None:
    with pytest.raises(ChatTemplateError, match=r"more than 0\.5 s of computing"):
        limited(BOMBS[name]).render(CHAT, add_generation_prompt=False)


@pytest.mark.parametrize("name", LARGE)
def test_a_template_that_fills_the_memory_is_ended(limited: Any, name: str) -> None:
    # Jinja's sandbox has a limit of its own for some of these, which is an error of the template.
    with pytest.raises((ChatTemplateError, DataError), match=r"more than 64 MiB of memory|refuses") as caught:
        limited(LARGE[name]).render(CHAT, add_generation_prompt=False)
    assert name not in ("a product", "a join") or isinstance(caught.value, ChatTemplateError)


def test_a_template_that_writes_too_much_is_refused(limited: Any) -> None:
    assert len(limited("{{ 'a' * 10000 }}").render(CHAT, add_generation_prompt=False)) == 10_000
    with pytest.raises(ChatTemplateError, match="makes 10001 characters of a conversation, more than 10000"):
        limited("{{ 'a' * 10001 }}").render(CHAT, add_generation_prompt=False)


def test_the_next_conversation_is_rendered_after_one_that_was_ended(limited: Any) -> None:
    template = limited("{% if messages[0].content == 'x' %}{{ 'a' * 10 ** 12 }}{% endif %}fine")
    with pytest.raises(ChatTemplateError):
        template.render([{"role": "user", "content": "x"}], add_generation_prompt=False)
    assert template.render(CHAT, add_generation_prompt=False) == "fine"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('roles must\x1b[2J alternate') }}", r"roles must\?\[2J alternate"),
        ("{% for", "refuses"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.nothing.at.all }}", "no attribute"),
    ],
)
def test_a_template_that_fails_is_one_clear_error(limited: Any, template: str, says: str) -> None:
    with pytest.raises(DataError, match=says) as caught:
        limited(template).render(CHAT, add_generation_prompt=False)
    assert str(caught.value).isprintable()


def test_one_process_serves_all_conversations_and_ends_with_the_block() -> None:
    with ChatTemplate(tokenizer()) as template:
        template.render(CHAT, add_generation_prompt=False)
        child = template._child
        template.render(CHAT, add_generation_prompt=False)
        assert template._child is child
        assert child is not None
        assert child.poll() is None
    assert child.poll() is not None


def test_a_process_that_is_killed_is_told_of(limited: Any) -> None:
    template = limited("fine")
    template.render(CHAT, add_generation_prompt=False)
    os.kill(template._child.pid, signal.SIGKILL)
    with pytest.raises(ChatTemplateError, match="ended with code -9"):
        template.render(CHAT, add_generation_prompt=False)


def test_a_process_that_ends_while_it_is_given_its_template_is_told_of_and_waited_for(
    limited: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = limited("{# " + "a" * (4 << 20) + " #}")  # more than a pipe takes in one write
    started: list[Any] = []
    real = subprocess.Popen

    def dying(_command: list[str], **options: Any) -> Any:
        started.append(real([sys.executable, "-c", "raise SystemExit(7)"], **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", dying)
    with pytest.raises(ChatTemplateError, match="ended with code 7"):
        template.render(CHAT, add_generation_prompt=False)
    assert [child.returncode for child in started] == [7]
    monkeypatch.undo()
    assert template.render(CHAT, add_generation_prompt=False) == ""


def test_named_templates_without_a_default_are_one_clear_error() -> None:
    made = tokenizer()
    made.chat_template = {"tool_use": "{{ 1 }}", "rag": "{{ 2 }}"}
    with ChatTemplate(made) as template, pytest.raises(DataError, match=r"is not clear \(.*tool_use.*") as caught:
        template.render(CHAT, add_generation_prompt=False)
    assert str(caught.value).isprintable()
    made.chat_template = {"tool_use": "{{ 1 }}", "default": "{{ 2 }}"}
    with ChatTemplate(made) as template:
        assert template.render(CHAT, add_generation_prompt=False) == "2"


def test_a_system_that_does_not_say_how_much_memory_there_is_has_no_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_to: list[int] = []
    monkeypatch.setattr(chat_template.resource, "setrlimit", lambda kind, _: set_to.append(kind))
    chat_template._limit_memory(1 << 20)
    monkeypatch.setattr(chat_template, "_STATM", tmp_path / "none")  # as on macOS
    chat_template._limit_memory(1 << 20)
    assert set_to == [resource.RLIMIT_CORE, resource.RLIMIT_AS, resource.RLIMIT_CORE]


def test_nothing_is_imported_from_where_the_user_is(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "transformers.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    with ChatTemplate(tokenizer()) as template:
        assert template.render(CHAT, add_generation_prompt=False)


def test_the_data_of_a_run_name_the_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.backbone.checkpoints.chat_template.TemplateLimits", lambda: LIMITS)
    turns = tuple((each["role"], each["content"]) for each in CHAT)
    with pytest.raises(ChatTemplateError, match=r"^x, line 7: the model's chat template takes more than 0\.5 s"):
        encode([Example("", "", turns, "x, line 7")], tokenizer(BOMBS["one loop"]), 100)
