"""Tokens, labels and batches: what an example becomes before the model sees it.

An example is a row of segments, each trained on or only read. Every segment is tokenized by itself and the token lists
are joined, so a boundary between prompt and completion is always a boundary between tokens, the same one that
generation meets: the prompt's tokens do not depend on what follows. The tokenizer's opening tokens (BOS) stand in
front; its EOS closes a text or a completion, and a conversation whose template does not close it. Labels are the tokens
of the trained segments and -100 elsewhere. The first token is never a label, since nothing predicts it.

For `messages`, the assistant's turns are trained on when each can be found in the rendered conversation (the rendering
of the conversation up to a turn must be a prefix of the whole, which holds for most templates); otherwise only the last
one is, and it must follow the rendering of what came before it.

With `withhold_answers` another token stands in the place of an answer. What stands at a row's last position serves to
predict what follows, from which nothing is learned; so loss, gradients and adapter keep their bits. This needs answers
of one token: one of several is sent up to its last token, as each is predicted from those before.
"""

from __future__ import annotations

import hashlib
import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from isthmus.backbone.checkpoints.chat_template import ChatTemplate
from isthmus.common.errors import ChatTemplateError, ConfigError, DataError
from isthmus.edge.config.data_config import ExamplesConfig
from isthmus.edge.config.training_config import TuningConfig
from isthmus.edge.data.readers import Example, read_examples

IGNORED = -100  # the label that cross entropy leaves out (torch's ignore_index)

