"""What the APIs ask of the process that generates."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from isthmus.daemon.daemon_settings import DaemonSettings
from isthmus.daemon.home import Home
from isthmus.daemon.state.database import Database


@dataclass(frozen=True, slots=True)
class Target:
    """What answers.

    Attributes:
        base: Name of the base model (`isthmus.daemon.state.tables.BaseModel`).
        adapter: Its adapter's folder, absolute; None for the base model itself.
    """

    base: str
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        n: Answers to the one prompt. Their seeds are `seed`, `seed` + 1, and so on.
        max_tokens: New ones at most; None for what the model's window leaves.
        temperature: 0 for the likeliest token each time.
        seed: None for another one each time.
        stop: Texts that end an answer and are not part of it.
        stop_tokens: Sequences of tokens that end an answer; they are part of its tokens.
        logprobs: Whether the natural logarithm of each new token's probability is wanted, at temperature 1 and before
            top_p and top_k.
        top_logprobs: So many of the likeliest tokens beside it.
        prompt_logprobs: Whether those of the prompt's tokens are wanted, from the second on.
    """

    n: int = 1
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_tokens: Sequence[Sequence[int]] = ()
    logprobs: bool = False
    top_logprobs: int = 0
    prompt_logprobs: bool = False


@dataclass(frozen=True, slots=True)
class TokenChance:
    """A token, its text and bytes (`raw`; not always whole characters), its log probability, and the likeliest beside."""

    token: int
    text: str
    raw: bytes
    logprob: float
    top: Sequence[tuple[int, str, bytes, float]] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer.

    Attributes:
        index: Which of the `n` answers.
        text: What is new; empty where a character is not whole yet, or a stop text may have begun.
        tokens: The new tokens behind `text`.
        chances: One for each of `tokens`, where log probabilities are wanted.
        finish: "stop" or "length" with an answer's last piece.
        prompt_tokens: With the first piece, how many the prompt has.
        prompt_chances: With the first piece, where they are wanted; None for the first token.
    """

    index: int
    text: str
    tokens: Sequence[int]
    chances: Sequence[TokenChance] = ()
    finish: str | None = None
    prompt_tokens: int | None = None
    prompt_chances: Sequence[TokenChance | None] = ()


Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
"""A text, tokens, or messages (`role`, `content`) for the model's chat template."""


class BusyError(Exception):
    """As many requests wait already as may."""


class Answers:
    """The process that generates, for one event loop.

    It is started when it is needed first, and anew when it has died; what it was answering then ends with
    `isthmus.common.errors.WorkerDiedError`.
    """

    def __init__(self, settings: DaemonSettings, home: Home, database: Database) -> None:
        raise NotImplementedError

    def generate(self, target: Target, prompt: Prompt, sampling: Sampling) -> AsyncIterator[Piece]:
        """The pieces of the answers as they come; to close the iterator ends them.

        Raises:
            BusyError: Too many wait.
            WorkerError: Whatever else is wrong, with its exit code (docs/exit-codes.md): 10 for a prompt that is empty
                or too long, 40 where the cloud is away.
        """
        raise NotImplementedError

    async def tokenizer_files(self, base: str) -> Mapping[str, bytes]:
        """The files of a base model's tokenizer, by name, with its chat template."""
        raise NotImplementedError

    async def look(self) -> None:
        """Ask every cloud of the settings what it serves, and note it (`BaseModel`). One that is away is left out."""
        raise NotImplementedError

    async def state(self) -> Mapping[str, Any]:
        """For status and the page: `pid`, `rss_bytes`, `hot` adapters, `clouds` (name, reachable, model, bytes up, down)."""
        raise NotImplementedError

    async def stop(self) -> None:
        """End the process."""
        raise NotImplementedError
