"""An output layer that multiplies few rows in another order."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isthmus.backbone.decoding.few_rows import MOST_ROWS, few_rows_at_the_head


class Model:
    isthmus_exact = False

    def __init__(self, head: Any) -> None:
        self.head = head

    def get_output_embeddings(self) -> Any:
        return self.head


def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of rows that were multiplied the other way."""
    seen: list[int] = []
    plain = torch.mm

    def mm(weight: Tensor, columns: Tensor) -> Tensor:
        seen.append(columns.shape[1])
        return plain(weight, columns)

    monkeypatch.setattr(torch, "mm", mm)
    return seen


@pytest.mark.parametrize("bias", [False, True])
def test_few_rows_are_multiplied_in_another_order(monkeypatch: pytest.MonkeyPatch, bias: bool) -> None:
    seen = products(monkeypatch)
    head = nn.Linear(64, 1000, bias=bias)
    rows = torch.randn(1, MOST_ROWS + 1, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), few_rows_at_the_head(Model(head)):
        for count in range(1, MOST_ROWS + 2):
            found, expected = head(rows[:, :count]), nn.functional.linear(rows[:, :count], head.weight, head.bias)
            assert found.shape == expected.shape
            assert torch.allclose(found, expected, atol=1e-4)
            assert not torch.allclose(found, expected.flip(-1), atol=1e-1)
            if count in (1, MOST_ROWS + 1):
                assert torch.equal(found, expected)
        assert head(rows[0, :3].view(3, 1, 64)).shape == (3, 1, 1000)
    assert seen == [*range(2, MOST_ROWS + 1), 3]
    head(rows[:, :2])
    assert len(seen) == MOST_ROWS


def test_it_may_be_asked_for_twice_and_a_copy_multiplies_with_its_own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = products(monkeypatch)
    head, rows = nn.Linear(8, 20), torch.ones(1, 2, 8)
    model = Model(head)
    with torch.no_grad(), few_rows_at_the_head(model):
        with few_rows_at_the_head(model):
            head(rows)
        head(rows)
        copied = copy.deepcopy(head)
        copied.weight.zero_()
        copied.bias.zero_()
        assert not copied(rows).any()
        assert head(rows).any()
        assert copied.to(torch.bfloat16)(rows.bfloat16()).dtype == torch.bfloat16
    head(rows)
    assert seen == [2] * 4


def test_what_is_exact_or_no_plain_fp32_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = products(monkeypatch)
    exact = Model(nn.Linear(8, 20))
    exact.isthmus_exact = True

    class Adapted(nn.Linear):
        pass

    for model in (exact, Model(nn.Linear(8, 20, dtype=torch.bfloat16)), Model(Adapted(8, 20))):
        rows = torch.ones(1, 2, 8, dtype=model.head.weight.dtype)
        expected = model.head(rows)
        with few_rows_at_the_head(model):
            assert torch.equal(model.head(rows), expected)
    assert not seen
