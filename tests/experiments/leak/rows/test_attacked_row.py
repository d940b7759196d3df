"""When a run is limited by its attack's lists, and when real texts are told from decoys."""

from __future__ import annotations

import pytest
import torch
from support.privacy.attacked import tiny_model

from isthmus.common.errors import AttackLimitedError
from isthmus.edge.data.batches import Encoded
from isthmus.edge.data.readers import Example
from isthmus.experiments.leak.leak_texts import Text
from isthmus.experiments.leak.real_or_decoy import RealOrDecoy, share_picked
from isthmus.experiments.leak.rows.attacked_row import by_small_gradients, check_unlimited
from isthmus.experiments.leak.rows.recorded_rows import Crossed
from isthmus.privacy.ledger.judged_attacks import Judged
from isthmus.privacy.measures.bootstrap import Interval
from isthmus.privacy.recording.traffic import Backward, Forward


def matching(accuracy: float, recall: float | None) -> Judged:
    listed = None if recall is None else Interval(recall, 0, 1)
    return Judged("matching", "known", token_accuracy=Interval(accuracy, 0, 1), coarse_recall=listed)


@pytest.mark.parametrize(("accuracy", "recall"), [(0.95, 0.95), (0.95, 0.975), (0.5, 0.1)])
def test_an_attack_fails_whose_lists_lacked_half_of_what_it_missed(accuracy: float, recall: float) -> None:
    with pytest.raises(AttackLimitedError, match=r"cut 9: matching got .* coarse recall"):
        check_unlimited(matching(accuracy, recall), "cut 9")


@pytest.mark.parametrize(("accuracy", "recall"), [(0.95, 0.98), (0.995, 0.99), (1, 1), (0.3, None)])
def test_an_attack_that_found_all_in_its_lists_does_not(accuracy: float, recall: float | None) -> None:
    check_unlimited(matching(accuracy, recall), "cut 9")


def test_an_attack_on_labels_fails_likewise() -> None:
    with pytest.raises(AttackLimitedError, match=r"exact got 90.0% with a coarse recall of 94.0%"):
        check_unlimited(
            Judged("exact", "known", label_accuracy=Interval(0.9, 0, 1), coarse_recall=Interval(0.94, 0, 1)), "cut 9"
        )


def test_decoys_are_told_by_whoever_has_learned_how_they_are_written() -> None:
    model = tiny_model("llama")
    random = torch.Generator().manual_seed(0)
    start = torch.randint(3, 200, (48, 1), generator=random)
    likely = model.generate(start, do_sample=False, max_new_tokens=10, pad_token_id=0)
    strange = torch.cat([start, torch.randint(3, 200, (48, 10), generator=random)], 1)
    texts, is_real, places = [*likely[:24], *strange[:24]], torch.arange(48) < 24, 2 * [*range(24)]
    scores = RealOrDecoy(model, list(likely[24:]), list(strange[24:])).scores(texts)
    assert share_picked(scores, is_real, places).value > 0.9


def test_where_nothing_tells_them_the_penalty_is_not_the_smallest() -> None:
    """More features than texts fit any noise, so a penalty that is chosen by how well it fits would be."""
    random = torch.Generator().manual_seed(1)
    first, second = (list(torch.randint(3, 200, (20, 8), generator=random)) for _ in range(2))
    assert RealOrDecoy(tiny_model("llama"), first, second).penalty > 1


def test_what_was_not_read_tells_nothing() -> None:
    nothing = [torch.full((5,), -1) for _ in range(4)]
    classifier = RealOrDecoy(tiny_model("llama"), [torch.tensor([3, 4, 5])] * 2, [torch.tensor([9, 9, 9])] * 2)
    is_real = torch.tensor([True, True, False, False])
    assert share_picked(classifier.scores(nothing), is_real, [0, 1, 0, 1]).value == 0.5


def test_the_real_row_is_that_whose_labels_have_small_gradients() -> None:
    def row(text: Text | None, place: int, *norms: float) -> Crossed:
        gradient = torch.tensor(norms).double()[None, :, None]
        forward = Forward(0, 0, gradient, None, None, "fp32", None, True)
        return Crossed(text, place, forward, Backward(0, 0, gradient, "fp32", None))

    real = Text(Example("", ""), Encoded((1,), (1,)))
    rows = [row(None, 0, 9, 4, 4), row(real, 0, 9, 1, 9), row(real, 1, 0, 1, 1), row(None, 1, 0, 2, 2)]
    labels = [torch.tensor([-1, 5, 5]), torch.tensor([-1, 5, -1]), *[torch.tensor([-1, 5, 5])] * 2]
    assert by_small_gradients(rows, labels).value == 1
    assert by_small_gradients(rows, [torch.tensor([5, 5, 5])] * 4).value == 0.5
