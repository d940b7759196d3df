"""A turn of a chat sends its new tokens alone, and gives the text of a fresh run."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.cloud.clouds import Home, ThreadServer, served
from support.models.tiny import WINDOW
from support.models.writing_model import LONGEST, writing_checkpoint

from isthmus.backbone.checkpoints.chat_template import ChatTemplate
from isthmus.common.errors import ConfigError
from isthmus.common.shutdown import StopRequest
from isthmus.edge.config.client_config import GenerateConfig
from isthmus.edge.generation.conversation import Conversation
from isthmus.edge.generation.text_generator import TextGenerator, text_generator

from .conftest import Opener

TURNS = ("Good morning", "Tell me more", "Why?")
NEW = 12


class PlainTemplate(ChatTemplate):
    """The tiny model's template, rendered without a process."""

    def render(self, conversation: object, *, add_generation_prompt: bool) -> str:
        messages = "".join(f"<s>{each['role']}\n{each['content']}</s>\n" for each in conversation)  # type: ignore[attr-defined]
        return messages + "<s>assistant\n" * add_generation_prompt


def conversation(generator: TextGenerator) -> Conversation:
    return Conversation(generator, PlainTemplate(generator.tokenizer))


def fresh(generator: TextGenerator, messages: list[dict[str, str]]) -> str:
    """What a run without a cache of turns before answers."""
    text = PlainTemplate(generator.tokenizer).render(messages, add_generation_prompt=True)
    return generator.text(generator.generate([generator.ids(text, templated=True)])[0])


def test_the_template_is_the_models(generator: TextGenerator) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with ChatTemplate(generator.tokenizer) as template:
        expected = template.render(messages, add_generation_prompt=True)
    assert PlainTemplate(generator.tokenizer).render(messages, add_generation_prompt=True) == expected


def test_a_turn_sends_its_new_tokens_alone(generator: TextGenerator, sent: list[int]) -> None:
    chat = conversation(generator)
    answers = []
    for turn in TURNS:
        before = len(sent)
        answers.append(chat.answer(turn))
        first, *others = sent[before:]
        assert others == [1] * (NEW - 1)
        asked = len(f"<user\n{turn}>\n<assistant\n")  # one token each for special ones
        assert first == asked + (len("x>\n") if len(answers) > 1 else 0)  # the end of the answer before
    assert len(set(answers)) == len(TURNS)
    for number in range(len(TURNS)):
        before = len(sent)
        assert fresh(generator, chat.messages[: 2 * number + 1]) == answers[number]
        assert number == 0 or sent[before] > len("user\nGood morning")  # all turns before


def test_an_answer_that_changes_crops_the_cache(generator: TextGenerator, sent: list[int]) -> None:
    chat = conversation(generator)
    chat.answer(TURNS[0])
    chat.messages[-1]["content"] = chat.messages[-1]["content"][:4] + "!"
    before = len(sent)
    answer = chat.answer(TURNS[1])
    assert sent[before] == len(f"!>\n<user\n{TURNS[1]}>\n<assistant\n")
    assert answer == fresh(generator, chat.messages[:-1])


def test_without_a_cache_the_text_is_the_same(opener: Opener, sent: list[int]) -> None:
    texts = []
    for cache in (True, False):
        with opener(cache=cache) as generator:
            chat = conversation(generator)
            texts.append([chat.answer(turn) for turn in TURNS[:2]])
            assert (chat._cache is None) == (not cache)
        if cache:
            calls = len(sent)
    assert texts[0] == texts[1]
    assert len(sent) == calls > 0


def test_a_conversation_that_fills_the_model_is_shortened_and_then_refused(opener: Opener) -> None:
    with opener(max_new_tokens=LONGEST) as generator:
        chat = conversation(generator)
        answer = chat.answer("x" * (LONGEST - 30))
        assert 0 < len(answer) < 30
        with pytest.raises(ConfigError, match=f"the model takes {LONGEST}: begin a new one"):
            chat.answer("more")


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThreadServer]:
    folder = tmp_path_factory.mktemp("windowed")
    model = writing_checkpoint("mistral", folder / "model")
    with ThreadServer(served(model, folder / "parts"), Home(folder)) as running:
        yield running


def test_a_full_window_is_gone_on_with_and_begins_anew_where_it_would_be_cropped(
    windowed: ThreadServer, tmp_path: Path
) -> None:
    with windowed.link() as link:
        link.open(5)
        with text_generator(link, GenerateConfig(cloud="-", max_new_tokens=NEW), None) as generator:
            chat = conversation(generator)
            chat.answer(TURNS[0])
            kept = chat._cache
            assert kept.get_seq_length() > WINDOW
            second = chat.answer(TURNS[1])
            assert chat._cache is kept
            assert second == fresh(generator, chat.messages[:3])
            chat.messages[-1]["content"] = "no"
            third = chat.answer(TURNS[2])
            assert chat._cache is not kept
            assert third == fresh(generator, chat.messages[:5])


class InterruptingWriter:
    """A streamer that sends Ctrl-C at the third token, so many times."""

    def __init__(self, times: int) -> None:
        self._times, self._tokens = times, 0

    def put(self, _tokens: object) -> None:
        self._tokens += 1
        if self._tokens == 4:  # the first one is the prompt
            for _ in range(self._times):
                signal.raise_signal(signal.SIGINT)

    def end(self) -> None:
        pass


def test_ctrl_c_ends_the_answer_and_the_next_one_goes_on(generator: TextGenerator, sent: list[int]) -> None:
    chat, stop = conversation(generator), StopRequest(second="stopped", signals=(signal.SIGINT,))
    sessions = generator.model.remote_layers.span._link._keeper.traffic.sessions
    with stop.listen(lambda line: None):
        cut = chat.answer(TURNS[0], writer=InterruptingWriter(1), stop=stop)  # type: ignore[arg-type]
    assert 3 <= len(cut) < NEW // 2
    before = len(sent)
    answer = chat.answer(TURNS[1])
    assert len(answer) == NEW
    assert sent[before] == len(f"x>\n<user\n{TURNS[1]}>\n<assistant\n")
    assert answer == fresh(generator, chat.messages[:-1])
    assert generator.model.remote_layers.span._link._keeper.traffic.sessions == sessions
    assert len(conversation(generator).answer(TURNS[0])) == NEW  # nobody asks it to stop


def test_a_second_ctrl_c_in_an_answer_ends_the_program(generator: TextGenerator) -> None:
    chat, stop = conversation(generator), StopRequest(second="stopped", signals=(signal.SIGINT,))
    with pytest.raises(KeyboardInterrupt, match="stopped"), stop.listen(lambda line: None):
        chat.answer(TURNS[0], writer=InterruptingWriter(2), stop=stop)  # type: ignore[arg-type]
    assert chat.messages == []
