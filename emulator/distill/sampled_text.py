"""Text that the model itself writes: public text for an emulator where nobody has any.

A model's own samples distil it nearly as well as real text does (Liu et al. 2023, "LLM-QAT"). A model with a chat
template writes the users' turns too, if it starts after the header of one (Xu et al. 2024, "Magpie"). Every token is
drawn from the whole distribution at one temperature: cutting off its tail would need a sort of the vocabulary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from isthmus.backbone.checkpoints.chat_template import ChatTemplate
from isthmus.common.errors import ConfigError, DataError, NonFiniteError
from isthmus.common.files import disk_errors
from isthmus.common.progress import bar

TEMPERATURE = 0.9

# What stands for the turns while a chat template is taken apart.
_TURNS = ("first-question", "first-answer", "second-question")


@dataclass(frozen=True, slots=True)
class _Script:
    """What is put in between what the model writes.

    Attributes:
        start: Tokens before its first one; none for a random first token.
        joints: Tokens after the end of a segment, in turn; the model itself has written the end.
        ends: Tokens that end a segment.
        joined: Whether the segments of a row make one text.
    """

    start: tuple[int, ...]
    joints: tuple[tuple[int, ...], ...]
    ends: frozenset[int]
    joined: bool


@dataclass(frozen=True, slots=True)
class _Sampling:
    """How a sample is drawn; see `write_sample`."""

    tokens: int
    seed: int
    batch: int
    length: int
    temperature: float
    special_tokens: bool

    def __post_init__(self) -> None:
        for name in ("tokens", "batch", "length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)} makes no sense; use 1 or more")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ConfigError(f"temperature = {self.temperature} makes no sense; use a number above 0")


def write_sample(
    path: Path,
    model: Any,
    tokenizer: Any,
    tokens: int,
    *,
    seed: int = 0,
    batch: int = 32,
    length: int = 256,
    temperature: float = TEMPERATURE,
    special_tokens: bool = False,
    progress: Console | None = None,
) -> int:
    """Let a model write into a file of JSON lines `{"text": ...}`, which grows batch by batch.

    Args:
        path: The file; one that is there is replaced.
        model: A whole transformers language model, in eval mode.
        tokenizer: Its tokenizer; with a chat template the model writes conversations.
        tokens: How many to write at least.
        length: Tokens of a text at most.
        temperature: That the model's logits are divided by, above 0; below 1 it keeps to what is likely.
        special_tokens: Whether the texts have them, so that a draft learns conversations as the model sees them.

    Returns:
        The number of texts.

    Raises:
        ChatTemplateError: The chat template takes more time, memory or room than it may.
        KeyboardInterrupt: Ctrl-C; what is in the file by then can be used, and the message says so.
        ConfigError: A number makes no sense, or `length` is more than the model takes.
        DiskError: The file cannot be written.
        NonFiniteError: The model gives NaN or infinity.
    """
    sampling = _Sampling(tokens, seed, batch, length, temperature, special_tokens)
    written = 0
    with disk_errors(path), path.open("w", encoding="utf-8") as file:
        try:
            for texts in _rounds(model, tokenizer, sampling, progress):
                file.write("".join(json.dumps({"text": text}) + "\n" for text in texts))
                file.flush()
                written += len(texts)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"Stopped. {path} has {written} texts, which can be used as they are.") from None
    return written


def _rounds(model: Any, tokenizer: Any, sampling: _Sampling, console: Console | None) -> Iterator[list[str]]:
    length = sampling.length
    script = _script(model, tokenizer)
    most = model.config.max_position_embeddings - len(script.start)
    if length > most:
        raise ConfigError(f"texts of {length} tokens are more than the model takes; use a length of {most} or less")
    generator = torch.Generator(model.device).manual_seed(sampling.seed)
    n_rounds = -(-sampling.tokens // (sampling.batch * length))
    with bar(console, "writing text", n_rounds * length) as advance:
        for _ in range(n_rounds):
            rows = _write(model, len(tokenizer), script, sampling, generator, advance)
            if sampling.special_tokens:
                yield [tokenizer.decode([*script.start, *row.tokens]) for row in rows]
            else:
                yield [text for row in rows for text in _texts(tokenizer, row.segments, script.joined)]


@dataclass(slots=True)
class _Row:
    """What stands in a row so far: all tokens, and the segments that the model has written of them."""

    tokens: list[int] = field(default_factory=list)
    segments: list[list[int]] = field(default_factory=lambda: [[]])


@torch.no_grad()
def _write(
    model: Any,
    n_vocabulary: int,
    script: _Script,
    sampling: _Sampling,
    generator: torch.Generator,
    advance: Callable[[], None],
) -> list[_Row]:
    """`length` tokens of each of `batch` rows."""
    batch = sampling.batch
    rows = [_Row() for _ in range(batch)]
    # What comes next in a row without asking the model, the last one first.
    waiting: list[list[int]] = [[] for _ in range(batch)]
    fed = torch.tensor([script.start] * batch, device=model.device)
    cache: Any = None
    for done in range(sampling.length):
        if done == 0 and not script.start:
            shape = (batch, 1)
            drawn = torch.randint(n_vocabulary, shape, generator=generator, device=model.device).flatten().tolist()
        else:
            output = model(input_ids=fed, cache=cache, use_cache=True, logits_to_keep=1)
            cache = output.cache
            drawn = _draw(output.logits[:, -1, :n_vocabulary], sampling.temperature, generator)
        for number, (row, queue) in enumerate(zip(rows, waiting, strict=True)):
            if queue:
                drawn[number] = queue.pop()
            elif drawn[number] in script.ends:
                queue.extend(reversed(script.joints[(len(row.segments) - 1) % len(script.joints)]))
                row.segments.append([])
            else:
                row.segments[-1].append(drawn[number])
            row.tokens.append(drawn[number])
        fed = torch.tensor(drawn, device=model.device).unsqueeze(1)
        advance()
    return rows


def _draw(logits: Tensor, temperature: float, generator: torch.Generator) -> list[int]:
    """A token for each row of logits `[B, V]`."""
    chances = torch.softmax(logits.float() / temperature, -1)
    if not chances.isfinite().all():
        raise NonFiniteError("the model's logits are not finite; check the checkpoint with its own software")
    drawn: list[int] = torch.multinomial(chances, 1, generator=generator).flatten().tolist()
    return drawn


def _texts(tokenizer: Any, segments: list[list[int]], joined: bool) -> list[str]:
    decoded = [tokenizer.decode(segment, skip_special_tokens=True).strip() for segment in segments]
    kept = [text for text in decoded if text]
    return ["\n".join(kept)] if joined and kept else kept


def _script(model: Any, tokenizer: Any) -> _Script:
    """A conversation where the tokenizer has a template of one, else documents."""
    own = getattr(model.generation_config, "eos_token_id", None)
    listed = own if isinstance(own, list) else [own]
    ends = frozenset(token for token in (*listed, tokenizer.eos_token_id) if token is not None)
    parts = _template_parts(tokenizer)
    if parts is None:
        start = () if tokenizer.bos_token_id is None else (int(tokenizer.bos_token_id),)
        # A beginning that is also the end has been written already.
        return _Script(start, (tuple(token for token in start if token not in ends),), ends, joined=False)
    special = set(tokenizer.all_special_ids)
    header, *joints = (tuple(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in parts)
    ends |= {joint[0] for joint in joints if joint[0] in special}
    return _Script(header, tuple(_after_the_end(joint, ends) for joint in joints), ends, joined=True)


def _template_parts(tokenizer: Any) -> tuple[str, str, str] | None:
    """What a chat template puts before a question, after it, and after the answer; None where it is not known."""
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": turn} for role, turn in zip(roles, _TURNS, strict=True)]
    with ChatTemplate(tokenizer) as template:
        if not template.exists:
            return None
        try:
            rest = template.render(messages, add_generation_prompt=False)
        except DataError:
            return None
    parts = []
    for turn in _TURNS:
        before, found, rest = rest.partition(turn)
        if not found or not before:
            return None
        parts.append(before)
    return parts[0], parts[1], parts[2]


def _after_the_end(joint: tuple[int, ...], ends: frozenset[int]) -> tuple[int, ...]:
    place = next((i for i, token in enumerate(joint) if token in ends), -1)
    return joint[place + 1 :]
