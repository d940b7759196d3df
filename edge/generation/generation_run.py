"""The three uses of `isthmus edge generate`: one answer, a conversation, and a file of texts."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TextIO

from isthmus.backbone.checkpoints.chat_template import ChatTemplate
from isthmus.common.errors import ConfigError, DataError
from isthmus.common.progress import LINES, StepProgress
from isthmus.common.shutdown import StopRequest
from isthmus.edge.client.link import Link
from isthmus.edge.generation.batch_file import Answers, BatchText
from isthmus.edge.generation.conversation import Conversation
from isthmus.edge.generation.text_generator import TextGenerator
from isthmus.edge.generation.text_writer import TextWriter


def answer_once(generator: TextGenerator, link: Link, prompt: str, *, chat: bool, as_json: bool, out: TextIO) -> None:
    """Continue a prompt, with `chat` a user's message in the chat template, and write the text as it comes.

    Args:
        as_json: Whether one JSON object is written at the end instead.

    Raises:
        ConfigError: The model has no chat template, or the prompt is empty.
        IsthmusError: Of whatever other kind fits.
    """
    if chat:
        with _template_of(generator) as template:
            prompt = template.render([{"role": "user", "content": prompt}], add_generation_prompt=True)
    ids = generator.ids(prompt, templated=chat)
    generator.seed()
    start = time.monotonic()
    (new,) = generator.generate([ids], writer=None if as_json else TextWriter(generator.tokenizer, out))
    if not as_json:
        return
    seconds, traffic = time.monotonic() - start, link.totals()
    result = {
        "text": generator.text(new),
        "bytes_up": traffic.bytes_up,
        "bytes_down": traffic.bytes_down,
        "tokens": len(new),
        "seconds": seconds,
        "tokens_per_s": len(new) / seconds,
    }
    out.write(json.dumps(result) + "\n")


def converse(generator: TextGenerator, out: TextIO) -> None:
    """Answer what is typed, line by line, until Ctrl-D. Ctrl-C ends an answer, and a second one the program.

    Raises:
        ConfigError: The model has no chat template, or the conversation is longer than it takes.
        DataError: A line is not UTF-8.
        KeyboardInterrupt: Ctrl-C came twice during an answer.
        IsthmusError: Of whatever other kind fits.
    """
    terminal = sys.stdin.isatty() and out.isatty()
    if terminal:
        import readline  # noqa: F401  # input() edits lines with it
    with _template_of(generator) as template:
        conversation = Conversation(generator, template)
        stop = StopRequest(second="stopped", signals=(signal.SIGINT,))
        generator.seed()
        while True:
            try:
                text = _typed("> " if terminal else "")
            except KeyboardInterrupt:
                print("\n(Ctrl-D ends the conversation.)", file=sys.stderr, flush=True)
                continue
            except EOFError:
                break
            if text.strip():
                with stop.listen(lambda line: None):
                    conversation.answer(text, writer=TextWriter(generator.tokenizer, out), stop=stop)
    if terminal:
        out.write("\n")


def answer_all(
    generator: TextGenerator,
    texts: Sequence[BatchText],
    answers: Answers | None,
    out: TextIO,
    progress: StepProgress | None = None,
) -> None:
    """Answer the texts of a file, some at a time and in their order, and write each answer when it is there.

    Args:
        answers: The file that they go to, which may have the first ones already; None for `out`.
        progress: Where progress is shown; None for standard error.

    Raises:
        DataError: A text is none for this model; the message names its line, and nothing was generated.
        KeyboardInterrupt: Ctrl-C; what is written can be gone on with.
        IsthmusError: Of whatever other kind fits.
    """
    prompts = _prompts(generator, texts)

    def show(line: str) -> None:
        out.write(line + "\n")
        out.flush()

    done, write = (0, show) if answers is None else (answers.done, answers.append)
    if answers is not None:
        answers.begin()
    # A draft is of one text.
    size = 1 if generator.settings.draft != "none" else generator.settings.batch_size
    # Whole groups, so that lines of progress come about as often as those of other commands.
    progress = progress or StepProgress("text", len(texts), every=size * max(1, len(texts) // size // LINES))
    tokens, begun = 0, time.monotonic()
    progress.start(done)
    with progress:
        try:
            # Groups are the same whatever is done already, and one that was cut off is computed again as a whole: so
            # a run that is gone on with gives the texts of one that was not cut off.
            for first in range(0, len(texts), size):
                if first + size <= done or done == len(texts):
                    continue
                group = texts[first : first + size]
                generator.seed(first)
                new = generator.generate([prompts[text.index] for text in group])
                for text, ids in zip(group, new, strict=True):
                    if text.index >= done:
                        write(text.line(generator.text(ids), len(ids)))
                        done, tokens = text.index + 1, tokens + len(ids)
                progress.show(done, f"{tokens / (time.monotonic() - begun):.1f} tokens/s")
        except KeyboardInterrupt:
            remedy = "" if answers is None else "; the same command goes on from there"
            raise KeyboardInterrupt(f"stopped after {done} of {len(texts)} texts{remedy}") from None


def _typed(prompt: str) -> str:
    try:
        return input(prompt)
    except UnicodeDecodeError as error:
        raise DataError(f"a line of standard input is not UTF-8 (byte {error.start}): save it as UTF-8.") from error


def _template_of(generator: TextGenerator) -> ChatTemplate:
    template = ChatTemplate(generator.tokenizer)
    if not template.exists:
        raise ConfigError("the model's tokenizer has no chat template: leave out --chat, or give 'prompt' in --batch")
    return template


def _prompts(generator: TextGenerator, texts: Sequence[BatchText]) -> list[list[int]]:
    """The tokens of all texts, by their number."""
    most, longest = generator.settings.max_new_tokens, generator.longest
    prompts = []
    with ExitStack() as stack:
        template = None
        for text in texts:
            written = text.prompt
            try:
                if text.messages:
                    template = template or stack.enter_context(_template_of(generator))
                    messages = [{"role": role, "content": content} for role, content in text.messages]
                    written = template.render(messages, add_generation_prompt=True)
                ids = generator.ids(written, templated=bool(text.messages))
            except (ConfigError, DataError) as error:
                raise DataError(f"{text.where}: {error}") from error
            if len(ids) + most > longest:
                raise DataError(
                    f"{text.where}: {len(ids)} tokens and {most} new ones are more than the {longest} that the model "
                    "takes; shorten it, or lower --max-new-tokens."
                )
            prompts.append(ids)
    return prompts
