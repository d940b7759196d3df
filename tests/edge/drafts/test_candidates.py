"""A text with drafts is the text without: token for token where it is greedy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from support.models.tiny import EOS, PAD, VOCAB, WINDOW
from torch import Tensor
from transformers.generation.candidate_generator import CandidateGenerator

from isthmus.backbone.decoding.exact_layers import exact_layers
from isthmus.common.errors import UnsupportedCallError
from isthmus.edge.drafts import AdaptiveLength, Draft, FixedLength, ModelDraft, NgramDraft, drafting
from isthmus.edge.drafts.candidates import Candidates
from isthmus.edge.drafts.length_rule import VerifiedRound
from isthmus.edge.drafts.model_draft import ModelProposer

from ...backbone.conftest import Pair, Pairs

NEW = 24
FAMILIES = ["llama", "mistral", "qwen2_sliding", "gemma3_text", "gpt2", "opt"]
REPEATING = torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6]])


def near(model: Any) -> Any:
    """A model that is like this one, and often of another opinion."""
    with torch.no_grad():
        for parameter in model.parameters():
            generator = torch.Generator().manual_seed(1)
            parameter.add_(0.05 * parameter.std(correction=0) * torch.randn(parameter.shape, generator=generator))
    return model.eval()


DRAFTS: dict[str, Callable[[Pair], Draft]] = {
    "ngram": lambda pair: NgramDraft(FixedLength(3)),
    "near": lambda pair: ModelDraft(near(pair.whole), FixedLength(4)),
    "same": lambda pair: ModelDraft(pair.whole.eval(), FixedLength(5)),
    "adaptive": lambda pair: ModelDraft(near(pair.whole), clock=ticking()),
}


def ticking() -> Callable[[], float]:
    """A clock by which everything takes equally long."""
    seconds: Iterator[int] = count()
    return lambda: float(next(seconds))


def text(model: Any, ids: Tensor = REPEATING, **options: Any) -> tuple[Tensor, Tensor]:
    """Tokens, and the logits that they were chosen by."""
    given = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    found = model.generate(ids, **{**given, **options}, output_logits=True, return_dict_in_generate=True)
    return found.sequences, torch.stack(found.logits)


@pytest.mark.parametrize("name", DRAFTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_greedy_text_is_the_same_with_each_draft(pairs: Pairs, family: str, name: str) -> None:
    assert WINDOW < NEW
    pair = pairs(family)
    expected, expected_logits = text(pair.edge)
    draft = DRAFTS[name](pair)
    with drafting(pair.edge, draft):
        for _ in range(2):  # what is learned stays
            tokens, logits = text(pair.edge)
            assert torch.equal(tokens, expected)
            assert torch.allclose(logits, expected_logits, atol=1e-4)
    found = draft.statistics
    assert found.tokens == 2 * NEW
    assert found.tokens == found.accepted + found.rounds
    assert 0 <= found.accepted <= found.judged <= found.drafted
    assert found.drafted > 0
    assert torch.equal(text(pair.edge)[0], expected)
    assert draft.statistics.tokens == 2 * NEW  # it was for the block alone


def test_a_draft_that_is_always_right_is_accepted_whole(pairs: Pairs) -> None:
    pair = pairs("mistral")
    draft = DRAFTS["same"](pair)
    with drafting(pair.edge, draft):
        text(pair.edge)
    assert draft.statistics.accepted == draft.statistics.drafted
    assert draft.statistics.rounds == NEW / 6
    assert draft.statistics.judged == draft.statistics.drafted
    assert draft.statistics.draft_seconds > 0


def test_what_the_cloud_has_not_decided_about_is_not_judged(pairs: Pairs) -> None:
    pair = pairs("mistral")
    with drafting(pair.edge, ModelDraft(near(pair.whole), FixedLength(4))) as draft:
        text(pair.edge)
    found = draft.statistics
    assert found.accepted < found.judged < found.drafted
    assert found.judged - found.accepted <= found.rounds  # one that was rejected in each round at most


def test_without_crops_a_draft_s_own_cache_is_wrong_and_the_text_is_right(
    pairs: Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    crop = ModelProposer._crop

    def forgetting(self: Any) -> None:
        cache, self._cache = self._cache, SimpleNamespace(is_croppable=True, crop=lambda tokens: None)
        crop(self)
        self._cache = cache

    pair = pairs("mistral")
    expected = text(pair.edge)[0]
    accepted = []
    for broken in (False, True):
        if broken:
            monkeypatch.setattr(ModelProposer, "_crop", forgetting)
        draft = ModelDraft(near(pairs("mistral").whole), FixedLength(4))
        with drafting(pair.edge, draft):
            assert torch.equal(text(pair.edge)[0], expected)
        accepted.append(draft.statistics.accepted)
    assert accepted[0] > accepted[1]


def test_a_draft_is_what_its_model_writes_after_each_crop(pairs: Pairs) -> None:
    """The draft's cache gives what a fresh one gives, though windows have filled and drafts were wrong."""
    pair = pairs("gemma3_text")
    model = near(pair.whole)
    draft = ModelDraft(model, FixedLength(4))
    seen: list[tuple[list[int], list[int]]] = []

    class Watching(ModelProposer):
        def follow(self, tokens: Any) -> None:
            self.begun = list(tokens)
            super().follow(tokens)

        def propose(self, choose: Any) -> Any:
            found = super().propose(choose)
            seen.append((list(self._text[:-1]), [found.token]))
            return found

    draft.proposer = lambda: Watching(model)  # type: ignore[method-assign]
    with drafting(pair.edge, draft):
        text(pair.edge)
    assert draft.statistics.accepted < draft.statistics.drafted
    for tokens, (token,) in seen:
        assert int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()) == token


