"""How data are checked, and how they become micro-batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from isthmus.common.errors import ConfigError
from isthmus.daemon.tinker.training import datum_batches
from isthmus.daemon.tinker.training.datum_batches import Datum, DatumBatch, checked, micro_batches, most_positions
from isthmus.daemon.tinker.training.loss_functions import loss_named

CROSS_ENTROPY = loss_named("cross_entropy", {})
PAD = 9


def _datum(n: int, start: int = 10) -> Datum:
    tokens = list(range(start, start + n + 1))
    return Datum(tokens=tokens[:-1], targets=tokens[1:], weights=[1.0] * n)


def _batches(data: list[Datum], positions: int = 4096, longest: int = 1000) -> list[DatumBatch]:
    rows = checked(data, CROSS_ENTROPY, vocabulary=10_000, longest=longest)
    return list(micro_batches(rows, PAD, positions))


def test_as_many_as_fit_go_together_in_their_order() -> None:
    # With the last target behind each: 4, 4, 6, 11, 2, 2 positions.
    data = [_datum(n) for n in (3, 3, 5, 10, 1, 1)]
    assert [len(batch.rows) for batch in _batches(data, positions=12)] == [2, 1, 1, 2]
    assert [len(batch.rows) for batch in _batches(data, positions=18)] == [3, 1, 2]
    assert [len(batch.rows) for batch in _batches(data)] == [6]
    lengths = [len(row.tokens) for batch in _batches(data, positions=12) for row in batch.rows]
    assert lengths == [4, 4, 6, 11, 2, 2]


def test_large_vocabularies_and_small_clouds_make_small_micro_batches() -> None:
    assert most_positions(300, 1 << 20) == 4096
    assert most_positions(49_152, 1 << 20) == 2730
    assert most_positions(152_064, 1 << 20) == 882
    assert most_positions(300, 100) == 100
    assert most_positions(1 << 30, 100) == 1


def test_a_long_row_is_not_divided() -> None:
    assert [batch.input_ids.shape for batch in _batches([_datum(3), _datum(50)], positions=12)] == [(1, 4), (1, 51)]


def test_rows_are_padded_on_the_right_and_padding_counts_nothing() -> None:
    (batch,) = _batches([_datum(3), _datum(1)])
    assert batch.input_ids.tolist() == [[10, 11, 12, 13], [10, 11, PAD, PAD]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.targets[..., 0].tolist() == [[11, 12, 13, 0], [11, 0, 0, 0]]
    assert batch.inputs["weights"][..., 0].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert batch.padding[..., 0].tolist() == [[False, False, False, True], [False, True, True, True]]


def test_a_row_as_long_as_the_window_has_nothing_behind_it() -> None:
    (batch,) = _batches([_datum(3)], longest=3)
    assert batch.input_ids.tolist() == [[10, 11, 12]]


def test_several_targets_keep_their_shape() -> None:
    several = Datum(tokens=[4, 5], targets=[[5, 6, 7], [6, 7, 8]], weights=[[0.5, 0.25, -0.25], [1, 0, 0]])
    (batch,) = _batches([several, _datum(1)])
    assert batch.targets.shape == (2, 3, 3)
    assert batch.targets[0, :2].tolist() == [[5, 6, 7], [6, 7, 8]]
    assert batch.inputs["weights"][1].tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert [row.flat for row in batch.rows] == [False, True]
    assert batch.inputs["weights"].dtype == torch.float32


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"targets": [2]}, "2 tokens and targets for 1"),
        ({"weights": None}, "datum 0: loss cross_entropy needs weights"),
        ({"weights": [1.0]}, "weights are not shaped as the targets are"),
        ({"weights": [[1.0], [1.0]]}, "weights are not shaped"),
        ({"weights": [1.0, 1e39]}, "cannot hold"),
        ({"logprobs": [0.0, 0.0]}, "takes no logprobs"),
        ({"targets": [2, 100]}, "token 100, and the model has 100"),
        ({"tokens": [100, 1]}, "token 100"),
        ({"targets": [[1, 2], [3]]}, "rows of different lengths"),
        ({"targets": [[], []]}, "empty"),
        ({"tokens": [1] * 21, "targets": [1] * 21, "weights": [0.0] * 21}, "21 tokens, and 20 are possible"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(values: dict[str, Any], said: str) -> None:
    whole = {"tokens": [1, 2], "targets": [2, 3], "weights": [1.0, 1.0]}
    checked([Datum(**whole)], CROSS_ENTROPY, vocabulary=100, longest=20)
    with pytest.raises(ConfigError, match=said):
        checked([Datum(**{**whole, **values})], CROSS_ENTROPY, vocabulary=100, longest=20)


def test_policy_losses_take_one_target_for_each_position() -> None:
    rows: dict[str, Any] = {"tokens": [1], "targets": [[2, 3]], "logprobs": [[0, 0]], "advantages": [[1, 1]]}
    with pytest.raises(ConfigError, match="ppo takes one target"):
        checked([Datum(**rows)], loss_named("ppo", {}), vocabulary=100, longest=20)
    flat = {name: [value[0][0]] if name != "tokens" else value for name, value in rows.items()}
    assert checked([Datum(**flat)], loss_named("ppo", {}), vocabulary=100, longest=20)


@pytest.mark.parametrize(
    ("bound", "said"), [("MOST_DATA", "data"), ("MOST_TOKENS", "tokens"), ("MOST_TARGETS", "targets")]
)
def test_a_request_is_bounded(bound: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = [_datum(1)] * 8
    monkeypatch.setattr(datum_batches, bound, 8)
    checked(data, CROSS_ENTROPY, vocabulary=100, longest=20)
    monkeypatch.setattr(datum_batches, bound, 7)
    with pytest.raises(ConfigError, match=f"8 {said} in one request are too many: give at most 7"):
        checked(data, CROSS_ENTROPY, vocabulary=100, longest=20)


def test_no_data_are_refused() -> None:
    with pytest.raises(ConfigError, match="no data"):
        checked([], CROSS_ENTROPY, vocabulary=100, longest=20)
