"""Decoys: real rows keep their bits, and nothing but contents tells which rows are real."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from support.privacy.defended_model import DefendedModel, Rows
from torch import Tensor

from isthmus.common.errors import ConfigError
from isthmus.privacy.defences.decoys import Decoys, Text
from isthmus.privacy.defences.defence import IGNORED, Pass
from isthmus.privacy.defences.secret_noise import SecretNoise

ROWS: Rows = [[5, 6, 7, 8, 9], [10, 11, 12], [13, 14, 15, 16]]


def texts(count: int, length: int = 6) -> list[Text]:
    ids = [tuple(50 + (7 * index + step) % 200 for step in range(length)) for index in range(count)]
    return [(row, (IGNORED, *row[1:])) for row in ids]


def decoys(noise: SecretNoise, count: int = 1, rows: Rows = ROWS) -> Decoys:
    return Decoys(count, [tuple(row) for row in rows], texts(len(rows) * count), noise)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("plan", ["2:2", "0:2"])
def test_real_rows_keep_their_bits(
    run: Callable[..., DefendedModel], noise: SecretNoise, count: int, plan: str
) -> None:
    plain, hidden = run(plan=plan), run(plan=plan)
    loss, gradients = plain.gradient(ROWS)
    logits = plain.forward(ROWS)
    state = torch.get_rng_state()
    with hidden.defended(decoys(noise, count)) as span:
        for stage in range(3):
            span.begin(stage)
            found, ours = hidden.gradient(ROWS, span)
            assert found == loss
            assert all(map(torch.equal, ours, gradients))
        assert torch.equal(hidden.forward(ROWS), logits)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(hidden.sent) == 4 * (1 + count)
    assert len(hidden.gradients) == (3 * (1 + count) if plan == "2:2" else 0)
    # Without decoys again: nothing is left of them.
    assert hidden.gradient(ROWS)[0] == loss
    assert len(hidden.sent) == 4 * (1 + count) + 1


@pytest.mark.parametrize(
    "defence", ["learned-noise:sigma=0.1", "embedding-noise:eta=40,denoise=true", "bottleneck:rank=8"]
)
def test_what_a_defence_trains_learns_nothing_of_decoys(
    run: Callable[..., DefendedModel], noise: SecretNoise, defence: str
) -> None:
    def found(made: Decoys | None) -> tuple[Tensor, ...]:
        hidden = run(defence)
        module = hidden.defences[0].module()
        assert module is not None
        with hidden.defended(made) as span:
            return torch.autograd.grad(hidden.loss(ROWS, span), list(module.parameters()))

    plain = found(None)
    assert any(gradient.any() for gradient in plain)
    assert all(map(torch.equal, found(decoys(noise)), plain))


def places_of(sent: list[Tensor], known: Tensor) -> list[int]:
    """In which of two calls each row of `known` went."""
    return [0 if torch.equal(sent[0][row], known[row]) else 1 for row in range(len(known))]


def test_order_alone_does_not_tell_which_row_is_real(run: Callable[..., DefendedModel], noise: SecretNoise) -> None:
    plain, hidden, rounds = run(), run(), 200
    plain.forward(ROWS)
    told: Counter[tuple[int, int]] = Counter()
    together = 0
    with hidden.defended(decoys(noise)) as span:
        for stage in range(rounds):
            span.begin(stage)
            hidden.forward(ROWS)
            places = places_of(hidden.sent[-2:], plain.sent[0])
            together += places[0] == places[1]
            told.update(enumerate(places))
    # The best classifier of a row's place is right in half of them, up to five standard deviations.
    for row in range(len(ROWS)):
        assert abs(told[row, 0] / rounds - 0.5) < 5 * 0.5 / rounds**0.5
    assert abs(together / rounds - 0.5) < 5 * 0.5 / rounds**0.5


def test_the_classifier_finds_rows_that_do_not_change_places(
    run: Callable[..., DefendedModel], noise: SecretNoise, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control."""
    monkeypatch.setattr(Decoys, "places", lambda self, now: torch.tensor([[0] * 3, [1] * 3]))
    plain, hidden = run(), run()
    plain.forward(ROWS)
    with hidden.defended(decoys(noise)):
        hidden.forward(ROWS)
    assert places_of(hidden.sent, plain.sent[0]) == [0, 0, 0]


