"""A stand-in for the span, by what a thief may ask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.models.tiny import N_LAYERS, tiny_config, tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

from isthmus.backbone.plan import SplitPlan
from isthmus.common.errors import ConfigError
from isthmus.privacy.attacks.attack import Knowledge
from isthmus.privacy.attacks.front import Front
from isthmus.privacy.attacks.weights.span_distillation import SpanDistillation, StolenSpan, Theft

PLAN = SplitPlan.parse("1:1", N_LAYERS)
CALLS = 24


def texts(seed: int, count: int) -> tuple[Tensor, ...]:
    """Texts whose tokens count up by a step of their own, from 16 different ones."""
    random = torch.Generator().manual_seed(seed)
    first, step = torch.randint(0, 16, (count,), generator=random), torch.randint(1, 4, (count,), generator=random)
    return tuple(3 + (a + b * torch.arange(12)) % 16 for a, b in zip(first, step, strict=True))


@pytest.fixture(scope="module")
def model() -> Any:
    """A model that knows such texts."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = AutoModelForCausalLM.from_config(tiny_config("llama", initializer_range=0.1), dtype=torch.float32)
        optimizer = torch.optim.AdamW(made.parameters(), lr=3e-3)
        for step in range(150):
            ids = torch.stack(texts(100 + step, 8))
            made(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return made.eval().requires_grad_(False)


def span_of(model: Any) -> Any:
    """The layers between, as an oracle that counts its calls."""
    above = Front(model, PLAN.cloud.stop)  # keeps what the layer above the span gets
    below = Front(model, PLAN.bottom)

    def query(hidden: Tensor) -> Tensor:
        query.calls += 1  # type: ignore[attr-defined]
        # The states say which text they are of, so the model's own forward computes the answer.
        for text in query.texts:  # type: ignore[attr-defined]
            if torch.equal(below.states(text)[None], hidden):
                return above.states(text)[None]
        raise AssertionError("the thief asked with other states")

    query.calls, query.texts = 0, texts(1, CALLS)  # type: ignore[attr-defined]
    return query


def steal(model: Any, span: Any, calls: int, **options: Any) -> StolenSpan:
    knowledge = Knowledge(model, tiny_tokenizer(), PLAN, Front(model, 1), texts(1, CALLS))
    theft = Theft(calls, learning_rate=3e-3, **options)
    return SpanDistillation(theft).run(knowledge, span, texts(2, 16))


@pytest.mark.long
def test_queries_give_a_stand_in_that_helps(model: Any) -> None:
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    span = span_of(model)
    stolen = steal(model, span, CALLS)
    assert (stolen.calls, stolen.tokens, span.calls) == (CALLS, 12 * CALLS, CALLS)
    assert max(stolen.with_span.loss, stolen.with_stand_in.loss) < stolen.without.loss
    assert stolen.with_stand_in.top1_agreement > stolen.without.top1_agreement
    assert stolen.recovered > 0.3
    assert (stolen.with_span.divergence, stolen.with_span.top1_agreement) == (pytest.approx(0, abs=1e-6), 1)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())

    def lying(hidden: Tensor) -> Tensor:
        return torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3)) * hidden.std()

    assert steal(model, lying, CALLS).recovered < stolen.recovered - 0.1


def test_a_budget_of_none_asks_nothing(model: Any) -> None:
    def refusing(hidden: Tensor) -> Tensor:
        raise AssertionError("asked")

    stolen = steal(model, refusing, 0, steps=1)
    assert stolen.tokens == 0
    assert stolen.recovered < 0.3


def test_budgets_that_make_no_sense_are_refused(model: Any) -> None:
    with pytest.raises(ConfigError, match="layers = 0 makes no sense"):
        SpanDistillation(Theft(1, layers=0))
    with pytest.raises(ConfigError, match="25 queries of one public text each need as many; there are 24"):
        steal(model, span_of(model), CALLS + 1)
