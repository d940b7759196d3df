"""Priors: how many tokens somebody gets who has not seen the traffic. An attack is worth what it gets beyond."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from isthmus.common.errors import ConfigError


def unigram_prior(public: Sequence[Tensor], true: Sequence[Tensor]) -> list[Tensor]:
    """Guess public text's most frequent token everywhere.

    Args:
        public: Tokens `[n]` of each public text.
        true: Of each text that is guessed; only the lengths count.

    Raises:
        ConfigError: There is no public text.
    """
    if not sum(len(tokens) for tokens in public):
        raise ConfigError("no public text is given: the most frequent token is that of some text")
    most = torch.bincount(torch.cat(list(public))).argmax()
    return [torch.full((len(tokens),), int(most)) for tokens in true]


@torch.no_grad()
def teacher_forced_prior(model: Any, public: Sequence[Tensor], true: Sequence[Tensor]) -> list[Tensor]:
    """At each place the token that a language model finds likeliest after the *right* tokens before it.

    The first token is the most frequent first one of the public texts.

    Args:
        model: A transformers model for causal language modelling.
        public: As for `unigram_prior`.
        true: The texts, `[n]` each.
    """
    first = _first(public)
    guesses = []
    for tokens in true:
        logits = model(input_ids=tokens[None], use_cache=False).logits[0]
        guesses.append(torch.cat([first, logits[:-1].argmax(1)]))
    return guesses


@torch.no_grad()
def free_running_prior(model: Any, public: Sequence[Tensor], true: Sequence[Tensor]) -> list[Tensor]:
    """What a language model writes by itself, greedily, after the most frequent first token of the public texts.

    Args:
        model: As for `teacher_forced_prior`.
        public: As for `unigram_prior`.
        true: Only the lengths count.
    """
    longest = max((len(tokens) for tokens in true), default=0)
    written = _first(public)
    while len(written) < longest:
        logits = model(input_ids=written[None], use_cache=False).logits[0, -1]
        written = torch.cat([written, logits.argmax()[None]])
    return [written[: len(tokens)] for tokens in true]


def _first(public: Sequence[Tensor]) -> Tensor:
    """The most frequent first token, `[1]`."""
    if not public:
        raise ConfigError("no public text is given: the likeliest first token is that of some texts")
    return torch.stack([tokens[0] for tokens in public]).bincount().argmax()[None]
