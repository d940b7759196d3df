"""Decoys, written by the frozen model after a public example: the same prompts, other words.

An edge writes them for its private texts. An attacker who knows this writes some for public texts and learns to tell.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from isthmus.edge.data.batches import encode
from isthmus.edge.data.readers import Example
from isthmus.experiments.leak.leak_texts import Text
from isthmus.experiments.leak.planted import planted

_SHOTS = 1
_AT_ONCE = 32
_ROUNDS = 40


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
    wanted = Counter((text.secret is not None, len(text.encoded.input_ids)) for text in real for _ in range(count))
    prompts = [(text.encoded.learned_from, text.example.prompt) for text in real for _ in range(count)]
    found: list[Example] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for number in range(_ROUNDS):
            if not prompts:
                break
            drawn.shuffle(prompts)
            for begins, prompt, completion in _round(model, tokenizer, prompts[:_AT_ONCE], public, drawn):
                with_secret = drawn.choice([secret for secret, _ in wanted.elements()])
                secret = f" {planted(len(found), seed + 2).words}" if with_secret else ""
                example = Example(prompt, completion + secret)
                (encoded,), _ = encode([example], tokenizer, 1 << 20)
                # Of a length that is wanted; of a longer one only in later rounds, as the edge cuts it.
                most = max(0, number - _ROUNDS // 2)
                near = [
                    length
                    for has_one, length in sorted(wanted, reverse=True)
                    if has_one == with_secret and 0 <= len(encoded.input_ids) - length <= most and begins < length
                ]
                rest = [*prompts]
                rest.remove((begins, prompt))
                for length in near:
                    others = wanted - Counter([(with_secret, length)])
                    if _suffice(rest, others):
                        wanted, prompts = others, rest
                        found.append(example)
                        break
    longest = max((length for _, length in wanted), default=0)
    return [*found, *_rest([prompt for _, prompt in prompts], longest, public)]


def _suffice(prompts: Sequence[tuple[int, str]], wanted: Counter[tuple[bool, int]]) -> bool:
    """Whether each of the prompts can have one of the lengths and something to learn in it."""
    lengths = sorted(length for _, length in wanted.elements())
    return all(begins < length for (begins, _), length in zip(sorted(prompts), lengths, strict=True))


def _round(
    model: Any, tokenizer: Any, prompts: Sequence[tuple[int, str]], public: Sequence[Text], drawn: random.Random
) -> Iterator[tuple[int, str, str]]:
    """Prompts as they were given, and what the model writes after them."""
    texts = []
    for _, prompt in prompts:
        shown = (text.example for text in drawn.sample(list(public), _SHOTS))
        texts.append("\n\n".join([*(f"{shot.prompt}{shot.completion}" for shot in shown), prompt]))
    tokens = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    longest = max(map(len, tokens))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in tokens])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in tokens])
    written = model.generate(
        input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=36,
        pad_token_id=0,
    )  # fmt: skip
    for (begins, prompt), row in zip(prompts, written[:, longest:], strict=True):
        line = _first_line(tokenizer, row)
        if line.strip():
            yield begins, prompt, line


def _first_line(tokenizer: Any, row: Tensor) -> str:
    text: str = tokenizer.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text.split("\n", maxsplit=1)[0].rstrip()


def _rest(prompts: Sequence[str], longest: int, public: Sequence[Text]) -> Iterator[Example]:
    """For prompts that nothing fitting was written for: completions of several public texts, longer than any length."""
    for number, prompt in enumerate(prompts):
        text = ""
        while len(text) < 8 * longest:
            text += public[(number + len(text)) % len(public)].example.completion
        yield Example(prompt, text)
