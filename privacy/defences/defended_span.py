"""Defences between a model and its span.

What the model sends passes through each defence in the order of the options, and so does each gradient; what comes back
is undone in the opposite order. Without defences there is no such object, and nothing changes.

What is drawn anew for each pass follows from the answers of the cloud so far, too: those to forwards and to backwards
of training steps, on which depends what is sent later. So a step that is made again sends the same where the cloud
answers the same. Where it answers otherwise, the messages differ in their noise as well: under the same noise, their
difference would have none. Nothing that is sent depends on the answers of evaluations.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from isthmus.common.errors import UnsupportedCallError
from isthmus.privacy.defences.broken_examples import Rounding, SecretRotation
from isthmus.privacy.defences.decoys import Arranged, DecoyRows, Decoys, inverse
from isthmus.privacy.defences.defence import IGNORED, Defence, Pass
from isthmus.privacy.defences.defence_options import (
    DefenceOptions,
    EmbeddingNoise,
    Gaussian,
    LearnedNoise,
    Mixing,
    Quantization,
    Rotation,
    Smoothing,
    TrainedBottleneck,
)
from isthmus.privacy.defences.embedding_noise import MetricNoise
from isthmus.privacy.defences.gaussian_noise import GaussianNoise
from isthmus.privacy.defences.label_smoothing import LabelSmoothing
from isthmus.privacy.defences.learned_noise import ChannelNoise
from isthmus.privacy.defences.mixing import RowMixing
from isthmus.privacy.defences.secret_noise import Label, SecretNoise
from isthmus.privacy.defences.trained_bottleneck import BottleneckPair

SpanFn = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
"""See `isthmus.backbone.split.edge_model.SpanFn`."""

_MADE_BY: dict[type[DefenceOptions], Callable[[Any, int], Defence]] = {
    Gaussian: GaussianNoise,
    EmbeddingNoise: MetricNoise,
    LearnedNoise: ChannelNoise,
    TrainedBottleneck: BottleneckPair,
    Mixing: RowMixing,
    Smoothing: LabelSmoothing,
    Rotation: SecretRotation,
    Quantization: Rounding,
}
"""`decoys` take whole calls, and `dp-sgd` the adapters' gradients: they are no functions of hidden states."""


def build_defences(options: Sequence[DefenceOptions], width: int) -> list[Defence]:
    """The defences that are functions of hidden states and gradients.

    Raises:
        ValueError: A parameter does not fit hidden states of this width.
    """
    return [_MADE_BY[type(each)](each, width) for each in options if type(each) in _MADE_BY]


@dataclass(slots=True)
class _Stage:
    """What passes belong to.

    Attributes:
        label: What no other part of the run has.
        learned_from: Whether what is sent later depends on the answers.
        before_first: Called before the first pass is sent; None for nothing, and afterwards.
        calls: Passes so far.
    """

    label: tuple[Label, ...]
    learned_from: bool = False
    before_first: Callable[[], None] | None = None
    calls: int = 0


