"""Who hears how a run goes on: the run has the same bits, and what is heard is what it did."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cloud.train_runs import Runs

from isthmus.backbone.adapters.custom_adapters import ADAPTER_WEIGHTS
from isthmus.edge.cloud_link import open_link
from isthmus.edge.data.batches import IGNORED
from isthmus.edge.run_report import WireMeter
from isthmus.edge.split_run import train_over
from isthmus.edge.training.run_listener import SaveAdapter, TokenAccuracy

pytestmark = pytest.mark.server


class Heard:
    """Notes what it hears, and saves each checkpoint's adapter."""

    go_on = "ask again"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls: list[tuple[str, int]] = []
        self.lines: list[Mapping[str, Any]] = []

    def began(self, step: int, total: int, save: SaveAdapter, meter: WireMeter | None) -> None:
        self.calls.append(("began", step))
        assert total == 3
        assert meter is not None
        assert meter.totals().bytes_up > 0

    def stepped(self, line: Mapping[str, Any], seconds: float) -> None:
        self.calls.append(("stepped", line["step"]))
        self.lines.append(line)
        assert seconds > 0

    def evaluated(self, step: int, loss: float) -> None:
        self.calls.append(("evaluated", step))

    def saved(self, step: int, save: SaveAdapter) -> None:
        self.calls.append(("saved", step))
        save(self.folder / str(step))


@pytest.mark.parametrize("values", [{}, {"overlap": 2}, {"optimizer": "mezo"}, {"method": "prompt"}])
def test_a_run_that_is_listened_to_has_the_same_bits(runs: Runs, tmp_path: Path, values: dict[str, Any]) -> None:
    runs.train(tmp_path / "alone", **values)
    heard = Heard(tmp_path / "adapters")
    config = runs.config(tmp_path / "heard", save_every=2, eval_every=2, **values)
    with open_link(config) as link:
        train_over(link, config, listener=heard)
    alone, ours = ((tmp_path / name / "adapter" / ADAPTER_WEIGHTS).read_bytes() for name in ("alone", "heard"))
    assert ours == alone
    assert (heard.folder / "3" / ADAPTER_WEIGHTS).read_bytes() == alone
    assert (heard.folder / "2" / ADAPTER_WEIGHTS).read_bytes() != alone
    assert heard.calls == [
        ("began", 0), ("evaluated", 0), ("stepped", 1), ("stepped", 2), ("evaluated", 2), ("saved", 2), ("stepped", 3),
        ("evaluated", 3), ("saved", 3),
    ]  # fmt: skip
    logged = [json.loads(line) for line in (tmp_path / "alone" / "losses.jsonl").read_text().splitlines()]
    for line, plain in zip(heard.lines, logged, strict=True):
        assert {name: value for name, value in line.items() if name != "accuracy"} == plain
        assert ("accuracy" in line) == (not values or "overlap" in values)


def test_accuracy_is_the_share_of_labels_that_are_the_likeliest_token() -> None:
    labels = torch.tensor([[IGNORED, 3, 1, IGNORED], [IGNORED, IGNORED, 2, 0]])
    logits = torch.zeros(2, 4, 5)
    for row, place, token in ((0, 0, 3), (0, 1, 4), (1, 1, 2), (1, 2, 0)):  # the second one is wrong
        logits[row, place, token] = 1.0
    accuracy = TokenAccuracy()
    accuracy.begin_step()
    accuracy.add({"labels": labels}, logits)
    assert accuracy.value == 3 / 4
    accuracy.add({"labels": labels}, torch.zeros(2, 4, 5))  # the likeliest is 0, which is one of the labels
    assert accuracy.value == 4 / 8
    accuracy.begin_step()
    accuracy.add({"labels": labels[:1]}, logits[:1])
    assert accuracy.value == 1 / 2
