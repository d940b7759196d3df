"""Metric noise on embeddings."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.privacy.defended_model import DefendedModel

from isthmus.privacy.defences.embedding_noise import metric_noise
from isthmus.privacy.defences.secret_noise import SecretNoise

ROWS = [[5, 6, 7, 8], [9, 10, 11]]


def test_its_length_is_gamma_and_its_direction_uniform(noise: SecretNoise) -> None:
    width, eta = 24, 3.0
    drawn = metric_noise(noise, 5000, width, eta, b"x").double()
    lengths = drawn.norm(dim=-1)
    assert lengths.mean() == pytest.approx(width / eta, rel=0.01)
    assert lengths.var() == pytest.approx(width / eta**2, rel=0.06)
    directions = drawn / lengths.unsqueeze(-1)
    assert directions.mean(0).norm() < 0.03
    assert torch.allclose(directions.T @ directions / 5000, torch.eye(width).double() / width, atol=0.01)


def test_it_bounds_what_one_message_tells_of_a_token(noise: SecretNoise) -> None:
    """The log of the densities' ratio is eta times a difference of distances, and so at most eta times the distance."""
    eta, one, other = 2.0, torch.zeros(8), torch.full((8,), 0.2)
    drawn = metric_noise(noise, 2000, 8, eta, b"x")
    told = eta * ((drawn + one - other).norm(dim=-1) - drawn.norm(dim=-1))
    assert told.abs().max() <= eta * (one - other).norm() * (1 + 1e-5)
    # The control: half the noise has half as small a bound.
    less = eta * 2 * ((drawn / 2 + one - other).norm(dim=-1) - (drawn / 2).norm(dim=-1))
    assert less.abs().max() > eta * (one - other).norm()


def test_an_example_has_the_same_noise_in_every_pass(run: Callable[..., DefendedModel]) -> None:
    plain, noisy = run(), run("embedding-noise:eta=20")
    with noisy.defended() as span, torch.no_grad():
        for stage in ("first", "second"):
            span.begin(stage)
            noisy.forward(ROWS)
    plain.forward(ROWS)
    assert torch.equal(noisy.sent[0], noisy.sent[1])
    assert not torch.allclose(noisy.sent[0], plain.sent[0], rtol=0.1)
