"""Sampling with a draft has the distribution of sampling without: chi-squared over two tokens of a tiny model.

The model and the draft are tiny ones of other seeds, whose vocabularies are cut to `V` tokens. Their probabilities of a
first and a second token are kept in tables, and a text begins anew after each two tokens, so that a long one has many
pairs of tokens which are independent of each other, wherever a round begins and ends.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models.tiny import tiny_checkpoint, tiny_config
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.generation import utils
from transformers.modeling_outputs import CausalLMOutputWithPast

from isthmus.backbone.split.cached_generation import CachedGeneration
from isthmus.edge.drafts import AdaptiveLength, Draft, FixedLength, ModelDraft, NgramDraft, drafting
from isthmus.edge.drafts.length_rule import VerifiedRound

from ...backbone.conftest import whole_model

V = 5
PAIRS = 20_000
FEWER = 8_000  # where less shows what is to be seen
PAIRS_IN_A_TEXT = 400
LIMIT = 51.18
"""What chi-squared with V² - 1 = 24 degrees of freedom exceeds once in a thousand times."""


class Pairwise(CachedGeneration, LlamaForCausalLM):  # type: ignore[misc]  # transformers has no types
    """A model whose text is pairs of tokens: the first of each as after a prompt, the second as after these two.

    Args:
        first: Logits of a first token, `[V]`.
        second: Logits of a second one after each first one, `[V, V]`.

    Attributes:
        takes: Seconds of a pass, by which it moves `now` on.
        now: The time of all such models.
    """

    now = 0.0

    isthmus_longest = 4096
    remote_layers = None

    def __init__(self, first: Tensor, second: Tensor, takes: float) -> None:
        sizes = {"vocab_size": V, "num_hidden_layers": 1, "max_position_embeddings": self.isthmus_longest}
        super().__init__(tiny_config("llama", **sizes, pad_token_id=0, bos_token_id=None, eos_token_id=None))
        self.first, self.second, self.takes = first, second, takes
        self._after = torch.stack((first.expand(V, V), second))  # by whether a pair has begun, and by the token
        self._has_begun = torch.arange(self.isthmus_longest) % 2
        self._cached = torch.zeros(1, 1, self.isthmus_longest, 1)
        self.eval()

    def forward(self, input_ids: Tensor, cache: Any, **_: Any) -> CausalLMOutputWithPast:
        """The logits after each token, `[1, S, V]`; the prompt has one token."""
        Pairwise.now += self.takes
        start, length = cache.get_seq_length(), input_ids.shape[1]
        cache.update(self._cached[:, :, :length], self._cached[:, :, :length], 0)
        logits = self._after[self._has_begun[start : start + length], input_ids]
        return CausalLMOutputWithPast(logits=logits, cache=cache)


def tables(folder: Path, seed: int) -> tuple[Tensor, Tensor]:
    """A tiny model's logits of a first and of a second token after a prompt, the vocabulary cut to `V` tokens."""
    model = whole_model(tiny_checkpoint("llama", folder / str(seed), seed=seed))
    tokens = torch.arange(100, 100 + V)
    prompt = torch.tensor([[7, 8, 9]])
    with torch.no_grad():
        first = model(prompt, use_cache=False).logits[0, -1, tokens]
        rows = torch.cat([prompt.expand(V, -1), tokens[:, None]], dim=1)
        second = model(rows, use_cache=False).logits[:, -1, tokens]
    # At this temperature no cell of the table of pairs is too small for chi-squared.
    return first / (2 * first.std()), second / (2 * second.std())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pairwise, Pairwise]:
    """The model, and one that drafts for it."""
    folder = tmp_path_factory.mktemp("pairwise")
    return Pairwise(*tables(folder, 0), takes=0.05), Pairwise(*tables(folder, 1), takes=0.005)


