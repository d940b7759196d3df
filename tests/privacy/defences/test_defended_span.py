"""Noise follows from what the cloud has answered: a step that is made again shows nothing without it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.privacy.defended_model import DefendedModel, Rows
from torch import Tensor

from isthmus.privacy.defences.decoys import Decoys
from isthmus.privacy.defences.defence import IGNORED
from isthmus.privacy.defences.defended_span import DefendedSpan
from isthmus.privacy.defences.secret_noise import SecretNoise

ROWS: Rows = [[5, 6, 7, 8], [9, 10, 11]]
MORE: Rows = [[12, 13, 14], [15, 16, 17, 18]]
CLIP, DEVIATION = 1e-3, 2e-3  # of gradients
NOISY = "gaussian:clip=1,sigma=2,gradient_clip=1e-3,gradient_sigma=2"

Change = Callable[[Tensor], Tensor]
Step = tuple[list[Tensor], list[Tensor], bytes]
"""The hidden states and the gradients that were sent, and the digest of the answers afterwards."""


def as_it_is(answer: Tensor) -> Tensor:
    return answer


def other(answer: Tensor) -> Tensor:
    return answer + torch.linspace(-1, 1, answer.shape[-1])


def lied_to(model: DefendedModel, forward: Change = as_it_is, backward: Change = as_it_is) -> DefendedModel:
    """A model whose cloud changes its answers."""
    remote = model.edge.remote_layers
    honest = remote.span

    def lying(hidden: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
        if hidden.requires_grad:
            hidden.register_hook(backward)
        return forward(honest(hidden, mask, positions))

    remote.span = lying
    return model


def step(model: DefendedModel, *batches: Rows, before: bytes = b"", made: Decoys | None = None) -> Step:
    """A step of some micro-batches, when the cloud had given such answers before."""
    with model.defended(made) as span:
        span.answers = before
        span.begin("step", 1, learned_from=True)
        for rows in batches:
            model.gradient(rows, span)
        return model.sent, model.gradients, span.answers


def real(gradient: Tensor, rows: Rows = ROWS) -> Tensor:
    """Of the tokens alone, `[T, h]`."""
    return torch.cat([each[: len(row)] for each, row in zip(gradient, rows, strict=True)])


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def test_a_step_that_gets_the_same_answers_sends_the_same(run: Callable[..., DefendedModel]) -> None:
    first, again = (step(run(NOISY), ROWS, MORE) for _ in range(2))
    assert same(again[0], first[0])
    assert same(again[1], first[1])
    assert again[2] == first[2] != b""


def test_other_answers_are_met_with_other_noise(
    run: Callable[..., DefendedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    def difference() -> Tensor:
        (hidden, gradients, _), (hidden_again, gradients_again, _) = (
            step(lied_to(run(NOISY), change), ROWS) for change in (as_it_is, other)
        )
        assert same(hidden, hidden_again)  # it is sent before the answer
        return real(gradients[0] - gradients_again[0])

    assert difference().std() == pytest.approx(2**0.5 * DEVIATION, rel=0.15)
    # The control: noise that knows nothing of the answers falls out, and what is left is the gradients' own difference.
    monkeypatch.setattr(DefendedSpan, "_noted", lambda self, answer: answer)
    bare = [
        real(step(lied_to(run(NOISY.replace("gradient_sigma=2", "gradient_sigma=1e-9")), change), ROWS)[1][0])
        for change in (as_it_is, other)
    ]
    assert torch.allclose(difference(), bare[0] - bare[1], atol=1e-8)
    assert 0 < difference().norm(dim=-1).max() <= 2.001 * CLIP


def test_what_is_sent_later_has_other_noise_after_any_other_answer(run: Callable[..., DefendedModel]) -> None:
    """The weights that a step ends with follow from the answers to backwards as well."""
    plain = step(run(NOISY), ROWS, MORE)
    for lie in ({"forward": other}, {"backward": other}):
        sent, _, answers = step(lied_to(run(NOISY), **lie), ROWS, MORE)
        assert answers != plain[2]
        assert torch.equal(sent[0], plain[0][0])
        later = real(sent[1] - plain[0][1], MORE)  # the same hidden states: nothing has been learned yet
        assert later.std() == pytest.approx(2**0.5 * 2, rel=0.15)


def test_a_step_that_is_made_again_goes_back_to_the_answers_before_it(run: Callable[..., DefendedModel]) -> None:
    model = run(NOISY)
    with model.defended() as span:
        for before in (b"", b"", b"others"):
            span.answers = before
            span.begin("step", 1, learned_from=True)
            model.gradient(ROWS, span)
    assert torch.equal(model.sent[0], model.sent[1])
    assert torch.equal(model.gradients[0], model.gradients[1])
    assert not torch.equal(model.sent[0], model.sent[2])
    assert not torch.equal(model.gradients[0], model.gradients[2])


def test_answers_of_evaluations_and_rehearsals_move_no_noise(run: Callable[..., DefendedModel]) -> None:
    model = run(NOISY)
    with model.defended() as span:
        span.begin("after", 0)
        model.forward(ROWS)
        assert span.answers == b""
        with span.rehearsed(lambda around: around):
            model.gradient(ROWS, span)
        assert span.answers == b""
        # The control: a step's do. An evaluation after it has noise of its own.
        span.begin("step", 1, learned_from=True)
        model.gradient(ROWS, span)
        assert span.answers != b""
        span.begin("after", 0)
        model.forward(ROWS)
    assert not torch.equal(model.sent[0], model.sent[-1])


def test_what_an_example_has_in_every_pass_is_left_to_it(run: Callable[..., DefendedModel]) -> None:
    for defence, kept in (
        ("gaussian:clip=1,sigma=2,memo=true", True),
        ("gaussian:clip=1,sigma=2", False),
        ("embedding-noise:eta=40", True),
        ("rotation", True),
        ("bottleneck:rank=4", True),
        ("bottleneck:rank=4,clip=1,sigma=2", False),
        ("learned-noise:sigma=1", False),
    ):
        one, another = (step(run(defence), ROWS, before=before)[0][0] for before in (b"", b"others"))
        assert torch.equal(one, another) == kept, defence


def test_decoys_stay_and_their_places_are_drawn_anew(
    run: Callable[..., DefendedModel], noise: SecretNoise, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [(tuple(range(50 + 9 * n, 54 + 9 * n)), (IGNORED, *range(51 + 9 * n, 54 + 9 * n))) for n in range(2)]
    made = Decoys(1, [tuple(row) for row in ROWS], texts, noise)
    places: list[Tensor] = []
    honest = Decoys.places
    monkeypatch.setattr(Decoys, "places", lambda self, now: places.append(honest(self, now)) or places[-1])

    def drawn(before: Callable[[int], bytes]) -> list[list[list[int]]]:
        places.clear()
        for number in range(6):
            step(run(), ROWS, before=before(number), made=made)
        return [each.tolist() for each in places]

    always = drawn(lambda _: b"")
    assert all(each == always[0] for each in always)
    assert len({str(each) for each in drawn(lambda number: bytes([number]))}) > 1
    # Rows and decoys are the same, wherever they went.
    (one, two), (three, four) = (step(run(), ROWS, before=before, made=made)[0] for before in (b"a", b"b"))
    rows = [{tuple(call[row, 0].tolist()) for call in calls} for calls in ((one, two), (three, four)) for row in (0, 1)]
    assert rows[:2] == rows[2:]


def test_the_first_pass_of_a_stage_waits_for_what_is_called_before_it(run: Callable[..., DefendedModel]) -> None:
    model, seen = run(NOISY), []
    with model.defended() as span:
        span.begin("step", 1, before_first=lambda: seen.append(len(model.sent)))
        with span.rehearsed(lambda around: around):
            model.forward(ROWS)
        assert seen == []
        for _ in range(2):
            model.forward(ROWS)
        assert seen == [1]

        def refused() -> None:
            raise OSError

        span.begin("step", 2, before_first=refused)
        with pytest.raises(OSError):  # noqa: PT011  # the test's own
            model.forward(ROWS)
    assert len(model.sent) == 3
