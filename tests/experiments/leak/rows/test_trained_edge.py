"""The task's score, as an edge would have it that sends held-out texts through codec and defence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.models.tiny import N_LAYERS
from support.privacy.attacked import GaussianNoise, tiny_model

from isthmus.backbone.plan import SplitPlan
from isthmus.common.errors import CheckpointError
from isthmus.edge.data.batches import Encoded, collate
from isthmus.edge.data.readers import Example
from isthmus.experiments.leak.leak_texts import Text
from isthmus.experiments.leak.rows.trained_edge import score_task, trained_defence
from isthmus.privacy.defences.defence_options import read_defence
from isthmus.privacy.defences.defended_span import build_defences
from isthmus.training.run_checkpoint import RandomState, RunCheckpoint, save

PLAN = SplitPlan(N_LAYERS, 2, 1)
TEXTS = [Text(Example("", ""), Encoded(ids, (-100, *ids[1:]))) for ids in ((5, 6, 7, 8), (9, 10, 11))]


def loss(model: Any, **options: Any) -> float:
    return score_task(model, TEXTS, 0, **options).losses.share


def test_what_is_sent_exactly_costs_nothing_and_codec_and_noise_do() -> None:
    model = tiny_model("llama")
    whole = loss(model)
    expected = float(model(**collate([text.encoded for text in TEXTS], 0)).loss.detach())
    assert whole == pytest.approx(expected, abs=1e-5)
    assert loss(model, plan=PLAN) == pytest.approx(whole, abs=1e-6)
    assert loss(model, plan=PLAN, codec="int4") != pytest.approx(whole, abs=1e-4)
    noisy = loss(model, plan=PLAN, defence=GaussianNoise(2.0))
    assert noisy != pytest.approx(whole, abs=1e-2)
    assert (
        noisy
        == loss(model, plan=PLAN, defence=GaussianNoise(2.0))
        != loss(model, plan=PLAN, defence=GaussianNoise(2.0), seed=1)
    )
    assert loss(model) == whole  # nothing is left of the hooks


def test_a_bottleneck_is_the_trained_one(tmp_path: Path) -> None:
    options = [read_defence("bottleneck:rank=4")]
    (pair,) = build_defences(options, 32)
    module = pair.module()
    assert module is not None
    torch.manual_seed(0)
    weights = {f"defence.0.{name}": torch.randn_like(value) for name, value in module.state_dict().items()}
    folder = save(
        tmp_path, RunCheckpoint(1, {}, weights, {}, (), RandomState.take(torch.device("cpu"))), "losses.jsonl", 1
    )
    known = trained_defence(options, folder, 32, tuple)
    assert known is not None
    hidden = torch.randn(1, 3, 32)
    down, up = (weights[f"defence.0.{name}.weight"] for name in ("down", "up"))
    assert torch.allclose(known.send(hidden), hidden @ down.T @ up.T, atol=1e-5)
    with pytest.raises(CheckpointError, match="other weights"):
        trained_defence([read_defence("bottleneck:rank=5")], folder, 32, tuple)
    assert trained_defence([read_defence("dp-sgd:clip=1,sigma=1")], folder, 32, tuple) is None
