"""What is asked of the process that generates, and what it answers, with their forms as trees of plain values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

MAX_ANSWERS = 128
"""Answers to one prompt."""
MAX_NEW_TOKENS = 1 << 18
"""Tokens of all answers to one prompt together."""
MAX_PROMPT_CHARACTERS = 4 << 20
MAX_PROMPT_TOKENS = 1 << 18
MAX_MESSAGES = 4096
MAX_STOPS = 16
MAX_STOP_LENGTH = 1000
"""Characters of a stop text, tokens of a stop sequence."""
MAX_TOP_LOGPROBS = 20


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

    What the model's own generation settings say beside temperature, top_p and top_k (a repetition penalty, say) holds
    too, as for `isthmus edge generate`.

    Attributes:
        n: Answers to the one prompt. Their seeds are `seed`, `seed` + 1, and so on.
        max_tokens: New ones at most, as far as the model's window leaves room; None for all that it leaves.
        temperature: 0 for the likeliest token each time.
        top_p: Only the likeliest tokens that have this probability together may be chosen; 1 for all.
        top_k: Only so many of the likeliest tokens may be chosen; None for all.
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

    def problem(self) -> str | None:
        """What of it does not make sense, in one line; None for nothing."""
        checks = {
            f"n = {self.n}: give 1 to {MAX_ANSWERS}": 1 <= self.n <= MAX_ANSWERS,
            f"max_tokens = {self.max_tokens}: give 1 or more": self.max_tokens is None or self.max_tokens >= 1,
            f"temperature = {self.temperature}: give 0 or more": 0 <= self.temperature < math.inf,
            f"top_p = {self.top_p}: give more than 0 and at most 1": 0 < self.top_p <= 1,
            f"top_k = {self.top_k}: give 1 or more": self.top_k is None or self.top_k >= 1,
            f"seed = {self.seed}: give 0 or more, and less than 2^63": self.seed is None or 0 <= self.seed < 2**63,
            f"top_logprobs = {self.top_logprobs}: give 0 to {MAX_TOP_LOGPROBS}": (
                0 <= self.top_logprobs <= MAX_TOP_LOGPROBS
            ),
            f"{len(self.stop)} stop texts: give at most {MAX_STOPS}": len(self.stop) <= MAX_STOPS,
            f"{len(self.stop_tokens)} stop sequences: give at most {MAX_STOPS}": len(self.stop_tokens) <= MAX_STOPS,
            f"a stop text or sequence is empty or too long: give 1 to {MAX_STOP_LENGTH} characters or tokens": all(
                1 <= len(each) <= MAX_STOP_LENGTH for each in (*self.stop, *self.stop_tokens)
            ),
        }
        return next((problem for problem, good in checks.items() if not good), None)

    def to_tree(self) -> dict[str, Any]:
        """As it goes to the worker."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class TokenChance:
    """A token, its text and bytes (`raw`; not always whole characters), its log probability, and the likeliest ones."""

    token: int
    text: str
    raw: bytes
    logprob: float
    top: Sequence[tuple[int, str, bytes, float]] = ()

    def to_tree(self) -> list[Any]:
        """As the worker sends it."""
        return [self.token, self.raw.hex(), self.logprob, [[token, raw.hex(), p] for token, _, raw, p in self.top]]

    @classmethod
    def of_tree(cls, tree: Sequence[Any]) -> TokenChance:
        """What the worker has sent."""
        token, raw, logprob, top = tree
        others = [(other, _text(bytes.fromhex(its)), bytes.fromhex(its), p) for other, its, p in top]
        return cls(token, _text(bytes.fromhex(raw)), bytes.fromhex(raw), logprob, others)


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer.

    Attributes:
        index: Which of the `n` answers.
        text: What is new; empty where a character is not whole yet, or a stop text may have begun.
        tokens: The new tokens behind `text`.
        chances: One for each of `tokens`, where log probabilities are wanted.
        finish: "stop" or "length" with an answer's last piece.
        prompt_tokens: With each answer's first piece, how many the prompt has.
        prompt_chances: With the first piece of answer 0, where they are wanted; None for the first token.
    """

    index: int
    text: str
    tokens: Sequence[int]
    chances: Sequence[TokenChance] = ()
    finish: str | None = None
    prompt_tokens: int | None = None
    prompt_chances: Sequence[TokenChance | None] = ()

    def to_tree(self) -> dict[str, Any]:
        """As the worker sends it."""
        tree: dict[str, Any] = {"text": self.text, "tokens": list(self.tokens)}
        if self.chances:
            tree["chances"] = [chance.to_tree() for chance in self.chances]
        if self.finish is not None:
            tree["finish"] = self.finish
        if self.prompt_tokens is not None:
            tree["prompt_tokens"] = self.prompt_tokens
        if self.prompt_chances:
            tree["prompt_chances"] = [None if each is None else each.to_tree() for each in self.prompt_chances]
        return tree

    @classmethod
    def of_tree(cls, index: int, tree: Mapping[str, Any]) -> Piece:
        """What the worker has sent of an answer."""
        prompt = tree.get("prompt_chances", ())
        return cls(
            index,
            tree["text"],
            tree["tokens"],
            [TokenChance.of_tree(each) for each in tree.get("chances", ())],
            tree.get("finish"),
            tree.get("prompt_tokens"),
            [None if each is None else TokenChance.of_tree(each) for each in prompt],
        )


Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
"""A text, tokens, or messages (`role`, `content`) for the model's chat template."""


def prompt_tree(prompt: Prompt) -> dict[str, Any]:
    """A prompt as it goes to the worker: {"text": …}, {"tokens": …} or {"messages": …}."""
    if isinstance(prompt, str):
        return {"text": prompt}
    if prompt and isinstance(prompt[0], Mapping):
        return {"messages": [dict(each) for each in prompt if isinstance(each, Mapping)]}
    return {"tokens": list(prompt)}


def prompt_problem(prompt: Prompt) -> str | None:
    """What of a prompt does not make sense, in one line; None for nothing."""
    if not prompt:
        return "the prompt is empty: give some text to continue"
    if isinstance(prompt, str):
        size, most, unit = len(prompt), MAX_PROMPT_CHARACTERS, "characters"
    elif isinstance(prompt[0], Mapping):
        size = sum(len(text) for each in prompt if isinstance(each, Mapping) for text in each.values())
        most, unit = MAX_PROMPT_CHARACTERS, "characters"
        if len(prompt) > MAX_MESSAGES:
            return f"the conversation has {len(prompt)} messages: at most {MAX_MESSAGES} are taken"
    else:
        size, most, unit = len(prompt), MAX_PROMPT_TOKENS, "tokens"
    return f"the prompt has {size} {unit}: at most {most} are taken" if size > most else None
