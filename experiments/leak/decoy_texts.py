"""Decoys: the frozen model, shown one public example, completes a text's own prompt.

An edge writes them for its private texts. An attacker who knows this writes some for public texts and learns to tell.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from isthmus.edge.data.batches import encode
from isthmus.edge.data.readers import Example
from isthmus.experiments.leak.leak_texts import UNCUT, Text
from isthmus.experiments.leak.planted import planted

_AT_ONCE = 32
_ROUNDS = 40
"""Of completions; in the second half of them one may be too long, by a token more in each."""


def write_decoys(
    model: Any, tokenizer: Any, real: Sequence[Text], public: Sequence[Text], count: int, seed: int
) -> list[Example]:
    """Decoys for texts: `count` for each, as long as that one or a little longer.

    The model writes what follows a text's prompt, at temperature 1. Each prompt is there `count` times, so that prompts
    say nothing of which text is real; what decoys hide is the texts' words, and not what the prompts ask for. As many
    decoys of a length have a made-up secret as texts do.

    Args:
        model: The whole frozen model.
        real: The texts.
        public: Texts that show the model what is wanted.
    """
    drawn = random.Random(f"decoys/{seed}")  # noqa: S311  # the edge's own key decides which decoy goes where
    lengths_left = Counter(
        (text.secret is not None, len(text.encoded.input_ids)) for text in real for _ in range(count)
    )
    prompts_left = [_Prompt(text.encoded.learned_from, text.example.prompt) for text in real for _ in range(count)]
    found: list[Example] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for number in range(_ROUNDS):
            if not prompts_left:
                break
            drawn.shuffle(prompts_left)
            tolerance = max(0, number - _ROUNDS // 2)
            for prompt, completion in _complete(model, tokenizer, prompts_left[:_AT_ONCE], public, drawn):
                with_secret = drawn.choice([secret for secret, _ in lengths_left.elements()])
                secret = f" {planted(len(found), seed + 2).words}" if with_secret else ""
                example = Example(prompt.text, completion + secret)
                (encoded,), _ = encode([example], tokenizer, UNCUT)
                others = [*prompts_left]
                others.remove(prompt)
                for too_long in range(tolerance + 1):
                    length = (with_secret, len(encoded.input_ids) - too_long)
                    rest = lengths_left - Counter([length])
                    if length in lengths_left and prompt.tokens < length[1] and _can_all_be_served(others, rest):
                        lengths_left, prompts_left = rest, others
                        found.append(example)
                        break
    longest = max((length for _, length in lengths_left), default=0)
    return [*found, *_filler(prompts_left, longest, public)]


class _Prompt(NamedTuple):
    """A text's prompt, behind the number of its tokens."""

    tokens: int
    text: str


def _can_all_be_served(prompts: Sequence[_Prompt], lengths: Counter[tuple[bool, int]]) -> bool:
    """Whether each prompt can have one of the lengths and something to learn in it, so that the edge can choose."""
    sizes = sorted(length for _, length in lengths.elements())
    return all(prompt.tokens < size for prompt, size in zip(sorted(prompts), sizes, strict=True))


def _complete(
    model: Any, tokenizer: Any, prompts: Sequence[_Prompt], public: Sequence[Text], drawn: random.Random
) -> Iterator[tuple[_Prompt, str]]:
    """Prompts, and what the model writes after each, shown a public example before it."""
    texts = []
    for prompt in prompts:
        shown = drawn.choice(public).example
        texts.append(f"{shown.prompt}{shown.completion}\n\n{prompt.text}")
    tokens = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    longest = max(map(len, tokens))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in tokens])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in tokens])
    written = model.generate(
        input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=36,
        pad_token_id=0,
    )  # fmt: skip
    for prompt, row in zip(prompts, written[:, longest:], strict=True):
        line = _first_line(tokenizer, row)
        if line.strip():
            yield prompt, line


def _first_line(tokenizer: Any, row: Tensor) -> str:
    text: str = tokenizer.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text.split("\n", maxsplit=1)[0].rstrip()


def _filler(prompts: Sequence[_Prompt], longest: int, public: Sequence[Text]) -> Iterator[Example]:
    """For prompts that nothing fitting was written for: completions of several public texts, longer than any length."""
    for number, prompt in enumerate(prompts):
        text = ""
        while len(text) < 8 * longest:
            text += public[(number + len(text)) % len(public)].example.completion
        yield Example(prompt.text, text)
