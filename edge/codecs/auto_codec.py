"""`--codec auto`: the wire's codecs are chosen at the start, and again as the run goes on, by the gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from isthmus.edge.codecs.codec_choice import choose_codecs
from isthmus.edge.codecs.wire_codecs import WireCodecs
from isthmus.edge.data.batches import Batch


class CodedLink(Protocol):
    """A link whose codecs can be changed between two calls."""

    codecs: WireCodecs


class AutoCodec:
    """Chooses codecs before a step when it is time; a `isthmus.edge.training.edge_steps.StepObserver`.

    What is worth little at the first step may matter at the thousandth, so codecs are chosen anew again and again.

    Args:
        links: Whose codecs are set; all alike.
        target: The smallest cosine to the gradients with fp32.
        every: Optimizer steps between two choices.
        trained: The parameters whose gradients count.
        loss: Computes the loss of a micro-batch, with its graph.
        probe: The micro-batch that the codecs are tried on.
    """

    def __init__(
        self,
        links: Sequence[CodedLink],
        offered: tuple[str, ...],
        hidden_size: int,
        target: float,
        every: int,
        *,
        trained: Sequence[nn.Parameter],
        loss: Callable[[Batch], torch.Tensor],
        probe: Batch,
        say: Callable[[str], None],
    ) -> None:
        self._links = links
        self._offered = offered
        self._hidden_size = hidden_size
        self._target = target
        self._every = every
        self._codecs = WireCodecs()
        self._chosen_at: int | None = None  # applied steps at the last choice
        self._trained = trained
        self._loss = loss
        self._probe = probe
        self._say = say
        self._cosine = 1.0

    def before_step(self, step: int) -> None:
        """Choose, if it is time, from the random state that the step would have; it has the same one afterwards."""
        if self._chosen_at is not None and step - 1 - self._chosen_at < self._every:
            return
        random = torch.get_rng_state()
        trained = [parameter for parameter in self._trained if parameter.requires_grad]  # a rule may freeze some

        def gradients(codecs: WireCodecs) -> torch.Tensor:
            torch.set_rng_state(random)
            self._set(codecs)
            found = torch.autograd.grad(self._loss(self._probe), trained, allow_unused=True)
            return torch.cat([each.flatten() for each in found if each is not None])

        try:
            choice = choose_codecs(gradients, self._offered, self._hidden_size, self._target)
        finally:
            torch.set_rng_state(random)
            self._set(self._codecs)
        self._codecs, self._cosine, self._chosen_at = choice.codecs, choice.cosine, step - 1
        self._set(choice.codecs)
        self._say(
            f"codecs from step {step} on: {choice.codecs}, {choice.codecs.bytes_per_token(self._hidden_size)} bytes "
            f"per token, gradient cosine {choice.cosine:.4f} (at least {self._target})"
        )

    def after_step(self, step: int) -> None:
        """Nothing is learned from a step."""

    def points(self) -> dict[str, float]:
        """For the curves."""
        size = self._codecs.bytes_per_token(self._hidden_size)
        return {"codecs/bytes_per_token": float(size), "codecs/cosine": self._cosine}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: a resumed run goes on with the same codecs and chooses again at the same steps."""
        return {"codecs": str(self._codecs), "chosen_at": self._chosen_at, "cosine": self._cosine}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on with the same codecs."""
        self._codecs, self._cosine = WireCodecs.parse(state["codecs"]), float(state["cosine"])
        self._chosen_at = state["chosen_at"]
        self._set(self._codecs)

    def _set(self, codecs: WireCodecs) -> None:
        for link in self._links:
            link.codecs = codecs
