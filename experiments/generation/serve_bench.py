"""A replay of real requests against one cloud, half of whose tenants train meanwhile; with batching and without.

The requests are those of the Azure LLM inference traces of 2023 (Patel et al. 2024, "Splitwise", ISCA): when each
came, its context and how much was generated. They are scaled to the model and the machine: fewer tokens, and another
rate.
"""

from __future__ import annotations

import csv
import datetime
import itertools
import statistics
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import typer

from isthmus.backbone.checkpoints.sources import resolve
from isthmus.backbone.families import longest_sequence
from isthmus.common.errors import ConfigError
from isthmus.experiments.generation.replay_process import MODULE
from isthmus.experiments.harness.bench_settings import ServeSettings
from isthmus.experiments.harness.launch import LocalCloud, stderr_progress
from isthmus.experiments.harness.process_memory import proportional_bytes
from isthmus.experiments.harness.processes import TaskProcess

TRACES = ("AzureLLMInferenceTrace_conv.csv", "AzureLLMInferenceTrace_code.csv")
SESSIONS = 2
"""Of each tenant that asks: further requests of its wait for one of these."""
FIRST_SECONDS, BETWEEN_SECONDS = 2.0, 0.5
"""Within which a first token, and each later one, should come."""
SETTLE_SECONDS = 3.0
"""After which a worker that is idle has given free memory back."""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """A request: seconds after the first one, tokens before it, tokens to generate."""

    at: float
    context: int
    tokens: int


def run_serve(settings: ServeSettings, folder: Path) -> dict[str, Any]:
    """Measure; see the module.

    Returns:
        `batched` and `unbatched`, each with `requests`, `tokens_per_s` (generated), `trained_per_s` (token positions),
        `first_s` and `between_s` (each p50 and p99), `first_in_time` and `later_in_time` (the share of requests whose
        first token came within 2 s, and all of whose later ones within 0.5 s), and of the cloud's memory
        `cache_bytes`, what it counted for keys and values at the end, and `cache_bytes_measured`, by how much the
        worker shrank when these were released.
    """
    requests = _requests(settings)
    return {
        "batched": _run(settings, folder / "batched", requests),
        "unbatched": _run(settings, folder / "unbatched", requests, "--batching", "off"),
        **asdict(settings),
        "traces": str(settings.traces),
    }


def show(result: dict[str, Any]) -> None:
    """Print the two runs beside each other."""
    for name in result["batched"]:
        cells = (result[run][name] for run in ("batched", "unbatched"))
        typer.echo(f"{name:24} " + "  ".join(f"{_cell(each):>22}" for each in cells))


def read_trace(path: Path) -> list[TraceRequest]:
    """The requests of a trace.

    Raises:
        ConfigError: It is none.
    """
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        moments = [datetime.datetime.fromisoformat(row["TIMESTAMP"][:26]) for row in rows]
        return [
            TraceRequest((at - moments[0]).total_seconds(), int(row["ContextTokens"]), int(row["GeneratedTokens"]))
            for at, row in zip(moments, rows, strict=True)
        ]
    except (OSError, KeyError, ValueError) as error:
        raise ConfigError(
            f"{path} is no trace with TIMESTAMP, ContextTokens and GeneratedTokens ({error}): give --traces the folder "
            "with the Azure LLM inference traces of 2023"
        ) from error


def _requests(settings: ServeSettings) -> list[TraceRequest]:
    """The first requests of both traces, scaled, in the order in which they come."""
    longest = longest_sequence(resolve(settings.model).config)
    found = []
    for name in TRACES:
        first = read_trace(settings.traces / name)[: settings.requests]
        speed = first[-1].at * settings.rate / (2 * len(first))  # both together come at the rate
        for each in first:
            tokens = max(2, round(each.tokens / settings.fewer))
            context = min(max(1, round(each.context / settings.fewer)), longest - tokens)
            found.append(TraceRequest(each.at / speed if speed else 0.0, context, tokens))
    return sorted(found, key=lambda each: each.at)


def _run(settings: ServeSettings, folder: Path, requests: list[TraceRequest], *options: str) -> dict[str, Any]:
    """One cloud, half of whose tenants train while the others ask."""
    half = settings.n // 2
    with (
        LocalCloud(
            folder,
            settings.model,
            *("--edge-layers", settings.edge_layers, "--threads", str(settings.threads), *options),
        ) as cloud,
        ExitStack() as stack,
    ):
        trainers = [_edge(cloud, number, stack, trains=True) for number in range(half)]
        askers = [_edge(cloud, number, stack, trains=False) for number in range(half, settings.n)]
        for process in (*trainers, *askers):
            process.answer()
        start = time.monotonic() + 0.5
        for process in trainers:
            process.send("go")
        for number, process in enumerate(askers):
            mine = [asdict(each) for each in itertools.islice(requests, number, None, half)]
            process.send({"start": start, "requests": mine})
        answers = []
        with stderr_progress("tenants that ask", half) as advance:
            for process in askers:
                answers += process.answer()
                advance()
        for process in trainers:
            process.send("over")
        trained = [process.answer() for process in trainers]
        counted, measured = _memory(cloud, askers, trainers)
    seconds = max(each["ended_s"] for each in answers)
    first = [each["first_s"] for each in answers]
    between = [gap for each in answers for gap in each["between_s"]]
    return {
        "requests": len(answers),
        "tokens_per_s": sum(1 + len(each["between_s"]) for each in answers) / seconds,
        "trained_per_s": sum(each["positions"] / each["seconds"] for each in trained),
        "first_s": _percentiles(first),
        "between_s": _percentiles(between),
        "first_in_time": statistics.mean(each <= FIRST_SECONDS for each in first),
        "later_in_time": statistics.mean(max(each["between_s"], default=0.0) <= BETWEEN_SECONDS for each in answers),
        "cache_bytes": counted,
        "cache_bytes_measured": measured,
    }


def _memory(cloud: LocalCloud, askers: list[TaskProcess], trainers: list[TaskProcess]) -> tuple[int, int]:
    """What the cloud counts for keys and values, and by how much it shrinks when they are released, in bytes."""
    for process in trainers:
        process.finish(60)
    time.sleep(SETTLE_SECONDS)
    status = cloud.status()
    before = proportional_bytes(status["pid"])
    for process in askers:
        process.finish(60)
    time.sleep(SETTLE_SECONDS)
    return status["cache_bytes"], before - proportional_bytes(status["pid"])


def _edge(cloud: LocalCloud, number: int, stack: ExitStack, *, trains: bool) -> TaskProcess:
    key = cloud.edge_key.parent / f"edge-{number}"
    cloud.enroll(f"edge-{number}", key)
    sessions = 1 if trains else SESSIONS
    task = {"connection": cloud.connection, "key": str(key), "trains": trains, "sessions": sessions}
    return stack.enter_context(TaskProcess(f"edge {number}", MODULE, task, threads=1))


def _percentiles(values: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": cuts[49], "p99": cuts[98]}


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{name} {each:.2f}" for name, each in value.items())
    return f"{value:.2f}" if isinstance(value, float) else str(value)
