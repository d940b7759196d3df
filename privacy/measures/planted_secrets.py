"""Planted secrets: strings put into private texts, and which of them a decoded guess holds letter by letter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from isthmus.common.errors import ConfigError
from isthmus.privacy.measures.token_accuracy import Hits


def secret_hits(guessed: Sequence[str], secrets: Sequence[Sequence[str]]) -> Hits:
    """Count the secrets that a guess holds exactly, in the sequence that they were planted in.

    Args:
        guessed: The decoded guess of each sequence (`decoded`).
        secrets: The strings planted in each.

    Raises:
        ConfigError: There are other numbers of guesses and texts, or a secret is empty.
    """
    if len(guessed) != len(secrets):
        raise ConfigError(f"{len(guessed)} guesses do not fit {len(secrets)} texts: give one for each text")
    if any(not secret for planted in secrets for secret in planted):
        raise ConfigError("an empty secret is found everywhere: plant strings of at least one character")
    right = [sum(secret in guess for secret in planted) for guess, planted in zip(guessed, secrets, strict=True)]
    of = [len(planted) for planted in secrets]
    return Hits(torch.tensor(right, dtype=torch.float64), torch.tensor(of, dtype=torch.float64))


def decoded(tokenizer: Any, guess: Tensor) -> str:
    """The text of a guess `[n]`; where nothing is guessed stands U+FFFD, which no secret goes across."""
    pieces: list[list[int]] = [[]]
    for token in guess.tolist():
        if token < 0:
            pieces.append([])
        else:
            pieces[-1].append(token)
    return "\N{REPLACEMENT CHARACTER}".join(
        tokenizer.decode(piece, clean_up_tokenization_spaces=False) if piece else "" for piece in pieces
    )
