"""How tokens are chosen, and how likely they were."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from isthmus.daemon.serving.answer_forms import Sampling, TokenChance

_ROWS = 256  # positions of a prompt whose probabilities are computed at a time


class TokenSampler(LogitsProcessor):  # type: ignore[misc]  # transformers has no types
    """Samples a token as transformers does, by a source of chance of its own: answers in other threads have theirs.

    Only the chosen token is left possible, so that the likeliest one is the sampled one.

    Args:
        sampling: Its temperature is more than 0.
    """

    def __init__(self, sampling: Sampling) -> None:
        self._warpers = LogitsProcessorList([TemperatureLogitsWarper(float(sampling.temperature))])
        if sampling.top_k is not None:
            self._warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self._warpers.append(TopPLogitsWarper(float(sampling.top_p)))
        self._chance = torch.Generator()
        if sampling.seed is None:
            self._chance.seed()
        else:
            self._chance.manual_seed(sampling.seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores of the next token, `[1, V]`: 0 for the chosen one, and -inf for all others."""
        probabilities = self._warpers(input_ids, scores).softmax(-1).cpu()
        token = torch.multinomial(probabilities, 1, generator=self._chance).to(scores.device)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


class TokenTexts:
    """The bytes of single tokens.

    Args:
        tokenizer: The model's.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = set(tokenizer.get_added_vocab().values())
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder = "" if backend is None else json.dumps(json.loads(backend.to_str())["decoder"])
        self._letters = (
            {letter: byte for byte, letter in bytes_to_unicode().items()} if '"ByteLevel"' in decoder else None
        )

    def raw(self, token: int) -> bytes:
        """The bytes that a token stands for."""
        name = str(self._tokenizer.convert_ids_to_tokens(token))
        if token in self._special:
            return name.encode()
        if self._letters is not None:
            return b"".join(
                bytes([self._letters[letter]]) if letter in self._letters else letter.encode() for letter in name
            )
        if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):  # SentencePiece's single bytes
            return bytes.fromhex(name[3:5])
        return name.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()

    def chances(self, logits: Tensor, tokens: Tensor, top: int) -> list[TokenChance]:
        """How likely tokens were.

        Args:
            logits: The model's own, for each of them, `[S, V]`.
            tokens: `[S]`.
            top: So many of the likeliest beside each.
        """
        found: list[TokenChance] = []
        for at in range(0, len(tokens), _ROWS):
            logprobs, row_tokens = logits[at : at + _ROWS].float().log_softmax(-1), tokens[at : at + _ROWS]
            own = logprobs.gather(1, row_tokens[:, None])[:, 0].tolist()
            best = logprobs.topk(min(top, logprobs.shape[1]), dim=-1)
            for token, logprob, others, theirs in zip(
                row_tokens.tolist(), own, best.indices.tolist(), best.values.tolist(), strict=True
            ):
                likeliest = [(other, *self._shown(other), p) for other, p in zip(others, theirs, strict=True)]
                found.append(TokenChance(token, *self._shown(token), logprob, likeliest))
        return found

    def _shown(self, token: int) -> tuple[str, bytes]:
        raw = self.raw(token)
        return raw.decode("utf-8", "replace"), raw
