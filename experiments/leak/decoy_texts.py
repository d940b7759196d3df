"""Decoys, written by the frozen model after a public example: the same form, other contents.

An edge writes them for its private texts. An attacker who knows this writes some for public texts and learns to tell.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from isthmus.common.errors import DataError
from isthmus.edge.data.batches import encode
from isthmus.edge.data.readers import Example
from isthmus.experiments.leak.leak_texts import Text
from isthmus.experiments.leak.planted import planted

_SHOTS = 1
_AT_ONCE = 32
_ROUNDS = 20


def write_decoys(
    model: Any, tokenizer: Any, task: str, real: Sequence[Text], public: Sequence[Text], count: int, seed: int
) -> list[Example]:
    """Decoys for texts: `count` for each, as long as that one or a little longer.

    The model writes what follows a prompt, at temperature 1. E2E's prompts are those of the texts themselves, so that
    no decoy is told by its prompt; SST-2's hold the texts, so there they are those of public ones. As many decoys of a
    length have a made-up secret as texts do.

    Args:
        model: The whole frozen model.
        task: The texts' task.
        real: The texts.
        public: Texts that show the model what is wanted.

    Raises:
        DataError: The prompts are longer than a text.
    """
    drawn = random.Random(f"decoys/{seed}")  # noqa: S311  # the edge's own key decides which decoy goes where
    wanted = Counter((text.secret is not None, len(text.encoded.input_ids)) for text in real for _ in range(count))
    prompts = [text.example for text in (real if task == "e2e" else public)]
    shots = [text.example for text in public]
    found: list[Example] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for number in range(_ROUNDS):
            if not wanted:
                break
            for prompt, completion in _round(model, tokenizer, prompts, shots, drawn):
                # With a secret as often as one is still wanted.
                with_secret = drawn.choice([secret for (secret, _), n in wanted.items() for _ in range(n)] or [False])
                secret = f" {planted(len(found), seed + 2).words}" if with_secret else ""
                example = Example(prompt, completion + secret)
                (encoded,), _ = encode([example], tokenizer, 1 << 20)
                # It serves the longest text that it is long enough for; later rounds take what is longer by more. The
                # edge cuts it to that length, and does not take what then has nothing to learn.
                lengths = [length for has_one, length in wanted if has_one == with_secret]
                fits = [length for length in lengths if encoded.learned_from < length <= len(encoded.input_ids)]
                near = [length for length in fits if length >= len(encoded.input_ids) - 1 - number]
                if near:
                    wanted -= Counter([(with_secret, max(near))])
                    found.append(example)
    lengths = [length for _, length in wanted.elements()]
    return [*found, *_rest(lengths, prompts, shots, tokenizer)]


def _round(
    model: Any, tokenizer: Any, prompts: Sequence[Example], shots: Sequence[Example], drawn: random.Random
) -> Iterator[tuple[str, str]]:
    """Some prompts, and what the model writes after them."""
    chosen = [drawn.choice(prompts) for _ in range(_AT_ONCE)]
    texts = []
    for example in chosen:
        shown = drawn.sample(list(shots), _SHOTS)
        texts.append("\n\n".join([*(f"{shot.prompt}{shot.completion}" for shot in shown), example.prompt]))
    tokens = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    longest = max(map(len, tokens))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in tokens])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in tokens])
    written = model.generate(
        input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=36,
        pad_token_id=0,
    )  # fmt: skip
    for example, row in zip(chosen, written[:, longest:], strict=True):
        line = _first_line(tokenizer, row)
        if line.strip():
            yield example.prompt, line


def _first_line(tokenizer: Any, row: Tensor) -> str:
    text: str = tokenizer.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text.split("\n", maxsplit=1)[0].rstrip()


def _rest(
    lengths: Sequence[int], prompts: Sequence[Example], shots: Sequence[Example], tokenizer: Any
) -> Iterator[Example]:
    """For lengths that no written text has: one of the prompts, and the completions of several public texts."""
    encoded, _ = encode(prompts, tokenizer, 1 << 20)
    for number, length in enumerate(lengths):
        short = [prompt for prompt, each in zip(prompts, encoded, strict=True) if each.learned_from < length]
        if not short:
            raise DataError(
                f"a text of {length} tokens has no decoy: no public prompt has fewer; take more public ones"
            )
        text = ""
        while len(text) < 8 * length:
            text += shots[(number + len(text)) % len(shots)].completion
        yield Example(short[number % len(short)].prompt, text)
