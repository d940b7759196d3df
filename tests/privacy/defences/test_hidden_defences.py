"""The bottleneck, mixing, smoothed labels, and the broken examples with what breaks them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.privacy.defended_model import DefendedModel
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from isthmus.common.errors import ConfigError
from isthmus.privacy.defences.broken_examples import Rounding, SecretRotation
from isthmus.privacy.defences.defence import IGNORED, Pass
from isthmus.privacy.defences.defence_options import Mixing, Quantization, Rotation, Smoothing, TrainedBottleneck
from isthmus.privacy.defences.label_smoothing import LabelSmoothing
from isthmus.privacy.defences.mixing import RowMixing
from isthmus.privacy.defences.trained_bottleneck import BottleneckPair

WIDTH = 32


def rank_of(sent: Tensor) -> int:
    return int(torch.linalg.matrix_rank(sent.flatten(0, -2), atol=1e-4))


@pytest.mark.parametrize("noisy", [False, True])
def test_what_crosses_a_bottleneck_has_its_rank(passing: Callable[..., Pass], noisy: bool) -> None:
    more = {"clip": 1.0, "sigma": 1.0} if noisy else {}
    pair = BottleneckPair(TrainedBottleneck(rank=4, **more), WIDTH)
    hidden = torch.randn(2, 30, WIDTH)
    assert rank_of(pair.hidden(hidden, passing(30, 20)).detach()) == 4
    assert rank_of(hidden) == WIDTH


def test_a_bottlenecks_noise_has_the_stated_deviation(passing: Callable[..., Pass]) -> None:
    pair = BottleneckPair(TrainedBottleneck(rank=4, clip=2.0, sigma=3.0), WIDTH)
    sent = pair.hidden(torch.zeros(1, 2000, WIDTH), passing(2000))
    assert (sent @ pair.module().down.weight.T).detach().std() == pytest.approx(6, rel=0.05)


def test_a_bottleneck_is_trained(run: Callable[..., DefendedModel]) -> None:
    model = run("bottleneck:rank=4")
    pair = model.defences[0].module()
    assert pair is not None
    rows = [[5, 6, 7, 8], [9, 10, 11]]
    optimizer = torch.optim.Adam(pair.parameters(), 1e-2)
    losses = []
    with model.defended() as span:
        for _ in range(20):
            output = model.loss(rows, span)
            optimizer.zero_grad()
            output.backward()
            optimizer.step()
            losses.append(float(output.detach()))
    assert losses[-1] < losses[0] - 0.1


def test_a_bottleneck_wider_than_the_hidden_states_is_refused() -> None:
    with pytest.raises(ValueError, match="rank = 33 is more than the hidden states' 32"):
        BottleneckPair(TrainedBottleneck(rank=33), WIDTH)


def test_a_mixed_row_is_of_two_examples(passing: Callable[..., Pass]) -> None:
    now, hidden = passing(5, 3), torch.randn(2, 5, WIDTH)
    mixed = RowMixing(Mixing(share=0.7), WIDTH).hidden(hidden, now)
    again = [0, 1, 2, 0, 1]  # the shorter one begins anew
    assert torch.allclose(mixed[0], 0.7 * hidden[0] + 0.3 * hidden[1, again], atol=1e-6)
    assert torch.allclose(mixed[1, :3], 0.7 * hidden[1, :3] + 0.3 * hidden[0, :3], atol=1e-6)
    assert not mixed[1, 3:].any()


def test_the_loss_is_mixed_alike(passing: Callable[..., Pass]) -> None:
    now, logits = passing(4, 4), torch.randn(2, 4, 50)
    labels = torch.tensor([[IGNORED, 3, 4, 5], [IGNORED, IGNORED, 7, 8]])

    def loss(wanted: Tensor) -> Tensor:
        flat = logits[:, :-1].flatten(0, 1), wanted[:, 1:].flatten()
        return cross_entropy(*flat, reduction="sum") / 5

    extra = RowMixing(Mixing(share=0.7), WIDTH).extra_loss(logits, labels, now)
    assert loss(labels) + extra == pytest.approx(float(0.7 * loss(labels) + 0.3 * loss(labels.flip(0))), rel=1e-5)


def test_a_row_without_a_partner_is_not_sent(run: Callable[..., DefendedModel]) -> None:
    model = run("mixing")
    with model.defended(), pytest.raises(ConfigError, match="left alone"):
        model.forward([[5, 6, 7]])
    assert not model.sent


def test_smoothing_moves_the_gradient_at_the_logits(passing: Callable[..., Pass]) -> None:
    logits, share = torch.randn(1, 4, 50, requires_grad=True), 0.2
    labels = torch.tensor([[IGNORED, 3, IGNORED, 5]])
    loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    extra = LabelSmoothing(Smoothing(share=share), WIDTH).extra_loss(logits, labels, passing(4))
    (gradient,) = torch.autograd.grad(loss + extra, logits)
    wanted = logits[0].softmax(-1) - (1 - share) * one_hot(torch.tensor([3, 0, 5, 0]), 50) - share / 50
    wanted[[1, 3]] = 0
    assert torch.allclose(gradient[0], wanted.detach() / 2, atol=1e-6)
    # It is still least at the label.
    assert gradient[0, 0].argmin() == 3
    assert gradient[0, 2].argmin() == 5


def test_a_rotation_is_learned_from_known_texts(passing: Callable[..., Pass]) -> None:
    rotation, now = SecretRotation(Rotation(), WIDTH), passing(60)
    known, secret = torch.randn(1, 60, WIDTH), torch.randn(1, 60, WIDTH)
    learned = torch.linalg.lstsq(rotation.hidden(known, now)[0], known[0]).solution
    sent = rotation.hidden(secret, now)
    assert torch.allclose(sent @ learned, secret, atol=1e-3)
    assert not torch.allclose(sent, secret, atol=0.5)
    assert torch.allclose(rotation.output(sent, now), secret, atol=1e-4)
    # The control: too few texts do not give it away.
    few = torch.linalg.lstsq(rotation.hidden(known, now)[0, :8], known[0, :8], driver="gelsd").solution
    assert not torch.allclose(sent @ few, secret, atol=0.5)


def test_rounded_hidden_states_are_matched_by_rounded_candidates(passing: Callable[..., Pass]) -> None:
    rounding, now = Rounding(Quantization(bits=3), WIDTH), passing(40)
    candidates = torch.randn(1, 40, WIDTH)
    sent = rounding.hidden(candidates, now)
    assert all(len(vector.unique()) <= 7 for vector in sent[0])
    assert not torch.allclose(sent, candidates, atol=0.1)
    distances = torch.cdist(sent[0], rounding.hidden(candidates, now)[0], compute_mode="donot_use_mm_for_euclid_dist")
    assert torch.equal(distances.argmin(-1), torch.arange(40))
    assert distances.diag().max() == 0
