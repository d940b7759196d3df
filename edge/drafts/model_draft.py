"""Drafts by a model that runs on the edge, token by token, with a cache of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import DynamicCache

from isthmus.backbone.families import longest_sequence
from isthmus.common.errors import UnsupportedCallError
from isthmus.edge.drafts.candidates import Choose, Draft, DraftedToken
from isthmus.edge.drafts.length_rule import AdaptiveLength, LengthRule

BUCKETS = 10
"""Buckets of equal width for the draft's probability of its token: few enough that each fills within a text, and fine
enough that sure tokens and doubtful ones are apart."""


class ModelDraft(Draft):
    """What a smaller model of the same tokens would write.

    Args:
        model: A causal language model of transformers in eval mode, with the vocabulary of the model that it drafts
            for. Its cache must be one that can be cropped.
        rule: How long a draft is; None for one that adapts.
        clock: Returns seconds.
    """

    def __init__(
        self, model: Any, rule: LengthRule | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        guesses = [(bucket + 0.5) / BUCKETS for bucket in range(BUCKETS)]  # that its probabilities are right
        super().__init__(rule or AdaptiveLength(guesses), clock)
        self.model = model

    def proposer(self) -> ModelProposer:
        """See `Draft`."""
        return ModelProposer(self.model)

    def check_fits(self, model: Any) -> None:
        """See `Draft`; the two vocabularies have to be of one size."""
        own, others = self.model.config.vocab_size, model.config.vocab_size
        if own != others:
            raise UnsupportedCallError(
                f"a draft with {own} tokens in its vocabulary does not fit a model with {others}: draft with a model "
                "of the same tokenizer"
            )


class ModelProposer:
    """See `isthmus.edge.drafts.candidates.Proposer`.

    Args:
        model: As for `ModelDraft`.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._longest = longest_sequence(model.config)
        # A place and not the number 1, which slices: a slice is not contiguous, and in bf16 torch then copies the head.
        last = torch.tensor([-1], device=model.device)
        self._options = {"logits_to_keep": last} if model._supports_logits_to_keep() else {}
        self._cache = DynamicCache(config=model.config)
        self._cache.activate_past_recording()  # layers with a window keep what a crop needs
        self._cached: list[int] = []
        self._text: list[int] = []
        self._is_new = False  # whether the text may differ from what is cached

    def follow(self, text: Sequence[int]) -> None:
        """See `Proposer`."""
        self._text, self._is_new = list(text), True

    def next_bucket(self) -> int | None:
        """See `Proposer`: that shows in the probability of the token."""
        return None

    def propose(self, choose: Choose) -> DraftedToken | None:
        """See `Proposer`. The first token of a round takes one pass over what the text has got since the last one.

        Raises:
            UnsupportedCallError: The model's cache cannot be cropped.
        """
        if len(self._text) > self._longest or not self._text:
            return None
        if self._is_new:
            self._crop()
        new = torch.tensor([self._text[len(self._cached) :]], device=self._model.device)
        with torch.no_grad():
            output = self._model(input_ids=new, cache=self._cache, use_cache=True, **self._options)
        self._cached = list(self._text)
        choice = choose(output.logits[:, -1])
        self._text.append(choice.token)
        bucket = min(int(choice.confidence * BUCKETS), BUCKETS - 1)
        return DraftedToken(choice.token, bucket, choice.logits)

    def _crop(self) -> None:
        """Forget what was drafted in earlier rounds and is not in the text."""
        common = 0
        for one, other in zip(self._cached, self._text[:-1], strict=False):
            if one != other:
                break
            common += 1
        if self._cached:
            if not self._cache.is_croppable:
                raise UnsupportedCallError(
                    f"a {type(self._model).__name__} cannot go back in its text, so it cannot draft: use another model"
                )
            self._cache.crop(common - len(self._cached))
        self._cached, self._is_new = self._cached[:common], False
