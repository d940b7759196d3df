"""What a malicious edge can steal of the span: a stand-in that is trained on the span's answers to its queries.

The edge holds the other layers and may query the span within its quota. It runs its first layers on public texts,
sends the states and keeps the answers. Then it trains copies of its own layers next to the cut to give these answers:
on the relative error of each position's states, and on the KL divergence from the next-token distribution that its last
layers make of the answer. On public texts without an answer it trains on their cross entropy, so a budget of 0 tells
what the thief would have had anyhow.

Fidelity is what counts: how near the stolen model is to the true one. A low loss can come from the texts' form alone.

The aim is that of an emulator's distillation, but the thief has neither the middle's layers nor a package's means.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from isthmus.backbone.families import family_of
from isthmus.backbone.split.span import arrange_layers, sharing_copy
from isthmus.common.errors import ConfigError
from isthmus.privacy.attacks.attack import Knowledge
from isthmus.privacy.attacks.front import Front
from isthmus.training.logit_divergence import agreement, logit_divergence
from isthmus.training.rate_schedule import scheduled_rate

Query = Callable[[Tensor], Tensor]
"""The span: hidden states `[1, S, h]` to hidden states `[1, S, h]`, without padding."""

_ERROR_WEIGHT = 30.0  # of the states' relative error, as the emulator's distillation has it
_WARMUP = 10
_MAX_NORM = 1.0


@dataclass(frozen=True, slots=True)
class Theft:
    """What a thief may do.

    Attributes:
        calls: Queries of one text each.
        layers: Layers of the stand-in.
        steps: Optimizer steps, of one public text each, over all of them again and again.
        learning_rate: Peak of AdamW's rate, which falls along a cosine.
        seed: Of the order of the texts.
    """

    calls: int
    layers: int = 2
    steps: int = 200
    learning_rate: float = 3e-4
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Fidelity:
    """How near a model is to the true one, over the tokens of held-out texts.

    Attributes:
        loss: The mean cross entropy, in nats a token.
        divergence: The KL divergence of the next-token distribution from the true model's, in nats a token.
        top1_agreement: The share of positions whose likeliest token is the true model's.
    """

    loss: float
    divergence: float
    top1_agreement: float


@dataclass(frozen=True, slots=True, eq=False)
class StolenSpan:
    """What came of a theft.

    Attributes:
        model: The edge's layers around the stand-in, a transformers causal LM.
        calls, tokens: Queries, and the token positions in them.
        with_span: Of the true model.
        with_stand_in: Of the stolen one.
        without: Of the edge's layers alone, its last one below the cut followed by the first one above.
    """

    model: Any
    calls: int
    tokens: int
    with_span: Fidelity
    with_stand_in: Fidelity
    without: Fidelity

    @property
    def recovered(self) -> float:
        """The share of the divergence without the span that the stand-in takes away."""
        return 1 - self.with_stand_in.divergence / self.without.divergence


class SpanDistillation:
    """Trains a stand-in for the span."""

    name: ClassVar[str] = "span-distillation"
    sees: ClassVar[str] = "the answers of the cloud's layers to its own queries"
    knows: ClassVar[str] = "the edge's layers, and public texts"

    def __init__(self, theft: Theft) -> None:
        """Raises ConfigError where the theft has a number that makes no sense."""
        for name, least in (("calls", 0), ("layers", 1), ("steps", 1)):
            if getattr(theft, name) < least:
                raise ConfigError(f"{name} = {getattr(theft, name)} makes no sense; use {least} or more")
        self._theft = theft

    def run(self, knowledge: Knowledge, span: Query, held_out: Sequence[Tensor]) -> StolenSpan:
        """Steal the span.

        Args:
            knowledge: Of its model the thief uses the edge's layers alone; the whole of it tells the loss with the
                true span. Queries are its public texts.
            span: Answers queries.
            held_out: Other texts, `[n]` each.

        Raises:
            ConfigError: The edge has no layers, or the budget is larger than the public texts.
        """
        theft, plan = self._theft, knowledge.plan
        texts = [tokens for tokens in knowledge.public if len(tokens) > 1]
        if theft.calls > len(texts):
            raise ConfigError(f"{theft.calls} queries of one public text each need as many; there are {len(texts)}")
        near = [*range(plan.bottom)][-1:] + [*range(plan.cloud.stop, plan.n_layers)][:1]
        if not near:
            raise ConfigError(f"with the plan {plan} the edge has no layer to make a stand-in of; use 1:1 or more")
        front = Front(knowledge.model, plan.bottom)
        asked = texts[: theft.calls]
        answers = [span(front.states(tokens)[None]).detach() for tokens in asked]
        chosen = sorted(near[place % len(near)] for place in range(theft.layers))
        stolen, bare = _arranged(knowledge, chosen), _arranged(knowledge, []).model
        _train(stolen, texts, answers, theft)
        return StolenSpan(
            stolen.model,
            len(asked),
            sum(map(len, asked)),
            *(_fidelity(model, knowledge.model, held_out) for model in (knowledge.model, stolen.model, bare)),
        )


@dataclass(frozen=True, slots=True)
class _Arranged:
    """A model with other layers in the span's place, which are its own copies."""

    model: Any
    middle: nn.ModuleList


