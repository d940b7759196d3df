"""Labels of rows that are mixed, two at a place."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.models.tiny import HIDDEN, N_LAYERS, VOCAB, tiny_tokenizer
from support.privacy.attacked import tiny_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from isthmus.backbone.plan import SplitPlan
from isthmus.privacy.attacks.attack import UNKNOWN, Knowledge, KnownDefence
from isthmus.privacy.attacks.front import Front
from isthmus.privacy.attacks.known_defences import KnownDefences
from isthmus.privacy.attacks.labels import gradient_labels
from isthmus.privacy.attacks.labels.gradient_labels import ExactLabels
from isthmus.privacy.attacks.labels.label_candidates import choose
from isthmus.privacy.attacks.labels.labelled_rows import labelled_row
from isthmus.privacy.attacks.labels.model_top import RowTop
from isthmus.privacy.defences.defence import IGNORED, Pass
from isthmus.privacy.defences.defence_options import read_defence
from isthmus.privacy.defences.defended_span import build_defences
from isthmus.privacy.defences.mixing import RowMixing
from isthmus.privacy.defences.secret_noise import KEY_BYTES, SecretNoise
from isthmus.privacy.recording.traffic import Backward, Forward, Traffic

PLAN = SplitPlan.parse("2:2", N_LAYERS)
SHARE = 0.9


def texts(seed: int, *lengths: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (length,), generator=random) for length in lengths]


def mixing() -> RowMixing:
    (defence,) = build_defences([read_defence(f"mixing:share={SHARE}")], HIDDEN)
    assert isinstance(defence, RowMixing)
    return defence


def knowing(model: Any, *others: str, public_lengths: tuple[int, ...] = (14, 11, 12)) -> Knowledge:
    front, public = Front(model, PLAN.bottom), texts(1, *public_lengths)
    defences = [mixing(), *build_defences([read_defence(other) for other in others], HIDDEN)]
    defence = KnownDefences(defences, lambda: [front.states(tokens) for tokens in public])
    return Knowledge(model, tiny_tokenizer(), PLAN, front, tuple(public), defence=defence)


def sent(model: Any, rows: list[Tensor], starts: list[int], *others: str) -> tuple[Traffic, list[Tensor]]:
    """What an edge sends of a micro-batch that it mixes, of whose rows the tokens from `starts` on are labels.

    Args:
        others: Further defences of the loss.
    """
    ids = pad_sequence(rows, batch_first=True)
    real = pad_sequence([torch.ones_like(tokens) for tokens in rows], batch_first=True).bool()
    wanted = ids.masked_fill(~real, IGNORED)
    for row, start in zip(wanted, starts, strict=True):
        row[:start] = IGNORED
    defence, now, kept = mixing(), Pass(SecretNoise(b"k" * KEY_BYTES), (0,), ids, real), []

    def keep(_module: Any, _args: Any, output: Tensor) -> Tensor:
        kept.append(output.detach().requires_grad_())
        return kept[0]

    hooks = [
        model.model.layers[PLAN.cloud.start].register_forward_pre_hook(
            lambda _, args: (defence.hidden(args[0], now), *args[1:])
        ),
        model.model.layers[PLAN.cloud.stop - 1].register_forward_hook(keep),
    ]
    logits = model(input_ids=ids, attention_mask=real.long(), use_cache=False).logits
    for hook in hooks:
        hook.remove()
    loss = cross_entropy(logits[:, :-1].flatten(0, 1), wanted[:, 1:].flatten(), ignore_index=IGNORED)
    for each in (defence, *build_defences([read_defence(other) for other in others], HIDDEN)):
        extra = each.extra_loss(logits, wanted, now)
        assert extra is not None
        loss = loss + extra
    (gradient,) = torch.autograd.grad(loss, kept)
    output = kept[0].detach()
    forward = Forward(0, 0, output, real, None, "fp32", output, True)
    ahead = torch.cat([wanted[:, 1:], torch.full((len(rows), 1), IGNORED)], 1)
    labels = list(ahead.masked_fill(ahead == IGNORED, UNKNOWN))
    return Traffic("", str(PLAN), (forward,), (Backward(0, 0, gradient, "fp32", None),)), labels


def accuracy(knowledge: Knowledge, traffic: Traffic, labels: list[Tensor]) -> float:
    attack = ExactLabels()
    attack.prepare(knowledge)
    guess = attack.run(traffic).labels
    assert guess is not None
    right = sum(int(((given == true) & (true != UNKNOWN)).sum()) for given, true in zip(guess, labels, strict=True))
    return right / sum(int((true != UNKNOWN).sum()) for true in labels)


def test_the_labels_of_mixed_rows_come_out() -> None:
    """Rows of several lengths: some places have labels of both rows, some of one, and a short row begins again."""
    model = copy.deepcopy(tiny_model("llama"))
    with torch.no_grad():
        model.lm_head.weight *= 10
    # Where the model is sure of a row's own label, the gradient is the partner's.
    start = torch.randint(3, VOCAB, (4, 1), generator=torch.Generator().manual_seed(2))
    made = model.generate(start, do_sample=False, min_new_tokens=15, max_new_tokens=15, pad_token_id=0)
    rows = [tokens[:length] for tokens, length in zip(made, (13, 16, 12, 9), strict=True)]
    traffic, labels = sent(model, rows, [6, 7, 3, 5])
    knowledge = knowing(model)
    assert accuracy(knowledge, traffic, labels) == 1
    # The control: who looks for one label at a place takes the partner's.
    assert accuracy(replace(knowledge, defence=KnownDefence()), traffic, labels) < 0.6


@pytest.mark.parametrize("others", [(), ("smoothing:share=0.2",)])
def test_a_public_text_is_mixed_as_the_edge_would_mix_it(others: tuple[str, ...]) -> None:
    model, (own, other) = tiny_model("llama"), texts(3, 14, 9)
    # Smoothed labels are a mean over a row's own ones, so here each row has as many labels as the other.
    traffic, labels = sent(model, [own, other], [7, 2], *others)
    found = labelled_row(knowing(model, *others), own, 7, partner=other)
    # Of all labels of the micro-batch the loss is a mean; a text alone has its own.
    size = sum(int((each != UNKNOWN).sum()) for each in labels) / int((labels[0] != UNKNOWN).sum())
    assert traffic.forwards[0].output is not None
    torch.testing.assert_close(found.row.output[0], traffic.forwards[0].output[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.row.gradient[0], size * traffic.backwards[0].gradient[0], rtol=1e-3, atol=1e-6)
    assert torch.equal(found.labels, labels[0])
    # The control: unmixed, it is another gradient.
    alone = labelled_row(replace(knowing(model), defence=None), own, 7)
    assert not torch.allclose(alone.row.gradient[0], size * traffic.backwards[0].gradient[0], rtol=0.1)


def test_labels_that_are_in_no_list_are_searched_for(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = RowTop.along

    def along(top: RowTop, gradient: Tensor) -> Tensor:
        found = honest(top, gradient)
        found[::2] = torch.rand(found[::2].shape, generator=torch.Generator().manual_seed(3)).double()
        return found

    monkeypatch.setattr(gradient_labels, "LISTS", (4,))
    monkeypatch.setattr(RowTop, "along", along)
    model = tiny_model("llama")
    traffic, labels = sent(model, texts(2, 13, 16), [6, 7])
    assert accuracy(knowing(model), traffic, labels) == 1

    def first(top: RowTop, place: int, _: Tensor, __: Tensor, count: int) -> tuple[Tensor, Tensor]:
        tokens = torch.arange(count)
        return tokens, top.drawn(tokens.expand(len(top.prior), -1))[place]

    monkeypatch.setattr(RowTop, "nearest", first)
    assert accuracy(knowing(model), traffic, labels) < 0.7


def test_the_larger_share_is_the_rows_own() -> None:
    directions = torch.randn(1, 5, HIDDEN, generator=torch.Generator().manual_seed(0))
    prior, twice = torch.zeros(1, 5), torch.full((1, 1), 1e-6)
    mixed = 3 * (SHARE * directions[:, 3] + (1 - SHARE) * directions[:, 1])
    found = choose(mixed, directions, prior, twice, SHARE)
    assert found.picked.tolist() == [[3, 1]]
    torch.testing.assert_close(3 * found.direction, mixed)
    alone = choose(0.3 * directions[:, 2], directions, prior, twice, SHARE)  # of one row alone, own or not
    assert alone.picked.tolist() == [[2, 2]]
    assert choose(mixed, directions, prior, twice, 1).picked.tolist() == [[3]]


def test_smoothed_labels_of_mixed_rows_come_out() -> None:
    model, smoothing = tiny_model("llama"), "smoothing:share=0.3"
    traffic, labels = sent(model, texts(2, 13, 16), [6, 7], smoothing)
    assert accuracy(knowing(model, smoothing), traffic, labels) == 1


def test_public_texts_may_have_labels_everywhere() -> None:
    model = tiny_model("llama")
    traffic, labels = sent(model, texts(2, 13, 16), [6, 7])
    assert accuracy(knowing(model, public_lengths=(6, 7, 6)), traffic, labels) > 0.9
