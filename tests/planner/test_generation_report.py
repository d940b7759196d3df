"""What is said about generation, from made-up costs."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from isthmus.planner.generation_cost import NGRAM, SMALL, DraftCost, GenerationCost, GenerationSettings
from isthmus.planner.generation_report import as_json, draft_table, generation_assumptions, summary
from isthmus.planner.wire_cost import Traffic

COST = GenerationCost(
    0.25,
    0.012,
    0.03,
    0.058,
    Traffic(2400, 2380, 1),
    (
        DraftCost("none", None, 0, 1.0, 10, None),
        DraftCost(NGRAM, 0.15, 0, 1.0, 10, None),
        DraftCost(SMALL, 0.66, 4, 2.5, 20, 0.2),
    ),
)
ASSUMING, GIVEN = GenerationSettings(64, 100, 3), GenerationSettings(64, 100, 3, 0.4)


def test_the_tree_has_the_fixed_keys_and_is_json() -> None:
    tree = json.loads(json.dumps(as_json(COST, ASSUMING)))
    none, ngram, small = tree.pop("drafts")
    assert tree == {
        "prompt_tokens": 64,
        "tokens": 100,
        "first_token_s": 0.25,
        "edge_s": 0.012,
        "cloud_s": 0.03,
        "wire_s": 0.058,
        "bytes_up": 2400,
        "bytes_down": 2380,
    }
    assert small == {
        "draft": "small",
        "layers": 3,
        "acceptance_rate": 0.66,
        "acceptance_rate_assumed": True,
        "drafted_per_round": 4,
        "tokens_per_round": 2.5,
        "tokens_per_s": 20,
        "over_sequential": 2,
        "break_even_rate": 0.2,
    }
    assert (none["draft"], none["tokens_per_s"], none["acceptance_rate"], none["acceptance_rate_assumed"]) == (
        "none",
        10,
        None,
        False,
    )
    assert (ngram["layers"], ngram["over_sequential"], ngram["break_even_rate"]) == (None, 1, None)
    assert not as_json(COST, GIVEN)["drafts"][2]["acceptance_rate_assumed"]


def test_the_summary_says_what_a_token_is_made_of() -> None:
    assert summary(COST, ASSUMING) == (
        "Generation: the first token after a prompt of 64 takes 0.25 s; a further one 12 ms on the edge, 30 ms in the "
        "cloud and 58 ms on the wire, 2.3 KiB up and 2.3 KiB down."
    )


def test_the_table_says_which_draft_never_pays_and_fits_80_columns() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(draft_table(COST, ASSUMING))
    lines = [line.split() for line in console.export_text().splitlines()]
    assert lines == [
        ["draft", "tokens/s", "acceptance", "rate", "break-even", "drafted/round", "tokens/round"],
        ["none", "10", "1"],
        ["n-grams", "10", "15%", "never", "0", "1"],
        ["3", "layers", "20", "66%", "20%", "4", "2.5"],
    ]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            ASSUMING,
            "assumed, not measured here: 16% of n-grams (over all texts 14% to 17%) and 36% of a small draft (over all",
        ),
        (GIVEN, "40%, as given"),
    ],
)
def test_it_says_where_the_acceptance_rate_comes_from(settings: GenerationSettings, said: str) -> None:
    text = "\n".join(generation_assumptions(settings))
    assert said in text
    assert ("SmolLM2" in text) == (settings is ASSUMING)
    assert "A small draft has 3 layers" in text
    assert "a text of 100 tokens" in text
    assert "optimistic" in text
