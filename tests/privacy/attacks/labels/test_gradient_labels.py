"""Labels out of gradients, and what must not give them away."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.models.tiny import N_LAYERS, VOCAB, tiny_tokenizer
from support.privacy.attacked import tiny_model
from torch import Tensor

from isthmus.backbone.plan import SplitPlan
from isthmus.common.errors import DataError
from isthmus.privacy.attacks.attack import UNKNOWN, Knowledge, KnownDefence
from isthmus.privacy.attacks.front import Front
from isthmus.privacy.attacks.labels import gradient_labels
from isthmus.privacy.attacks.labels.gradient_labels import DirectLabels, ExactLabels, _Matched
from isthmus.privacy.attacks.labels.labelled_rows import Row, labelled_row
from isthmus.privacy.attacks.labels.model_top import ModelTop, RowTop
from isthmus.privacy.recording.traffic import Backward, Forward, Traffic

LENGTH, START = 12, 5
# Plain, with windows, with capped logits, with learned positions, with a projection before the head.
FAMILIES = ("llama", "qwen2_sliding", "gemma2", "gpt2", "opt_projected")


def knowing(model: Any, plan: str = "2:2", codec: str = "fp32", public: int = 2) -> Knowledge:
    random = torch.Generator().manual_seed(1)
    texts = tuple(torch.randint(3, VOCAB, (LENGTH,), generator=random) for _ in range(public))
    split = SplitPlan.parse(plan, N_LAYERS)
    return Knowledge(model, tiny_tokenizer(), split, Front(model, split.bottom), texts, codec)


def sent(knowledge: Knowledge, rows: int = 3, texts: Tensor | None = None) -> tuple[Traffic, list[Tensor]]:
    """Calls of an edge with the model that `knowledge` has, two rows in the first one, and their labels."""
    if texts is None:
        texts = torch.randint(3, VOCAB, (rows, LENGTH), generator=torch.Generator().manual_seed(2))
    made = [labelled_row(knowledge, tokens, START) for tokens in texts]
    forwards, backwards = [], []
    for call, together in enumerate((made[:2], made[2:])):
        output = torch.cat([each.row.output for each in together])
        gradient = torch.cat([each.row.gradient for each in together])
        mask = torch.ones(output.shape[:2], dtype=torch.bool)
        forwards.append(Forward(call, 0, output, mask, None, "fp32", output, True))
        backwards.append(Backward(call, 0, gradient, knowledge.codec, None))
    return Traffic("", str(knowledge.plan), tuple(forwards), tuple(backwards)), [each.labels for each in made]


def accuracy(attack: DirectLabels | ExactLabels, knowledge: Knowledge, traffic: Traffic, labels: list[Tensor]) -> float:
    attack.prepare(knowledge)
    guess = attack.run(traffic).labels
    assert guess is not None
    right = sum(int(((given == true) & (true != UNKNOWN)).sum()) for given, true in zip(guess, labels, strict=True))
    return right / sum(int((true != UNKNOWN).sum()) for true in labels)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_labels_come_out_where_the_top_is_known(family: str) -> None:
    knowledge = knowing(tiny_model(family))
    traffic, labels = sent(knowledge)
    assert accuracy(ExactLabels(), knowledge, traffic, labels) == 1


def row_top(knowledge: Knowledge, row: Row) -> RowTop:
    return RowTop(ModelTop(knowledge.model, knowledge.plan), (row.output, row.mask, row.positions), 0.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_candidates_that_go_back_together_give_what_each_gives_alone(family: str) -> None:
    knowledge = knowing(tiny_model(family))
    row = labelled_row(knowledge, knowledge.public[0], START).row
    top = row_top(knowledge, row)
    lists = torch.randint(VOCAB, (LENGTH, 11), generator=torch.Generator().manual_seed(3))  # no multiple of a chunk
    drawn = top.drawn(lists)
    for place, tokens in enumerate(lists.T):
        single = top.direction(tokens).to(top._read_alone)
        (expected,) = torch.autograd.grad(top._read_alone, top._own, single, retain_graph=True)
        torch.testing.assert_close(drawn[:, place], expected[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(drawn[:, 0], drawn[:, 1])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_vocabulary_is_searched_by_the_directions_that_candidates_have(family: str) -> None:
    knowledge = knowing(tiny_model(family))
    labelled = labelled_row(knowledge, knowledge.public[0], START)
    top, places = row_top(knowledge, labelled.row), [START, LENGTH - 2]
    twice, gradient = torch.full((LENGTH, 1), 1e-9), labelled.row.gradient[0]
    nearest = [top.nearest(place, gradient, twice, VOCAB) for place in places]
    found = torch.stack([tokens for tokens, _ in nearest])
    drawn = top.drawn(torch.arange(VOCAB).expand(LENGTH, -1))[places]
    for place, (tokens, directions) in enumerate(nearest):
        torch.testing.assert_close(directions, drawn[place, tokens], rtol=1e-4, atol=1e-5)
    along = torch.cosine_similarity(gradient[places][:, None], drawn, dim=-1).double()
    power = gradient[places].double().square().sum(-1, keepdim=True)
    scores = along.abs() * along * power / twice[places] + top.prior[places]
    torch.testing.assert_close(scores.gather(1, found), scores.sort(descending=True).values, rtol=1e-3, atol=1e-3)
    assert found[1, 0] == labelled.labels[LENGTH - 2]  # of the last label nothing is hidden


def test_a_label_that_is_in_no_list_is_searched_for(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = RowTop.along

    def along(top: RowTop, gradient: Tensor) -> Tensor:
        found = honest(top, gradient)
        found[::2] = torch.rand(found[::2].shape, generator=torch.Generator().manual_seed(3)).double()
        return found

    monkeypatch.setattr(gradient_labels, "LISTS", (1,))
    knowledge = knowing(tiny_model("llama"))
    traffic, labels = sent(knowledge)
    assert accuracy(ExactLabels(), knowledge, traffic, labels) == 1
    monkeypatch.setattr(RowTop, "along", along)
    found = accuracy(ExactLabels(), knowledge, traffic, labels)

    def first(top: RowTop, place: int, *_: Any) -> tuple[Tensor, Tensor]:
        return torch.tensor([0]), top.drawn(torch.zeros(LENGTH, 1, dtype=torch.long))[place]

    monkeypatch.setattr(RowTop, "nearest", first)
    assert found == 1
    assert accuracy(ExactLabels(), knowledge, traffic, labels) < 0.7


def test_the_search_ends_where_it_explains_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large vocabulary some token fits a position without a label well enough to show, and so would the next."""
    knowledge = knowing(tiny_model("llama"))
    attack, searched = ExactLabels(), []
    attack.prepare(knowledge)
    row = labelled_row(knowledge, knowledge.public[0], START).row

    def nearest(_: RowTop, place: int, left: Tensor, __: Tensor, count: int) -> tuple[Tensor, Tensor]:
        searched.append(place)
        return torch.arange(count), torch.zeros(count, left.shape[1])

    def chosen(_: ExactLabels, __: RowTop, left: Tensor, lists: Tensor, directions: Tensor, *___: Tensor) -> _Matched:
        cosines = torch.zeros(LENGTH)
        cosines[searched] = 0.8
        cosines[START - 1 : -1] = 1
        unexplained = 1 - cosines
        return _Matched(lists, directions, lists[:, 0], cosines, unexplained, unexplained, left)

    monkeypatch.setattr(RowTop, "nearest", nearest)
    monkeypatch.setattr(ExactLabels, "_chosen", chosen)
    monkeypatch.setattr(attack, "threshold", 0.5)
    monkeypatch.setattr(attack, "_explained", 0.1)
    attack.match(row)
    assert searched == [LENGTH - 1, START - 2]  # beside the last label and the first


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_a_coarse_wire_hides_few_labels(codec: str) -> None:
    knowledge = knowing(tiny_model("llama"), codec=codec)
    traffic, labels = sent(knowledge)
    assert accuracy(ExactLabels(), knowledge, traffic, labels) > 0.95


