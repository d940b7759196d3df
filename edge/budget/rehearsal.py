"""What a run would send: made by its own front, adapters, defences and codecs, and held back.

The model is in eval mode meanwhile: dropout hides nothing of what a cloud sees of held-out texts. Decoys are left out,
since a real row among them has the bits that it has alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from isthmus.backbone.sites.site_spec import SiteSpec
from isthmus.backbone.split.edge_model import SpanFn
from isthmus.edge.codecs.wire_codecs import WireCodecs
from isthmus.edge.config.training_config import TrainConfig
from isthmus.edge.data.batches import IGNORED, Batches, Encoded
from isthmus.edge.training.defended_run import DefendedRun
from isthmus.edge.training.evaluation import to_device
from isthmus.privacy.attacks.attack import UNKNOWN
from isthmus.privacy.defences.defence_options import DpSgd
from isthmus.privacy.ledger.judged_attacks import Truth
from isthmus.privacy.recording.traffic import Backward, Forward, Traffic
from isthmus.protocol.tensor_codecs import Role, decode, encode


class Rehearsal:
    """Makes what a run would send.

    Args:
        model: The edge's model, without PEFT's wrapper.
        tuned: The same, with adapters and perhaps PEFT's wrapper.
        defended: The run's defences; None for none.
        pad_id: Token that fills short rows.
    """

    def __init__(self, model: Any, tuned: Any, config: TrainConfig, defended: DefendedRun | None, pad_id: int) -> None:
        self._model, self._tuned, self._defended, self._pad_id = model, tuned, defended, pad_id
        alone = any(isinstance(each, DpSgd) for each in config.defences())
        self._rows = 1 if alone else config.batch
        self._weight = 1.0 if alone else 1 / config.accumulate
        self.codecs = WireCodecs.parse(config.codec)

    def forwards(self, texts: Sequence[Encoded]) -> Traffic:
        """What goes up of private texts in a pass: nothing is sent."""
        kept: list[Forward] = []

        def keep(hidden: Tensor, mask: Tensor | None, positions: Tensor | None) -> None:
            kept.append(self._forward(len(kept), hidden, mask, positions, None))

        with self._aside(lambda _span: _HoldingSpan(keep)), torch.no_grad():
            for batch in self._batches(texts):
                with suppress(_HeldBackError):
                    self._tuned(**to_device(batch, self._model), use_cache=False)
        return Traffic("", str(self._model.split_plan), tuple(kept))

    def gradients(self, texts: Sequence[Encoded], outputs: Sequence[Tensor] | None = None) -> tuple[Traffic, Truth]:
        """What goes up of texts in a pass and its backward, and what it is the truth of. The gradients are held back.

        Args:
            texts: Public ones, whose hidden states are sent through the cloud's layers; private ones with `outputs`.
            outputs: What came of other texts out of the cloud's layers, `[n, h]` each, which stands for what would come
                of these: then nothing is sent. Such an output predicts the label worse, so that the gradient is larger
                before it is clipped; what the text's own output would say of the label is missing.
        """
        forwards: list[Forward] = []
        backwards: list[Backward] = []
        labels: list[Tensor] = []
        answered: list[Tensor] = []

        def through(span: SpanFn) -> SpanFn:
            def call(hidden: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
                with torch.no_grad():
                    if outputs is None:
                        output = span(hidden.detach(), mask, positions)
                    else:
                        output = _instead(hidden, outputs, len(labels))
                forwards.append(self._forward(len(forwards), hidden, mask, positions, output))
                answered.append(output.detach().requires_grad_())
                return answered[-1]

            return call

        with self._aside(through):
            for batch in self._batches(texts):
                inputs = to_device(batch, self._model)
                answer = self._tuned(**inputs, use_cache=False)
                extra = None if self._defended is None else self._defended.extra_loss(answer.logits, inputs["labels"])
                loss = (answer.loss if extra is None else answer.loss + extra) * self._weight
                (gradient,) = torch.autograd.grad(loss, answered[-1])
                codec = self.codecs.backward_up
                sent = decode(encode(gradient, codec, Role.GRADIENT))
                backwards.append(Backward(len(backwards), 0, sent, codec, None))
                shifted = torch.full_like(batch["labels"], UNKNOWN)
                shifted[:, :-1] = batch["labels"][:, 1:].where(batch["labels"][:, 1:] != IGNORED, UNKNOWN)
                labels.extend(shifted)
        traffic = Traffic("", str(self._model.split_plan), tuple(forwards), tuple(backwards))
        return traffic, Truth((), tuple(labels))

    def truth(self, texts: Sequence[Encoded], secrets: tuple[tuple[str, ...], ...]) -> tuple[Truth, tuple[Tensor, ...]]:
        """What `forwards` of the same texts is judged by, and of each row the labels where they stand, -1 elsewhere."""
        tokens: list[Tensor] = []
        answers: list[Tensor] = []
        for batch in self._batches(texts):
            labels = batch["labels"].where(batch["labels"] != IGNORED, UNKNOWN)
            # A withheld answer is no token that is sent, and one of the text all the same.
            private = labels.where(labels != UNKNOWN, batch["input_ids"])
            tokens.extend(private.masked_fill(batch["attention_mask"] == 0, UNKNOWN))
            answers.extend(labels)
        return Truth(tuple(tokens), secrets=secrets), tuple(answers)

    def predicted(self, texts: Sequence[Encoded], outputs: Sequence[Tensor]) -> Tensor:
        """What the edge's last layers make of outputs of the cloud's: probabilities where labels stand, `[k, V]`.

        Args:
            outputs: As of `gradients`.
        """
        found: list[Tensor] = []
        rows = 0

        def instead(_span: SpanFn) -> SpanFn:
            return lambda hidden, _mask, _positions: _instead(hidden, outputs, rows)

        with self._aside(instead), torch.no_grad():
            for batch in self._batches(texts):
                logits = self._tuned(**to_device(batch, self._model), use_cache=False).logits[:, :-1]
                found.append(logits[batch["labels"][:, 1:] != IGNORED].softmax(-1))
                rows += len(logits)
        return torch.cat(found)

    def _batches(self, texts: Sequence[Encoded]) -> Iterator[dict[str, Tensor]]:
        rows = self._rows
        while rows > 1 and len(texts) % rows == 1:  # a row alone has none to be mixed with
            rows += 1
        return iter(Batches(texts, rows, self._pad_id).epoch())

    @contextmanager
    def span(self) -> Iterator[SpanFn]:
        """What sends to the cloud, past the defences."""
        found: list[SpanFn] = []

        def note(span: SpanFn) -> SpanFn:
            found.append(span)
            return span

        with self._aside(note):
            yield found[0]

    def _forward(
        self, call: int, hidden: Tensor, mask: Tensor | None, positions: Tensor | None, output: Tensor | None
    ) -> Forward:
        codec = self.codecs.forward_up
        sent = decode(encode(hidden, codec, Role.ACTIVATION))
        kept = output is not None
        return Forward(call, 0, sent, None if mask is None else mask.bool(), positions, codec, output, kept)

    @contextmanager
    def _aside(self, around: Callable[[SpanFn], SpanFn]) -> Iterator[None]:
        """Let the model call another span, and leave its mode and torch's random state as they were."""
        training = self._tuned.training
        self._tuned.eval()
        try:
            with torch.random.fork_rng(), self._replaced(around):
                yield
        finally:
            self._tuned.train(training)

    @contextmanager
    def _replaced(self, around: Callable[[SpanFn], SpanFn]) -> Iterator[None]:
        if self._defended is not None:
            with self._defended.rehearsed(around):
                yield
            return
        remote = self._model.remote_layers
        before, remote.span = remote.span, around(remote.span)
        try:
            yield
        finally:
            remote.span = before


def _instead(hidden: Tensor, outputs: Sequence[Tensor], rows: int) -> Tensor:
    """Outputs `[n, h]` in the place of those of `hidden` `[B, S, h]`, repeated to its length; `rows` came before."""
    batch, length, _ = hidden.shape
    chosen = [outputs[(rows + row) % len(outputs)] for row in range(batch)]
    return torch.stack([each[torch.arange(length) % len(each)] for each in chosen]).to(hidden)


class _HoldingSpan:
    """A span that keeps what it is given, and ends the forward; for a ladder too, which reads what comes back."""

    def __init__(self, keep: Callable[[Tensor, Tensor | None, Tensor | None], None]) -> None:
        self._keep = keep

    def __call__(self, hidden: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
        self._keep(hidden, mask, positions)
        raise _HeldBackError

    def tapped(
        self, hidden: Tensor, mask: Tensor | None, positions: Tensor | None, _taps: Sequence[SiteSpec]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self(hidden, mask, positions), ()


class _HeldBackError(Exception):
    """Ends a forward where the edge would send."""
