"""A denoiser between the span's output and the edge's last layers, as an attacker knows it, and labels behind it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.models.tiny import HIDDEN, VOCAB, tiny_tokenizer
from support.privacy.denoised_edge import KEY, DenoisedEdge
from torch import Tensor
from torch.nn.functional import cosine_similarity

from isthmus.privacy.attacks import known_defences
from isthmus.privacy.attacks.attack import UNKNOWN, Knowledge, KnownDefence
from isthmus.privacy.attacks.front import Front
from isthmus.privacy.attacks.known_defences import KnownDefences
from isthmus.privacy.attacks.labels.gradient_labels import DirectLabels, ExactLabels
from isthmus.privacy.attacks.labels.labelled_rows import labelled_row
from isthmus.privacy.attacks.labels.model_top import ModelTop
from isthmus.privacy.defences.defence import Pass
from isthmus.privacy.defences.secret_noise import SecretNoise

LENGTH, START = 12, 5
LARGE = 16.0  # a denoiser that changes an output by as much as the output is long


class NotTold(KnownDefences):
    """An attacker who takes the span's output for what the last layers get."""

    def expect_output(self, output: Tensor) -> Tensor:
        return output


def texts(seed: int, count: int) -> tuple[Tensor, ...]:
    return tuple(torch.randint(3, VOCAB, (count, LENGTH), generator=torch.Generator().manual_seed(seed)))


def knowing(edge: DenoisedEdge, defence: KnownDefence | None) -> Knowledge:
    return Knowledge(
        edge.whole, tiny_tokenizer(), edge.plan, Front(edge.whole, edge.plan.bottom), texts(1, 2), defence=defence
    )


def accuracy(edge: DenoisedEdge, attack: DirectLabels | ExactLabels, defence: KnownDefence) -> float:
    """The share of labels that come out of the gradients which the edge sends."""
    traffic, labels = edge.learning(texts(2, 3), START)
    attack.prepare(knowing(edge, defence))
    guess = attack.run(traffic).labels
    assert guess is not None
    right = sum(int(((given == true) & (true != UNKNOWN)).sum()) for given, true in zip(guess, labels, strict=True))
    return right / sum(int((true != UNKNOWN).sum()) for true in labels)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_labels_come_out_behind_a_denoiser_as_without_one(family: str, tmp_path: Path) -> None:
    plain, denoised = (DenoisedEdge(tmp_path / str(size), family, size) for size in (0.0, LARGE))
    assert accuracy(plain, ExactLabels(), KnownDefences(plain.defences)) == 1
    assert accuracy(denoised, ExactLabels(), KnownDefences(denoised.defences)) == 1
    # The control: who leaves the denoiser out misses many.
    assert accuracy(denoised, ExactLabels(), NotTold(denoised.defences)) < 0.8


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_head_alone_gives_more_labels_above_the_denoiser(family: str, tmp_path: Path) -> None:
    edge = DenoisedEdge(tmp_path / "model", family, LARGE)
    above = accuracy(edge, DirectLabels(), KnownDefences(edge.defences))
    assert above > 0.7
    assert above > accuracy(edge, DirectLabels(), NotTold(edge.defences)) + 0.1


def test_a_public_text_is_sent_as_the_edge_would_send_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edge, tokens = DenoisedEdge(tmp_path / "model", size=LARGE), texts(3, 1)[0]
    traffic, labels = edge.learning([tokens], START)
    output, gradient = traffic.forwards[0].output, traffic.backwards[0].gradient
    assert output is not None
    knowledge = knowing(edge, KnownDefences(edge.defences))
    own = labelled_row(knowledge, tokens, START)
    monkeypatch.setattr(known_defences, "_drawn", lambda: SecretNoise(KEY))  # no attacker has it
    same = labelled_row(knowledge, tokens, START)
    torch.testing.assert_close(same.row.output, output)
    torch.testing.assert_close(same.row.gradient, gradient)
    assert torch.equal(same.labels, labels[0])
    assert not same.noise.any()
    # The controls: the attacker's own noise, and a gradient that has not passed through the denoiser.
    assert not torch.allclose(own.row.output, output, rtol=0.1)
    monkeypatch.setattr(KnownDefences, "output", lambda _, output: output)
    assert not torch.allclose(labelled_row(knowledge, tokens, START).row.gradient, gradient, rtol=0.1)


