"""The edge's defences as an attacker knows them: their kinds and parameters, and the weights of a trained bottleneck.

It does not know the edge's key, so it draws noise of its own, nor what an example is mixed with, so it takes public
texts. Decoys, smoothed labels and private gradients change no hidden state that is sent of a real row. How much labels
are smoothed it knows.

A denoiser takes the noise of an example, which is the edge's secret. For a text of its own, the attacker gives it the
noise that it has drawn for that text. For an answer to the edge, it takes the denoiser as it is without noise: it
infers nothing of an example's noise from what the edge has sent. Whoever scores a run is the edge, and needs no key
either: for texts that were not trained on, noise under its key is like any other.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.backbone.families import family_of
from isthmus.backbone.plan import SplitPlan
from isthmus.common.errors import ConfigError
from isthmus.privacy.attacks.attack import KnownDefence
from isthmus.privacy.defences.broken_examples import SecretRotation
from isthmus.privacy.defences.defence import Defence, Pass
from isthmus.privacy.defences.embedding_noise import MetricNoise
from isthmus.privacy.defences.label_smoothing import LabelSmoothing
from isthmus.privacy.defences.mixing import RowMixing
from isthmus.privacy.defences.secret_noise import KEY_BYTES, SecretNoise


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
        self._now: Pass | None = None
        self._partner: Tensor | None = None
        self.on_embeddings = any(isinstance(each, MetricNoise) for each in defences)
        self.label_smoothing = sum(each.share for each in defences if isinstance(each, LabelSmoothing))
        self.own_share = min((each.own for each in defences if isinstance(each, RowMixing)), default=1.0)

    def of_pass(self, ids: Tensor, real: Tensor, partner: Tensor | None = None) -> KnownDefences:
        """See `KnownDefence`."""
        bound = copy.copy(self)
        bound._now, bound._partner = Pass(_drawn(), (), ids, real), partner
        return bound

    @torch.no_grad()
    def embedded(self, embedded: Tensor) -> Tensor:
        """See `KnownDefence`."""
        now = self._pass(embedded)
        for defence in self._defences:
            embedded = defence.embedded(embedded, now)
        return embedded

    @torch.no_grad()
    def send(self, hidden: Tensor) -> Tensor:
        """See `KnownDefence`."""
        other = self._partner
        if other is None and self._others:
            other = self._others[int(torch.randint(len(self._others), ()))]
        return self._sent(hidden, self._pass(hidden), other)

    def expect(self, hidden: Tensor) -> Tensor:
        """See `KnownDefence`: without noise, and mixed with the mean of the others. Gradients reach `hidden`."""
        with torch.set_grad_enabled(hidden.requires_grad):
            return self._sent(hidden, _silent(hidden), self._mean)

    def output(self, output: Tensor) -> Tensor:
        """See `KnownDefence`."""
        return self._received(output, self._pass(output))

    def expect_output(self, output: Tensor) -> Tensor:
        """See `KnownDefence`."""
        return self._received(output, _silent(output))

    @torch.no_grad()
    def gradient(self, gradient: Tensor) -> Tensor:
        """See `KnownDefence`."""
        now = self._pass(gradient)
        for defence in self._defences:
            gradient = defence.gradient(gradient, now)
        return gradient

    def _pass(self, states: Tensor) -> Pass:
        """The pass that is under way, or one of rows `[B, S, h]` that differ, without padding."""
        return self._now or Pass(_drawn(), (), *_rows(states))

    def _sent(self, hidden: Tensor, now: Pass, other: Tensor | None) -> Tensor:
        """Hidden states `[B, S, h]` through the defences, each row mixed with `other` `[n, h]` where there is one."""
        if other is None:
            for defence in self._defences:
                hidden = defence.hidden(hidden, now)
            return hidden
        rows = []
        for row, real in zip(hidden, now.real, strict=True):
            pair = nn.utils.rnn.pad_sequence([row, other], batch_first=True)
            ids, both = _rows(pair)
            both[0, : len(row)], both[0, len(row) :], both[1, len(other) :] = real, False, False
            mixed = replace(now, ids=ids, real=both)
            for defence in self._defences:
                pair = defence.hidden(pair, mixed)
            rows.append(pair[0, : len(row)])
        return torch.stack(rows)

    def _received(self, output: Tensor, now: Pass) -> Tensor:
        """The span's output `[B, S, h]` through the defences, the last one first, as `DefendedSpan` has it."""
        for defence in reversed(self._defences):
            output = defence.output(output, now)
        return output


@contextmanager
def defended(
    model: Any, plan: SplitPlan, defence: KnownDefence, through: Callable[[Tensor], Tensor] = lambda crossing: crossing
) -> Iterator[None]:
    """Let a whole model compute what an edge with a defence would over a cloud, while the block runs.

    Args:
        model: A whole transformers causal LM; something may stand in for the cloud's layers.
        plan: Where it is cut.
        defence: In one pass (`KnownDefence.of_pass`) of the rows that the model is given in the block.
        through: What crossing makes of hidden states `[batch, sequence, h]`, up and down: a codec's error, say.
    """
    family = family_of(model.config)
    layers = getattr(model.get_submodule(family.base), family.layers)

    def up(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden = args[0] if args else kwargs.pop("hidden_states")
        return (through(defence.send(hidden)), *args[1:]), kwargs

    def down(_: Any, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (defence.output(through(output[0])), *output[1:])
        return defence.output(through(output))

    hooks = [
        model.get_input_embeddings().register_forward_hook(lambda _, __, found: defence.embedded(found)),
        layers[plan.cloud.start].register_forward_pre_hook(up, with_kwargs=True),
        layers[plan.cloud.stop - 1].register_forward_hook(down),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _SilentPass(Pass):
    """A pass with noise as it is on average: none."""

    def fresh_normal(self, width: int, purpose: str) -> Tensor:
        return torch.zeros(*self.real.shape, width, device=self.real.device)

    def spread(self, rows: list[Tensor]) -> Tensor:
        return torch.zeros(*self.real.shape, rows[0].shape[-1], device=self.real.device)


def _drawn() -> SecretNoise:
    """Noise of the attacker's own."""
    return SecretNoise(bytes(torch.randint(256, (KEY_BYTES,)).tolist()))


def _silent(states: Tensor) -> Pass:
    """A pass of `[B, S, h]` without padding and without noise, whatever the key is."""
    return _SilentPass(SecretNoise(bytes(KEY_BYTES)), (), *_rows(states))


def _rows(states: Tensor) -> tuple[Tensor, Tensor]:
    """Ids `[B, S]` of rows that differ, for `[B, S, h]`, and that all of them are tokens, `[B, S]` bool."""
    shape = states.shape[:2]
    return torch.arange(shape.numel()).view(shape), torch.ones(shape, dtype=torch.bool)
