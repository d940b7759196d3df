"""What an optimizer step does with its micro-batches: the interface between the training loop and the ways of training.

The loop keeps the log, writes checkpoints and decides when a step counts; a rule finds out how the parameters should
move and moves them. `isthmus.edge.training.optimizers` has the rule that goes backward,
`isthmus.edge.training.mezo` the one that only goes forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from isthmus.edge.config.data_config import Precision
from isthmus.edge.data.batches import Batch, label_count, label_mask, single_examples
from isthmus.edge.training.defended_run import DefendedRun
from isthmus.edge.training.evaluation import to_device
from isthmus.edge.training.micro_batches import InFlight
from isthmus.edge.training.precision import computing_in
from isthmus.edge.training.run_listener import TokenAccuracy
from isthmus.privacy.defences.private_gradients import PrivateGradients
from isthmus.training.gradient_step import StepRule, require_finite

OnLogits = Callable[[Batch, Tensor, float], None]
"""Called with a micro-batch, the model's logits at its labels `[N, V]`, detached, and its share of all labels."""

REMEDY = "lower --learning-rate, or use a wider codec or dtype."


class EdgeRule(StepRule, Protocol):
    """How one optimizer step measures its micro-batches and moves the trained parameters.

    Attributes:
        goes_backward: Whether it computes gradients. Only then is the model in training mode, where it drops out.
    """

    goes_backward: bool

    def measure(self, step: int, batches: Sequence[Batch]) -> tuple[float, float]:
        """Find out how step number `step` (from 1) should move the parameters, and leave them as they are.

        All that may fail happens here: whatever is raised, the parameters are those after the last applied step.

        Returns:
            The step's loss, a mean over all labels of `batches`, and the gradient's norm or what stands for it.

        Raises:
            NonFiniteError: A loss or a gradient is NaN or infinite.
        """


class BatchLoss:
    """The loss of one micro-batch after another.

    Args:
        check_stop: Called after every micro-batch; what it raises ends the step.
        in_flight: Where several micro-batches may be in flight; None for one at a time.
        on_logits: Called for each micro-batch after its backward, in their order and in the calling thread.
        accuracy: Counts each micro-batch; None where nobody asks.
        defended: The run's defences; None for none.
    """

    def __init__(
        self,
        model: Any,
        precision: Precision,
        check_stop: Callable[[], None],
        in_flight: InFlight | None = None,
        on_logits: OnLogits | None = None,
        accuracy: TokenAccuracy | None = None,
        defended: DefendedRun | None = None,
    ) -> None:
        self._model = model
        self._precision: Precision = precision
        self._check_stop = check_stop
        self._in_flight = in_flight
        self._on_logits = on_logits
        self._accuracy = accuracy
        self._defended = defended

    def over(self, step: int, batches: Sequence[Batch], trained: Sequence[nn.Parameter] = ()) -> float:
        """The mean loss over all labels of `batches`, whatever the micro-batches' sizes.

        Args:
            trained: Parameters that its gradient is added to, in the order of the micro-batches; none to go forward
                alone.

        Raises:
            NonFiniteError: A micro-batch's loss is NaN or infinite.
        """
        labels = sum(map(label_count, batches))
        if self._in_flight is not None:
            return self._over_in_flight(self._in_flight, step, labels, batches, trained)
        private = None if self._defended is None else self._defended.private_gradients()
        if private is not None:
            return self._over_examples(private, step, labels, batches, trained)
        total = 0.0
        for batch in batches:
            loss, value, logits = self._weighted(step, labels, batch)
            if trained:
                loss.backward()  # type: ignore[no-untyped-call]  # torch
            self._check_stop()
            self._report_logits(batch, logits, labels)
            total += value
        return total

    def _over_examples(
        self,
        private: PrivateGradients,
        step: int,
        labels: int,
        batches: Sequence[Batch],
        trained: Sequence[nn.Parameter],
    ) -> float:
        """The same, with a gradient for each example, of which `private` makes the step's; 0 without examples."""
        total = 0.0
        for example in chain.from_iterable(map(single_examples, batches)):
            own = label_count(example)
            loss, value, logits = self._weighted(step, own, example)
            found = torch.autograd.grad(loss, trained, allow_unused=True)
            private.add([torch.zeros_like(p) if g is None else g for p, g in zip(trained, found, strict=True)])
            self._check_stop()
            self._report_logits(example, logits, labels)
            total += value * own / labels
        _add(trained, private.mean(trained))
        return total

    def _over_in_flight(
        self, in_flight: InFlight, step: int, labels: int, batches: Sequence[Batch], trained: Sequence[nn.Parameter]
    ) -> float:
        def work(batch: Batch) -> tuple[float, Sequence[Tensor | None], Tensor | None]:
            loss, value, logits = self._weighted(step, labels, batch)
            gradients = torch.autograd.grad(loss, trained, allow_unused=True) if trained else ()
            self._check_stop()
            return value, gradients, logits

        total = 0.0
        with closing(in_flight.map(work, batches)) as done:
            for batch, (value, gradients, logits) in zip(batches, done, strict=True):
                if trained:
                    _add(trained, gradients)
                self._report_logits(batch, logits, labels)
                total += value
        return total

    def _weighted(self, step: int, labels: int, batch: Batch) -> tuple[Tensor, float, Tensor | None]:
        """What a micro-batch adds to the loss, with its graph and as a number; and logits, where somebody asks."""
        inputs = to_device(batch, self._model)
        with computing_in(self._precision, self._model):
            output = self._model(**inputs, use_cache=False)
            extra = None if self._defended is None else self._defended.extra_loss(output.logits, inputs["labels"])
        loss: Tensor = output.loss
        if self._accuracy is not None:
            self._accuracy.add(batch, output.logits.detach())
        weight = label_count(batch) / labels
        value = require_finite(f"the loss of step {step} is", loss.item(), REMEDY)
        logits = None if self._on_logits is None else output.logits.detach()[label_mask(batch)]
        return (loss if extra is None else loss + extra) * weight, value * weight, logits

    def _report_logits(self, batch: Batch, logits: Tensor | None, labels: int) -> None:
        if self._on_logits is not None and logits is not None and len(logits):
            self._on_logits(batch, logits, label_count(batch) / labels)


def _add(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
    """Add a micro-batch's gradients as `backward` does, where there are any."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            continue
        if parameter.grad is None:
            # A copy, laid out as the parameter: autograd may hand out a view, or one tensor for two parameters.
            parameter.grad = torch.empty_like(parameter).copy_(gradient)
        else:
            parameter.grad.add_(gradient)