def test_in_a_pass_the_denoiser_is_told_the_noise_on_the_embeddings(tmp_path: Path) -> None:
    edge = DenoisedEdge(tmp_path / "model", size=LARGE)
    known, ids = KnownDefences(edge.defences), torch.stack(texts(3, 2))
    real = torch.ones_like(ids, dtype=torch.bool)
    real[1, LENGTH - 3 :] = False  # the padding of a shorter row
    output, nothing = torch.randn(*ids.shape, HIDDEN), torch.zeros(*ids.shape, HIDDEN)
    now = known.of_pass(ids, real)
    noise = now.embedded(nothing)
    assert not noise[1, LENGTH - 3 :].any()
    assert torch.equal(now.embedded(nothing), noise)
    (defence,) = edge.defences
    about = Pass(SecretNoise(KEY), (), ids, real)
    assert not torch.allclose(defence.embedded(nothing, about), noise)  # the edge's own noise is another

    class Told(Pass):
        """A pass with the noise that the attacker has drawn."""

        def spread(self, _rows: list[Tensor]) -> Tensor:
            return noise

    assert torch.equal(now.output(output), defence.output(output, Told(SecretNoise(KEY), (), ids, real)))
    # The control: another pass has other noise, as has each call outside of one.
    assert not torch.allclose(known.of_pass(ids, real).output(output), now.output(output), rtol=1e-2)
    assert not torch.allclose(known.output(output), known.output(output), rtol=1e-2)


def test_without_the_noise_each_position_is_denoised_by_itself_and_the_same_each_time(tmp_path: Path) -> None:
    edge = DenoisedEdge(tmp_path / "model", size=LARGE)
    known, output = KnownDefences(edge.defences), torch.randn(1, LENGTH, HIDDEN)
    expected = known.expect_output(output)
    assert not torch.allclose(expected, output, rtol=1e-2)
    torch.testing.assert_close(known.expect_output(output[:, 3:7]), expected[:, 3:7])
    assert torch.equal(known.of_pass(*pass_of(texts(3, 1)[0])).expect_output(output), expected)
    # It is near the middle of what comes of noise.
    drawn = torch.stack([known.output(output) for _ in range(40)])
    near = cosine_similarity((drawn.mean(0) - output).flatten(), (expected - output).flatten(), dim=0)
    assert near > 0.98 > cosine_similarity((drawn[0] - output).flatten(), (drawn[1] - output).flatten(), dim=0)


def pass_of(tokens: Tensor) -> tuple[Tensor, Tensor]:
    return tokens[None], torch.ones_like(tokens[None], dtype=torch.bool)


def test_a_gradient_is_solved_for_above_what_is_linear(tmp_path: Path) -> None:
    edge, random = DenoisedEdge(tmp_path / "model"), torch.Generator().manual_seed(6)
    matrix = torch.eye(HIDDEN) + 0.3 * torch.randn(HIDDEN, HIDDEN, generator=random) * HIDDEN**-0.5
    output, above = (torch.randn(1, LENGTH, HIDDEN, generator=random) for _ in range(2))
    top = ModelTop(edge.whole, edge.plan, lambda output: output @ matrix)
    torch.testing.assert_close(top.above(output, above @ matrix.T), above, rtol=1e-3, atol=1e-4)
    assert ModelTop(edge.whole, edge.plan).above(output, above) is above
    # The control, and a matrix that takes away directions, of which no gradient comes back.
    assert not torch.allclose(above @ matrix.T, above, rtol=0.1)
    matrix[:, HIDDEN // 2 :] = 0
    kept = top.above(output, above @ matrix.T)
    torch.testing.assert_close(kept[..., : HIDDEN // 2], above[..., : HIDDEN // 2], rtol=1e-3, atol=1e-3)
    assert kept[..., HIDDEN // 2 :].abs().max() < 1e-3


def test_each_positions_own_gradient_passes_through_the_denoiser(tmp_path: Path) -> None:
    edge = DenoisedEdge(tmp_path / "model", size=LARGE)
    known, random = KnownDefences(edge.defences), torch.Generator().manual_seed(7)
    hidden, weights = (torch.randn(1, LENGTH, HIDDEN, generator=random) for _ in range(2))
    tops = [ModelTop(edge.whole, edge.plan, known.expect_output), ModelTop(edge.whole, edge.plan)]
    found = []
    for top in tops:
        own, alone = top.alone(hidden, None, None)
        found += torch.autograd.grad(alone, own, weights)
    hidden.requires_grad_()
    output = tops[1].through(known.expect_output(hidden), None, None)
    for place in range(LENGTH):
        (expected,) = torch.autograd.grad(output[0, place], hidden, weights[0, place], retain_graph=True)
        torch.testing.assert_close(found[0][0, place], expected[0, place], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(found[1], found[0], rtol=0.1)
