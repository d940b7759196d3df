"""The edge's defences as an attacker knows them: their kinds and parameters, and the weights of a trained bottleneck.

It does not know the edge's key, so it draws noise of its own, nor what an example is mixed with, so it takes public
texts. Decoys, smoothed labels and private gradients change no hidden state that is sent of a real row. How much labels
are smoothed it knows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from isthmus.common.errors import ConfigError
from isthmus.privacy.attacks.attack import KnownDefence
from isthmus.privacy.defences.broken_examples import SecretRotation
from isthmus.privacy.defences.defence import Defence, Pass
from isthmus.privacy.defences.embedding_noise import MetricNoise
from isthmus.privacy.defences.label_smoothing import LabelSmoothing
from isthmus.privacy.defences.mixing import RowMixing
from isthmus.privacy.defences.secret_noise import KEY_BYTES, Label, SecretNoise


class KnownDefences(KnownDefence):
    """Defences in the order in which the edge applies them.

    Args:
        defences: As `isthmus.privacy.defences.defended_span.build_defences` makes them; a trained one as it is trained.
        others: Gives hidden states at the cut of public texts, `[n, h]` each, of two tokens or more; called for
            `mixing` alone.

    Raises:
        ConfigError: They cannot be known, or there is nothing to mix with.
    """

    def __init__(self, defences: Sequence[Defence], others: Callable[[], Sequence[Tensor]] = tuple) -> None:
        if any(isinstance(each, SecretRotation) for each in defences):
            raise ConfigError("rotation is a secret matrix: attack it as a private front, with known texts")
        mixes = any(isinstance(each, RowMixing) for each in defences)
        self._defences = tuple(defences)
        self._others = tuple(others()) if mixes else ()
        if mixes and not self._others:
            raise ConfigError("mixing needs something to mix with: give the hidden states of public texts")
        self._mean = torch.cat([states[1:] for states in self._others]).mean(0, keepdim=True) if mixes else None
        self.on_embeddings = any(isinstance(each, MetricNoise) for each in defences)
        self.label_smoothing = sum(each.share for each in defences if isinstance(each, LabelSmoothing))

    @torch.no_grad()
    def embedded(self, embedded: Tensor) -> Tensor:
        """See `KnownDefence`."""
        now = _pass(embedded, _drawn())
        for defence in self._defences:
            embedded = defence.embedded(embedded, now)
        return embedded

    @torch.no_grad()
    def send(self, hidden: Tensor) -> Tensor:
        """See `KnownDefence`."""
        other = self._others[int(torch.randint(len(self._others), ()))] if self._others else None
        return self._sent(hidden, _drawn(), other)

    def expect(self, hidden: Tensor) -> Tensor:
        """See `KnownDefence`: without noise, and mixed with the mean of the others. Gradients reach `hidden`."""
        with torch.set_grad_enabled(hidden.requires_grad):
            return self._sent(hidden, _Silent(bytes(KEY_BYTES)), self._mean)

    @torch.no_grad()
    def gradient(self, gradient: Tensor) -> Tensor:
        """See `KnownDefence`."""
        now = _pass(gradient, _drawn())
        for defence in self._defences:
            gradient = defence.gradient(gradient, now)
        return gradient

    def _sent(self, hidden: Tensor, noise: SecretNoise, other: Tensor | None) -> Tensor:
        """Hidden states `[B, S, h]` through the defences, each row mixed with `other` `[n, h]` where there is one."""
        if other is None:
            now = _pass(hidden, noise)
            for defence in self._defences:
                hidden = defence.hidden(hidden, now)
            return hidden
        rows = []
        for row in hidden:
            pair = nn.utils.rnn.pad_sequence([row, other], batch_first=True)
            now = _pass(pair, noise)
            for number, states in enumerate((row, other)):
                now.real[number, len(states) :] = False
            for defence in self._defences:
                pair = defence.hidden(pair, now)
            rows.append(pair[0, : len(row)])
        return torch.stack(rows)


class _Silent(SecretNoise):
    """Noise as it is on average: none."""

    def normal(self, shape: tuple[int, ...], *labels: Label) -> Tensor:
        return torch.zeros(shape)


def _drawn() -> SecretNoise:
    """Noise of the attacker's own."""
    return SecretNoise(bytes(torch.randint(256, (KEY_BYTES,)).tolist()))


def _pass(states: Tensor, noise: SecretNoise) -> Pass:
    """A pass of `[B, S, h]` without padding, of rows that differ."""
    shape = states.shape[:2]
    return Pass(noise, (), torch.arange(shape.numel()).view(shape), torch.ones(shape, dtype=torch.bool))