def _arranged(knowledge: Knowledge, chosen: Sequence[int]) -> _Arranged:
    """The edge's layers with trainable copies of the layers `chosen` between."""
    plan = knowledge.plan
    model = sharing_copy(knowledge.model).eval()
    family = family_of(model.config)
    base = model.get_submodule(family.base)
    layers = list(getattr(base, family.layers))
    middle = nn.ModuleList(copy.deepcopy(layers[index]) for index in chosen)
    below, above = range(plan.bottom), range(plan.cloud.stop, plan.n_layers)
    modules = [*(layers[index] for index in below), *middle, *(layers[index] for index in above)]
    arrange_layers(base, modules, [*below, *chosen, *above], model.config)
    for each in middle.parameters():
        each.requires_grad_()
    return _Arranged(model, middle)


def _train(stolen: _Arranged, texts: Sequence[Tensor], answers: Sequence[Tensor], theft: Theft) -> None:
    """Train on the answers to the first texts, and on the other texts as they are."""
    parameters = list(stolen.middle.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=theft.learning_rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(theft.seed)
    order: list[int] = []
    for step in range(theft.steps):
        order = order or torch.randperm(len(texts), generator=generator).tolist()
        text = order.pop()
        loss = (
            _distillation_loss(stolen, texts[text], answers[text])
            if text < len(answers)
            else cross_entropy(_logits(stolen.model, texts[text]), texts[text][1:])
        )
        for group in optimizer.param_groups:
            group["lr"] = scheduled_rate(theft.learning_rate, "cosine", step, theft.steps, _WARMUP)
        gradients = torch.autograd.grad(loss, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        nn.utils.clip_grad_norm_(parameters, _MAX_NORM)
        optimizer.step()


def _distillation_loss(stolen: _Arranged, tokens: Tensor, answer: Tensor) -> Tensor:
    """How far the stand-in is from the span's answer `[1, S, h]`, in its states and in what is predicted from them."""
    last, given = stolen.middle[-1], []
    with last.register_forward_hook(lambda _module, _args, output: given.append(output)):
        student = _logits(stolen.model, tokens)
    with torch.no_grad(), last.register_forward_hook(lambda _module, _args, _output: answer):
        teacher = _logits(stolen.model, tokens)
    return _ERROR_WEIGHT * _relative_error(given[0], answer) + logit_divergence(student, teacher)


def _relative_error(given: Tensor, wanted: Tensor) -> Tensor:
    """The mean over positions of the squared error in shares of the position's own mean square; `[1, S, h]` each."""
    return ((given - wanted).square().mean(-1) / wanted.square().mean(-1)).mean()


def _logits(model: Any, tokens: Tensor) -> Tensor:
    """At all places of a text `[n]` but the last, `[n - 1, V]`."""
    logits: Tensor = model(input_ids=tokens[None], use_cache=False).logits[0, :-1]
    return logits


@torch.no_grad()
def _fidelity(model: Any, true: Any, texts: Sequence[Tensor]) -> Fidelity:
    measured, counts = [], torch.tensor([len(tokens) - 1 for tokens in texts])
    for tokens in texts:
        student, teacher = _logits(model, tokens), _logits(true, tokens)
        loss, divergence = cross_entropy(student, tokens[1:]), logit_divergence(student, teacher)
        measured.append([loss.item(), divergence.item(), agreement(student, teacher)])
    means = (torch.tensor(measured, dtype=torch.float64) * counts[:, None]).sum(0) / counts.sum()
    return Fidelity(*means.tolist())
