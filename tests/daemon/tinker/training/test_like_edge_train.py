"""The same batches through Tinker's steps and through `isthmus edge train`.

With one micro-batch a step, adapters are the same bit for bit: shapes, sums and AdamW are the same. With several, a
label's share of the gradient is rounded otherwise: here it is 1 / n, there a micro-batch's mean times its part of n.
Then, and for the losses, which are summed in another order, the difference is bounded: 1e-5 of the largest value.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.cloud.train_runs import Runs, cloud_for_runs
from support.daemon.local_trainer import LocalTrainer, near
from support.run_folders import adapter, losses, same

from isthmus.backbone.checkpoints.sources import load_tokenizer
from isthmus.edge.config.schedule import steps_per_epoch
from isthmus.edge.config.training_config import TrainConfig
from isthmus.edge.data.batches import IGNORED, Batches, Encoded, load_data

pytestmark = pytest.mark.server

STEPS = 7
TARGETS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
SETTINGS: dict[str, Any] = {
    "rank": 4,
    "alpha": 32.0,
    "seed": 3,
    "target_modules": TARGETS,
    "schedule": "constant",
    "steps": STEPS,
    "batch": 3,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    with cloud_for_runs(tmp_path_factory.mktemp("like")) as started:
        yield started


def _datum(example: Encoded, n: int) -> dict[str, Any]:
    tokens = list(example.input_ids)
    weights = [0.0 if label == IGNORED else 1 / n for label in example.labels[1:]]
    return {"tokens": tokens[:-1], "targets": tokens[1:], "weights": weights}


def _like(trainer: LocalTrainer, config: TrainConfig, **shape: Any) -> list[float]:
    """Make the steps of a run by Tinker's questions, a call for each micro-batch; their losses."""
    trainer.create(**shape)
    data = load_data(config, load_tokenizer(trainer.runs.model))
    batches = Batches(data.train, config.batch, data.pad_id, config.seed)
    per_epoch = steps_per_epoch(config, len(data.train))
    found = []
    for number in range(1, STEPS + 1):
        epoch, inside = divmod(number - 1, per_epoch)
        first = inside * config.accumulate * config.batch
        rows = batches.order(epoch)[first : first + config.accumulate * config.batch]
        examples = [data.train[row] for row in rows]
        n = sum(label != IGNORED for example in examples for label in example.labels)
        calls = [examples[i : i + config.batch] for i in range(0, len(examples), config.batch)]
        answers = [trainer.forward_backward([_datum(example, n) for example in call]) for call in calls]
        found.append(sum(answer["metrics"]["loss:sum"] for answer in answers))
        trainer.step(number, beta2=0.999, eps=1e-8, grad_clip_norm=1.0)
    return found


@pytest.mark.parametrize(
    ("accumulate", "layers"), [(1, "edge"), (2, "edge"), (1, "all")], ids=["one", "accumulated", "leased"]
)
def test_steps_are_those_of_edge_train(runs: Runs, tmp_path: Path, accumulate: int, layers: str) -> None:
    sites = {"sites": "all", "leased": "all"} if layers == "all" else {}
    config = runs.config(tmp_path / "run", accumulate=accumulate, **sites, **SETTINGS)
    runs.train(tmp_path / "run", accumulate=accumulate, **sites, **SETTINGS)
    theirs = [line["loss"] for line in losses(tmp_path / "run")]
    with LocalTrainer(runs, tmp_path) as trainer:
        ours = _like(trainer, config, layers=layers)
        assert ours == pytest.approx(theirs, rel=1e-5)
        assert near(trainer.adapter(), adapter(tmp_path / "run"), 1e-5)
        assert same(trainer.adapter(), adapter(tmp_path / "run")) == (accumulate == 1)
    # The control: another start, and otherwise the same.
    with LocalTrainer(runs, tmp_path / "other") as other:
        assert _like(other, config, layers=layers, seed=4) != pytest.approx(theirs, rel=1e-5)
        assert not near(other.adapter(), adapter(tmp_path / "run"), 1e-2)
