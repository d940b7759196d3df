"""How many tokens of a guess are right, of all and of the rare ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from isthmus.common.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Hits:
    """Right guesses by sequence, which is what an interval draws.

    Attributes:
        right: Right ones, `[sequences]`.
        of: How many there are, `[sequences]`; a sequence may have none.
    """

    right: Tensor
    of: Tensor

    @property
    def share(self) -> float:
        """Right ones over all; NaN where there are none."""
        return float(self.right.sum() / self.of.sum())


def token_hits(guessed: Sequence[Tensor], true: Sequence[Tensor], *, rare: Tensor | None = None) -> Hits:
    """Count the tokens that are right at their places.

    Args:
        guessed: Tokens `[n]` of each sequence, -1 where nothing is guessed, which is wrong.
        true: The right ones, `[n]`; -1 for padding, which does not count.
        rare: Which tokens of the vocabulary count, `[V]`, bool (see `rare_tokens`); None for all.

    Raises:
        ConfigError: Guess and truth have other numbers of sequences or tokens.
    """
    sizes = [[len(each) for each in texts] for texts in (guessed, true)]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"a guess of {sizes[0]} tokens does not fit texts of {sizes[1]}: give the texts that were attacked, in "
            "their order"
        )
    right, of = [], []
    for guess, tokens in zip(guessed, true, strict=True):
        counts = tokens >= 0
        if rare is not None:
            counts &= rare[tokens.clamp_min(0)]
        right.append(int((counts & (guess == tokens)).sum()))
        of.append(int(counts.sum()))
    return Hits(torch.tensor(right, dtype=torch.float64), torch.tensor(of, dtype=torch.float64))


def rare_tokens(public: Sequence[Tensor], n_tokens: int, *, below: float) -> Tensor:
    """Tokens that make up less than the share `below` of public text, those that it lacks among them: `[V]`, bool.

    Args:
        public: Tokens `[n]` of each public text.
        n_tokens: Size of the vocabulary.
        below: For instance 1e-4 for less than one token in ten thousand.

    Raises:
        ConfigError: There is no public text, or `below` is no share.
    """
    total = sum(len(tokens) for tokens in public)
    if not total or not 0 < below <= 1:
        raise ConfigError(f"a share of {below} of {total} public tokens is none; use 0 < below <= 1 and some text")
    return torch.bincount(torch.cat(list(public)), minlength=n_tokens) < below * total
