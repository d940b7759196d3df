"""What `isthmus plan` says about generation. Pure."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from isthmus.common.readable import size
from isthmus.planner.generation_cost import ASSUMED, NGRAM, SMALL, DraftCost, GenerationCost, GenerationSettings


def as_tree(cost: GenerationCost, settings: GenerationSettings) -> dict[str, Any]:
    """For JSON."""
    without = cost.drafts[0].tokens_per_s
    return {
        "prompt_tokens": settings.prompt,
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
                "acceptance": each.acceptance,
                "acceptance_assumed": each.acceptance is not None and settings.acceptance is None,
                "drafted_per_round": each.drafted,
                "tokens_per_round": each.tokens_per_round,
                "tokens_per_s": each.tokens_per_s,
                "over_sequential": each.tokens_per_s / without,
                "pays_from": each.pays_from,
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
    for name in ("draft", "tokens/s", "accepted", "pays above", "drafted/round", "tokens/round"):
        result.add_column(name, justify="left" if name == "draft" else "right")
    for each in cost.drafts:
        result.add_row(*_cells(each, settings))
    return result


def generation_assumptions(settings: GenerationSettings) -> list[str]:
    """What the figures rest on, a line each."""
    if settings.acceptance is None:
        share = (
            f"Accepted drafts are assumed, not measured here: {ASSUMED[NGRAM]:.0%} of n-grams' tokens and "
            f"{ASSUMED[SMALL]:.0%} of a small draft's, as with SmolLM2-135M-Instruct in chats. Other texts and models "
            "differ: give --acceptance."
        )
    else:
        share = f"{settings.acceptance:.0%} of drafted tokens are accepted once all before them are, as given."
    return [
        "Generation is of one greedy text at a time while nobody else uses the cloud, in fast, with the cache. What "
        "transformers' generate does beside the model is not counted.",
        f"A small draft has {settings.draft_layers} layers in the place of the cloud's. {share}",
    ]


def _cells(cost: DraftCost, settings: GenerationSettings) -> list[str]:
    names = {NGRAM: "n-grams", SMALL: f"{settings.draft_layers} layers"}
    if cost.acceptance is None or cost.pays_from is None:
        return [cost.draft, f"{cost.tokens_per_s:.3g}", "", "", "", "1"]
    return [
        names[cost.draft],
        f"{cost.tokens_per_s:.3g}",
        f"{cost.acceptance:.0%}",
        "never" if cost.pays_from >= 1 else f"{cost.pays_from:.0%}",
        str(cost.drafted),
        f"{cost.tokens_per_round:.3g}",
    ]
