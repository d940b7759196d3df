"""Noise that only the holder of the key can draw."""

from __future__ import annotations

import pytest
import torch

from isthmus.privacy.defences.secret_noise import SecretNoise


def test_it_is_standard_normal(noise: SecretNoise) -> None:
    drawn = noise.normal((1000, 101), "a").double()
    assert abs(drawn.mean()) < 0.015
    assert drawn.std() == pytest.approx(1, abs=0.01)
    assert (drawn.abs() < 1.96).double().mean() == pytest.approx(0.95, abs=0.005)
    assert abs(torch.corrcoef(drawn[:, :2].T)[0, 1]) < 0.15


def test_it_depends_on_key_and_label_alone(noise: SecretNoise) -> None:
    first = noise.normal((5,), "a", 1, b"x")
    noise.normal((5,), "a", 2)
    assert torch.equal(noise.normal((5,), "a", 1, b"x"), first)
    others = [noise.normal((5,), "a", 2, b"x"), noise.normal((5,), "a", 1, b"y"), noise.normal((5,), "b", 1, b"x")]
    others.append(SecretNoise(bytes(32)).normal((5,), "a", 1, b"x"))
    assert not any(torch.equal(other, first) for other in others)


def test_an_order_has_every_number_once(noise: SecretNoise) -> None:
    assert sorted(noise.order(50, "a")) == list(range(50))
    assert noise.order(50, "a") != noise.order(50, "b")


def test_a_short_key_is_refused() -> None:
    with pytest.raises(ValueError, match="31 bytes"):
        SecretNoise(bytes(31))
