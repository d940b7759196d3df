from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from isthmus.common.errors import ConfigError
from isthmus.privacy.measures.priors import free_running_prior, teacher_forced_prior, unigram_prior

PUBLIC = [torch.tensor([5, 6, 6]), torch.tensor([5, 6])]
TRUE = [torch.tensor([7, 8, 2, 3]), torch.tensor([1])]


def counts_up(input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
    """A language model of ten tokens that expects the next number."""
    assert not use_cache
    return SimpleNamespace(logits=torch.nn.functional.one_hot((input_ids + 1) % 10, 10).float())


def test_priors_guess_what_they_say() -> None:
    assert [guess.tolist() for guess in unigram_prior(PUBLIC, TRUE)] == [[6, 6, 6, 6], [6]]
    assert [guess.tolist() for guess in teacher_forced_prior(counts_up, PUBLIC, TRUE)] == [[5, 8, 9, 3], [5]]
    assert [guess.tolist() for guess in free_running_prior(counts_up, PUBLIC, TRUE)] == [[5, 6, 7, 8], [5]]


def test_a_free_running_model_sees_nothing_of_the_text() -> None:
    other = [torch.tensor([9, 9, 9, 9]), torch.tensor([9])]
    free = [free_running_prior(counts_up, PUBLIC, texts) for texts in (TRUE, other)]
    forced = [teacher_forced_prior(counts_up, PUBLIC, texts) for texts in (TRUE, other)]
    assert torch.equal(free[0][0], free[1][0])
    assert not torch.equal(forced[0][0], forced[1][0])  # the control


def test_priors_need_public_text() -> None:
    with pytest.raises(ConfigError, match="no public text"):
        unigram_prior([], TRUE)
    with pytest.raises(ConfigError, match="no public text"):
        free_running_prior(counts_up, [], TRUE)