Batch = dict[str, Tensor]
Segment = tuple[str, bool]  # text, and whether it is trained on
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Encoded:
    """One example as tokens.

    `labels[i]` is `input_ids[i]` where it is trained on, or what stood there of a withheld answer; else -100. The model
    shifts them itself.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def learned_from(self) -> int:
        """The place of the first token that is trained on; the length where none is."""
        return next((place for place, label in enumerate(self.labels) if label != IGNORED), len(self.labels))


@dataclass(frozen=True, slots=True)
class TrainingData:
    """What a run trains on and is measured on.

    `dropped` counts examples that were left out because no label was left of them at `max_length`; `fingerprint` is a
    SHA-256 over the tokens and labels of both sets, in order; `form` is that of the examples: "messages", "prompt"
    (with a completion) or "text".
    """

    train: Sequence[Encoded]
    validation: Sequence[Encoded]
    pad_id: int
    dropped: int
    fingerprint: str
    form: str = "text"


def load_data(config: TuningConfig, tokenizer: Any) -> TrainingData:
    """Read, split and tokenize the data that `config` names.

    Args:
        config: `data`, `validation`, `validation_split`, the columns, `max_length` and `seed` are used.

    Raises:
        DataError: The data are missing, malformed, empty, or too long for `max_length`.
        ConfigError: The format is not known, or the tokenizer has no chat template for `messages`.
    """
    examples = read_examples(config.data, config)
    if config.validation is not None:
        held_out = read_examples(config.validation, config)
    else:
        examples, held_out = split(examples, config.validation_split, config.seed)
    return _encoded(examples, held_out, config, tokenizer)


def load_examples(config: ExamplesConfig, tokenizer: Any) -> TrainingData:
    """Read and tokenize all data that `config` names, and hold nothing out. Raises what `load_data` raises."""
    return _encoded(read_examples(config.data, config), [], config, tokenizer)


def _encoded(
    examples: Sequence[Example], held_out: Sequence[Example], config: ExamplesConfig, tokenizer: Any
) -> TrainingData:
    train, dropped = encode_for(config, examples, tokenizer)
    if not train:
        raise DataError(
            f"{config.data}: no examples are left, as none of the {len(examples)} has a label within its "
            f"first {config.max_length} tokens; raise --max-length."
        )
    validation, dropped_held_out = encode_for(config, held_out, tokenizer)
    form = "messages" if examples[0].messages else "prompt" if examples[0].prompt else "text"
    return TrainingData(
        train, validation, pad_id(tokenizer), dropped + dropped_held_out, fingerprint(train, validation), form
    )


def split(examples: Sequence[T], fraction: float, seed: int) -> tuple[list[T], list[T]]:
    """Divide into training and held-out examples, each in the given order; the choice depends on `seed` alone.

    Args:
        examples: At least one; at least two when something is held out.
        fraction: Held-out part, 0 <= fraction < 1. Above 0 at least one example is held out and at least one is left.

    Raises:
        DataError: Fewer than two examples for two sets.
    """
    if fraction == 0:
        return list(examples), []
    if len(examples) < 2:
        raise DataError(
            f"{len(examples)} example cannot be split into training and validation: "
            "add examples, or give --validation-split 0."
        )
    count = min(max(1, round(len(examples) * fraction)), len(examples) - 1)
    chosen = set(random.Random(f"split/{seed}").sample(range(len(examples)), count))  # noqa: S311  # an order, not a secret
    train = [example for index, example in enumerate(examples) if index not in chosen]
    return train, [example for index, example in enumerate(examples) if index in chosen]


def encode_for(config: ExamplesConfig, examples: Sequence[Example], tokenizer: Any) -> tuple[list[Encoded], int]:
    """Tokenize examples as a configuration says; see `encode`."""
    return encode(examples, tokenizer, config.max_length, withhold=config.withholds)


def _withheld(example: Encoded, where: str, filler: int, eos: int | None) -> Encoded:
    """An example with another token in the place of its answer, and without EOS, for which the answer would be sent."""
    places = [place for place, label in enumerate(example.labels) if label != IGNORED]
    if len(places) > 1 and example.labels[places[-1]] == eos:
        places.pop()
    end = places[0] + 1
    if len(places) > 1 or any(token != eos for token in example.input_ids[end:]):
        raise DataError(
            f"{where}: withhold_answers keeps back an answer of one token at the end of its row, and this one has "
            f"{len(places)}, or something follows it: shorten the answers, or leave withhold_answers out."
        )
    return Encoded((*example.input_ids[: end - 1], filler), example.labels[:end])


def encode(
    examples: Sequence[Example], tokenizer: Any, max_length: int, *, withhold: bool = False
) -> tuple[list[Encoded], int]:
    """Tokenize examples; see the top of the file for the rules.

    Args:
        max_length: Tokens per example at most. What is longer is cut at its end.
        withhold: Whether another token stands in the place of each answer.

    Returns:
        The encoded examples, in order, and how many were left out because the cut left no label.

    Raises:
        ChatTemplateError: The tokenizer's chat template takes more time, memory or room than it may.
        DataError: A conversation cannot be rendered by the tokenizer's chat template, or an answer cannot be withheld.
        ConfigError: There are conversations and the tokenizer has no chat template.
    """
    with ChatTemplate(tokenizer) as template:
        rows = [_segments(example, template) for example in examples]
    texts = [text for row in rows for text, _ in row]
    tokens = iter(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else [])
    opening, eos = _opening(tokenizer), tokenizer.eos_token_id
    encoded = []
    for example, row in zip(examples, rows, strict=True):
        ids: list[int] = [] if example.messages else list(opening)
        labels = [IGNORED] * len(ids)
        for _, trained in row:
            segment = next(tokens)
            ids += segment
            labels += segment if trained else [IGNORED] * len(segment)
        # A template closes a turn with EOS, perhaps with a line feed after it.
        if eos is not None and not (example.messages and eos in ids[-2:]):
            ids.append(eos)
            labels.append(eos)
        labels = [IGNORED, *labels[1:]][:max_length]
        if any(label != IGNORED for label in labels):
            whole = Encoded(tuple(ids[:max_length]), tuple(labels))
            encoded.append(_withheld(whole, example.where, pad_id(tokenizer), eos) if withhold else whole)
    return encoded, len(examples) - len(encoded)


def _opening(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer puts in front of a text (BOS, or none)."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return list(whole[:start])
    return []


def rendered(examples: Sequence[Example], tokenizer: Any) -> list[list[str]]:
    """The text of each example in its segments, as a model is given it. Raises what `encode` raises."""
    with ChatTemplate(tokenizer) as template:
        return [[text for text, _ in _segments(example, template)] for example in examples]


def _segments(example: Example, template: ChatTemplate) -> list[Segment]:
    if not example.messages:
        return [(example.prompt, False), (example.completion, True)]
    messages = [{"role": role, "content": content} for role, content in example.messages]
    whole = _render(messages, template, example.where, prompt=False)
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    for wanted in (answers, answers[-1:]):
        segments = _cut(messages, wanted, whole, template, example.where)
        if segments is not None:
            return segments
    raise DataError(
        f"{example.where}: the chat template renders the conversation so that the last answer cannot be told from "
        "what came before; give prompt and completion instead of messages."
    )


def _cut(
    messages: list[dict[str, str]], wanted: list[int], whole: str, template: ChatTemplate, where: str
) -> list[Segment] | None:
    """Cut the rendered conversation around the turns in `wanted`, or `None` where the template does not allow it."""
    segments: list[Segment] = []
    done = 0
    for index in wanted:
        before = _render(messages[:index], template, where, prompt=True)
        after = whole if index == len(messages) - 1 else _render(messages[: index + 1], template, where, prompt=False)
        if not (done <= len(before) < len(after) and after.startswith(before) and whole.startswith(after)):
            return None
        segments += [(whole[done : len(before)], False), (whole[len(before) : len(after)], True)]
        done = len(after)
    return segments


def _render(messages: list[dict[str, str]], template: ChatTemplate, where: str, *, prompt: bool) -> str:
    if not template.exists:
        raise ConfigError(
            f"{where}: messages need a chat template, and the model's tokenizer has none; "
            "give prompt and completion, or text."
        )
    try:
        return template.render(messages, add_generation_prompt=prompt)
    except (ChatTemplateError, DataError) as error:
        raise type(error)(f"{where}: {error}") from error


def pad_id(tokenizer: Any) -> int:
    """The token that fills short rows; EOS or 0 where the tokenizer has none, as it is masked and never a label."""
    for value in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if value is not None:
            return int(value)
    return 0


def fingerprint(*sets: Sequence[Encoded]) -> str:
    """SHA-256 (hex) over tokens and labels, in order."""
    digest = hashlib.sha256()
    for examples in sets:
        digest.update(len(examples).to_bytes(8, "little"))
        for example in examples:
            digest.update(len(example.input_ids).to_bytes(8, "little"))
            digest.update(array("q", example.input_ids + example.labels).tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Batches:
    """The micro-batches of a set of examples, in an order that depends on (seed, epoch) alone.

    Any position can be reached without drawing what came before it. The last batch of an epoch may be smaller.

    Args:
        examples: The encoded examples; at least one.
        size: Examples per micro-batch.
        pad_id: Token that fills rows on their right.
        seed: Seed of the order, or `None` for the given order (evaluation).
    """

    examples: Sequence[Encoded]
    size: int
    pad_id: int
    seed: int | None = None

    def __len__(self) -> int:
        return (len(self.examples) + self.size - 1) // self.size

    def order(self, epoch: int) -> list[int]:
        """Indices of the examples in the order of `epoch`."""
        indices = list(range(len(self.examples)))
        if self.seed is not None:
            random.Random(f"{self.seed}/{epoch}").shuffle(indices)  # noqa: S311  # an order, not a secret
        return indices

    def epoch(self, epoch: int = 0, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """Micro-batches [start, stop) of `epoch`, to its end by default."""
        return self.of(self.order(epoch)[start * self.size : (len(self) if stop is None else stop) * self.size])

    def of(self, rows: Sequence[int]) -> Iterator[Batch]:
        """Micro-batches of the examples with these indices."""
        for first in range(0, len(rows), self.size):
            yield collate([self.examples[row] for row in rows[first : first + self.size]], self.pad_id)


def collate(examples: Sequence[Encoded], pad_id: int) -> Batch:
    """Join examples into tensors, padded on the right.

    Returns:
        `input_ids`, `attention_mask` (1 for tokens) and `labels` (-100 on padding), each `[len(examples), longest]`,
        int64.
    """
    longest = max(len(example.input_ids) for example in examples)

    def rows(lists: Sequence[Sequence[int]], fill: int) -> Tensor:
        return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in lists], dtype=torch.int64)

    return {
        "input_ids": rows([example.input_ids for example in examples], pad_id),
        "attention_mask": rows([[1] * len(example.input_ids) for example in examples], 0),
        "labels": rows([example.labels for example in examples], IGNORED),
    }


def single_examples(batch: Batch) -> Iterator[Batch]:
    """The examples of a batch that was padded on the right, each as a batch without padding."""
    for row, length in enumerate(batch["attention_mask"].sum(-1).tolist()):
        yield {name: tensor[row : row + 1, :length] for name, tensor in batch.items()}


def label_count(batch: Batch) -> int:
    """Tokens of `batch` that the loss is a mean over."""
    return int(label_mask(batch).sum())


def label_mask(batch: Batch) -> Tensor:
    """Positions whose logits predict a label, `[B, S]` bool: the labels' places shifted left by one."""
    mask = torch.zeros_like(batch["labels"], dtype=torch.bool)
    mask[:, :-1] = batch["labels"][:, 1:] != IGNORED
    return mask
