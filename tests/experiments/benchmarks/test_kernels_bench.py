"""The benchmark of kernels, with tiny sizes."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from isthmus.cli.main import app
from isthmus.common.errors import ConfigError
from isthmus.experiments.benchmarks.kernels_bench import run_kernels
from isthmus.experiments.harness.bench_settings import KernelSettings

TINY = KernelSettings(rows=[2, 3], widths=((64, 40),), ranks=(1, 3), rounds=1)


def test_every_candidate_has_a_ratio() -> None:
    before = torch.get_num_threads()
    result = run_kernels(TINY)
    assert torch.get_num_threads() == before
    assert not result["triton"]
    assert [(row["dtype"], row["in"], row["out"], row["rows"]) for row in result["grouped"]] == [
        (dtype, 64, 40, rows) for dtype in ("float32", "bfloat16") for rows in (2, 3)
    ]
    for row in result["grouped"]:
        assert set(row["ratio"]) == {"loop", "grouped_mm", "bmm"}
        assert row["same_bits"]["isthmus"]
    assert [(row["call"], row["rows"], list(row["ratio"])) for row in result["blockwise"]] == [
        (call, rows, [theirs])
        for rows in (4, 6)
        for call, theirs in {
            "quantize_int8": "quantize_blockwise",
            "dequantize_int8": "dequantize_blockwise",
            "quantize_int4": "quantize_4bit",
            "dequantize_int4": "dequantize_4bit",
        }.items()
    ]
    for row in [*result["grouped"], *result["blockwise"]]:
        assert row["seconds"] > 0
        assert all(ratio > 0 for ratio in row["ratio"].values())


def test_the_candidates_compute_the_same() -> None:
    from isthmus.experiments.benchmarks import kernels_bench

    batch = kernels_bench._batch(TINY, torch.float32, (64, 40), 3, torch.Generator().manual_seed(1))
    wanted = kernels_bench._loop(batch)
    for product in (kernels_bench._ours, kernels_bench._grouped_mm, kernels_bench._bmm):
        torch.testing.assert_close(product(batch), wanted)


@pytest.mark.parametrize("as_json", [True, False])
def test_the_command(as_json: bool) -> None:
    words = ["bench", "kernels", "--rows", "1", "--rounds", "1", "--device", "cpu", *(["--json"] if as_json else [])]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0
    if as_json:
        assert json.loads(done.stdout)["settings"]["rows"] == [1]
    else:
        assert "below 1 ours is faster" in done.stdout
        assert "of dequantize_4bit" in done.stdout


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="there is no device 'tpu'"):
        CliRunner().invoke(app, ["bench", "kernels", "--device", "tpu"], catch_exceptions=False)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no CUDA device"):
            run_kernels(KernelSettings(device="cuda"))
