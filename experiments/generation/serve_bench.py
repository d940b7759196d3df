"""A replay of real requests against one cloud, half of whose tenants train meanwhile; with batching and without.

The requests are those of the Azure LLM inference traces of 2023 (Patel et al. 2024, "Splitwise", ISCA): when each
came, its context and how much was generated. They are scaled to the model and the machine: fewer tokens, and another
rate. The traces have no texts, so the prompts are random tokens. The first half of the requests is replayed with
batching and then without, the second half the other way round, each time against a new cloud, so that whatever else the
machine does hits both alike. Each half begins with an empty queue, so a cloud that falls behind shows less of it than
in one long run. As the requests come at a given rate, `tokens_per_s` is about that rate wherever a cloud keeps up with
it, and no measure of what it could do. `--batching off` keeps every call by itself, those of training, too.
"""

from __future__ import annotations

import csv
import datetime
import itertools
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import typer

from isthmus.backbone.checkpoints.sources import resolve
from isthmus.backbone.families import longest_sequence
from isthmus.common.errors import ConfigError
from isthmus.common.figures import plotting, save_figure
from isthmus.experiments.generation.replay_process import MODULE
from isthmus.experiments.harness.generation_settings import ServeSettings
from isthmus.experiments.harness.launch import LocalCloud, stderr_progress
from isthmus.experiments.harness.process_memory import memory_bytes
from isthmus.experiments.harness.processes import TaskProcess

TRACES = ("AzureLLMInferenceTrace_conv.csv", "AzureLLMInferenceTrace_code.csv")
RUNS: dict[str, tuple[str, ...]] = {"batched": (), "unbatched": ("--batching", "off")}
"""The further options of each one's cloud."""
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


@dataclass(frozen=True, slots=True)
class Replay:
    """What came of replaying some requests against one cloud.

    Attributes:
        answers: What the tenants that ask said of each request.
        trained_per_s: Token positions per second of those that train.
        cache_bytes: What the cloud counted for keys and values at the end.
        cache_bytes_measured: By how much its worker shrank when these were released.
    """

    answers: Sequence[dict[str, Any]]
    trained_per_s: float
    cache_bytes: int
    cache_bytes_measured: int


def run_serve(settings: ServeSettings, folder: Path) -> dict[str, Any]:
    """Measure; see the module.

    Returns:
        `batched` and `unbatched`, each with `requests`, `tokens_per_s` (generated), `trained_per_s` (token positions),
        `first_s` and `between_s` (each p50 and p99), `first_in_time` and `later_in_time` (the share of requests whose
        first token came within 2 s, and all of whose later ones within 0.5 s), and of the cloud's memory
        `cache_bytes`, what it counted for keys and values at the end, and `cache_bytes_measured`, by how much the
        worker shrank when these were released, both in the mean of the two halves.
    """
    if settings.figure is not None:
        plotting()  # a missing package is reported before the long run, not after it
    first, second = _halves(_requests(settings))
    replays: dict[str, list[Replay]] = {name: [] for name in RUNS}
    for half, requests, names in ((1, first, RUNS), (2, second, reversed(RUNS))):
        for name in names:
            replays[name].append(_replay(settings, folder / f"{name}-{half}", requests, *RUNS[name]))
    result = {name: figures(found) for name, found in replays.items()}
    if settings.figure is not None:
        draw_serve(result, settings.figure)
    return {**result, **asdict(settings), "traces": str(settings.traces)}


def show(result: dict[str, Any]) -> None:
    """Print the two runs beside each other."""
    for name in result["batched"]:
        cells = (result[run][name] for run in RUNS)
        typer.echo(f"{name:24} " + "  ".join(f"{_cell(each):>22}" for each in cells))


def draw_serve(result: Mapping[str, Any], path: Path) -> None:
    """Draw the times of tokens, and the shares of requests that were in time, with batching and without."""
    times = {"first token, s": "first_s", "between tokens, s": "between_s"}
    panels: dict[str, list[tuple[str, list[float]]]] = {
        title: [(rank, [result[run][name][rank] for run in RUNS]) for rank in ("p50", "p99")]
        for title, name in times.items()
    }
    shares = {
        f"first within {FIRST_SECONDS:g} s": "first_in_time",
        f"later within {BETWEEN_SECONDS:g} s": "later_in_time",
    }
    panels["requests in time, %"] = [
        (label, [100 * result[run][name] for run in RUNS]) for label, name in shares.items()
    ]
    figure, axes = plotting().subplots(1, len(panels), figsize=(10, 3.6), dpi=144)
    for panel, (title, bars) in zip(axes, panels.items(), strict=True):
        for place, run in enumerate(RUNS):
            at = [number + 0.4 * (place - 0.5) for number in range(len(bars))]
            panel.bar(at, [heights[place] for _, heights in bars], width=0.38, label=run)
        panel.set_xticks(range(len(bars)), [label for label, _ in bars])
        panel.set_title(title)
        panel.grid(axis="y", alpha=0.3)
    axes[0].legend()
    save_figure(figure, path)


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


def _halves(requests: Sequence[TraceRequest]) -> tuple[Sequence[TraceRequest], Sequence[TraceRequest]]:
    """The first half of the requests, and the second one, which begins at 0, too."""
    middle = len(requests) // 2
    begun = requests[middle].at
    return requests[:middle], [replace(each, at=each.at - begun) for each in requests[middle:]]


def _replay(settings: ServeSettings, folder: Path, requests: Sequence[TraceRequest], *options: str) -> Replay:
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
    return Replay(answers, sum(each["positions"] / each["seconds"] for each in trained), counted, measured)


def figures(replays: Sequence[Replay]) -> dict[str, Any]:
    """The figures of both halves together; see `run_serve`."""
    answers = [answer for each in replays for answer in each.answers]
    seconds = sum(max(answer["ended_s"] for answer in each.answers) for each in replays)
    first = [each["first_s"] for each in answers]
    between = [gap for each in answers for gap in each["between_s"]]
    return {
        "requests": len(answers),
        "tokens_per_s": sum(1 + len(each["between_s"]) for each in answers) / seconds,
        "trained_per_s": statistics.mean(each.trained_per_s for each in replays),
        "first_s": _percentiles(first),
        "between_s": _percentiles(between),
        "first_in_time": statistics.mean(each <= FIRST_SECONDS for each in first),
        "later_in_time": statistics.mean(max(each["between_s"], default=0.0) <= BETWEEN_SECONDS for each in answers),
        "cache_bytes": statistics.mean(each.cache_bytes for each in replays),
        "cache_bytes_measured": statistics.mean(each.cache_bytes_measured for each in replays),
    }


def _memory(cloud: LocalCloud, askers: list[TaskProcess], trainers: list[TaskProcess]) -> tuple[int, int]:
    """What the cloud counts for keys and values, and by how much it shrinks when they are released, in bytes."""
    for process in trainers:
        process.finish(60)
    time.sleep(SETTLE_SECONDS)
    status = cloud.status()
    before = _anonymous_bytes(status["pid"])
    for process in askers:
        process.finish(60)
    time.sleep(SETTLE_SECONDS)
    return status["cache_bytes"], before - _anonymous_bytes(status["pid"])


def _anonymous_bytes(pid: int) -> int:
    """Memory of a process that is of no file. PSS grows when edges end, with which the worker shares libraries."""
    return memory_bytes(pid, "status", "RssAnon")


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