def test_most_labels_come_out_of_the_gradient_as_it_is() -> None:
    knowledge = knowing(tiny_model("llama"))
    traffic, labels = sent(knowledge)
    assert 0.8 < accuracy(DirectLabels(), knowledge, traffic, labels) <= 1


def test_positions_without_a_label_are_mostly_left_alone() -> None:
    knowledge = knowing(tiny_model("llama"), public=4)
    traffic, labels = sent(knowledge)
    attack = ExactLabels()
    attack.prepare(knowledge)
    guess = attack.run(traffic).labels
    assert guess is not None
    guessed = torch.cat(guess)[torch.cat(labels) == UNKNOWN] != UNKNOWN
    assert guessed.double().mean() < 0.1
    assert attack.listed is not None
    assert torch.cat(attack.listed).all()


class NoisyGradients(KnownDefence):
    """Noise of twice what the gradient is on the whole."""

    def gradient(self, gradient: Tensor) -> Tensor:
        return gradient + 2 * gradient.std() * torch.randn(gradient.shape)


@pytest.mark.parametrize("attack", [DirectLabels, ExactLabels])
def test_who_knows_where_labels_stand_reads_them_out_of_more_noise(attack: type[DirectLabels | ExactLabels]) -> None:
    knowledge = replace(knowing(tiny_model("llama")), defence=NoisyGradients())
    traffic, labels = sent(knowledge, rows=8)
    found = accuracy(attack(), replace(knowledge, label_places=True), traffic, labels)
    assert found > accuracy(attack(), knowledge, traffic, labels)


