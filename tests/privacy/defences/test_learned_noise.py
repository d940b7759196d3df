"""Noise that is learned: its size, and what takes it out of the answers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.privacy.defended_model import DefendedModel

from isthmus.privacy.defences.defence import Pass
from isthmus.privacy.defences.defence_options import LearnedNoise
from isthmus.privacy.defences.learned_noise import ChannelNoise

WIDTH = 32
ROWS = [[5, 6, 7, 8], [9, 10, 11]]


def test_it_begins_with_the_stated_deviation(passing: Callable[..., Pass]) -> None:
    noise = ChannelNoise(LearnedNoise(sigma=3.0), WIDTH)
    sent = noise.hidden(torch.zeros(1, 2000, WIDTH), passing(2000)).detach()
    assert sent.std() == pytest.approx(3, rel=0.05)


def test_it_grows_in_the_channels_that_the_loss_does_not_need(passing: Callable[..., Pass]) -> None:
    noise = ChannelNoise(LearnedNoise(sigma=0.5, reward=1.0), WIDTH)
    needed = WIDTH // 2
    optimizer = torch.optim.Adam(noise.module().parameters(), 5e-2)
    logits = labels = torch.zeros(1, 1)
    for _ in range(60):
        now = passing(64)
        sent = noise.hidden(torch.zeros(1, 64, WIDTH), now)
        loss = sent[..., :needed].square().mean() + noise.extra_loss(logits, labels, now)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ours, others = noise.deviations[:needed], noise.deviations[needed:]
    assert others.min() > 2 * ours.max()
    # The control: without a reward nothing grows.
    assert ChannelNoise(LearnedNoise(sigma=0.5, reward=1e-9), WIDTH).extra_loss(logits, labels, now).abs() < 1e-6


def test_a_denoiser_begins_as_nothing_and_learns(run: Callable[..., DefendedModel]) -> None:
    noisy, denoised = run("embedding-noise:eta=40"), run("embedding-noise:eta=40,denoise=true")
    assert noisy.defences[0].module() is None
    denoiser = denoised.defences[0].module()
    assert denoiser is not None
    with noisy.defended():
        first = noisy.forward(ROWS)
    optimizer = torch.optim.Adam(denoiser.parameters(), 1e-2)
    losses = []
    with denoised.defended() as span:
        assert torch.equal(denoised.forward(ROWS), first)
        for _ in range(20):
            loss = denoised.loss(ROWS, span)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(sent, noisy.sent[0]) for sent in denoised.sent)  # nothing of it goes up