def test_decoys_are_sent_with_gradients_of_their_own_loss(
    run: Callable[..., DefendedModel], noise: SecretNoise
) -> None:
    hidden, other = run(), run()
    made = decoys(noise)
    with hidden.defended(made) as span:
        hidden.gradient(ROWS, span)
    places = torch.tensor(places_of(hidden.sent, other_sent(other, ROWS)))
    for row, place in enumerate(places.tolist()):
        real, decoy = hidden.gradients[1 - place], hidden.gradients[place]  # autograd goes back from the last call
        length = len(ROWS[row])
        assert real[row, : length - 1].abs().max() > 0
        assert decoy[row, : length - 1].abs().max() > 0
        assert not decoy[row, length:].any()
        assert 0.2 < float(decoy[row].norm() / real[row].norm()) < 5


def other_sent(model: DefendedModel, rows: Rows) -> Tensor:
    model.forward(rows)
    return model.sent[-1]


def test_a_decoy_without_a_loss_is_refused_before_its_gradient_is_sent(
    run: Callable[..., DefendedModel], noise: SecretNoise
) -> None:
    hidden = run()
    with hidden.defended(decoys(noise)), pytest.raises(RuntimeError, match="a decoy has no gradient"):
        hidden.gradient(ROWS)
    assert not hidden.gradients


def test_real_rows_and_decoys_have_noise_of_their_own(run: Callable[..., DefendedModel], noise: SecretNoise) -> None:
    loud = run("gaussian:clip=1e-9,sigma=1e9,gradient_clip=1e-9,gradient_sigma=1e9")
    with loud.defended(decoys(noise)) as span:
        loud.gradient(ROWS, span)
    for one, other in (loud.sent, loud.gradients):
        assert one.std() == pytest.approx(0.9, rel=0.3)
        assert not torch.equal(one[0, :3], other[0, :3])


def test_an_example_has_the_same_decoys_always_and_no_other_has_them(
    passing: Callable[..., Pass], noise: SecretNoise
) -> None:
    rows = [list(range(10 * index, 10 * index + length)) for index, length in enumerate((4, 6, 2, 5))]
    made = decoys(noise, 2, rows)
    first, second = (made.rows(passing(4, 6, 2, 5, turn=turn)) for turn in (0, 1))
    assert all(torch.equal(one.ids, other.ids) for one, other in zip(first, second, strict=True))
    chosen = {(index, tuple(row.tolist())) for index, rows_ in enumerate(first) for row in rows_.ids}
    assert len({row[:2] for _, row in chosen}) == 8
    for decoy in first:
        assert [int((labels != IGNORED).sum()) for labels in decoy.labels] == [3, 5, 1, 4]


def test_too_few_or_too_short_texts_are_refused(noise: SecretNoise) -> None:
    real = [tuple(row) for row in ROWS]
    with pytest.raises(
        ConfigError, match="5 generated examples are too few, or too short, for 3 real ones with 2 each"
    ):
        Decoys(2, real, texts(5), noise)
    with pytest.raises(ConfigError, match="none is left that has 5 tokens"):
        Decoys(1, real, texts(30, length=4), noise)
    # The shortest that will do are taken, so that the long ones are left for long rows.
    Decoys(1, real, [*texts(2, length=4), *texts(1, length=5)], noise)


def test_a_text_that_a_short_row_would_cut_to_its_prompt_is_left_for_a_longer_one(
    noise: SecretNoise, passing: Callable[..., Pass]
) -> None:
    late = (1, 2, 3, 4), (IGNORED, IGNORED, IGNORED, 4)
    early = (5, 6, 7, 8, 9, 10), (IGNORED, 6, 7, 8, 9, 10)
    made = Decoys(1, [(0, 1, 2), (10, 11, 12, 13)], [late, early], noise)
    (decoy,) = made.rows(passing(3, 4))
    assert [decoy.ids[0, :3].tolist(), decoy.ids[1].tolist()] == [[5, 6, 7], [1, 2, 3, 4]]
    assert decoy.labels[1].tolist() == [IGNORED, IGNORED, IGNORED, 4]
    with pytest.raises(ConfigError, match="none is left that has 3 tokens"):
        Decoys(1, [(0, 1, 2)], [late], noise)


def test_a_row_gets_a_text_of_its_own_length_where_there_is_one(noise: SecretNoise) -> None:
    """A text that is one token too long for a short row would otherwise take the place of the next row's, and so on."""
    made = Decoys(1, [(1, 2, 3), (4, 5, 6, 7), (7, 8, 9, 10, 11)], [texts(1, length)[0] for length in (6, 4, 5)], noise)
    assert [len(made.of(ids)[0][0]) for ids in [(1, 2, 3), (4, 5, 6, 7), (7, 8, 9, 10, 11)]] == [3, 4, 5]
    assert made.of((4, 5, 6, 7)) == texts(1, 4)
    assert made.of((7, 8, 9, 10, 11)) == texts(1, 5)
