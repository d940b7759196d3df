"""The benchmark of quantized backbones: real clouds, real training, and finished results that are kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from support.models.small_tasks import task_folder
from support.models.tiny import tiny_checkpoint

from isthmus.common.errors import ConfigError
from isthmus.experiments.benchmarks import step
from isthmus.experiments.harness.bench_settings import QuantizeSettings
from isthmus.experiments.harness.launch import LocalCloud
from isthmus.experiments.placements import placements
from isthmus.experiments.precision import quantize_bench
from isthmus.experiments.precision.quantize_bench import run_quantize

pytest.importorskip("bitsandbytes", reason="the package bitsandbytes is not installed: pip install 'isthmus[quantize]'")


def settings_of(folder: Path, *forms: str) -> QuantizeSettings:
    return QuantizeSettings(
        model=str(folder / "model"), form=list(forms), edge_layers="1:1", data_folder=folder / "data", steps=3, batch=2,
        seq=8, pairs=5, max_length=32, learning_rate=3e-2, test=3, threads=1, out=folder / "out",
    )  # fmt: skip


@contextmanager
def one_cloud(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One cloud for all that is measured of a form, as the same is asked of it."""
    started: dict[tuple[str, ...], LocalCloud] = {}
    with ExitStack() as stack:

        def start(_folder: Path, *options: str) -> AbstractContextManager[LocalCloud]:
            asked = tuple(sorted(options))
            if asked not in started:
                started[asked] = stack.enter_context(LocalCloud(folder, *options))
            return nullcontext(started[asked])

        for module in (step, placements):
            monkeypatch.setattr(module, "LocalCloud", start)
        yield
    assert len(started) == 1


@pytest.mark.long
@pytest.mark.server
@pytest.mark.usefixtures("warm_children")
def test_a_form_is_measured_over_the_span_as_it_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    tiny_checkpoint("llama", tmp_path / "model")
    task_folder(tmp_path / "data")
    settings = settings_of(tmp_path, "nf4")
    with one_cloud(tmp_path / "cloud", monkeypatch):
        result = run_quantize(settings)
    (row,) = result["runs"]
    assert (row["quantize"], row["cloud_dtype"]) == ("nf4", "bf16")
    assert 0 < row["span_bytes"] < 4 * 4 * 12_000
    assert row["step_ratio"] > 0
    assert row["held_out_loss"] != row["zero_shot_loss"]

    def refuse(*_: Any) -> Any:
        raise AssertionError("a finished result was made again")

    monkeypatch.setattr(quantize_bench, "run_step", refuse)
    monkeypatch.setattr(quantize_bench, "clouds", lambda *_: refuse)
    assert run_quantize(settings)["runs"] == result["runs"]


def test_a_form_that_does_not_exist_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'int2'.*none, bf16, int8, nf4"):
        run_quantize(settings_of(tmp_path, "int2"))