def chi_squared(
    model: Pairwise, draft: Draft, processed: Callable[[Tensor], Tensor], n_pairs: int = PAIRS, **options: Any
) -> float:
    """Of the pairs of tokens that the model generates with a draft, against its own probabilities of them."""
    torch.manual_seed(11)
    counts = torch.zeros(V, V)
    with drafting(model, draft):
        for _ in range(n_pairs // PAIRS_IN_A_TEXT):
            text = model.generate(
                torch.tensor([[0]]),
                do_sample=True,
                max_new_tokens=2 * PAIRS_IN_A_TEXT,
                eos_token_id=None,
                pad_token_id=0,
                use_cache=True,
                **{"top_k": 0, **options},
            )
            pairs = text[0, 1:].view(-1, 2)
            counts += torch.bincount(pairs[:, 0] * V + pairs[:, 1], minlength=V * V).view(V, V)
    first, second = processed(model.first).softmax(-1), processed(model.second).softmax(-1)
    expected = n_pairs * first[:, None] * second
    assert counts.sum() == n_pairs
    assert (counts[expected == 0] == 0).all()
    wanted = expected > 0
    assert expected[wanted].min() > 5
    return float(((counts - expected)[wanted].square() / expected[wanted]).sum())


def plain(logits: Tensor) -> Tensor:
    return logits


@pytest.mark.long
def test_a_model_draft(models: tuple[Pairwise, Pairwise]) -> None:
    model, other = models
    draft = ModelDraft(other, FixedLength(3))
    assert chi_squared(model, draft, plain) < LIMIT
    assert 0.2 < draft.statistics.accepted / draft.statistics.drafted < 0.9


@pytest.mark.long
def test_a_model_draft_of_a_length_that_depends_on_what_it_drafts(models: tuple[Pairwise, Pairwise]) -> None:
    model, other = models
    lengths = set()

    class Watched(AdaptiveLength):
        def round_over(self, verified: VerifiedRound) -> None:
            lengths.add(len(verified.buckets))
            super().round_over(verified)

    draft = ModelDraft(other, Watched([(bucket + 0.5) / 10 for bucket in range(10)]), lambda: Pairwise.now)
    assert chi_squared(model, draft, plain, FEWER) < LIMIT
    assert draft.statistics.accepted > FEWER / 2
    assert lengths >= {0, 1, 2, 3}


def test_an_ngram_draft(models: tuple[Pairwise, Pairwise]) -> None:
    draft = NgramDraft(FixedLength(2))
    assert chi_squared(models[0], draft, plain, FEWER) < LIMIT
    assert draft.statistics.accepted > FEWER / 20


@pytest.mark.long
def test_temperature_and_top_k_are_the_draft_s_as_well(models: tuple[Pairwise, Pairwise]) -> None:
    model, other = models

    def processed(logits: Tensor) -> Tensor:
        logits = logits / 0.7
        return logits.masked_fill(logits < logits.topk(3).values[..., -1:], -float("inf"))

    draft = ModelDraft(other, FixedLength(2))
    assert chi_squared(model, draft, processed, FEWER, temperature=0.7, top_k=3) < LIMIT


@pytest.mark.long
def test_a_draft_that_is_always_accepted_is_noticed(
    models: tuple[Pairwise, Pairwise], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled = utils._speculative_sampling

    def accepting(ids: Tensor, drafted: Tensor, length: int, logits: Tensor, **more: Any) -> Any:
        equal = torch.cat([drafted, logits[:, length:]], dim=1)  # the draft's own probabilities in the model's place
        return sampled(ids, drafted, length, equal, **more)

    monkeypatch.setattr(utils, "_speculative_sampling", accepting)
    model, other = models
    assert chi_squared(model, ModelDraft(other, FixedLength(3)), plain, FEWER) > 2 * LIMIT


@pytest.mark.long
def test_a_draft_that_hides_its_probabilities_is_noticed(models: tuple[Pairwise, Pairwise]) -> None:
    """Sampled tokens with logits that they were not sampled by: a small bias."""
    from isthmus.edge.drafts.candidates import Candidates

    class Flattering(Candidates):
        def get_candidates(self, input_ids: Tensor, **more: Any) -> tuple[Tensor, Tensor | None]:
            ids, logits = super().get_candidates(input_ids, **more)
            return ids, None if logits is None else 0.6 * logits

    model, other = models
    draft = ModelDraft(other, FixedLength(3))
    draft.begin = lambda text: Flattering(draft, text, draft.proposer())  # type: ignore[method-assign]
    assert chi_squared(model, draft, plain, FEWER) > LIMIT
