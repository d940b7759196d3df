"""`isthmus bench serve`: traces are read and scaled as it says, and a run shows what the clients saw."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.models.tiny import tiny_checkpoint

from isthmus.common.errors import ConfigError
from isthmus.experiments.generation import serve_bench
from isthmus.experiments.generation.serve_bench import TRACES, Replay, TraceRequest, figures, read_trace
from isthmus.experiments.harness.generation_settings import ServeSettings

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


def test_the_second_half_begins_anew() -> None:
    requests = [TraceRequest(at, 8, 2) for at in (0.0, 1.0, 3.0, 7.0)]
    first, second = serve_bench._halves(requests)
    assert ([each.at for each in first], [each.at for each in second]) == ([0.0, 1.0], [0.0, 4.0])


def test_figures_are_of_both_halves() -> None:
    def answer(first: float, between: list[float], ended: float) -> dict[str, Any]:
        return {"first_s": first, "between_s": between, "ended_s": ended}

    one = Replay([answer(1.0, [0.1, 0.6], 2.0), answer(3.0, [0.1], 4.0)], 10.0, 100, 80)
    other = Replay([answer(1.0, [0.1, 0.1], 1.0), answer(1.0, [], 1.0)], 30.0, 300, 200)
    found = figures([one, other])
    assert (found["requests"], found["tokens_per_s"], found["trained_per_s"]) == (4, 9 / 5, 20.0)
    assert (found["first_in_time"], found["later_in_time"]) == (0.75, 0.75)
    assert (found["cache_bytes"], found["cache_bytes_measured"]) == (200, 140)
    assert found["first_s"]["p50"] == 1.0


def test_the_figure_has_both_runs(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    times = {"first_s": {"p50": 1.0, "p99": 4.0}, "between_s": {"p50": 0.1, "p99": 2.0}}
    run = {**times, "first_in_time": 0.8, "later_in_time": 0.6}
    serve_bench.draw_serve({"batched": run, "unbatched": {**run, "later_in_time": 0.2}}, tmp_path / "serve.png")
    other = tmp_path / "other.png"
    serve_bench.draw_serve({"batched": run, "unbatched": run}, other)
    assert (tmp_path / "serve.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "serve.png").read_bytes() != other.read_bytes()
    with pytest.raises(KeyError):
        serve_bench.draw_serve({"batched": run}, other)


@pytest.mark.long
@pytest.mark.server
@pytest.mark.usefixtures("warm_children")
def test_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # By how much the worker shrinks is not looked at here.
    monkeypatch.setattr(serve_bench, "SETTLE_SECONDS", 0.0)
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
