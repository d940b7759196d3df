"""Adapters out of a recorded run with sites, against its own checkpoints and against another run's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from support.cloud.train_runs import cloud_for_runs

from isthmus.backbone.sites.site_spec import SiteSpec
from isthmus.common.errors import ConfigError, DataError
from isthmus.experiments.leak.weights.extraction_run import (
    ExtractionSettings,
    extraction_of,
    measure_extraction,
    run_options,
    true_product,
)
from isthmus.privacy.recording.recorder import Recorder
from isthmus.privacy.recording.traffic import Traffic, read_traffic

SETTINGS = ExtractionSettings(edge_layers="1:1", steps=3, batch=2, rank=2, threads=1)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Traffic, Path, Path]:
    """What a run with sites has sent, its folder, and that of a run with another seed."""
    folder = tmp_path_factory.mktemp("extraction")
    (folder / "recording").mkdir()
    out, other = folder / "run", folder / "other"
    with cloud_for_runs(folder, recorder=Recorder(folder / "recording", 64 << 20)) as runs:
        options = run_options(SETTINGS) | {"accumulate": 1}
        runs.train(out, **options)
        session = read_traffic(folder / "recording").sessions[0]
        runs.train(other, **(options | {"seed": 1}))
    return read_traffic(folder / "recording").of(session=session), out, other


def test_what_is_extracted_is_what_the_run_had(recorded: tuple[Traffic, Path, Path]) -> None:
    traffic, out, _ = recorded
    found = extraction_of(traffic, out, SETTINGS)
    assert found.products == found.of == 2 * 2 * 2  # q and v of the cloud's two layers, in two steps
    assert found.median_error <= found.largest_error < 1e-2
    assert found.largest_own_error < 1e-2
    assert found.positions > 0


def test_another_runs_adapters_are_others(recorded: tuple[Traffic, Path, Path]) -> None:
    traffic, _, other = recorded
    found = extraction_of(traffic, other, SETTINGS)
    assert found.median_error > 0.5
    assert found.largest_own_error < 1e-2  # which is of the run that was recorded


def test_what_cannot_be_extracted_is_said(recorded: tuple[Traffic, Path, Path], tmp_path: Path) -> None:
    traffic, out, _ = recorded
    with pytest.raises(DataError, match="no adapter at a site"):
        extraction_of(replace(traffic, asked=()), out, SETTINGS)
    with pytest.raises(DataError, match=r"no LoRA at 7\.self_attn\.q_proj"):
        true_product({}, (SiteSpec(7, "self_attn.q_proj"),), 1.0)
    with pytest.raises(ConfigError, match="steps = 1 gives nothing"):
        measure_extraction(replace(SETTINGS, steps=1), tmp_path)
