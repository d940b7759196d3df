"""Rendering a model's chat template, with limits.

A chat template is a program that comes with a model. Jinja's sandbox keeps it from the machine, and limits neither its
time nor its memory: two nested loops run for ever, and one product of a text fills the memory. So a process of its own
renders, with transformers' own function, and its limits are the system's:

    time      CPU seconds of one rendering; the system ends the process when they are over
    memory    of its address space, beside what it has when it starts; on Linux alone, which says how much that is
    output    characters of one rendering

The process starts with the first conversation, serves all of them one by one, and ends with the block. It imports no
torch, and starts within a second or two.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

from isthmus.common.errors import ChatTemplateError, DataError
from isthmus.common.terminal import printable

Conversation = Sequence[Mapping[str, str]]

_MAX_REASON = 300
_STATM = Path("/proc/self/statm")
_OUT_OF_MEMORY = 3
_REMEDY = "ask the model's owner, or give prompt and completion instead of messages"


@dataclass(frozen=True, slots=True)
class TemplateLimits:
    """What one rendering may take.

    A long conversation takes milliseconds and some megabytes in templates that are known.
    """

    cpu_seconds: float = 5.0
    memory_bytes: int = 512 << 20
    characters: int = 16 << 20


class ChatTemplate:
    """A tokenizer's chat template; use it as a context manager."""

    def __init__(self, tokenizer: Any, limits: TemplateLimits | None = None) -> None:
        self._tokenizer = tokenizer
        self._limits = limits or TemplateLimits()
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def exists(self) -> bool:
        """Whether the tokenizer has a template."""
        return bool(self._tokenizer.chat_template)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process that renders."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.communicate()

    def render(self, conversation: Conversation, *, add_generation_prompt: bool) -> str:
        """The conversation as one text, as `tokenizer.apply_chat_template` gives it.

        Args:
            conversation: Messages with `role` and `content`; at least one.
            add_generation_prompt: Whether the beginning of an answer follows.

        Raises:
            ChatTemplateError: A limit is exceeded.
            DataError: The template refuses the conversation, or is no template.
        """
        question = {"conversation": [dict(each) for each in conversation], "prompt": add_generation_prompt}
        try:
            answer = _ask(self._child or self._start(), question, self._limits)
        except (BrokenPipeError, EOFError):
            why = self._why_ended(self._child)
            self.close()
            raise ChatTemplateError(f"the model's chat template {why}; {_REMEDY}") from None
        except BaseException:
            self.close()  # a question may be half sent, or its answer half read
            raise
        if "text" in answer:
            return str(answer["text"])
        if "length" in answer:
            raise ChatTemplateError(
                f"the model's chat template makes {answer['length']} characters of a conversation, more than "
                f"{self._limits.characters}; {_REMEDY}"
            )
        raise DataError(f"the model's chat template refuses the conversation ({answer['refused']}); change its roles.")

    def _why_ended(self, child: subprocess.Popen[bytes] | None) -> str:
        code = None if child is None else child.wait()
        if code == -signal.SIGPROF:
            return f"takes more than {self._limits.cpu_seconds:g} s of computing for a conversation"
        if code == _OUT_OF_MEMORY:
            return f"takes more than {self._limits.memory_bytes >> 20} MiB of memory for a conversation"
        return f"cannot be rendered: the process that does it ended with code {code}"

    def _start(self) -> subprocess.Popen[bytes]:
        try:
            template = self._tokenizer.get_chat_template()
        except ValueError as error:  # of several named templates, none is called `default`
            reason = printable(" ".join(str(error).split()))[:_MAX_REASON]
            raise DataError(f"the model's chat template is not clear ({reason}); {_REMEDY}") from None
        # -P: nothing is imported from the folder that the user happens to be in.
        command = [sys.executable, "-P", "-m", "isthmus.backbone.checkpoints.chat_template"]
        environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error"}
        # Kept before it is written to: where it ends in between, `render` says why and waits for it.
        child = self._child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # else Ctrl-C at the terminal would end it, too
        )
        limits = self._limits
        _write(
            child.stdin,
            {
                "template": template,
                "tokens": self._tokenizer.special_tokens_map,
                "limits": [limits.cpu_seconds, limits.memory_bytes, limits.characters],
            },
        )
        return child


def _ask(child: subprocess.Popen[bytes], question: Mapping[str, Any], limits: TemplateLimits) -> dict[str, Any]:
    _write(child.stdin, question)
    if child.stdout is None:
        raise EOFError
    # JSON writes a character of any script in 12 bytes at most.
    line = child.stdout.readline(12 * limits.characters + 1024)
    if not line.endswith(b"\n"):
        raise EOFError
    answer: dict[str, Any] = json.loads(line)
    return answer


def _write(stream: IO[bytes] | None, value: Mapping[str, Any]) -> None:
    if stream is None:
        raise EOFError
    stream.write(json.dumps(value).encode() + b"\n")
    stream.flush()


# The process that renders ---------------------------------------------------------------------------------------------


def _serve(questions: IO[bytes], answers: IO[bytes]) -> None:
    """Answer questions until there are no more."""
    from transformers.utils.chat_template_utils import render_jinja_template

    about = json.loads(questions.readline())
    cpu_seconds, memory_bytes, characters = about["limits"]
    _limit_memory(memory_bytes)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    for line in questions:
        question = json.loads(line)
        # Nobody handles the signal, so the system ends this process, whatever it is in the middle of.
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        try:
            (text,), _ = render_jinja_template(
                conversations=[question["conversation"]],
                chat_template=about["template"],
                add_generation_prompt=question["prompt"],
                **about["tokens"],
            )
            answer: dict[str, Any] = {"text": text} if len(text) <= characters else {"length": len(text)}
        except MemoryError:
            os._exit(_OUT_OF_MEMORY)
        except Exception as error:  # noqa: BLE001 - a stranger's program fails in any way it likes; the answer says so
            answer = {"refused": printable(str(error) or type(error).__name__)[:_MAX_REASON]}
        signal.setitimer(signal.ITIMER_PROF, 0)
        _write(answers, answer)


def _limit_memory(more: int) -> None:
    """Let this process have so many bytes of address space beside what it has.

    Systems without `/proc/self/statm`, such as macOS, do not say how much it has: there its memory has no limit.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        pages = int(_STATM.read_bytes().split()[0])
    except FileNotFoundError:
        return
    most = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


if __name__ == "__main__":
    _serve(sys.stdin.buffer, sys.stdout.buffer)
