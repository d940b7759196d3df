"""What figures and page take of a ledger: rows, the strongest attack, the frontier and its sentence."""

from __future__ import annotations

import pytest
from support.privacy.small_ledger import run

from isthmus.experiments.leak.page.ledger_rows import (
    LedgerRow,
    frontier,
    frontier_sentence,
    ledger_rows,
    marks,
    modes,
    percent,
    spread,
)


def row(name: str, exposed: float, loss: float | None, **more: object) -> LedgerRow:
    values = {"defence": "mixing", **more}
    return LedgerRow(name, (run(name, "vocabulary_matching", token_accuracy=exposed, task_loss_ratio=loss, **values),))


def test_a_row_has_the_strongest_attack_of_each_sort_and_each_codec_is_a_row() -> None:
    weak = run("cut 2", "ridge_inversion", token_accuracy=0.5, rare_accuracy=0.4)
    strong = run("cut 2", "vocabulary_matching", token_accuracy=0.9, rare_accuracy=0.1, task_loss_ratio=1.0)
    labels = run("cut 2", "exact_labels", label_accuracy=0.7)
    coarse = run("cut 2", "vocabulary_matching", codec="int4", token_accuracy=0.8)
    first, second = ledger_rows({"runs": [weak, strong, labels, coarse]})
    assert (first.name, second.name) == ("cut 2", "cut 2, int4")
    tokens, rare = first.worst("token_accuracy"), first.worst("rare_accuracy")
    assert tokens is not None
    assert rare is not None
    assert (tokens.value, tokens.attack, rare.value, rare.attack) == (
        0.9,
        "vocabulary_matching",
        0.4,
        "ridge_inversion",
    )
    assert first.worst("secret_recall") is None
    assert first.loss_ratio == 1.0
    assert second.loss_ratio is None


def test_a_defended_rows_loss_is_the_lower_of_with_and_without_its_defence() -> None:
    assert row("mixing", 0.99, 1.5, loss_ratio_without_defence=1.2).loss_ratio == 1.2
    assert row("bottleneck", 0.8, 3.0, loss_ratio_without_defence=4.0).loss_ratio == 3.0


def test_who_does_not_know_the_front_is_told_from_who_does() -> None:
    known = run("cut 2", "vocabulary_matching", token_accuracy=1.0)
    tuned = run("cut 2", "vocabulary_matching", token_accuracy=0.97, front="tuned")
    helped = run("cut 2", "vocabulary_matching", token_accuracy=0.99, front="tuned", known_texts=8)
    (both,) = ledger_rows({"runs": [known, tuned, helped]})
    assert (both.exposed, both.against("known").exposed, both.against("tuned").exposed) == (1.0, 1.0, 0.97)
    assert [(name, each.exposed) for name, each in modes([both])] == [("Split", 1.0), ("Private front", 0.97)]


def test_of_split_rows_the_one_with_a_private_front_stands_beside_it() -> None:
    other = row("cut 1", 1.0, 1.0, defence="none", plan="1:2")
    known, tuned = (row(side, 0.9, 1.0, defence="none", front=side) for side in ("known", "tuned"))
    assert [each.name for _, each in modes([other, known, tuned])] == ["known", "tuned"]
    assert [each.name for _, each in modes([other, known])] == ["cut 1"]


def test_who_sees_the_traffic_gets_no_less_than_who_sees_none() -> None:
    assert row("noise", 0.02, 9.0, prior_unigram_accuracy=0.06, prior_free_accuracy=0.01).exposed == 0.06
    assert row("noise", 0.07, 9.0, prior_unigram_accuracy=0.06, prior_free_accuracy=0.01).exposed == 0.07
    (unseen,) = ledger_rows({"runs": [run("labels", "exact_labels", label_accuracy=0.7, prior_unigram_accuracy=0.06)]})
    assert unseen.exposed is None


def test_on_the_frontier_no_row_is_better_in_both() -> None:
    rows = [row("a", 1.0, 1.0), row("b", 0.9, 1.2), row("c", 0.95, 1.3), row("d", 0.5, 2.0), row("e", 0.4, None)]
    assert [each.name for each in frontier(rows)] == ["a", "b", "d"]
    assert [each.name for each in frontier([*rows, row("f", 0.1, 0.9)])] == ["f"]


def test_of_undefended_rows_the_least_exposed_is_a_mark() -> None:
    rows = [row("cut 1", 1.0, 1.0, defence="none"), row("cut 4", 0.99, 1.0, defence="none"), row("mixed", 0.9, 1.1)]
    assert [each.name for each in marks(rows)] == ["cut 4", "mixed"]


def test_the_sentence_falls_whichever_way_the_rows_do() -> None:
    plain, weak = row("cut 2", 1.0, 1.0, defence="none"), row("weak", 0.96, 1.02)
    said = frontier_sentence([plain, weak, row("secret", 0.1, 1.0, front="tuned")])
    assert "the least exposed one (weak) gives up 96\u00a0%" in said
    assert "None that sends activations keeps the strongest attack below half" in said
    helps = row("helps", 0.3, 1.01)
    said = frontier_sentence([plain, weak, helps])
    assert "(helps) gives up 30\u00a0%" in said
    assert "below half of the tokens costs 1.01\u00a0\u00d7 the loss (helps)" in said
    assert "no frontier" in frontier_sentence([row("cut 2", 1.0, None)])
    emulator = LedgerRow("emulator", (run("emulator", "none", mode="emulator", task_loss_ratio=1.3),))
    assert frontier_sentence([plain, emulator]).endswith(
        "(emulator), the loss is 1.30\u00a0\u00d7 the undefended run's."
    )


def test_where_nothing_is_sent_what_is_exposed_is_a_blind_guess() -> None:
    priors = {"prior_accuracy": 0.4, "prior_free_accuracy": 0.07, "prior_unigram_accuracy": 0.04}
    emulator = LedgerRow("emulator", (run("emulator", "none", mode="emulator", **priors),))
    assert emulator.exposed == 0.07
    unmeasured = LedgerRow("cut 2", (run("cut 2", "exact_labels", label_accuracy=1.0, **priors),))
    assert unmeasured.exposed is None


@pytest.mark.parametrize(
    ("value", "said"),
    [(1.0, "100"), (0.9996, "99.9"), (0.996, "99.6"), (0.98, "98"), (0.0001, "0.1"), (0.0, "0"), (0.004, "0.4")],
)
def test_a_share_is_never_rounded_to_all_or_nothing(value: float, said: str) -> None:
    assert percent(value) == f"{said}\u00a0%"


def test_labels_are_moved_apart_and_no_further_than_they_must() -> None:
    assert spread([0.1, 0.5, 0.9], 0.1, 0, 1) == pytest.approx([0.1, 0.5, 0.9])
    assert spread([0.5, 0.5, 0.5], 0.1, 0, 1) == pytest.approx([0.4, 0.5, 0.6])
    assert spread([1.0, 0.99], 0.1, 0, 1) == pytest.approx([1.0, 0.9])
    assert spread([0.5] * 5, 0.5, 0, 1) == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert spread([], 0.1, 0, 1) == []