class DefendedSpan:
    """A `SpanFn` that defends what it sends.

    Args:
        model: The edge's model, without PEFT's wrapper.
        decoys: Decoys of the examples that will come; None for none.

    Attributes:
        answers: A digest of the answers so far that the run learned from, SHA-256; empty before the first. Whoever
            makes a step again sets it to what it was when the step began.
    """

    def __init__(
        self, model: Any, defences: Sequence[Defence], noise: SecretNoise, decoys: Decoys | None = None
    ) -> None:
        self._model = model
        self._defences = tuple(defences)
        self._noise = noise
        self._decoys = decoys
        self._span: SpanFn = model.remote_layers.span
        self.answers = b""
        self._stage = _Stage(("before",))
        self._rehearsals = 0
        self._now: Pass | None = None
        self._pending: list[tuple[DecoyRows, Pass, Tensor]] = []  # decoys, their own passes, and the answers
        self._inputs: tuple[Tensor | None, Tensor | None] = (None, None)

    def begin(self, *label: Label, learned_from: bool = False, before_first: Callable[[], None] | None = None) -> None:
        """What the coming passes belong to, an optimizer step say.

        Args:
            label: No other part of the run may have the same.
            learned_from: Whether what is sent later depends on the answers, which are then part of `answers`.
            before_first: Called before the first of the passes is sent; what it raises holds it back.
        """
        self._stage = _Stage(label, learned_from, before_first)

    @contextmanager
    def rehearsed(self, around: Callable[[SpanFn], SpanFn]) -> Iterator[None]:
        """Let passes go to another span while the block runs, without decoys and with noise that no pass of a run has.

        Args:
            around: Makes it of the span that is called otherwise.
        """
        before = self._span, self._decoys, self._stage, self._now
        self._span, self._decoys = around(self._span), None
        self._rehearsals += 1
        self.begin("rehearsal", self._rehearsals)
        try:
            yield
        finally:
            self._span, self._decoys, self._stage, self._now = before

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Stand between the model and its span while the block runs."""
        _, base, _ = self._model.isthmus_parts
        remote = self._model.remote_layers
        hooks = [
            base.register_forward_pre_hook(self._enter, with_kwargs=True),
            self._model.get_input_embeddings().register_forward_hook(self._embedded),
        ]
        self._span, remote.span = remote.span, self
        try:
            yield
        finally:
            remote.span = self._span
            for hook in hooks:
                hook.remove()

    def __call__(self, hidden: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> Tensor:
        """As a `SpanFn`."""
        now = self._now
        if now is None:
            raise UnsupportedCallError("defences need token ids: call the model with input_ids")
        self._inputs, self._pending = (attention_mask, position_ids), []
        sent = self._defended(hidden, now)
        if self._decoys is None:
            return self._received(self._asked(sent, attention_mask, position_ids), now)
        decoys = self._decoys.rows(now)
        fronts = [self._front(rows, now, index) for index, rows in enumerate(decoys)]
        places = self._decoys.places(now)
        calls: Any = Arranged.apply(places, sent, *(front for front, _ in fronts))  # type: ignore[no-untyped-call]  # torch
        answers: Any = Arranged.apply(  # type: ignore[no-untyped-call]  # torch
            inverse(places), *(self._asked(call, attention_mask, position_ids) for call in calls)
        )
        real, *others = answers
        with self._nothing_trained():
            self._pending = [
                (rows, own, self._received(answer, own))
                for rows, (_, own), answer in zip(decoys, fronts, others, strict=True)
            ]
        return self._received(real, now)

    def extra_loss(self, logits: Tensor, labels: Tensor) -> Tensor | None:
        """What the defences add to the loss of the micro-batch that has just passed; None for nothing.

        Args:
            logits: `[B, S, V]`, with their graph.
            labels: `[B, S]`, -100 where there is none.
        """
        now = self._now
        if now is None:
            return None
        parts = [defence.extra_loss(logits, labels, now) for defence in self._defences]
        # As many labels share a step's loss as the real rows have, so that each label weighs the same in any row.
        count = int((labels[:, 1:] != IGNORED).sum())
        parts += [
            self._decoy_loss(rows, own, answer, count) for rows, own, answer in self._pending if answer.requires_grad
        ]
        self._pending = []
        found = [part for part in parts if part is not None]
        return None if not found else torch.stack(found).sum()

    def _enter(self, base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = {**kwargs, **dict(zip(inspect.signature(base.forward).parameters, args, strict=False))}
        ids, mask = named.get("input_ids"), named.get("attention_mask")
        if ids is None:
            self._now = None
            return
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        turn = (*self._stage.label, self._stage.calls, self.answers)
        self._stage.calls += 1
        self._now = Pass(self._noise, turn, ids, real)

    def _embedded(self, _module: nn.Module, _args: Any, embedded: Tensor) -> Tensor:
        for defence in self._defences:
            if self._now is not None:
                embedded = defence.embedded(embedded, self._now)
        return embedded

    def _defended(self, hidden: Tensor, now: Pass) -> Tensor:
        for defence in self._defences:
            hidden = defence.hidden(hidden, now)
        return hidden

    def _asked(self, call: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> Tensor:
        """What the cloud answers to a call; that and its answer to the backward are noted as they come."""
        before_first, self._stage.before_first = self._stage.before_first, None
        if before_first is not None:
            before_first()
        call = _Passed.apply(call, self._noted)  # type: ignore[no-untyped-call]  # torch
        return self._noted(self._span(call, attention_mask, position_ids))

    def _noted(self, answer: Tensor) -> Tensor:
        """An answer as it is, once it is part of `answers` if the run learns from it."""
        if self._stage.learned_from:
            digest = hashlib.sha256(self.answers)
            digest.update(answer.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            self.answers = digest.digest()
        return answer

    def _gradient(self, now: Pass, gradient: Tensor) -> Tensor:
        """The gradient of a pass's answer as it is sent; its noise follows from that answer, too."""
        now = replace(now, turn=(*now.turn, self.answers))
        for defence in self._defences:
            gradient = defence.gradient(gradient, now)
        return gradient

    def _received(self, answer: Tensor, now: Pass) -> Tensor:
        answer = _Passed.apply(answer, partial(self._gradient, now))  # type: ignore[no-untyped-call]  # torch
        for defence in reversed(self._defences):
            answer = defence.output(answer, now)
        return answer

    def _front(self, rows: DecoyRows, now: Pass, index: int) -> tuple[Tensor, Pass]:
        """What is sent of decoys, their hidden states at the cut, defended as real ones are; and their own pass."""
        kept: list[tuple[Tensor, Pass]] = []

        def keep(hidden: Tensor, *_inputs: Tensor | None) -> Tensor:
            if self._now is not None:
                kept.append((self._defended(hidden, self._now), self._now))
            raise _CutReachedError

        with torch.no_grad(), self._beside(now, keep, index), suppress(_CutReachedError):
            self._run(rows)
        return kept[0]

    def _decoy_loss(self, rows: DecoyRows, own: Pass, answer: Tensor, count: int) -> Tensor:
        """The loss of decoys, whose gradient reaches the answer and no parameter."""
        with self._nothing_trained():
            with self._beside(own, lambda *_: answer):
                logits = self._run(rows).logits
            extra = [defence.extra_loss(logits, rows.labels, own) for defence in self._defences]
        loss = cross_entropy(
            logits[:, :-1].float().flatten(0, 1), rows.labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
        )
        return torch.stack([loss / count, *(part for part in extra if part is not None)]).sum()

    @contextmanager
    def _nothing_trained(self) -> Iterator[None]:
        """Let what decoys pass through, the model and the defences' own parts, learn nothing of them."""
        modules = [self._model, *(module for each in self._defences if (module := each.module()) is not None)]
        trained = [weight for module in modules for weight in module.parameters() if weight.requires_grad]
        for weight in trained:
            weight.requires_grad_(False)
        try:
            yield
        finally:
            for weight in trained:
                weight.requires_grad_(True)

    def _run(self, rows: DecoyRows) -> Any:
        mask, positions = self._inputs
        return self._model(input_ids=rows.ids, attention_mask=mask, position_ids=positions, use_cache=False)

    @contextmanager
    def _beside(self, now: Pass, span: SpanFn, index: int = 0) -> Iterator[None]:
        """Let decoys pass with another span, beside a pass whose random numbers and turn they must not move."""
        remote, before = self._model.remote_layers, (self._stage, self._now)
        remote.span, self._stage = span, _Stage((*now.turn, "decoy", index))
        try:
            with torch.random.fork_rng():
                torch.manual_seed(int(self._noise.uniform(1, "decoys/dropout", index, *now.turn) * 2**62))
                yield
        finally:
            remote.span, (self._stage, self._now) = self, before


class _CutReachedError(Exception):
    """Ends a forward at the cut."""


class _Passed(torch.autograd.Function):
    """A tensor as it is; its gradient through a function on its way back."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, through: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.through = through
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.through(gradient), None