def test_padding_is_not_drafted_from(pairs: Pairs) -> None:
    pair = pairs("llama")
    padded = torch.cat([torch.full((1, 4), PAD), REPEATING], dim=1)
    mask = (padded != PAD).long()
    expected = text(pair.edge, padded, attention_mask=mask)[0]
    for name in ("ngram", "same"):
        draft = DRAFTS[name](pair)
        with drafting(pair.edge, draft):
            assert torch.equal(text(pair.edge, padded, attention_mask=mask)[0], expected)
        assert name == "ngram" or draft.statistics.accepted == draft.statistics.drafted


@pytest.mark.parametrize("name", ["ngram", "near", "same"])
def test_the_end_of_a_text_and_processors_of_logits(pairs: Pairs, name: str) -> None:
    pair = pairs("llama")
    stop = int(text(pair.edge)[0][0, 12 + 13])
    options = {"eos_token_id": [EOS, stop], "repetition_penalty": 1.3, "min_new_tokens": 6}
    expected = text(pair.edge, **options)[0]
    with drafting(pair.edge, DRAFTS[name](pair)) as draft:
        assert torch.equal(text(pair.edge, **options)[0], expected)
    assert draft.statistics.tokens == expected.shape[1] - 12
    if name == "same":
        assert draft.statistics.accepted == draft.statistics.drafted


def test_a_draft_stops_where_the_model_does(pairs: Pairs) -> None:
    pair = pairs("llama")
    long = torch.randint(3, VOCAB, (1, 120), generator=torch.Generator().manual_seed(2))
    stop = int(text(pair.edge, long, max_new_tokens=8)[0][0, -1])  # the last position that the model knows
    expected = text(pair.edge, long, max_new_tokens=50, eos_token_id=stop)[0]
    with drafting(pair.edge, DRAFTS["same"](pair)):
        assert torch.equal(text(pair.edge, long, max_new_tokens=50, eos_token_id=stop)[0], expected)


@pytest.mark.parametrize("name", ["ngram", "near"])
def test_exact_decoding_has_the_same_bits_with_a_draft(pairs: Pairs, name: str) -> None:
    pair = pairs("mistral", exact=True)
    pair.edge.isthmus_exact = True
    draft = DRAFTS[name](pair)
    with exact_layers(pair.edge):
        expected = text(pair.edge)
        with drafting(pair.edge, draft):
            found = text(pair.edge)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert draft.statistics.drafted > draft.statistics.accepted > 0 or name == "ngram"
    assert draft.statistics.tokens == NEW - 1  # the prompt had none


