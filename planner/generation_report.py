"""What `isthmus plan` says about generation. Pure."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from isthmus.common.readable import size
from isthmus.planner.generation_cost import (
    DEFAULT_ACCEPTANCE,
    MEASURED_ACCEPTANCE,
    NGRAM,
    SMALL,
    DraftCost,
    GenerationCost,
    GenerationSettings,
)
from isthmus.planner.speed_profile import DRAFT_DTYPE


def as_json(cost: GenerationCost, settings: GenerationSettings) -> dict[str, Any]:
    """The figures under the keys of `isthmus plan --json`."""
    without = cost.drafts[0].tokens_per_s
    return {
        "prompt_tokens": settings.prompt,
        "tokens": settings.tokens,
        "first_token_s": cost.first_token_s,
        "edge_s": cost.edge_s,
        "cloud_s": cost.cloud_s,
        "wire_s": cost.wire_s,
        "bytes_up": round(cost.traffic.up),
        "bytes_down": round(cost.traffic.down),
        "drafts": [
            {
                "draft": each.draft,
                "layers": settings.draft_layers if each.draft == SMALL else None,
                "acceptance_rate": each.acceptance_rate,
                "acceptance_rate_assumed": each.acceptance_rate is not None and settings.acceptance_rate is None,
                "drafted_per_round": each.drafted,
                "tokens_per_round": each.tokens_per_round,
                "tokens_per_s": each.tokens_per_s,
                "over_sequential": each.tokens_per_s / without,
                "break_even_rate": each.break_even_rate,
            }
            for each in cost.drafts
        ],
    }


def summary(cost: GenerationCost, settings: GenerationSettings) -> str:
    """The seconds and bytes of a token, in one sentence."""
    return (
        f"Generation: the first token after a prompt of {settings.prompt} takes {cost.first_token_s:.2g} s; a further "
        f"one {1000 * cost.edge_s:.3g} ms on the edge, {1000 * cost.cloud_s:.3g} ms in the cloud and "
        f"{1000 * cost.wire_s:.3g} ms on the wire, {size(cost.traffic.up)} up and {size(cost.traffic.down)} down."
    )


def draft_table(cost: GenerationCost, settings: GenerationSettings) -> Table:
    """The drafts for a person."""
    result = Table(box=None, pad_edge=False)
    for name in ("draft", "tokens/s", "acceptance rate", "break-even", "drafted/round", "tokens/round"):
        result.add_column(name, justify="left" if name == "draft" else "right")
    for each in cost.drafts:
        result.add_row(*_cells(each, settings))
    return result


def generation_assumptions(settings: GenerationSettings) -> list[str]:
    """What the figures rest on, a line each."""
    return [
        "Generation is of one greedy text at a time while nobody else uses the cloud, in fast, with the cache. What "
        "transformers' generate does beside the model is not counted.",
        f"A small draft has {settings.draft_layers} layers in the place of the cloud's; these, the edge's own and the "
        f"head draft in {DRAFT_DTYPE}. Tokens/s are of a text of {settings.tokens} tokens, with the draft's pass over "
        "the prompt and without the model's.",
        "With drafts the figures are optimistic: the best length is known from the first round on, while edge generate "
        "has to learn it; and a given acceptance rate is taken to hold in every round, while n-grams often find none.",
        _acceptance(settings),
    ]


def _acceptance(settings: GenerationSettings) -> str:
    meaning = "The acceptance rate is the probability that a drafted token is accepted, given that all before it were"
    if settings.acceptance_rate is not None:
        return f"{meaning}: {settings.acceptance_rate:.0%}, as given."
    assumed = [
        f"{DEFAULT_ACCEPTANCE[draft]:.0%} of {name} (over all texts {least:.0%} to {most:.0%})"
        for draft, name in ((NGRAM, "n-grams"), (SMALL, "a small draft"))
        for least, most in [MEASURED_ACCEPTANCE[draft]]
    ]
    return (
        f"{meaning}. It is assumed, not measured here: {' and '.join(assumed)}, fitted to the tokens of a mean round "
        "of chats in one run of SmolLM2-135M-Instruct, rounds without a draft included. Other models and texts differ: "
        "give --acceptance-rate, or compare it with break-even."
    )


def _cells(cost: DraftCost, settings: GenerationSettings) -> list[str]:
    if cost.acceptance_rate is None:
        return [cost.draft, f"{cost.tokens_per_s:.3g}", "", "", "", "1"]
    return [
        {NGRAM: "n-grams", SMALL: f"{settings.draft_layers} layers"}[cost.draft],
        f"{cost.tokens_per_s:.3g}",
        f"{cost.acceptance_rate:.0%}",
        "never" if cost.break_even_rate is None else f"{cost.break_even_rate:.0%}",
        str(cost.drafted),
        f"{cost.tokens_per_round:.3g}",
    ]
