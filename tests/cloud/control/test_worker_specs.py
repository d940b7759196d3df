"""From the options of `serve` to what each worker serves: what fits together, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.models.tiny import tiny_checkpoint

from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.backbone.plan import SplitPlan
from isthmus.cloud.control.serve_options import ServeOptions
from isthmus.cloud.control.worker_setup import make_parts
from isthmus.cloud.control.worker_specs import Backbone, WorkerCount, count_workers
from isthmus.common.errors import ConfigError

PLAN = SplitPlan.parse("2:2", 6)


@pytest.mark.parametrize(("workers", "bounds"), [("1", (1, 1)), ("3", (3, 3)), ("1:4", (1, 4)), ("2:2", (2, 2))])
def test_a_number_of_workers_is_one_or_two_numbers(workers: str, bounds: tuple[int, int]) -> None:
    assert count_workers(ServeOptions("tiny", Path(), workers=workers), PLAN) == WorkerCount(*bounds)


@pytest.mark.parametrize("workers", ["0", "4:2", "1:2:3", "two", "-1", "1:", "129"])
def test_a_number_of_workers_that_is_none_is_refused(workers: str) -> None:
    with pytest.raises(ConfigError, match=r"MIN:MAX"):
        count_workers(ServeOptions("tiny", Path(), workers=workers), PLAN)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pipeline": 3}, "2 layers, so it has 1 to 2 stages"),
        ({"pipeline": 2, "workers": "2"}, "--pipeline 2 and --workers 2 exclude each other"),
        ({"pipeline": 2, "emulators": ("package",)}, "--pipeline 2 and --emulator exclude each other"),
    ],
)
def test_a_pipeline_that_does_not_fit_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        count_workers(ServeOptions("tiny", Path(), **arguments), PLAN)


def test_a_changed_tokenizer_makes_other_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    model = tiny_checkpoint("llama", tmp_path / "model")
    checkpoint = Checkpoint(model, "tiny")
    plan = SplitPlan.parse("2:2", checkpoint.config.num_hidden_layers)
    backbone = Backbone(checkpoint, plan, "fp32", "none")
    first = backbone.parts
    assert backbone.parts == first
    (model / "chat_template.jinja").write_text("{{ messages }}")
    second = backbone.parts
    assert second != first
    make_parts(checkpoint, plan, second)
    assert not first.exists()
    assert (second / "chat_template.jinja").read_text() == "{{ messages }}"
