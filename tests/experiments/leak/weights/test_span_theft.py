"""What queries give a thief of a tiny model that has learned something."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.privacy.distinct_texts import distinct_task, learned_checkpoint
from torch import Tensor

from isthmus.common.errors import ConfigError
from isthmus.experiments.leak.weights import span_theft
from isthmus.experiments.leak.weights.local_split import LocalSplit
from isthmus.experiments.leak.weights.span_theft import TheftSettings, measure_theft


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> TheftSettings:
    folder = tmp_path_factory.mktemp("theft")
    data = distinct_task(folder / "data", 60)
    return TheftSettings(
        model=str(learned_checkpoint(folder / "model", data)),
        edge_layers="1:1",
        data_folder=data,
        calls=(0, 24),
        held_out=10,
        steps=40,
        learning_rate=3e-3,
        threads=1,
    )


def test_queries_give_a_stand_in_and_a_span_that_lies_gives_less(
    settings: TheftSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = measure_theft(settings)
    nothing, asked = found.runs
    assert (nothing.calls, nothing.tokens, asked.calls) == (0, 0, 24)
    assert asked.tokens > 24
    assert max(found.loss, asked.stolen.loss) < found.without.loss
    assert asked.recovered == pytest.approx(1 - asked.stolen.divergence / found.without.divergence)
    assert asked.stolen.divergence < nothing.stolen.divergence < found.without.divergence
    assert asked.stolen.top1_agreement > found.without.top1_agreement

    class Lying(LocalSplit):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.span = lie  # type: ignore[assignment]

    def lie(hidden: Tensor) -> Tensor:
        return torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3)) * hidden.std()

    monkeypatch.setattr(span_theft, "LocalSplit", Lying)
    (misled,) = measure_theft(replace(settings, calls=(24,))).runs
    assert misled.recovered < asked.recovered - 0.05


def test_a_theft_without_budgets_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"calls = \(\)"):
        measure_theft(TheftSettings(calls=()))
