"""Span distillation by a malicious edge: what a client has of the model for a number of queries.

The thief holds the edge's layers and asks the span about public texts. The span answers here in the same process; its
answers have the bits of a cloud's at fp32. The stolen model is scored on texts that the thief did not ask about, beside
the real model and beside the edge's layers without anything between.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from isthmus.common.errors import ConfigError
from isthmus.common.torch_threads import use_threads
from isthmus.experiments.harness.single_process import whole
from isthmus.experiments.leak.weights.local_split import LocalSplit
from isthmus.experiments.leak.weights.task_texts import distinct_texts, tokens_of
from isthmus.privacy.attacks.attack import Knowledge
from isthmus.privacy.attacks.front import Front
from isthmus.privacy.attacks.weights.span_distillation import Fidelity, SpanDistillation, Theft


@dataclass(frozen=True, slots=True, kw_only=True)
class TheftSettings:
    """What the thief may do.

    Attributes:
        model, edge_layers: The model and its split plan.
        task, data_folder: Where the public texts and the held-out ones come from; see `distinct_texts`.
        calls: Budgets of queries, of one text each; 0 tells what the thief would have had anyhow.
        held_out: Texts that the stolen model is scored on.
        layers: Layers of the stand-in.
        steps: Optimizer steps of each theft, of one text each.
        learning_rate: Peak of AdamW's rate.
        seed: Of the draw and of the order of the texts.
        threads: Threads of torch; None for torch's choice.
    """

    model: str = "smollm2-135m"
    edge_layers: str = "2:2"
    task: str = "e2e"
    data_folder: Path | None = None
    calls: tuple[int, ...] = (0, 50, 300)
    held_out: int = 100
    layers: int = 2
    steps: int = 300
    learning_rate: float = 3e-4
    seed: int = 0
    threads: int | None = None


@dataclass(frozen=True, slots=True)
class TheftRun:
    """What a budget gave.

    Attributes:
        calls, tokens: Queries, and the token positions in them.
        stolen: Of the stolen model.
        recovered: The share of the divergence of the edge's layers alone that the stand-in takes away; below 0 where it
            is worse than nothing between.
    """

    calls: int
    tokens: int
    stolen: Fidelity
    recovered: float


@dataclass(frozen=True, slots=True)
class TheftResult:
    """What a client steals.

    Attributes:
        loss: Held-out loss of the real model, nats a token.
        without: Of the edge's layers alone.
        runs: One for each budget, in the order of the settings.
    """

    loss: float
    without: Fidelity
    runs: tuple[TheftRun, ...]


def measure_theft(settings: TheftSettings) -> TheftResult:
    """Steal the span with each budget.

    Raises:
        ConfigError: A setting makes no sense.
        DataError: The data are missing or too few.
    """
    if not settings.calls or settings.held_out < 1:
        raise ConfigError(f"calls = {settings.calls} and held_out = {settings.held_out}: give one or more of both")
    use_threads(settings.threads)
    split = LocalSplit(settings.model, settings.edge_layers)
    # As many public texts whatever the budget is, so that a thief without queries is not the poorer for it; two at
    # least, which an attacker's knowledge needs.
    n_public = max(2, *settings.calls)
    texts = distinct_texts(
        settings.task, settings.data_folder, split.tokenizer, n_public + settings.held_out, seed=settings.seed
    )
    tokens = [tokens_of(text) for text in texts]
    model = whole(split.checkpoint).requires_grad_(False)
    front = Front(model, split.plan.bottom)
    knowledge = Knowledge(model, split.tokenizer, split.plan, front, tuple(tokens[:n_public]))
    stolen = [
        SpanDistillation(_theft(settings, calls)).run(knowledge, split.span, tokens[n_public:])
        for calls in settings.calls
    ]
    runs = tuple(TheftRun(each.calls, each.tokens, each.with_stand_in, each.recovered) for each in stolen)
    return TheftResult(stolen[0].with_span.loss, stolen[0].without, runs)


def _theft(settings: TheftSettings, calls: int) -> Theft:
    return Theft(calls, settings.layers, settings.steps, settings.learning_rate, settings.seed)
