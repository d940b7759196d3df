"""`isthmus bench serve`: traces are read and scaled as it says, and a run shows what the clients saw."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.models.tiny import tiny_checkpoint

from isthmus.common.errors import ConfigError
from isthmus.experiments.generation import serve_bench
from isthmus.experiments.generation.serve_bench import TRACES, TraceRequest, read_trace
from isthmus.experiments.harness.bench_settings import ServeSettings

ROWS = (
    "2023-11-16 18:17:03.9799600,480,16",
    "2023-11-16 18:17:04.9799600,320,8",
    "2023-11-16 18:17:07.9799600,80,40",
)


def traces(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for name in TRACES:
        (folder / name).write_text("\n".join(("TIMESTAMP,ContextTokens,GeneratedTokens", *ROWS)))
    return folder


def test_a_trace_is_read_from_its_first_request_on(tmp_path: Path) -> None:
    found = read_trace(traces(tmp_path / "traces") / TRACES[0])
    assert found == [TraceRequest(0.0, 480, 16), TraceRequest(1.0, 320, 8), TraceRequest(4.0, 80, 40)]


@pytest.mark.parametrize("text", ["", "a,b\n1,2", "TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,2"])
def test_what_is_no_trace_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    if not text:
        path.unlink()
    with pytest.raises(ConfigError, match="is no trace"):
        read_trace(path)


def test_requests_are_scaled_to_the_rate_and_the_model(tmp_path: Path) -> None:
    model = tiny_checkpoint("llama", tmp_path / "model")
    settings = ServeSettings(traces=traces(tmp_path / "traces"), model=str(model), requests=3, rate=2.0, fewer=4.0)
    found = serve_bench._requests(settings)
    assert len(found) == 6
    assert found[-1].at == pytest.approx(3.0)  # six requests at two a second
    assert [each.context for each in found] == [120, 120, 80, 80, 20, 20]
    assert max(each.context + each.tokens for each in found) <= 128
    assert found[-1].tokens == 10


def test_a_run(tmp_path: Path) -> None:
    model = tiny_checkpoint("llama", tmp_path / "model")
    settings = ServeSettings(
        traces=traces(tmp_path / "traces"), model=str(model), n=2, requests=2, rate=4.0, fewer=8.0, threads=1
    )
    whole = serve_bench.run_serve(settings, tmp_path / "clouds")
    assert json.loads(json.dumps(whole)) == whole  # as --json prints it
    result = whole["batched"]
    assert result["requests"] == 4
    assert result["tokens_per_s"] > 0
    assert result["trained_per_s"] > 0
    assert result["cache_bytes"] > 0
    assert 0 <= result["first_in_time"] <= 1