class SmoothedLabels(KnownDefence):
    """As `smoothing:share=0.3` has them."""

    label_smoothing = 0.3


def test_who_knows_how_much_labels_are_smoothed_reads_those_that_the_model_is_sure_of() -> None:
    """Of a label that is likelier than its smoothed share, the gradient points the other way."""
    model = copy.deepcopy(tiny_model("llama"))
    with torch.no_grad():
        model.lm_head.weight *= 30
    start = torch.randint(3, VOCAB, (3, 1), generator=torch.Generator().manual_seed(2))
    texts = model.generate(start, do_sample=False, min_new_tokens=LENGTH - 1, max_new_tokens=LENGTH - 1, pad_token_id=0)
    knowledge = replace(knowing(model), defence=SmoothedLabels())
    traffic, labels = sent(knowledge, texts=texts)
    assert accuracy(ExactLabels(), knowledge, traffic, labels) > 0.9
    assert accuracy(ExactLabels(), replace(knowledge, defence=None), traffic, labels) < 0.5


def tuned_in_secret(model: Any, by: float, layers: range) -> Any:
    """The model with its weights in `layers` moved by a share of their size."""
    tuned, random = copy.deepcopy(model), torch.Generator().manual_seed(4)
    with torch.no_grad():
        for layer in layers:
            for weight in tuned.model.layers[layer].parameters():
                weight += by * weight.std() * torch.randn(weight.shape, generator=random)
    return tuned


def test_base_weights_are_near_enough_to_a_top_tuned_in_secret() -> None:
    model = tiny_model("llama")
    traffic, labels = sent(knowing(tuned_in_secret(model, 0.1, range(4, 6))))
    assert accuracy(ExactLabels(), knowing(model), traffic, labels) > 0.95


@pytest.mark.parametrize("attack", [DirectLabels, ExactLabels])
def test_another_head_and_gradients_of_other_calls_give_nothing(attack: type[DirectLabels | ExactLabels]) -> None:
    knowledge = knowing(tiny_model("llama"))
    traffic, labels = sent(knowledge)
    assert accuracy(attack(), knowing(tiny_model("llama", seed=9)), traffic, labels) < 0.1
    random = torch.Generator().manual_seed(5)
    elsewhere = tuple(
        replace(each, gradient=each.gradient[:, torch.randperm(LENGTH, generator=random)]) for each in traffic.backwards
    )
    assert accuracy(attack(), knowledge, replace(traffic, backwards=elsewhere), labels) < 0.2


def test_a_gradient_without_its_output_is_refused() -> None:
    knowledge = knowing(tiny_model("llama"))
    traffic, _ = sent(knowledge)
    attack = ExactLabels()
    attack.prepare(knowledge)
    with pytest.raises(DataError, match="call 0 has a gradient and no output"):
        attack.run(replace(traffic, forwards=()))