def test_a_peft_model_drafts_as_well(pairs: Pairs) -> None:
    pair = pairs("llama")
    torch.manual_seed(4)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj"], layers_to_transform=[0, 5], task_type="CAUSAL_LM", init_lora_weights=False
    )
    model = peft.get_peft_model(pair.edge, config).eval()
    expected = text(model)[0]
    with drafting(model, NgramDraft(FixedLength(3))) as draft:
        assert torch.equal(text(model)[0], expected)
    assert draft.statistics.rounds > 0


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_beams": 2}, "beams"),
        ({"num_return_sequences": 2, "do_sample": True}, "one text"),
        ({"prompt_lookup_num_tokens": 2}, "has a draft"),
        ({"use_cache": False}, "key-value cache"),
        ({"stop_strings": ["x"]}, "stop_strings"),
        ({"guidance_scale": 1.5}, "guidance_scale"),
        ({"assistant_ensemble_weight": 0.5}, "assistant_ensemble_weight"),
    ],
)
def test_what_would_change_the_text_is_refused_by_name(pairs: Pairs, options: dict[str, Any], named: str) -> None:
    pair = pairs("llama")
    with drafting(pair.edge, NgramDraft()), pytest.raises(UnsupportedCallError, match=named):
        text(pair.edge, **options)


def test_several_texts_at_a_time_are_refused(pairs: Pairs) -> None:
    pair = pairs("llama")
    with drafting(pair.edge, NgramDraft()), pytest.raises(UnsupportedCallError, match="not for 2"):
        text(pair.edge, REPEATING.repeat(2, 1))


def test_a_draft_of_another_vocabulary_and_a_whole_model_are_refused(pairs: Pairs) -> None:
    pair = pairs("llama")
    pair.whole.config.vocab_size += 1
    with pytest.raises(UnsupportedCallError, match="260 tokens"), drafting(pair.edge, ModelDraft(pair.whole)):
        pass
    with pytest.raises(UnsupportedCallError, match="no split model"), drafting(pair.whole, NgramDraft()):
        pass
    assert pair.edge.isthmus_draft is None


def test_what_a_rule_is_told_of_a_round() -> None:
    """Tokens after a rejected one are not judged, and neither is one after the text's end."""
    told: list[VerifiedRound] = []

    class Rule(FixedLength):
        def round_over(self, verified: VerifiedRound) -> None:
            told.append(verified)

    from isthmus.backbone.split.cached_generation import DraftedText

    prompt = torch.tensor([[5, 6, 7, 5]])  # followed by 6, 7, 5
    about = DraftedText(prompt, None, lambda ids, logits: logits, False, frozenset({EOS}), 100)
    for new, expected in (
        ([6, 9], ([0, 1, 2], 1, 2, 2)),
        ([6, 7, 5, 9], ([0, 1, 2], 3, 3, 4)),
        ([EOS], ([0, 1, 2], 0, 1, 1)),
        ([6], ([0, 1, 2], 1, 1, 1)),
    ):
        generator: Candidates = NgramDraft(Rule(3), ticking()).begin(about)
        candidates, logits = generator.get_candidates(prompt)
        assert candidates.tolist() == [[5, 6, 7, 5, 6, 7, 5]]
        assert logits is None
        generator.update_candidate_strategy(torch.cat([prompt, torch.tensor([new])], dim=1), torch.zeros(0), 0)
        buckets, accepted, judged, tokens = expected
        assert told[-1] == VerifiedRound(buckets, accepted, tokens, 7.0, None)  # verifying the prompt is not timed
        assert told.pop().judged == judged
    assert isinstance(generator, CandidateGenerator)
    assert not generator.requires_model_outputs


def test_an_adaptive_draft_goes_where_it_does_not_pay(pairs: Pairs) -> None:
    pair = pairs("llama")
    draft = ModelDraft(near(pair.whole), AdaptiveLength([0.5] * 10), clock=ticking())  # a token costs a whole round
    with drafting(pair.edge, draft):
        text(pair.edge, max_new_tokens=60)
    assert draft.statistics.drafted < 20
